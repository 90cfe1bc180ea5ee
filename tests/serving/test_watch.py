"""A watch reads counters, survives restarts and silence, and goes on with the looks that it kept."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from redraft.cli.app import app
from redraft.core.errors import UserError
from redraft.core.lock import held
from redraft.metrics.drift import FALLEN, LEARNING, STEADY, Seen
from redraft.serving import watch as watch_module
from redraft.serving.client import connect
from redraft.serving.watch import expected_of_run, line_of, watch, write_metrics

URL = "http://127.0.0.1:9"
NAMES = ("drafts", "draft_tokens", "accepted_tokens")
HIGH, LOW = (60, 30), (40, 8)
"""Accepted tokens at two positions, of 100 steps."""


def page(total: Iterable[int], positions: Iterable[int]) -> str:
    lines = [
        f'vllm:spec_decode_num_{n}_total{{engine="0"}} {v}'
        for n, v in zip(NAMES, total, strict=True)
    ]
    lines += [
        f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",position="{at}"}} {v}'
        for at, v in enumerate(positions)
    ]
    return "\n".join(lines) + "\n"


class Server:
    """Counters that grow by a row of `script` at each reading; a text or a status in it is the reply."""

    def __init__(self, script: Iterable[Any]):
        self.script: Iterator[Any] = iter(script)
        self.total, self.positions = [0, 0, 0], [0, 0]

    def __call__(self, request: httpx.Request) -> httpx.Response:
        assert request.url.path == "/metrics"
        row = next(self.script)
        if row == "restart":
            self.total, self.positions = [0, 0, 0], [0, 0]
            row = HIGH
        if row == "away":
            raise httpx.ConnectError("refused")
        if isinstance(row, str):
            return httpx.Response(200, text=row)
        if row is not None:
            steps = row[2] if len(row) > 2 else 100
            for at in (0, 1):
                self.positions[at] += row[at]
            self.total = [
                n + more
                for n, more in zip(self.total, (steps, 2 * steps, sum(row[:2])), strict=True)
            ]
        return httpx.Response(200, text=page(self.total, self.positions))


def looked(script: Iterable[Any], looks: int, **how: Any) -> list[Seen]:
    settings = {"every": 1.0, "drop": 0.1, "between_alarms": 1000.0, "learn": 8, **how}
    at = iter(range(10**6))
    return list(
        watch(
            URL,
            looks=looks,
            transport=httpx.MockTransport(Server(script)),
            pause=lambda seconds: None,
            clock=lambda: float(next(at)),
            **settings,
        )
    )


def test_a_fall_ends_in_an_alarm_and_its_end_in_none() -> None:
    seen = looked([None, *[HIGH] * 12, *[LOW] * 6, *[HIGH] * 12], 30)
    states = [one.state for one in seen]
    assert states[:8] == [LEARNING] * 7 + [STEADY]
    assert states[11] == STEADY
    assert FALLEN in states[12:16]
    assert states[-1] == STEADY
    assert seen[0].tau == pytest.approx(1.9)
    first = states.index(FALLEN)
    assert "since" in line_of(seen[first])
    assert seen[first].since == 12.0


def test_a_restart_silence_and_empty_pages_cost_looks_only() -> None:
    script = [None, *[HIGH] * 9, "restart", "away", "nothing here", *[HIGH] * 4]
    seen = looked(script, 13)
    assert [one.tau for one in seen] == pytest.approx([1.9] * 13)
    # the look after the silence holds what was counted in between
    assert [one.look.drafts for one in seen][9] == 100


def test_another_number_of_drafted_tokens_is_learned_afresh(tmp_path: Path) -> None:
    """A server that is started again with another K; the looks before it are no measure."""
    server = Server([None, *[HIGH] * 9])
    longer = [page((100 * n, 300 * n, 120 * n), (60 * n, 40 * n, 20 * n)) for n in range(10)]
    server.script = iter([None, *[HIGH] * 9, *longer])
    file = tmp_path / "looks.jsonl"
    how = {"every": 1.0, "drop": 0.1, "between_alarms": 1000.0, "learn": 8, "out": file}
    seen = list(
        watch(URL, looks=18, transport=httpx.MockTransport(server), pause=lambda s: None, **how)
    )
    assert seen[8].state == STEADY
    assert [one.state for one in seen[9:16]] == [LEARNING] * 7
    assert seen[17].state == STEADY
    again = Server([])
    again.script = iter([longer[0], longer[1]])
    (one,) = watch(URL, looks=1, transport=httpx.MockTransport(again), pause=lambda s: None, **how)
    assert one.state == STEADY  # of the nine with this K


def test_a_new_process_is_seen_by_its_start() -> None:
    """Its counters may be ahead of the old one's."""
    pages = [page((n, 2 * n, n // 2), (n // 3, n // 6)) for n in (600, 1200, 1260, 1400)]
    starts = ("1.5e9", "1.5e9", "1.6e9", "1.6e9")
    script = [
        f"{text}process_start_time_seconds {at}\n" for text, at in zip(pages, starts, strict=True)
    ]
    seen = looked(script, 2)
    assert [one.look.drafts for one in seen] == [600, 140]  # not 60, the difference


def test_a_file_of_something_else_stays_as_it_was_found(tmp_path: Path) -> None:
    file = tmp_path / "notes.yaml"
    for text in ("a: 1\nb: 2", "a: 1", "5\n", '{"endpoint": "x"}\n'):
        file.write_text(text)
        with pytest.raises(UserError, match="no look of redraft watch"):
            looked([None, HIGH], 1, out=file)
        assert file.read_text() == text


def test_few_steps_wait_for_more() -> None:
    seen = looked([None, (12, 6, 20), (12, 6, 20), (12, 6, 20), HIGH], 2)
    assert [one.look.drafts for one in seen] == [60, 100]


def test_kept_looks_are_gone_on_with(tmp_path: Path) -> None:
    file = tmp_path / "looks.jsonl"
    script = [None, *[HIGH] * 12, *[LOW] * 3]
    whole = looked(script, 15)
    looked([None, *[HIGH] * 10], 10, out=file)
    rest = looked([None, *[HIGH] * 2, *[LOW] * 3], 5, out=file)
    assert [(s.state, s.evidence) for s in rest] == [(s.state, s.evidence) for s in whole[10:]]
    assert len(file.read_text().splitlines()) == 15
    row = json.loads(file.read_text().splitlines()[0])
    whole_text = file.read_text()
    file.write_text(whole_text + '{"endpoint": "http://12')  # a writer that was cut off
    looked([None, HIGH], 1, out=file)
    assert len(file.read_text().splitlines()) == 16
    with held(file), pytest.raises(UserError, match="another redraft process"):
        looked([None, HIGH], 1, out=file)
    assert row["endpoint"] == URL
    file.write_text(json.dumps({**row, "endpoint": "http://other"}) + "\n")
    with pytest.raises(UserError, match="line 1: a look at http://other"):
        looked([None, HIGH], 1, out=file)
    file.write_text("{}\n")
    with pytest.raises(UserError, match="line 1: no look"):
        looked([None, HIGH], 1, out=file)


@pytest.mark.parametrize(
    ("script", "says"),
    [
        (["away"], "does not answer"),
        (["vllm:num_requests 1\n"], "holds no counters of vLLM's speculation"),
    ],
)
def test_a_server_that_cannot_be_watched_is_a_sentence(script: list[Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        looked(script, 1)


def report(folder: Path, **more: Any) -> Path:
    after = {
        "tau": 2.2,
        "ci": [2.0, 2.4],
        "accepted": 120,
        "steps": 100,
        "prompts": 8,
        "excluded": 0,
        "k": 4,
        "temperature": 0.0,
        "per_position": [0.6, 0.5, 0.5, 0.5],
        "loop_rate": 0.0,
        "mode": "replay",
        "seconds": 1.0,
        **more,
    }
    train = {
        **dict.fromkeys(("trained_parameters", "draft_parameters", "steps", "planned_steps"), 1),
        **dict.fromkeys(
            ("supervised_tokens", "unique_answer_tokens", "final_loss", "best_step"), 1
        ),
        **dict.fromkeys(("seconds", "tokens_per_second", "predicted_peak_mb", "peak_mb"), 1.0),
        "method": "body",
        "heldout_tau": [],
        "precision": "fp32",
        "stopped_early": False,
    }
    row = {
        **dict.fromkeys(("target", "shared", "adapter", "draft"), "x"),
        "prompts": {},
        "before": after,
        "after": after,
        "off_domain": {},
        "train": train,
        "cost": {},
        "config": {},
        "origins": {},
        "versions": {},
    }
    folder.mkdir(exist_ok=True)
    (folder / "report.json").write_text(json.dumps(row))
    return folder


def test_a_runs_tau_is_that_of_as_many_tokens(tmp_path: Path) -> None:
    folder = report(tmp_path / "run")
    assert expected_of_run(folder, 4) == pytest.approx(1 + (0.6 + 0.3 + 0.15 + 0.075) / 1.2 * 1.0)
    assert expected_of_run(folder, 2) == pytest.approx(1 + 0.9 / 1.2)
    with pytest.raises(UserError, match="drafts 5 tokens and .* was measured with 4"):
        expected_of_run(folder, 5)
    (folder / "report.json").write_text("{}")
    with pytest.raises(UserError, match="holds no report"):
        expected_of_run(folder, 4)


def test_the_command_ends_at_an_alarm_and_leaves_gauges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = httpx.MockTransport(Server([None, *[LOW] * 40]))
    monkeypatch.setattr(
        watch_module,
        "connect",
        lambda url, seconds, key, transport: connect(url, seconds, key, server),
    )
    gauges = tmp_path / "redraft.prom"
    words = ["--endpoint", f"{URL}/v1", "--run", str(report(tmp_path / "run")), "--every", "0.1"]
    words += ["--learn", "8", "--until-alarm", "--metrics-file", str(gauges), "--json"]
    done = CliRunner().invoke(app, ["watch", *words])
    assert done.exit_code == 3, done.output
    found = json.loads(done.stdout)
    assert (found["state"], found["endpoint"]) == (FALLEN, URL)
    assert found["expected"] == pytest.approx(1.75)
    text = gauges.read_text()
    assert f'redraft_fallen{{endpoint="{URL}"}} 1\n' in text
    assert f'redraft_tau{{endpoint="{URL}"}} 1.48\n' in text


def test_gauges_leave_out_what_is_not_known(tmp_path: Path) -> None:
    (seen,) = looked([None, HIGH], 1)
    write_metrics(tmp_path / "m", seen, URL)
    assert "tau_expected" not in (tmp_path / "m").read_text()
