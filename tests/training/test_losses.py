"""The loss against NumPy in nats, its gradient by finite differences, and wrong versions caught."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from redraft.training.losses import Teacher, forward_kl


def by_hand(teacher: np.ndarray, student: np.ndarray) -> float:
    p = np.exp(teacher) / np.exp(teacher).sum(-1, keepdims=True)
    q = np.exp(student) / np.exp(student).sum(-1, keepdims=True)
    return float((p * np.log(p / q)).sum())


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in "pq")  # type: ignore[return-value]


def test_value(logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    p, q = logits
    got = float(forward_kl(Teacher.from_logits(p), q))
    assert got == pytest.approx(by_hand(p.numpy(), q.numpy()), abs=1e-12)
    # The reverse direction and a mean are other losses; the test can tell them apart.
    assert got != pytest.approx(by_hand(q.numpy(), p.numpy()), abs=1e-3)
    assert got != pytest.approx(by_hand(p.numpy(), q.numpy()) / 5, abs=1e-3)


def test_of_itself_it_is_zero(logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert float(forward_kl(Teacher.from_logits(logits[0]), logits[0])) == pytest.approx(
        0, abs=1e-12
    )


def test_gradient(logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    p, q = logits
    teacher = Teacher.from_logits(p)
    assert torch.autograd.gradcheck(lambda x: forward_kl(teacher, x), q.requires_grad_())


def test_a_point_mass_has_no_entropy() -> None:
    sharp = torch.tensor([[0.0, 1e9, 0.0]])
    teacher = Teacher.from_logits(sharp)
    assert float(teacher.entropy_N) == 0.0
    assert float(forward_kl(teacher, torch.zeros(1, 3))) == pytest.approx(np.log(3), rel=1e-6)


def test_last_is_the_suffix(logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    p, q = logits
    whole = Teacher.from_logits(p)
    assert float(forward_kl(whole.last(2), q[3:])) == pytest.approx(
        by_hand(p[3:].numpy(), q[3:].numpy())
    )
