"""What a sample is worth, as pure functions of what models say of it. The largest scores are kept.

Each takes the positions that are scored, and nothing else: T positions, V vocabulary, H hidden size,
N samples. Where a score has no position to look at it is 0.
"""

from __future__ import annotations

import random

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

VARIANCE = 0.99
"""The share of the shifts' variance that is kept before distances are taken."""


def random_score(name: str, seed: int) -> float:
    """A uniform draw, keyed by the sample's id so that it does not depend on the order: the
    baseline that every other score has to beat."""
    return random.Random(f"{seed}/{name}").random()


def cosine_shift(target_TH: Tensor, base_TH: Tensor) -> float:
    """How far the fine-tune has turned the model's states: the mean over positions of
    1 - cos(target's state, base's state) on the same tokens. 0 where nothing moved, 2 at most.

    Source: the representation shift of EDA (arXiv 2603.09527), whose code was not released.
    """
    if not len(target_TH):
        return 0.0
    cosine_T = torch.cosine_similarity(target_TH.double(), base_TH.double(), dim=-1)
    return float((1 - cosine_T).mean())


def mean_shift(target_TH: Tensor, base_TH: Tensor) -> NDArray[np.float64]:
    """The mean difference of the target's and the base's states over the positions, [H]."""
    if not len(target_TH):
        return np.zeros(target_TH.shape[-1])
    shift: NDArray[np.float64] = (target_TH.double() - base_TH.double()).mean(0).cpu().numpy()
    return shift


def mahalanobis_shift(shifts_NH: NDArray[np.float64]) -> NDArray[np.float64]:
    """How unusual a sample's mean shift is as a step away from no shift, in units of the spread of
    all samples' shifts: their Mahalanobis distances from zero, [N].

    After PCA to 99 % of the variance, with the covariance shrunk as Ledoit and Wolf do. A pool of
    one sample, or one in which nothing differs, has no spread; its distances are 0.
    """
    from sklearn.covariance import LedoitWolf
    from sklearn.decomposition import PCA

    if len(shifts_NH) < 2 or not np.ptp(shifts_NH, axis=0).any():
        return np.zeros(len(shifts_NH))
    pca = PCA(VARIANCE, svd_solver="full").fit(shifts_NH)
    reduced, origin = pca.transform(shifts_NH), pca.transform(np.zeros_like(shifts_NH[:1]))
    precision = LedoitWolf().fit(reduced).precision_
    steps = reduced - origin
    distances: NDArray[np.float64] = np.sqrt(np.einsum("nd,de,ne->n", steps, precision, steps))
    return distances


def flatness(logits_TV: Tensor) -> float:
    """How flat the target's distributions are: the mean over positions of their cosine with the
    uniform distribution, 1 / (sqrt(V) |p|). 1 is uniform, 1 / sqrt(V) a certain token.

    Source: SFDD (arXiv 2601.18902), which keeps the flattest samples.
    """
    if not len(logits_TV):
        return 0.0
    p_TV = logits_TV.float().softmax(-1)
    return float((1 / (p_TV.norm(dim=-1) * logits_TV.shape[-1] ** 0.5)).mean())


def rejection(accepted: float, steps: float, k: int) -> float:
    """How much of a verification step the draft wastes: K + 1 - tau on the sample; 0 when it has no
    step or every step accepts all K tokens, K when nothing is accepted."""
    return k - accepted / steps if steps else 0.0
