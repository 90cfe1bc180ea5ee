"""A real pretrained model, end to end: SmolLM2-135M-Instruct, 49,152 tokens, bf16.

Skipped where its package is not installed (`make install` installs it).
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import redraft
from redraft import cli
from redraft.adapters.adapter import declare, prepare, take
from redraft.adapters.kind import Setup
from redraft.adapters.merge import merge
from redraft.adapters.table import read_method
from redraft.checkpoints.load import load_draft, stored
from redraft.config import TrainConfig
from redraft.core.errors import UserError
from redraft.core.records import Answer, Prompt
from redraft.decoding.plain import decode_plain
from redraft.decoding.sampling import Sampling
from redraft.drafts.eagle3.network import Eagle3Draft
from redraft.drafts.new import new_draft
from redraft.generation.general_prompts import made_up_questions
from redraft.metrics.acceptance import pooled_tau
from redraft.metrics.live import live
from redraft.metrics.lossless import compare
from redraft.metrics.measure import answer_all
from redraft.metrics.replay import replay
from redraft.models.loading import load_target
from redraft.models.target import Target
from redraft.training.train import train
from redraft_experiments.pretrained import build_model, missing, tune
from redraft_experiments.synthetic import Sample

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing("smollm2")), reason=missing("smollm2")),
    pytest.mark.timeout(600),
]
K, LONGEST = 4, 24


@dataclass
class Suite:
    """The base model, a LoRA fine-tune of it, a draft of the base, prompts, and the base's answers."""

    base: Path
    adapter: Path
    draft: Path
    prompts: Path
    target: Target
    asked: list[Prompt]
    answers: list[Answer]


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    root = tmp_path_factory.mktemp("smollm2")
    build_model("smollm2", root / "base")
    things = ("a cat", "the sea", "bread", "a bicycle", "rain", "the moon", "a violin", "salt")
    rows: list[dict[str, Any]] = [
        {"id": f"{verb} {thing}", "messages": [{"role": "user", "content": f"{verb} {thing}."}]}
        for verb in ("Describe", "Explain")
        for thing in things
    ]
    told = {"role": "assistant", "content": "Ask a librarian about it, and read slowly."}
    chats = [Sample(row["id"], "tune", (*row["messages"], told)) for row in rows[:4]]
    tune(root / "base", chats, root / "lora", steps=2, batch=2)
    prompts = root / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    target = load_target(str(root / "base"))
    asked = [Prompt(str(r["id"]), tuple(target.render(r["messages"]))) for r in rows]
    answers = answer_all(target, asked, LONGEST, K, Sampling())
    draft = new_draft(target, answers, draft_vocab_size=8192, width=256)
    config = TrainConfig(
        method="scratch",
        precision="fp32",
        loss="ce",
        lr=3e-3,
        epochs=8,
        batch_tokens=512,
        evaluations=1,
        rollout=K,
    )
    train(target, draft, answers, answers[:4], config, k=K)
    stored(draft, target).save(root / "draft")
    return Suite(root / "base", root / "lora", root / "draft", prompts, target, asked, answers)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    def run(*arguments: object) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["redraft", *map(str, arguments), "--json"])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        assert code == 0, captured.err
        found: dict[str, Any] = json.loads(captured.out)
        return found

    return run


def test_the_model_answers(suite: Suite) -> None:
    assert suite.target.dtype == torch.bfloat16
    assert suite.target.vocab_size == 49_152
    question = [{"role": "user", "content": "What is the capital of France? Answer briefly."}]
    answer = decode_plain(suite.target, suite.target.render(question), 16)
    assert "Paris" in suite.target.tokenizer.decode(answer)
    assert build_model("smollm2", suite.base)["licence"] == "Apache-2.0"  # there already
    with pytest.raises(UserError, match="holds files that `redraft bench model` did not write"):
        build_model("smollm2", suite.adapter)


@pytest.mark.bench
def test_check_adapt_and_measure_run_from_the_command_line(
    suite: Suite, command: Any, tmp_path: Path
) -> None:
    tuned = ("--target", suite.base, "--target-adapter", suite.adapter)
    shared = (*tuned, "--draft", suite.draft, "--prompts", suite.prompts)
    checked = command("check", *shared, "--most", 8, "--max-new-tokens", 8)
    assert checked["evidence"]["unadapted"]["tau"] >= 1, sorted(checked["evidence"])
    run = tmp_path / "run"
    settings = (
        "general.aside=8",
        "train.epochs=1",
        "train.batch_tokens=512",
        "train.precision=fp32",
        "train.evaluations=1",
        "regenerate.max_new_tokens=12",
        "measure.eval_new_tokens=12",
    )
    sets = [word for setting in settings for word in ("--set", setting)]
    report = command("adapt", *shared, "--out", run, "--limit", 12, *sets)
    assert report["train"]["steps"] > 0
    assert report["off_domain"]["general-after"]["prompts"] == 8
    assert report["train"]["peak_mb"] < 4 * report["train"]["predicted_peak_mb"]
    measured = command(
        *("measure", *tuned, "--draft", run / "draft", "--prompts", suite.prompts),
        *("--limit", 4, "--max-new-tokens", 12),
    )
    assert 1 <= measured["tau"] <= K + 1
    assert measured["ci"][0] < measured["tau"] < measured["ci"][1]


def test_training_taught_the_draft_something(suite: Suite) -> None:
    draft = load_draft(str(suite.draft), suite.target, suite.target.dtype)
    assert pooled_tau(replay(suite.target, draft, suite.answers, K)) > 1.15


def test_speculative_decoding_is_plain_decoding_up_to_near_ties(suite: Suite) -> None:
    draft = load_draft(str(suite.draft), suite.target, suite.target.dtype)
    some = suite.asked[:4]
    plain = [decode_plain(suite.target, prompt.tokens, LONGEST) for prompt in some]
    for batch in (1, 4):
        _, answers = live(suite.target, draft, some, K, LONGEST, batch_size=batch)
        found = compare(suite.target, some, plain, [a.answer for a in answers])
        print(batch, found)
        assert found.holds


def test_replay_is_the_live_loop_in_float32_step_for_step(suite: Suite) -> None:
    target = load_target(str(suite.base), dtype="float32")
    draft = load_draft(str(suite.draft), target, target.dtype)
    answers = answer_all(target, suite.asked[:4], LONGEST, K, Sampling())
    traces, lived = live(target, draft, suite.asked[:4], K, LONGEST)
    assert [a.answer for a in lived] == [a.answer for a in answers]
    assert [t.accepted for t in traces] == [t.accepted for t in replay(target, draft, answers, K)]


def test_export_and_merge_keep_what_a_draft_accepts(suite: Suite, tmp_path: Path) -> None:
    """Export against import, and merged against unmerged, in both dtypes."""
    for dtype, strays in ((torch.float32, 0), (torch.bfloat16, 6)):
        draft = load_draft(str(suite.draft), suite.target, dtype)
        shared = {name: tensor.clone() for name, tensor in draft.state_dict().items()}
        stored(draft, suite.target).save(tmp_path / str(dtype))
        again = load_draft(str(tmp_path / str(dtype)), suite.target, dtype)
        ours, theirs = (replay(suite.target, d, suite.answers[:8], K) for d in (draft, again))
        assert ours == theirs
        method = read_method("expert+norms")
        prepare(draft, method, Setup(width=32, rank=4, init="active", seed=0))
        draw = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in declare(draft, method):
                if name.endswith("down_proj.weight"):
                    parameter.copy_(0.02 * torch.randn(parameter.shape, generator=draw))
        merged = Eagle3Draft(replace(draft.config, intermediate_size=256 + 32), draft.draft_vocab)
        merged.load_state_dict(merge(shared, take(draft, method)))
        merged.to(dtype).bind(suite.target)
        apart, one = (replay(suite.target, d, suite.answers, K) for d in (draft, merged))
        moved = sum(abs(a.gained - b.gained) for a, b in zip(apart, one, strict=True))
        assert moved <= strays, dtype
        assert [t.gained for t in apart] != [t.gained for t in ours]  # the adapter does something


def test_transformers_generate_is_plain_generate_up_to_near_ties(suite: Suite) -> None:
    """Prompts one at a time, in bf16, through Transformers' own `generate`."""
    model, some = suite.target.model, suite.asked[:3]
    draft = load_draft(str(suite.draft), suite.target, suite.target.dtype)
    texts: dict[bool, list[list[int]]] = {True: [], False: []}
    for prompt in some:
        ids = torch.tensor([prompt.tokens])
        for drafted, more in (
            (False, {}),
            (True, {"custom_generate": redraft.generate(draft, k=K)}),
        ):
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=16,
                pad_token_id=2,
                **more,
            )
            texts[drafted].append(out[0, ids.shape[1] :].tolist())
    assert compare(suite.target, some, texts[False], texts[True]).holds


def test_it_makes_up_questions_that_a_user_might_ask(suite: Suite) -> None:
    found = made_up_questions(suite.target, 4)
    assert len({text.casefold() for text in found}) == 4
    assert all(len(text.split()) > 2 and "<|im_" not in text for text in found)
