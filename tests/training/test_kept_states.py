"""What the target says of an answer is read once and kept for later epochs, where it fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from redraft.checkpoints.load import load_draft
from redraft.config import TrainConfig
from redraft.core import ranks
from redraft.core.errors import UserError
from redraft.core.ranks import Place
from redraft.core.records import Answer
from redraft.models.kept_states import KeptStates
from redraft.models.target import Reading, Target
from redraft.training import memory
from redraft.training import stream as stream_module
from redraft.training.train import Trained, train

CONFIG = TrainConfig(
    method="body", lr=5e-3, epochs=3, batch_tokens=96, rollout=3, evaluations=3, precision="fp32"
)
CPU = torch.device("cpu")


class Counting(Target):
    """A target that notes the rows that it reads, as tokens without padding."""

    rows: list[tuple[int, ...]]

    def read(
        self, tokens_BT: Tensor, aux_layers: Sequence[int], *args: object, **named: object
    ) -> Reading:  # type: ignore[override]
        self.rows += [tuple(t for t in row if t) for row in tokens_BT.tolist()]
        return super().read(tokens_BT, aux_layers, *args, **named)  # type: ignore[arg-type]


@pytest.fixture
def counting(target: Target) -> Counting:
    found = Counting(target.model, target.tokenizer, target.sources)
    found.rows = []
    return found


def trained(
    target: Target, folder: Path, answers: list[Answer], config: TrainConfig = CONFIG
) -> Trained:
    draft = load_draft(str(folder), target, torch.float32)
    return train(target, draft, answers[4:], answers[:4], config, k=3)


def epochs_read(counting: Counting, answers: list[Answer]) -> float:
    """How often each answer that is trained on was read, on average: for training, and the first ones before it, too."""
    rows = {(*a.prompt, *a.answer) for a in answers[4:]}
    return sum(row in rows for row in counting.rows) / len(rows)


# -- the states of rows ----------------------------------------------------------------------------


class Reader:
    """States of row i are i + 1, as long as the row; in other batches they are rounded otherwise."""

    def __init__(self) -> None:
        self.read: list[tuple[int, ...]] = []

    def __call__(self, rows: Sequence[int]) -> list[Tensor]:
        self.read.append(tuple(rows))
        return [torch.full((i + 2, 3), i + 1 + 0.01 * len(rows)) for i in rows]


LENGTHS = {i: i + 2 for i in range(4)}


def test_rows_are_read_once_and_padded_with_zeros() -> None:
    reader = Reader()
    states = KeptStates(reader, LENGTHS)
    first, again = states.of([0, 2], CPU), states.of([2, 0], CPU)
    assert reader.read == [(0, 2)]
    assert first.shape == (2, 4, 3)
    assert torch.equal(first[0, :, 0], torch.tensor([1.02, 1.02, 0, 0]))
    assert torch.equal(again, first.flip(0))
    states.of([3], CPU)
    assert torch.equal(states.of([0, 2], CPU), first)
    assert reader.read == [(0, 2), (3,)]


def test_rows_that_are_not_kept_are_read_again() -> None:
    states = KeptStates(reader := Reader(), {0: 2})
    for _ in range(2):
        assert torch.equal(states.of([0, 1], CPU)[:, 0, 0], torch.tensor([1.02, 2.02]))
    assert reader.read == [(0, 1), (0, 1)]
    states.of([0], CPU)
    assert len(reader.read) == 2


def test_a_kept_row_stays_the_same_when_its_batch_is_read_again() -> None:
    states = KeptStates(Reader(), LENGTHS, [[0, 1, 3], [0, 2]])
    states.of([0, 1, 3], CPU)
    assert torch.equal(states.of([0, 2], CPU)[:, 0, 0], torch.tensor([1.03, 3.02]))


def test_rows_are_read_in_the_batch_first_named() -> None:
    """A resumed run asks for rows in batches of a later epoch."""
    together = [[0, 1, 2], [3], [0, 3], [1, 2]]
    whole, resumed = (KeptStates(Reader(), LENGTHS, together) for _ in range(2))
    for rows in together:
        last = whole.of(rows, CPU)
    assert torch.equal(resumed.of(together[-1], CPU), last)
    alone = KeptStates(reader := Reader(), LENGTHS)
    assert torch.equal(alone.of([1], CPU)[0, :, 0], torch.full((3,), 2.01))
    assert reader.read == [(1,)]


def test_what_other_processes_read_is_not_read_again() -> None:
    block = torch.zeros(sum(LENGTHS.values()), 3)
    together = [[0, 1], [2, 3], [1, 2]]
    one, other = (KeptStates(Reader(), LENGTHS, together, block) for _ in range(2))
    last = KeptStates(reader := Reader(), LENGTHS, together, block)
    expected = KeptStates(Reader(), LENGTHS, together)
    one.of([0, 1], CPU)
    other.of([2, 3], CPU)
    last.others_read([0, 3])
    assert torch.equal(last.of([1, 2], CPU), expected.of([1, 2], CPU)), "with those read with them"
    assert reader.read == []
    empty = KeptStates(reader, LENGTHS, together, torch.zeros_like(block))
    empty.others_read([9])
    empty.of([1, 2], CPU)
    assert reader.read == [(0, 1), (2, 3)]


# -- in training -----------------------------------------------------------------------------------


@pytest.mark.parametrize("epochs", [1.0, 2.5])
def test_the_target_reads_an_answer_once(
    counting: Counting, draft_folder: Path, answers: list[Answer], epochs: float
) -> None:
    once = trained(counting, draft_folder, answers, replace(CONFIG, epochs=epochs))
    assert epochs_read(counting, answers) == 1.0
    heldout = [(*a.prompt, *a.tokens) for a in answers[:4]]
    assert [counting.rows.count(row) for row in heldout] == [1] * 4, (
        "at the first of four evaluations"
    )
    assert len(once.record.heldout_tau) == 4


def test_kept_states_train_as_read_ones_do(
    target: Target, draft_folder: Path, answers: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where each answer is a batch of its own the target computes the same each time it reads it, bit for bit."""
    config = replace(CONFIG, batch_tokens=1, epochs=2)
    kept = trained(target, draft_folder, answers, config)
    monkeypatch.setattr(stream_module, "SHARE_KEPT", 0.0)
    read = trained(target, draft_folder, answers, config)
    assert kept.record.best_step > 0
    assert kept.record.heldout_tau == read.record.heldout_tau
    assert all(torch.equal(kept.tensors[name], read.tensors[name]) for name in read.tensors)
    assert kept.record.target_flops < 0.75 * read.record.target_flops


@pytest.mark.parametrize("why", ["no memory", "no memory next to the run"])
def test_they_are_not_kept_where_that_does_not_pay(
    counting: Counting,
    draft_folder: Path,
    answers: list[Answer],
    why: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if why == "no memory":
        monkeypatch.setattr(stream_module, "free_memory", lambda _: 0.1)
    else:
        monkeypatch.setattr(stream_module, "fits", lambda *_: False)
    trained(counting, draft_folder, answers)
    assert 3.0 <= epochs_read(counting, answers) < 4.0
    heldout = [(*a.prompt, *a.tokens) for a in answers[:4]]
    assert [counting.rows.count(row) for row in heldout] == [4] * 4


PLAN = [[0, 1, 2], [3], [0, 2, 1], [3]]


def stream_of(target: Target, answers: list[Answer]) -> stream_module.AnswerStream:
    return stream_module.AnswerStream(target, (1, 3), answers, PLAN, False)


def test_what_is_kept_is_counted(target: Target, answers: list[Answer]) -> None:
    stream = stream_of(target, answers)
    tokens = sum(len(a.prompt) + a.length for a in answers[:4])
    assert stream.read(4) == stream.length(0, 4) == 2 * tokens
    stream.keep(())
    assert stream.kept_mb == pytest.approx(tokens * 3 * target.hidden_size * 4 / 1e6)
    assert stream.with_kept(5.0) == 5.0 + stream.kept_mb
    assert (stream.read(4), stream.length(0, 4)) == (tokens, 2 * tokens)


def test_processes_of_a_machine_keep_answers_for_each_other(
    counting: Counting, answers: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks on one block, one after the other in each step."""
    block: list[Tensor] = []

    def shared(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        block.append(block[0] if block else torch.zeros(shape, dtype=dtype))
        return block[0]

    monkeypatch.setattr(ranks, "everyone", lambda said: [said, said])
    monkeypatch.setattr(stream_module, "shared_tensor", shared)
    streams = []
    for rank in range(2):
        monkeypatch.setattr(ranks, "_here", Place(rank, 2))
        streams.append(stream_of(counting, answers))
        streams[rank].keep(())
    features: dict[tuple[int, int], Tensor] = {}
    read = []
    for at, indices in enumerate(PLAN):
        for rank in range(2):
            monkeypatch.setattr(ranks, "_here", Place(rank, 2))
            counting.rows.clear()
            for part in streams[rank].parts(at):
                for place, states in zip(part.places, part.features_BTF, strict=True):
                    features[at, indices[place]] = states
            read.append(len(counting.rows))
    assert read == [2, 1, 1, 0, 0, 0, 0, 0], "in the first pass, by the one that gets it"
    for row in range(4):
        first, again = (states for (_, i), states in features.items() if i == row)
        length = len(answers[row].prompt) + answers[row].length
        assert torch.equal(first[:length], again[:length])
        assert first[:length].any(dim=1).all()
    assert streams[0].read(4) == streams[0].length(0, 2)


def test_a_rank_that_goes_on_reads_what_it_needs(
    counting: Counting, answers: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what was read in a step that this process took is taken for read; some steps may be left out."""
    monkeypatch.setattr(ranks, "_here", Place(0, 2))
    monkeypatch.setattr(ranks, "everyone", lambda said: [said, said])
    monkeypatch.setattr(
        stream_module, "shared_tensor", lambda shape, dtype: torch.zeros(shape, dtype=dtype)
    )
    stream = stream_of(counting, answers)
    stream.keep(())
    counting.rows.clear()
    (part,) = stream.parts(2)
    assert len(counting.rows) == 3, "rows 0 and 1, and 2, which is read with row 0"
    assert part.features_BTF.any(dim=2).sum() == sum(len(a.prompt) + a.length for a in answers[:2])
    (part,) = stream.parts(3)
    assert part.features_BTF.any(), "row 3 was in no step"
    assert len(counting.rows) == 4


def test_processes_without_memory_in_common_read_on(
    target: Target, answers: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "_here", Place(0, 2))
    monkeypatch.setattr(ranks, "everyone", lambda said: [said, said])
    monkeypatch.setattr(stream_module, "shared_tensor", lambda shape, dtype: None)
    stream = stream_of(target, answers)
    stream.keep(())
    assert stream.kept is None
    assert stream.read(4) == stream.length(0, 4)


def test_what_does_not_fit_is_refused_before_the_target_reads(
    counting: Counting, draft_folder: Path, answers: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda _: 1.0)
    with pytest.raises(UserError, match="MB at the peak"):
        trained(counting, draft_folder, answers)
    assert not counting.rows


def test_a_batch_in_parts_is_read_in_parts(
    counting: Counting, draft_folder: Path, answers: list[Answer]
) -> None:
    config = replace(CONFIG, accumulate=2)
    parts = trained(counting, draft_folder, answers, config)
    assert epochs_read(counting, answers) == 1.0
    whole = trained(counting, draft_folder, answers)
    assert parts.record.final_loss == pytest.approx(whole.record.final_loss, rel=1e-4)
