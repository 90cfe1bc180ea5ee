"""Hidden states from a running vLLM: one request a row, answered with the name of a file.

The server is somebody else's process, started to capture (see `HOW`). It writes each request's states
into a folder that has to be visible here too, holding a lock on a neighbour file while it does; the
file is read and removed.

Facts from vLLM 0.32.0 (example_hidden_states_connector.py).

Shapes: S tokens of a row, L aux layers, H target hidden size.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.errors import UserError
from ..core.files import remove
from ..core.folders import read_file
from ..features.rows import STATES, TOKENS
from .client import Client, connect, key_for
from .reply import Trouble, models_of

REQUEST_SECONDS = 600.0
WAIT_SECONDS = 30.0
"""How long a named file may take to appear."""
HOW = (
    "start it with --no-enable-chunked-prefill --no-enable-prefix-caching, --speculative-config "
    '{{"method": "extract_hidden_states", "num_speculative_tokens": 1, "draft_model_config": '
    '{{"hf_config": {{"eagle_aux_hidden_state_layer_ids": {ids}}}}}}} and --kv-transfer-config '
    '{{"kv_connector": "ExampleHiddenStatesConnector", "kv_role": "kv_producer", '
    '"kv_connector_extra_config": {{"shared_storage_path": "/a/folder/visible/here"}}}}'
)


@dataclass(frozen=True)
class Capture:
    """A vLLM server at `address` (http://host:port) that captures the layers `aux_layers` and the last of
    `layers`. Safe to use from several threads."""

    address: str
    aux_layers: tuple[int, ...]
    layers: int
    dtype: torch.dtype
    concurrency: int = 32

    def __call__(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """States [S, L+1, H] of rows of token ids, the last before the final norm.

        Raises UserError for a server that cannot be reached, refuses, or captures something else.
        """
        model = self._model
        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(lambda tokens: self._states(model, tokens), rows))

    @property
    def how(self) -> str:
        return HOW.format(ids=json.dumps([*self.aux_layers, self.layers]))

    @cached_property
    def _client(self) -> Client:
        """Open as long as the process runs."""
        url = self.address.rstrip("/")
        return connect(url, REQUEST_SECONDS, key_for(url))

    @cached_property
    def _model(self) -> str:
        content = self._ask("/v1/models")
        try:
            return next(iter(models_of(content)))
        except (Trouble, StopIteration):
            raise self._no_vllm("/v1/models", "it names no model") from None

    def _states(self, model: str, tokens: Sequence[int]) -> Tensor:
        body = {"model": model, "prompt": list(map(int, tokens)), "max_tokens": 1, "temperature": 0}
        named = self._ask("/v1/completions", body).get("kv_transfer_params")
        if not isinstance(named, dict) or not isinstance(named.get("hidden_states_path"), str):
            raise UserError(f"{self.address} answers, but captures no hidden states: {self.how}")
        path = Path(named["hidden_states_path"])
        self._wait_for(path)
        found = read_file(path)
        self._check(path, found, tokens)
        for used in (path, path.with_name(f"{path.name}.lock")):
            remove(used)
        return found[STATES]

    def _wait_for(self, path: Path) -> None:
        """Until the file is whole: until its lock is free, and where there is none, until it is there."""
        deadline = time.monotonic() + WAIT_SECONDS
        lock = path.with_name(f"{path.name}.lock")
        while not path.is_file() and not lock.is_file():
            if time.monotonic() > deadline:
                raise UserError(
                    f"{self.address} captured into {path}, which does not appear here: its "
                    "shared_storage_path has to be a folder that this machine sees under the same name"
                )
            time.sleep(0.02)
        with contextlib.suppress(FileNotFoundError), lock.open() as stream:
            import fcntl  # not everywhere; neither is vLLM

            fcntl.flock(stream, fcntl.LOCK_SH)
        while not path.is_file() and time.monotonic() < deadline:
            time.sleep(0.02)

    def _check(self, path: Path, found: dict[str, Tensor], tokens: Sequence[int]) -> None:
        states, ids = found.get(STATES), found.get(TOKENS)
        if states is None or ids is None or not np.array_equal(ids.numpy(), np.asarray(tokens)):
            raise UserError(
                f"{path}: not the tokens that were sent to {self.address}; is another client capturing?"
            )
        if states.dim() != 3 or states.shape[:2] != (len(tokens), len(self.aux_layers) + 1):
            raise UserError(
                f"{path}: states of shape {tuple(states.shape)}, expected [{len(tokens)}, "
                f"{len(self.aux_layers) + 1}, hidden size]: {self.address} captures other layers; {self.how}"
            )
        if states.dtype != self.dtype:
            raise UserError(
                f"{self.address} computes in {states.dtype}, target and features in {self.dtype}; start "
                "it with that --dtype, or name its own here"
            )

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            reply = self._client.reply(path, body)
        except Trouble as problem:
            raise self._no_vllm(path, str(problem)) from None
        if reply.status != 200:
            raise UserError(f"{self.address} refused {path} (HTTP {reply.status}): {reply.reason}")
        content = reply.json()
        if content is None:
            raise self._no_vllm(path, "it is no JSON object")
        return content

    def _no_vllm(self, path: str, why: str) -> UserError:
        url = self._client.url
        return UserError(f"{url}{path}: no answer of a vLLM server ({why}); {self.how}")
