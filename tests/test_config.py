"""Settings: one schema, every mistake at once, and each value knows where it came from."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from redraft.config import (
    AdaptConfig,
    RegenerateConfig,
    TrainConfig,
    key_of,
    parse_set,
    read_shares,
    read_width,
    read_yaml,
    recipe_names,
    recipe_path,
    resolve,
    stage_fields,
)
from redraft.core.errors import UserError, nearest


def test_later_layers_win_and_origins_are_kept() -> None:
    found = resolve([("file", {"train": {"lr": 0.1, "width": 3}}), ("--set", {"train.lr": "0.2"})])
    assert (found.config.train.lr, found.config.train.width) == (0.2, "3")
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
        "train.width": -2.5,
        "train.rank": 2.5,
        "train.lr_parts": "fc=fast",
        "train.average": 1,
        "train.seed": True,
        "export.format": "hff",
        "train.loss": "mse",
    }
    with pytest.raises(UserError) as caught:
        resolve([("run.yaml", layers)])
    text = str(caught.value)
    assert "run.yaml: unknown key 'train.widht'; did you mean 'train.width'?" in text
    assert "unknown key 'lr'; did you mean 'train.lr'?" in text
    assert "run.yaml: train.method names the adapter 'magic'; known: attention" in text
    assert "train.epochs expected float, got 'many'" in text
    assert "measure.k must be between 1 and 16; got 99" in text
    assert "train.width must be a number of neurons (64), a share of the shared ones (0.25" in text
    assert "train.rank expected a whole number, got 2.5" in text
    assert "train.lr_parts takes adapter=multiple pairs ('expert=2,fc=0.5') of weight-sync" in text
    assert "got 'fc=fast'" in text
    assert "train.average must be between 0.0 and 0.9999; got 1.0" in text
    assert "train.seed expected int, got True" in text
    assert "export.format names an unknown export format 'hff'; did you mean 'hf'" in text
    assert "train.loss must be one of kl, tv, lk, ce, paper; got 'mse'" in text


@pytest.mark.parametrize(
    ("text", "width"),
    [("64", 64), ("1", 1), ("0.25", 0.25), ("1.0", 1.0), ("1.5", 1.5), ("auto", None)],
)
def test_a_width_is_a_number_a_share_or_auto(text: str, width: float | None) -> None:
    found = read_width(text)
    assert found == width
    assert type(found) is type(width), "an int is neurons, a float is a share"
    assert resolve([("f", {"train.width": text})]).config.train.width == text


@pytest.mark.parametrize(
    "text", ["abc", "0", "0.0", "-3", "-0.25", "", ".", "nan", "inf", "Auto", "1/4"]
)
def test_other_widths_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=rf"a share .* or auto; got '{text}'"):
        read_width(text)
    with pytest.raises(UserError, match="f: train.width must be a number of neurons"):
        resolve([("f", {"train.width": text})])


def test_values_are_read_once_and_the_text_is_what_is_stored() -> None:
    found = resolve([("f", {"train.method": "fc+expert", "select.budget": "20000t"})]).config
    train, budget = found.train, found.select.budget_value
    assert train.method_value.adapters == ("expert", "fc")
    assert train.method_value is train.method_value
    assert train.width_value == 1.0
    assert (budget.kind, budget.number, budget.auto) == ("tokens", 20000, False)
    assert dataclasses.asdict(train) == dataclasses.asdict(TrainConfig(method="fc+expert"))
    assert dataclasses.replace(train, method="fc").method_value.adapters == ("fc",)


@pytest.mark.parametrize("value", [8, 0.5])
def test_a_width_from_yaml_is_a_number_there(value: float) -> None:
    assert resolve([("f", {"train": {"width": value}})]).config.train.width == str(value)


def test_learning_rates_of_parts_are_multiples_by_part() -> None:
    assert read_shares("") == {}
    assert read_shares("expert=2,fc=0.5") == {"expert": 2.0, "fc": 0.5}
    assert resolve([("f", {"train.lr_parts": "norms=1e-1"})]).config.train.lr_parts == "norms=1e-1"
    for wrong in (
        "fc",
        "fc=",
        "fc=-1",
        "fc=0",
        "fc=nan",
        "fc=inf",
        "experts=2",
        "=2",
        "expert=2;fc=1",
    ):
        with pytest.raises(ValueError, match=r"takes adapter=multiple pairs .* got '"):
            read_shares(wrong)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("full+fc", r"train.method 'full\+fc' contradicts itself: full trains every tensor"),
        ("fc+fc", r"train.method names an adapter twice: 'fc\+fc'"),
        ("expert+fx", "train.method names the adapter 'fx'; did you mean 'fc'"),
    ],
)
def test_a_mistake_in_the_method_is_reported_with_the_others(method: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        resolve([("--set", {"train.method": method, "train.loss": "mse", "measure.kk": 1})])
    assert "--set: train.loss must be one of kl, tv, lk, ce, paper; got 'mse'" in str(caught.value)
    assert "--set: unknown key 'measure.kk'" in str(caught.value)


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


def test_a_setting_that_was_added_later_does_not_redo_what_is_finished() -> None:
    config = TrainConfig()
    later = {name for name in asdict(config) if name not in key_of(config)}
    assert later == {"optimizer", "accumulate", "track"}
    assert key_of(config) == {k: v for k, v in asdict(config).items() if k not in later}
    assert key_of(replace(config, optimizer="muon"))["optimizer"] == "muon"
    assert key_of(replace(config, accumulate=2))["accumulate"] == 2
    assert key_of(replace(config, track="wandb")) == key_of(config)  # it changes no result
    assert key_of(RegenerateConfig()) == asdict(RegenerateConfig())
