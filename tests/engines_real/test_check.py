"""A check through a running vLLM: its counters say what our replay says of the same answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from redraft.check.served import check_served
from redraft.checkpoints.load import load_draft
from redraft.config import RegenerateConfig
from redraft.core.errors import UserError
from redraft.decoding.sampling import Sampling
from redraft.metrics.measure import answer_all, measure_answers
from redraft.prompts.prompts import read_prompts
from redraft.serving.engine import Serving, Speculation
from redraft.serving.vllm import VLLM
from redraft_experiments.suite import build_suite, load_member
from tests.engines_real.conftest import BUILD, environment_of

pytestmark = [pytest.mark.engine, pytest.mark.full, pytest.mark.timeout(1200)]
PROMPTS, TOKENS, K = 32, 96, 4
ANSWERING = RegenerateConfig(max_new_tokens=TOKENS)


@pytest.fixture(scope="module")
def suite() -> dict[str, Any]:
    return build_suite(BUILD / "suite", size="nano", members=("sft", "lora4"), kinds=("eagle",))


def serving(suite: dict[str, Any], draft: str | None) -> Serving:
    speculation = Speculation("eagle3", draft, K) if draft else None
    source = suite["members"]["sft"]["target"]
    return Serving(source, dtype="float32", max_model_len=512, speculation=speculation)


@pytest.mark.parametrize("drafted", [True, False], ids=["speculating", "plain"])
def test_a_server_is_checked_by_its_counters(
    suite: dict[str, Any], tmp_path: Path, drafted: bool
) -> None:
    environment = environment_of(VLLM)
    file = str(Path(suite["prompts"]) / f"{suite['tuned_domain']}-eval.jsonl")
    what = serving(suite, suite["draft"] if drafted else None)
    with VLLM.serve(environment, what, tmp_path / "log") as client:
        url = f"http://127.0.0.1:{client.server.port}"
        if not drafted:
            with pytest.raises(UserError, match="without speculation"):
                check_served(url, file, most=8, answering=ANSWERING)
            return
        found = check_served(url, file, most=PROMPTS, rows=4, answering=ANSWERING)
    target = load_member(BUILD / "suite", "sft")
    prompts = read_prompts(file, target, PROMPTS, "last").prompts
    answers = answer_all(target, prompts, TOKENS, K, Sampling())
    own = measure_answers(target, load_draft(suite["draft"], target), answers, k=K).acceptance
    print(f"tau {found.tau} by the server's counters, {own.tau} {own.ci} by replay")
    assert found.answer_tokens == sum(answer.length for answer in answers)
    assert found.tau[0] == pytest.approx(own.tau, rel=0.01)
    assert found.per_position == pytest.approx(own.per_position, abs=0.02)
    assert found.tau[1] <= own.tau <= found.tau[2]
    assert found.others < 0.05
