"""What a rank of the tests runs, under torchrun: `rank.py train TARGET OUT [DEVICE_MAP]`, or `rank.py MISTAKE ARGUMENTS`.

In ARGUMENTS {rank} stands for the rank.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import DynamicCache

from redraft import cli
from redraft.config import TrainConfig
from redraft.core import failpoints, ranks
from redraft.core.errors import UserError
from redraft.core.files import write_tensors, write_text
from redraft.core.records import Answer
from redraft.decoding.sampling import Sampling
from redraft.metrics.measure import answer_all
from redraft.models.batching import Batch
from redraft.models.loading import load_target
from redraft.models.target import Target
from redraft.models.tensor_parallel import TENSOR_PARALLEL
from redraft.training import adapter_run
from redraft.training.stream import AnswerStream
from redraft.training.train import train, train_adapters
from tests.conftest import asked, fresh_draft

CONFIG = TrainConfig(
    method="full",
    lr=3e-3,
    epochs=2,
    batch_tokens=256,
    rollout=3,
    evaluations=3,
    patience=9,
    precision="fp32",
)
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulate": {"accumulate": 3},
    "noise": {"feature_noise": 0.2, "average": 0.9, "accumulate": 2},
    "expert": {"method": "expert+fc+norms", "width": "8", "loss": "tv"},
    "muon": {"optimizer": "muon", "weight_decay": 0.1},
}
WRONG = "wrong"
"""Every rank divides by the labels of its own share, or reads on with its part of each layer's sum."""


def train_all(
    folder: str, device_map: str | None = None, cases: dict[str, dict[str, Any]] = CASES
) -> dict[str, dict[str, Tensor]]:
    """The tensors of each case, their held-out taus and the rows that the target read, trained in float64."""
    target = load_target(folder, dtype="float64", device_map=device_map)
    answers = answer_all(target, asked(target), 32, 8, Sampling())
    found = {}
    for name, changes in cases.items():
        config = dataclasses.replace(CONFIG, **changes)
        with rows_read() as rows:
            trained = train(target, fresh_draft(target), answers, answers[:4], config, k=3)
        taus = torch.tensor([tau for _, tau in trained.record.heldout_tau], dtype=torch.float64)
        loss = torch.tensor(trained.record.final_loss, dtype=torch.float64)
        read = torch.tensor(float(sum(ranks.of_each_share(sum(rows)))))
        found[name] = {**trained.tensors, "taus": taus, "loss": loss, "rows": read}
    return found | {"together": _together(target, answers)}


@contextlib.contextmanager
def rows_read() -> Iterator[list[int]]:
    """How many rows this rank's target reads at a time to train on."""
    found: list[int] = []
    read = AnswerStream._states

    def noted(stream: AnswerStream, indices: Sequence[int], batch: Batch) -> Tensor:
        found.append(len(indices))
        return read(stream, indices, batch)

    with patch.object(AnswerStream, "_states", noted):
        yield found


def _together(target: Target, answers: list[Answer]) -> dict[str, Tensor]:
    """Two adapters on one stream."""
    configs = [dataclasses.replace(CONFIG, method=name, width="8") for name in ("fc", "expert")]
    both = train_adapters(target, fresh_draft(target), answers, answers[:4], configs, k=3)
    return {f"{i}/{name}": t for i, one in enumerate(both) for name, t in one.tensors.items()}


def wrong(folder: str) -> dict[str, dict[str, Tensor]]:
    loss = adapter_run.rollout_loss
    adapter_run.rollout_loss = lambda *given: loss(*given[:-1])  # type: ignore[assignment]
    return {WRONG: train_all(folder, None, {"plain": {}})["plain"]}


def note_state(held: list[int]) -> None:
    """Note how many numbers of the optimizers' state this rank has after each step."""
    move = adapter_run.AdapterRun._move

    def noted(run: adapter_run.AdapterRun) -> None:
        move(run)
        slots = (s for o in run.optimizers for slots in o.state.values() for s in slots.values())
        held.append(sum(slot.numel() for slot in slots if slot.dim()))

    adapter_run.AdapterRun._move = noted  # type: ignore[method-assign]


def read_twice(target: Target) -> dict[str, Tensor]:
    """What a target computes of a row, and of one more token on a cache."""
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        whole = target.read(tokens, (2, 5, 8))
        cache = DynamicCache(config=target.model.config)
        target.model(input_ids=tokens[:, :-1], past_key_values=cache)
        last = target.model(input_ids=tokens[:, -1:], past_key_values=cache).logits
    return {
        "features": whole.features_BTF.contiguous(),
        "logits": whole.logits_BTV.contiguous(),
        "last": last.contiguous(),
    }


def fails_at(step: int, how: str) -> None:
    """The end of the second rank, or of the first by a full disk, after so many steps of training."""
    seen = 0

    def hook(name: str) -> None:
        nonlocal seen
        seen += name == "training: after a step"
        if seen != step or ranks.rank() != (how != "full"):
            return
        if how == "dies":
            os._exit(9)
        raise UserError("the disk of this rank is full")

    failpoints.armed = hook


def main() -> None:
    torch.set_num_threads(1)
    what, *given = sys.argv[1:]
    if what == "train":
        ranks.join(print)
        folder, out = given[:2]
        device_map = given[2] if len(given) > 2 else None
        held: list[int] = []
        note_state(held)
        found = train_all(folder, device_map)
        for name, tensors in (found if device_map else found | wrong(folder)).items():
            write_tensors(Path(out) / f"{name}.safetensors", tensors)
        write_text(Path(out) / "ranks.json", json.dumps(ranks.everyone([ranks.rank(), held[0]])))
        ranks.leave()
        return
    if what == "read":
        ranks.join(print)
        for folder in sorted(path for path in Path(given[0]).iterdir() if path.is_dir()):
            target = load_target(str(folder), device_map=TENSOR_PARALLEL)
            write_tensors(folder.with_suffix(".safetensors"), read_twice(target))
        torch.distributed.all_reduce = lambda *given, **more: None
        write_tensors(folder.with_name(f"{WRONG}.safetensors"), read_twice(target))
        ranks.leave()
        return
    if what in ("dies", "fails", "full"):
        fails_at(2, what)
    sys.argv[1:] = [word.replace("{rank}", os.environ["RANK"]) for word in given]
    cli.main()


if __name__ == "__main__":
    main()
