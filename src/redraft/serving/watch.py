"""`redraft watch`: a serving vLLM's counters, look by look, and the alarm when acceptance falls.

Looks are kept in a file, so that a watch goes on where it stopped with all that it learned. A server that does not answer, or
starts again, costs looks and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
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
SPECULATES = re.compile(r"^vllm:spec_decode_num_drafts_total(?:\{[^}]*\})? ", re.MULTILINE)
STARTED = re.compile(r"^process_start_time_seconds(?:\{[^}]*\})? (\S+)$", re.MULTILINE)
BEGINNING = b'{"endpoint": '
"""Of every line of looks."""
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

    def fresh(positions: int) -> Drift:
        tau = expected if run is None else expected_of_run(run, positions)
        return Drift(expected=tau, drop=drop, between_alarms=between_alarms, learn=learn)

    with client.http, contextlib.nullcontext() if out is None else held(out):
        before = _first(client)
        drift = fresh(len(before.counters.per_position))
        kept = _kept(out, url, len(before.counters.per_position))
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
            counted = now.counters.since(before.counters)
            if now.start != before.start or _went_down(counted):
                say(f"{url} started again; its counters are read afresh")
                if len(now.counters.per_position) != len(before.counters.per_position):
                    say("it drafts another number of tokens now, so its tau is learned afresh")
                    drift = fresh(len(now.counters.per_position))
                before = now
                continue
            if counted.drafts < FEWEST_STEPS:
                continue
            before, done = now, done + 1
            look = Look(clock(), counted.drafts, counted.accepted, counted.per_position)
            if out is not None:
                append_lines(out, [json.dumps({"endpoint": url, **asdict(look)})])
            yield drift.add(look)


@dataclass(frozen=True)
class _Page:
    """The counters, and when the server began to count, as far as it tells."""

    counters: Counters
    start: str


def _went_down(counted: Counters) -> bool:
    return min(counted.drafts, counted.accepted, *counted.per_position, 0) < 0


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


def _first(client: Client) -> _Page:
    try:
        page = client.reply("/metrics")
    except Trouble as problem:
        raise UserError(f"{client.url}/metrics does not answer ({problem})") from None
    if page.status != 200:
        raise UserError(f"{client.url}/metrics refused (HTTP {page.status}): {page.reason}")
    found = _page_of(page.text)
    if found is None:
        raise UserError(
            f"{client.url}/metrics {NO_COUNTERS}: does the server run, and with --speculative-config?"
        )
    return found


def _read(client: Client) -> _Page | None:
    """The counters; None with a line where there are none at the moment."""
    try:
        page = client.reply("/metrics")
    except Trouble as problem:
        say(f"{client.url}/metrics does not answer ({problem}); looking again")
        return None
    found = _page_of(page.text) if page.status == 200 else None
    if found is None:
        say(f"{client.url}/metrics {NO_COUNTERS} at the moment (HTTP {page.status}); looking again")
    return found


def _page_of(text: str) -> _Page | None:
    if not SPECULATES.search(text):
        return None
    try:
        return _Page(read_counters(text), " ".join(STARTED.findall(text)))
    except (ValueError, OverflowError):
        return None


def _kept(out: Path | None, url: str, positions: int) -> list[Look]:
    """The last looks in a file that are of so many drafted tokens. An incomplete last line is cut off.

    Raises UserError for looks at another server, and for what are no looks, which stays as it was found.
    """
    if out is None or not out.is_file():
        return []
    found: list[Look] = []
    *lines, rest = out.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        found.append(_look_of(line, f"{out}, line {number}", url))
    if rest:
        if not rest.startswith(BEGINNING[: len(rest)]):
            _look_of(rest, f"{out}, line {len(lines) + 1}", url)
        finish_lines(out, _is_whole)
        if _is_whole(rest):
            found.append(_look_of(rest, f"{out}, line {len(lines) + 1}", url))
    same = [at for at, look in enumerate(found) if len(look.per_position) != positions]
    return found[same[-1] + 1 :] if same else found


def _look_of(line: bytes, where: str, url: str) -> Look:
    try:
        row = json.loads(line)
        whose = row.pop("endpoint")
        look = Look(**{**row, "per_position": tuple(row["per_position"])})
        if not look.accepted >= 0 or look.drafts < 1:
            raise ValueError(f"{look.drafts} steps")
    except (ValueError, TypeError, KeyError, AttributeError) as problem:
        raise UserError(
            f"{where}: no look of redraft watch ({problem!r}); name another file with --out"
        ) from None
    if whose != url:
        raise UserError(f"{where}: a look at {whose}; name another file for {url}")
    return look


def _is_whole(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False
