"""Watching a draft in use."""

from __future__ import annotations

from pathlib import Path

import typer

from ..core.errors import UserError
from .bundles import OutputFlags
from .engine import NOT_GOOD

DAY = 86400.0


def watch(
    endpoint: str,
    output: OutputFlags,
    run: str | None = None,
    expected: float | None = None,
    every: float = 60.0,
    drop: float = 0.1,
    days: float = 30.0,
    learn: int = 20,
    looks: int | None = None,
    until_alarm: bool = False,
    out: str | None = None,
    metrics_file: str | None = None,
) -> None:
    """Watch a serving vLLM's acceptance by its counters, and say when it has fallen. No model is loaded, nothing is asked.

    The first looks are learned on. What counts as fallen is a tau that lost --drop against --run, --expected or what was
    learned, by a sequential test with a false alarm in --days at the mean, for traffic like that of the first looks. Any lasting
    loss above half of --drop ends in an alarm, so let --learn span what a day brings.

    Example: redraft watch --endpoint http://127.0.0.1:8000 --run run --out looks.jsonl
    """
    from ..config import read_endpoints
    from ..core.records import to_json
    from ..metrics.drift import FALLEN, LEARNING, STEADY
    from ..serving.watch import line_of, write_metrics
    from ..serving.watch import watch as work

    if run is not None and expected is not None:
        raise UserError("name --run, whose tau is expected, or --expected, not both")
    try:
        (url,) = read_endpoints(endpoint)
    except ValueError as problem:
        raise UserError(f"--endpoint names one server ({problem})") from None
    seen = None
    for seen in work(
        url,
        every=every,
        drop=drop,
        between_alarms=max(days * DAY / every, 2.0),
        learn=learn,
        expected=expected,
        run=Path(run) if run else None,
        out=Path(out) if out else None,
        looks=looks,
    ):
        if not output.as_json:
            typer.echo(line_of(seen))
        if metrics_file is not None:
            write_metrics(Path(metrics_file), seen, url)
        if seen.state == FALLEN and until_alarm:
            break
    if seen is None:
        return
    words = {
        FALLEN: "tau has fallen: the model, the draft or what is asked has changed; redraft check says what to do",
        LEARNING: f"nothing is known yet: {learn} looks are learned on before any alarm",
        STEADY: "no fall",
    }
    output.finish(words[seen.state], {**to_json(seen), "endpoint": url})
    if seen.state == FALLEN and until_alarm:
        raise typer.Exit(NOT_GOOD)
