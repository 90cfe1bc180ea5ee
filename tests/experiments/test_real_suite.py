"""The suite of real models, built of a tiny one: what is there, what a second run skips, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from redraft.checkpoints.load import load_draft, read_draft
from redraft.config import RegenerateConfig
from redraft.core.errors import UserError
from redraft.generation.answer_file import read_answers
from redraft_experiments import datasets, real_suite
from redraft_experiments.language_model import IGNORE
from redraft_experiments.real_drafts import DRAFTS, _example, keep_layers
from redraft_experiments.real_suite import build_real_suite, load_real
from tests.conftest import SHAPE, make_tokenizer, save_target

pytestmark = pytest.mark.usefixtures("small_real")


def test_it_is_built_once_and_loads(
    data: Path, tmp_path: Path, small_real: list[RegenerateConfig]
) -> None:
    out = tmp_path / "real"
    members = ["math-sft", "code-lora", "safety-dpo"]
    learned = [name for name in DRAFTS if name != "kept"]
    suite = build_real_suite(out, data=str(data), members=members, drafts=learned)
    assert [bool(c.temperature) for c in small_real] == [True, False]
    state = json.loads((out / "state.json").read_text())
    build_real_suite(out, data=str(data), members=members, drafts=learned)
    assert len(small_real) == 2
    assert json.loads((out / "state.json").read_text()) == state
    base = load_real(out, "base")
    assert load_draft(suite["draft"], base).aux_layers
    drafts = [load_draft(str(out / row.folder), base) for row in DRAFTS.values()]
    assert len({type(draft) for draft in drafts}) == 3
    assert len({load_real(out, name).weights_hash() for name in ("base", *suite["members"])}) == 4
    answers = read_answers(out / "answers" / "base.jsonl")
    assert {bool(a.temperature) for a in answers} == {True, False}


def test_no_question_is_in_two_files_but_the_drafts_own_share_of_chat(
    data: Path, tmp_path: Path
) -> None:
    build_real_suite(tmp_path / "real", data=str(data), members=[])
    texts = {
        file.stem: [json.loads(line)["messages"][0]["content"] for line in file.open()]
        for file in (tmp_path / "real/prompts").glob("*.jsonl")
    }
    assert {len(texts[f"{d}-adapt"]) for d in real_suite.DOMAINS} == {9}
    assert len(texts["base"]) == 4 * 6 + 3
    for split, count in (("adapt", 9), ("eval", 5)):
        texts[split] = [
            json.loads(line)["messages"][0]["content"]
            for line in real_suite.prompts_of(tmp_path / "real", "safety", split).open()
        ]
        assert len(texts[split]) == count
    every = [text for found in texts.values() for text in found]
    assert len(set(every)) == len(every)


def test_a_pruned_model_is_the_layers_that_were_kept(tmp_path: Path) -> None:
    """Reference: the same layers applied one after the other."""
    save_target(tmp_path / "base", LlamaConfig(vocab_size=len(make_tokenizer()), **SHAPE))
    whole, pruned = (LlamaForCausalLM.from_pretrained(tmp_path / "base") for _ in range(2))
    layers = whole.config.num_hidden_layers
    keep_layers(pruned, (0, layers - 1))
    assert layers > 2
    tokens = torch.arange(2, 12)[None]
    skipped = whole.model.layers[1 : layers - 1]
    for layer in skipped:
        layer.forward = lambda hidden, *_, **__: hidden
    with torch.no_grad():
        assert torch.allclose(pruned(tokens).logits, whole(tokens, use_cache=False).logits)
        grown = pruned.generate(tokens, max_new_tokens=4, do_sample=False)  # its cache has 2 layers
        plain = pruned.generate(tokens, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(grown, plain)


def test_only_the_answer_is_learned() -> None:
    assert _example((1, 2), (3, 4)) == ([1, 2, 3, 4], [IGNORE, IGNORE, 3, 4])


def test_mistakes_are_named(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"unknown member 'math'; did you mean"):
        build_real_suite(tmp_path / "real", data=str(data), members=["math"])
    with pytest.raises(UserError, match=r"unknown draft 'eagle4'; did you mean"):
        build_real_suite(tmp_path / "real", data=str(data), members=[], drafts=["eagle4"])
    with pytest.raises(UserError, match="eagle3 and kept would be the same folder"):
        build_real_suite(tmp_path / "real", data=str(data), drafts=["eagle3", "kept"])
    monkeypatch.delenv(datasets.VARIABLE, raising=False)
    with pytest.raises(UserError, match="name a folder of real data: --data FOLDER"):
        build_real_suite(tmp_path / "real")


def test_of_a_draft_of_the_base_only_the_body_is_its_own(
    data: Path, tmp_path: Path, small_real: list[RegenerateConfig]
) -> None:
    suite = build_real_suite(tmp_path / "real", data=str(data), members=[])
    base = load_real(tmp_path / "real", "base")
    tensors = read_draft(suite["draft"]).tensors
    rows = tensors["d2t"] + torch.arange(len(tensors["d2t"]))
    assert base.head_VH is not None
    assert torch.equal(tensors["lm_head.weight"], base.head_VH[rows])
    assert not torch.equal(tensors["norm.weight"], base.model.model.norm.weight)  # it was trained
