"""Whether a draft can be trained with these settings, checked before the target has answered anything."""

from __future__ import annotations

import torch

from ..adapters.adapter import check_carries
from ..adapters.kind import Setup, load
from ..adapters.table import VOCABULARY, Method
from ..config import TrainConfig
from ..core.errors import UserError
from ..drafts.base import Draft
from ..losses.functions import LOSSES
from ..losses.table import TABLE as LOSS_TABLE
from ..models.target import Target
from .log import check_trackers
from .optimizer import MUON


def check_fits(draft: Draft, config: TrainConfig, target: Target, base: Target | None) -> None:
    """Raise UserError, with what to change, for settings that this draft and target do not allow."""
    method = config.method_value
    setup = Setup(rank=config.rank)
    check_carries(draft, method, setup)
    if config.vocab == "remap":
        load(VOCABULARY).check(draft, method, setup)
    if LOSSES[config.loss].row.states and draft.aux_layers != (target.num_layers,):
        raise UserError(
            f"train.loss {config.loss} compares the draft's states with the target's last hidden ones, "
            f"which a draft of kind {draft.kind} does not have; use "
            f"{', '.join(row.name for row in LOSS_TABLE if not row.states)}"
        )
    if not config.epochs and not method.closed_form:
        raise UserError(
            f"train.epochs 0 trains nothing, and method {method.name} fits nothing in closed form; "
            "name some passes, or a method with feature-map or weight-sync"
        )
    if config.optimizer == MUON and not hasattr(torch.optim, "Muon"):
        raise UserError(
            f"train.optimizer muon needs PyTorch 2.9 or later, this is {torch.__version__}; take adamw or update PyTorch"
        )
    check_trackers(config.trackers)
    _check_shares(method, config)
    _check_base(method, target, base)


def _check_shares(method: Method, config: TrainConfig) -> None:
    strangers = [name for name in config.lr_parts_value if name not in method.trained]
    if strangers:
        raise UserError(
            f"train.lr_parts names {', '.join(strangers)}, which method {method.name} does not train; "
            f"it trains {', '.join(method.trained) or 'nothing'}"
        )


def _check_base(method: Method, target: Target, base: Target | None) -> None:
    if not method.closed_form:
        return
    if base is None:
        raise UserError(
            f"method {method.name} compares the target with the model it was tuned from: name that "
            "with --base"
        )
    for what in ("hidden_size", "num_layers", "vocab_size"):
        ours, theirs = getattr(target, what), getattr(base, what)
        if ours != theirs:
            raise UserError(
                f"--base {base.name} has {what} {theirs}, target {target.name} {ours}: expected the "
                f"model that the target was tuned from, which {method.name} compares layer by layer"
            )
