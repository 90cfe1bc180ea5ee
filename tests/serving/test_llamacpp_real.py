"""A real llama.cpp, where `make engine` has put one: a tiny target and its draft say what redraft says, step for step."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from transformers import LlamaConfig

from redraft.checkpoints.load import read_draft
from redraft.checkpoints.load import stored as store
from redraft.core.errors import UserError
from redraft.core.records import Prompt, StepTrace
from redraft.decoding.sampling import Sampling
from redraft.metrics.measure import answer_all
from redraft.metrics.replay import replay
from redraft.models.loading import load_target
from redraft.models.target import Target
from redraft.serving.engine import Serving, Speculation
from redraft.serving.environment import Environment
from redraft.serving.llamacpp import LLAMACPP, converter_of
from redraft.serving.own_count import Limits, count_own
from tests.conftest import SHAPE, fresh_draft, make_tokenizer, save_target

HERE = Path(__file__).parents[2] / ".venv-llamacpp" / "bin" / "python"
K, TOKENS = 3, 24


@pytest.fixture(scope="module")
def environment() -> Environment:
    try:
        found = LLAMACPP.find(str(HERE) if HERE.is_file() else None)
        converter_of(found)
    except UserError as missing:
        pytest.skip(f"no llama.cpp (make engine installs it): {str(missing).splitlines()[0]}")
    return found


@pytest.fixture
def target(tmp_path: Path) -> Target:
    """A tiny target with a merge in its tokenizer, without which llama.cpp takes no model."""
    folder = tmp_path / "target"
    tokenizer = make_tokenizer()
    save_target(folder, LlamaConfig(vocab_size=len(tokenizer) + 1, **SHAPE))
    file = folder / "tokenizer.json"
    row = json.loads(file.read_text())
    row["model"]["vocab"]["Sa"] = len(tokenizer)
    row["model"]["merges"] = [["S", "a"]]
    file.write_text(json.dumps(row))
    return load_target(str(folder))


def test_texts_and_steps_are_redrafts(
    environment: Environment, target: Target, tmp_path: Path
) -> None:
    draft_folder, target_folder = tmp_path / "draft", tmp_path / "target"
    store(fresh_draft(target), target).save(draft_folder)
    stored = read_draft(str(draft_folder))
    prompts = [
        Prompt(str(i), tuple(target.render([{"role": "user", "content": f"Say {i * 7} and {i}."}])))
        for i in range(6)
    ]
    speculation = Speculation(stored.row.methods["llama.cpp"], str(draft_folder), K)
    what = Serving(str(target_folder), "float32", 256, speculation=speculation)
    what = dataclasses.replace(what, flags=("--threads", "1", "--threads-batch", "1"))
    what = LLAMACPP.prepare(environment, what, tmp_path)
    with LLAMACPP.serve(environment, what, tmp_path / "log") as running:
        before = running.counters()
        said = running.complete_all(prompts, TOKENS, target.stop_ids)
        counted = running.counters().since(before)
    answers = answer_all(target, prompts, TOKENS, K, Sampling())
    assert said == [list(answer.answer) for answer in answers]
    traces = replay(target, stored.build(target), answers, K)
    steps = [trace for trace in traces if isinstance(trace, StepTrace)]
    own = count_own(steps, answers, Limits(K, TOKENS, target.stop_ids), LLAMACPP.cut)
    assert (counted.drafts, counted.accepted) == (own.drafts, own.accepted)
    assert own.drafts > len(prompts)
