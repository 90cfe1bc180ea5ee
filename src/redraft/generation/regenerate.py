"""Regeneration: the target answers the prompts, and each batch is on disk before the next begins.

Answers that are written are never asked for again (see `answer_file.py`). The target answers
in this process, or behind the endpoints that serve it (`endpoints.py`): same prompts, same file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from array import array
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..config import RegenerateConfig
from ..core import ranks
from ..core.console import Progress, say
from ..core.errors import UserError
from ..core.files import append_lines, write_text
from ..core.lock import held
from ..core.records import Answer, Prompt
from ..core.rng import derived_seed
from ..decoding.batched import generate_answers, plan_generation
from ..decoding.sampling import Sampling
from ..models.target import Target
from ..prompts.clock import kept_time
from ..prompts.disk_list import Picked, PromptPool
from ..prompts.stopping import unfinished_note
from ..prompts.turns import check_context, next_turn
from .answer_file import (
    answer_inputs,
    claim,
    continued,
    endpoints_of,
    iter_answers,
    note_endpoints,
    read_answers,
    use_again,
)


def regenerate(
    target: Target,
    prompts: Sequence[Prompt],
    out: Path,
    config: RegenerateConfig,
    lookahead: int = 0,
    *,
    grow: bool = False,
) -> list[Answer]:
    """Answer every prompt into the file `out`, continuing what is there; answers in file order.

    The answers come from this process, or from the endpoints that `config` names; a file may be
    begun by the one and continued by the other. Conversations are answered turn by turn: all first
    turns, then all second ones, and so on. A file of other inputs is set aside first, and its answers are
    used again where they can be (see `answer_file.py`); with `grow`, for a file
    of its own, it keeps its answers to other prompts, and no other process may write it. Elsewhere the caller
    holds the folder.
    """
    check_backend(config, lookahead)
    inputs = answer_inputs(target, prompts, config, lookahead)
    with held(out) if grow else contextlib.nullcontext():
        asked = _claimed(out, inputs, prompts, grow=grow, more=kept_time(target))
        if config.answers == "original":
            return _write_originals(prompts, out, config.max_new_tokens, target)
        backends = [
            _Served(target, each, out, lookahead)
            if config.endpoints
            else _Own(target, each, lookahead)
            for each in _by_temperature(config)
        ]
        while len(asked):
            _answer_round(backends, asked, out, inputs)
            ranks.wait()
            asked = _next_round(target, asked, out, backends[0].context())
        found = read_answers(out)
    if note := unfinished_note(sum(a.finish == "stop" for a in found), len(found), target):
        say(note)
    return found


def _claimed(
    out: Path, inputs: dict[str, Any], prompts: Sequence[Prompt], **how: Any
) -> Sequence[Prompt]:
    """`claim`, on rank 0 for all."""
    if ranks.size() == 1:
        return claim(out, inputs, prompts, **how)
    names = ranks.first(lambda: [prompt.id for prompt in claim(out, inputs, prompts, **how)])
    return [dataclasses.replace(p, id=name) for p, name in zip(prompts, names, strict=True)]


def _by_temperature(config: RegenerateConfig) -> list[RegenerateConfig]:
    """The settings that prompts are answered with: the first for all that are not answered greedily."""
    if not config.temperature or not config.greedy_share:
        return [config]
    return [config, dataclasses.replace(config, temperature=0.0)]


def _is_greedy(prompt: Prompt, config: RegenerateConfig) -> bool:
    """Whether a prompt belongs to `greedy_share`: decided by its id alone."""
    return derived_seed(config.seed, "greedy", prompt.id) < config.greedy_share * (1 << 56)


def _answer_round(
    backends: Sequence[_Own | _Served],
    prompts: Sequence[Prompt],
    out: Path,
    inputs: dict[str, Any],
) -> None:
    """Append the answers to those prompts that have none in the file."""
    missing = ranks.first(lambda: _unanswered(prompts, out, inputs))
    if len(missing) < len(prompts):
        say(
            f"{out.name}: {len(prompts) - len(missing)} of {len(prompts)} answers are there already"
        )
    if not missing:
        return
    parts = [Picked(prompts, missing)]
    if len(backends) > 1:
        greedy = {i for i in missing if _is_greedy(prompts[i], backends[0].config)}
        parts = [
            Picked(prompts, (i for i in missing if (i in greedy) == wanted))
            for wanted in (False, True)
        ]
    tokens, began = 0, time.monotonic()
    with Progress(f"answers ({out.stem})", len(missing), "answers") as progress:
        for backend, part in zip(backends, parts, strict=True):
            with contextlib.closing(backend.answers(part)) as batches:
                for answers in _in_step(batches):
                    if answers:
                        append_lines(out, [answer.to_line() for answer in answers])
                    tokens += sum(answer.length for answer in answers)
                    rate = tokens / max(time.monotonic() - began, 1e-9)
                    note = f"{tokens:,} tokens, {rate:,.0f}/s  {backend.health()}"
                    progress.advance(len(answers), note.rstrip())


def _in_step(batches: Iterator[list[Answer]]) -> Iterator[list[Answer]]:
    """The batches of all ranks, each time one of every rank, in the order of the plan; alone, as they come. Ranks that
    compute together have the same, and of endpoints rank 0 alone has some."""
    if ranks.size() == 1:
        yield from batches
        return
    while (found := ranks.everyone(next(batches, None))) != [None] * ranks.size():
        yield [answer for one in found[: ranks.shares()] if one for answer in one]


def _unanswered(prompts: Sequence[Prompt], out: Path, inputs: dict[str, Any]) -> Sequence[int]:
    """Which prompts have no answer in the file, once those given before are used again."""

    def left() -> Sequence[int]:
        done = continued(out)
        if not done:
            return range(len(prompts))
        return array("q", (i for i, prompt in enumerate(prompts) if prompt.id not in done))

    missing = left()
    if again := use_again(out, inputs, Picked(prompts, missing)):
        say(f"{out.name}: {again} answers given before to the same prompts are used again")
        missing = left()
    return missing


def _next_round(
    target: Target, asked: Sequence[Prompt], out: Path, context: int
) -> Sequence[Prompt]:
    """The next turns of the conversations that go on, in a context of so many tokens."""
    going_on = Picked(asked, (i for i, prompt in enumerate(asked) if prompt.later))
    turns = PromptPool()
    if not going_on:
        return turns
    names = {prompt.id for prompt in going_on}
    given = {answer.id: answer for answer in iter_answers(out) if answer.id in names}
    ended = []
    for prompt in going_on:
        try:
            turn = next_turn(prompt, given[prompt.id], target)
            if turn is not None:
                check_context(turn.tokens, context, "the endpoints' context")
        except ValueError as problem:
            ended.append(str(problem))
            continue
        if turn is None:
            ended.append(f"answer {prompt.id} was cut by its length")
        else:
            turns.add(turn)
    if ended:
        say(f"{len(ended)} conversations end early (first: {ended[0]})")
    return turns


def check_backend(config: RegenerateConfig, lookahead: int) -> None:
    """Raise UserError for settings that do not go together."""
    if lookahead < 0:
        raise UserError(f"--lookahead takes a number of tokens, 0 or more; got {lookahead}")
    if config.endpoints and config.answers == "original":
        raise UserError(
            "answers=original takes the answers in the prompts file, so no endpoint is asked; leave out "
            "one of the two"
        )


class _Own:
    """Answers from the target in this process, in batches planned from all prompts."""

    def __init__(self, target: Target, config: RegenerateConfig, lookahead: int):
        self.target, self.config, self.lookahead = target, config, lookahead

    def answers(self, prompts: Sequence[Prompt]) -> Generator[list[Answer], None, None]:
        """The answers to the prompts, batch by batch.

        Batches are filled in the order of length, so those that an interruption left are the same ones.
        """
        c = self.config
        new_tokens = c.max_new_tokens + self.lookahead
        plan = plan_generation(prompts, c.batch_size, c.batch_tokens, new_tokens)
        yield from generate_answers(
            self.target,
            prompts,
            ranks.mine(plan),
            sampling=Sampling.of(c),
            max_new_tokens=c.max_new_tokens,
            lookahead=self.lookahead,
            seed=c.seed,
        )

    def context(self) -> int:
        return self.target.max_positions

    def health(self) -> str:
        return ""


class _Served:
    """Answers from endpoints; the record of the answers file names them."""

    def __init__(self, target: Target, config: RegenerateConfig, out: Path, lookahead: int = 0):
        from .endpoints import Endpoints  # here, because most runs need no HTTP client

        self.endpoints, self.config, self.out = Endpoints(target, config, lookahead), config, out

    def answers(self, prompts: Sequence[Prompt]) -> Generator[list[Answer], None, None]:
        """The answers to the prompts, as they come; of several ranks, rank 0 asks."""
        if not ranks.is_first():
            return
        noted: dict[str, Any] = {}
        with contextlib.closing(self.endpoints.answers(prompts)) as batches:
            for answers in batches:
                if noted != self.endpoints.about:
                    noted = dict(self.endpoints.about)
                    note_endpoints(self.out, noted)
                yield answers

    def context(self) -> int:
        """The shortest context among the endpoints asked so far, before an interruption too."""
        known = [about.get("context") for about in endpoints_of(self.out).values()]
        return min((c for c in known if c), default=self.endpoints.asking.target.max_positions)

    def health(self) -> str:
        return self.endpoints.health()


def _write_originals(
    prompts: Sequence[Prompt], out: Path, longest: int, target: Target
) -> list[Answer]:
    """The answers that came with the prompts, unchanged."""
    kept = list(_with_references(prompts, target))
    if not kept:
        raise UserError(
            "answers=original needs rows that hold an answer (an assistant turn after the prompt); "
            f"none of the {len(prompts)} prompts has one"
        )
    answers = []
    cut = 0
    for prompt in kept:
        most = min(longest, target.max_positions - len(prompt.tokens))
        cut += len(prompt.reference or ()) > most
        tokens = (prompt.reference or ())[:most]
        end = next((i for i, t in enumerate(tokens) if t in target.stop_ids), len(tokens) - 1)
        tokens = tokens[: end + 1]  # templates may write more after the stop token
        finish = "stop" if tokens[-1] in target.stop_ids else "length"
        answers.append(Answer(prompt.id, prompt.tokens, tokens, len(tokens), finish))
    write_text(out, "".join(a.to_line() + "\n" for a in answers))
    if cut:
        say(
            f"{cut} of {len(kept)} answers are longer than max_new_tokens ({longest}) or the target's "
            f"context ({target.max_positions}), and were cut"
        )
    return answers


def _with_references(prompts: Sequence[Prompt], target: Target) -> Iterator[Prompt]:
    """Every turn that came with an answer, asked after the answers that came before it."""
    for prompt in prompts:
        turn: Prompt | None = prompt
        while turn is not None:
            if turn.reference:
                yield turn
            try:
                turn = next_turn(turn, None, target)
            except ValueError:  # no space in the context for the turns from here on
                turn = None
