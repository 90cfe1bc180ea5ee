"""The HTML report: one self-contained page, no scripts, nothing loaded from elsewhere.

Texts of models and files are hostile: Jinja escapes each for HTML, and `visible` what reverses or
controls text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ..core.files import write_text
from ..core.folders import read_json
from ..core.records import Verification, to_json
from ..core.report_record import AdaptReport
from ..core.visible import visible
from .answers import coloured, tau_of
from .charts import BAR, GAP, LABEL, WIDTH, cost_charts, position_charts, tau_chart
from .served import RECORD, read_speed, verify_command
from .terminal import change, compared, decoded, headline, losses, refusal_cells, report_rows, tau

CURVE_WIDTH, CURVE_HEIGHT = 360, 150


def render(template: str, **values: Any) -> str:
    """A page from one of the templates in this package, with what its charts are drawn by."""
    environment = Environment(
        loader=PackageLoader("redraft.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    sizes = {"width": WIDTH, "bar": BAR, "gap": GAP, "label": LABEL}
    return environment.get_template(template).render(sizes=sizes, **values)


def write_page(path: Path, report: AdaptReport) -> None:
    """Render the report of one adaptation to `path`, with the speed-up that the folder has a record of."""
    page = render(
        "page.html.j2",
        r=report,
        headline=headline,
        tau=tau,
        change=change,
        decoded=decoded,
        compared=compared,
        refusal_cells=refusal_cells,
        coloured=coloured,
        tau_of=tau_of,
        curve=curve(report.train.heldout_tau),
        rows=report_rows(report),
        losses=losses(report),
        speed=read_speed(path.parent, report),
        verify_command=verify_command(report),
        tau_chart=tau_chart(report),
        position_charts=position_charts(report),
        cost_charts=cost_charts(report),
        seconds=sum(report.cost["seconds"].values()),
        width=CURVE_WIDTH,
        height=CURVE_HEIGHT,
        settings=[
            (f"{stage}.{key}", value, report.origins[f"{stage}.{key}"])
            for stage, values in report.config.items()
            for key, value in values.items()
        ],
    )
    write_text(path, page)


def keep_verification(run: Path, found: Verification) -> None:
    """Write what `redraft verify` found into the run folder, and the page again with its speed-up."""
    write_text(run / RECORD, json.dumps(to_json(found), indent=2) + "\n")
    write_page(run / "report.html", AdaptReport.from_json(read_json(run / "report.json")))


def _finalize(value: Any) -> Any:
    return visible(value) if type(value) is str else value  # not Markup


def curve(points: tuple[tuple[int, float], ...]) -> list[tuple[float, float, int, float]]:
    """Held-out tau by step as (x, y, step, tau) in the figure's pixels, 1.0 at the bottom."""
    if not points:
        return []
    last = max(max(step for step, _ in points), 1)  # one point where nothing was trained
    top = max(tau for _, tau in points)
    span = max(top - 1.0, 1e-9)
    return [
        (
            40 + (CURVE_WIDTH - 60) * step / last,
            CURVE_HEIGHT - 44 - (CURVE_HEIGHT - 66) * (tau - 1.0) / span,
            step,
            tau,
        )
        for step, tau in points
    ]
