"""Losses against loops in plain Python, their gradients by differences, and wrong versions caught.

Also: the fused loss equals the plain ones, and its memory does not grow with the vocabulary.
"""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from redraft.config import TrainConfig, resolve
from redraft.core.errors import UserError
from redraft.losses.functions import LOSSES, Teacher, forward_kl, load
from redraft.losses.fused import Fused, fused_loss
from redraft.losses.table import LABELS, OWN, TABLE, WHOLE, LossRow

N, V, H = 5, 7, 4
REDUCED = torch.tensor([1, 2, 4, 6])
EVERY = pytest.mark.parametrize("name", LOSSES)
VOCABULARIES = pytest.mark.parametrize("vocab", [None, REDUCED], ids=["whole", "reduced"])


@dataclasses.dataclass
class Case:
    """Random inputs in float64: what target and draft say of N tokens."""

    target: Tensor
    draft: Tensor
    labels: Tensor
    features: Tensor
    states: Tensor
    vocab: Tensor | None

    def teacher(self) -> Teacher:
        return Teacher.from_logits(self.target, self.vocab, self.labels, self.features)

    def loss(self, name: str) -> float:
        return float(LOSSES[name](self.teacher(), self.draft, self.states))


def case(vocab: Tensor | None, seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return 2 * torch.randn(*shape, generator=generator, dtype=torch.float64)

    labels = torch.randint(V, (N,), generator=generator)
    labels[:2] = torch.tensor([0, 4])  # one that the reduced vocabulary lacks, one that it has
    drafted = V if vocab is None else len(vocab)
    return Case(normal(N, V), normal(N, drafted), labels, normal(N, H), normal(N, H), vocab)


# -- rows ------------------------------------------------------------------------------------------


def test_settings_offer_the_rows_and_an_unknown_loss_lists_them() -> None:
    for row in TABLE:
        assert resolve([("test", {"train.loss": row.name})]).config.train.loss == row.name
    with pytest.raises(
        UserError, match="train.loss must be one of kl, tv, lk, ce, paper; got 'mse'"
    ):
        resolve([("test", {"train.loss": "mse"})])
    help = {f.name: f.metadata["help"] for f in dataclasses.fields(TrainConfig)}["loss"]
    assert all(row.help in help for row in TABLE)


def test_a_row_without_its_function_fails_with_its_name() -> None:
    with pytest.raises(TypeError, match="loss 'mse': functions.py has no mean_squared_error"):
        load(LossRow("mse", "mean squared error", "mean_squared_error", OWN))


# -- the oracle: one token at a time, in floats ---------------------------------------------------


def softmax(logits: list[float]) -> list[float]:
    weights = [math.exp(x - max(logits)) for x in logits]
    return [w / sum(weights) for w in weights]


@dataclasses.dataclass
class Token:
    """One token's distributions: p over the whole vocabulary, `near` renormalised, q."""

    p: list[float]
    near: list[float]
    q: list[float]
    label: int
    feature: list[float]
    state: list[float]
    rows: list[int]

    @property
    def kl(self) -> float:
        return sum(p * math.log(p / q) for p, q in zip(self.near, self.q, strict=True) if p > 0)

    @property
    def tv(self) -> float:
        return 1 - sum(min(self.p[row], q) for row, q in zip(self.rows, self.q, strict=True))

    @property
    def tv_renormalised(self) -> float:
        return 1 - sum(min(p, q) for p, q in zip(self.near, self.q, strict=True))

    @property
    def ce(self) -> float:
        return -math.log(self.q[self.rows.index(self.label)]) if self.label in self.rows else 0.0

    def lk(self, alpha: float) -> float:
        w = math.exp(-3 * alpha)
        return w * self.kl + (1 - w) * self.tv

    @property
    def smooth_l1(self) -> float:
        far = [abs(a - b) for a, b in zip(self.state, self.feature, strict=True)]
        return sum(d * d / 2 if d < 1 else d - 0.5 for d in far) / len(far)


def tokens_of(c: Case) -> list[Token]:
    rows = list(range(V)) if c.vocab is None else c.vocab.tolist()
    made = []
    for n in range(len(c.target)):
        p = softmax(c.target[n].tolist())
        kept = sum(p[row] for row in rows)
        near = [p[row] / kept for row in rows]
        q = softmax(c.draft[n].tolist())
        feature, state = c.features[n].tolist(), c.states[n].tolist()
        made.append(Token(p, near, q, int(c.labels[n]), feature, state, rows))
    return made


def by_hand(name: str, c: Case, frozen: Case) -> float:
    """The loss of `c`; what a loss holds constant is taken from `frozen`."""
    alphas = [1 - token.tv for token in tokens_of(frozen)]
    per_token: dict[str, Callable[[Token, float], float]] = {
        "kl": lambda t, _: t.kl,
        "tv": lambda t, _: t.tv,
        "lk": lambda t, alpha: t.lk(alpha),
        "ce": lambda t, _: t.ce,
        "paper": lambda t, _: t.smooth_l1 + 0.1 * t.kl,
    }
    pairs = zip(tokens_of(c), alphas, strict=True)
    return sum(per_token[name](token, alpha) for token, alpha in pairs)


WRONG: dict[str, dict[str, Callable[[list[Token]], float]]] = {
    "kl": {
        "reversed": lambda ts: sum(
            q * math.log(q / p) for t in ts for p, q in zip(t.near, t.q, strict=True)
        ),
        "a mean": lambda ts: sum(t.kl for t in ts) / N,
        "in bits": lambda ts: sum(t.kl for t in ts) / math.log(2),
        "cross-entropy": lambda ts: sum(
            -p * math.log(q) for t in ts for p, q in zip(t.near, t.q, strict=True)
        ),
    },
    "tv": {
        "of maxima": lambda ts: sum(
            1 - sum(max(t.p[r], q) for r, q in zip(t.rows, t.q, strict=True)) for t in ts
        ),
        "L1, not halved": lambda ts: sum(
            sum(abs(t.p[r] - q) for r, q in zip(t.rows, t.q, strict=True)) for t in ts
        ),
        "a mean": lambda ts: sum(t.tv for t in ts) / N,
    },
    "lk": {
        "-log alpha": lambda ts: sum(-math.log(1 - t.tv) for t in ts),
        "weights swapped": lambda ts: sum(t.kl + t.tv - t.lk(1 - t.tv) for t in ts),
        "one weight for all": lambda ts: sum(t.lk(1 - sum(u.tv for u in ts) / N) for t in ts),
        "eta 1": lambda ts: sum(t.lk((1 - t.tv) / 3) for t in ts),
    },
    "ce": {
        "the target's favourite": lambda ts: sum(
            -math.log(t.q[t.near.index(max(t.near))]) for t in ts
        ),
        "a mean": lambda ts: sum(t.ce for t in ts) / N,
    },
    "paper": {
        "squares": lambda ts: sum(
            sum((a - b) ** 2 for a, b in zip(t.state, t.feature, strict=True)) / H + 0.1 * t.kl
            for t in ts
        ),
        "a sum over H": lambda ts: sum(H * t.smooth_l1 + 0.1 * t.kl for t in ts),
        "weights swapped": lambda ts: sum(0.1 * t.smooth_l1 + t.kl for t in ts),
    },
}
WRONG_IF_REDUCED: dict[str, dict[str, Callable[[list[Token]], float]]] = {
    "kl": {
        "not renormalised": lambda ts: sum(
            t.p[r] * math.log(t.p[r] / q) for t in ts for r, q in zip(t.rows, t.q, strict=True)
        )
    },
    "tv": {"renormalised": lambda ts: sum(t.tv_renormalised for t in ts)},
    "lk": {
        "renormalised": lambda ts: sum(
            math.exp(-3 * (1 - t.tv_renormalised)) * t.kl
            + (1 - math.exp(-3 * (1 - t.tv_renormalised))) * t.tv_renormalised
            for t in ts
        )
    },
    "ce": {
        "a missing label as row 0": lambda ts: sum(
            -math.log(t.q[t.rows.index(t.label) if t.label in t.rows else 0]) for t in ts
        ),
        "the target's id as a row": lambda ts: sum(-math.log(t.q[t.label % len(t.q)]) for t in ts),
    },
    "paper": {},
}


# -- values and gradients -------------------------------------------------------------------------


@EVERY
@VOCABULARIES
def test_value(name: str, vocab: Tensor | None) -> None:
    c = case(vocab)
    assert c.loss(name) == pytest.approx(by_hand(name, c, c), abs=1e-12)


@EVERY
@VOCABULARIES
def test_wrong_versions_are_told_apart(name: str, vocab: Tensor | None) -> None:
    c = case(vocab)
    wrong = WRONG[name] | (WRONG_IF_REDUCED[name] if vocab is not None else {})
    for what, version in wrong.items():
        assert c.loss(name) != pytest.approx(version(tokens_of(c)), abs=1e-3), what


@EVERY
@VOCABULARIES
def test_gradient_by_differences(name: str, vocab: Tensor | None) -> None:
    c = case(vocab, seed=1)
    draft, states = c.draft.clone().requires_grad_(), c.states.clone().requires_grad_()
    LOSSES[name](c.teacher(), draft, states).backward()
    for field, leaf in (("draft", draft), ("states", states)):
        got = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        for at in range(leaf.numel()):
            values = []
            for step in (1e-6, -1e-6):
                moved = getattr(c, field).clone()
                moved.view(-1)[at] += step
                values.append(by_hand(name, dataclasses.replace(c, **{field: moved}), c))
            expected = (values[0] - values[1]) / 2e-6
            assert float(got.reshape(-1)[at]) == pytest.approx(expected, abs=1e-7), (field, at)


@VOCABULARIES
@pytest.mark.parametrize("name", [name for name in LOSSES if name != "ce"])
def test_a_perfect_draft_has_no_loss_but_the_mass_it_cannot_say(
    name: str, vocab: Tensor | None
) -> None:
    c = case(vocab)
    c.draft = c.target if vocab is None else c.target[:, vocab]
    c.states = c.features
    missing = [1 - sum(t.p[row] for row in t.rows) for t in tokens_of(c)]
    unavoidable = {"tv": sum(missing), "lk": sum(m * (1 - math.exp(-3 * (1 - m))) for m in missing)}
    assert c.loss(name) == pytest.approx(unavoidable.get(name, 0.0), abs=1e-12)
    if name in ("kl", "paper"):  # the others have a kink there
        draft, states = c.draft.clone().requires_grad_(), c.states.clone().requires_grad_()
        LOSSES[name](c.teacher(), draft, states).backward()
        for leaf in (draft, states):
            assert leaf.grad is None or float(leaf.grad.abs().max()) < 1e-12


@EVERY
def test_probabilities_of_exactly_zero(name: str) -> None:
    c = case(None)
    c.target = torch.full_like(c.target, -math.inf)
    c.target[torch.arange(N), c.labels] = 0.0
    c.target[:, 3] = 0.0  # one or two tokens share all of p
    assert c.loss(name) == pytest.approx(by_hand(name, c, c), abs=1e-12)
    draft = c.draft.clone().requires_grad_()
    LOSSES[name](c.teacher(), draft, c.states).backward()
    assert draft.grad is not None
    assert bool(torch.isfinite(draft.grad).all())


def test_a_point_mass_has_no_entropy_also_in_float32() -> None:
    teacher = Teacher.from_logits(torch.tensor([[0.0, 1e9, 0.0]]), None, torch.tensor([1]))
    assert float(teacher.entropy_N) == 0.0
    assert float(forward_kl(teacher, torch.zeros(1, 3))) == pytest.approx(math.log(3), rel=1e-6)


# -- the teacher ----------------------------------------------------------------------------------


@VOCABULARIES
def test_what_the_teacher_holds(vocab: Tensor | None) -> None:
    c = case(vocab)
    teacher = c.teacher()
    for n, token in enumerate(tokens_of(c)):
        assert teacher.p_ND[n].tolist() == pytest.approx(token.near, abs=1e-12)
        assert float(teacher.entropy_N[n]) == pytest.approx(
            -sum(p * math.log(p) for p in token.near), abs=1e-12
        )
        assert float(teacher.kept_N[n]) == pytest.approx(sum(token.p[r] for r in token.rows))
        row = token.rows.index(token.label) if token.label in token.rows else -1
        assert int(teacher.label_N[n]) == row
    assert (-1 in teacher.label_N.tolist()) == (vocab is not None)


@EVERY
@VOCABULARIES
def test_last_is_the_suffix(name: str, vocab: Tensor | None) -> None:
    c = case(vocab)
    whole = c.teacher()
    part = Case(*(getattr(c, f.name)[3:] for f in dataclasses.fields(c)[:5]), vocab=vocab)
    got = float(LOSSES[name](whole.last(2), part.draft, part.states))
    assert got == pytest.approx(by_hand(name, part, part), abs=1e-12)
    assert whole.last(2).p_ND.data_ptr() == whole.p_ND[3:].data_ptr()


@pytest.mark.parametrize(
    ("given", "computed"),
    [("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")],
)
def test_the_teacher_computes_in_float32_or_wider(given: str, computed: str) -> None:
    logits = torch.randn(N, V).to(getattr(torch, given))
    teacher = Teacher.from_logits(logits, REDUCED, torch.zeros(N, dtype=torch.long))
    for tensor in (teacher.p_ND, teacher.entropy_N, teacher.kept_N):
        assert tensor.dtype == getattr(torch, computed)
    narrow = torch.randn(N, len(REDUCED), dtype=torch.bfloat16)
    assert all(LOSSES[n](teacher, narrow, None).dtype == tensor.dtype for n in ("kl", "tv", "lk"))


@pytest.mark.parametrize("lacking", ["features", "states"])
def test_states_without_features_are_refused(lacking: str) -> None:
    c = case(None)
    features = None if lacking == "features" else c.features
    teacher = Teacher.from_logits(c.target, None, c.labels, features)
    with pytest.raises(UserError, match="the states of this draft are none"):
        LOSSES["paper"](teacher, c.draft, None if lacking == "states" else c.states)


# -- merged ----------------------------------------------------------------------------------------


def merged(
    name: str,
    draft_logits: Callable[[Tensor], Tensor],
    states: list[Tensor],
    teacher_logits: Callable[[slice], Tensor],
    vocab: Tensor | None,
    labels: Tensor,
    features: Tensor | None,
    *,
    rows: int,
    weights: tuple[float, ...] = (1.0, 0.5, 0.25),
) -> Tensor:
    """`fused_loss` whose teacher is made from `teacher_logits` of a slice of the labels."""

    def teacher(part: slice) -> Teacher:
        own = None if features is None else features[part]
        return Teacher.from_logits(teacher_logits(part), vocab, labels[part], own)

    about = Fused(LOSSES[name], teacher, draft_logits, weights[: len(states)], rows)
    return fused_loss(about, states)


@EVERY
@VOCABULARIES
@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_the_fused_loss_is_the_sum_over_steps_and_its_gradients(
    name: str, vocab: Tensor | None, rows: int
) -> None:
    """Three rollout steps, which predict the last 11, 8 and 2 labels."""
    generator = torch.Generator().manual_seed(2)
    counts = (11, 8, 2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    labels = torch.randint(V, (counts[0],), generator=generator)
    target_head, target_states = normal(V, H), normal(counts[0], H)
    features = normal(counts[0], H)
    starts = [normal(count, H) for count in counts]
    head = normal(V if vocab is None else len(vocab), H)
    seen: list[slice] = []

    def run(is_merged: bool, shift: int = 0) -> list[Tensor]:
        states = [start.clone().requires_grad_() for start in starts]
        weights = head.clone().requires_grad_()

        def draft_logits(s: Tensor) -> Tensor:
            return s @ weights.T

        def teacher_logits(part: slice) -> Tensor:
            seen.append(part)
            return target_states[part] @ target_head.T

        if is_merged:
            loss = merged(
                *(name, draft_logits, states, teacher_logits, vocab, labels, features), rows=rows
            )
        else:
            teacher = Teacher.from_logits(target_states @ target_head.T, vocab, labels, features)
            parts = [
                weight
                * LOSSES[name](teacher.last(len(s) + shift).part(slice(len(s))), draft_logits(s), s)
                for weight, s in zip((1.0, 0.5, 0.25), states, strict=True)
                if len(s) + shift <= counts[0]
            ]
            loss = torch.stack(parts).sum()
        (3.0 * loss).backward()
        grads = [torch.zeros_like(s) if s.grad is None else s.grad for s in states]
        assert weights.grad is not None
        return [loss.detach(), *grads, weights.grad]

    for got, expected in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    # Each label's teacher is made once, whatever the rollout.
    assert sorted(i for part in seen for i in range(part.start, part.stop)) == list(range(11))
    assert max(part.stop - part.start for part in seen) == min(rows, 11)
    # Steps that are taught by their neighbours' labels would be seen.
    assert not torch.allclose(run(True)[0], run(False, shift=1)[0], rtol=1e-3)


def test_no_tokens_cost_nothing() -> None:
    states = torch.zeros(0, V, requires_grad=True)
    empty = torch.zeros(0, dtype=torch.long)
    loss = merged(
        *("lk", lambda s: s, [states], lambda _: torch.zeros(0, V), None, empty, None), rows=10
    )
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == 0.0


@pytest.mark.parametrize("name", ["kl", "lk", "paper"])
def test_the_fused_loss_under_autocast_has_the_same_gradients(name: str) -> None:
    torch.manual_seed(0)
    target_head, head, first = torch.randn(V, H), torch.randn(V, H), torch.randn(H, H)
    hidden, start = torch.randn(N, H), torch.randn(N, H)
    labels = torch.zeros(N, dtype=torch.long)

    def run(is_merged: bool) -> list[Tensor]:
        states = start.clone().requires_grad_()
        weights, before = head.clone().requires_grad_(), first.clone().requires_grad_()

        def draft_logits(s: Tensor) -> Tensor:
            return s @ both.T

        def target_logits(part: slice) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return hidden[part] @ target_head.T

        with torch.autocast("cpu", torch.bfloat16):
            both = weights @ before  # the chunks share what was computed before them
            losses = []
            for _ in range(2):  # the second sees what the first left in autocast's cache
                if is_merged:
                    losses.append(
                        merged(
                            *(name, draft_logits, [states], target_logits, None, labels, hidden),
                            rows=2,
                        )
                    )
                else:
                    teacher = Teacher.from_logits(target_logits(slice(N)), None, labels, hidden)
                    losses.append(LOSSES[name](teacher, draft_logits(states), states))
        (losses[0] + 2 * losses[1]).backward()
        return [t.grad for t in (states, weights, before) if t.grad is not None]

    got, expected = run(True), run(False)
    assert len(got) == len(expected) == 3
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0.03, atol=0.03)


def test_the_fused_loss_of_a_frozen_head_and_without_a_graph() -> None:
    c = case(None)
    head = torch.randn(V, V, dtype=torch.float64)

    def run() -> Tensor:
        return merged(
            *("kl", lambda s: s @ head, [c.draft], lambda p: c.target[p], None, c.labels, None),
            rows=1,
        )

    assert not run().requires_grad
    head.requires_grad_()
    with torch.no_grad():
        assert not run().requires_grad
    run().backward()  # type: ignore[no-untyped-call]
    assert head.grad is not None


@pytest.mark.parametrize("name", LOSSES)
@VOCABULARIES
def test_a_loss_reads_no_more_of_the_target_than_its_row_tells(
    name: str, vocab: Tensor | None
) -> None:
    c = case(vocab)
    reads = LOSSES[name].row.reads
    own = c.target if vocab is None else c.target[:, vocab]
    less = {
        LABELS: Teacher.from_own_logits(own[:, :0], vocab, c.labels, c.features),
        OWN: Teacher.from_own_logits(own, vocab, c.labels, c.features),
        WHOLE: c.teacher(),
    }
    assert float(LOSSES[name](less[reads], c.draft, c.states)) == pytest.approx(c.loss(name))
    if reads == WHOLE:
        with pytest.raises(AssertionError):
            LOSSES[name](less[OWN], c.draft, c.states)


# -- memory ---------------------------------------------------------------------------------------

MEASURE = """
import json, sys
import torch
from redraft.losses.functions import LOSSES, Teacher
from redraft.losses.fused import Fused, fused_loss
from redraft.training.memory import current_memory, peak_memory, restart_peak

name, form, vocabulary, values = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(1)
cpu = torch.device("cpu")


def measure(N, V, values):
    H = 16
    generator = torch.Generator().manual_seed(0)
    target_head, draft_head = (torch.randn(V, H, generator=generator) for _ in "pq")
    hidden, states = (torch.randn(N, H, generator=generator) for _ in "pq")
    states.requires_grad_()
    labels = torch.randint(V, (N,), generator=generator)
    restart_peak(cpu)
    resident = current_memory(cpu)
    def draft(s): return s @ draft_head.T
    def target(part): return hidden[part] @ target_head.T
    def teacher(part):
        return Teacher.from_logits(target(part), None, labels[part], hidden[part])
    if form == "fused":
        loss = fused_loss(Fused(LOSSES[name], teacher, draft, [1.0], max(1, values // V)), [states])
    else:
        teacher = Teacher.from_logits(target(slice(None)), None, labels, hidden)
        loss = LOSSES[name](teacher, draft(states), states)
    loss.backward()
    return peak_memory(cpu) - resident


measure(8, 50, 100)  # what the first use of each operation loads is no part of it
print(json.dumps(measure(2000, vocabulary, values)))
"""
VALUES = 1_000_000  # 4 MB in float32


def rise(name: str, form: str, vocabulary: int) -> float:
    """MB by which a forward and backward pass rise above what is resident, in a new process."""
    arguments = [name, form, str(vocabulary), str(VALUES)]
    done: Any = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=True
    )
    return float(json.loads(done.stdout))


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@EVERY
def test_memory_of_the_fused_loss_does_not_grow_with_the_vocabulary(name: str) -> None:
    vocabularies = (4_000, 150_000) if name == "kl" else (32_000,)
    chunked = {V: rise(name, "fused", V) for V in vocabularies}
    print(name, "fused", chunked)
    for vocabulary, peak in chunked.items():
        assert peak < 30 * 4 * VALUES / 1e6, vocabulary


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_of_the_plain_form_does() -> None:
    plain = {V: rise("kl", "plain", V) for V in (4_000, 32_000)}
    print("kl plain", plain)
    one = 2000 * 4 / 1e6  # MB of the tokens' logits, for each word of the vocabulary
    assert all(peak > 3 * one * V for V, peak in plain.items())
    assert plain[32_000] > 5 * plain[4_000]
