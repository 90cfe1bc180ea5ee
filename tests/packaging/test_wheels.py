"""The distributions as users get them: built, checked, installed into empty environments, and tried there.

PyTorch may be a download of several GB for an interpreter that has not been used here. So only this
Python's environment gets it; the others get it in `make test-package-full`.
"""

from __future__ import annotations

import email
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from redraft.checkpoints.load import stored
from redraft.models.target import Target
from redraft.serving.environment import clean_environment
from tests.conftest import fresh_draft

pytestmark = [pytest.mark.package, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
HERE = "{}.{}".format(*sys.version_info)
OTHERS = sorted({"3.10", "3.13"} - {HERE})
NEED_TORCH = ("torch", "peft", "accelerate")
EXPERIMENTS_ONLY = re.compile("experiments|synthetic|bench|corpus|suite|members|demo.py")


def run(*command: object, code: int = 0, cwd: Path | None = None) -> str:
    """What a command prints, both streams together; it must end with `code`."""
    done = subprocess.run(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**clean_environment(), "NO_COLOR": "1"},
        cwd=cwd,
    )
    assert done.returncode == code, f"{command} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


@pytest.fixture(scope="session")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sdist and wheel of both distributions."""
    folder = tmp_path_factory.mktemp("dist")
    for project in (ROOT, ROOT / "experiments"):
        run(sys.executable, "-m", "build", "--outdir", folder, project)
    return folder


@pytest.fixture(scope="session")
def draft(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("draft")
    stored(fresh_draft(target), target).save(folder)
    return folder


def wheel(dist: Path, name: str) -> Path:
    (found,) = dist.glob(f"{name}-*.whl")
    return found


def wheel_names(dist: Path, name: str) -> set[str]:
    """Files of a wheel, those of its metadata left out."""
    names = zipfile.ZipFile(wheel(dist, name)).namelist()
    return {each for each in names if ".dist-info/" not in each}


def files(folder: Path, below: Path) -> set[str]:
    return {
        str(path.relative_to(below))
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_holds_the_package_and_its_recipes(dist: Path) -> None:
    recipes = {f"redraft/{name}" for name in files(ROOT / "recipes", ROOT)}
    names = wheel_names(dist, "redraft")
    assert names == files(ROOT / "src" / "redraft", ROOT / "src") | recipes
    assert "redraft/recipes/default.yaml" in names


def test_the_wheel_holds_no_word_lists_and_no_benches(dist: Path) -> None:
    assert [name for name in wheel_names(dist, "redraft") if EXPERIMENTS_ONLY.search(name)] == []
    experiments = wheel_names(dist, "redraft_experiments")
    assert experiments == files(ROOT / "experiments" / "redraft_experiments", ROOT / "experiments")
    assert "redraft_experiments/synthetic_tables.py" in experiments


def test_the_sdist_holds_the_whole_project(dist: Path) -> None:
    (sdist,) = dist.glob("redraft-*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    assert names == {*listed.splitlines(), "PKG-INFO"}


def test_the_metadata_is_fit_for_an_index(dist: Path) -> None:
    run(sys.executable, "-m", "twine", "check", "--strict", *dist.iterdir())


@pytest.mark.parametrize(
    ("version", "with_torch"),
    [
        (HERE, True),
        *((version, False) for version in OTHERS),
        *(pytest.param(version, True, marks=pytest.mark.full) for version in OTHERS),
    ],
)
def test_a_wheel_in_an_empty_environment(
    dist: Path, draft: Path, tmp_path: Path, version: str, with_torch: bool
) -> None:
    base = interpreter(version)
    if base is None:
        pytest.skip(f"no Python {version} here: looked on the PATH and asked pyenv and uv")
    run(base, "-m", "venv", "--without-pip", tmp_path / "env")
    python, redraft = tmp_path / "env" / "bin" / "python", tmp_path / "env" / "bin" / "redraft"
    install(python, wheel(dist, "redraft"), with_torch)
    try_commands(redraft, tmp_path)
    if with_torch:
        assert (
            json.loads(run(redraft, "inspect", draft, "--json", cwd=tmp_path))["kind"] == "eagle3"
        )
    pip(python, "--no-deps", wheel(dist, "redraft_experiments"))
    assert "--out" in run(redraft, "demo", "--help", cwd=tmp_path)
    assert "suite" in run(redraft, "bench", "--help", cwd=tmp_path)


def try_commands(redraft: Path, folder: Path) -> None:
    """The commands that need no PyTorch, in `folder`."""
    version = run(redraft, "--version", cwd=folder).strip()
    assert re.fullmatch(r"redraft \d+\.\d+\.\d+", version)
    assert "adapt" in run(redraft, "--help", cwd=folder)
    found = json.loads(run(redraft, "env", "--json", cwd=folder))
    assert f"redraft {found['redraft']}" == version
    assert found["packages"]["transformers"]
    assert found["commands"] == []
    assert {"default", "paper"} <= {
        line.split()[0] for line in run(redraft, "recipes", cwd=folder).splitlines()
    }
    sentence = run(redraft, "demo", code=2, cwd=folder)
    assert sentence.count("\n") == 1
    assert "pip install 'redraft[experiments]'" in sentence


def install(python: Path, built: Path, with_torch: bool) -> None:
    """Install a wheel with what it depends on, or with all of that but PyTorch."""
    if with_torch:
        pip(python, "-c", ROOT / "constraints.txt", built)
        return
    with zipfile.ZipFile(built) as archive:
        (name,) = (each for each in archive.namelist() if each.endswith("/METADATA"))
        about = email.message_from_bytes(archive.read(name))
    needed = [each for each in about.get_all("Requires-Dist", []) if "extra ==" not in each]
    needed = [each for each in needed if not each.startswith(NEED_TORCH)]
    pip(python, "-c", ROOT / "constraints.txt", *needed)
    pip(python, "--no-deps", built)


def pip(python: Path, *words: object) -> None:
    """`pip install` in another environment, by the pip of this one. Nothing is compiled, to save time."""
    command = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet")
    run(*command, "--no-compile", *words)


def interpreter(version: str) -> str | None:
    """A Python of that version: on the PATH, of pyenv or of uv."""
    for python in (
        f"python{version}",
        f"{ask('pyenv', 'prefix', version)}/bin/python",
        ask("uv", "python", "find", version),
    ):
        if ask(python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])") == version:
            return python
    return None


def ask(*command: str) -> str:
    """What a command prints; nothing when it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
