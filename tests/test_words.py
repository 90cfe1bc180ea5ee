"""The vocabulary of docs/glossary.md: words that it replaced do not come back, in code or in text."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
REPLACED = {
    "private part": "adapter",
    "reused": "unadapted",
    "dedicated": "from-scratch",
    "anew": "again, or from scratch",
    "relay": "feature map",
    "retarget(ed)?": "remap",
    "lessons?": "teacher batch",
    "gang": "multi-adapter training",
    "taps?|tapped": "aux layers",
    "overrun": "lookahead",
    "twin": "reference implementation",
    "doors?": "logits pipeline",
    "settled?|absorbs?": "verify, extend",
    "corrected": "recovered",
    "spoken": "in the draft vocabulary",
    "misreadings?|suspects?": "config variants, config diagnosis",
    "kinship|kin": "base check",
    "outlook|foretold|foretells?": "prediction, predicted",
    "pilot|bill|bills": "cost estimate, cost",
    "verdict": "recommendation, judgement",
    "known cases": "calibration runs",
    "words moved|states moved": "output shift, representation shift",
    "stations?|ill|rests": "server state, unhealthy, backing off",
    "ownership of answers|surprise": "on-policy check, NLL",
    "zoo|rungs?": "all fine-tunes, drift level",
    "rooms?": "space, package",
    "mends?|mended|repairs?|repaired": "fix, adapt",
    "likeliest": "most likely, argmax",
    "beside": "next to, with",
    "as it is": "unchanged",
}
ALLOWED = {
    "src/redraft/check/calibration_runs.py": "keys of before",
    "src/redraft/config/settings.py": "a value of before",
    "experiments/redraft_experiments/cli.py": "a command of before",
    "experiments/redraft_experiments/members.py": "a value of before",
    "experiments/redraft_experiments/synthetic.py": "words of the synthetic corpus",
    "experiments/redraft_experiments/synthetic_harm.py": "words of the synthetic corpus",
    "experiments/redraft_experiments/synthetic_tables.py": "words of the synthetic corpus",
    "src/redraft/core/renamed.py": "keys of before",
    "src/redraft/adapters/table.py": "method names of before",
    "src/redraft/cli/flag_table.py": "flags of before",
}
PATTERN = re.compile(rf"\b({'|'.join(REPLACED)})\b", re.IGNORECASE)


def words(text: str) -> str:
    """Text in which the parts of identifiers are words of their own."""
    return re.sub(r"[_`*]", " ", text)


def found_in(text: str) -> list[str]:
    return [match[0] for match in PATTERN.finditer(words(text))]


FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in (
        "src/**/*.py",
        "src/**/*.j2",
        "experiments/**/*.py",
        "docs/**/*.md",
        "*.md",
        "recipes/*.yaml",
    )
    for path in ROOT.glob(pattern)
    if path.name not in ("log.md", "CHANGELOG.md")
)


@pytest.mark.parametrize("file", [file for file in FILES if file not in ALLOWED])
def test_no_replaced_word(file: str) -> None:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    found = [f"{file}:{n}: {word}" for n, line in enumerate(lines, 1) for word in found_in(line)]
    assert found == [], "see docs/glossary.md"


def test_replaced_words_are_found_in_identifiers_and_sentences() -> None:
    assert found_in("the Private part of draft_door, check_room(x) `taps`") == [
        "Private part",
        "door",
        "room",
        "taps",
    ]
    assert found_in("headroom, bedrooms, broom, skill, tapestry, building") == []
