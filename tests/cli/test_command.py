"""Flags from one schema: bundles, settings, `--config` and `--set`, and what help shows of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from redraft.cli.command import Group, add_command
from redraft.config import Resolved
from redraft.core.errors import UserError

SEEN: list[dict[str, Any]] = []


@dataclass(frozen=True)
class Models:
    target: str
    dtype: str = "auto"


def learn(
    models: Models,
    answers: str,
    config: Resolved,
    aux_layers: str | None = None,
    limit: int | None = None,
    as_json: bool = False,
) -> None:
    """Learn from answers, with a first sentence that is much longer than forty-five characters.

    And more.
    """
    SEEN.append({**locals(), "lr": config.config.train.lr, "origin": config.origins["train.lr"]})


def look(prompts: str, limit: int = 3) -> None:
    """Look."""
    SEEN.append(locals())


@pytest.fixture
def app() -> typer.Typer:
    SEEN.clear()
    made = typer.Typer(cls=Group, rich_markup_mode=None)
    add_command(
        made, learn, settings=("train", "measure"), flags_of=("train",), help={"answers": "ANS"}
    )
    add_command(made, look)
    return made


def run(app: typer.Typer, *arguments: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return SEEN[-1]


def test_bundles_and_settings_arrive(app: typer.Typer) -> None:
    seen = run(app, "learn", "--target", "t", "--answers", "a", "--lr", "0.5", "--json")
    assert (seen["models"], seen["answers"], seen["as_json"]) == (Models("t"), "a", True)
    assert (seen["lr"], seen["origin"]) == (0.5, "flag")


def test_old_names_are_read_and_not_shown(app: typer.Typer) -> None:
    assert (
        run(app, "learn", "--target", "t", "--answers", "a", "--taps", "1,2")["aux_layers"] == "1,2"
    )
    shown = CliRunner().invoke(app, ["learn", "--help"]).output
    assert "--aux-layers" in shown
    assert "--taps" not in shown


def test_a_file_gives_settings_and_flags_and_the_line_goes_first(
    app: typer.Typer, tmp_path: Path
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("target: t\nanswers: a\nlimit: 7\nrows: 3\ntrain: {lr: 0.25}\n")
    seen = run(app, "learn", "--config", str(file))
    assert (seen["models"].target, seen["limit"], seen["lr"]) == ("t", 7, 0.25)
    assert seen["origin"] == str(file)
    seen = run(
        app,
        "learn",
        "--config",
        str(file),
        "--limit",
        "2",
        "--set",
        "train.lr=0.1",
        "--set",
        "target=u",
    )
    assert (seen["models"].target, seen["limit"], seen["lr"]) == ("u", 2, 0.1)
    assert run(app, "look", "--config", str(file), "--prompts", "p")["limit"] == 7
    given = ("--set", "target=u", "--set", "train.lr=0.1", "--lr", "0.5")
    seen = run(app, "learn", *given, "--config", str(file))  # in whatever order
    assert (seen["lr"], seen["origin"]) == (0.5, "flag")
    assert seen["models"].target == "u"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("look", "--prompts", "p", "--set", "train.lr=1"), "redraft look does not use it"),
        (("look", "--set", "limmit=1"), "unknown key 'limmit'; did you mean 'limit'"),
        (("look", "--set", "target=t"), "unknown key 'target'"),
        (("learn", "--set", "train.lrr=1"), "unknown key 'train.lrr'; did you mean 'train.lr'"),
    ],
)
def test_wrong_keys_are_named(app: typer.Typer, arguments: tuple[str, ...], named: str) -> None:
    needed = ("--target", "t", "--answers", "a") if arguments[0] == "learn" else ()
    with pytest.raises(UserError, match=named):
        CliRunner().invoke(app, [*arguments, *needed], catch_exceptions=False)


def test_help_is_grouped_and_summaries_are_whole(app: typer.Typer) -> None:
    shown = CliRunner().invoke(app, ["learn", "--help"], env={"COLUMNS": "100"}).output
    headings = [
        line.rstrip(":") for line in shown.splitlines() if line and not line.startswith(" ")
    ]
    assert headings[-4:] == ["Models", "Data", "Training", "Output"]
    assert "ANS" in shown
    summary = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output
    assert "much longer than forty-five characters." in " ".join(summary.split())


def test_a_parameter_that_is_no_flag_is_an_error() -> None:
    def odd(no_such_flag: str) -> None: ...

    with pytest.raises(KeyError, match="no_such_flag"):
        add_command(typer.Typer(), odd)
