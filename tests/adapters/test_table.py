"""The grammar of adapters: what combines, what contradicts itself, and what each name owns."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redraft.adapters.kind import AdapterKind, AddedTensors, adapter_of, kinds_of, load
from redraft.adapters.table import (
    ADAPTERS,
    TABLE,
    VOCABULARY,
    AdapterRow,
    Method,
    read_method,
)
from redraft.config import TrainConfig
from tests.adapters.neuron import Neuron
from tests.adapters.toy import NEURON

ORDER = (
    "weight-sync",
    "feature-map",
    "expert",
    "lora",
    "head-lora",
    "fc",
    "norms",
    "attention",
    "ffn",
    "head",
    "body",
    "full",
    "scratch",
)


def contradicts(parts: set[str]) -> bool:
    """The rules, said again: pairs that exclude each other."""
    excluded = [{"expert", "ffn"}, {"full", "scratch"}, {"head", "head-lora"}]
    beside = ("lora", "head-lora", "fc", "norms", "attention", "ffn", "head")
    for whole in ("full", "scratch"):
        excluded += [{whole, part} for part in beside]
    excluded += [
        {"body", part} for part in (*beside, "expert", "full", "scratch") if part != "head-lora"
    ]
    excluded += [{"scratch", start} for start in ("feature-map", "weight-sync")]
    return any(pair <= parts for pair in excluded)


def test_these_are_the_adapters() -> None:
    assert tuple(ADAPTERS) == ORDER


def test_every_pair_is_taken_exactly_when_it_does_not_contradict_itself() -> None:
    taken = 0
    for pair in itertools.permutations(ORDER, 2):
        if contradicts(set(pair)):
            with pytest.raises(ValueError, match="contradicts itself"):
                read_method("+".join(pair))
        else:
            taken += 1
            assert set(read_method("+".join(pair)).adapters) == set(pair)
    assert taken == 156 - 2 * (1 + 1 + 1 + 14 + 2 + 9)


@given(st.lists(st.sampled_from(ORDER), min_size=1, unique=True))
def test_the_order_of_parts_does_not_matter(parts: list[str]) -> None:
    text = " + ".join(parts)
    if contradicts(set(parts)):
        with pytest.raises(ValueError, match="contradicts itself"):
            read_method(text)
        return
    method = read_method(text)
    assert method == read_method("+".join(sorted(parts)))
    assert method.adapters == tuple(part for part in ORDER if part in parts)
    assert method.name == "+".join(method.adapters)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "expret",
            r"names the adapter 'expret'; did you mean 'expert'\? known: attention, .*",
        ),
        ("expert+atention", r"'atention'; did you mean 'attention'\?"),
        ("magic", r"names the adapter 'magic'; known: attention, body, expert, fc, .*joined by \+"),
        ("expert,fc", r"names the adapter 'expert,fc'.*adapters are joined by \+"),
        ("", "names the adapter ''"),
        ("expert+", "names the adapter ''"),
        ("Expert", "names the adapter 'Expert'; did you mean 'expert'"),
        ("fc+fc", r"names an adapter twice: 'fc\+fc'"),
        ("full+fc", r"'full\+fc' contradicts itself: full trains every tensor already"),
        ("full+scratch", "contradicts itself: full trains every tensor already"),
        ("lora+scratch", "contradicts itself: scratch trains every tensor already"),
        (
            "scratch+feature-map",
            "contradicts itself: scratch trains every tensor already, from nothing",
        ),
        (
            "weight-sync+scratch",
            "contradicts itself: scratch trains every tensor already, from nothing",
        ),
        ("expert+ffn", "contradicts itself: an expert leaves the shared FFN frozen, ffn trains it"),
    ],
)
def test_mistakes_are_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_method(text)


OWNED = {
    "midlayer.mlp.private.gate_proj.weight": {"expert"},
    "midlayer.mlp.gate_proj.lora_A.weight": {"lora"},
    "fc.lora_B.weight": {"lora"},
    "lm_head.lora_B.weight": {"head-lora"},
    "fc.weight": {"fc", "body", "full", "scratch"},
    "fc.bias": {"fc", "body", "full", "scratch"},
    "input_norm.weight": {"fc", "norms", "body", "full", "scratch"},
    "fc_norm.2.weight": {"fc", "body", "full", "scratch"},
    "norm.weight": {"norms", "body", "full", "scratch"},
    "midlayer.hidden_norm.weight": {"norms", "body", "full", "scratch"},
    "model.layers.1.input_layernorm.weight": {"norms", "body", "full", "scratch"},
    "midlayer.self_attn.q_norm.weight": {"norms", "attention", "body", "full", "scratch"},
    "model.layers.1.self_attn.k_proj.bias": {"attention", "body", "full", "scratch"},
    "layers.0.mlp.down_proj.weight": {"ffn", "body", "full", "scratch"},
    "lm_head.weight": {"head", "full", "scratch"},
    "embed_tokens.weight": {"full", "scratch"},
}


def trained(method: Method) -> set[str]:
    return {name for name in OWNED if adapter_of(name, kinds_of(method)) is not None}


@pytest.mark.parametrize("part", ORDER)
def test_an_adapter_owns_its_tensors_and_no_others(part: str) -> None:
    method = read_method(part)
    assert trained(method) == {n for n, by in OWNED.items() if part in by}


def test_a_combination_owns_what_its_parts_own() -> None:
    for parts in (("expert", "fc", "norms"), ("lora", "head"), ("feature-map", "attention")):
        method = read_method("+".join(parts))
        assert trained(method) == {n for n, by in OWNED.items() if by & set(parts)}
    # A pair next to a tensor is not that tensor, and an expert's neurons are not the shared FFN.
    assert adapter_of("fc.lora_A.weight", kinds_of(read_method("full"))) is None
    assert adapter_of("midlayer.mlp.private.up_proj.weight", kinds_of(read_method("ffn"))) is None


@pytest.mark.parametrize(
    ("text", "starts", "fresh"),
    [
        ("feature-map", ("feature-map",), False),
        ("weight-sync+feature-map", ("weight-sync", "feature-map"), False),
        ("feature-map+fc", ("feature-map",), False),
        ("expert+weight-sync", ("weight-sync",), False),
        ("lora", (), False),
        ("full+feature-map", ("feature-map",), False),
        ("scratch+expert", (), True),
    ],
)
def test_starts_are_told_from_what_is_trained(
    text: str, starts: tuple[str, ...], fresh: bool
) -> None:
    method = read_method(text)
    assert (method.closed_form, method.fresh) == (starts, fresh)
    assert method.reads("width") == ("expert" in text)
    assert method.reads("rank") == ("lora" in text)


# -- from rows to code ----------------------------------------------------------------------------


@pytest.mark.parametrize("row", [*TABLE, VOCABULARY], ids=lambda row: row.name)
def test_every_row_loads(row: AdapterRow) -> None:
    kind = load(row)
    assert kind.name == row.name
    assert row.closed_form == (type(kind).fit is not AdapterKind.fit)
    assert bool(row.because) == bool(row.excludes or row.only_with is not None)
    known = {setting.name for setting in dataclasses.fields(TrainConfig)}
    assert set(row.settings) <= known
    assert {*row.excludes, *(row.only_with or ())} <= set(ADAPTERS)


class Unfinished(Neuron):
    merge = AddedTensors.merge


@pytest.mark.parametrize(
    ("code", "missing"),
    [
        (f"{__name__}:Unfinished", "merge"),
        (f"{__name__}:Absent", "Absent"),
        ("nowhere:Neuron", "nowhere"),
    ],
)
def test_a_row_with_a_missing_part_fails_with_its_name(code: str, missing: str) -> None:
    with pytest.raises(TypeError, match=rf"^adapter 'toy' \({code}\): .*{missing}"):
        load(AdapterRow("toy", "a toy", code))


def test_a_closed_form_row_without_fit_fails_with_its_name() -> None:
    with pytest.raises(TypeError, match="^adapter 'toy' .* has no fit"):
        load(AdapterRow("toy", "a toy", closed_form=True))


def test_the_page_builds_the_toy_adapter() -> None:
    """docs/add-an-adapter.md shows its file, its row, and every part that can be written."""
    here = Path(__file__).parent
    page = (here.parents[1] / "docs" / "add-an-adapter.md").read_text()
    blocks = page.split("```python\n")[1:]
    in_place, row, file = (block.split("\n```")[0] for block in blocks)
    assert file + "\n" == (here / "neuron.py").read_text()
    names = {"AdapterRow": AdapterRow}
    shown = eval(row, names)
    assert dataclasses.replace(shown, code=NEURON.code) == NEURON
    assert shown.code == NEURON.code.removeprefix("tests.adapters.")
    assert load(eval(in_place, names)).trains("midlayer.post_attention_layernorm.weight")
    parts = {n for n, value in vars(AdapterKind).items() if callable(value) and n[0] != "_"}
    assert {part for part in parts if f"`{part}`" not in page} == {"written", "card"}
