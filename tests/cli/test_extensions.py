"""Commands of other packages: added, refused with one sentence, and never in the way of redraft's own."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from redraft.cli import extensions
from redraft.core.errors import UserError

Install = Callable[..., None]
RUNNER = CliRunner()

GREETING = """
import typer
def greet(name: str) -> None:
    print("hello", name)
group = typer.Typer()
@group.command("one")
def one() -> None:
    print("one")
@group.command("two")
def two() -> None:
    print("two")
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts a package on sys.path that has one entry point; nothing else there has any."""
    real = importlib.metadata.entry_points
    here: list[str] = []

    def ours(group: str) -> list[importlib.metadata.EntryPoint]:
        return [p for p in real(group=group) if p.dist is not None and p.dist.name in here]

    monkeypatch.setattr(extensions, "entry_points", ours)

    def put(package: str, entry: str, source: str = "") -> None:
        site = tmp_path / package
        about = site / f"{package}-1.0.dist-info"
        about.mkdir(parents=True)
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text(f"[{extensions.GROUP}]\n{entry}\n")
        (site / f"{package}.py").write_text(source)
        monkeypatch.syspath_prepend(str(site))
        monkeypatch.delitem(sys.modules, package, raising=False)
        here.append(package)

    return put


def built() -> typer.Typer:
    app = typer.Typer()
    app.command("adapt")(lambda: print("our own"))
    app.command("check")(lambda: print("check"))
    extensions.add_extensions(app)
    return app


def refused(*words: str) -> str:
    """The sentence with which a command is refused, while redraft's own commands work."""
    app = built()
    assert RUNNER.invoke(app, ["check"]).output == "check\n"
    assert RUNNER.invoke(app, ["--help"]).exit_code == 0
    problem = RUNNER.invoke(app, list(words)).exception
    assert isinstance(problem, UserError)
    assert "\n" not in str(problem)
    return str(problem)


def test_a_function_and_a_group_become_commands(install: Install) -> None:
    install("greeting", "greet = greeting:greet\nmore = greeting:group", GREETING)
    app = built()
    assert RUNNER.invoke(app, ["greet", "you"]).output == "hello you\n"
    assert RUNNER.invoke(app, ["more", "two"]).output == "two\n"


@pytest.mark.parametrize("words", [("demo",), ("bench", "suite", "--out", "x"), ("demo", "--help")])
def test_the_experiments_are_missing(install: Install, words: tuple[str, ...]) -> None:
    assert refused(*words) == (
        f"`redraft {words[0]}` is in the package redraft-experiments, which is not installed; "
        "pip install 'redraft[experiments]'"
    )


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("import no_such_module", "No module named 'no_such_module'"),
        ("def other(): pass", "has no attribute 'greet'"),
        ("greet = 3", "TypeError: expected a function or a typer.Typer, found 3"),
        ("class greet: pass", "expected a function or a typer.Typer, found <class"),
        ("def greet(x: int | str): pass", "support Union types"),
    ],
)
def test_a_broken_command_names_its_package(install: Install, source: str, why: str) -> None:
    install("greeting", "greet = greeting:greet", source)
    sentence = refused("greet", "you")
    assert "`redraft greet` of the package greeting (entry point greeting:greet)" in sentence
    assert why in sentence


def test_two_packages_with_the_same_command(install: Install) -> None:
    install("greeting", "greet = greeting:greet", GREETING)
    install("another", "greet = another:greet", GREETING)
    assert "is in the packages another and greeting; uninstall all but one" in refused("greet")


def test_no_package_replaces_a_command_of_redraft(install: Install) -> None:
    install("greeting", "adapt = greeting:greet", GREETING)
    assert RUNNER.invoke(built(), ["adapt"]).output == "our own\n"
