"""The target without its layers: their states are read from stored features.

Everything that trains or replays asks a target to `read` rows of tokens. Here the rows are looked up
by their tokens, and the model's own code makes logits from them: it is loaded with no layers at all
(embedding, final norm and head remain), and the stored states are put in before its final norm. So a
target trains a draft where it would not fit, and whatever a model does after its layers it still does.

What cannot be looked up cannot be had: other tokens, decoding, aux layers that were not stored.

Shapes: B batch, T tokens, L aux layers, H target hidden size, F = aux layers * H, V target vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from ..core.errors import UserError
from ..core.records import Answer
from ..models.final_norm import find_final_norm, in_place_of
from ..models.loading import (
    checked_source,
    on_device,
    read_config,
    read_model,
    read_tokenizer,
)
from ..models.target import Reading, Target
from ..models.templates import read_template
from .rows import FeatureRows
from .store import FeatureStore

NO_LAYERS = (
    "this target was loaded without its layers (--features): it has the stored rows and nothing else, so "
    "it cannot decode or read on; leave --features out for that"
)
WITNESSED = {torch.float64: 1e-4, torch.float32: 1e-3}
"""How far recomputed logits may be from the target's own, as a share of the largest; else COARSE."""
COARSE = 3e-2
LEAST_SAID = 0.2
"""Stored states under which fewer of the answers' tokens than this are the most likely are not theirs."""
OF_A_LAYER = re.compile(r"\.\d+\.")
"""In the name of a tensor: it belongs to one of the layers."""
LOOKED_AT = 8
"""Answers that `check_says` reads."""


class StoredTarget(Target):
    """A target that reads its rows from `features`."""

    runs_layers = False

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        sources: Sequence[str],
        template: str | None,
        features: Sequence[FeatureRows],
        *,
        template_args: Mapping[str, Any] | None = None,
    ):
        """Around a model without layers, whose configuration is that of the whole one.

        Raises UserError for features of another target, of another dtype, and such as do not give
        the logits that their target gave.
        """
        super().__init__(model, tokenizer, sources, template, template_args=template_args)
        self.features = tuple(features)
        self.norm = find_final_norm(self)
        self._reading = False
        self.model.register_forward_pre_hook(self._refuse_others)
        for rows in self.features:
            self._check(rows)

    def read(
        self,
        tokens_BT: Tensor,
        aux_layers: Sequence[int],
        cache: Any = None,
        *,
        keep: Tensor | int = 0,
        **placed: Any,
    ) -> Reading:
        """As `Target.read`, for rows that are stored; features of padding are zeros.

        A row may end before the stored one does. Padding is what follows a row's last token that is
        not 0. Raises UserError for a row that is not stored, and for a continued `cache`.
        """
        if cache is not None or placed:
            raise UserError(NO_LAYERS)
        aux_states = [aux_layer for aux_layer in aux_layers if aux_layer != self.num_layers]
        states_BTLH, pre_norm = self._look_up(tokens_BT, aux_states)
        with in_place_of(self.norm, states_BTLH[:, :, -1], pre_norm) as left, self._allowed():
            logits_BTV = self.model(
                input_ids=tokens_BT, use_cache=False, logits_to_keep=keep
            ).logits
        if not aux_layers:
            return Reading(logits_BTV[..., :0], logits_BTV)
        features = [
            left[-1]
            if aux_layer == self.num_layers
            else states_BTLH[:, :, aux_states.index(aux_layer)]
            for aux_layer in aux_layers
        ]
        return Reading(torch.cat(features, dim=-1), logits_BTV)

    def logits_from(self, last_NH: Tensor, columns_D: Tensor | None = None) -> Tensor:
        with self._allowed():
            return super().logits_from(last_NH, columns_D)

    def normed(self, last_SH: Tensor) -> Tensor:
        """hs[n] of states before the final norm."""
        normed: Tensor = self.norm(last_SH.to(self.device))
        return normed

    def check_says(self, answers: Sequence[Answer]) -> float:
        """Share of stored greedy answers' tokens that the stored states make the most likely.

        Raises UserError where that is hardly any: states shifted, of another layer, or of another
        model. Answers that were sampled or written by others are likelier or less, and pass.
        """
        greedy = (a for a in answers if a.temperature == 0 and a.length > 1 and self._holds(a))
        some = list(islice(greedy, LOOKED_AT))
        hits = total = 0
        for answer in some:
            tokens_T = torch.tensor([*answer.prompt, *answer.answer], device=self.device)
            logits_V = self.read(tokens_T[None], ()).logits_BTV[0, len(answer.prompt) - 1 : -1]
            hits += int((logits_V.argmax(-1) == tokens_T[len(answer.prompt) :]).sum())
            total += answer.length
        if total and hits < LEAST_SAID * total:
            raise UserError(
                f"of {total} answer tokens the stored states make {hits} the most likely: they are not the "
                "states that these answers came from. Is the last one stored before the final norm, at the "
                "right layer, and are the answers this target's own?"
            )
        return hits / total if total else 1.0

    def _holds(self, answer: Answer) -> bool:
        tokens = np.array([*answer.prompt, *answer.answer])
        return any(rows.index.find(tokens)[1] == len(tokens) for rows in self.features)

    def _look_up(self, tokens_BT: Tensor, aux_layers: Sequence[int]) -> tuple[Tensor, bool]:
        """Stored states [B, T, L+1, H] of rows, and whether the last is the one before the norm."""
        B, T = tokens_BT.shape
        shape = (B, T, len(aux_layers) + 1, self.hidden_size)
        states = torch.zeros(shape, dtype=self.dtype)
        for b, tokens in enumerate(tokens_BT.cpu().numpy()):
            rows, row, length = self._find(tokens)
            states[b, :length] = rows.states(row, length)[:, rows.columns(aux_layers)]
        return states.to(self.device), self.features[0].pre_norm

    def _find(self, tokens: np.ndarray[Any, Any]) -> tuple[FeatureRows, int, int]:
        real = int(np.flatnonzero(tokens)[-1]) + 1 if tokens.any() else 1
        for rows in self.features:
            row, length = rows.index.find(tokens)
            if length >= real:
                return rows, row, length
        folders = ", ".join(str(rows.folder) for rows in self.features)
        raise UserError(
            f"a row of {real} tokens ({' '.join(map(str, tokens[:8]))} ...) is not among the features in "
            f"{folders}; write those of all answers, held-out ones too: redraft features --answers FILE"
        )

    @contextmanager
    def _allowed(self) -> Iterator[None]:
        self._reading = True
        try:
            yield
        finally:
            self._reading = False

    def _refuse_others(self, *_: Any) -> None:
        if not self._reading:
            raise UserError(NO_LAYERS)

    def _check(self, rows: FeatureRows) -> None:
        expected = (str(self.dtype), self.hidden_size, self.features[0].pre_norm)
        found = (str(rows.dtype), rows.hidden_size, rows.pre_norm)
        for what, ours, theirs in zip(
            ("dtype", "hidden size", "pre_norm"), expected, found, strict=True
        ):
            if ours != theirs:
                raise UserError(
                    f"{rows.folder} holds states of {what} {theirs}, expected {ours} for target "
                    f"{self.name}; load it in the stored dtype (--dtype), or write its features again"
                )
        if isinstance(rows, FeatureStore):
            self._check_store(rows)

    def _check_store(self, rows: FeatureStore) -> None:
        for what, ours, theirs in (
            ("weights", self.weights_hash(), rows.about.target_hash),
            ("a tokenizer", self.tokenizer_hash(), rows.about.tokenizer_hash),
        ):
            if ours != theirs:
                raise UserError(
                    f"{rows.folder} holds features of {rows.about.target} with {what} hashed {theirs}, but "
                    f"target {self.name} has {ours}: another model; write its own with redraft features"
                )
        witness = rows.witness()
        if not witness:
            return
        tokens_1T = torch.from_numpy(rows.tokens[int(witness["row"])])[None].long().to(self.device)
        logits_PV = self.read(tokens_1T, ()).logits_BTV[0, witness["positions"]].float().cpu()
        worst = float((logits_PV - witness["logits"]).abs().max() / witness["logits"].abs().max())
        if not worst <= WITNESSED.get(self.dtype, COARSE):
            raise UserError(
                f"{rows.folder}: logits made from the stored states differ from the target's own by "
                f"{worst:.1e} of the largest: its final norm or head are not those that the store was "
                "written with; write it again with redraft features"
            )


def load_stored_target(
    source: str,
    features: Sequence[FeatureRows],
    *,
    adapter: str | None = None,
    chat_template: str | None = None,
    template_args: Mapping[str, Any] | None = None,
    dtype: str = "auto",
    device: str | None = None,
) -> StoredTarget:
    """Load what surrounds a target's layers; the rest of the arguments are `load_target`'s.

    Raises UserError for a model that cannot be loaded so, and an adapter that changes more than
    layers.
    """
    from transformers.utils import logging

    torch_dtype = checked_source(source, dtype)
    template = read_template(chat_template)
    if adapter is not None:
        _check_adapter(adapter)
    config = read_config(source)
    whole = _take_layers_out(config.get_text_config())
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would list every tensor of the layers as not used
    try:
        model = read_model(source, config, torch_dtype, lambda name: bool(OF_A_LAYER.search(name)))
    finally:
        logging.set_verbosity(verbosity)
    for key, value in whole.items():  # what reads the configuration reads the target's
        setattr(model.config.get_text_config(), key, value)
    tokenizer = read_tokenizer(source)
    sources = [source] if adapter is None else [source, adapter]
    placed = on_device(model, device, source)
    return StoredTarget(placed, tokenizer, sources, template, features, template_args=template_args)


def _take_layers_out(config: Any) -> dict[str, Any]:
    """Make it a configuration of no layers; returns what it held before, by layer and of their number."""
    n = config.num_hidden_layers
    listed = {k: v for k, v in vars(config).items() if isinstance(v, list) and len(v) == n}
    for key in listed:
        setattr(config, key, [])
    config.num_hidden_layers = 0
    return {**listed, "num_hidden_layers": n}


def _check_adapter(adapter: str) -> None:
    """Refuse an adapter that changes what is loaded here."""
    path = Path(adapter) / "adapter_model.safetensors"
    if not path.is_file():
        raise UserError(f"--target-adapter {adapter}: expected adapter_model.safetensors in it")
    with safe_open(path, framework="pt") as stream:
        others = [key for key in stream.keys() if not OF_A_LAYER.search(key)]  # noqa: SIM118
    if others:
        raise UserError(
            f"--target-adapter {adapter} changes {others[0]}, which is no layer: merge it into the target "
            "before its features are stored"
        )
