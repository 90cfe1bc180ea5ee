"""Tiny random targets and drafts, made once per session; nothing is downloaded."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from redraft.adapters.table import ADAPTERS
from redraft.checkpoints.load import stored
from redraft.config import TrainConfig
from redraft.core import console
from redraft.core.records import Answer, Prompt
from redraft.decoding.sampling import Sampling
from redraft.drafts.eagle3.network import Eagle3Draft
from redraft.drafts.new import new_draft
from redraft.metrics.measure import answer_all
from redraft.models.loading import load_target
from redraft.models.target import Target
from redraft.training.train import train
from redraft_experiments.language_model import END, PAD, SPECIALS, TEMPLATE
from tests.adapters.toy import NEURON

console.set_quiet(True)
# Tests run in two processes, and models this small gain nothing from a second thread.
torch.set_num_threads(1)

LONGEST = "test_pretrained.py"
"""The file that takes longest: with it at the end, one worker would wait for the other."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name != LONGEST)


SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": SPECIALS.index(END),
    "pad_token_id": SPECIALS.index(PAD),
    "bos_token_id": None,
}
FAMILIES: dict[str, Callable[[int], Any]] = {
    "llama": lambda v: LlamaConfig(vocab_size=v, **SHAPE),
    "qwen2": lambda v: Qwen2Config(vocab_size=v, **SHAPE),
    "qwen3": lambda v: Qwen3Config(vocab_size=v, head_dim=8, **SHAPE),
    "mistral": lambda v: MistralConfig(vocab_size=v, sliding_window=16, head_dim=8, **SHAPE),
    "gemma": lambda v: GemmaConfig(vocab_size=v, head_dim=8, **SHAPE),
    "phi": lambda v: PhiConfig(vocab_size=v, **SHAPE),
    "phi3": lambda v: Phi3Config(vocab_size=v, **SHAPE),
}


def make_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token per byte, and the family's special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIALS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)
    if template:
        fast.chat_template = template
    return fast


def save_target(folder: Path, config: Any, seed: int = 0, template: str | None = TEMPLATE) -> Path:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():  # livelier than the library's start
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    model.save_pretrained(folder)
    make_tokenizer(template).save_pretrained(folder)
    return folder


def tiny_model(
    family: str,
    dtype: torch.dtype = torch.float32,
    *,
    vocab: int = 97,
    seed: int = 0,
    gain: float = 1.5,
    **variant: Any,
) -> Any:
    """A random model of a family that Transformers knows, 8 thin layers.

    The same numbers in every dtype, up to rounding. `gain` is how lively its weights are, `variant`
    are config fields.
    """
    sizes = {
        "vocab_size": vocab,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    config = CONFIG_MAPPING[family](**{**sizes, **variant})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                noise = torch.randn(parameter.shape, generator=draw)
                parameter.copy_(noise * gain * parameter.shape[-1] ** -0.5)
    model.generation_config.eos_token_id = 1
    return model.to(dtype)


def write_prompts(path: Path, count: int, start: int = 0) -> Path:
    rows = [
        {"id": f"p{i}", "messages": [{"role": "user", "content": f"Say {i * 7} and {i}."}]}
        for i in range(start, start + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def toy_adapter() -> Iterator[None]:
    """The toy adapter in the table, first: attached first, merged last."""
    rows = dict(ADAPTERS)
    ADAPTERS.clear()
    ADAPTERS.update({NEURON.name: NEURON, **rows})
    yield
    del ADAPTERS[NEURON.name]


@pytest.fixture(scope="session")
def target_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    vocabulary = len(make_tokenizer())
    return save_target(tmp_path_factory.mktemp("target"), FAMILIES["llama"](vocabulary))


@pytest.fixture(scope="session")
def target(target_folder: Path) -> Target:
    return load_target(str(target_folder))


def asked(target: Target) -> list[Prompt]:
    return [
        Prompt(
            f"p{i}", tuple(target.render([{"role": "user", "content": f"Say {i * 7} and {i}."}]))
        )
        for i in range(24)
    ]


@pytest.fixture(scope="session")
def prompts(target: Target) -> list[Prompt]:
    return asked(target)


@pytest.fixture(scope="session")
def answers(target: Target, prompts: list[Prompt]) -> list[Answer]:
    """Greedy answers with enough lookahead to replay any K up to 8."""
    return answer_all(target, prompts, 32, 8, Sampling())


@pytest.fixture(scope="session")
def trained_kind(target: Target, answers: list[Answer]) -> Callable[[str], Any]:
    """A draft of a kind that is right some of the time, so that every accepted length occurs."""

    @functools.cache
    def made(kind: str) -> Any:
        draft = new_draft(target, answers, kind=kind)
        config = TrainConfig(
            method="scratch", lr=1e-2, epochs=12, batch_tokens=512, rollout=4, evaluations=1
        )
        train(target, draft, answers, answers[:4], config, k=4)
        return draft.eval().requires_grad_(False)

    return made


@pytest.fixture(scope="session")
def trained_draft(trained_kind: Callable[[str], Any]) -> Eagle3Draft:
    draft: Eagle3Draft = trained_kind("eagle3")
    return draft


@pytest.fixture(scope="session")
def kind_folder(
    target: Target, trained_kind: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The trained draft of a kind as a checkpoint folder."""

    @functools.cache
    def made(kind: str) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        stored(trained_kind(kind), target).save(folder)
        return folder

    return made


@pytest.fixture(scope="session")
def draft_folder(kind_folder: Callable[[str], Path]) -> Path:
    return kind_folder("eagle3")


def fresh_draft(
    target: Target,
    *,
    kind: str = "eagle3",
    vocab: int | None = None,
    width: int | None = 24,
    **variant: Any,
) -> Any:
    """An untrained draft with lively weights, in the target's dtype; `variant` are config fields."""
    answer = Answer("a", (1,), tuple(range(5, 60)), 55, "length")
    draft: Any = new_draft(target, [answer], kind=kind, draft_vocab_size=vocab, width=width)
    if variant:
        config = dataclasses.replace(draft.config, **variant)
        vocabulary = [] if draft.draft_vocab is None else [draft.draft_vocab]
        draft = type(draft)(config, *vocabulary)
        draft.bind(target)
    draft.reinitialise(3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in draft.parameters():  # norms and biases that matter
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return draft.to(target.dtype).eval().requires_grad_(False)


def in_double(folder: Path) -> Target:
    """The target at float64, where equality is strict."""
    return load_target(str(folder), dtype="float64")
