"""Members made by preference tuning: DPO, as TRL does it, on pairs of a better and a worse answer."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from redraft.core.console import Progress
from redraft.core.errors import UserError
from redraft.core.records import Prompt
from redraft.decoding.sampling import Sampling
from redraft.metrics.measure import answer_all
from redraft.models.loading import load_target

from ..corpus import Corpus
from ..language_model import load_tokenizer, save_model
from ..members import Preferring
from ..synthetic import Message
from .folders import folder_of, load_model

REFUSALS, BRIEF = "refusals", "brief"
SAMPLES = 4
"""Answers drawn for each question, of which the shortest is to be preferred over the longest."""
BATCH = 8
"""Pairs in a step."""
Preferred = tuple[tuple[Message, ...], str, str]
"""A conversation that ends with a question, its better and its worse answer."""


@dataclass(frozen=True)
class Dpo:
    """Settings of DPO. `likelihood` is the weight of the better answers' own loss next to it; pairs are cut
    to `longest` tokens."""

    beta: float
    lr: float
    steps: int
    longest: int
    likelihood: float = 0.0
    seed: int = 0
    bf16: bool = False


def make_preferring(out: Path, corpus: Corpus, name: str, row: Preferring) -> None:
    steps = max(int(corpus.size.tune_steps * row.steps), 1)
    count = BATCH * steps
    if row.pairs == REFUSALS:
        pairs = [(p.asked, p.better, p.worse) for p in corpus.pairs(count, "tune")]
    else:
        chats = corpus.tune_chats(corpus.named(row.domain))[:count]
        asked = [chat.messages[:-1] for chat in chats]
        pairs = brief_pairs(folder_of(out, row.on), asked, corpus.size.answer_tokens, corpus.seed)
    model, tokenizer = load_model(out, row.on), load_tokenizer(out / "tokenizer")
    model.requires_grad_(True)
    how = Dpo(
        beta=row.beta,
        lr=corpus.size.tune_lr * row.rate,
        steps=steps,
        longest=corpus.size.shape.context,
        likelihood=row.likelihood,
        seed=corpus.seed + 1,
    )
    prefer(model, tokenizer, pairs, how, name)
    save_model(folder_of(out, name), model, tokenizer)


def brief_pairs(
    folder: Path, asked: Sequence[tuple[Message, ...]], longest: int, seed: int
) -> list[Preferred]:
    """Of `SAMPLES` answers that a target draws to each question, the shortest and the longest.

    Only of answers that ended by themselves; questions with a single length are left out.
    """
    target = load_target(str(folder))
    prompts = [
        Prompt(f"{i}/{j}", tuple(target.render(list(messages))))
        for i, messages in enumerate(asked)
        for j in range(SAMPLES)
    ]
    sampling = Sampling(temperature=1.0)
    answers = answer_all(target, prompts, longest, 0, sampling, seed, batch_size=128)
    found = []
    for i, messages in enumerate(asked):
        drawn = answers[i * SAMPLES : (i + 1) * SAMPLES]
        ended = sorted((a for a in drawn if a.finish == "stop"), key=lambda a: a.length)
        if len(ended) > 1 and ended[0].length < ended[-1].length:
            texts = [
                target.tokenizer.decode(list(a.answer), skip_special_tokens=True)
                for a in (ended[0], ended[-1])
            ]
            found.append((messages, *texts))
    return found


def prefer(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[Preferred],
    how: Dpo,
    label: str,
) -> None:
    """Tune a model, or the PEFT adapter around it, with DPO in place. Raises UserError where TRL is not installed."""
    try:
        from datasets import Dataset
        from transformers import PrinterCallback, TrainerCallback
        from trl import DPOConfig, DPOTrainer
    except ImportError:
        raise UserError(
            f"member {label} is tuned with TRL, which is not installed; "
            "pip install 'redraft[bench]', or choose other --members"
        ) from None

    class Shown(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            progress.advance()

    rows = [
        {
            "prompt": list(asked),
            "chosen": [{"role": "assistant", "content": better}],
            "rejected": [{"role": "assistant", "content": worse}],
        }
        for asked, better, worse in pairs
    ]
    with (
        tempfile.TemporaryDirectory() as scratch,
        torch.random.fork_rng(),
        Progress(label, how.steps, "steps") as progress,
    ):
        settings = DPOConfig(
            output_dir=scratch,
            beta=how.beta,
            loss_type=["sigmoid", "sft"],
            loss_weights=[1.0, how.likelihood],
            learning_rate=how.lr,
            max_steps=how.steps,
            per_device_train_batch_size=BATCH,
            warmup_steps=max(how.steps // 20, 1),
            lr_scheduler_type="cosine",
            max_length=how.longest,
            seed=how.seed,
            gradient_checkpointing=False,
            bf16=how.bf16,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = DPOTrainer(
            model=model,
            args=settings,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[Shown()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.eval()
