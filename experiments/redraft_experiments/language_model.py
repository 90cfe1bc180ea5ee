"""Training small causal language models and their tokenizer: the raw material of a toy suite.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from redraft.core.console import Progress
from redraft.core.files import writing
from redraft.core.rng import seeded
from redraft.models.loading import load_target
from redraft.training.optimizer import schedule
from redraft.training.precision import WORTH, WORTH_FIXED, autocast, choose_precision

from .synthetic import Sample

END, PAD = "<|end|>", "<|pad|>"
SPECIALS = [PAD, END, "<|user|>", "<|assistant|>", "<|system|>"]
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
IGNORE = -100


@dataclass(frozen=True)
class Shape:
    """The shape of a toy suite's target. Thin and deep, so that three aux layers are distinct."""

    layers: int
    hidden: int
    width: int
    vocab: int
    context: int
    head_dim: int = 32


def train_tokenizer(
    texts: Sequence[str], vocab: int, folder: Path, *, superwords: bool = False
) -> Any:
    """A byte-level BPE tokenizer with the suite's chat template, saved to `folder`.

    With `superwords` merges may cross spaces: in templated text a token per word would leave most
    tokens certain, and a draft would look better than drafts are. Digits stay single.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False, use_regex=not superwords)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)
    fast.chat_template = TEMPLATE
    with writing(folder):
        fast.save_pretrained(folder)
    return fast


def new_model(shape: Shape, seed: int) -> Any:
    """A Llama of the suite's shape with fresh weights."""
    return fresh(LlamaForCausalLM, LlamaConfig(**config_of(shape)), seed)


def config_of(shape: Shape) -> dict[str, Any]:
    """What config.json of a model of this shape holds, whatever its architecture."""
    heads = shape.hidden // shape.head_dim
    return {
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(heads // 2, 1),
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.context,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": SPECIALS.index(END),
        "pad_token_id": SPECIALS.index(PAD),
    }


def fresh(model: Any, config: Any, seed: int) -> Any:
    """A model of this class with the seed's weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model(config)


Example = tuple[list[int], list[int]]
"""Token ids and labels (IGNORE where nothing is learned)."""


def chat_ids(tokenizer: Any, sample: Sample) -> list[int]:
    """A chat's tokens under the tokenizer's template."""
    ids = tokenizer.apply_chat_template(list(sample.messages), tokenize=True, return_dict=True)
    return list(ids["input_ids"])


def supervised(tokenizer: Any, sample: Sample) -> Example:
    """A chat whose last assistant turn is learned."""
    whole = chat_ids(tokenizer, sample)
    asked = tokenizer.apply_chat_template(
        list(sample.messages[:-1]), add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]
    return whole, [IGNORE] * len(asked) + whole[len(asked) :]


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def save_model(folder: Path, model: Any, tokenizer: Any) -> None:
    """A model (or PEFT adapter) and its tokenizer as a folder."""
    with writing(folder):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def save_merged(folder: Path, base: str, adapter: str) -> None:
    """A model with its LoRA adapter merged, and its tokenizer, as a folder."""
    target = load_target(base, adapter=adapter)
    save_model(folder, target.model.merge_and_unload(), target.tokenizer)


def packed(rows: Sequence[Sequence[int]], window: int) -> list[Example]:
    """Rows joined and cut into full windows; every token is a label."""
    stream = [token for row in rows for token in row]
    cut = [stream[i : i + window] for i in range(0, len(stream) - window + 1, window)]
    return [(ids, ids) for ids in cut]


def fit(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    label: str,
    precision: str = "auto",
) -> float:
    """Train for `steps` batches, cycling through `examples`; the mean loss of the last tenth."""
    device = next(model.parameters()).device
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    batches = _batches(examples, batch, steps, seed)
    model.train()

    def loss_of(indices: list[int]) -> Tensor:
        ids, labels = _pad([examples[i] for i in indices], device)
        loss: Tensor = model(input_ids=ids, labels=labels, use_cache=False).loss
        return loss

    def probe(at: int) -> None:
        loss_of(batches[at % len(batches)]).backward()  # type: ignore[no-untyped-call]
        optimizer.zero_grad()

    one_shape = len({len(ids) for ids, _ in examples}) == 1
    if precision == "auto":
        precision = choose_precision(device, probe, WORTH_FIXED if one_shape else WORTH)
    recent: list[float] = []
    with Progress(label, steps, "steps") as progress:
        for step, indices in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = lr * schedule(step, steps, 0.05)
            with autocast(device, precision):
                loss = loss_of(indices)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            recent.append(loss.item())
            progress.advance(1, f"loss {recent[-1]:.3f}")
    model.eval()
    tail = recent[-max(steps // 10, 1) :]
    return sum(tail) / len(tail)


@torch.inference_mode()
def validation_loss(model: nn.Module, examples: Sequence[Example], batch: int = 32) -> float:
    """Mean cross-entropy in nats over all labels, in the model's own precision."""
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for begin in range(0, len(examples), batch):
        ids, labels = _pad(examples[begin : begin + batch], device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        losses = nn.functional.cross_entropy(
            logits.flatten(0, 1).float(),
            labels[:, 1:].flatten(),
            ignore_index=IGNORE,
            reduction="sum",
        )
        total += float(losses)
        count += int((labels[:, 1:] != IGNORE).sum())
    return total / count if count else math.nan


def _batches(examples: Sequence[Example], batch: int, steps: int, seed: int) -> list[list[int]]:
    """Index lists for `steps` batches: similar lengths together, reshuffled in each pass."""
    plan: list[list[int]] = []
    epoch = 0
    while len(plan) < steps:
        generator = seeded(seed, "fit", epoch)
        order = torch.randperm(len(examples), generator=generator).tolist()
        # Sort within large chunks, so that padding is small and the order stays random.
        chunk = batch * 16
        rows = []
        for begin in range(0, len(order), chunk):
            part = sorted(order[begin : begin + chunk], key=lambda i: len(examples[i][0]))
            rows += [part[i : i + batch] for i in range(0, len(part), batch)]
        plan += [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
        epoch += 1
    return plan[:steps]


def _pad(examples: Sequence[Example], device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(len(ids) for ids, _ in examples)
    ids = [row + [0] * (longest - len(row)) for row, _ in examples]
    labels = [row + [IGNORE] * (longest - len(row)) for _, row in examples]
    return torch.tensor(ids, device=device), torch.tensor(labels, device=device)
