"""Fine-tune an EAGLE-3 draft with the trainer of the package `speculators`, on a CPU.

A script for an environment of its own (see `speculators_run.py`), which imports nothing of redraft. Arguments, data
loader, model, loss, optimizers, schedule and checkpoints are the package's: it is
`speculators train --from-pretrained`. Written against speculators 0.9.0, torch 2.13.0, transformers 5.19.0.

`--draft` is a folder in the speculators format, `--data` one of features in the speculators layout. `--out` gets
config.json and model.safetensors of the last epoch's checkpoint, train_log.jsonl (one record a step) and
summary.json. Options that are not named here go to the package.

Patched, each because the package assumes an accelerator:

1. `Trainer.device_type` and `Trainer.local_rank`: the trainer moves model and batches to the integer 0, the first
   accelerator, and opens autocast for "cuda" where there is none. A subclass sets both to the CPU.
2. `torch.accelerator.synchronize`, which its step timer calls, raises without an accelerator. It does nothing here.

Chosen among the package's own options for other hardware: the eager loss (the default needs Triton), attention by
`sdpa` (flex attention has no backward pass on a CPU), no workers.

The draft is read from a changed copy. Its config names the target's folder, whose final norm and head the
package reads. Its weights are float32: the package trains in the dtype that it finds. Where the file has no
embedding the target's is added: the package looks for NaN to see that one is missing, but transformers 5 has put
unset memory in its place by then, and the draft would be trained with that without a message.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

METRICS_LOGGER = "speculators.metrics"


class StepLog(logging.Handler):
    """Keeps what the trainer logs, as JSON lines and in memory."""

    def __init__(self, path: Path) -> None:
        super().__init__(logging.INFO)
        self.path = path
        self.steps: list[dict[str, Any]] = []
        self.validations: list[dict[str, Any]] = []
        self.trained: dict[str, str] = {}
        self.frozen: dict[str, str] = {}

    def emit(self, record: logging.LogRecord) -> None:
        if not isinstance(record.msg, dict):
            return
        if "train" in record.msg:
            self.steps.append(record.msg)
        elif "val" in record.msg:
            self.validations.append(record.msg)
        else:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record.msg) + "\n")


def target_embedding(target: Path) -> torch.Tensor:
    """The input embedding of a Hugging Face folder, in one file or several."""
    for file in sorted(target.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (not a mapping)
                if name.endswith("embed_tokens.weight"):
                    embedding: torch.Tensor = tensors.get_tensor(name)
                    return embedding
    raise SystemExit(f"{target} holds no embed_tokens.weight")


def stage_draft(draft: Path, target: Path, folder: Path) -> Path:
    """A copy of the draft that names this target and holds float32 weights and an embedding."""
    config: dict[str, Any] = json.loads((draft / "config.json").read_text(encoding="utf-8"))
    if config.get("speculators_model_type") != "eagle3":
        raise SystemExit(f"{draft} is not an EAGLE-3 draft in the speculators format")
    config["speculators_config"]["verifier"]["name_or_path"] = str(target.resolve())
    for key in ("dtype", "torch_dtype"):
        config.pop(key, None)
    config["dtype"] = "float32"
    tensors = load_file(draft / "model.safetensors")
    if "embed_tokens.weight" not in tensors:
        tensors["embed_tokens.weight"] = target_embedding(target)
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            tensors[name] = tensor.float()
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def run_on_cpu(log: StepLog) -> None:
    """Apply patches 1 and 2, and attach the log once the package has set up its own logging."""
    from speculators.train import cli
    from speculators.train.trainer import Trainer

    class CpuTrainer(Trainer):  # type: ignore[misc]
        def setup_trainer(self) -> None:
            self.local_rank = torch.device("cpu")
            self.device_type = "cpu"
            logging.getLogger(METRICS_LOGGER).addHandler(log)
            super().setup_trainer()
            trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
            frozen = {n: p for n, p in self.model.named_parameters() if not p.requires_grad}
            log.trained = describe(trained)
            log.frozen = describe(frozen)

    cli.Trainer = CpuTrainer
    if not torch.accelerator.is_available():
        torch.accelerator.synchronize = lambda *_args, **_kwargs: None


def describe(parameters: dict[str, torch.nn.Parameter]) -> dict[str, str]:
    return {name: f"{list(p.shape)} {str(p.dtype)[6:]}" for name, p in parameters.items()}


def last_checkpoint(root: Path) -> Path:
    """The folder of the last epoch."""
    epochs = [p for p in root.iterdir() if p.is_dir() and p.name.isdigit()]
    if not epochs:
        raise SystemExit(f"the package saved no checkpoint in {root}")
    return max(epochs, key=lambda p: int(p.name))


def arguments() -> tuple[argparse.Namespace, list[str]]:
    """Its own options, and those for the package."""
    parser = argparse.ArgumentParser(
        description="Full fine-tune of an EAGLE-3 draft by `speculators`, on a CPU.",
        epilog="Further options go to `speculators train` unchanged.",
        allow_abbrev=False,
    )
    parser.add_argument("--draft", type=Path, required=True, help="draft, speculators format")
    parser.add_argument("--target", type=Path, required=True, help="target folder")
    parser.add_argument("--data", type=Path, required=True, help="features, speculators layout")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must be new")
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--batch-tokens", type=int, required=True, help="tokens a step, padded")
    return parser.parse_known_args()


def summary_of(log: StepLog, argv: list[str], epoch: int, seconds: float) -> dict[str, Any]:
    """What summary.json holds."""
    profiles = [step["profile"] for step in log.steps if step["profile"]]
    step_seconds = sum(p["step_ms"] for p in profiles) / 1000
    tokens = sum(p["tokens_per_s"] * p["step_ms"] / 1000 for p in profiles)
    return {
        "argv": argv,
        "epoch": epoch,
        "seconds": round(seconds, 2),
        "steps": len(log.steps),
        "tokens": round(tokens),
        "tokens_per_second": round(tokens / step_seconds, 1) if step_seconds else None,
        "loss_first_last": [log.steps[i]["train"]["loss"] for i in (0, -1)] if log.steps else [],
        "validation_loss": [v["val"].get("loss_epoch") for v in log.validations],
        "trained": log.trained,
        "frozen": log.frozen,
    }


def main() -> None:
    args, theirs = arguments()
    out: Path = args.out
    if out.exists() and any(out.iterdir()):
        raise SystemExit(f"{out} is not empty")
    out.mkdir(parents=True, exist_ok=True)
    checkpoints = out / "checkpoints"
    log = StepLog(out / "train_log.jsonl")

    with tempfile.TemporaryDirectory(dir=out, prefix="staged-") as staged:
        draft = stage_draft(args.draft, args.target, Path(staged) / "draft")
        argv = [
            *("--speculator-type", "eagle3"),
            *("--verifier-name-or-path", str(args.target.resolve())),
            *("--from-pretrained", str(draft)),
            *("--data-path", str(args.data)),
            *("--save-path", str(checkpoints)),
            *("--hidden-states-dtype", "bfloat16"),
            *("--draft-attn-impl", "sdpa"),
            *("--loss-implementation", "eager"),
            *("--num-workers", "0"),
            *("--on-missing", "raise"),
            *("--epochs", str(args.epochs)),
            *("--seed", str(args.seed)),
            *("--total-seq-len", str(args.batch_tokens)),
            *theirs,
        ]

        run_on_cpu(log)
        from speculators.train import cli
        from speculators.train.config import TrainConfig

        config = TrainConfig.resolve(argv)
        start = time.perf_counter()
        cli.main(config)
        seconds = time.perf_counter() - start

    chosen = last_checkpoint(checkpoints)
    for name in ("config.json", "model.safetensors"):
        shutil.copy2(chosen / name, out / name)
    summary = summary_of(log, argv, int(chosen.name), seconds)
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(checkpoints)
    sys.stdout.write(json.dumps({k: v for k, v in summary.items() if k != "argv"}, indent=2) + "\n")


if __name__ == "__main__":
    main()
