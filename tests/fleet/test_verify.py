"""What is wrong with a member in the engine is told, the worst first; the engine itself is in tests/engines_real."""

from __future__ import annotations

import pytest

from redraft.core.records import EngineAcceptance, Lossless
from redraft.fleet.verify import _problem

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
