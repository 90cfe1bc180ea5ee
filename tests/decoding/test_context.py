"""Targets whose rotary frequencies depend on how long a sequence is: exact up to there, refused after."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from redraft.core.errors import UserError
from redraft.core.records import Answer, Prompt
from redraft.decoding.batched import generate_answers
from redraft.decoding.plain import decode_plain
from redraft.decoding.sampling import Sampling
from redraft.decoding.speculative import decode_speculative
from redraft.drafts.eagle3.network import Eagle3Draft
from redraft.models.batching import collate
from redraft.models.target import Target
from redraft.training.teacher_batch import read_teacher_batch
from tests.conftest import tiny_model

SWITCH = 24
ROPES: dict[str, dict[str, Any]] = {
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0] * 8,
        "long_factor": [1.0 + i for i in range(8)],
        "original_max_position_embeddings": SWITCH,
    },
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
}
CONTEXTS = {"longrope": 256, "dynamic": SWITCH}
PROMPTS = [list(range(5, 5 + n)) for n in (5, 8, 15, 20)]


def switching(kind: str) -> Target:
    rope = {"rope_theta": 10000.0, **ROPES[kind]}
    family = "phi3" if kind == "longrope" else "llama"
    more = {"original_max_position_embeddings": SWITCH} if family == "phi3" else {}
    model = tiny_model(
        family,
        torch.float64,
        max_position_embeddings=CONTEXTS[kind],
        rope_parameters=rope,
        **more,
    )
    return Target(model, None, (kind,))


@pytest.mark.parametrize("kind", ROPES)
def test_every_way_to_decode_is_exact_up_to_the_switch(kind: str) -> None:
    target = switching(kind)
    assert target.max_positions == SWITCH
    draft = Eagle3Draft.for_target(target)
    draft.reinitialise(0)
    draft = draft.double().eval().requires_grad_(False)
    draft.bind(target)
    plain = [decode_plain(target, prompt, 40) for prompt in PROMPTS]
    ends = [len(p) + len(a) for p, a in zip(PROMPTS, plain, strict=True)]
    assert max(ends) == SWITCH
    assert ends.count(SWITCH) >= 3  # one may stop before
    for k in (1, 3, 6):
        found = decode_speculative(target, draft, PROMPTS, k, 40)
        assert [d.tokens for d in found] == plain
    asked = [Prompt(str(i), tuple(prompt)) for i, prompt in enumerate(PROMPTS)]
    (batch,) = generate_answers(
        *(target, asked, [range(4)]),
        sampling=Sampling(),
        max_new_tokens=40,
        lookahead=0,
        seed=0,
    )
    assert [list(answer.answer) for answer in batch] == plain
    for prompt, answer in zip(PROMPTS, plain, strict=True):  # also as one uncached pass
        logits = target.read(torch.tensor([[*prompt, *answer]]), ()).logits_BTV[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer


def test_past_the_switch_it_would_not_be() -> None:
    """Without the limit a cached pass and an uncached one are different functions."""
    target = switching("longrope")
    target.max_positions = 256
    prompt = PROMPTS[-1]
    answer = decode_plain(target, prompt, 12)
    logits = target.read(torch.tensor([[*prompt, *answer]]), ()).logits_BTV[0]
    assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() != answer


@pytest.mark.parametrize("kind", ROPES)
def test_what_is_longer_is_refused_in_a_sentence(kind: str) -> None:
    target = switching(kind)
    long = list(range(5, 35))
    why = "its longrope rotary frequencies change past that" if kind == "longrope" else "24"
    with pytest.raises(UserError, match=why):
        decode_plain(target, long, 4)
    with pytest.raises(UserError, match=why):
        plan = [[0]]
        asked = [Prompt("a", tuple(long))]
        list(
            generate_answers(
                *(target, asked, plan),
                sampling=Sampling(),
                max_new_tokens=4,
                lookahead=0,
                seed=0,
            )
        )
    answer = Answer("a", tuple(PROMPTS[2]), tuple(range(20)), 20, "length")
    with pytest.raises(UserError, match=r"a row of 35 tokens is longer than the context.*24"):
        read_teacher_batch(target, collate([answer], target.device), (2, 4, 5))
