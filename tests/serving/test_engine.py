"""Asking the engine: answers in order, counters, and an engine that fails half-way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from redraft.core.errors import UserError
from redraft.core.records import Prompt
from redraft.serving.counters import Counters, read_counters
from redraft.serving.engine import RunningEngine, Serving, Speculation
from redraft.serving.vllm import VLLM
from tests.serving.conftest import FakeEngine

PROMPTS = [Prompt(f"p{i}", (i, i + 1)) for i in range(8)]
ANSWERS = {f"{i},{i + 1}": [100 + i] * 4 for i in range(8)}


@contextmanager
def asking(fake: FakeEngine, folder: Path) -> Iterator[RunningEngine]:
    what = Serving(
        "t", dtype="float32", max_model_len=64, speculation=Speculation("eagle3", "d", 3)
    )
    with VLLM.serve(fake.environment, what, folder / "log") as client:
        yield client


def test_answers_come_in_order_and_are_counted(fake: FakeEngine, tmp_path: Path) -> None:
    fake.plan(
        answers=ANSWERS,
        delay={"0,1": 0.3},
        k=3,
        steps={name: [3, 0, 1] for name in ANSWERS},
    )
    with asking(fake, tmp_path) as client:
        client.complete((0, 1), 4, ())
        before = client.counters()
        found = client.complete_all(PROMPTS, 3, (), concurrency=4)
        counted = client.counters().since(before)
    assert found == [[100 + i] * 3 for i in range(8)]
    assert before == Counters(3, 9, 4, (2, 1, 1))
    assert counted == Counters(24, 72, 32, (16, 8, 8))
    acceptance = counted.acceptance()
    assert acceptance.tau == 1 + 32 / 24
    assert acceptance.per_position == (16 / 24, 8 / 16, 1.0)


@pytest.mark.parametrize("words", [{}, {"last_words": ""}, {"last_words": '{"choices": [{"ind'}])
def test_an_engine_that_dies_while_answering(
    fake: FakeEngine, tmp_path: Path, words: dict[str, str]
) -> None:
    fake.plan(answers=ANSWERS, die_at_request=3, **words)
    with pytest.raises(UserError) as caught:
        with asking(fake, tmp_path) as client:
            client.complete_all(PROMPTS, 4, (), concurrency=2)
    assert str(caught.value) == (
        "vLLM 0.32.0 died while answering (exit code 9): torch.OutOfMemoryError: the fake ran out "
        f"of memory\nits log: {tmp_path / 'log'}"
    )


def test_a_request_that_is_refused_says_why(fake: FakeEngine, tmp_path: Path) -> None:
    fake.plan(refuse="this model's maximum context length is 8 tokens")
    with pytest.raises(
        UserError, match=r"refused /v1/completions \(HTTP 400\): this model's maximum context"
    ):
        with asking(fake, tmp_path) as client:
            client.complete((1, 2), 4, ())


def test_answers_without_token_ids_are_not_taken(fake: FakeEngine, tmp_path: Path) -> None:
    fake.plan(answers=ANSWERS, no_token_ids=True)
    with pytest.raises(UserError, match="answers without token ids"):
        with asking(fake, tmp_path) as client:
            client.complete((0, 1), 4, ())


def test_counters_of_several_engines_are_summed_and_of_none_are_zero() -> None:
    page = "".join(
        f'vllm:spec_decode_num_drafts_total{{engine="{e}",model_name="m"}} 1.5e+01\n'
        f'vllm:spec_decode_num_accepted_tokens_total{{engine="{e}",model_name="m"}} 20.0\n'
        f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="{e}",position="0"}} 12.0\n'
        for e in range(2)
    )
    assert read_counters(page) == Counters(30, 0, 40, (24,))
    assert read_counters("# nothing here\n") == Counters()
    assert read_counters(page, "llamacpp") == Counters()
    assert read_counters(page.replace("vllm:", "llamacpp:"), "llamacpp").drafts == 30
    assert Counters().acceptance().tau == 1.0
