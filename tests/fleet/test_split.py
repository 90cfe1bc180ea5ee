"""The budget of a fleet: everybody's floor, the rest by need, nothing that is not there."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from redraft.fleet.split import FLOOR, split_budget

SIZES = st.lists(st.tuples(st.floats(0, 1e3), st.integers(0, 400)), min_size=1, max_size=9)


@given(st.integers(0, 2000), SIZES)
def test_the_parts_are_the_budget(total: int, sizes: list[tuple[float, int]]) -> None:
    needs = {str(i): need for i, (need, _) in enumerate(sizes)}
    there = {str(i): count for i, (_, count) in enumerate(sizes)}
    found = split_budget(total, needs, there)
    asked = min(total, sum(there.values()))
    assert sum(found.values()) == asked
    for name, count in found.items():
        assert min(math.floor(FLOOR * asked / len(needs)), there[name]) <= count <= there[name]


def test_the_rest_follows_the_need() -> None:
    found = split_budget(480, {"a": 30.0, "b": 10.0, "c": 0.0}, dict.fromkeys("abc", 1000))
    assert FLOOR * 480 / 3 == 40
    assert found == {"a": 40 + 270, "b": 40 + 90, "c": 40}


def test_what_one_lacks_goes_to_the_others() -> None:
    assert split_budget(300, {"a": 90.0, "b": 1.0}, {"a": 100, "b": 500}) == {"a": 100, "b": 200}
    # no need left: in equal parts
    assert split_budget(90, {"a": 9.0, "b": 0.0, "c": 0.0}, {"a": 10, "b": 90, "c": 90}) == {
        "a": 10,
        "b": 40,
        "c": 40,
    }
