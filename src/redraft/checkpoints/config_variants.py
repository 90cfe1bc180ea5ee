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
from ..models.target import Target, default_aux_layers
from .load import StoredDraft


@dataclass(frozen=True)
class Misreading:
    """Another reading of a stored draft, and what is wrong with the files if it is the right one."""

    cause: str
    draft: StoredDraft


def config_variants(stored: StoredDraft, target: Target) -> Iterator[Misreading]:
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
    aux_layers = c.aux_layers or default_aux_layers(target.num_layers)
    readings = {tuple(aux_layer + by for aux_layer in aux_layers): by for by in (1, -1)}
    if c.aux_layers is not None and target.num_layers >= 7 and len(c.aux_layers) == 3:
        readings.setdefault(default_aux_layers(target.num_layers), 0)
    for other_aux_layers, by in readings.items():
        if (
            other_aux_layers[0] < 0
            or other_aux_layers[-1] >= target.num_layers
            or other_aux_layers == aux_layers
        ):
            continue
        why = (
            "written in the other numbering (hs[k] here, the output of layer k there)"
            if by
            else "the draft was trained on the default layers"
        )
        yield Misreading(
            f"the aux layers are wrong: config.json says hs{list(aux_layers)}, but hs{list(other_aux_layers)} accepts "
            f"more; {why}",
            dataclasses.replace(stored, config=dataclasses.replace(c, aux_layers=other_aux_layers)),
        )
    flipped = not c.norm_before_residual
    yield Misreading(
        f"norm_before_residual should be {str(flipped).lower()}",
        dataclasses.replace(stored, config=dataclasses.replace(c, norm_before_residual=flipped)),
    )
