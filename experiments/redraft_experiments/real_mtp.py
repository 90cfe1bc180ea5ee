"""`redraft bench real-mtp`: a real model that has an MTP head, and a fine-tune that lost it.

SmolLM2 has none, so one is trained on its own answers, from its last layer. The model is written as a Qwen2 (its biases zeros)
under MiMo's architecture, whose heads vLLM serves on a CPU; it computes what it did before.

    trunk             the base without a head
    head              its head, trained on the base's answers of `bench real`
    base              both, as a maker publishes them
    tuned             a fine-tune of the trunk, saved without the head as training tools do
    mtp               `redraft mtp`: the base's head grafted, adapted and stitched in
    from-layer        a new head on the same answers, from the fine-tune's last layer
    record.json       what was measured

Every part is a stage of a run folder: building again continues where it stopped.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from redraft.checkpoints.load import read_draft
from redraft.checkpoints.own_head import inspect_head, new_head, stitch
from redraft.config import TrainConfig, key_of, resolve
from redraft.core.files import remove
from redraft.core.records import to_json
from redraft.core.report_record import AdaptReport
from redraft.features.store import FeatureStore
from redraft.features.stored_target import load_stored_target
from redraft.generation.answer_file import read_answers
from redraft.models.loading import load_target
from redraft.models.target import Target
from redraft.pipeline.adapt import adapt
from redraft.pipeline.own_head import RUN, give_head
from redraft.pipeline.run_folder import RunFolder
from redraft.pipeline.stages import save_fresh
from redraft.training.train import train

from .language_model import save_model
from .real_drafts import K
from .real_members import BASE, MEMBERS
from .real_suite import folders_of, load_real, prompts_of

HEAD = TrainConfig(
    method="full",
    lr=1e-3,
    epochs=1,
    batch_tokens=1024,
    rollout=K,
    evaluations=8,
    patience=8,
    precision="bf16",
)
LIMIT = 240
SETTINGS = {
    "regenerate.max_new_tokens": 96,
    "general.aside": 24,
    "measure.eval_limit": 48,
    "measure.heldout": 24,
    "measure.eval_new_tokens": 96,
    "train.batch_tokens": 2048,
    "train.precision": "bf16",
}


def bench_real_mtp(suite: Path, out: Path, member: str) -> dict[str, Any]:
    """Build what is missing in `out`, and return the record. Raises UserError where the suite lacks a part."""
    with RunFolder.open(out) as run:
        trunk = run.stage(
            "trunk", {"of": BASE}, ["trunk"], lambda: _write(suite, BASE, out / "trunk")
        )
        head = run.stage(
            "head",
            {"trunk": trunk, **key_of(HEAD)},
            ["head/config.json", "head/model.safetensors"],
            lambda: _train_head(suite, out),
            ["head"],
        )
        run.stage("base", {"head": head}, ["base"], lambda: _stitch(out))
        run.stage(
            "tuned", {"member": member}, ["tuned"], lambda: _write(suite, member, out / "tuned")
        )
        run.stage("on base", {"head": head}, ["on-base.json"], lambda: _measure_base(suite, out))
    grafted, _ = give_head(
        str(out / "tuned"),
        str(out / "base"),
        out / "mtp",
        lambda draft, to: _adapt(suite, out, member, draft, to),
    )
    fresh, _ = give_head(
        str(out / "tuned"),
        None,
        out / "from-layer",
        lambda draft, to: _adapt(suite, out, member, draft, to, out / "mtp" / RUN),
        lambda: load_target(str(out / "tuned")),
    )
    whole = inspect_head(str(out / "mtp" / "checkpoint"), str(out / "base"))
    record = {
        "member": member,
        "on base": json.loads((out / "on-base.json").read_text(encoding="utf-8")),
        "head": json.loads((out / "head" / "training.json").read_text(encoding="utf-8")),
        "grafted": to_json(grafted),
        "from layer": to_json(fresh),
        "checkpoint": to_json(whole),
    }
    with RunFolder.open(out) as run:
        run.write_json("record.json", record)
    return record


@torch.no_grad()
def _write(suite: Path, name: str, out: Path) -> None:
    """The base, or a member merged, as a Qwen2 that is served as a MiMo; no head."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config
    from transformers import Qwen2ForCausalLM as Qwen2

    folder, adapter = folders_of(suite, name)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, trust_remote_code=False
    )
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    c = model.config
    config = Qwen2Config(
        **{
            key: getattr(c, key)
            for key in (
                *(
                    "vocab_size",
                    "hidden_size",
                    "intermediate_size",
                    "num_hidden_layers",
                    "rms_norm_eps",
                ),
                *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
                *(
                    "rope_parameters",
                    "tie_word_embeddings",
                    "bos_token_id",
                    "eos_token_id",
                    "pad_token_id",
                ),
            )
        }
    )
    other = Qwen2(config).to(torch.bfloat16)
    _, surplus = other.load_state_dict(model.state_dict(), strict=False)
    assert not surplus, surplus
    for name_of, parameter in other.named_parameters():
        if name_of.endswith(".bias"):
            parameter.zero_()
    other.generation_config = model.generation_config
    save_model(out, other, AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
    path = out / "config.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    raw |= {"architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1}
    path.write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def _train_head(suite: Path, out: Path) -> None:
    """From the last layer, on the states of the base that the suite stores: the trunk computes the same ones."""
    base = load_stored_target(str(suite / BASE), [FeatureStore(suite / "features")])
    draft = new_head(load_target(str(out / "trunk"))).build(dtype=torch.float32)
    draft.bind(base)
    answers, heldout = (read_answers(suite / "answers" / f"{n}.jsonl") for n in ("base", "heldout"))
    folder = out / "head"
    folder.mkdir(parents=True, exist_ok=True)
    trained = train(base, draft, answers, heldout, HEAD, k=K, checkpoints=folder / "checkpoints")
    save_fresh(folder, draft.to(base.dtype), base, trained.record)


def _stitch(out: Path) -> None:
    remove(out / "base")
    stitch(str(out / "trunk"), read_draft(str(out / "head")), out / "base")


def _measure_base(suite: Path, out: Path) -> None:
    """tau of the head on its own base, on held-out prompts."""
    from redraft.core.files import write_text
    from redraft.metrics.measure import measure_answers

    base: Target = load_real(suite, BASE)
    answers = read_answers(suite / "answers" / "heldout.jsonl")
    found = measure_answers(base, read_draft(str(out / "head")).build(base), answers, k=K)
    write_text(out / "on-base.json", json.dumps(to_json(found.acceptance)) + "\n")


def _adapt(
    suite: Path, out: Path, member: str, draft: str, to: Path, same: Path | None = None
) -> AdaptReport:
    """Adapt a head to the fine-tune; on the answers of the run `same`, every tensor of it."""
    domain = MEMBERS[member].domain
    more = (
        {}
        if same is None
        else {"train.method": "full", "train.lr": HEAD.lr, "general.guard": "off"}
    )
    return adapt(
        load_target(str(out / "tuned")),
        draft,
        str(prompts_of(suite, domain, "adapt")) if same is None else None,
        answers=None if same is None else str(same / "answers" / "adapt.jsonl"),
        out=to,
        limit=LIMIT,
        eval_prompts=str(prompts_of(suite, domain, "eval")),
        off_domain={"chat": str(prompts_of(suite, "chat", "eval"))},
        config=resolve([("bench real-mtp", {**SETTINGS, **more})]),
    ).report


def in_words(record: dict[str, Any]) -> str:
    """A line for each head."""
    grafted, fresh = (AdaptReport.from_json(record[name]) for name in ("grafted", "from layer"))
    rows = {
        "of the head on its own base": record["on base"]["tau"],
        f"grafted onto {record['member']}": grafted.before.tau,
        "grafted and adapted": grafted.after.tau,
        "from the last layer, on the same answers": fresh.after.tau,
    }
    return "\n".join(f"tau {tau:.2f}  {name}" for name, tau in rows.items())
