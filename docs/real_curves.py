"""How held-out tau rises with what training computes, on the real fine-tunes: a figure, and what 0.9 recovery costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from redraft_experiments.real_cells import RealCell

RESULTS = Path(__file__).parent / "results"
FIGURE = "real-methods-curves.svg"
COLOURS = {
    "body": "#1b7837",
    "body more": "#7fbf7b",
    "full": "#2166ac",
    "slow": "#b2702a",
    "lora": "#762a83",
    "scratch": "#999999",
    "scratch more": "#444444",
}
LABELS = {
    "body": "body (default)",
    "body more": "body, 3.5 x the answers",
    "slow": "expert",
    "scratch": "from scratch",
    "scratch more": "from scratch, 3.5 x the answers",
}
ADAPTED, SCRATCH = "body", "scratch more"
RECOVERY = 0.9
Groups = Mapping[tuple[str, str], Sequence[RealCell]]


def curve(cell: RealCell) -> list[tuple[float, float, float]]:
    """(share of the steps, 1e12 operations so far, held-out tau) at each evaluation."""
    train = cell.train
    operations = (train["draft_flops"] + train["target_flops"]) / 1e12
    steps = train["steps"]
    return [(at / steps, operations * at / steps, tau) for at, tau in train["heldout_tau"]]


def draw_curves(groups: Groups) -> None:
    """A panel for each fine-tune, one line a row and seed, as SVG."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "redraft", "font.size": 9})
    from matplotlib import pyplot

    members = list(dict.fromkeys(member for member, _ in groups))
    figure, axes = pyplot.subplots(
        -(-len(members) // 2), 2, figsize=(10, 3.2 * -(-len(members) // 2)), squeeze=False
    )
    for axis, member in zip(axes.flat, members, strict=False):
        for row, colour in COLOURS.items():
            for cell in groups.get((member, row), ()):
                _, operations, taus = zip(*curve(cell), strict=True)
                axis.plot(operations, taus, color=colour, marker="o", ms=2.5, lw=1, label=row)
        axis.set_title(member)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(members) :]:
        axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("held-out tau, K = 4")
    for axis in axes.flat[max(len(members) - 2, 0) : len(members)]:
        axis.set_xlabel("operations of training, 1e12")
    handles: dict[str, Any] = {}
    for axis in axes.flat[: len(members)]:
        for handle, row in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(LABELS.get(row, row), handle)
    figure.legend(
        handles.values(), handles.keys(), loc="lower center", ncols=4, fontsize=8, frameon=False
    )
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(RESULTS / FIGURE, metadata={"Date": None})


def recovery_table(groups: Groups) -> str:
    """What 0.9 recovery costs, by held-out tau: of the draft from scratch itself, and of adapting."""
    lines = [
        "| fine-tune | draft | answers | 1e12 operations | seconds |",
        "|---|---|---|---|---|",
    ]
    for member, row in groups:
        if row != SCRATCH:
            continue
        goal = _goal(groups[member, SCRATCH], groups[member, ADAPTED])
        for name in (SCRATCH, ADAPTED):
            for cell in groups[member, name]:
                says = "from scratch" if name == SCRATCH else f"adapted, seed {cell.seed}"
                lines.append(f"| {member} | {says} | {_reached(cell, goal)} |")
    return "\n".join(lines)


def _goal(scratch: Sequence[RealCell], adapted: Sequence[RealCell]) -> float:
    """The held-out tau nine tenths of the way from the unadapted draft to the best that is from scratch."""
    start = curve(adapted[0])[0][2]
    end = max(tau for cell in scratch for _, _, tau in curve(cell))
    return start + RECOVERY * (end - start)


def _reached(cell: RealCell, goal: float) -> str:
    for share, operations, tau in curve(cell):
        if tau >= goal:
            seconds = cell.train["seconds"] * share
            return f"{cell.answer_tokens:,} tokens | {operations:.1f} | {seconds:.0f}"
    return f"{cell.answer_tokens:,} tokens | not reached |"
