"""Every score against a slow reading of its definition, sample by sample and without batches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from redraft.config import SelectConfig
from redraft.core.errors import UserError
from redraft.core.records import Answer, Prompt
from redraft.metrics.replay import replay
from redraft.models.target import Target
from redraft.selection.scores import cosine_shift, flatness, mahalanobis_shift, rejection
from redraft.selection.scoring import LOOKS, NEEDS, Scorers, as_samples, check_scorers, score

K = 4


@pytest.fixture(scope="module")
def base(target: Target) -> Target:
    """The target before a fine-tune that moved its weights a little."""
    model = copy.deepcopy(target.model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return Target(model, target.tokenizer, ["base"])


@pytest.fixture(scope="module")
def models(target: Target, base: Target, trained_draft: Any) -> Scorers:
    return Scorers(target, base, trained_draft, K)


@pytest.fixture(scope="module")
def samples(answers: Sequence[Answer]) -> list[Answer]:
    """Of several lengths, one of them too short for some scores."""
    short = replace(answers[0], id="short", tokens=answers[0].tokens[:1], length=1)
    cut = [replace(a, length=min(a.length, 6 + i), tokens=a.tokens) for i, a in enumerate(answers)]
    return [*cut[:9], short]


def read(model: Target, sample: Answer) -> tuple[torch.Tensor, torch.Tensor]:
    """Last states [T, H] and logits [T, V] of one sample by itself."""
    ids = torch.tensor([[*sample.prompt, *sample.answer]])
    with torch.no_grad():
        out = model.model(input_ids=ids, output_hidden_states=True)
    return out.hidden_states[-1][0].double(), out.logits[0].double()


def by_hand(name: str, sample: Answer, models: Scorers, off: int = 0) -> Any:
    """The definitions, token by token; `off` shifts the positions, which has to be noticed."""
    target, base, draft = models.target, models.base, models.draft
    assert target is not None
    states, logits = read(target, sample)
    scored = range(max(len(sample.prompt), 4) - off, len(states) - off)
    if name == "flatness":
        rows = [logits[t - 1].softmax(-1).numpy() for t in scored]
        even = np.full(len(logits[0]), 1 / len(logits[0]))
        return np.mean([p @ even / np.linalg.norm(p) / np.linalg.norm(even) for p in rows])
    if name in ("shift", "mahalanobis"):
        assert base is not None
        others, _ = read(base, sample)
        pairs = [(states[t].numpy(), others[t].numpy()) for t in scored]
        if name == "mahalanobis":
            return np.mean([a - b for a, b in pairs], axis=0)
        return np.mean([1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs])
    assert draft is not None
    if name == "rejection":
        whole = replace(sample, tokens=sample.answer, length=sample.length - K + 1)
        if whole.length < 2:
            return 0.0
        (trace,) = replay(target, draft, [whole], K)
        return K + 1 - (1 + sum(trace.accepted) / len(trace.accepted))
    ids = torch.tensor([[*sample.prompt, *sample.answer]])
    with torch.no_grad():
        features = target.read(ids, draft.aux_layers).features_BTF
        (drafted,) = draft.rollout(ids, features, 0, 1)
    found = []
    for t in scored[1:]:
        q = draft.logits(drafted[0, t - 2]).double().log_softmax(-1)
        p = logits[t - 1] if draft.draft_vocab is None else logits[t - 1][draft.draft_vocab]
        p = p.log_softmax(-1)
        found.append(float((p.exp() * (p - q)).sum()))
    return np.mean(found) if found else 0.0


@pytest.mark.parametrize("name", [name for name in NEEDS if name != "random"])
def test_a_score_is_its_definition(name: str, samples: list[Answer], models: Scorers) -> None:
    config = SelectConfig(select=name)
    found = score(samples, config, models)
    expected = [by_hand(name, sample, models) for sample in samples]
    if name == "mahalanobis":
        seen = np.stack(LOOKS[name](samples, models))
        assert np.allclose(seen, np.stack(expected), atol=1e-5)
        assert np.allclose(found.values, mahalanobis_shift(np.stack(expected)), rtol=1e-3)
    else:
        assert found.values == pytest.approx(expected, abs=2e-6)
    assert found.tokens == sum(len(s.prompt) + s.length for s in samples)
    assert found.flops > 0
    if name not in ("rejection", "mahalanobis"):  # a definition one position off is another
        wrong = [by_hand(name, sample, models, off=1) for sample in samples]
        assert found.values != pytest.approx(wrong, abs=2e-6)


def test_batches_and_order_do_not_matter(samples: list[Answer], models: Scorers) -> None:
    for name in NEEDS:
        config = SelectConfig(select=name)
        whole = dict(
            zip([s.id for s in samples], score(samples, config, models).values, strict=True)
        )
        turned = score(samples[::-1], config, models).values
        assert turned == pytest.approx([whole[s.id] for s in samples[::-1]], rel=1e-4, abs=1e-6)


def test_distances_are_mahalanobis_distances() -> None:
    """Against the textbook, where shrinkage and PCA change nothing: many samples of full rank."""
    generator = np.random.default_rng(0)
    shifts = generator.normal(size=(4000, 3)) @ np.diag([1.0, 2.0, 3.0]) + np.array([5.0, 0, 0])
    covariance = np.cov(shifts.T)
    textbook = [float(np.sqrt(s @ np.linalg.inv(covariance) @ s)) for s in shifts]
    assert mahalanobis_shift(shifts) == pytest.approx(textbook, rel=0.02)
    centred = shifts - shifts.mean(0)
    from_mean = [float(np.sqrt(s @ np.linalg.inv(covariance) @ s)) for s in centred]
    assert mahalanobis_shift(shifts) != pytest.approx(from_mean, rel=0.1)
    assert mahalanobis_shift(shifts[:1]).tolist() == [0.0]
    assert mahalanobis_shift(np.ones((5, 3))).tolist() == [0.0] * 5


def test_ends_of_the_scales() -> None:
    states = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    assert cosine_shift(states, states) == pytest.approx(0, abs=1e-12)
    assert cosine_shift(states, -states) == pytest.approx(2)
    assert flatness(torch.zeros(3, 16)) == pytest.approx(1)
    assert flatness(torch.tensor([[100.0] + [0.0] * 15])) == pytest.approx(1 / 4)
    assert (rejection(8, 2, 4), rejection(0, 3, 4), rejection(0, 0, 4)) == (0, 4, 0)
    assert cosine_shift(states[:0], states[:0]) == flatness(torch.zeros(0, 4)) == 0


def test_prompts_are_scored_on_their_own_tokens(prompts: list[Prompt], models: Scorers) -> None:
    samples = as_samples(prompts[:3])
    assert [(*s.prompt, *s.answer) for s in samples] == [p.tokens for p in prompts[:3]]
    config = SelectConfig(select="shift", by="prompts")
    expected = [by_hand("shift", sample, models) for sample in samples]
    assert score(samples, config, models).values == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (
            SelectConfig(select="shift"),
            lambda m: replace(m, base=None),
            r"asks the model that the target was tuned from: name it with --base, or select by random "
            r"or flatness or draft_loss or rejection$",
        ),
        (
            SelectConfig(select="rejection"),
            lambda m: replace(m, draft=None),
            "asks the draft in use: name it with --draft, or select by random or flatness or shift",
        ),
        (
            SelectConfig(select="rejection", by="prompts"),
            lambda m: m,
            "a prompt has none; use draft_loss or flatness",
        ),
    ],
)
def test_what_a_score_lacks_is_said(
    config: SelectConfig, change: Callable[[Scorers], Scorers], message: str, models: Scorers
) -> None:
    with pytest.raises(UserError, match=message):
        check_scorers(config, change(models))


def test_a_base_of_another_shape_is_refused(models: Scorers, monkeypatch: Any) -> None:
    config = SelectConfig(select="mahalanobis")
    assert models.base is not None
    monkeypatch.setattr(models.base, "hidden_size", 7)
    with pytest.raises(
        UserError, match=r"has hidden size 7, the target 32; .* or select by draft_"
    ):
        check_scorers(config, models)
    monkeypatch.undo()
    monkeypatch.setattr(models.base, "tokenizer_hash", lambda: "other")
    with pytest.raises(UserError, match="another tokenizer than the target"):
        check_scorers(config, models)
