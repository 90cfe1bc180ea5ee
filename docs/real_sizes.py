"""Tables of the page on real models: the base's drafts of every kind, what the size of a target costs, and long contexts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from redraft_experiments.contexts import ContextCell
from redraft_experiments.real_drafts import DRAFTS, Kept, Pruned
from redraft_experiments.real_kinds import KindCell

RESULTS = Path(__file__).parent / "results"
KINDS, CONTEXTS = RESULTS / "real-kinds.jsonl", RESULTS / "contexts-smollm2.jsonl"
SIZES = {
    "nano": "toy suite `nano`",
    "smollm2": "SmolLM2-135M-Instruct",
    "gemma3-270m": "Gemma 3 270M",
}
"""Records of `redraft bench pipeline`, by the name of their file."""


def kinds_table() -> Iterator[str]:
    """From `redraft bench real-kinds --record docs/results/real-kinds.jsonl`."""
    cells = [KindCell.from_json(json.loads(line)) for line in KINDS.read_text().splitlines()]
    domains = list(cells[0].tau)
    yield f"| target | draft | c | speed-up | {' | '.join(domains)} | parameters |"
    yield "|---" * (5 + len(domains)) + "|"
    for cell in cells:
        taus = (
            "{:.2f} [{:.2f}, {:.2f}]".format(*cell.tau[domain]) if domain in cell.tau else ""
            for domain in domains
        )
        yield (
            f"| {cell.target} | {_says(cell.draft)} | {cell.c:.2f} | {cell.speedup:.2f} x at K = {cell.best} | {' | '.join(taus)} | "
            f"{cell.parameters / 1e6:.1f} M |"
        )


def _says(name: str) -> str:
    row = DRAFTS[name]
    if isinstance(row, Pruned):
        return f"small LM, {len(row.layers)} layers"
    return "EAGLE-3" if isinstance(row, Kept) else "EAGLE-1"


def sizes_table() -> Iterator[str]:
    """From `redraft bench pipeline --record docs/results/size-NAME.json`."""
    stages = ("regeneration", "training", "replay", "live loop")
    yield f"| target | parameters | vocabulary | draft, trained | {', tokens/s | '.join(stages)}, tokens/s | training, GFLOP a token | peak MB (predicted) |"
    yield "|---" * (6 + len(stages)) + "|"
    for name, says in SIZES.items():
        found: dict[str, Any] = json.loads((RESULTS / f"size-{name}.json").read_text())
        speeds = (
            f"{found['stages'][stage]['tokens_per_second']:,} ({found['stages'][stage]['share']:.0%})"
            for stage in stages
        )
        read = found["stages"]["training"]["tokens_per_second"] * found["training_seconds"]
        yield (
            f"| {says} | {found['parameters'] / 1e6:.1f} M | {found['vocabulary']:,} | {found['draft_parameters'] / 1e6:.1f} M | "
            f"{' | '.join(speeds)} | {1000 * found['training_tflop'] / read:.2f} | {found['peak_memory_mb']:,} ({found['predicted_peak_mb']:,}) |"
        )


def contexts_table() -> Iterator[str]:
    """From `redraft bench contexts --record docs/results/contexts-smollm2.jsonl`."""
    cells = [ContextCell.from_json(json.loads(line)) for line in CONTEXTS.read_text().splitlines()]
    drafts = list(dict.fromkeys(cell.draft for cell in cells))
    found = {(cell.draft, cell.length): cell for cell in cells}
    yield f"| tokens read before the answer | {' | '.join(drafts)} |"
    yield "|---" * (1 + len(drafts)) + "|"
    for length in dict.fromkeys(cell.length for cell in cells):
        taus = (
            "{:.2f} [{:.2f}, {:.2f}]".format(*found[draft, length].tau)
            if (draft, length) in found
            else ""
            for draft in drafts
        )
        tokens = next(cell.tokens for cell in cells if cell.length == length)
        yield f"| {tokens:,.0f} | {' | '.join(taus)} |"
