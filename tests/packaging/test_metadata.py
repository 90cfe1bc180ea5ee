"""What is written down twice agrees: versions, licences, variables; and the community files are valid."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import redraft

ROOT = Path(__file__).parents[2]
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


@pytest.mark.parametrize(
    ("file", "pattern"),
    [
        ("pyproject.toml", r'^version = "(.+)"'),
        ("pyproject.toml", r"redraft-experiments\[all\]==([^\"]+)"),
        ("experiments/pyproject.toml", r'^version = "(.+)"'),
        ("experiments/pyproject.toml", r"redraft==([^\"]+)"),
        ("CITATION.cff", r"^version: (.+)"),
    ],
)
def test_there_is_one_version(file: str, pattern: str) -> None:
    assert re.findall(pattern, (ROOT / file).read_text(), re.M) == [redraft.__version__]


def test_both_distributions_have_the_same_licence() -> None:
    assert (ROOT / "LICENSE").read_bytes() == (ROOT / "experiments" / "LICENSE").read_bytes()


def test_the_citation_has_what_the_format_requires() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert all({"type", "title", "authors"} <= each.keys() for each in citation["references"])


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.stem)
def test_an_issue_form_asks_something(form: Path) -> None:
    content = yaml.safe_load(form.read_text())
    assert {"name", "description", "body"} <= content.keys()
    ids = [field["id"] for field in content["body"]]
    assert len(ids) == len(set(ids)) > 0
