"""What is wrong with a member in the engine is told, the worst first; the engine itself is in tests/engines_real."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from redraft.checkpoints.load import read_draft
from redraft.core.records import EngineAcceptance, Lossless
from redraft.fleet.member import Member
from redraft.fleet.verify import MemberServed, _Asked, _compared, _problem
from redraft.metrics.live import live
from redraft.models.loading import load_target
from redraft.prompts.prompts import read_prompts
from redraft.serving.counters import Counters
from redraft.serving.own_count import Limits, count_own
from redraft.serving.verify import Request
from redraft.serving.vllm import VLLM
from tests.conftest import write_prompts

SAME, OTHER = Lossless(4, 4, 0), Lossless(4, 3, 0)


def counted(tau: float, drafts: int = 100) -> EngineAcceptance:
    return EngineAcceptance(tau, drafts, 4 * drafts, round((tau - 1) * drafts), ())


@pytest.mark.parametrize(
    ("outputs", "against", "tau", "drafts", "dtype", "args", "says"),
    [
        (SAME, SAME, 2.0, 100, "float32", (), ""),
        (OTHER, SAME, 2.0, 100, "float32", (), "with the draft 1 of 4 outputs differ"),
        (SAME, OTHER, 2.0, 100, "float32", (), "even without a draft 1 of 4 answers differ"),
        (SAME, OTHER, 2.0, 100, "bfloat16", (), ""),
        (SAME, OTHER, 1.5, 100, "float32", ("--enable-prefix-caching",), ""),  # of other answers
        (SAME, SAME, 1.0, 0, "float32", (), "the engine drafted nothing"),
        (SAME, SAME, 2.03, 100, "float32", (), "the engine counts tau 2.030, redraft 2.000"),
        (SAME, SAME, 2.03, 100, "bfloat16", (), ""),
        (SAME, SAME, 1.9, 100, "bfloat16", (), "the engine counts tau 1.900, redraft 2.000"),
    ],
)
def test_a_members_problem_is_a_sentence(
    outputs: Lossless,
    against: Lossless,
    tau: float,
    drafts: int,
    dtype: str,
    args: tuple[str, ...],
    says: str,
) -> None:
    found = _problem(outputs, against, counted(tau, drafts), counted(2.0), dtype, args)
    assert found.startswith(says)
    assert bool(found) == bool(says)


def test_steps_are_compared_of_equal_answers_only(
    target_folder: Path, draft_folder: Path, tmp_path: Path
) -> None:
    """An answer that parts from redraft's has steps of other tokens."""
    base, stored = load_target(str(target_folder)), read_draft(str(draft_folder))
    prompts = read_prompts(str(write_prompts(tmp_path / "p.jsonl", 4)), base, 4).prompts
    request = Request(tmp_path, k=3, max_new_tokens=16)
    traces, answers = live(base, stored.build(base), prompts, 3, 16)
    limits = Limits(3, 16, base.stop_ids)
    counts = [
        count_own([trace], [answer], limits, VLLM.cut)
        for trace, answer in zip(traces, answers, strict=True)
    ]

    def served(counted: list[Counters], parted: int) -> MemberServed:
        given = [list(answer.answer) for answer in answers]
        for tokens in given[:parted]:
            tokens[-1] = (tokens[-1] + 1) % base.vocab_size
        asked = _Asked(given, counted)
        return _compared(base, stored, Member("base", None, ""), prompts, (asked, asked), request)

    whole = served(counts, 0)
    assert whole.compared == 4
    assert whole.counted == whole.own
    other = [dataclasses.replace(counts[0], accepted=counts[0].accepted + 9), *counts[1:]]
    assert served(other, 0).counted != whole.own
    some = served(other, 1)
    assert some.compared == 3
    assert some.counted == some.own
