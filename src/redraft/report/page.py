"""The HTML report: one self-contained page, no scripts, nothing loaded from elsewhere."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from ..core.files import write_text
from ..core.records import AdaptReport
from .terminal import compared, decoded, refusal_cells, report_rows, tau

WIDTH, HEIGHT = 560, 150


def write_page(path: Path, report: AdaptReport) -> None:
    """Render the report of one adaptation to `path`."""
    environment = Environment(
        loader=PackageLoader("redraft.report"), autoescape=True, undefined=StrictUndefined
    )
    page = environment.get_template("page.html.j2").render(
        r=report,
        tau=tau,
        decoded=decoded,
        compared=compared,
        refusal_cells=refusal_cells,
        curve=curve(report.train.heldout_tau),
        rows=report_rows(report),
        seconds=sum(report.cost["seconds"].values()),
        width=WIDTH,
        height=HEIGHT,
        settings=[
            (f"{stage}.{key}", value, report.origins[f"{stage}.{key}"])
            for stage, values in report.config.items()
            for key, value in values.items()
        ],
    )
    write_text(path, page)


def curve(points: tuple[tuple[int, float], ...]) -> list[tuple[float, float, int, float]]:
    """Held-out tau by step as (x, y, step, tau) in the figure's pixels, 1.0 at the bottom."""
    if not points:
        return []
    last = max(max(step for step, _ in points), 1)  # one point where nothing was trained
    top = max(tau for _, tau in points)
    span = max(top - 1.0, 1e-9)
    return [
        (
            40 + (WIDTH - 60) * step / last,
            HEIGHT - 30 - (HEIGHT - 50) * (tau - 1.0) / span,
            step,
            tau,
        )
        for step, tau in points
    ]
