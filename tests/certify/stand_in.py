"""A stand-in for serving engines: an HTTP server that decodes with redraft's own live loop.

It replies and counts as vLLM, llama.cpp or SGLang do, from what the loop emitted and accepted. None of
them runs here: what their replies look like is taken from vLLM 0.32 and llama.cpp 11434, which ran
against redraft elsewhere, and from SGLang's source. Whatever is wrong with a served draft or target is wrong
before it gets here.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from redraft.decoding.speculative import Decoded, decode_speculative
from redraft.drafts.base import Draft
from redraft.models.target import Target

Known = dict[tuple[int, ...], Decoded]


def decode(
    target: Target,
    draft: Draft,
    prompts: Sequence[Sequence[int]],
    k: int,
    most: int,
    *,
    alone: bool = False,
) -> Known:
    """What the live loop makes of each prompt; `alone` decodes one at a time, as a server does."""
    groups = [[p] for p in prompts] if alone else [prompts]
    found = [d for group in groups for d in decode_speculative(target, draft, group, k, most)]
    return {tuple(p): d for p, d in zip(prompts, found, strict=True)}


class StandIn:
    """One server. `known` are its answers; `missing` endpoints reply 404; it dies at request `dies_at`."""

    def __init__(
        self,
        owner: str,
        known: Known,
        k: int,
        most: int,
        stops: Sequence[int] = (),
        *,
        rendered: Sequence[int] | None = None,
        missing: Sequence[str] = (),
        speculates: bool = True,
        hides: bool = False,
        others: int = 0,
        dies_at: int | None = None,
    ):
        self.owner, self.known, self.k, self.most, self.stops = owner, known, k, most, stops
        self.rendered, self.missing, self.speculates = rendered, missing, speculates
        self.hides, self.others, self.dies_at = hides, others, dies_at
        self.asked = 0
        self.totals = {"drafts": 0, "draft_tokens": 0, "accepted_tokens": 0}
        self.bodies: list[tuple[str, Any]] = []

    # -- what each engine replies -------------------------------------------------------------------

    def get(self, path: str) -> tuple[int, str]:
        if path in self.missing:
            return 404, "not found"
        if path == "/v1/models":
            return 200, json.dumps({"data": [{"id": "served", "owned_by": self.owner}]})
        if path == "/metrics" and not self.hides:
            lines = ['vllm:generation_tokens_total{engine="0"} 3.0']
            if self.speculates:
                lines += [
                    f'vllm:spec_decode_num_{name}_total{{engine="0",model_name="served"}} {float(value)}'
                    for name, value in self.totals.items()
                ]
            return 200, "\n".join(lines) + "\n"
        return 404, "not found"

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, str]:
        self.bodies.append((path, body))
        if path in self.missing:
            return 404, "not found"
        if path == "/apply-template":
            return 200, json.dumps({"prompt": "rendered"})
        if path == "/tokenize":
            return (200, json.dumps({"tokens": self.rendered})) if self.rendered else (404, "")
        self.asked += 1
        if self.asked == self.dies_at:
            raise ConnectionAbortedError
        handlers = {
            ("vllm", "/v1/completions"): self._vllm,
            ("llamacpp", "/completion"): self._llama,
            ("sglang", "/generate"): self._sglang,
        }
        reply = handlers.get((self.owner, path))
        if reply is None:
            return 404, json.dumps({"error": {"message": f"no {path}"}})
        prompt = body["input_ids"] if self.owner == "sglang" else body["prompt"]
        found = self.known.get(tuple(prompt))
        if found is None:
            return 400, json.dumps({"error": {"message": "token id out of vocabulary"}})
        return 200, json.dumps(reply(found))

    def _vllm(self, found: Decoded) -> dict[str, Any]:
        for accepted in [*found.accepted, *[0] * self.others]:
            self.totals["drafts"] += 1
            self.totals["draft_tokens"] += self.k
            self.totals["accepted_tokens"] += accepted
        return {"choices": [{"token_ids": found.tokens, "finish_reason": "length"}]}

    def _llama(self, found: Decoded) -> dict[str, Any]:
        timings: dict[str, Any] = {"predicted_n": len(found.tokens)}
        if self.speculates:
            drafted, accepted = llama_counts(found, self.k, self.most, self.stops)
            timings |= {"draft_n": drafted, "draft_n_accepted": accepted}
        return {"tokens": found.tokens, **({} if self.hides else {"timings": timings})}

    def _sglang(self, found: Decoded) -> dict[str, Any]:
        """The fields of SGLang 0.5.23."""
        meta: dict[str, Any] = {"completion_tokens": len(found.tokens)}
        if self.speculates:
            meta["spec_verify_ct"] = len(found.accepted)
            meta["spec_num_correct_drafts"] = sum(found.accepted)
            meta["spec_num_proposed_drafts"] = self.k * len(found.accepted)
        return {"output_ids": found.tokens, **({} if self.hides else {"meta_info": meta})}


def llama_counts(found: Decoded, k: int, most: int, stops: Sequence[int]) -> tuple[int, int]:
    """Drafted and accepted tokens as llama.cpp's loop goes through them, token by token."""
    tokens = [*found.tokens, *found.lookahead]
    position, drafted, accepted = 1, 0, 0
    for gained in found.accepted:
        space = most - position - 1
        if space < 1:
            break
        chain = min(k, space)
        drafted += chain
        for at in range(min(gained, chain)):
            last = at == chain - 1
            if tokens[position + at] in stops and not last:
                break  # sampled as the step's own token: generation ends
            accepted += 1
        position += min(gained, chain) + 1
    return drafted, accepted


@contextlib.contextmanager
def running(stand_in: StandIn) -> Iterator[str]:
    """The stand-in behind a port of this machine; its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply(lambda: stand_in.get(self.path))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._reply(lambda: stand_in.post(self.path, body))

        def _reply(self, made: Callable[[], tuple[int, str]]) -> None:
            try:
                status, text = made()
            except ConnectionAbortedError:
                self.close_connection = True
                return
            content = text.encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing: tests print no requests."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
