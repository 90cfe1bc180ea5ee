"""What a draft's files could mean instead: the mistakes that load everywhere and cost acceptance.

Each is the same draft read another way. If one of them accepts clearly more than the draft as it is
written, then that is the mistake (see `metrics/config_diagnosis.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from ..drafts.eagle import EagleConfig
from ..drafts.eagle3 import Eagle3Config
from ..models.target import Target, default_taps
from .load import StoredDraft


@dataclass(frozen=True)
class Misreading:
    """Another reading of a stored draft, and what is wrong with the files if it is the right one."""

    cause: str
    draft: StoredDraft


def misreadings(stored: StoredDraft, target: Target) -> Iterator[Misreading]:
    """Every other reading of `stored` that its tensors allow."""
    stored = stored.fitted(target)
    c = stored.config
    if isinstance(c, EagleConfig) and c.fc_bias:
        tensors = {n: t for n, t in stored.tensors.items() if n != "fc.bias"}
        config = dataclasses.replace(c, fc_bias=False)
        other = dataclasses.replace(stored, config=config, tensors=tensors)
        yield Misreading("fc.bias should not be there", other)
    if not isinstance(c, Eagle3Config):
        return
    taps = c.taps or default_taps(target.num_layers)
    readings = {tuple(tap + by for tap in taps): by for by in (1, -1)}
    if c.taps is not None and target.num_layers >= 7 and len(c.taps) == 3:
        readings.setdefault(default_taps(target.num_layers), 0)
    for other_taps, by in readings.items():
        if other_taps[0] < 0 or other_taps[-1] >= target.num_layers or other_taps == taps:
            continue
        why = (
            "written in the other numbering (hs[k] here, the output of layer k there)"
            if by
            else "the draft was trained on the default layers"
        )
        yield Misreading(
            f"the taps are wrong: config.json says hs{list(taps)}, but hs{list(other_taps)} accepts "
            f"more; {why}",
            dataclasses.replace(stored, config=dataclasses.replace(c, taps=other_taps)),
        )
    flipped = not c.norm_before_residual
    yield Misreading(
        f"norm_before_residual should be {str(flipped).lower()}",
        dataclasses.replace(stored, config=dataclasses.replace(c, norm_before_residual=flipped)),
    )
