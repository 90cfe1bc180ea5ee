"""Capturing from a running vLLM: what is sent, what is read, and every way the two can misunderstand.

Against a stand-in that writes files as vLLM 0.32.0 does, its lock included.
"""

from __future__ import annotations

import fcntl
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from redraft.core.errors import UserError
from redraft.core.records import Answer
from redraft.features.extract import Plan, capture_features, read_states
from redraft.features.layouts import open_features
from redraft.features.stored_target import load_stored_target
from redraft.models.final_norm import find_final_norm
from redraft.models.target import Target
from redraft.serving import capture as capture_module
from redraft.serving.capture import Capture

AUX_LAYERS = (2, 4, 5)
TURN = threading.Lock()


@contextmanager
def server(target: Target, folder: Path, **plan: Any) -> Iterator[str]:
    """Writes what `target` computes, misbehaving as `plan` tells; gives its address."""
    norm, count = find_final_norm(target), iter(range(10_000))

    def write(path: Path, lock: Any, tokens: list[int]) -> None:
        with TURN:  # hooks of one model, which several servers may have
            states = read_states(
                target, norm, torch.tensor([tokens]), plan.get("aux_layers", AUX_LAYERS), True
            )
        time.sleep(plan.get("delay", 0.0))
        ids = torch.tensor(plan.get("tokens", tokens))
        save_file({"hidden_states": states[0].contiguous(), "token_ids": ids}, path)
        lock.close()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(200, {"data": [{"id": "served"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert (body["model"], body["max_tokens"]) == ("served", 1)
            if "refuse" in plan:
                self.reply(400, {"error": {"message": plan["refuse"]}})
                return
            path = folder / f"cmpl-{next(count)}-0.safetensors"
            if plan.get("writes", True):
                lock = path.with_name(f"{path.name}.lock").open("w")
                fcntl.flock(lock, fcntl.LOCK_EX)
                threading.Thread(target=write, args=(path, lock, body["prompt"])).start()
            named = {"hidden_states_path": str(path)} if plan.get("captures", True) else None
            self.reply(200, {"choices": [], "kv_transfer_params": named})

        def reply(self, status: int, answer: Any) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *arguments: Any) -> None:
            return

    folder.mkdir(exist_ok=True)
    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{running.server_address[1]}/"
    finally:
        running.shutdown()
        running.server_close()


def asking(address: str, dtype: torch.dtype = torch.float32) -> Capture:
    return Capture(address, AUX_LAYERS, 8, dtype, concurrency=4)


@pytest.mark.parametrize("layout", ["redraft", "specforge"])
def test_captured_features_are_the_targets(
    target: Target, target_folder: Path, answers: list[Answer], tmp_path: Path, layout: str
) -> None:
    bare = load_stored_target(str(target_folder), [])
    with server(target, tmp_path / "shared", delay=0.05) as address:
        plan = Plan(tmp_path / "f", layout, batch_tokens=512)
        capture_features(bare, asking(address), answers[:6], AUX_LAYERS, plan, bare.normed)
    assert list((tmp_path / "shared").iterdir()) == []  # read and removed
    rows = open_features(tmp_path / "f", unpickle=layout == "specforge")
    beside = load_stored_target(str(target_folder), [rows])
    for answer in answers[:6]:
        tokens = torch.tensor([[*answer.prompt, *answer.tokens]])
        own, stored = (t.read(tokens, (2, 5, 8)) for t in (target, beside))
        assert torch.allclose(stored.features_BTF, own.features_BTF, atol=1e-4)
        assert torch.allclose(stored.logits_BTV, own.logits_BTV, atol=1e-4)
    assert beside.check_says(answers[:6]) == 1.0


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (
            {"captures": False},
            r"captures no hidden states: start it with .*layer_ids.: .2, 4, 5, 8.",
        ),
        (
            {"aux_layers": (2, 4)},
            r"shape .5, 3, 32., expected .5, 4, hidden size.: .* captures other layers",
        ),
        (
            {"tokens": [1, 2, 3, 4, 6]},
            "not the tokens that were sent .*is another client capturing",
        ),
        (
            {"writes": False},
            "which does not appear here: its shared_storage_path has to be a folder",
        ),
        ({"refuse": "too long"}, r"refused /v1/completions .HTTP 400.: .*too long"),
    ],
)
def test_misunderstandings_are_named(
    target: Target,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    plan: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setattr(capture_module, "WAIT_SECONDS", 0.2)
    with server(target, tmp_path / "shared", **plan) as address:
        with pytest.raises(UserError, match=message):
            asking(address)([[1, 2, 3, 4, 5]])


def test_another_dtype_and_no_server_are_named(target: Target, tmp_path: Path) -> None:
    with server(target, tmp_path / "shared") as address:
        with pytest.raises(UserError, match=r"computes in torch.float32, target .* torch.bfloat16"):
            asking(address, torch.bfloat16)([[1, 2, 3]])
    with pytest.raises(UserError, match=r"no answer of a vLLM server .*; start it with"):
        asking(address)([[1, 2, 3]])
