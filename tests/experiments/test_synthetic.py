"""The synthetic corpus: reproducible, split cleanly, and right in what it says."""

from __future__ import annotations

import ast
import random
import re
from statistics import mean

import pytest

from redraft_experiments import synthetic, synthetic_tables

COUNT = 150
FIRST_MATH = (
    "Solve this: Ella buys 2 coins for 4 dollars each and 7 apples for 5 dollars each at the "
    "school fair. How many dollars does Ella pay in total?"
)


def draw(domain: str, count: int = COUNT, split: str = "tune") -> list[synthetic.Sample]:
    return synthetic.samples(domain, count, seed=3, split=split)


def opening(sample: synthetic.Sample) -> str:
    return sample.messages[0]["content"]


def answer(sample: synthetic.Sample) -> str:
    return sample.messages[-1]["content"]


def whole(sample: synthetic.Sample) -> str:
    return "\n".join(message["content"] for message in sample.messages)


@pytest.mark.parametrize("domain", synthetic.DOMAINS)
def test_draws_repeat_and_grow(domain: str) -> None:
    assert draw(domain, 40) == draw(domain, 40)
    assert draw(domain, 80)[:40] == draw(domain, 40)
    texts = synthetic.passages(domain, 40, seed=3, split="base")
    assert synthetic.passages(domain, 60, seed=3, split="base")[:40] == texts


def test_a_draw_never_changes() -> None:
    assert opening(synthetic.samples("math", 1, seed=0, split="base")[0]) == FIRST_MATH


@pytest.mark.parametrize("domain", synthetic.DOMAINS)
def test_another_seed_gives_other_samples(domain: str) -> None:
    other = synthetic.samples(domain, 40, seed=4, split="tune")
    assert not {opening(s) for s in draw(domain, 40)} & {opening(s) for s in other}


@pytest.mark.parametrize("domain", synthetic.DOMAINS)
def test_questions_differ_within_and_across_splits(domain: str) -> None:
    drawn = [opening(s) for split in synthetic.SPLITS for s in draw(domain, 80, split)]
    assert len(set(drawn)) == 80 * len(synthetic.SPLITS)
    told = [
        t for split in synthetic.SPLITS for t in synthetic.passages(domain, 80, seed=3, split=split)
    ]
    assert len(set(told)) == 80 * len(synthetic.SPLITS)


@pytest.mark.parametrize("domain", synthetic.DOMAINS)
def test_chats_alternate_and_have_the_wanted_size(domain: str) -> None:
    drawn = draw(domain)
    for index, sample in enumerate(drawn):
        roles = [message["role"] for message in sample.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert len(roles) in ((2, 4, 6) if domain == "dialogue" else (2,))
        assert sample.id == f"{domain}/tune/3/{index}"
        assert 60 <= len(answer(sample)) <= 420
        assert len(opening(sample)) <= 330
        assert len(whole(sample)) <= 720
    assert 120 <= mean(len(answer(sample)) for sample in drawn) <= 260


@pytest.mark.parametrize("domain", synthetic.DOMAINS)
def test_text_is_filled_and_plain(domain: str) -> None:
    texts = [whole(sample) for sample in draw(domain)]
    texts += synthetic.passages(domain, COUNT, seed=3, split="tune")
    for text in texts:
        assert text.isascii()
        assert text == text.strip()
        if domain != "code":
            assert not re.search(r"[\[\]{}]|  |\.\.| [.,?!]", text), text


@pytest.mark.parametrize("domain", synthetic.DOMAINS)
def test_passages_are_no_chats(domain: str) -> None:
    lengths = [len(text) for text in synthetic.passages(domain, COUNT, seed=3, split="tune")]
    assert min(lengths) >= 100
    assert max(lengths) <= 800


def test_dialogues_have_short_and_long_forms() -> None:
    assert {len(sample.messages) for sample in draw("dialogue")} == {2, 4, 6}


def equations(text: str) -> list[tuple[int, str, int, int]]:
    found = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", text)
    return [(int(a), op, int(b), int(c)) for a, op, b, c in found]


def holds(a: int, op: str, b: int, c: int) -> bool:
    return {"+": a + b == c, "-": a - b == c, "*": a * b == c, "/": b * c == a}[op]


def test_math_is_right_and_ends_with_its_result() -> None:
    for sample in draw("math", 400):
        steps = equations(answer(sample))
        assert 2 <= len(steps) <= 4
        assert all(holds(*step) and max(step[0], step[2], step[3]) <= 200 for step in steps)
        assert answer(sample).splitlines()[-1] == f"#### {steps[-1][3]}"


def test_math_passages_are_right() -> None:
    for text in synthetic.passages("math", COUNT, seed=3, split="tune"):
        assert equations(text)
        assert all(holds(*step) for step in equations(text))
        assert "####" not in text


def test_every_math_plan_is_used_and_solvable() -> None:
    assert len(synthetic_tables.MATH_PLANS) >= 14
    for number, plan in enumerate(synthetic_tables.MATH_PLANS):
        for attempt in range(20):
            values, solved = synthetic._solve(random.Random(f"{number}/{attempt}"), plan)
            assert len(solved) == len(plan.steps)
            assert set(plan.ranges) < set(values)


def test_code_parses_and_runs() -> None:
    for sample in draw("code", 300):
        fenced = re.search(r"```python\n(.*?)\n```", answer(sample), re.DOTALL)
        assert fenced
        tree = ast.parse(fenced[1])
        function = tree.body[0]
        assert isinstance(function, ast.FunctionDef)
        assert ast.get_docstring(function)
        assert function.name in opening(sample)
        assert 3 <= len(fenced[1].splitlines()) <= 12
        exec(compile(tree, "sample", "exec"), {})


def test_every_code_plan_runs_its_example_call() -> None:
    for number, plan in enumerate(synthetic_tables.CODE_PLANS):
        rng = random.Random(f"plan {number}")
        slots = synthetic._code_slots(rng, plan)
        names: dict[str, object] = {}
        exec(synthetic._function(rng, plan, slots), names)
        assert eval(f"{slots['f']}({slots['call']})", names) is not None


def test_code_passages_parse() -> None:
    for text in synthetic.passages("code", COUNT, seed=3, split="tune"):
        functions = [n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef)]
        assert len(functions) == 2


def test_record_answers_quote_the_list() -> None:
    for sample in draw("records", 300):
        numbers = set(re.findall(r"\d+", opening(sample)))
        told = re.findall(r"\d+", answer(sample))
        quoted = [number in numbers for number in told]
        assert quoted.count(False) <= 1, whole(sample)


def test_texts_are_partly_but_not_fully_predictable() -> None:
    for domain in synthetic.DOMAINS:
        starts = [answer(sample)[:25] for sample in draw(domain)]
        assert len(set(starts)) > COUNT / 4


def test_word_lists_are_large_and_without_doubles() -> None:
    t = synthetic_tables
    lists = [t.PEOPLE, t.SURNAMES, t.CITIES, t.THINGS, t.PARTS, t.JOBS, t.CODE_WORDS, t.TITLES]
    assert all(len(set(words)) == len(words) for words in lists)
    assert sum(len(words) for words in lists[:-1]) > 250


def test_unknown_names_are_errors() -> None:
    with pytest.raises(ValueError, match=r"unknown domain 'poems'.*dialogue, records, code, math"):
        synthetic.samples("poems", 1, seed=0, split="base")
    with pytest.raises(ValueError, match=r"unknown domain 'poems'"):
        synthetic.passages("poems", 1, seed=0, split="base")
    with pytest.raises(ValueError, match=r"unknown split 'test'.*base, tune, adapt, heldout, eval"):
        synthetic.samples("math", 1, seed=0, split="test")
    with pytest.raises(ValueError, match=r"unknown split 'test'"):
        synthetic.passages("math", 0, seed=0, split="test")


def test_exhausted_templates_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "Always the same."
    monkeypatch.setitem(synthetic._PASSAGES, "math", lambda rng: text)
    split = synthetic.split_of(text, synthetic.SPLIT_SHARES)
    assert synthetic.passages("math", 1, seed=0, split=split) == [text]
    with pytest.raises(RuntimeError, match=r"after 1 of 2: .* exhausted, so ask for fewer"):
        synthetic.passages("math", 2, seed=0, split=split)


def test_splits_follow_their_shares() -> None:
    names = [synthetic.split_of(f"text {i}", {"a": 3, "b": 1}) for i in range(2000)]
    assert names.count("a") / 2000 == pytest.approx(0.75, abs=0.04)
