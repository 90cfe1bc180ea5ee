"""A draft folder with any one value changed runs, or is refused by a sentence."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import logging

from redraft.checkpoints.load import stored
from redraft.models.target import Target
from tests.checkpoints import fuzzed
from tests.checkpoints.crafted import LAYOUTS
from tests.conftest import FAMILIES, fresh_draft, make_tokenizer, save_target

SEED = 16
COUNTS = {"eagle3": 80, "eagle": 60, "speculators": 60, "token_lm": 24}
"""Changes tried of each kind; `fuzzed.changes` has all of them."""


@pytest.fixture(scope="module")
def folder(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def make(kind: str) -> Path:
        home = tmp_path_factory.mktemp(kind) / "d"
        if kind == "eagle3":
            stored(fresh_draft(target, vocab=40), target).save(home)
        elif kind == "eagle":
            LAYOUTS["safeai_eagle"](home, fresh_draft(target, kind="eagle"))
        elif kind == "speculators":
            LAYOUTS["speculators"](home, fresh_draft(target, vocab=40))
        else:
            save_target(home, FAMILIES["llama"](len(make_tokenizer())), seed=5)
        return home

    return make


@pytest.mark.parametrize("kind", COUNTS)
def test_one_value_changed(
    target: Target, folder: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    logging.set_verbosity_error()
    whole = folder(kind)
    assert fuzzed.outcome(whole, target) == ("runs", "runs")
    seen: Counter[str] = Counter()
    for label, change in fuzzed.sample(
        json.loads((whole / "config.json").read_text()), COUNTS[kind], SEED
    ):
        changed = Path(shutil.copytree(whole, tmp_path / "d"))
        change(changed)
        try:
            alone, _ = fuzzed.outcome(changed, target)
        except Exception as problem:
            raise AssertionError(
                f"{kind}, {label}: {type(problem).__name__} {problem}"
            ) from problem
        seen[alone] += 1
        shutil.rmtree(changed)
    assert min(seen["runs"], seen["refused"]) > COUNTS[kind] // 10, seen


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("token_lm", "num_hidden_layers", 1 << 40),
        ("token_lm", "rms_norm_eps", -1.0),
        ("token_lm", "num_attention_heads", 0),
        ("eagle3", "head_dim", 1 << 30),
        ("eagle3", "num_aux_hidden_states", 1 << 30),
        ("eagle3", "rope_theta", 0),
        ("eagle", "num_key_value_heads", 3),
        ("eagle", "rms_norm_eps", -1e-6),
    ],
)
def test_a_value_that_would_not_compute_is_refused(
    target: Target, folder: Callable[[str], Path], kind: str, key: str, value: object
) -> None:
    home = folder(kind)
    path = home / "config.json"
    config = {**json.loads(path.read_text()), key: value}
    config.pop("rope_parameters", None)
    config |= {"fc_norm": True} if key == "num_aux_hidden_states" else {}
    path.write_text(json.dumps(config))
    assert fuzzed.outcome(home, target) == ("refused", "refused")
