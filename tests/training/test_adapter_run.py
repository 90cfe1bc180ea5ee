"""A joint training: members end as they would alone, share what is frozen, and resume from anywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from redraft.adapters.expert import candidate_widths, resolve_width, smallest_good
from redraft.adapters.kind import adapter_of, kinds_of
from redraft.adapters.table import read_method
from redraft.checkpoints.load import load_draft, read_draft
from redraft.config import TrainConfig
from redraft.core.errors import UserError
from redraft.core.folders import tensor_hash
from redraft.core.records import Answer
from redraft.drafts.base import Draft
from redraft.drafts.kinds import kind_names
from redraft.metrics.replay import replay, replay_each
from redraft.models.target import Target
from redraft.pipeline.stages import train_adapter
from redraft.training import adapter_run as member_module
from redraft.training import train as train_module
from redraft.training.adapter_run import AdapterRun
from redraft.training.train import STREAM, Trained, train, train_adapters
from tests.conftest import fresh_draft

CONFIG = TrainConfig(
    method="expert+fc",
    width="8",
    rank=4,
    lr=5e-3,
    epochs=1.5,
    batch_tokens=256,
    rollout=3,
    evaluations=3,
    precision="fp32",
)
MIXED = [
    CONFIG,
    replace(CONFIG, method="expert", width="0.25", average=0.8),
    replace(CONFIG, method="lora+norms", lr=2e-2, feature_noise=0.1),
    replace(CONFIG, method="scratch", rollout=2),
    replace(CONFIG, method="full+expert", loss="lk", width="3"),
    replace(CONFIG, method="feature-map"),
    replace(CONFIG, method="head", weight_decay=0.1, lr_parts="head=0.5"),
]


def load(target: Target, folder: Path) -> Draft:
    return load_draft(str(folder), target, torch.float32)


def trained_together(
    target: Target,
    folder: Path,
    answers: Sequence[Answer],
    configs: Sequence[TrainConfig],
    checkpoints: Path | None = None,
    draft: Draft | None = None,
) -> list[Trained]:
    draft = draft or load(target, folder)
    return train_adapters(
        target, draft, answers, answers[:4], configs, k=3, base=target, checkpoints=checkpoints
    )


def alone(target: Target, folder: Path, answers: Sequence[Answer], config: TrainConfig) -> Trained:
    draft = load(target, folder)
    return train(target, draft, answers, answers[:4], config, k=3, base=target)


def hashes(trained: Trained) -> dict[str, str]:
    return {name: tensor_hash(tensor) for name, tensor in trained.tensors.items()}


def facts(trained: Trained) -> dict[str, Any]:
    """What the record says of the work itself."""
    return {
        key: value for key, value in trained.record.lasting().items() if key != "trained_together"
    }


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[AdapterRun]:
    """The members of the joint training that the test trains."""
    caught: list[AdapterRun] = []
    make = train_module._run

    def made(*args: Any) -> AdapterRun:
        caught.append(make(*args))
        return caught[-1]

    monkeypatch.setattr(train_module, "_run", made)
    return caught


def test_members_end_exactly_as_each_would_alone(
    target: Target, draft_folder: Path, answers: list[Answer]
) -> None:
    together = trained_together(target, draft_folder, answers, MIXED)
    for config, trained in zip(MIXED, together, strict=True):
        single = alone(target, draft_folder, answers, config)
        assert hashes(trained) == hashes(single), config.method
        assert facts(trained) == facts(single), config.method
        assert (trained.record.trained_together, single.record.trained_together) == (len(MIXED), 1)
    # Who trains at all has moved, so that equal bytes mean something.
    last = {trained.record.final_loss for trained in together}
    assert len(last) == len(MIXED)
    # Another order of members is another order of results, and nothing else.
    turned = trained_together(target, draft_folder, answers, MIXED[2::-1])
    assert [hashes(t) for t in turned] == [hashes(t) for t in together[2::-1]]


@pytest.mark.parametrize("kind", kind_names())
def test_the_given_draft_is_left_as_it_is(
    target: Target, kind_folder: Callable[[str], Path], answers: list[Answer], kind: str
) -> None:
    draft = load(target, kind_folder(kind))
    before = {n: tensor_hash(t) for n, t in draft.state_dict().items()}
    methods = ("expert+norms", "lora", "scratch", "full")
    configs = [replace(CONFIG, method=method, epochs=0.3) for method in methods]
    together = trained_together(target, kind_folder(kind), answers, configs, draft=draft)
    assert {n: tensor_hash(t) for n, t in draft.state_dict().items()} == before
    assert not draft.training
    for config, trained in zip(configs, together, strict=True):
        assert hashes(trained) == hashes(alone(target, kind_folder(kind), answers, config))


def test_members_share_every_tensor_that_they_do_not_train(
    target: Target, draft_folder: Path, answers: list[Answer], runs: list[AdapterRun]
) -> None:
    draft = load(target, draft_folder)
    configs = [
        replace(CONFIG, method=method, epochs=0.2)
        for method in ("expert", "lora", "fc+norms", "scratch")
    ]
    trained_together(target, draft_folder, answers, configs, draft=draft)
    assert len(runs) == 4
    shared = dict(draft.named_parameters())
    for run in runs:
        method = read_method(run.config.method)
        own = {n.replace(".base_layer.", "."): p for n, p in run.draft.named_parameters()}
        for name, parameter in shared.items():
            assert (own[name] is parameter) == (adapter_of(name, kinds_of(method)) is None), (
                method.name,
                name,
            )
    held = {id(p): p.numel() for m in runs for p in m.draft.parameters()}
    trained = sum(p.numel() for run in runs for p in run.parameters)
    assert sum(held.values()) == sum(p.numel() for p in draft.parameters()) + trained


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("epochs", 3.0),
        ("batch_tokens", 512),
        ("evaluations", 2),
        ("precision", "bf16"),
        ("seed", 1),
    ],
)
def test_members_on_different_streams_are_refused(
    target: Target, draft_folder: Path, answers: list[Answer], setting: str, value: Any
) -> None:
    assert setting in STREAM
    configs = [CONFIG, replace(CONFIG, method="fc"), replace(CONFIG, **{setting: value})]
    with pytest.raises(UserError, match=f"one stream of batches, so {setting} must be the same"):
        trained_together(target, draft_folder, answers, configs)


def test_a_member_that_stalled_early_holds_up_nobody(
    target: Target,
    draft_folder: Path,
    answers: list[Answer],
    runs: list[AdapterRun],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It stays where it stopped; the others take all their steps, to where they end alone."""
    learnt: list[tuple[str, int]] = []
    learn = AdapterRun.learn

    def noting(self: AdapterRun, *args: Any) -> None:
        learnt.append((self.config.method, self.state.step))
        learn(self, *args)

    def scripted(target: object, some: Sequence[AdapterRun], *rest: object) -> None:
        for run in some:  # attention rises once, the others always do
            once = min(run.state.step, 1)
            run.note_tau(once if run.config.method == "attention" else run.state.step + 2.0)

    monkeypatch.setattr(AdapterRun, "learn", noting)
    monkeypatch.setattr(train_module, "_evaluate", scripted)
    base = replace(CONFIG, evaluations=8, patience=2)
    configs = [replace(base, method=method) for method in ("fc", "attention", "norms")]
    together = trained_together(target, draft_folder, answers, configs)
    steps = [trained.record.steps for trained in together]
    planned = together[0].record.planned_steps
    assert steps == [planned, together[1].record.heldout_tau[4][0], planned]
    assert steps[1] < planned
    assert [t.record.stopped_early for t in together] == [False, True, False]
    assert [len(t.record.heldout_tau) for t in together][1] == 5
    for method, count in zip(("fc", "attention", "norms"), steps, strict=True):
        assert [at for name, at in learnt if name == method] == list(range(count))
    for config, trained in zip(configs, together, strict=True):
        assert hashes(trained) == hashes(alone(target, draft_folder, answers, config))


@pytest.mark.parametrize("dies_at", [2, 6, 9])
def test_several_runs_cut_off_between_two_checkpoints_ends_with_the_same_bytes(
    target: Target,
    draft_folder: Path,
    answers: list[Answer],
    tmp_path: Path,
    dies_at: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Four members save one after the other; the run dies before the save number `dies_at`."""
    configs = MIXED[:4]
    whole = trained_together(target, draft_folder, answers, configs)
    save = train_module.save_checkpoint
    saved: list[int] = []

    def dies(folder: Path, state: Any, *rest: Any) -> None:
        if len(saved) == dies_at:
            raise KeyboardInterrupt
        saved.append(state.step)
        save(folder, state, *rest)

    monkeypatch.setattr(train_module, "save_checkpoint", dies)
    with pytest.raises(KeyboardInterrupt):
        trained_together(target, draft_folder, answers, configs, tmp_path)
    latest = [step for run in range(4) for step in saved[run::4][-1:]]
    assert len(set(latest)) > 1 or len(latest) < 4, "all members stand at one step"
    monkeypatch.setattr(train_module, "save_checkpoint", save)
    resumed = trained_together(target, draft_folder, answers, configs, tmp_path)
    for one, other in zip(resumed, whole, strict=True):
        assert hashes(one) == hashes(other)
        assert one.record.lasting() == other.record.lasting()


def test_members_of_another_gang_are_not_continued(
    target: Target, draft_folder: Path, answers: list[Answer], tmp_path: Path
) -> None:
    first = [replace(CONFIG, method="fc"), replace(CONFIG, method="fc", lr=1e-2)]
    trained_together(target, draft_folder, answers, first, tmp_path)
    whole = trained_together(target, draft_folder, answers, first[::-1])
    swapped = trained_together(target, draft_folder, answers, first[::-1], tmp_path)
    assert [hashes(t) for t in swapped] == [hashes(t) for t in whole]
    assert hashes(whole[0]) != hashes(whole[1])


# -- the running average --------------------------------------------------------------------------


def test_the_average_follows_its_formula(
    target: Target,
    draft_folder: Path,
    answers: list[Answer],
    runs: list[AdapterRun],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Against numpy over the weights after each step; a constant decay from the start is another."""
    weights: list[np.ndarray] = []
    learn = AdapterRun.learn

    def noting(self: AdapterRun, *args: Any) -> None:
        learn(self, *args)
        weights.append(self.draft.get_parameter("fc.weight").detach().double().numpy().copy())

    monkeypatch.setattr(AdapterRun, "learn", noting)
    alone(target, draft_folder, answers, replace(CONFIG, method="fc", average=0.7))
    expected, constant = weights[0], weights[0]
    for step, now in enumerate(weights[1:], start=2):
        decay = min(0.7, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * now
        constant = 0.7 * constant + 0.3 * now
    found = runs[0].state.average["fc.weight"].double().numpy()
    assert len(weights) > 3
    assert np.abs(found - expected).max() < 1e-6
    assert np.abs(found - constant).max() > 1e-4
    assert np.abs(found - weights[-1]).max() > 1e-4


@pytest.mark.parametrize(("now", "averaged"), [(1.2, 1.5), (1.5, 1.2)])
def test_the_average_is_taken_where_it_is_better(
    target: Target,
    draft_folder: Path,
    answers: list[Answer],
    runs: list[AdapterRun],
    monkeypatch: pytest.MonkeyPatch,
    now: float,
    averaged: float,
) -> None:
    """The draft is measured with both; what is kept is what measured better."""

    def scripted(_: object, drafts: Sequence[Draft], *rest: Any) -> list[float]:
        return [tau(draft) for draft in drafts]

    def tau(draft: Draft) -> float:
        run = runs[0]
        if not run.state.average:
            return 1.0
        mean = torch.equal(draft.get_parameter("fc.weight"), run.state.average["fc.weight"])
        return averaged if mean else now

    monkeypatch.setattr(train_module, "taus", scripted)
    config = replace(CONFIG, method="fc", average=0.7, evaluations=1)
    trained = alone(target, draft_folder, answers, config)
    mean = runs[0].state.average["fc.weight"]
    assert torch.equal(trained.tensors["fc.weight"], mean) == (averaged > now)
    assert trained.record.heldout_tau[-1][1] == max(now, averaged)
    assert torch.equal(runs[0].draft.get_parameter("fc.weight"), trained.tensors["fc.weight"])


def test_measuring_the_average_leaves_training_where_it_was(
    target: Target, draft_folder: Path, answers: list[Answer], runs: list[AdapterRun]
) -> None:
    """The weights that train on are those of a run without an average, to the byte."""
    for average in (0.0, 0.7):
        alone(
            target, draft_folder, answers, replace(CONFIG, method="fc", average=average, patience=9)
        )
    plain, averaging = runs
    assert averaging.state.average
    assert not plain.state.average
    assert plain.state.last_loss == averaging.state.last_loss


# -- replay ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", kind_names())
def test_replaying_several_drafts_is_replaying_each(
    target: Target, kind_folder: Callable[[str], Path], answers: list[Answer], kind: str
) -> None:
    drafts = [load(target, kind_folder(kind)), fresh_draft(target, kind=kind)]
    drafts.append(drafts[0])
    together = replay_each(target, drafts, answers, 4, batch_tokens=300)
    assert together == [replay(target, draft, answers, 4) for draft in drafts]
    assert together[0] == together[2] != together[1]


# -- --width auto ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shared", "widths"),
    [
        (48, [3, 6, 12, 24, 48]),
        (14336, [896, 1792, 3584, 7168, 14336]),
        (8, [1, 2, 4, 8]),
        (3, [1, 2, 3]),
        (1, [1]),
    ],
)
def test_five_widths_up_to_the_shared_one_are_tried(shared: int, widths: list[int]) -> None:
    assert candidate_widths(shared) == widths


def test_a_share_of_the_shared_neurons_is_at_least_one() -> None:
    assert [resolve_width(w, 48) for w in (64, 1, 0.25, 1.0, 0.001)] == [64, 1, 12, 48, 1]


@given(st.lists(st.floats(1.0, 4.0), min_size=1, max_size=6))
def test_the_smallest_width_within_one_percent_is_taken(taus: list[float]) -> None:
    widths = [3 * 2**i for i in range(len(taus))]
    width = next(w for w, tau in zip(widths, taus, strict=True) if tau / max(taus) >= 0.99)
    assert smallest_good(widths, taus) == width
    backwards = smallest_good(widths[::-1], taus[::-1])
    assert backwards == width, "whatever the order"


def test_one_percent_is_measured_against_the_best() -> None:
    assert smallest_good([3, 6, 12], [1.97, 1.99, 2.0]) == 6
    assert smallest_good([3, 6, 12], [1.98, 1.99, 2.0]) == 3
    assert smallest_good([3, 6, 12], [1.0, 2.0, 1.99]) == 6


@pytest.mark.parametrize(("gains", "width"), [((1, 2, 3, 4, 5), 64), ((5, 1, 4, 5.01, 5), 4)])
def test_width_auto_takes_the_smallest_good_one_and_records_the_others(
    target: Target,
    draft_folder: Path,
    answers: list[Answer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    gains: tuple[float, ...],
    width: int,
) -> None:
    shared = read_draft(str(draft_folder))
    widths = [4, 8, 16, 32, 64]
    assert widths == candidate_widths(shared.config.intermediate_size)
    order = dict(zip(map(str, widths), gains, strict=True))

    def scripted(_: object, some: Sequence[AdapterRun], *rest: object) -> None:
        for run in some:
            run.note_tau(1.0 + order[run.config.width] * (run.state.step > 0))

    monkeypatch.setattr(train_module, "_evaluate", scripted)
    config = replace(CONFIG, width="auto", epochs=0.3)
    part = train_adapter(target, shared, answers, answers[:4], config, 3, tmp_path)
    assert part.tensors["midlayer.mlp.private.gate_proj.weight"].shape == (width, 32)
    assert part.card["widths_tried"] == {w: 1.0 + gain for w, gain in order.items()}
    assert part.card["config"]["width"] == str(width)
    assert part.card["train"]["trained_together"] == 5
    assert part.card["shared_widths"] == {"midlayer.mlp": 64}
    # It is the part that this width alone gives.
    single = train_adapter(
        target, shared, answers, answers[:4], replace(config, width=str(width)), 3
    )
    assert {n: tensor_hash(t) for n, t in part.tensors.items()} == {
        n: tensor_hash(t) for n, t in single.tensors.items()
    }


def test_width_auto_matters_to_experts_only(
    target: Target, draft_folder: Path, answers: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("no widths to try")

    monkeypatch.setattr("redraft.pipeline.stages.train_adapters", refuse)
    config = replace(CONFIG, method="fc", width="auto", epochs=0.3)
    shared = read_draft(str(draft_folder))
    part = train_adapter(target, shared, answers, answers[:4], config, 3)
    assert "widths_tried" not in part.card


def test_a_member_that_diverges_ends_at_its_best_and_the_others_go_on(
    target: Target, draft_folder: Path, answers: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    wild = replace(CONFIG, seed=CONFIG.seed, loss="tv")
    steps = 0
    loss = member_module.rollout_loss

    def breaks(teacher_batch: Any, draft: Draft, config: TrainConfig, *step: Any) -> Any:
        nonlocal steps
        found, count = loss(teacher_batch, draft, config, *step)
        if config.loss == "tv" and torch.is_grad_enabled():
            steps += 1
            if steps == 5:
                return found * float("nan"), count
        return found, count

    whole = alone(target, draft_folder, answers, CONFIG)
    monkeypatch.setattr(member_module, "rollout_loss", breaks)
    calm, broken = trained_together(target, draft_folder, answers, [CONFIG, wild])
    assert hashes(calm) == hashes(whole)
    assert broken.record.stopped_early
    assert broken.record.steps == 4  # the fifth was not taken
    assert all(torch.isfinite(t).all() for t in broken.tensors.values())
    steps = 0
    with pytest.raises(UserError, match="the loss became nan at step 4"):
        alone(target, draft_folder, answers, wild)


def test_a_base_that_no_start_looks_at_changes_nothing(
    target: Target, draft_folder: Path, answers: list[Answer], tmp_path: Path
) -> None:
    """Named or not, a finished run of such a method is continued from its checkpoint."""
    config = replace(CONFIG, epochs=1)
    draft = load(target, draft_folder)
    first = train(target, draft, answers, answers[:4], config, k=3, checkpoints=tmp_path)
    before = (tmp_path / "checkpoint.safetensors").stat().st_mtime_ns
    again = train(
        target,
        load(target, draft_folder),
        answers,
        answers[:4],
        config,
        k=3,
        base=target,
        checkpoints=tmp_path,
    )
    assert hashes(again) == hashes(first)
    assert (tmp_path / "checkpoint.safetensors").stat().st_mtime_ns == before, "it began anew"
