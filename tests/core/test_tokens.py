"""Compact token ids behave as the tuples they replace, and records with them are the lines of before."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redraft.core.records import Answer, Prompt, to_json
from redraft.core.tokens import Tokens, plain

IDS = st.lists(st.integers(0, (1 << 31) - 1), max_size=20)


@given(IDS, IDS, st.slices(20))
def test_they_are_the_tuple_of_their_ids(ids: list[int], others: list[int], part: slice) -> None:
    tokens, same = Tokens(ids), tuple(ids)
    assert tokens == same
    assert same == tokens
    assert tokens == ids == tokens
    assert hash(tokens) == hash(same)
    assert {same: 1}[tokens] == 1  # type: ignore[index]
    assert (tokens == Tokens(others)) == (ids == others) == (tokens == others)
    assert (*tokens, *tokens) == same + same
    assert tokens + others == same + tuple(others)
    assert tokens[part] == same[part]
    assert isinstance(tokens[part], Tokens)
    assert [tokens[i] for i in range(len(tokens))] == list(tokens) == ids
    assert list(reversed(tokens)) == ids[::-1]
    assert bool(tokens) == bool(ids)
    for other in (Tokens(tokens), copy.deepcopy(tokens), pickle.loads(pickle.dumps(tokens))):
        assert other == tokens
    assert json.dumps(tokens, default=plain) == json.dumps(ids)


def test_they_cannot_be_changed_and_are_what_they_were_given() -> None:
    given = [1, 2, 3]
    tokens = Tokens(given)
    given.append(4)
    assert tokens == (1, 2, 3)
    assert tokens != (1, 2)
    assert tokens != "123"
    assert repr(tokens) == "Tokens([1, 2, 3])"
    with pytest.raises(TypeError):
        tokens[0] = 5  # type: ignore[index]
    with pytest.raises(AttributeError):
        tokens.other = 5  # type: ignore[attr-defined]
    for wrong, error in (([1.5], TypeError), (["a"], TypeError), ([1 << 31], OverflowError)):
        with pytest.raises(error):
            Tokens(wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="set is not JSON serializable"):
        json.dumps({1}, default=plain)


# -- records -------------------------------------------------------------------------------------


ANSWERS = st.builds(
    Answer,
    id=st.text(max_size=5),
    prompt=IDS,
    tokens=IDS,
    length=st.integers(0, 20),
    finish=st.sampled_from(["stop", "length"]),
    temperature=st.floats(0, 2),
    top_k=st.integers(0, 9),
    seed=st.none() | st.integers(0, 1 << 62),
)


def line_of_before(answer: Answer) -> str:
    """An answer's line as it was written when tokens were tuples."""
    values = {each.name: getattr(answer, each.name) for each in dataclasses.fields(answer)}
    row = {**values, "prompt": tuple(answer.prompt), "tokens": tuple(answer.tokens)}
    return json.dumps(json.loads(json.dumps(row)), separators=(",", ":"))


@given(ANSWERS)
def test_an_answers_line_is_that_of_before_and_reads_back(answer: Answer) -> None:
    line = answer.to_line()
    assert line == line_of_before(answer)
    again = Answer.from_line(line)
    assert again == answer
    assert hash(again) == hash(answer)
    assert json.loads(line) == to_json(answer)
    assert pickle.loads(pickle.dumps(answer)) == copy.deepcopy(answer) == answer
    assert answer.answer == answer.tokens[: answer.length]
    assert answer.whole == (*answer.prompt, *answer.answer)


def test_a_line_is_these_bytes() -> None:
    assert Answer("é", (1, 2), (3,), 1, "stop", 0.5, seed=7).to_line() == (
        '{"id":"\\u00e9","prompt":[1,2],"tokens":[3],"length":1,"finish":"stop","temperature":0.5,'
        '"top_k":0,"top_p":1.0,"min_p":0.0,"seed":7}'
    )


@pytest.mark.parametrize("reference", [None, (), (4, 5)])
def test_a_prompts_row_is_that_of_before_and_reads_back(reference: Any) -> None:
    said = ({"role": "user", "content": "ü"},)
    prompt = Prompt("a", (1, 2), reference, said, ((None, {"role": "user"}),), ({"name": "f"},))
    of_before = ["a", (1, 2), reference, said, ((None, {"role": "user"}),), ({"name": "f"},)]
    assert json.dumps(prompt.to_row()) == json.dumps(of_before)
    assert Prompt.from_row(json.loads(json.dumps(prompt.to_row()))) == prompt
    assert to_json(prompt)["tokens"] == [1, 2]
    changed = dataclasses.replace(prompt, tokens=(9,))
    assert (changed.tokens, changed.reference) == ((9,), reference)
