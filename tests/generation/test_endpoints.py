"""Answers through endpoints: nothing lost, nothing asked twice, whatever the servers do."""

from __future__ import annotations

import collections
import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from redraft.cli import command, main
from redraft.config import RegenerateConfig, read_endpoints, resolve
from redraft.core import console
from redraft.core.errors import UserError
from redraft.core.files import append_lines
from redraft.core.records import Answer, Prompt, to_json
from redraft.core.report_record import AdaptReport
from redraft.generation import endpoints, server_states
from redraft.generation import regenerate as regenerate_module
from redraft.generation.answer_file import endpoints_of, read_answers
from redraft.generation.regenerate import regenerate
from redraft.models.target import Target
from redraft.pipeline import adapt as pipeline
from redraft.prompts.prompts import read_prompts
from redraft.serving.client import connect_async, key_for
from redraft.serving.reply import seconds
from tests.conftest import write_prompts
from tests.generation.conftest import TOKENS, own, settings
from tests.generation.fake_openai import Brain, FakeOpenAI, Wrong


def check_whole(found: list[Answer], expected: dict[str, Answer]) -> None:
    """Every prompt answered once, as it should be."""
    assert [a.id for a in found] == list(dict.fromkeys(a.id for a in found))
    assert {a.id: a for a in found} == expected


def test_answers_are_those_of_this_process(
    target: Target, prompts: list[Prompt], brain: Brain, tmp_path: Path, told: list[str]
) -> None:
    with FakeOpenAI(brain).running() as server:
        found = regenerate(target, prompts, tmp_path / "a.jsonl", settings(server))
        again = regenerate(target, prompts, tmp_path / "a.jsonl", settings(server))
    check_whole(found, own(target, prompts, tmp_path))
    assert again == found
    assert server.checks == 1, "a file that is complete was asked about"
    assert set(server.asked.values()) == {1}
    body = server.bodies[0]
    assert body["return_token_ids"]
    assert body["stop_token_ids"] == list(target.stop_ids)
    assert (body["temperature"], body["top_k"], body["repetition_penalty"]) == (0.0, -1, 1.0)
    assert "seed" not in body
    about = endpoints_of(tmp_path / "a.jsonl")[server.url]
    assert about["token_ids"] == "from the server"
    assert about["compared_tokens"] > 32
    assert about["logprob_difference"] < 1e-3
    assert f"{server.url}: 'tiny' is the target (log-probabilities 0.0000 nats apart" in told[0]
    assert not any("NOTE" in line for line in told)


def test_a_turn_too_long_for_the_server_ends_its_conversation(
    target: Target, tmp_path: Path, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    often = tuple(range(2, target.vocab_size, 3))  # so that a random model ends its answers
    monkeypatch.setattr(Target, "stop_ids", property(lambda self: often))
    brain = Brain(target, 150)
    words = "more "
    for name, times in (("long", 2), ("short", 1)):
        write_talk(tmp_path / f"{name}.jsonl", name, [words, words * 8 * times])
    talks = [
        read_prompts(str(tmp_path / f"{name}.jsonl"), target).prompts[0]
        for name in ("long", "short")
    ]
    out, whole = tmp_path / "a.jsonl", own(target, talks, tmp_path, max_new_tokens=150)
    context = len(whole["long#2"].prompt) + 31  # one less than a prompt has to leave room for
    assert len(whole["short#2"].prompt) + 32 <= context, "the short one fits to its end"
    with FakeOpenAI(brain, context=context).running() as server:
        config = settings(server, max_new_tokens=150)
        found = {a.id for a in regenerate(target, talks, out, config)}
    assert found == {"long", "short", "short#2"}
    (line,) = [line for line in told if "end early" in line]
    assert f"the endpoints' context is {context}" in line
    # a run that is continued knows the context, though no server of it is asked again
    kept = [line for line in out.read_text().splitlines(keepends=True) if "#" not in line]
    out.write_text("".join(kept))
    with FakeOpenAI(brain, context=context).running() as server:
        again = regenerate(target, talks, out, settings(server, max_new_tokens=150))
    assert {a.id for a in again} == found


def test_places_are_kept_full_and_bounded(
    target: Target, prompts: list[Prompt], brain: Brain, tmp_path: Path
) -> None:
    with FakeOpenAI(brain, wrong=lambda n, b: Wrong(delay=0.05)).running() as server:
        regenerate(target, prompts, tmp_path / "a.jsonl", settings(server, concurrency=7))
    assert server.most == 7


def test_sampled_answers_are_seeded_by_prompt_and_say_how_they_were_drawn(
    target: Target, prompts: list[Prompt], brain: Brain, tmp_path: Path
) -> None:
    changes = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1}
    with FakeOpenAI(brain).running() as server:
        found = regenerate(target, prompts, tmp_path / "a.jsonl", settings(server, **changes))
        regenerate(target, prompts, tmp_path / "b.jsonl", settings(server, seed=1, **changes))
    asked = server.bodies[0]
    assert {name: asked[name] for name in changes} == changes
    seeds = [body["seed"] for body in server.bodies]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 1 << 31 for seed in seeds)
    a = found[0]
    assert (a.temperature, a.top_k, a.top_p, a.min_p, a.seed) == (0.7, 5, 0.9, 0.1, None)


# -- servers that fail ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        Wrong(500),
        Wrong(503),
        Wrong(408),
        Wrong(429, (("Retry-After", "0.05"),)),
        Wrong(429),
        Wrong(503, (("Retry-After", "Wed, 21 Oct 2015 07:28:00 GMT"),)),
        Wrong(half=True),
        Wrong(text="<html>gateway</html>"),
        Wrong(text="[1, 2]"),
        Wrong(text="{}"),
        Wrong(text='{"choices": []}'),
        Wrong(text='{"choices": [{"text": "x", "token_ids": [5, 6], "finish_reason": "abort"}]}'),
        Wrong(text='{"choices": [{"text": "", "token_ids": [], "finish_reason": "length"}]}'),
        Wrong(text='{"choices": [{"text": "x", "token_ids": [9999], "finish_reason": "stop"}]}'),
        Wrong(text='{"choices": [{"finish_reason": "stop"}]}'),
        Wrong(delay=1.5),
    ],
    ids=lambda w: f"{w.status}-{w.half}-{w.delay}-{(w.text or '')[:24]}-{len(w.headers)}",
)
def test_a_failure_now_and_then_costs_no_answer(
    target: Target, prompts: list[Prompt], brain: Brain, tmp_path: Path, wrong: Wrong
) -> None:
    server = FakeOpenAI(brain, wrong=lambda n, b: wrong if n % 5 == 1 else None)
    with server.running():
        seconds = 0.8 if wrong.delay else 60.0
        found = regenerate(target, prompts, tmp_path / "a.jsonl", settings(server, timeout=seconds))
    check_whole(found, own(target, prompts, tmp_path))
    failed = len([n for n in range(1, len(server.bodies) + 1) if n % 5 == 1])
    assert sum(server.asked.values()) == len(prompts) + failed


def test_one_of_two_is_down_and_the_other_takes_its_work(
    target: Target, prompts: list[Prompt], brain: Brain, tmp_path: Path, told: list[str]
) -> None:
    slow = {"wrong": lambda n, b: Wrong(delay=0.03)}
    with FakeOpenAI(brain, **slow).running() as good, FakeOpenAI(brain, **slow).running() as dying:

        def kill(answers: list[Answer]) -> None:
            if answers and dying._server is not None:
                dying.die()

        config = settings(good, dying, concurrency=2)
        found = regenerate_watching(kill, target, prompts, tmp_path / "a.jsonl", config)
    check_whole(found, own(target, prompts, tmp_path))
    (line,) = [line for line in told if "its work goes to" in line]
    assert line.startswith(f"{dying.url} ")
    assert line.endswith("; its work goes to the 1 healthy ones")


def test_a_server_that_dies_and_comes_back_goes_on(
    target: Target, prompts: list[Prompt], brain: Brain, tmp_path: Path, told: list[str]
) -> None:
    with FakeOpenAI(brain, wrong=lambda n, b: Wrong(delay=0.02)).running() as server:

        def restart(answers: list[Answer]) -> None:
            if answers and server._server is not None and server.checks == 1:
                server.die()
                threading.Timer(0.4, server.start).start()

        found = regenerate_watching(
            restart, target, prompts, tmp_path / "a.jsonl", settings(server)
        )
        check_whole(found, own(target, prompts, tmp_path))
        assert server.checks >= 2, "what comes back has to be checked again"
    assert any("waiting up to 5 s for an endpoint" in line for line in told)
    assert f"{server.url} answers again" in told
    assert max(server.asked.values()) <= 2  # only what was under way is asked again


def test_every_place_works_again_after_a_restart(
    target: Target, prompts: list[Prompt], brain: Brain, tmp_path: Path
) -> None:
    """All requests fail at once when a server is killed, which must not send its places to sleep."""
    with FakeOpenAI(brain, wrong=lambda n, b: Wrong(delay=0.1)).running() as server:

        def restart(answers: list[Answer]) -> None:
            if answers and server.checks == 1:
                server.die()
                time.sleep(0.2)
                server.most = 0
                server.start()

        config = settings(server, concurrency=6)
        regenerate_watching(restart, target, prompts, tmp_path / "a.jsonl", config)
    assert server.most == 6


def test_another_model_after_the_restart_is_not_asked(
    target: Target, prompts: list[Prompt], brain: Brain, other: Target, tmp_path: Path
) -> None:
    expected = own(target, prompts, tmp_path)
    with FakeOpenAI(brain, wrong=lambda n, b: Wrong(delay=0.02)).running() as server:

        def exchange(answers: list[Answer]) -> None:
            if answers and server.brain is brain:
                server.die()
                server.brain = Brain(other)
                threading.Timer(0.2, server.start).start()

        with pytest.raises(UserError, match="its model 'tiny' is not the target"):
            regenerate_watching(exchange, target, prompts, tmp_path / "a.jsonl", settings(server))
        kept = read_answers(tmp_path / "a.jsonl")
        assert 0 < len(kept) < len(prompts)
        assert all(expected[a.id] == a for a in kept)
        server.die()
        server.brain = brain
        server.start()
        asked = dict(server.asked)
        found = regenerate(target, prompts, tmp_path / "a.jsonl", settings(server))
        check_whole(found, expected)
        assert all(server.asked[a.prompt] == asked[a.prompt] for a in kept)


def test_down_for_good_says_what_is_written_and_what_to_do(
    target: Target, prompts: list[Prompt], brain: Brain, tmp_path: Path
) -> None:
    with FakeOpenAI(brain, wrong=lambda n, b: Wrong(delay=0.02)).running() as server:

        def kill(answers: list[Answer]) -> None:
            if answers and server._server is not None:
                server.die()

        config = settings(server, patience=0.3)
        with pytest.raises(UserError) as failed:
            regenerate_watching(kill, target, prompts, tmp_path / "a.jsonl", config)
    kept = len(read_answers(tmp_path / "a.jsonl"))
    text = str(failed.value)
    refused = os.strerror(errno.ECONNREFUSED)
    assert text.startswith(
        f"no endpoint answered for 0.3 s:\n  {server.url} cannot be reached ({refused})"
    )
    assert (
        f"{kept} answers of this run are written, {len(prompts) - kept} are missing: run the same "
        "command again" in text
    )


def test_never_there_is_told_soon(
    target: Target, prompts: list[Prompt], brain: Brain, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(endpoints, "START_PATIENCE", 0.2)
    server = FakeOpenAI(brain)
    server.port = 9  # nobody listens there
    with pytest.raises(UserError, match=r"no endpoint answered for 0.2 s:\n.*cannot be reached"):
        regenerate(target, prompts, tmp_path / "a.jsonl", settings(server, patience=60.0))


def test_busy_for_ever_runs_out_of_patience(
    target: Target, prompts: list[Prompt], brain: Brain, tmp_path: Path
) -> None:
    with FakeOpenAI(brain, wrong=lambda n, b: Wrong(429)).running() as server:
        with pytest.raises(UserError, match=r"is busy \(HTTP 429: no\)\n0 answers"):
            regenerate(target, prompts, tmp_path / "a.jsonl", settings(server, patience=0.4))


def test_the_pause_that_a_server_asks_for_is_kept(
    target: Target, prompts: list[Prompt], brain: Brain, tmp_path: Path
) -> None:
    times: list[float] = []

    def busy_once(number: int, body: dict[str, Any]) -> Wrong | None:
        times.append(time.monotonic())
        return Wrong(429, (("Retry-After", "0.5"),)) if number == 1 else None

    with FakeOpenAI(brain, wrong=busy_once).running() as server:
        regenerate(target, prompts[:4], tmp_path / "a.jsonl", settings(server, concurrency=1))
    assert times[1] - times[0] >= 0.5
    assert server.checks == 1


@pytest.mark.parametrize(("status", "times"), [(400, 1), (500, server_states.TRIES)])
def test_a_prompt_that_cannot_be_answered_is_named_and_holds_up_nothing(
    target: Target, prompts: list[Prompt], brain: Brain, tmp_path: Path, status: int, times: int
) -> None:
    bad = prompts[5]

    def poison(number: int, body: dict[str, Any]) -> Wrong | None:
        return Wrong(status) if tuple(body["prompt"]) == bad.tokens else None

    server = FakeOpenAI(brain, wrong=poison)
    with server.running():
        with pytest.raises(UserError) as failed:
            regenerate(target, prompts, tmp_path / "a.jsonl", settings(server))
        assert server.asked[bad.tokens] == times
        assert f"1 of {len(prompts)} prompts got no answer (first: {bad.id}: " in str(failed.value)
        assert f"HTTP {status}" in str(failed.value)
        assert len(read_answers(tmp_path / "a.jsonl")) == len(prompts) - 1
        server.wrong = lambda n, b: None
        before = sum(server.asked.values())
        found = regenerate(target, prompts, tmp_path / "a.jsonl", settings(server))
    assert sum(server.asked.values()) == before + 1
    check_whole(found, own(target, prompts, tmp_path))


# -- resuming -------------------------------------------------------------------------------------


def test_a_file_may_be_begun_here_and_continued_there(
    target: Target, prompts: list[Prompt], brain: Brain, tmp_path: Path
) -> None:
    path = tmp_path / "own.jsonl"
    expected = own(target, prompts, tmp_path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:9]) + lines[9][:20])
    with FakeOpenAI(brain).running() as server:
        check_whole(regenerate(target, prompts, path, settings(server)), expected)
    assert len(server.asked) == len(prompts) - 9
    assert list(endpoints_of(path)) == [server.url]
    check_whole(list(own(target, prompts, tmp_path).values()), expected)
    assert list(endpoints_of(path)) == [server.url]


def test_ctrl_c_loses_only_what_is_under_way(
    target: Target, prompts: list[Prompt], brain: Brain, tmp_path: Path
) -> None:
    with FakeOpenAI(brain, wrong=lambda n, b: Wrong(delay=0.05)).running() as server:

        def interrupt(answers: list[Answer]) -> None:
            if answers:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            regenerate_watching(interrupt, target, prompts, tmp_path / "a.jsonl", settings(server))
        assert not [t for t in threading.enumerate() if t.name == "endpoints"]
        kept = read_answers(tmp_path / "a.jsonl")
        assert 0 < len(kept) < len(prompts)
        found = regenerate(target, prompts, tmp_path / "a.jsonl", settings(server))
    check_whole(found, own(target, prompts, tmp_path))
    check_asked_once(server, kept)


def check_asked_once(server: FakeOpenAI, kept: list[Answer]) -> None:
    twice = [a.id for a in kept if server.asked[a.prompt] != 1]
    assert not twice, f"asked again although written: {twice}"


def test_asking_again_would_be_seen(
    target: Target, prompts: list[Prompt], brain: Brain, tmp_path: Path, monkeypatch: Any
) -> None:
    """The check of the tests above, on a backend that forgets what is written."""
    with FakeOpenAI(brain).running() as server:
        regenerate(target, prompts[:10], tmp_path / "a.jsonl", settings(server))
        kept = read_answers(tmp_path / "a.jsonl")
        about = tmp_path / "a.about.json"
        about.unlink()
        (tmp_path / "a.jsonl").rename(tmp_path / "part.jsonl")
        regenerate(target, prompts[:1], tmp_path / "a.jsonl", settings(server))
        monkeypatch.setattr(
            regenerate_module, "_unanswered", lambda prompts, *_: range(len(prompts))
        )
        monkeypatch.setattr(regenerate_module, "claim", lambda out, inputs, prompts, **_: prompts)
        regenerate(target, prompts, tmp_path / "a.jsonl", settings(server))
    with pytest.raises(AssertionError, match="asked again although written"):
        check_asked_once(server, kept)


@pytest.mark.slow
def test_a_killed_command_is_continued_without_asking_twice(
    target: Target, target_folder: Path, brain: Brain, tmp_path: Path
) -> None:
    """SIGKILL of the real command line, with the key nowhere in what it leaves or says."""
    source, out = write_prompts(tmp_path / "p.jsonl", 24), tmp_path / "run" / "a.jsonl"
    secret = "sk-sesame-0123456789"
    with FakeOpenAI(brain, key=secret, wrong=lambda n, b: Wrong(delay=0.1)).running() as server:
        command = [
            *(sys.executable, "-m", "redraft", "regenerate", "--target", str(target_folder)),
            *("--prompts", str(source), "--out", str(out), "--max-new-tokens", str(TOKENS)),
            *("--endpoint", server.url + "/v1/", "--concurrency", "2"),
        ]
        environment = {**os.environ, "REDRAFT_API_KEY": secret, "OMP_NUM_THREADS": "1"}
        first = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        while not out.exists() or len(out.read_text().splitlines()) < 5:
            assert first.poll() is None, first.communicate()[1]
            time.sleep(0.01)
        first.send_signal(signal.SIGKILL)
        printed = first.communicate()[1]
        kept = read_answers(out)
        assert 5 <= len(kept) < 24
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    check_asked_once(server, kept)
    found = read_answers(out)
    assert len({a.id for a in found}) == len(found) == 24
    for path in [p for p in tmp_path.rglob("*") if p.is_file()]:
        assert secret not in path.read_text(), path
    assert secret not in printed + done.stdout + done.stderr
    assert collections.Counter(h.get("Authorization") for h in server.headers) == {
        f"Bearer {secret}": len(server.headers)
    }


def test_answers_are_written_while_others_are_under_way(
    target: Target, prompts: list[Prompt], brain: Brain, tmp_path: Path
) -> None:
    """One very slow answer does not keep the finished ones from the disk."""
    path, slow = tmp_path / "a.jsonl", prompts[0].tokens
    seen: list[int] = []

    def wrong(number: int, body: dict[str, Any]) -> Wrong | None:
        if tuple(body["prompt"]) == slow:
            time.sleep(0.8)
            seen.append(len(path.read_text().splitlines()))
        return None

    with FakeOpenAI(brain, wrong=wrong).running() as server:
        regenerate(target, prompts, path, settings(server))
    assert seen == [len(prompts) - 1]


def test_rounds_share_one_check(
    target: Target, prompts: list[Prompt], brain: Brain, tmp_path: Path
) -> None:
    """A conversation is answered in rounds; the second does not look at the servers again."""
    with FakeOpenAI(brain).running() as server:
        pool = endpoints.Endpoints(target, settings(server))
        first = [a for answers in pool.answers(prompts[:10]) for a in answers]
        second = [a for answers in pool.answers(prompts[10:]) for a in answers]
        assert list(pool.answers([])) == []
    assert server.checks == 1
    check_whole(first + second, own(target, prompts, tmp_path))


@pytest.mark.slow
def test_adapt_asks_the_endpoints_for_what_it_trains_on(
    target: Target, draft_folder: Path, brain: Brain, tmp_path: Path, told: list[str]
) -> None:
    source, run = write_prompts(tmp_path / "p.jsonl", 24), tmp_path / "run"
    changes = {
        "regenerate.max_new_tokens": 12,
        "train.width": 4,
        "train.epochs": 1,
        "train.rollout": 2,
        "train.evaluations": 1,
        "measure.k": 2,
        "measure.eval_limit": 4,
        "measure.heldout": 4,
        "measure.eval_new_tokens": 10,
    }
    with FakeOpenAI(brain).running() as server:
        layers = [("test", {**changes, "regenerate.endpoints": server.url})]
        result = pipeline.adapt(
            target, str(draft_folder), str(source), out=run, config=resolve(layers)
        )
        moved = [("test", {**changes, "regenerate.endpoints": "http://127.0.0.1:9"})]
        again = pipeline.adapt(
            target, str(draft_folder), str(source), out=run, config=resolve(moved)
        )
    files = {n: read_answers(run / "answers" / f"{n}.jsonl") for n in ("adapt", "heldout", "eval")}
    assert set(server.asked) == {a.prompt for a in files["adapt"]}
    assert result.worked
    assert not again.worked, "another address of the same answers is no reason to ask again"
    assert all(len(a.tokens) > a.length for a in files["eval"]), "measured without an lookahead"
    assert list(result.report.prompts["answered_by_endpoints"]) == [server.url]
    page = (run / "report.html").read_text()
    assert f"at <code>{server.url}</code> (not repeatable bit for bit)" in page
    assert list(AdaptReport.from_json(to_json(result.report)).prompts["answered_by_endpoints"])


def test_flags_of_both_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """--endpoint may be given several times, and each setting of the pool has its flag."""
    seen: dict[str, Any] = {}

    def stop(layers: Any) -> Any:
        seen.update(layers[-1][1])
        raise UserError("seen")

    flags = "--endpoint http://a:1 --endpoint http://b:2/v1 --concurrency 5 --timeout 9 "
    flags += "--endpoint-model tuned"
    for line in (
        f"regenerate --target T --prompts P --out O {flags} --patience 3",
        f"adapt --target T --draft D --prompts P --out O {flags}",
    ):
        seen.clear()
        with monkeypatch.context() as patch:
            patch.setattr(command, "resolve", stop)
            patch.setattr(sys, "argv", ["redraft", *line.split()])
            with pytest.raises(SystemExit):
                main()
        assert seen["regenerate.endpoints"] == "http://a:1,http://b:2/v1"
        assert seen["regenerate.endpoint_model"] == "tuned"
        assert (seen["regenerate.concurrency"], seen["regenerate.timeout"]) == (5, 9.0)
    assert read_endpoints(seen["regenerate.endpoints"]) == ("http://a:1", "http://b:2")


# -- settings and secrets -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("http://me:secret@host:1/v1", r"takes no user, password.*give http://host:1/v1 and put"),
        ("https://host/v1?key=secret", r"takes no user, password or query.*REDRAFT_API_KEY"),
        ("host:8000", r"takes URLs of OpenAI-compatible servers.*got 'host:8000'"),
        ("ftp://host/v1", r"got 'ftp://host/v1'"),
        ("http://a:1,http://a:1/v1/", r"names http://a:1 twice; --concurrency"),
        ("http://me:se,secret@host:1", r"takes no user, password.*give the rest and put"),
        ("http://me:secret/x@host:1", r"takes no user, password.*give the rest and put"),
        ("http://me:secret?x@host:1", r"takes no user, password.*give the rest and put"),
        ("https://host/v1?key=a@secret", r"takes no user, password.*give the rest and put"),
        ("me:secret@host:8000", r"takes no user, password.*give the rest and put"),
        ("http://host:80a0", r"takes URLs of .*got 'http://host:80a0'"),
        ("http://[::", r"takes URLs of .*got 'http://\[::'"),
    ],
)
def test_urls_that_cannot_be_used(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as failed:
        resolve([("flag", {"regenerate.endpoints": text})])
    assert "secret" not in str(failed.value)


def test_settings_that_do_not_go_together(
    target: Target, prompts: list[Prompt], tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    config = settings(endpoints="http://127.0.0.1:9")
    with pytest.raises(UserError, match="--lookahead takes a number of tokens, 0 or more; got -1"):
        regenerate(target, prompts, tmp_path / "a.jsonl", config, lookahead=-1)
    with pytest.raises(UserError, match="answers=original takes the answers in the prompts file"):
        original = dataclasses.replace(config, answers="original")
        regenerate(target, prompts, tmp_path / "a.jsonl", original)
    command = (
        "redraft regenerate --target T --prompts P --out O --answers original --endpoint http://a:1"
    )
    monkeypatch.setattr(sys, "argv", command.split())
    monkeypatch.setattr(console.console, "quiet", False)
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert "so no endpoint is asked" in capsys.readouterr().err


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert key_for("http://gpu-box:8000") is None
    monkeypatch.setenv("OPENAI_API_KEY", "sk-other")
    assert key_for("https://host") == "sk-other"
    assert key_for("http://127.0.0.1:8000") == "sk-other"
    assert key_for("http://gpu-box:8000") is None, "another server's key went out in the clear"
    monkeypatch.setenv("REDRAFT_API_KEY", " sk-own\n")
    assert key_for("http://gpu-box:8000") == "sk-own"
    monkeypatch.setenv("REDRAFT_API_KEY", "sk own")
    with pytest.raises(UserError, match="REDRAFT_API_KEY holds characters") as failed:
        key_for("http://gpu-box:8000")
    assert "sk own" not in str(failed.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, r"wants an API key \(HTTP 401: Incorrect.*environment variable REDRAFT_API_KEY"),
        ("sk-wrong", r"refuses the API key in REDRAFT_API_KEY or .*Incorrect.*provided: \*\*\*"),
    ],
)
def test_a_wrong_key_is_told_without_it(
    target: Target,
    prompts: list[Prompt],
    brain: Brain,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: str | None,
    message: str,
) -> None:
    if given:
        monkeypatch.setenv("REDRAFT_API_KEY", given)
    with FakeOpenAI(brain, key="sk-right").running() as server:
        with pytest.raises(UserError, match=message) as failed:
            regenerate(target, prompts, tmp_path / "a.jsonl", settings(server))
    assert "sk-wrong" not in str(failed.value)
    assert not server.asked


def test_proxies_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "gopher://me:secret@proxy:1")
    with pytest.raises(UserError, match="a proxy named in the environment") as failed:
        connect_async("http://gpu-box:8000", 1.0)
    assert "secret" not in str(failed.value)
    assert connect_async("http://127.0.0.1:8000", 1.0) is not None


def test_pauses_as_servers_write_them() -> None:
    assert seconds("7") == 7
    assert seconds("1e9") == 3600
    assert seconds("-3") == 0
    assert seconds("nan") is None
    assert seconds("soon") is None
    assert seconds("Wed, 21 Oct 2015 07:28:00 GMT") == 0


def write_talk(path: Path, name: str, turns: list[str]) -> None:
    """A conversation of user turns, each answered with a word."""
    messages = []
    for text in turns:
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": "A"})
    path.write_text(json.dumps({"id": name, "messages": messages}) + "\n")


def regenerate_watching(
    watch: Callable[[list[Answer]], None],
    target: Target,
    prompts: list[Prompt],
    out: Path,
    config: RegenerateConfig,
) -> list[Answer]:
    """Regenerate, with `watch` called after each write."""

    def append(path: Path, lines: list[str]) -> None:
        append_lines(path, lines)
        watch([Answer.from_line(line) for line in lines])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regenerate_module, "append_lines", append)
        return regenerate(target, prompts, out, config)
