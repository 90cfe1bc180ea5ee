"""What differs between the versions of Transformers that redraft works with; asked for here and nowhere else."""

from __future__ import annotations

import transformers

READS_ON = (5, 16)
"""The first that reads several tokens on from a recurrent state exactly. Before it logits differ by 0.1 to 5 % (LFM2,
Qwen3.5), less than rounding does in half precision, so that trying does not show it."""
NAMES_STATES = (5, 23)
"""The first that takes a list of hs[] indices and keeps those states alone. Since 5.17 a list names layers, one off."""


def at_least(version: tuple[int, int]) -> bool:
    """Whether the installed Transformers is this version or a later one."""
    return tuple(map(int, transformers.__version__.split(".")[:2])) >= version
