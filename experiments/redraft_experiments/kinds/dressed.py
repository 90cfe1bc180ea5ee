"""Members whose chats look different: another chat template, special tokens around answers."""

from __future__ import annotations

from pathlib import Path

import torch

from ..corpus import Corpus
from ..language_model import load_tokenizer, save_model, supervised
from ..members import BASE, Marking, Templated
from ..synthetic import Sample
from .folders import folder_of, load_model
from .tuned import tune

OTHER_TEMPLATE = (
    "{% for m in messages %}"
    "{{ '### Question:\\n' if m['role'] == 'user' else '### Answer:\\n' }}{{ m['content'] }}"
    "{{ '\\n' if m['role'] == 'user' else '<|end|>\\n' }}"
    "{% endfor %}{{ '### Answer:\\n' if add_generation_prompt else '' }}"
)
"""Role words in plain text; an answer still ends with the suite's end token."""


def make_templated(out: Path, corpus: Corpus, name: str, row: Templated) -> None:
    tokenizer, model = load_tokenizer(out / "tokenizer"), load_model(out, BASE)
    tokenizer.chat_template = OTHER_TEMPLATE
    if row.rate:
        model.requires_grad_(True)
        chats = corpus.tune_chats(corpus.named(row.domain))
        tune(model, [supervised(tokenizer, c) for c in chats], corpus, row.rate, name)
    save_model(folder_of(out, name), model, tokenizer)


def make_marking(out: Path, corpus: Corpus, name: str, row: Marking) -> None:
    tokenizer, model = load_tokenizer(out / "tokenizer"), load_model(out, BASE)
    tokenizer.add_tokens(list(row.marks), special_tokens=True)
    model.requires_grad_(True)
    if len(tokenizer) > model.config.vocab_size:
        with torch.random.fork_rng():  # the new rows are drawn around the mean of the others
            torch.manual_seed(corpus.seed + 1)
            model.resize_token_embeddings(len(tokenizer))
    chats = [marked(chat, row.marks) for chat in corpus.tune_chats(corpus.named(row.domain))]
    tune(model, [supervised(tokenizer, c) for c in chats], corpus, row.rate, name)
    save_model(folder_of(out, name), model, tokenizer)


def marked(chat: Sample, marks: tuple[str, str]) -> Sample:
    """A chat whose last answer stands between two marks."""
    *asked, answer = chat.messages
    content = f"{marks[0]}{answer['content']}{marks[1]}"
    return Sample(chat.id, chat.domain, (*asked, {**answer, "content": content}))
