"""A stand-in for vLLM's OpenAI server: answers from a table, counts as told, misbehaves on demand.

Installed by `conftest.FakeEngine` as the module that the real command line starts. Its plan is the
JSON file named in FAKE_VLLM.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PLAN: dict[str, Any] = json.loads(Path(os.environ["FAKE_VLLM"]).read_text())
ARGUMENTS = dict(zip(sys.argv[1:], [*sys.argv[2:], ""], strict=True))
SPECULATING = "--speculative-config" in ARGUMENTS
lock = threading.Lock()
requests = 0
counters = {"drafts": 0, "draft_tokens": 0, "accepted_tokens": 0}
positions = [0] * PLAN.get("k", 0)


def count(accepted: list[int]) -> None:
    counters["drafts"] += len(accepted)
    counters["draft_tokens"] += len(positions) * len(accepted)
    counters["accepted_tokens"] += sum(accepted)
    for run in accepted:
        for at in range(run):
            positions[at] += 1


def metrics() -> str:
    lines = ["# TYPE vllm:spec_decode_num_drafts_total counter"]
    if SPECULATING:
        labels = 'engine="0",model_name="target"'
        for name, value in counters.items():
            lines.append(f"vllm:spec_decode_num_{name}_total{{{labels}}} {float(value)}")
            lines.append(f"vllm:spec_decode_num_{name}_created{{{labels}}} 1.79e+09")
        for at, value in enumerate(positions):
            lines.append(
                "vllm:spec_decode_num_accepted_tokens_per_pos_total"
                f'{{{labels},position="{at}"}} {float(value)}'
            )
    return "\n".join(lines) + "\n"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/health":
            self.reply(503 if PLAN.get("never_healthy") else 200, "")
        else:
            with lock:
                self.reply(200, metrics())

    def do_POST(self) -> None:
        global requests
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = ",".join(map(str, body["prompt"]))
        with lock:
            requests += 1
            number = requests
        if number == PLAN.get("die_at_request"):
            print("torch.OutOfMemoryError: the fake ran out of memory", flush=True)
            if "last_words" in PLAN:
                self.reply(200, PLAN["last_words"])
                self.wfile.flush()
            os._exit(9)
        if PLAN.get("refuse"):
            self.reply(400, json.dumps({"error": {"message": PLAN["refuse"], "code": 400}}))
            return
        if PLAN.get("hang"):
            Path(PLAN["hang"]).write_text(str(os.getpid()))
            time.sleep(60)
        time.sleep(PLAN.get("delay", {}).get(key, 0.0))
        time.sleep(0.0 if SPECULATING else PLAN.get("plain_delay", 0.0))
        table = PLAN["answers"]
        if SPECULATING:
            table = {**table, **PLAN.get("drafted_answers", {})}
        choice: dict[str, Any] = {"index": 0, "text": "", "finish_reason": "length"}
        if not PLAN.get("no_token_ids"):
            choice["token_ids"] = table[key][: body["max_tokens"]]
        with lock:
            if SPECULATING:
                count(PLAN.get("steps", {}).get(key, []))
        self.reply(200, json.dumps({"model": body["model"], "choices": [choice]}))

    def reply(self, status: int, text: str) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *arguments: Any) -> None:
        return


def main() -> None:
    Path(os.environ["FAKE_VLLM"]).with_name("started.json").write_text(
        json.dumps({"argv": sys.argv[1:], "environment": dict(os.environ), "pid": os.getpid()})
    )
    if PLAN.get("die_at_start"):
        print(PLAN["die_at_start"], flush=True)
        sys.exit(1)
    ThreadingHTTPServer(("127.0.0.1", int(ARGUMENTS["--port"])), Handler).serve_forever()


if __name__ == "__main__":
    main()
