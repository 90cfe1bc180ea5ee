"""Settings: one schema, every mistake at once, and each value knows where it came from."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from redraft.config import (
    AdaptConfig,
    parse_set,
    read_yaml,
    recipe_names,
    recipe_path,
    resolve,
    stage_fields,
)
from redraft.errors import UserError, nearest


def test_later_layers_win_and_origins_are_kept() -> None:
    found = resolve([("file", {"train": {"lr": 0.1, "width": 3}}), ("--set", {"train.lr": "0.2"})])
    assert (found.config.train.lr, found.config.train.width) == (0.2, 3)
    assert found.origins["train.lr"] == "--set"
    assert found.origins["train.width"] == "file"
    assert found.origins["train.seed"] == "default"
    assert set(found.origins) == set(stage_fields())


def test_all_mistakes_are_reported_at_once() -> None:
    layers = {
        "train.widht": 3,
        "lr": 1,
        "train.method": "magic",
        "train.epochs": "many",
        "measure.k": 99,
        "train.width": 2.5,
        "train.seed": True,
    }
    with pytest.raises(UserError) as caught:
        resolve([("run.yaml", layers)])
    text = str(caught.value)
    assert "run.yaml: unknown key 'train.widht'; did you mean 'train.width'?" in text
    assert "unknown key 'lr'; did you mean 'train.lr'?" in text
    assert "train.method must be one of expert, expert+fc, full, scratch; got 'magic'" in text
    assert "train.epochs expected float, got 'many'" in text
    assert "measure.k must be between 1 and 16; got 99" in text
    assert "train.width expected a whole number, got 2.5" in text
    assert "train.seed expected int, got True" in text


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_fits_the_schema(name: str) -> None:
    path = recipe_path(name)
    resolve([(name, read_yaml(path))])
    assert path.read_text().startswith("# "), "a recipe begins with one line saying what it is for"


def test_recipes_exist_and_unknown_ones_are_named() -> None:
    assert {"default", "demo"} <= set(recipe_names())
    with pytest.raises(UserError, match="no recipe or file named 'dem'; did you mean 'demo'"):
        recipe_path("dem")


def test_yaml_mistakes(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("- 1\n")
    with pytest.raises(UserError, match="expected a mapping of stages"):
        read_yaml(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("a: [1\n")
    with pytest.raises(UserError, match="not valid YAML"):
        read_yaml(tmp_path / "b.yaml")
    with pytest.raises(UserError, match="cannot read"):
        read_yaml(tmp_path / "c.yaml")
    with pytest.raises(UserError, match=r"takes key=value.*got 'oops'"):
        parse_set(["oops"])


def test_every_setting_has_help_and_a_default_that_passes_its_own_checks() -> None:
    defaults = AdaptConfig()
    for key, (stage, field) in stage_fields().items():
        assert field.metadata["help"], key
        value = getattr(getattr(defaults, stage), field.name)
        resolve([("default", {key: value})])
    assert dataclasses.is_dataclass(defaults)


def test_nearest() -> None:
    assert nearest("expret", ["expert", "full"]) == "did you mean 'expert'? known: expert, full"
    assert nearest("zzz", ["expert", "full"]) == "known: expert, full"
