"""Inside Transformers: `generate` with the draft returns what `generate` returns without it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    TextStreamer,
)

import redraft
from redraft.core.errors import UserError
from redraft.decoding import transformers_generate
from redraft.decoding.acceptance_modes import Decoding
from redraft.decoding.plain import decode_plain
from redraft.decoding.sampling import Sampling
from redraft.models.target import Target
from tests.conftest import FAMILIES, fresh_draft, make_tokenizer, save_target
from tests.decoding.cheat import CheatingDraft

WORDS = ("Hi there", "x", "Tell me a lot of things")
LONGEST = 16


def model_and_inputs(folder: Path) -> tuple[Any, Any, dict[str, Tensor]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    rows = [[{"role": "user", "content": text}] for text in WORDS]
    inputs = tokenizer.apply_chat_template(
        rows, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    return model, tokenizer, dict(inputs)


def cheat(model: Any) -> CheatingDraft:
    """A draft that is often right; binding is Transformers' model made a target."""
    draft = CheatingDraft(Target(model, None, ("model",), freeze=False))
    draft.bind = lambda target: None  # type: ignore[method-assign]
    return draft


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Grouped queries in all; a sliding window of 16 in one, which prompt and answer exceed."""
    folder = tmp_path_factory.mktemp(request.param)
    save_target(folder, FAMILIES[request.param](len(make_tokenizer())))
    return model_and_inputs(folder)


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "repetition penalty": {"repetition_penalty": 1.3},
    "no repeated n-grams": {"no_repeat_ngram_size": 2},
    "at least some tokens": {"min_new_tokens": 9, "eos_token_id": list(range(60, 220))},
    "several stop tokens": {"eos_token_id": [*range(100, 140), 9]},
    "a prefix function": {
        "prefix_allowed_tokens_fn": lambda row, ids: [7 + row, 50 + len(ids) % 5]
    },
}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_output_is_that_of_generate(model: Any, name: str) -> None:
    net, _, inputs = model
    options = {"max_new_tokens": LONGEST, "do_sample": False, **OPTIONS[name]}
    hook = redraft.generate(cheat(net), k=3, processors_on_draft=name != "greedy")
    plain = net.generate(**inputs, **options)
    found = net.generate(**inputs, **options, custom_generate=hook)
    assert torch.equal(found, plain)
    assert sum(map(sum, hook.accepted)) > 0
    wrong = net.generate(**inputs, max_new_tokens=LONGEST, do_sample=False)
    assert name == "greedy" or not torch.equal(wrong, plain), "the option has to matter"


def test_dictionaries_hold_scores_and_logits(model: Any) -> None:
    net, _, inputs = model
    options: dict[str, Any] = {
        "max_new_tokens": LONGEST,
        "do_sample": False,
        "repetition_penalty": 1.2,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
    }
    plain = net.generate(**inputs, **options)
    found = net.generate(**inputs, **options, custom_generate=redraft.generate(cheat(net), k=3))
    assert torch.equal(found.sequences, plain.sequences)
    for name in ("scores", "logits"):
        mine, theirs = getattr(found, name), getattr(plain, name)
        assert len(mine) == len(theirs)
        ended = torch.zeros(len(WORDS), dtype=torch.bool)
        for at, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            assert torch.allclose(a[~ended], b[~ended].float(), atol=1e-5)
            ended |= plain.sequences[:, -len(theirs) + at] == net.generation_config.eos_token_id


def test_sampling_is_seeded_and_row_r_is_what_seed_plus_r_gives(model: Any) -> None:
    net, _, inputs = model
    options = {"max_new_tokens": LONGEST, "do_sample": True, "temperature": 0.8, "top_k": 0}
    target = Target(net, None, ("model",), freeze=False)
    together = net.generate(
        **inputs, **options, custom_generate=redraft.generate(cheat(net), k=4, seed=5)
    )
    for row in range(len(WORDS)):
        prompt = inputs["input_ids"][row][inputs["attention_mask"][row] == 1].tolist()
        decoding = Decoding("seeded", Sampling(0.8))
        plain = decode_plain(target, prompt, LONGEST, decoding, 5 + row)
        answer = together[row, inputs["input_ids"].shape[1] :].tolist()
        assert answer[: len(plain)] == plain
        other = fresh_draft(target)
        alone = net.generate(
            torch.tensor([prompt]),
            **options,
            custom_generate=redraft.generate(other, k=2, seed=5 + row),
        )
        assert alone[0, len(prompt) :].tolist() == plain


def test_without_a_seed_torch_decides(model: Any) -> None:
    net, _, inputs = model

    def run() -> Tensor:
        hook = redraft.generate(cheat(net), acceptance="sampled")
        out: Tensor = net.generate(**inputs, max_new_tokens=8, do_sample=True, custom_generate=hook)
        return out

    torch.manual_seed(1)
    first = run()
    torch.manual_seed(1)
    assert torch.equal(first, run())
    assert not torch.equal(first, run())


class After(StoppingCriteria):
    """Stops after a token's third time; counts how often it was asked."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.asked.append(input_ids.shape[1])
        return torch.tensor([int((row == row[-1]).sum()) >= 3 for row in input_ids])


def test_stopping_criteria_are_asked_for_every_token(model: Any) -> None:
    net, _, inputs = model
    one = {name: tensor[:1] for name, tensor in inputs.items()}
    mine, theirs = After(), After()
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False}
    plain = net.generate(**one, **options, stopping_criteria=StoppingCriteriaList([theirs]))
    found = net.generate(
        **one,
        **options,
        stopping_criteria=StoppingCriteriaList([mine]),
        custom_generate=redraft.generate(cheat(net), k=5),
    )
    assert torch.equal(found, plain)
    assert mine.asked == theirs.asked


def test_stop_strings_are_a_criterion(model: Any) -> None:
    net, tokenizer, inputs = model
    one = {name: tensor[:1] for name, tensor in inputs.items()}
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False}
    whole = net.generate(**one, **options)
    words = tokenizer.decode(whole[0, one["input_ids"].shape[1] :])
    criteria = [StopStringCriteria(tokenizer, [words[5:7]])]
    plain = net.generate(**one, **options, stopping_criteria=StoppingCriteriaList(criteria))
    assert len(plain[0]) < len(whole[0])
    found = net.generate(
        **one,
        **options,
        stopping_criteria=StoppingCriteriaList(criteria),
        custom_generate=redraft.generate(cheat(net), k=4),
    )
    assert torch.equal(found, plain)


def test_a_streamer_gets_the_whole_text(model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    net, tokenizer, inputs = model
    one = {name: tensor[:1] for name, tensor in inputs.items()}
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    hook = redraft.generate(cheat(net), k=4, streamer=streamer)
    found = net.generate(**one, max_new_tokens=LONGEST, do_sample=False, custom_generate=hook)
    words = tokenizer.decode(found[0, one["input_ids"].shape[1] :])
    assert capsys.readouterr().out == words + "\n"
    with pytest.raises(UserError, match="takes one sequence"):
        net.generate(**inputs, max_new_tokens=4, custom_generate=hook)


def test_a_folder_is_loaded_for_the_model(target_folder: Path, draft_folder: Path) -> None:
    net, _, inputs = model_and_inputs(target_folder)
    hook = redraft.generate(str(draft_folder), k=4)
    options: dict[str, Any] = {"max_new_tokens": LONGEST, "do_sample": False}
    assert torch.equal(
        net.generate(**inputs, **options, custom_generate=hook), net.generate(**inputs, **options)
    )
    assert sum(map(sum, hook.accepted)) > 0
    assert next(net.parameters()).requires_grad, "the user's model is left as it is"


def test_return_sequences_differ_and_are_reproducible(model: Any) -> None:
    net, _, inputs = model
    one = {name: tensor[:1] for name, tensor in inputs.items()}

    def run() -> Tensor:
        hook = redraft.generate(cheat(net), seed=1)
        out: Tensor = net.generate(
            **one, max_new_tokens=8, do_sample=True, num_return_sequences=3, custom_generate=hook
        )
        return out

    first = run()
    assert len({tuple(row) for row in first.tolist()}) == 3
    assert torch.equal(first, run())


class Counts(LogitsProcessor):
    """Keeps a state."""

    calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        return scores + self.calls


REFUSED: dict[str, tuple[Callable[[Any], dict[str, Any]], str]] = {
    "beams": (lambda net: {"num_beams": 2}, "num_beams=2 searches"),
    "state": (lambda net: {"logits_processor": [Counts()]}, "Counts: not known to depend on"),
    "inner states": (
        lambda net: {"return_dict_in_generate": True, "output_hidden_states": True},
        "are not kept",
    ),
    "nothing allowed": (
        lambda net: {"suppress_tokens": list(range(net.config.vocab_size))},
        "forbid every token",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_exact_is_refused(model: Any, name: str) -> None:
    net, _, inputs = model
    arguments, says = REFUSED[name]
    with pytest.raises(UserError, match=says):
        net.generate(
            **inputs,
            max_new_tokens=4,
            do_sample=False,
            custom_generate=redraft.generate(cheat(net)),
            **arguments(net),
        )


def test_more_refusals(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    net, _, inputs = model
    one = {name: tensor[:1] for name, tensor in inputs.items()}
    hook = redraft.generate(cheat(net))
    net.train()
    with pytest.raises(UserError, match="call model.eval"):
        net.generate(**one, max_new_tokens=4, custom_generate=hook)
    net.eval()
    cache = DynamicCache()
    net(one["input_ids"][:, :3], past_key_values=cache)
    with pytest.raises(UserError, match="holds tokens already"):
        net.generate(**one, max_new_tokens=4, past_key_values=cache, custom_generate=hook)
    config = net.generation_config
    config.cache_implementation = "quantized"
    with pytest.raises(UserError, match="cannot be rolled back exactly"):
        hook(net, one["input_ids"], generation_config=config)
    config.cache_implementation = None
    with pytest.raises(UserError, match="was not asked to sample: pass do_sample=True"):
        net.generate(
            **one,
            max_new_tokens=4,
            do_sample=False,
            custom_generate=redraft.generate(cheat(net), acceptance="seeded"),
        )
    with pytest.raises(UserError, match="2 seeds for a batch of 3"):
        net.generate(
            **inputs, do_sample=True, custom_generate=redraft.generate(cheat(net), seed=[1, 2])
        )
    right = {**inputs, "attention_mask": inputs["attention_mask"].flip(1)}
    with pytest.raises(UserError, match="padding_side = 'left'"):
        net.generate(**right, max_new_tokens=4, custom_generate=hook)
    monkeypatch.setattr(transformers_generate.transformers, "__version__", "4.57.1")
    with pytest.raises(UserError, match=r"works with Transformers 5.x, .* installed is 4.57.1"):
        redraft.generate("draft")
