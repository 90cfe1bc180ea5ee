"""A stand-in for the package xllamacpp: a server that answers from a table, counts as told, misbehaves on demand.

Installed by `install_llamacpp` as the module that the real server script imports. Its plan is the JSON
file named in FAKE_LLAMACPP.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from enum import IntEnum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

PLAN: dict[str, Any] = json.loads(Path(os.environ["FAKE_LLAMACPP"]).read_text())
KINDS = PLAN.get("kinds", ["NONE", "DRAFT_SIMPLE", "DRAFT_EAGLE3"])
common_speculative_type = IntEnum(  # type: ignore[misc]
    "common_speculative_type",
    {f"COMMON_SPECULATIVE_TYPE_{name}": at for at, name in enumerate(KINDS)},
)
ggml_type = SimpleNamespace(GGML_TYPE_F32="F32", GGML_TYPE_F16="F16", GGML_TYPE_Q8_0="Q8_0")
llama_flash_attn_type = SimpleNamespace(
    LLAMA_FLASH_ATTN_TYPE_ENABLED="ENABLED", LLAMA_FLASH_ATTN_TYPE_DISABLED="DISABLED"
)
lock = threading.Lock()
requests = 0
counters = {"drafts": 0, "draft_tokens": 0, "accepted_tokens": 0}
positions = [0] * PLAN.get("k", 0)


def CommonParams() -> SimpleNamespace:
    threads = SimpleNamespace(n_threads=-1)
    draft = SimpleNamespace(
        mparams=SimpleNamespace(path=""), cpuparams=threads, cpuparams_batch=threads
    )
    return SimpleNamespace(
        model=SimpleNamespace(path=""),
        cpuparams=threads,
        cpuparams_batch=threads,
        speculative=SimpleNamespace(draft=draft, types=[]),
    )


class Server:
    def __init__(self, params: Any) -> None:
        self.speculating = bool(params.speculative.types)
        plain = json.loads(json.dumps(params, default=vars))
        Path(os.environ["FAKE_LLAMACPP"]).with_name("started.json").write_text(
            json.dumps({"argv": sys.argv[1:], "params": plain, "pid": os.getpid()})
        )
        if PLAN.get("die_at_start"):
            print(PLAN["die_at_start"], file=sys.stderr, flush=True)
            raise RuntimeError("Failed to init server, please check the input params.")
        self.listening_address = f"http://127.0.0.1:{params.port}"
        handler = type("Bound", (Handler,), {"speculating": self.speculating})
        server = ThreadingHTTPServer(("127.0.0.1", params.port), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()


def count(steps: list[list[int]]) -> None:
    for drafted, accepted in steps:
        counters["drafts"] += 1
        counters["draft_tokens"] += drafted
        counters["accepted_tokens"] += accepted
        for at in range(accepted):
            positions[at] += 1


def metrics() -> str:
    lines = [f"llamacpp:spec_decode_num_{name}_total {value}" for name, value in counters.items()]
    lines += [
        f'llamacpp:spec_decode_num_accepted_tokens_per_pos_total{{position="{at}"}} {value}'
        for at, value in enumerate(positions)
    ]
    return "\n".join(lines) + "\n"


class Handler(BaseHTTPRequestHandler):
    speculating = False

    def do_GET(self) -> None:
        with lock:
            self.reply(metrics() if self.path == "/metrics" else '{"status":"ok"}')

    def do_POST(self) -> None:
        global requests
        assert self.path == "/completion", self.path
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert (body["temperature"], body["return_tokens"]) == (0, True)
        key = ",".join(map(str, body["prompt"]))
        with lock:
            requests += 1
            if requests == PLAN.get("die_at_request"):
                print("0.01.2 I a line\nGGML_ASSERT(n > 0) failed\n0x7f: libggml", file=sys.stderr)
                os._exit(9)
            if self.speculating:
                count(PLAN.get("steps", {}).get(key, []))
        answers = PLAN["answers"]
        if self.speculating:
            answers = {**answers, **PLAN.get("drafted_answers", {})}
        else:
            threading.Event().wait(PLAN.get("plain_delay", 0.0))
        self.reply(json.dumps({"tokens": answers[key][: body["n_predict"]]}))

    def reply(self, text: str) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *arguments: Any) -> None:
        return
