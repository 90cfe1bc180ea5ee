"""Chain attention against one start at a time, its gradients, its blocks and its memory."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from redraft.drafts import chain_attention as module
from redraft.drafts.chain_attention import chain_attention

B, N, G, S, C, STEPS = 2, 6, 2, 9, 4, 3


def one_start_at_a_time(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    own_k: list[Tensor],
    own_v: list[Tensor],
    first: int,
    window: int | None,
    mutant: str = "",
) -> Tensor:
    """Keys in the order of their positions, the last `window` of them, and a softmax over these."""
    rows = []
    for b in range(q.shape[0]):
        for n in range(q.shape[1]):
            g = n // (q.shape[1] // k.shape[1])
            for s in range(q.shape[2]):
                sees = first + s + 1 + (mutant == "future")
                own = [s if mutant != "neighbour" else min(s + 1, q.shape[2] - 1)] * len(own_k)
                keys = [
                    *k[b, g, :sees],
                    *(part[b, g, i] for part, i in zip(own_k, own, strict=True)),
                ]
                values = [
                    *v[b, g, :sees],
                    *(part[b, g, i] for part, i in zip(own_v, own, strict=True)),
                ]
                if window is not None:
                    keys, values = keys[-window:], values[-window:]
                scale = 1.0 if mutant == "unscaled" else math.sqrt(q.shape[-1])
                weights = (torch.stack(keys) @ q[b, n, s] / scale).softmax(-1)
                rows.append(weights @ torch.stack(values))
    return torch.stack(rows).view(q.shape)


def inputs(first: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = [(B, N, S, C), *[(B, G, first + S + 2, C)] * 2]
    shapes += [(B, G, S + STEPS - m, C) for m in range(STEPS)] * 2
    drawn = [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes]
    return [tensor.to(dtype).requires_grad_() for tensor in drawn]


def attend(tensors: list[Tensor], first: int, window: int | None) -> Tensor:
    q, k, v, *own = tensors
    return chain_attention(q, k, v, own[:STEPS], own[STEPS:], first, window)


@pytest.mark.parametrize("scores", [1 << 22, 40])
@pytest.mark.parametrize("first", [0, 4])
@pytest.mark.parametrize("window", [None, 2, 3, 6])
def test_each_start_attends_as_if_alone(
    scores: int, first: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SCORES", scores)
    tensors = inputs(first)
    q, k, v, *own = tensors
    expected = one_start_at_a_time(q, k, v, own[:STEPS], own[STEPS:], first, window)
    found = attend(tensors, first, window)
    assert torch.allclose(found, expected, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(attend(tensors, first, window), found)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).double()
    pairs = (
        torch.autograd.grad(out, tensors, grad, allow_unused=True, materialize_grads=True)
        for out in (found, expected)
    )
    for own_grad, plain in zip(*pairs, strict=True):
        assert torch.allclose(own_grad, plain, atol=1e-12)


@pytest.mark.parametrize("mutant", ["future", "neighbour", "unscaled"])
def test_wrong_versions_are_told_apart(mutant: str) -> None:
    tensors = inputs(4)
    q, k, v, *own = tensors
    wrong = one_start_at_a_time(q, k, v, own[:STEPS], own[STEPS:], 4, None, mutant)
    assert float((attend(tensors, 4, None) - wrong).abs().max()) > 1e-2


def test_in_bf16_and_under_autocast() -> None:
    exact = attend(inputs(4), 4, None)
    found = attend(inputs(4, torch.bfloat16), 4, None)
    assert found.dtype == torch.bfloat16
    assert float((found - exact).abs().max()) < 0.05
    with torch.autocast("cpu", torch.bfloat16):
        wide = attend(inputs(4, torch.float32), 4, None)
    assert float((wide - exact).abs().max()) < 1e-5


MEASURE = """
import json, sys, torch
from redraft.drafts.chain_attention import chain_attention
from redraft.training.memory import current_memory, peak_memory, restart_peak
T, train = int(sys.argv[1]), sys.argv[2] == "train"
torch.set_num_threads(1)
cpu = torch.device("cpu")
def run(T):
    q, k, v, *own = (torch.randn(1, n, T, 16, requires_grad=train) for n in (32, *[8] * 4))
    restart_peak(cpu)
    resident = current_memory(cpu)
    out = chain_attention(q, k, v, own[:1], own[1:], 0)
    if train:
        out.sum().backward()
    return peak_memory(cpu) - resident
run(64)
print(json.dumps(run(T)))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("mode", ["train", "replay"])
def test_memory_is_far_below_one_matrix_of_scores(mode: str) -> None:
    length = 3000
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(length), mode],
        capture_output=True,
        text=True,
        check=True,
    )
    scores = 32 * length * length * 4 / 1e6  # MB in float32, for all heads
    assert float(json.loads(done.stdout)) < scores / 4
