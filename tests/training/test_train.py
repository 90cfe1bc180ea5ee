"""The loop: what is supervised, what moves it, resuming to the same bytes, and how it ends."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from redraft.adapters.adapter import prepare, put
from redraft.adapters.kind import Setup
from redraft.adapters.table import read_method
from redraft.checkpoints.load import load_draft, stored
from redraft.config import TrainConfig, key_of
from redraft.core.errors import UserError
from redraft.core.folders import state_hash, tensor_hash
from redraft.core.records import Answer
from redraft.drafts.base import Draft
from redraft.drafts.eagle3.network import Eagle3Draft
from redraft.drafts.kinds import kind_names
from redraft.drafts.stored.reference_reader import Reference
from redraft.losses.functions import LOSSES, Teacher
from redraft.metrics.acceptance import pooled_tau
from redraft.metrics.replay import replay
from redraft.models.batching import collate, plan_epochs, plan_once
from redraft.models.target import Reading, Target
from redraft.training import adapter_run as member_module
from redraft.training import stream as stream_module
from redraft.training import teacher_batch as teacher_batch_module
from redraft.training import train as train_module
from redraft.training.adapter_run import AdapterRun
from redraft.training.flops import count_flops, counted, products_of_trained, work_of
from redraft.training.guard import SHARES, Guard, between, usable
from redraft.training.optimizer import make_optimizers, peak_rate, schedule
from redraft.training.precision import choose_precision
from redraft.training.teacher_batch import TeacherBatch, read_teacher_batch, rollout_loss
from redraft.training.train import Trained, train
from tests.conftest import fresh_draft, in_double, tiny_model

CONFIG = TrainConfig(
    method="expert+fc",
    width="8",
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


ROWS = [
    Answer("a", (5, 6, 7), (20, 21, 22, 23, 1), 5, "stop"),
    Answer("b", (8, 9, 10, 11, 12), (30, 31, 32), 3, "length"),
    Answer("c", (5, 9), (40, 41, 42, 43, 44, 45, 46), 7, "length"),
]


@pytest.fixture(scope="module")
def target64(target_folder: Path) -> Target:
    return in_double(target_folder)


def read(target: Target, draft: Draft, hold: bool = False) -> TeacherBatch:
    return read_teacher_batch(target, collate(ROWS, target.device), draft.aux_layers, hold=hold)


def test_a_runs_key_is_the_hash_of_the_whole_text(target: Target) -> None:
    """Told answer by answer, it is that of runs whose key was made from one long text."""
    draft, plan = fresh_draft(target), [[0, 1], [2]]
    for answers, heldout in ((ROWS, ROWS[:1]), (ROWS[:1], [])):
        about = [
            key_of(CONFIG),
            plan,
            target.fingerprint(),
            None,
            draft.aux_layers,
            state_hash({**draft.stored_state(), "features": torch.tensor(draft.feature_size)}),
            [[a.id, list(a.tokens)] for a in answers],
            [[a.id, list(a.tokens)] for a in heldout],
            3,
        ]
        key = train_module._key(CONFIG, plan, target, None, draft, answers, heldout, 3)
        assert key == hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]


# -- what is supervised ---------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "decay"), [("eagle3", 1.0), ("eagle3", 0.5), ("eagle", 0.5)])
def test_the_loss_is_kl_per_supervised_token(
    target64: Target, kind: str, decay: float, tmp_path: Path
) -> None:
    """Against chains written out one by one: which tokens count, which position teaches them."""
    target = target64
    draft = fresh_draft(target, kind=kind)
    stored(draft, target).save(tmp_path / "draft")
    config = replace(CONFIG, step_decay=decay)
    loss, count = rollout_loss(read(target, draft), draft, config)
    total = weight = 0.0
    plain = Reference(tmp_path / "draft", target.embedding_VH, target.head.weight)
    for row in ROWS:
        tokens = [*row.prompt, *row.tokens]
        reading = target.read(torch.tensor([tokens]), draft.aux_layers)
        begin = len(row.prompt)
        for start in range(begin - 1, len(tokens) - 2):
            steps = min(3, len(tokens) - 2 - start)
            chain = plain.chain_logits(tokens, reading.features_BTF[0], start, steps)
            for step, logits in enumerate(chain):
                log_p = reading.logits_BTV[0, start + step + 1].log_softmax(-1)
                kl = (log_p.exp() * (log_p - logits.log_softmax(-1))).sum()
                total += decay**step * float(kl)
                weight += decay**step
    assert count == 4 + 2 + 6  # the first answer token comes from the prefill
    assert float(loss) == pytest.approx(total / weight, abs=1e-6)


def test_the_loss_of_a_token_lm_is_kl_of_the_lm_itself(target64: Target, tmp_path: Path) -> None:
    """Against Transformers reading the stored folder; steps of a rollout would only repeat it."""
    from transformers import AutoModelForCausalLM

    draft = fresh_draft(target64, kind="token_lm")
    stored(draft, target64).save(tmp_path / "draft")
    lm = AutoModelForCausalLM.from_pretrained(str(tmp_path / "draft"), dtype=torch.float64)
    kls, shifted = [], []
    for row in ROWS:
        tokens = torch.tensor([[*row.prompt, *row.tokens]])
        with torch.no_grad():
            log_q = lm(input_ids=tokens).logits[0].log_softmax(-1)
            log_p = target64.read(tokens, ()).logits_BTV[0].log_softmax(-1)
        for label in range(len(row.prompt) + 1, tokens.shape[1]):
            p = log_p[label - 1].exp()
            kls.append(float((p * (log_p[label - 1] - log_q[label - 1])).sum()))
            shifted.append(float((p * (log_p[label - 1] - log_q[label - 2])).sum()))
    loss, count = rollout_loss(read(target64, draft), draft, CONFIG)
    assert count == len(kls)
    assert float(loss) == pytest.approx(sum(kls) / len(kls), abs=1e-6)
    assert abs(float(loss) - sum(shifted) / len(shifted)) > 1e-3


def test_a_batch_without_labels_is_named(target: Target, trained_draft: Eagle3Draft) -> None:
    batch = collate([Answer("a", (5, 6, 7), (9,), 1, "stop")], target.device)
    with pytest.raises(UserError, match="no supervised token"):
        read_teacher_batch(target, batch, trained_draft.aux_layers)


# -- chunks ---------------------------------------------------------------------------------------

LOSSES_OF = [
    (kind, vocab, loss)
    for kind, vocab in (("eagle3", None), ("eagle3", 40), ("eagle", None), ("token_lm", None))
    for loss in LOSSES
    if loss != "paper" or kind == "eagle"
]


def loss_and_gradients(
    teacher_batch: TeacherBatch, draft: Draft, config: TrainConfig
) -> tuple[float, dict[str, Tensor]]:
    draft.requires_grad_(True)
    draft.zero_grad()
    loss, _ = rollout_loss(teacher_batch, draft, config)
    loss.backward()  # type: ignore[no-untyped-call]
    grads = {n: p.grad.clone() for n, p in draft.named_parameters() if p.grad is not None}
    return float(loss), grads


def at_once(
    target: Target, teacher_batch: TeacherBatch, draft: Draft, config: TrainConfig
) -> tuple[float, dict[str, Tensor]]:
    """The same from all logits at once, as the target's own forward pass gives them."""
    draft.requires_grad_(True)
    draft.zero_grad()
    rows, labels, tokens = teacher_batch.row_N, teacher_batch.label_N, teacher_batch.batch.tokens_BT
    logits_NV = target.read(tokens, ()).logits_BTV[rows, labels - 1]
    features_NF = teacher_batch.features_BTF[rows, labels - 1]
    total, weight, first = torch.zeros(()), 0.0, teacher_batch.batch.first
    steps = config.rollout if draft.feeds_back else 1
    for j, states in enumerate(draft.rollout(tokens, teacher_batch.features_BTF, first, steps)):
        some = teacher_batch.offset_N >= 1 + j
        states_MH = states[rows[some], labels[some] - 2 - j - first]
        features = features_NF[some] if draft.feature_size == draft.hidden_size else None
        teacher = Teacher.from_logits(
            logits_NV[some], draft.draft_vocab, teacher_batch.token_N[some], features
        )
        share = config.step_decay**j
        total = total + share * LOSSES[config.loss](teacher, draft.logits(states_MH), states_MH)
        weight += share * len(states_MH)
    (total / weight).backward()
    grads = {n: p.grad.clone() for n, p in draft.named_parameters() if p.grad is not None}
    return float(total.detach()) / weight, grads


@pytest.mark.parametrize(("kind", "vocab", "loss"), LOSSES_OF)
@pytest.mark.parametrize("hold", [False, True])
def test_a_teacher_batch_in_chunks_gives_the_same_loss_and_gradients(
    target64: Target,
    kind: str,
    vocab: int | None,
    loss: str,
    hold: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draft = fresh_draft(target64, kind=kind, vocab=vocab)
    config = replace(CONFIG, loss=loss, step_decay=0.5)
    teacher_batch = read(target64, draft, hold=hold)
    expected, gradients = at_once(target64, teacher_batch, draft, config)
    assert gradients
    for rows in (1, 3, 1000):  # at once; 12 labels at rollout step 0
        monkeypatch.setattr(teacher_batch_module, "rows_at_once", lambda _, rows=rows: rows)
        found, grads = loss_and_gradients(teacher_batch, draft, config)
        assert found == pytest.approx(expected, abs=1e-10)
        assert set(grads) == set(gradients)
        for name, gradient in gradients.items():
            assert torch.allclose(grads[name], gradient, rtol=0, atol=1e-10), name
    assert bool(teacher_batch.held) == hold
    # Labels taught by their neighbour's distribution would be seen.
    if loss != "ce":
        wrong = dataclasses.replace(
            teacher_batch,
            held={},
            logits=lambda at, columns: teacher_batch.logits(at, columns).roll(1, 0),
        )
        assert abs(loss_and_gradients(wrong, draft, config)[0] - expected) > 1e-4


def test_a_held_teacher_is_made_once_for_all_that_train_on_it(target64: Target) -> None:
    asked: list[int] = []
    draft = fresh_draft(target64, vocab=40)
    held = read(target64, draft, hold=True)

    def logits(at: slice, columns: Tensor | None) -> Tensor:
        found = held.logits(at, columns)
        asked.append(len(found))
        return found

    counted = dataclasses.replace(held, logits=logits)
    for _ in range(3):
        loss_and_gradients(counted, draft, CONFIG)
    assert sum(asked) == len(held.label_N) == 12


SCALED: dict[str, dict[str, Any]] = {
    "gemma2": {"final_logit_softcapping": 5.0, "query_pre_attn_scalar": 16},
    "granite": {"logits_scaling": 8.0},
    "cohere": {"logit_scale": 0.25},
    "phi": {},  # a head with a bias
}


@pytest.mark.parametrize("family", SCALED)
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_logits_are_made_as_the_model_makes_them(family: str, dtype: str) -> None:
    """Soft caps, scales and biases after the head, over the whole vocabulary and over some of it."""
    model = tiny_model(family, getattr(torch, dtype), **SCALED[family])
    target = Target(model, None, (family,))
    teacher_batch = read_teacher_batch(target, collate(ROWS, target.device), (2, 4, 5))
    tokens = teacher_batch.batch.tokens_BT
    own_NV = target.read(tokens, ()).logits_BTV[teacher_batch.row_N, teacher_batch.label_N - 1]
    columns = torch.tensor([3, 5, 40])
    for found, expected in (
        (teacher_batch.logits(slice(2, 9), None), own_NV[2:9]),
        (teacher_batch.logits(slice(2, 9), columns), own_NV[2:9, columns]),
    ):
        slack = 4 * torch.finfo(found.dtype).eps * float(expected.abs().max())
        assert float((found - expected).abs().max()) <= slack
    head = target.head(target.read(tokens, (target.num_layers,)).features_BTF)
    assert float(
        (head[teacher_batch.row_N, teacher_batch.label_N - 1] - own_NV).abs().max()
    ) > 0.05 or (family == "phi")
    assert float((teacher_batch.logits(slice(None), None) - own_NV.roll(1, 0)).abs().max()) > 0.05


class Halved(Target):
    """A target whose logits do not follow from its last states."""

    def read(self, *args: Any, **named: Any) -> Reading:
        reading = super().read(*args, **named)
        return Reading(reading.features_BTF, reading.logits_BTV / 2)


def test_a_model_whose_logits_do_not_follow_from_its_states_is_refused(target64: Target) -> None:
    halved = Halved(target64.model, target64.tokenizer, target64.sources)
    with pytest.raises(UserError, match=r"does something after its layers"):
        read(halved, fresh_draft(target64))


# -- feature noise, losses, learning rates --------------------------------------------------------


def features_read(
    teacher_batch: TeacherBatch, draft: Any, config: TrainConfig, step: int
) -> Tensor:
    """The features that a draft is given at a step."""
    given: list[Tensor] = []

    class Listening:
        feeds_back = True
        draft_vocab, feature_size, hidden_size = draft.draft_vocab, draft.feature_size, 32
        vocab_size = draft.vocab_size

        def rollout(self, tokens: Tensor, features: Tensor, *rest: int) -> Iterator[Tensor]:
            given.append(features)
            yield from draft.rollout(tokens, features, *rest)

        def logits(self, states: Tensor) -> Tensor:
            found: Tensor = draft.logits(states)
            return found

    listening: Any = Listening()
    rollout_loss(teacher_batch, listening, config, step)
    return given[0]


def test_feature_noise_is_keyed_by_the_step(target: Target) -> None:
    draft = fresh_draft(target)
    teacher_batch = read(target, draft)
    noisy = replace(CONFIG, feature_noise=0.2)
    plain = teacher_batch.features_BTF
    first = features_read(teacher_batch, draft, noisy, 3) - plain
    assert torch.equal(first, features_read(teacher_batch, draft, noisy, 3) - plain)
    assert not torch.equal(first, features_read(teacher_batch, draft, noisy, 4) - plain)
    assert not torch.equal(
        first, features_read(teacher_batch, draft, replace(noisy, seed=1), 3) - plain
    )
    assert torch.equal(features_read(teacher_batch, draft, CONFIG, 3), plain)
    assert torch.equal(teacher_batch.features_BTF, plain), (
        "the teacher batch itself stays clean for the others"
    )


@pytest.mark.parametrize("amount", [0.2, 0.05])
def test_feature_noise_is_uniform_and_as_wide_as_published(target: Target, amount: float) -> None:
    """(u - 0.5) * amount * 512 / length with u in [0, 1): bounds, mean and variance of a uniform."""
    draft = fresh_draft(target)
    teacher_batch = read(target, draft)
    config = replace(CONFIG, feature_noise=amount)
    added = (
        features_read(teacher_batch, draft, config, 0).double()
        - teacher_batch.features_BTF.double()
    )
    lengths = teacher_batch.batch.ends_B.tolist()
    assert len(set(lengths)) > 1
    assert all(not row[n:].any() for row, n in zip(added, lengths, strict=True))
    noise = torch.cat([(row[:n] * n).flatten() for row, n in zip(added, lengths, strict=True)])
    width = amount * 512
    assert float(noise.abs().max()) <= width / 2 * 1.0001
    assert float(noise.abs().max()) > 0.99 * width / 2
    assert abs(float(noise.mean())) < 0.03 * width
    assert float(noise.var()) == pytest.approx(width**2 / 12, rel=0.05)  # a normal's would be other


@pytest.mark.parametrize("kind", kind_names())
def test_the_papers_loss_is_for_states_that_stand_for_features(
    target: Target, answers: list[Answer], kind: str
) -> None:
    draft, config = fresh_draft(target, kind=kind), replace(CONFIG, loss="paper", epochs=0.01)
    config = replace(config, method="expert")
    if kind in ("eagle", "mtp"):
        assert train(target, draft, answers, answers[:4], config, k=3).record.steps == 1
        return
    with pytest.raises(UserError, match=f"train.loss paper compares .* kind {kind} .* use kl, tv"):
        train(target, draft, answers, answers[:4], config, k=3)


def rising(target: Target, runs: Sequence[AdapterRun], *rest: object) -> None:
    """An evaluation that finds each step better than the one before."""
    for run in runs:
        run.note_tau(float(run.state.step))


def test_learning_rates_of_parts_reach_their_tensors(
    target: Target, draft_folder: Path, answers: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adam's first step is the learning rate, wherever a gradient is not tiny."""
    monkeypatch.setattr(train_module, "_evaluate", rising)
    before = load_draft(str(draft_folder), target, torch.float32).state_dict()
    for shares, fc, norms, down in (("", 1, 1, 1), ("fc=0.5,norms=4,expert=2", 0.5, 4, 2)):
        config = replace(CONFIG, method="expert+fc+norms", lr=1e-3, lr_parts=shares, epochs=0.01)
        tensors = run(target, draft_folder, answers, config)[0].tensors
        moved = {n: float((t - before.get(n, 0)).abs().max()) for n, t in tensors.items()}
        assert moved["fc.weight"] == pytest.approx(1e-3 * fc, rel=0.02)
        assert moved["norm.weight"] == pytest.approx(1e-3 * norms, rel=0.02)
        assert moved["midlayer.mlp.private.down_proj.weight"] == pytest.approx(
            1e-3 * down, rel=0.02
        )


def test_each_tensor_is_in_one_group_and_only_matrices_that_began_above_zero_decay(
    target: Target,
) -> None:
    draft, method = fresh_draft(target), read_method("expert+lora+norms")
    trainable = prepare(draft, method, Setup(width=4, rank=2, init="active", seed=0))
    config = replace(CONFIG, lr=1e-3, weight_decay=0.3, lr_parts="norms=2,lora=3")
    groups = [g for o in make_optimizers(trainable, method, config, draft) for g in o.param_groups]
    names = {id(parameter): name for name, parameter in trainable}
    found = {
        names[id(p)]: (group["peak"], group["weight_decay"])
        for group in groups
        for p in group["params"]
    }
    assert sum(len(g["params"]) for g in groups) == len(found) == len(trainable)
    for name, (peak, decay) in found.items():
        rate = 2e-3 if name.endswith("norm.weight") else 3e-3 if "lora" in name else 1e-3
        assert peak == pytest.approx(rate), name
        begins_at_zero = "lora_B" in name or name.endswith("private.down_proj.weight")
        assert decay == (0.0 if begins_at_zero or "norm" in name else 0.3), name
    assert {decay for _, decay in found.values()} == {0.0, 0.3}


def test_muon_moves_matrices_alone_by_steps_of_adams_size(
    target: Target, draft_folder: Path, answers: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first step is the gradient with its singular values made alike: those of some size end near the range of
    five iterations ([0.68, 1.13], Jordan 2024), times 0.2 * sqrt(longer side) and the learning rate (2502.16982)."""
    monkeypatch.setattr(train_module, "_evaluate", rising)
    before = load_draft(str(draft_folder), target, torch.float32).state_dict()
    config = replace(CONFIG, method="full", optimizer="muon", lr=1e-3, epochs=0.01)
    tensors = run(target, draft_folder, answers, config)[0].tensors
    steps = {n: t - before[n] for n, t in tensors.items() if t.is_floating_point()}
    for name in ("fc.weight", "midlayer.mlp.down_proj.weight", "midlayer.self_attn.o_proj.weight"):
        step = steps[name] / (1e-3 * 0.2 * max(steps[name].shape) ** 0.5)
        largest = torch.linalg.svdvals(step.double())[:5]
        assert ((largest > 0.6) & (largest < 1.25)).all(), (name, largest)
    for name in ("norm.weight", "lm_head.weight"):
        moved = steps[name].abs()
        assert float(moved.max()) == pytest.approx(1e-3, rel=0.02), name  # AdamW's


@pytest.mark.parametrize("kind", ["eagle3", "token_lm"])
def test_muon_leaves_heads_and_embeddings_to_adamw(target: Target, kind: str) -> None:
    draft, method = fresh_draft(target, kind=kind), read_method("full")
    trainable = prepare(draft, method, Setup())
    config = replace(CONFIG, method="full", optimizer="muon")
    adamw, muon = make_optimizers(trainable, method, config, draft)
    names = {id(parameter): name for name, parameter in trainable}
    by_muon = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    by_adamw = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
    assert by_muon | by_adamw == set(names.values())
    assert all("_proj." in name or name == "fc.weight" for name in by_muon)
    by_row = {name for name in by_adamw if draft.get_parameter(name).dim() == 2}
    assert (
        by_row
        == {
            "eagle3": {"lm_head.weight"},
            "token_lm": {"model.embed_tokens.weight", "lm_head.weight"} & set(names.values()),
        }[kind]
    )
    assert by_row


def test_schedule_goes_by_steps() -> None:
    rates = [schedule(step, 100, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == 1.0
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_the_automatic_learning_rate_falls_with_the_hidden_size(trained_draft: Eagle3Draft) -> None:
    assert peak_rate(TrainConfig(method="full"), trained_draft) == pytest.approx(0.4 / 32)
    assert peak_rate(TrainConfig(method="lora"), trained_draft) == pytest.approx(1.6 / 32)
    assert peak_rate(TrainConfig(method="lora+fc"), trained_draft) == pytest.approx(
        0.4 / 32 * 4 / 3
    )
    assert peak_rate(TrainConfig(lr=1e-3), trained_draft) == 1e-3
    assert math.isclose(0.4 / 4096, 1e-4, rel_tol=0.03)


# -- the run --------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_interrupted_run_ends_with_the_same_bytes(
    target: Target,
    draft_folder: Path,
    answers: list[Answer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    optimizer: str,
) -> None:
    config = replace(CONFIG, method="expert+fc+norms", optimizer=optimizer)  # matrices and vectors
    whole, _ = run(target, draft_folder, answers, config)
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
        run(target, draft_folder, answers, config, checkpoints=tmp_path)
    monkeypatch.setattr(train_module, "_evaluate", evaluate)
    resumed, _ = run(target, draft_folder, answers, config, checkpoints=tmp_path)
    assert resumed.record.heldout_tau == whole.record.heldout_tau
    assert resumed.record.lasting() == whole.record.lasting(), "a resumed run says the same"
    assert {n: tensor_hash(t) for n, t in resumed.tensors.items()} == {
        n: tensor_hash(t) for n, t in whole.tensors.items()
    }
    # A checkpoint of other settings, or of another draft, is not continued.
    draft = load_draft(str(draft_folder), target, torch.float32)
    with torch.no_grad():
        draft.get_parameter("lm_head.weight").mul_(1.5)
    moved = train(target, draft, answers, answers[:4], config, k=3, checkpoints=tmp_path)
    assert moved.record.heldout_tau != whole.record.heldout_tau
    other, _ = run(target, draft_folder, answers, replace(config, seed=4), checkpoints=tmp_path)
    assert len(other.record.heldout_tau) == len(whole.record.heldout_tau)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_its_checkpoint(
    target: Target,
    draft_folder: Path,
    answers: list[Answer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, _ = run(target, draft_folder, answers, checkpoints=tmp_path / "whole")
    steps: list[int] = []

    def breaks(
        teacher_batch: TeacherBatch, draft: Draft, config: TrainConfig, step: int, weight: float
    ) -> Any:
        steps.append(step)
        loss, count = rollout_loss(teacher_batch, draft, config, step, weight)
        return loss * (float("nan") if step == 5 and steps.count(5) == 1 else 1.0), count

    monkeypatch.setattr(member_module, "rollout_loss", breaks)
    with pytest.raises(UserError, match=r"loss became nan at step 5 .* lower train.lr"):
        run(target, draft_folder, answers, checkpoints=tmp_path / "broken")
    # What is left is whole, and leads where the unbroken run ended.
    resumed, _ = run(target, draft_folder, answers, checkpoints=tmp_path / "broken")
    assert steps.count(1) == 1, "the run did not continue from a checkpoint"
    assert {n: tensor_hash(t) for n, t in resumed.tensors.items()} == {
        n: tensor_hash(t) for n, t in whole.tensors.items()
    }


def test_it_stops_early_and_keeps_the_best(
    target: Target, draft_folder: Path, answers: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    taus = iter([1.5, 2.0, 3.0, 2.6, 2.5, 2.4, 2.3, 2.2])
    snapshots = []

    def evaluate(target: object, runs: Sequence[AdapterRun], *rest: object) -> None:
        (run,) = runs
        run.note_tau(next(taus))
        snapshots.append(run.take())

    monkeypatch.setattr(train_module, "_evaluate", evaluate)
    config = replace(CONFIG, evaluations=8, patience=2, epochs=8)
    trained, draft = run(target, draft_folder, answers, config)
    assert trained.record.stopped_early
    assert len(trained.record.heldout_tau) == 5
    best = snapshots[2]
    assert all(torch.equal(trained.tensors[n], best[n]) for n in best)
    assert any(not torch.equal(trained.tensors[n], snapshots[4][n]) for n in best)
    assert torch.equal(draft.get_parameter("fc.weight"), best["fc.weight"])
    assert trained.record.best_step == trained.record.heldout_tau[2][0]


def test_a_rise_within_the_noise_is_no_progress(target: Target) -> None:
    draft, method = fresh_draft(target), read_method("fc")
    trainable = prepare(draft, method, Setup(width=1, init="active", seed=0))
    run = AdapterRun(draft, method, replace(CONFIG, patience=2), trainable, None, {}, 100)
    for tau, stalled in ((1.0, False), (2.0, False), (2.0004, False), (2.0008, True), (2.1, False)):
        run.note_tau(tau)
        run.state.step = 49
        assert not run.stalled(), "training stops in the second half of its steps at the earliest"
        run.state.step = 50
        assert run.stalled() == stalled, tau


@pytest.mark.parametrize(
    "seen",
    [
        # the first is the start: while nothing is better, training goes on
        [(1.72, False), (1.66, False), (1.65, False), (1.64, False), (1.63, False), (1.70, False)],
        [(1.72, False), (1.66, False), (1.69, False), (1.68, False), (1.73, False), (1.70, False)],
        # what still rises after a fall goes on
        [(1.50, False), (1.72, False), (1.66, False), (1.65, False), (1.69, False), (1.68, True)],
    ],
)
def test_a_fall_at_first_is_not_the_end(
    seen: list[tuple[float, bool]], target: Target, draft_folder: Path
) -> None:
    draft = load_draft(str(draft_folder), target, torch.float32)
    trainable = prepare(draft, read_method("expert"), Setup(width=4))
    run = AdapterRun(
        draft, read_method("expert"), replace(CONFIG, patience=3), trainable, None, {}, 8
    )
    for step, (tau, stalled) in enumerate(seen):
        run.state.step = step
        run.note_tau(tau)
        assert run.stalled() == stalled, tau


def _general(draft: Draft, target: Target, answers: Sequence[Answer]) -> float:
    return pooled_tau([t for t in replay(target, draft, answers, 3) if t.accepted])


@pytest.mark.parametrize("method", ["expert+fc+norms", "lora+head-lora", "full"])
@pytest.mark.parametrize("tolerance", [0.0, 0.1, 9.0])
def test_what_is_kept_is_the_best_share_of_the_way_that_loses_nothing_elsewhere(
    target: Target, draft_folder: Path, answers: list[Answer], method: str, tolerance: float
) -> None:
    """Trained so far that it loses on answers that it has not seen; every figure is measured again here."""
    config = replace(CONFIG, method=method, lr=3e-3, epochs=40, evaluations=2, patience=9)
    free, _ = run(target, draft_folder, answers[:4], config)
    draft = load_draft(str(draft_folder), target, torch.float32)
    seen, others = answers[:4], answers[4:8]
    found = train(
        target, draft, seen, seen, config, k=3, guard=Guard({"others": others}, tolerance)
    )
    record, start = found.record, free.start
    assert record.heldout_tau == free.record.heldout_tau  # a guard changes no step
    assert [share for share, _, _ in record.way] == list(SHARES)
    for share, own, general in record.way:
        part = load_draft(str(draft_folder), target, torch.float32)
        put(part, between(start, free.tensors, share))
        assert _general(part, target, seen) == pytest.approx(own)
        assert _general(part, target, others) == pytest.approx(general)
    unadapted = record.way[0][2]
    allowed = [(own, s) for s, own, general in record.way if general >= unadapted * (1 - tolerance)]
    assert record.best_tau() == max(allowed)[0]
    kept = between(start, free.tensors, record.share)
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in kept.items())
    assert _general(draft, target, seen) == pytest.approx(record.best_tau())


def test_the_test_above_has_teeth(
    target: Target, draft_folder: Path, answers: list[Answer]
) -> None:
    """Without tolerance less of the way is kept than with a large one."""
    config = replace(CONFIG, method="expert+fc+norms", lr=3e-3, epochs=40, evaluations=2)
    shares = []
    for tolerance in (0.0, 9.0):
        draft = load_draft(str(draft_folder), target, torch.float32)
        guard = Guard({"others": answers[4:8]}, tolerance)
        found = train(target, draft, answers[:4], answers[:4], config, k=3, guard=guard)
        shares.append(found.record.share)
    assert shares[0] < shares[1]


def test_of_several_guards_the_one_that_loses_most_decides(
    target: Target, draft_folder: Path, answers: list[Answer]
) -> None:
    config = replace(CONFIG, method="expert+fc+norms", lr=3e-3, epochs=40, evaluations=2)
    groups = {"some": answers[4:6], "others": answers[6:8]}

    def kept(guarding: dict[str, Sequence[Answer]]) -> Any:
        draft = load_draft(str(draft_folder), target, torch.float32)
        guard = Guard(guarding, 0.0)
        return train(target, draft, answers[:4], answers[:4], config, k=3, guard=guard).record

    alone = {name: kept({name: some}).way for name, some in groups.items()}
    way = kept(groups).way
    for at in range(len(SHARES)):
        each = [(own[at][2] / own[0][2], own[at][2]) for own in alone.values()]
        assert way[at][2] == pytest.approx(min(each)[1])
    assert len({way[at][2] for at in range(len(SHARES))}) > 1
    kept_of = [min(own[at][2] / own[0][2] for own in alone.values()) for at in range(len(SHARES))]
    best = max((way[at][1], SHARES[at]) for at in range(len(SHARES)) if kept_of[at] >= 1)
    assert kept(groups).best_tau() == best[0]


def test_answers_of_one_token_do_not_guard(answers: list[Answer]) -> None:
    single = [replace(answer, length=1) for answer in answers[:3]]
    assert usable(Guard({"single": single}, 0.1), 3) is None
    found = usable(Guard({"single": single, "mixed": [*single, *answers[3:5]]}, 0.1), 3)
    assert found == Guard({"mixed": answers[3:5]}, 0.1)
    with pytest.raises(UserError, match="tokens past its end"):
        usable(Guard({"mixed": answers[3:5]}, 0.1), 40)


def test_one_of_two_guards_holds_back_what_the_other_would_allow(
    target: Target, draft_folder: Path, answers: list[Answer]
) -> None:
    """Whichever of the two comes first."""
    config = replace(CONFIG, method="expert+fc+norms", lr=3e-3, epochs=40, evaluations=2)

    def share(guarding: dict[str, Sequence[Answer]]) -> float:
        draft = load_draft(str(draft_folder), target, torch.float32)
        guard = Guard(guarding, 0.0)
        found = train(target, draft, answers[:4], answers[:4], config, k=3, guard=guard)
        return found.record.share

    same, other = answers[:4], answers[4:8]
    held = share({"other": other})
    assert held < share({"same": same})
    assert share({"same": same, "other": other}) == held == share({"other": other, "same": same})


@pytest.mark.parametrize(
    ("reference", "floor"), [({}, 1.8), ({"a": 1.9}, 1.71), ({"a": 3.0}, 2.0), ({"b": 1.0}, 1.8)]
)
def test_a_guard_holds_against_its_reference(reference: dict[str, float], floor: float) -> None:
    """But asks nothing back that was lost before it."""
    assert Guard({}, 0.1, reference).floor("a", 2.0) == pytest.approx(floor)


def test_a_reference_decides_how_far_training_may_go(
    target: Target, draft_folder: Path, answers: list[Answer]
) -> None:
    """Of the same way, all that stays above a low reference is allowed, and nothing below the start with a high one."""
    config = replace(CONFIG, method="expert+fc+norms", lr=3e-3, epochs=40, evaluations=2)

    def trained(reference: float) -> Any:
        draft = load_draft(str(draft_folder), target, torch.float32)
        guard = Guard({"others": answers[4:8]}, 0.0, {"others": reference})
        found = train(target, draft, answers[:4], answers[:4], config, k=3, guard=guard)
        return found.record

    low, high = trained(1.0), trained(9.0)
    assert low.way == high.way
    assert low.share > high.share
    start = high.way[0][2]
    allowed = [(own, share) for share, own, tau in high.way if tau >= start]
    assert high.share == max(allowed)[1]


def test_operations_are_counted_and_grow_with_the_tokens(
    target: Target, draft_folder: Path, answers: list[Answer]
) -> None:
    """The target's: two per weight of a layer and token read, two per weight of its head and label,
    and the attention on top."""
    short = run(target, draft_folder, answers, replace(CONFIG, epochs=1, patience=9))[0].record
    long = run(target, draft_folder, answers, replace(CONFIG, epochs=3, patience=9))[0].record
    tokens = sum(len(a.prompt) + a.length for a in answers)
    weights = sum(
        p.numel() for n, p in target.model.named_parameters() if p.dim() == 2 and "layers" in n
    )
    head = 2 * target.head.weight.numel() * sum(a.length - 1 for a in answers)
    assert 2 * weights * tokens + 0.9 * head <= short.target_flops
    assert short.target_flops < 2.5 * weights * tokens + 1.1 * head
    assert long.target_flops == pytest.approx(short.target_flops + 2 * head, rel=0.03)
    assert long.draft_flops == pytest.approx(3 * short.draft_flops, rel=0.2)
    # Chains: one layer's weights, a head, forward and backward, at each step of the rollout.
    deeper = run(target, draft_folder, answers, replace(CONFIG, epochs=1, rollout=1))[0].record
    assert 1.5 < short.draft_flops / deeper.draft_flops < 3.5
    assert deeper.draft_flops > 3 * 2 * 261 * 32 * sum(a.length - 1 for a in answers)


def test_operations_do_not_hang_on_the_batch_that_they_are_counted_on(
    target: Target, draft_folder: Path
) -> None:
    """Long prompts with short answers, and the other way round: each tells what the other takes."""
    steps, draft = CONFIG.rollout, load_draft(str(draft_folder), target, torch.float32)
    prepare(draft, read_method("body"), Setup())

    def rows(prompt: int, length: int) -> list[Answer]:
        return [
            Answer(str(i), (5 + i,) * prompt, (20 + i,) * length, length, "length")
            for i in range(3)
        ]

    def read(some: list[Answer]) -> TeacherBatch:
        return read_teacher_batch(target, collate(some, target.device), draft.aux_layers)

    def taken(some: list[Answer]) -> float:
        """By the counter, of the rollout and of the head at every label; the backward pass on top."""
        batch = read(some)
        first = batch.batch.first

        def forward() -> None:
            rollout = draft.rollout(batch.batch.tokens_BT, batch.features_BTF, first, steps)
            for j, states_BSH in enumerate(rollout):
                begin = int((batch.offset_N < 1 + j).sum())
                at_N = batch.label_N[begin:] - 2 - j - first
                draft.logits(states_BSH[batch.row_N[begin:], at_N])

        with products_of_trained(draft) as products:
            return 2 * counted(forward) + sum(products)

    asked, answered = rows(24, 6), rows(6, 24)
    for counted_on in (asked, answered):
        flops = count_flops(read(counted_on), draft, CONFIG)
        for some in (asked, answered):
            found = flops.step.of(work_of([some], steps))
            assert found == pytest.approx(taken(some), rel=0.08)
        mixed = [*asked[:2], *answered[:1]]  # whose chains all start at the shortest prompt
        assert flops.step.of(work_of([mixed], steps)) == pytest.approx(taken(mixed), rel=0.08)
    per_token = taken(asked) / 90, taken(answered) / 90
    assert per_token[1] > 1.5 * per_token[0], "so a rate for a token would be far off"


def test_operations_are_alike_whatever_batch_comes_first(
    target: Target, draft_folder: Path
) -> None:
    """A batch of answers of two tokens has no chain that goes on, and tells nothing of one."""
    some = [Answer(str(i), (5,) * 20, (20 + i,) * n, n, "length") for i, n in enumerate((2, 2, 30))]
    plans = [[[0, 1], [2]], [[2], [0, 1]]]
    found = []
    for plan in plans:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_module, "plan_epochs", lambda *_, plan=plan: plan)
            heldout = [replace(a, tokens=a.tokens + (7,) * 3) for a in some[2:]]
            draft = load_draft(str(draft_folder), target, torch.float32)
            config = replace(CONFIG, method="body", epochs=1)
            found.append(train(target, draft, some, heldout, config, k=3).record.draft_flops)
    assert found[0] == pytest.approx(found[1], rel=1e-9)


def test_the_targets_operations_follow_from_three_short_rows(
    target: Target, answers: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    def counted_on(tokens: int) -> float:
        monkeypatch.setattr(stream_module, "COUNTED_TOKENS", tokens)
        return stream_module.AnswerStream(
            target, (1, 3), answers, [[0, 1, 2]], False
        ).flops_per_token

    tokens_BT = collate(answers[:3], target.device).tokens_BT
    whole = counted(lambda: target.read(tokens_BT, (1, 3), keep=1)) / tokens_BT.numel()
    assert counted_on(12) == pytest.approx(whole, rel=1e-9)
    flat = counted(lambda: target.read(tokens_BT[:1, :12], (1, 3), keep=1)) / 12
    assert flat != pytest.approx(whole, rel=1e-3), "attention grows with the row"


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


@pytest.mark.parametrize(
    ("factor", "seconds", "expected"),
    [
        (0.5, 0.1, "bf16"),
        (0.75, 0.1, "fp32"),
        (0.75, 1.0, "bf16"),  # compiling for new shapes costs little next to a long step
        (0.95, 1.0, "fp32"),
        (2.0, 0.1, "fp32"),
    ],
)
def test_precision_goes_to_the_clearly_faster(
    factor: float, seconds: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    seen = []
    monkeypatch.setattr("redraft.training.precision.time.perf_counter", lambda: clock[0])

    def step(at: int) -> None:
        seen.append(at)
        clock[0] += seconds * (factor if torch.is_autocast_enabled("cpu") else 1.0)

    assert choose_precision(torch.device("cpu"), step) == expected
    assert len(set(seen)) >= 3, "one batch repeated hides the cost of new shapes"


def test_a_very_long_step_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    seen = []
    monkeypatch.setattr("redraft.training.precision.time.perf_counter", lambda: clock[0])

    def step(at: int) -> None:
        seen.append(at)
        clock[0] += 30.0 if torch.is_autocast_enabled("cpu") else 40.0

    assert choose_precision(torch.device("cpu"), step) == "bf16"
    assert seen == [0, 0, 1, 1]


def test_nothing_to_train_on_is_said(
    target: Target, trained_draft: Eagle3Draft, answers: list[Answer]
) -> None:
    with pytest.raises(UserError, match="0 answers to train on and 2 held out"):
        train(target, trained_draft, [], answers[:2], CONFIG, k=3)
