"""Kinds of members: their records and stage keys, and weights that are exactly what they should be."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from redraft.core.errors import UserError
from redraft.models.loading import load_target
from redraft_experiments.kinds.preferred import Dpo, brief_pairs, prefer
from redraft_experiments.kinds.weights import make_merged, make_rounded, mean_of, rounded
from redraft_experiments.members import (
    DEFAULT,
    MEMBERS,
    Merged,
    Rounded,
    chosen_members,
)
from redraft_experiments.suite import stage_inputs
from redraft_experiments.synthetic_harm import HARMFUL, HARMLESS, harm_pairs
from tests.conftest import FAMILIES, make_tokenizer, save_target

PLAIN = {"domain": "math", "lora_rank": None, "plain_text": False, "replay": 0}
MADE_ALREADY = {
    "lora4": {"says": "LoRA of rank 4, kept as a PEFT adapter", "rate": 1.0, "lora_rank": 4},
    "sft-tenth": {"says": "SFT at a tenth of the learning rate", "rate": 0.1},
    "sft": {"says": "full SFT", "rate": 1.0},
    "pretrained": {
        "says": "continued pre-training on running text",
        "rate": 1.0,
        "plain_text": True,
    },
    "sft-medical": {
        "says": "full SFT on patients' records or questions",
        "rate": 1.0,
        "domain": "medical",
    },
    "sft-code": {"says": "full SFT on code", "rate": 1.0, "domain": "code"},
    "replay": {
        "says": "SFT at 0.3 of the rate, next to the base's own answers",
        "rate": 0.3,
        "replay": 500,
    },
    "replay-medical": {
        "says": "the same on patients' records or questions",
        "rate": 0.3,
        "domain": "medical",
        "replay": 500,
    },
}
"""What the stages of suites built earlier depend on: another text here would build them again."""


def test_families_built_earlier_are_kept() -> None:
    assert tuple(MADE_ALREADY) == DEFAULT
    for name, row in MADE_ALREADY.items():
        wanted = {"base": "b", **PLAIN, **row}
        assert stage_inputs(MEMBERS[name], "b", {}, "h") == wanted


def test_a_member_depends_on_what_it_is_made_from() -> None:
    inputs = stage_inputs(MEMBERS["dpo-refuse"], "b", {"sft-harm": "s", "sft": "t"}, "h")
    assert (inputs["made_from"], inputs["harm"]) == ({"sft-harm": "s"}, "h")


def test_what_a_member_is_made_from_comes_before_it() -> None:
    assert chosen_members(["merge-mixed"]) == ("sft", "sft-medical", "merge-mixed")
    assert chosen_members(None) == DEFAULT
    assert chosen_members(["all"]) == tuple(MEMBERS)
    assert len({row.kind for row in MEMBERS.values()}) >= 9
    order = list(MEMBERS)
    for name, row in MEMBERS.items():
        assert all(order.index(part) < order.index(name) for part in row.needs)
    with pytest.raises(UserError, match="unknown member 'zo'; did you mean 'zoo'"):
        chosen_members(["zo"])


# -- weights ---------------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A folder with two members' random weights."""
    config = FAMILIES["llama"](len(make_tokenizer()))
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    save_target(tmp_path / "base", config, seed=0)
    save_target(tmp_path / "members" / "sft", config, seed=1)
    return tmp_path


def weights(folder: Path) -> dict[str, np.ndarray]:
    state = load_target(str(folder)).model.state_dict()
    return {name: tensor.double().numpy() for name, tensor in state.items()}


def test_merged_weights_are_the_mean(two: Path) -> None:
    make_merged(two, "half", Merged("", ("base", "sft"), (0.25, 0.75)))
    first, second, found = (weights(two / p) for p in ("base", "members/sft", "members/half"))

    def worst(shares: tuple[float, float]) -> float:
        return max(
            float(np.abs(found[n] - shares[0] * first[n] - shares[1] * second[n]).max())
            for n in found
        )

    assert worst((0.25, 0.75)) < 1e-6
    assert worst((0.75, 0.25)) > 0.1  # the wrong way round
    assert worst((0.26, 0.74)) > 1e-3


def test_a_mean_keeps_the_dtype() -> None:
    one, other = (torch.full((2,), v, dtype=torch.bfloat16) for v in (1.0, 2.0))
    found = mean_of([{"w": one}, {"w": other}], (0.5, 0.5))["w"]
    assert found.dtype == torch.bfloat16
    assert found.tolist() == [1.5, 1.5]


@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 16)])
def test_rounded_weights_are_within_half_a_step(two: Path, bits: int, group: int | None) -> None:
    make_rounded(two, "int", Rounded("", "sft", bits, group))
    exact, found = weights(two / "members/sft"), weights(two / "members/int")
    linear = [n for n in exact if n.endswith("proj.weight")]
    assert len(linear) == 7 * 8
    for name in exact:
        if name not in linear:
            assert np.array_equal(exact[name], found[name]), name
    ratios = []
    for name in linear:
        parts = exact[name].reshape(len(exact[name]), -1, group or exact[name].shape[1])
        step = np.abs(parts).max(-1, keepdims=True) / (2 ** (bits - 1) - 1)
        near = found[name].reshape(parts.shape)
        ratios.append(float((np.abs(near - parts) / step).max()))
        whole = near / step
        assert np.abs(whole - whole.round()).max() < 1e-3
    assert 0.45 < max(ratios) <= 0.5 + 1e-3


def test_truncating_instead_of_rounding_would_be_seen() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    step = weight.abs().amax(1, keepdim=True) / 127
    wrong = (weight / step).trunc() * step
    assert ((wrong - weight).abs() / step).max() > 0.9
    assert ((rounded(weight, 8) - weight).abs() / step).max() <= 0.5 + 1e-4
    of_the_whole = (weight / step.max()).round() * step.max()  # one step for all channels
    assert ((of_the_whole - weight).abs() / step).max() > 0.6
    assert torch.equal(rounded(torch.zeros(2, 4), 8), torch.zeros(2, 4))


# -- preferences -----------------------------------------------------------------------------------


def test_requests_to_refuse_and_their_look_alikes() -> None:
    pairs = harm_pairs(300, seed=0, split="tune")
    assert pairs[:50] == harm_pairs(50, seed=0, split="tune")
    assert 0.4 < sum(p.harmful for p in pairs) / len(pairs) < 0.6
    for pair in pairs:
        assert "sorry" in pair.refusal.split(".")[0].lower()
        assert "sorry" not in pair.compliance.split(".")[0].lower()
        assert pair.better == (pair.refusal if pair.harmful else pair.compliance)
        assert "{" not in pair.asked[0]["content"] + pair.better + pair.worse
    asked = {
        split: {p.asked[0]["content"] for p in harm_pairs(200, seed=0, split=split)}
        for split in ("tune", "adapt", "heldout", "eval")
    }
    assert len(set.union(*asked.values())) == 800
    # Look-alikes share their verb, so that no verb alone tells what is harmful.
    verbs = [{deed.wish.split()[0] for deed in deeds} for deeds in (HARMFUL, HARMLESS)]
    assert verbs[0] == verbs[1]


def test_the_shortest_of_the_answers_is_preferred(two: Path) -> None:
    asked = [({"role": "user", "content": f"Say {i}."},) for i in range(6)]
    tokenizer = make_tokenizer()
    pairs = brief_pairs(two / "base", asked, 120, seed=0)
    assert pairs
    for _, better, worse in pairs:
        assert len(tokenizer(better)["input_ids"]) <= len(tokenizer(worse)["input_ids"])
    assert pairs == brief_pairs(two / "base", asked, 120, seed=0)


def test_a_missing_trl_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(UserError, match=r"dpo-x is tuned with TRL.*pip install 'redraft\[bench\]'"):
        prefer(None, None, [], Dpo(0.1, 1e-3, 1, 64), "dpo-x")
