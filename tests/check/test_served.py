"""A check through a server: its counters, and everything that is wrong with one."""

from __future__ import annotations

import collections
import io
import json
import math
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console

from redraft.check import counting_server as module
from redraft.check.calibration_runs import CalibrationRun
from redraft.check.screen import print_served
from redraft.check.served import NOT_PREDICTED, check_served
from redraft.config import RegenerateConfig
from redraft.core.errors import UserError
from redraft.core.records import to_json
from redraft.core.visible import visible
from redraft.decoding.sampling import Sampling
from redraft.serving.counters import Counters
from tests.conftest import write_prompts
from tests.generation.odd_json import mutated

K = 3


class FakeVllm:
    """Every answer takes five steps, which accept 2, 1, 0, 3 and 0 of three tokens; the first token is the
    prefill's. `stranger` adds steps of somebody else."""

    def __init__(self, speculates: bool = True, counts: bool = True, stranger: int = 0):
        self.speculates, self.counts, self.stranger = speculates, counts, stranger
        self.lock, self.answered = threading.Lock(), 0
        self.bodies: list[Any] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "tiny"}]})
        if request.url.path == "/metrics":
            return httpx.Response(200, text=self.metrics())
        with self.lock:
            self.answered += 1
            self.bodies.append((request.url.path, json.loads(request.content)))
        return httpx.Response(200, json={"usage": {"completion_tokens": 1 + 5 + 6}})

    def metrics(self) -> str:
        if not self.counts:
            return "process_cpu_seconds_total 3.0\n"
        if not self.speculates:
            return "vllm:generation_tokens_total 3.0\n"
        n = self.answered * (1 + self.stranger)
        totals = {"drafts": 5 * n, "draft_tokens": 15 * n, "accepted_tokens": 6 * n}
        lines = [f'vllm:spec_decode_num_{k}_total{{engine="0"}} {v}.0' for k, v in totals.items()]
        for at, count in enumerate((3, 2, 1)):
            lines.append(
                "vllm:spec_decode_num_accepted_tokens_per_pos_total"
                f'{{engine="0",position="{at}"}} {count * n}.0'
            )
        return "\n".join(lines) + "\n"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STEADY_SECONDS", 0.0)


def ask(fake: Any, prompts: Path, runs: list[CalibrationRun] | None, **more: Any) -> Any:
    transport = httpx.MockTransport(fake)
    return check_served("http://box:8000", str(prompts), runs=runs, transport=transport, **more)


def test_a_busy_server_is_not_waited_for(prompts_file: Path, runs: list[CalibrationRun]) -> None:
    class Busy(FakeVllm):
        def metrics(self) -> str:
            self.answered += 1  # somebody else's, between any two looks
            return super().metrics()

    found = ask(Busy(), prompts_file, runs, most=16)
    assert found.others > 0.5


def test_the_model_that_is_meant_and_the_url_as_people_write_it(
    prompts_file: Path, runs: list[CalibrationRun]
) -> None:
    def two(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "base"}, {"id": "tuned"}]})
        return fake(request)

    fake: Any = FakeVllm()
    with pytest.raises(UserError, match="serves base, tuned: name the one .* --endpoint-model"):
        ask(two, prompts_file, runs)
    assert ask(two, prompts_file, runs, model="tuned", most=16).model == "tuned"
    assert fake.bodies[0][1]["model"] == "tuned"
    with pytest.raises(UserError, match="serves base, tuned, not other"):
        ask(two, prompts_file, runs, model="other")
    transport = httpx.MockTransport(FakeVllm())
    check_served("http://box:8000/v1", str(prompts_file), runs=runs, most=16, transport=transport)


def test_runs_of_small_targets_say_nothing_of_a_server(
    prompts_file: Path, runs: list[CalibrationRun]
) -> None:
    assert NOT_PREDICTED not in ask(FakeVllm(), prompts_file, runs, most=16).unknown
    found = ask(FakeVllm(), prompts_file, None, most=16)  # the runs that come with redraft
    assert (found.runs, found.recommendation) == (0, None)
    out = Console(width=400, record=True)
    print_served(found, out)
    said = out.export_text()
    assert NOT_PREDICTED in said
    assert "recommended" not in said
    json.dumps(to_json(found))


def test_tau_is_the_counters(prompts_file: Path, runs: list[CalibrationRun]) -> None:
    fake = FakeVllm()
    found = ask(fake, prompts_file, runs, most=20, rows=4)
    unseen = 1 - 0.025 ** (1 / 5)  # 1 + 6 / 5 in each of five groups; of others it is not known
    assert found.tau == pytest.approx((2.2, 2.2 - 1.2 * unseen, 2.2 + 1.8 * unseen))
    assert found.per_position == (3 / 5, 2 / 3, 1 / 2)
    assert (found.k, found.prompts, found.answer_tokens) == (K, 20, 240)
    assert found.others == 0.0
    assert len(fake.bodies) == 20
    path, body = fake.bodies[0]
    assert path == "/v1/chat/completions"
    assert body["messages"][-1]["role"] == "user"
    assert (body["temperature"], body["top_k"]) == (0, -1)
    assert found.sampling == Sampling()
    assert "temperature" not in found.outside
    warm = RegenerateConfig(temperature=0.7, top_p=0.9, max_new_tokens=32)
    warmed = ask(fake, prompts_file, runs, most=20, answering=warm)
    assert warmed.sampling == Sampling(0.7, 0, 0.9)
    assert "temperature" in warmed.outside, "no run of the table was sampled"
    body = fake.bodies[-1][1]
    assert (body["temperature"], body["top_p"], body["max_tokens"]) == (0.7, 0.9, 32)
    assert all(option.speedup is None for option in found.recommendation.options)
    assert any("speed-up" in text for text in found.unknown)
    busy = ask(FakeVllm(stranger=1), prompts_file, runs, most=20)
    assert busy.others == pytest.approx(1 - 240 / 440)
    given = ask(FakeVllm(), prompts_file, runs, most=20, published=3.0)
    out = io.StringIO()
    print_served(given, Console(file=out, width=200, highlight=False))
    assert f"retention    {2.2 / 3:.2f} [" in out.getvalue()
    assert "] of the published figure" in out.getvalue()


def test_a_server_without_counts_by_position_has_an_interval(
    prompts_file: Path, runs: list[CalibrationRun]
) -> None:
    class Coarse(FakeVllm):
        def metrics(self) -> str:
            return "".join(
                line for line in super().metrics().splitlines(True) if "per_pos" not in line
            )

    found = ask(Coarse(), prompts_file, runs, most=20)
    assert (found.k, found.per_position) == (K, ())
    assert 1 < found.tau[1] < 2.2 < found.tau[2] < K + 1


@pytest.mark.parametrize(
    ("fake", "message"),
    [
        (FakeVllm(speculates=False), "without speculation; start it with --speculative-config"),
        (FakeVllm(counts=False), "/metrics holds no counters of vLLM"),
        (lambda request: httpx.Response(503, text="loading"), r"refused \(HTTP 503\): loading"),
        (lambda request: httpx.Response(200, text="<html>"), "no JSON object"),
        (lambda request: httpx.Response(200, json={}), "names no model"),
    ],
)
def test_servers_that_cannot_be_checked(
    fake: Any, message: str, prompts_file: Path, runs: list[CalibrationRun]
) -> None:
    with pytest.raises(UserError, match=message):
        ask(fake, prompts_file, runs)


def test_the_interval_is_that_of_groups_that_differ(
    prompts_file: Path, runs: list[CalibrationRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second half of the answers accepts nothing: groups are at 2.2 or at 1, never between."""
    fake = FakeVllm()
    counters = [(5 * n, 6 * min(n, 8), min(n, 8)) for n in range(17)]
    monkeypatch.setattr(
        module,
        "read_counters",
        lambda page: Counters(
            counters[fake.answered][0],
            3 * counters[fake.answered][0],
            counters[fake.answered][1],
            tuple(count * counters[fake.answered][2] for count in (3, 2, 1)),
        ),
    )
    tau, low, high = ask(fake, prompts_file, runs, most=16).tau
    assert tau == 1.6
    # eight groups, each 2.2 or 1: Student's t of 7 degrees of freedom, on the logit of 0.6 accepted of 3
    reach = 2.3646 * 0.6 / 7**0.5 / (3 * 0.2 * 0.8)
    ends = [1 + 3 / (1 + 4 * math.exp(side * reach)) for side in (1, -1)]
    assert (low, high) == pytest.approx(ends, abs=1e-3)


def test_prompts_that_the_server_refuses_are_left_out(
    prompts_file: Path, runs: list[CalibrationRun]
) -> None:
    def strict(request: httpx.Request) -> httpx.Response:
        said = json.loads(request.content) if request.method == "POST" else {}
        if any(word in str(said) for word in refused):
            return httpx.Response(400, text="maximum context length is 8 tokens")
        return fake(request)

    fake, refused = FakeVllm(), ["and 3.", "and 5."]
    found = ask(strict, prompts_file, runs, most=20)
    assert (found.prompts, found.refused, found.answer_tokens) == (18, 2, 18 * 12)
    assert found.tau[0] == 2.2
    fake, refused = FakeVllm(), ["Say"]
    with pytest.raises(UserError, match="answered 0 of 20 prompts .*maximum context length is 8"):
        ask(strict, prompts_file, runs, most=20)


def test_nobody_there_and_too_few_prompts(
    prompts_file: Path, runs: list[CalibrationRun], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="does not answer"):
        check_served("http://127.0.0.1:9", str(prompts_file), runs=runs)
    with pytest.raises(UserError, match="has 3 prompts of use .* needs 8 at least"):
        ask(FakeVllm(), write_prompts(tmp_path / "few.jsonl", 3), runs)


@pytest.mark.parametrize(
    "url",
    [
        "http://me:pass%40word@box:8000/v1",
        "http://me:pass,word@box:8000",
        "http://me:pass/word@box",
        "https://box/v1?key=pass-word",
        "box:8000?key=pass@word#x",
    ],
)
def test_a_url_with_a_secret_is_refused_without_it(
    url: str, prompts_file: Path, runs: list[CalibrationRun]
) -> None:
    with pytest.raises(UserError, match="takes no user, password or query in a URL") as failed:
        check_served(url, str(prompts_file), runs=runs)
    assert "pass" not in str(failed.value).replace("password or query", "")
    assert "word" not in str(failed.value).replace("password or query", "")


def test_a_proxy_of_no_use_is_told_without_its_password(
    prompts_file: Path, runs: list[CalibrationRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "gopher://me:secret@proxy:1")
    with pytest.raises(UserError, match="a proxy named in the environment") as failed:
        check_served("http://box:8000", str(prompts_file), runs=runs)
    assert "secret" not in str(failed.value)


def test_a_server_that_repeats_the_key_or_writes_to_the_terminal(
    prompts_file: Path, runs: list[CalibrationRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "sk-SECRET-123"
    monkeypatch.setenv("REDRAFT_API_KEY", key)
    fake = FakeVllm()
    seen: list[str] = []

    def echo(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers["Authorization"])
        said = f"no \x1b]0;owned\x07 {seen[-1]} sk\\u002dSECRET-123 " + "x" * 400
        if request.url.path == where:
            return httpx.Response(status, json={"error": {"message": said}})
        return fake(request)

    for status in (400, 401, 500):
        for where in ("/v1/models", "/metrics", "/v1/chat/completions"):
            with pytest.raises(UserError) as failed:
                ask(echo, prompts_file, runs, most=16)
            told = str(failed.value)
            assert "no \\x1b]0;owned\\x07 Bearer *** *** xxx" in told, (status, where)
            assert key not in told
            assert "\x1b" not in told
            assert len(told) < 500
    assert set(seen) == {f"Bearer {key}"}
    named = httpx.Response(200, json={"data": [{"id": f"m {key}\x1b[2J"}]})
    found = ask(
        lambda r: named if r.url.path == "/v1/models" else fake(r), prompts_file, runs, most=16
    )
    assert found.model == "m ***\x1b[2J"
    out = io.StringIO()
    print_served(found, Console(file=out, width=200, highlight=False))
    assert "serves m ***\\x1b[2J with" in out.getvalue()


def test_a_reply_that_never_ends_is_given_up(
    prompts_file: Path, runs: list[CalibrationRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    def drops() -> Iterator[bytes]:
        while True:
            time.sleep(0.01)
            yield b" "

    monkeypatch.setattr(module, "REQUEST_SECONDS", 0.1)
    with pytest.raises(UserError, match=r"does not answer \(gave no whole reply within 0.1 s\)"):
        ask(lambda request: httpx.Response(200, content=drops()), prompts_file, runs)


def test_a_server_that_was_restarted_meanwhile(
    prompts_file: Path, runs: list[CalibrationRun]
) -> None:
    class Restarted(FakeVllm):
        def metrics(self) -> str:
            text = super().metrics()
            self.answered = 0
            return text

    fake = Restarted()
    fake.answered = 50
    with pytest.raises(UserError, match="went down while it was asked: it was restarted"):
        ask(fake, prompts_file, runs, most=16)


def test_odd_replies_end_in_a_sentence(prompts_file: Path, runs: list[CalibrationRun]) -> None:
    outcomes = collections.Counter[str]()
    began = time.monotonic()
    for seed in range(120):
        draw, fake = random.Random(seed), FakeVllm()
        odd = draw.choice(["/v1/models", "/metrics", "/v1/chat/completions"])
        after = draw.choice((0, 1, 3))

        def reply(
            request: httpx.Request, draw: Any = draw, fake: Any = fake, odd: str = odd
        ) -> httpx.Response:
            nonlocal after
            good = fake(request)
            after -= request.url.path == odd
            if request.url.path != odd or after >= 0:
                return good
            if odd == "/metrics":
                number = draw.choice(("1e999", ".", "-4", "NaN", "1e12", "0", "9" * 400, "7"))
                lines = good.text.splitlines()
                at = draw.randrange(len(lines))
                lines[at] = lines[at].rpartition(" ")[0] + " " + number
                return httpx.Response(200, text="\n".join(lines) + "\n")
            return httpx.Response(
                draw.choice((200, 200, 200, 400)), content=mutated(good.json(), draw)
            )

        try:
            found = ask(reply, prompts_file, runs, most=16)
            print_served(found, Console(file=io.StringIO(), width=200))
            outcomes["found"] += 1
        except UserError as problem:
            text = str(problem)
            assert visible(text) == text
            assert len(text.encode()) < 1500, text
            outcomes["sentence"] += 1
        except Exception as problem:
            raise AssertionError(f"seed {seed}: {problem!r}") from problem
    assert time.monotonic() - began < 60
    assert min(outcomes.values()) > 10, outcomes
