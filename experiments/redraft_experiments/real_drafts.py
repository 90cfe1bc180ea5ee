"""The drafts of the suite of real models, one row each, and how they are made of the base's answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from redraft.config import TrainConfig, key_of
from redraft.core.errors import UserError
from redraft.core.lock import held
from redraft.drafts.base import Draft
from redraft.drafts.new import new_draft
from redraft.features.store import FeatureStore
from redraft.features.stored_target import load_stored_target
from redraft.generation.answer_file import read_answers
from redraft.models.target import Target
from redraft.pipeline.stages import Shape, save_fresh, train_files
from redraft.training.train import train

from .kept_parts import KEPT, restore
from .language_model import IGNORE, Example, fit, save_model
from .real_members import BASE

K = 4


@dataclass(frozen=True)
class Trained:
    """A draft of a `shape`, trained from nothing as `config` says.

    Where its method leaves the head alone, that is the base's rows, so that only the rest has to be kept.
    """

    folder: str
    shape: Shape
    config: TrainConfig

    def about(self) -> dict[str, Any]:
        return {"shape": asdict(self.shape), **key_of(self.config)}


@dataclass(frozen=True)
class Pruned:
    """A small language model: some `layers` of the base, tuned on its answers."""

    folder: str
    layers: tuple[int, ...]
    steps: int
    batch: int = 8
    lr: float = 3e-4

    def about(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Kept:
    """The EAGLE-3 draft that comes with the package, for which no answers are needed (see `kept_parts.py`)."""

    folder: str

    def about(self) -> dict[str, Any]:
        return {"kept": KEPT.name}


DRAFT = TrainConfig(
    method="body",
    loss="kl",
    epochs=3,
    batch_tokens=1024,
    rollout=4,
    evaluations=16,
    patience=16,
    precision="bf16",
)
DRAFTS: dict[str, Trained | Pruned | Kept] = {
    "eagle3": Trained("draft", Shape(draft_vocab_size=8192), DRAFT),
    "kept": Kept("draft"),
    "eagle": Trained(
        "draft-eagle",
        Shape(kind="eagle"),
        TrainConfig(**{**asdict(DRAFT), "method": "scratch", "epochs": 1, "evaluations": 6}),
    ),
    "small-lm": Pruned("draft-lm", (0, 1, 2, 15, 28, 29), 400),
}


def make_draft(out: Path, name: str) -> None:
    """A draft of the suite in `out`."""
    row = DRAFTS[name]
    if isinstance(row, Kept):
        restore(out / BASE, out / row.folder)
        return
    if isinstance(row, Pruned):
        _prune(out, row)
        return
    base = load_stored_target(str(out / BASE), [FeatureStore(out / "features")])
    answers, heldout = (out / "answers" / f"{name}.jsonl" for name in ("base", "heldout"))
    if row.config.method_value.fresh:
        train_files(base, answers, heldout, out / row.folder, row.config, K, shape=row.shape)
        return
    chosen = read_answers(answers)
    (out / row.folder).mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(), held(out / row.folder):
        torch.manual_seed(row.config.seed)
        draft = new_draft(base, chosen, **vars(row.shape))
        take_head(draft, base)
        kept = out / row.folder / "checkpoints"
        trained = train(
            base, draft, chosen, read_answers(heldout), row.config, k=K, checkpoints=kept
        )
        save_fresh(out / row.folder, draft.to(base.dtype), base, trained.record)


@torch.no_grad()
def take_head(draft: Draft, base: Target) -> None:
    """The base's final norm and its head's rows of the draft's vocabulary, in place of the draft's own."""
    head = base.head_VH
    if head is None:
        raise UserError(f"{base.name} has no output head of plain rows that a draft could take")
    own = dict(draft.named_parameters())
    rows = head if draft.draft_vocab is None else head[draft.draft_vocab]
    own["lm_head.weight"].copy_(rows)
    own["norm.weight"].copy_(base.model.get_decoder().norm.weight)


def _prune(out: Path, row: Pruned) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = out / BASE
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=False)
    keep_layers(model, row.layers)
    examples = [
        _example(answer.prompt, answer.answer)
        for answer in read_answers(out / "answers" / "base.jsonl")
    ]
    steps, batch = row.steps, row.batch
    fit(
        model,
        examples,
        steps=steps,
        batch=batch,
        lr=row.lr,
        seed=0,
        label=row.folder,
        precision="bf16",
    )
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    save_model(out / row.folder, model.to(torch.bfloat16), tokenizer)


def keep_layers(model: Any, layers: tuple[int, ...]) -> None:
    """Take all other layers out of a Llama, in place. Raises IndexError for a layer that it does not have."""
    kept = [model.model.layers[i] for i in layers]
    for at, layer in enumerate(kept):
        layer.self_attn.layer_idx = at
    model.model.layers = torch.nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[i] for i in layers]


def _example(prompt: Sequence[int], answer: Sequence[int]) -> Example:
    return [*prompt, *answer], [IGNORE] * len(prompt) + list(answer)
