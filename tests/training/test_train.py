"""The loop: what is supervised, who is trained, resuming to the same bytes, and how it ends."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from redraft.batches import collate, plan_epochs, plan_once
from redraft.config import TrainConfig
from redraft.drafts.base import Draft
from redraft.drafts.eagle3 import Eagle3Draft
from redraft.drafts.table import KINDS
from redraft.errors import UserError
from redraft.formats.folders import tensor_hash
from redraft.formats.load import load_draft, stored
from redraft.formats.twin import Twin
from redraft.measuring.acceptance import pooled_tau
from redraft.measuring.replay import replay
from redraft.private.table import METHODS
from redraft.records import Answer
from redraft.target import Target
from redraft.training import train as train_module
from redraft.training.precision import choose_precision
from redraft.training.train import Trained, rollout_loss, schedule, train
from tests.conftest import fresh_draft, in_double

CONFIG = TrainConfig(
    method="expert+fc",
    width=8,
    lr=5e-3,
    epochs=2,
    batch_tokens=256,
    rollout=3,
    evaluations=3,
    precision="fp32",
)


def run(
    target: Target,
    folder: Path,
    answers: list[Answer],
    config: TrainConfig = CONFIG,
    checkpoints: Path | None = None,
) -> tuple[Trained, Draft]:
    draft = load_draft(str(folder), target, torch.float32)
    return train(target, draft, answers, answers[:4], config, k=3, checkpoints=checkpoints), draft


@pytest.mark.parametrize(("kind", "decay"), [("eagle3", 1.0), ("eagle3", 0.5), ("eagle", 0.5)])
def test_the_loss_is_kl_per_supervised_token(
    target_folder: Path, kind: str, decay: float, tmp_path: Path
) -> None:
    """Against chains written out one by one: which tokens count, which position teaches them."""
    target = in_double(target_folder)
    draft = fresh_draft(target, kind=kind)
    stored(draft, target).save(tmp_path / "draft")
    config = replace(CONFIG, step_decay=decay)
    rows = [
        Answer("a", (5, 6, 7), (20, 21, 22, 23, 1), 5, "stop"),
        Answer("b", (8, 9, 10, 11, 12), (30, 31, 32), 3, "length"),
    ]
    loss, count = rollout_loss(target, draft, collate(rows, target.device), config)
    total = weight = 0.0
    plain = Twin(tmp_path / "draft", target.embedding_VH, target.head.weight)
    for row in rows:
        tokens = [*row.prompt, *row.tokens]
        reading = target.read(torch.tensor([tokens]), draft.taps)
        begin = len(row.prompt)
        for start in range(begin - 1, len(tokens) - 2):
            steps = min(3, len(tokens) - 2 - start)
            chain = plain.chain_logits(tokens, reading.features_BTF[0], start, steps)
            for step, logits in enumerate(chain):
                log_p = reading.logits_BTV[0, start + step + 1].log_softmax(-1)
                kl = (log_p.exp() * (log_p - logits.log_softmax(-1))).sum()
                total += decay**step * float(kl)
                weight += decay**step
    assert count == 4 + 2  # the first answer token comes from the prefill
    assert float(loss) == pytest.approx(total / weight, abs=1e-6)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("method", list(METHODS))
def test_shared_tensors_stay_bitwise_and_private_ones_move(
    target: Target,
    kind_folder: Callable[[str], Path],
    answers: list[Answer],
    method: str,
    kind: str,
) -> None:
    draft_folder = kind_folder(kind)
    before = load_draft(str(draft_folder), target, torch.float32).state_dict()
    before = {n: tensor_hash(t) for n, t in before.items()}
    config = replace(CONFIG, method=method, epochs=1, lr=1e-3)
    trained, draft = run(target, draft_folder, answers, config)
    for name, tensor in draft.state_dict().items():
        if not METHODS[method].owns(name):
            assert tensor_hash(tensor) == before[name], name
    moved = [n for n, t in trained.tensors.items() if tensor_hash(t) != before.get(n)]
    assert moved
    assert all(METHODS[method].owns(n) for n in trained.tensors)
    assert trained.record.trained_parameters == sum(t.numel() for t in trained.tensors.values())


def test_training_teaches_something(
    target: Target, trained_draft: Eagle3Draft, answers: list[Answer]
) -> None:
    untrained = pooled_tau(replay(target, fresh_draft(target), answers, 4))
    assert pooled_tau(replay(target, trained_draft, answers, 4)) > untrained + 0.2


def test_memory_is_predicted_and_reported(
    target: Target, draft_folder: Path, answers: list[Answer]
) -> None:
    record = run(target, draft_folder, answers, replace(CONFIG, epochs=1))[0].record
    assert record.peak_mb > 100
    assert 0.5 < record.predicted_peak_mb / record.peak_mb < 2


def test_an_interrupted_run_ends_with_the_same_bytes(
    target: Target,
    draft_folder: Path,
    answers: list[Answer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, _ = run(target, draft_folder, answers)
    calls = 0
    evaluate = train_module._evaluate

    def dies(*args: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        evaluate(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(train_module, "_evaluate", dies)
    with pytest.raises(KeyboardInterrupt):
        run(target, draft_folder, answers, checkpoints=tmp_path)
    monkeypatch.setattr(train_module, "_evaluate", evaluate)
    resumed, _ = run(target, draft_folder, answers, checkpoints=tmp_path)
    assert resumed.record.heldout_tau == whole.record.heldout_tau
    assert {n: tensor_hash(t) for n, t in resumed.tensors.items()} == {
        n: tensor_hash(t) for n, t in whole.tensors.items()
    }
    # A checkpoint of other settings, or of another draft, is not continued.
    draft = load_draft(str(draft_folder), target, torch.float32)
    with torch.no_grad():
        draft.get_parameter("lm_head.weight").mul_(1.5)
    moved = train(target, draft, answers, answers[:4], CONFIG, k=3, checkpoints=tmp_path)
    assert moved.record.heldout_tau != whole.record.heldout_tau
    other, _ = run(target, draft_folder, answers, replace(CONFIG, seed=4), checkpoints=tmp_path)
    assert len(other.record.heldout_tau) == len(whole.record.heldout_tau)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_its_checkpoint(
    target: Target,
    draft_folder: Path,
    answers: list[Answer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, _ = run(target, draft_folder, answers, checkpoints=tmp_path / "whole")
    calls = 0

    def breaks(*arguments: object) -> tuple[torch.Tensor, int]:
        nonlocal calls
        calls += 1
        loss, count = rollout_loss(*arguments)  # type: ignore[arg-type]
        return loss * (float("nan") if calls == 6 else 1.0), count

    monkeypatch.setattr(train_module, "rollout_loss", breaks)
    with pytest.raises(UserError, match=r"loss became nan at step 5 .* lower --lr"):
        run(target, draft_folder, answers, checkpoints=tmp_path / "broken")
    # What is left is whole, and leads where the unbroken run ended.
    resumed, _ = run(target, draft_folder, answers, checkpoints=tmp_path / "broken")
    assert calls < 6 + whole.record.steps, "the run did not continue from a checkpoint"
    assert {n: tensor_hash(t) for n, t in resumed.tensors.items()} == {
        n: tensor_hash(t) for n, t in whole.tensors.items()
    }


def test_it_stops_early_and_keeps_the_best(
    target: Target, draft_folder: Path, answers: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    taus = iter([1.5, 2.0, 3.0, 2.5, 2.6, 2.7, 2.8, 2.9])
    snapshots = []

    def evaluate(target, draft, heldout, config, k, state):  # type: ignore[no-untyped-def]
        tau = next(taus)
        if tau > state.best_tau():
            state.best, state.best_step = train_module.take(draft, config.method), state.step
        state.heldout_tau.append((state.step, tau))
        snapshots.append(train_module.take(draft, config.method))

    monkeypatch.setattr(train_module, "_evaluate", evaluate)
    config = replace(CONFIG, evaluations=8, patience=2, epochs=8)
    trained, _ = run(target, draft_folder, answers, config)
    assert trained.record.stopped_early
    assert len(trained.record.heldout_tau) == 5
    best = snapshots[2]
    assert all(torch.equal(trained.tensors[n], best[n]) for n in best)


def test_a_batch_without_labels_is_named(target: Target, trained_draft: Eagle3Draft) -> None:
    batch = collate([Answer("a", (5, 6, 7), (9,), 1, "stop")], target.device)
    with pytest.raises(UserError, match="no supervised token"):
        rollout_loss(target, trained_draft, batch, CONFIG)


def test_schedule_goes_by_steps() -> None:
    rates = [schedule(step, 100, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == 1.0
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_plans_cover_every_sample_and_repeat() -> None:
    lengths = [(i * 37) % 90 + 10 for i in range(53)]
    assert sorted(i for batch in plan_once(lengths, 300) for i in batch) == list(range(53))
    plan = plan_epochs(lengths, 300, 2, seed=1)
    assert sorted(i for batch in plan for i in batch) == sorted(list(range(53)) * 2)
    assert plan == plan_epochs(lengths, 300, 2, seed=1)
    assert plan != plan_epochs(lengths, 300, 2, seed=2)
    for batch in plan:
        assert len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= 300
    assert 0 < len(plan_epochs(lengths, 300, 0.5, seed=1)) < len(plan_once(lengths, 300))


@pytest.mark.parametrize(("factor", "expected"), [(0.5, "bf16"), (0.95, "fp32"), (2.0, "fp32")])
def test_precision_goes_to_the_clearly_faster(
    factor: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    seen = []
    monkeypatch.setattr("redraft.training.precision.time.perf_counter", lambda: clock[0])

    def step(at: int) -> None:
        seen.append(at)
        clock[0] += 0.1 * (factor if torch.is_autocast_enabled("cpu") else 1.0)

    assert choose_precision(torch.device("cpu"), step) == expected
    assert len(set(seen)) >= 3, "one batch repeated hides the cost of new shapes"


def test_the_automatic_learning_rate_falls_with_the_hidden_size(trained_draft: Eagle3Draft) -> None:
    assert train_module._lr(TrainConfig(), trained_draft) == pytest.approx(0.4 / 32)
    assert train_module._lr(TrainConfig(lr=1e-3), trained_draft) == 1e-3
    assert math.isclose(0.4 / 4096, 1e-4, rel_tol=0.03)


def test_nothing_to_train_on_is_said(
    target: Target, trained_draft: Eagle3Draft, answers: list[Answer]
) -> None:
    with pytest.raises(UserError, match="0 answers to train on and 2 held out"):
        train(target, trained_draft, [], answers[:2], CONFIG, k=3)
