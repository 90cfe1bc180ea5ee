"""The bench of the stages on a model of one's own: what it counts, without a chat template too, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from redraft.core.errors import UserError
from redraft_experiments import datasets, pipeline
from redraft_experiments.language_model import TEMPLATE
from tests.conftest import SHAPE, make_tokenizer, save_target


@pytest.mark.parametrize("chat", [True, False])
def test_a_folder_is_measured_with_and_without_a_chat_template(
    chat: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(datasets.VARIABLE, raising=False)
    monkeypatch.setattr(pipeline, "PROMPTS", 8)
    monkeypatch.setattr(pipeline, "TOKENS", 10)
    config = LlamaConfig(vocab_size=len(make_tokenizer()), **SHAPE)
    save_target(tmp_path / "model", config, template=TEMPLATE if chat else None)
    asked: list[tuple[int, ...]] = []
    inner = pipeline.answer_all

    def answer_all(target: object, prompts: list[pipeline.Prompt], *rest: object) -> object:
        asked.extend(tuple(prompt.tokens) for prompt in prompts)
        return inner(target, prompts, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(pipeline, "answer_all", answer_all)
    found = pipeline.bench_pipeline(model=str(tmp_path / "model"), dtype="bfloat16")
    whole = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    assert found["parameters"] == whole.num_parameters()
    assert found["dtype"] == str(torch.bfloat16)
    assert found["training_tflop"] > 0
    assert found["answer_tokens"] <= 8 * 10
    assert all(row["tokens_per_second"] > 0 for row in found["stages"].values())
    tokenizer = make_tokenizer()
    turns = {tokenizer.convert_tokens_to_ids(token) for token in ("<|user|>", "<|assistant|>")}
    assert len(asked) == 8
    assert all(bool(turns & set(row)) == chat for row in asked)


def test_one_of_suite_and_model_is_named(tmp_path: Path) -> None:
    for named in ({}, {"suite": tmp_path, "model": "model"}):
        with pytest.raises(UserError, match="name one of --suite FOLDER"):
            pipeline.bench_pipeline(**named)  # type: ignore[arg-type]
