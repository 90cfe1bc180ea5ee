"""`redraft watch`: a serving vLLM's counters, look by look, and the alarm when acceptance falls.

Looks are kept in a file, so that a watch goes on where it stopped with all that it learned. A server that does not answer, or
starts again, costs looks and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import httpx

from ..core.console import say
from ..core.errors import UserError
from ..core.files import append_lines, finish_lines, write_text
from ..core.folders import read_json
from ..core.lock import held
from ..core.report_record import AdaptReport
from ..metrics.drift import FALLEN, Drift, Look, Seen
from .client import Client, connect, key_for
from .counters import Counters, read_counters
from .reply import Trouble

REQUEST_SECONDS = 30.0
FEWEST_STEPS = 50
"""Steps that a look holds at least; fewer are added to the next one."""
NO_COUNTERS = "holds no counters of vLLM's speculation (vllm:spec_decode_num_drafts_total)"


def expected_of_run(folder: Path, positions: int) -> float:
    """The lower end of the adapted draft's tau in a run of `redraft adapt`, for a server that drafts so many tokens.

    Raises UserError for no such run, and where it was measured with fewer tokens than the server drafts.
    """
    try:
        after = AdaptReport.from_json(read_json(folder / "report.json")).after
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        raise UserError(f"{folder} holds no report of redraft adapt ({problem!r})") from None
    if positions > after.k:
        raise UserError(
            f"the server drafts {positions} tokens and {folder} was measured with {after.k}, so its tau is no measure for "
            "it; name the tau that is expected with --expected, or leave both out to learn it"
        )
    reached, fewer = 1.0, 0.0
    for rate in after.per_position[:positions]:
        reached *= rate
        fewer += reached
    share = fewer / (after.tau - 1) if after.tau > 1 else 1.0
    return 1 + (after.ci[0] - 1) * share


def watch(
    url: str,
    *,
    every: float,
    drop: float,
    between_alarms: float,
    learn: int,
    expected: float | None = None,
    run: Path | None = None,
    out: Path | None = None,
    looks: int | None = None,
    transport: httpx.BaseTransport | None = None,
    pause: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.time,
) -> Iterator[Seen]:
    """Look every so many seconds, and give what was seen, for ever or `looks` times.

    `between_alarms` counts looks (see `drift.py`); `out` is a JSONL file that keeps them. Raises UserError for a server that
    cannot be reached at first, or counts no speculation, and for a file of another server's looks.
    """
    client = connect(url, REQUEST_SECONDS, key_for(url), transport)
    with client.http, contextlib.nullcontext() if out is None else held(out):
        before = _first(client)
        if run is not None:
            expected = expected_of_run(run, len(before.per_position))
        drift = Drift(expected=expected, drop=drop, between_alarms=between_alarms, learn=learn)
        kept = _kept(out, url)
        for look in kept:
            drift.add(look)
        if kept:
            say(f"{len(kept)} looks in {out} are taken up")
        done = 0
        while looks is None or done < looks:
            pause(every)
            now = _read(client)
            if now is None:
                continue
            counted = now.since(before)
            if min(counted.drafts, counted.accepted, *counted.per_position, 0) < 0:
                say(f"{url} started again; its counters are read afresh")
                before = now
                continue
            if counted.drafts < FEWEST_STEPS:
                continue
            before, done = now, done + 1
            look = Look(clock(), counted.drafts, counted.accepted, counted.per_position)
            if out is not None:
                append_lines(out, [json.dumps({"endpoint": url, **asdict(look)})])
            yield drift.add(look)


def line_of(seen: Seen) -> str:
    """A look in a line."""
    when = time.strftime("%m-%d %H:%M:%S", time.localtime(seen.look.at))
    text = f"{when}  tau {seen.tau:.2f}  {seen.look.drafts:,} steps  {seen.state}"
    if seen.expected is not None:
        text += (
            f"  evidence {seen.evidence:.1f} of {seen.threshold:.1f} against {seen.expected:.2f}"
        )
    if seen.state == FALLEN and seen.since is not None:
        since = time.strftime("%m-%d %H:%M:%S", time.localtime(seen.since))
        text += f"  since {since}"
    return text


def write_metrics(file: Path, seen: Seen, url: str) -> None:
    """The look as gauges in Prometheus' text format, for a collector of text files."""
    rows = {
        "tau": ("mean tokens per verification step since the look before", seen.tau),
        "tau_expected": ("the tau before a fall", seen.expected),
        "fall_evidence": ("log likelihood ratio of a fallen tau", seen.evidence),
        "fall_threshold": ("evidence above which tau counts as fallen", seen.threshold),
        "fallen": ("1 where tau counts as fallen", float(seen.state == FALLEN)),
    }
    text = ""
    for name, (help, value) in rows.items():
        if value is not None:
            full = f"redraft_{name}"
            label = url.replace("\\", "\\\\").replace('"', '\\"')
            text += f'# HELP {full} {help}\n# TYPE {full} gauge\n{full}{{endpoint="{label}"}} {value:.6g}\n'
    write_text(file, text)


def _first(client: Client) -> Counters:
    try:
        page = client.reply("/metrics")
    except Trouble as problem:
        raise UserError(f"{client.url}/metrics does not answer ({problem})") from None
    if page.status != 200:
        raise UserError(f"{client.url}/metrics refused (HTTP {page.status}): {page.reason}")
    if "vllm:spec_decode_num_drafts" not in page.text:
        raise UserError(
            f"{client.url}/metrics {NO_COUNTERS}: does the server run, and with --speculative-config?"
        )
    return read_counters(page.text)


def _read(client: Client) -> Counters | None:
    """The counters; None with a line where there are none at the moment."""
    try:
        page = client.reply("/metrics")
    except Trouble as problem:
        say(f"{client.url}/metrics does not answer ({problem}); looking again")
        return None
    if page.status != 200 or "vllm:spec_decode_num_drafts" not in page.text:
        say(f"{client.url}/metrics {NO_COUNTERS} at the moment (HTTP {page.status}); looking again")
        return None
    return read_counters(page.text)


def _is_whole(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _kept(out: Path | None, url: str) -> list[Look]:
    """The looks in a file, of this server. Raises UserError for another's, and for what are no looks."""
    if out is None or not out.is_file():
        return []
    finish_lines(out, _is_whole)
    found = []
    for number, line in enumerate(out.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            whose = row.pop("endpoint")
            look = Look(**{**row, "per_position": tuple(row["per_position"])})
        except (ValueError, TypeError, KeyError) as problem:
            raise UserError(
                f"{out}, line {number}: no look of redraft watch ({problem!r})"
            ) from None
        if whose != url:
            raise UserError(f"{out} holds looks at {whose}; name another file for {url}")
        found.append(look)
    return found
