"""How many prompts each member of a fleet is trained on: by need, with a floor."""

from __future__ import annotations

from collections.abc import Mapping

FLOOR = 0.25
"""Of an equal part: what every member gets, so that none is forgotten."""


def split_budget(
    total: int, needs: Mapping[str, float], available: Mapping[str, int]
) -> dict[str, int]:
    """`total` prompts over members: the floor for each, the rest in proportion to `needs` (0 or more, in any unit).

    None gets more than it has; what it leaves goes to the others in the same proportion, and where no need is left, in
    equal parts. The counts add up to `total`, or to all there are.
    """
    total, most = min(total, sum(available.values())), max(needs.values())
    needs = {name: need / most if need > 1e-9 * most else 0.0 for name, need in needs.items()}
    given = {name: min(FLOOR * total / len(needs), float(available[name])) for name in needs}
    while (left := total - sum(given.values())) > 1e-9:
        free = [name for name in needs if given[name] < available[name] - 1e-9]
        wanted = {name: needs[name] for name in free if needs[name] > 0}
        wanted = wanted or dict.fromkeys(free, 1.0)
        part = left / sum(wanted.values())
        for name, need in wanted.items():
            given[name] = min(given[name] + part * need, float(available[name]))
    return _whole(given, total)


def _whole(given: Mapping[str, float], total: int) -> dict[str, int]:
    """Whole numbers with the same sum: those with the largest remainders are rounded up."""
    whole = {name: int(number + 1e-9) for name, number in given.items()}
    order = sorted(given, key=lambda name: whole[name] - given[name])
    for name in order[: total - sum(whole.values())]:
        whole[name] += 1
    return whole
