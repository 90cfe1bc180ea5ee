"""redraft's default against speculators on the real fine-tunes: with as many tokens, and in as many seconds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from selection_page import POWER

from redraft_experiments import recovery
from redraft_experiments.real_cells import MEASURED, WHOLE, RealCell, change, counts_of
from redraft_experiments.recovery import Interval

Groups = Mapping[tuple[str, str], Sequence[RealCell]]
NAMES = {
    "greedy": "own, T = 0",
    "sampled": "own, T = 0.7",
    "chat": "chat, T = 0",
    "chat-sampled": "chat, T = 0.7",
}
DEFAULT, RIVAL = "body", "speculators"
TIMED = {"speculators short": 1, DEFAULT: 4, RIVAL: 4, "body longer": 10}
"""Rows that are compared by their seconds, and their passes over the answers."""


def tokens_table(groups: Groups) -> Iterator[str]:
    """tau with the default less that with the rival, and the least difference that would show."""
    yield f"| fine-tune | seeds | {' | '.join(NAMES.values())} |"
    yield "|---" * (2 + len(NAMES)) + "|"
    widths = []
    for member in dict.fromkeys(member for member, _ in groups):
        ours, theirs = _of_the_same_seeds(groups, member, (DEFAULT, RIVAL))
        if not ours:
            continue
        found = [
            recovery.difference(counts_of(ours, name), counts_of(theirs, name)) for name in MEASURED
        ]
        widths += [one.high - one.low for one in found]
        yield f"| {member} | {len(ours)} | {' | '.join(map(_change, found))} |"
    yield ""
    yield (
        "Smallest difference that these seeds and prompts show four times in five: "
        f"{POWER * min(widths):.2f} to {POWER * max(widths):.2f}; call less a tie."
    )


def seconds_table(groups: Groups) -> Iterator[str]:
    """What each row adds to the unadapted draft's tau in its seconds; of the seeds that have all rows."""
    yield f"| fine-tune | row | passes | seconds | {' | '.join(NAMES.values())} | seeds |"
    yield "|---" * (5 + len(NAMES)) + "|"
    for member in dict.fromkeys(member for member, _ in groups):
        zero = groups[member, "unadapted"]
        for row, some in zip(TIMED, _of_the_same_seeds(groups, member, TIMED), strict=True):
            if some:
                found = [_change(change(some, zero, name, WHOLE)) for name in MEASURED]
                seconds = sum(cell.train["seconds"] for cell in some) / len(some)
                yield f"| {member} | {row} | {TIMED[row]} | {seconds:.0f} | {' | '.join(found)} | {len(some)} |"
        ours, theirs = _of_the_same_seeds(groups, member, (*TIMED, "body longer", RIVAL))[-2:]
        if ours:
            found = [
                _change(recovery.difference(counts_of(ours, name), counts_of(theirs, name)))
                for name in MEASURED
            ]
            yield f"| {member} | body longer less speculators | | | {' | '.join(found)} | {len(ours)} |"


def _of_the_same_seeds(
    groups: Groups, member: str, rows: Mapping[str, int] | Sequence[str]
) -> list[list[RealCell]]:
    """The cells of each row, in the order of their seeds, of the seeds that every row has."""
    found = [{cell.seed: cell for cell in groups.get((member, row), ())} for row in rows]
    common = sorted(set.intersection(*(set(each) for each in found)))
    return [[each[seed] for seed in common] for each in found]


def _change(found: Interval) -> str:
    return f"{found.value:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"
