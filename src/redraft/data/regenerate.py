"""Regeneration: the target answers the prompts, and each batch is on disk before the next begins.

An answers file is JSONL, one `Answer` per line. Written lines are never asked for again: batches
are planned from the prompts alone, so a resumed run redoes only what is missing. The target answers
in this process, or behind the endpoints that serve it (`endpoints.py`): same prompts, same file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..config import RegenerateConfig
from ..console import Progress, say
from ..decode.batched import generate_answers, plan_generation
from ..decode.sampling import Sampling
from ..errors import UserError
from ..files import append_lines, finish_lines, write_text
from ..formats.folders import read_json
from ..records import Answer, Prompt
from ..target import Target
from .finish_note import unfinished_note
from .pool import Picked, PromptPool
from .turns import check_room, next_turn

NO_INPUTS = (
    *("batch_size", "batch_tokens"),
    *("endpoints", "endpoint_model", "concurrency", "timeout", "patience"),
)
"""The settings that no answer depends on."""
NO_ANSWER = (ValueError, KeyError, TypeError, OverflowError)
"""What `Answer.from_line` raises for a line that is no answer."""
ENDPOINTS = "answered_by_endpoints"
"""Where the record beside an answers' file says which servers gave some of them."""


def regenerate(
    target: Target, prompts: Sequence[Prompt], out: Path, config: RegenerateConfig, overrun: int = 0
) -> list[Answer]:
    """Answer every prompt into the file `out`, continuing what is there; answers in file order.

    The answers come from this process, or from the endpoints that `config` names; a file may be
    begun by the one and continued by the other. Conversations are answered turn by turn: all first
    turns, then all second ones, and so on.
    """
    check_backend(config, overrun)
    _claim(out, answer_inputs(target, prompts, config, overrun))
    if config.answers == "original":
        return _write_originals(prompts, out, config.max_new_tokens, target)
    backend = (
        _Served(target, config, out, overrun) if config.endpoints else _Own(target, config, overrun)
    )
    asked = prompts
    while len(asked):
        _answer_round(backend, asked, out)
        asked = _next_round(target, asked, out, backend.context())
    found = read_answers(out)
    if note := unfinished_note(sum(a.finish == "stop" for a in found), len(found), target):
        say(note)
    return found


def _answer_round(backend: _Own | _Served, prompts: Sequence[Prompt], out: Path) -> None:
    """Append the answers to those prompts that have none in the file."""
    done = continued(out)
    left = sum(prompt.id not in done for prompt in prompts) if done else len(prompts)
    if left < len(prompts):
        say(f"{out.name}: {len(prompts) - left} of {len(prompts)} answers are there already")
    if not left:
        return
    tokens, began = 0, time.monotonic()
    with (
        Progress(f"answers ({out.stem})", left, "answers") as progress,
        contextlib.closing(backend.answers(prompts, done)) as batches,
    ):
        for answers in batches:
            if answers:
                append_lines(out, [answer.to_line() for answer in answers])
            tokens += sum(answer.length for answer in answers)
            rate = tokens / max(time.monotonic() - began, 1e-9)
            note = f"{tokens:,} tokens, {rate:,.0f}/s  {backend.health()}"
            progress.advance(len(answers), note.rstrip())


def _next_round(
    target: Target, asked: Sequence[Prompt], out: Path, context: int
) -> Sequence[Prompt]:
    """The next turns of the conversations that go on, in a context of so many tokens."""
    going_on = Picked(asked, (i for i, prompt in enumerate(asked) if prompt.later))
    turns = PromptPool()
    if not going_on:
        return turns
    names = {prompt.id for prompt in going_on}
    said = {answer.id: answer for answer in iter_answers(out) if answer.id in names}
    ended = []
    for prompt in going_on:
        try:
            turn = next_turn(prompt, said[prompt.id], target)
            if turn is not None:
                check_room(turn.tokens, context, "the endpoints' context")
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


def sampling_of(config: RegenerateConfig) -> Sampling:
    """How answers are drawn under these settings."""
    return Sampling(config.temperature, config.top_k, config.top_p, config.min_p)


def check_backend(config: RegenerateConfig, overrun: int) -> None:
    """Raise UserError for settings that do not go together."""
    if overrun < 0:
        raise UserError(f"--overrun takes a number of tokens, 0 or more; got {overrun}")
    if config.endpoints and config.answers == "original":
        raise UserError(
            "answers=original takes the answers in the prompts file, so no endpoint is asked; leave out "
            "one of the two"
        )


class _Own:
    """Answers from the target in this process, in batches planned from all prompts."""

    def __init__(self, target: Target, config: RegenerateConfig, overrun: int):
        self.target, self.config, self.overrun = target, config, overrun

    def answers(
        self, prompts: Sequence[Prompt], done: set[str]
    ) -> Generator[list[Answer], None, None]:
        """The answers to those prompts whose id is not in `done`, batch by batch."""
        c = self.config
        new_tokens = c.max_new_tokens + self.overrun
        plan = plan_generation(prompts, c.batch_size, c.batch_tokens, new_tokens)
        if done:
            plan = [batch for batch in plan if not all(prompts[i].id in done for i in batch)]
        batches = generate_answers(
            self.target,
            prompts,
            plan,
            sampling=sampling_of(c),
            max_new_tokens=c.max_new_tokens,
            overrun=self.overrun,
            seed=c.seed,
        )
        for answers in batches:
            yield [answer for answer in answers if answer.id not in done]

    def context(self) -> int:
        return self.target.max_positions

    def health(self) -> str:
        return ""


class _Served:
    """Answers from endpoints; what these are is noted beside the answers' file."""

    def __init__(self, target: Target, config: RegenerateConfig, out: Path, overrun: int = 0):
        from .endpoints import Endpoints  # here, because most runs need no HTTP client

        self.pool, self.out, self.about = Endpoints(target, config, overrun), out, _about(out)

    def answers(
        self, prompts: Sequence[Prompt], done: set[str]
    ) -> Generator[list[Answer], None, None]:
        """The answers to those prompts whose id is not in `done`, as they come."""
        noted: dict[str, Any] = {}
        left = Picked(prompts, (i for i, prompt in enumerate(prompts) if prompt.id not in done))
        with contextlib.closing(self.pool.answers(left)) as batches:
            for answers in batches:
                if noted != self.pool.about:
                    noted = dict(self.pool.about)
                    known = read_json(self.about)
                    known[ENDPOINTS] = {**known.get(ENDPOINTS, {}), **noted}
                    write_text(self.about, json.dumps(known, indent=2) + "\n")
                yield answers

    def context(self) -> int:
        """The shortest context among the endpoints asked so far, before an interruption too."""
        known = [about.get("context") for about in endpoints_of(self.out).values()]
        return min((c for c in known if c), default=self.pool.asking.target.max_positions)

    def health(self) -> str:
        return self.pool.health()


def answer_inputs(
    target: Target, prompts: Sequence[Prompt], config: RegenerateConfig, overrun: int
) -> dict[str, Any]:
    """All that an answer depends on: not who computes it, nor how many at a time."""
    settings = {k: v for k, v in asdict(config).items() if k not in NO_INPUTS}
    return {
        "target": target.fingerprint(),
        "prompts": prompts_hash(prompts),
        "overrun": overrun,
        **settings,
    }


def prompts_hash(prompts: Sequence[Prompt]) -> str:
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps(prompt.to_row()).encode())
    return digest.hexdigest()[:16]


def _claim(out: Path, inputs: dict[str, Any]) -> None:
    """Refuse to continue a file that holds answers to something else."""
    about = _about(out)
    served: dict[str, Any] = {}
    if out.exists() and about.exists():
        try:
            known = read_json(about)
        except UserError as problem:
            raise UserError(f"{problem}; remove {out} and {about.name} to answer anew") from None
        changed = sorted(key for key in inputs if known.get(key) != inputs[key])
        if changed:
            raise UserError(
                f"{out} holds answers made with other {', '.join(changed)}; name another file, or "
                "remove it to answer anew"
            )
        served = {key: known[key] for key in (ENDPOINTS,) if key in known}
    elif out.exists():
        raise UserError(
            f"{out} exists and was not written by `redraft regenerate`; name another file"
        )
    write_text(about, json.dumps({**inputs, **served}, indent=2) + "\n")


def endpoints_of(answers: Path) -> dict[str, Any]:
    """The endpoints that gave some of the answers in a file: URL -> what was found of it."""
    about = _about(answers)
    found: dict[str, Any] = read_json(about).get(ENDPOINTS, {}) if about.is_file() else {}
    return found


def _about(out: Path) -> Path:
    return out.with_suffix(".about.json")


def read_answers(path: Path) -> list[Answer]:
    """The answers of a file, as `iter_answers`."""
    return list(iter_answers(path))


def iter_answers(path: Path) -> Iterator[Answer]:
    """The answers of a file, one after another. The file is only read.

    A last line that an interruption cut, or that a writer is in the middle of, is passed over. Raises
    UserError for any other line that is no answer.
    """
    if not path.is_file():
        raise UserError(f"answers {path}: no such file; `redraft regenerate` writes one")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            ended = line.endswith(b"\n")
            try:
                answer = Answer.from_line(line.decode("utf-8"))
            except NO_ANSWER as problem:
                if not ended:
                    return
                raise _damaged(path, number, problem) from None
            yield answer
            if not ended:  # what a writer adds to this line meanwhile is the rest of it
                return


def _damaged(path: Path, number: int, problem: Exception) -> UserError:
    if isinstance(problem, UnicodeDecodeError):
        return UserError(f"{path} is damaged ({problem}); remove it to answer anew")
    return UserError(
        f"{path}, line {number}: not an answer record ({problem}); remove the file to answer anew"
    )


def continued(path: Path) -> set[str]:
    """The ids answered in a file that is about to be appended to; an incomplete last line is cut off."""
    if not path.exists():
        return set()
    finish_lines(path, _is_whole)
    return {answer.id for answer in iter_answers(path)}


def _is_whole(line: bytes) -> bool:
    try:
        Answer.from_line(line.decode("utf-8"))
    except NO_ANSWER:
        return False
    return True


def _write_originals(
    prompts: Sequence[Prompt], out: Path, longest: int, target: Target
) -> list[Answer]:
    """The answers that came with the prompts, as they are."""
    kept = list(_with_references(prompts, target))
    if not kept:
        raise UserError(
            "answers=original needs rows that hold an answer (an assistant turn after the prompt); "
            f"none of the {len(prompts)} prompts has one"
        )
    answers = []
    cut = 0
    for prompt in kept:
        room = min(longest, target.max_positions - len(prompt.tokens))
        cut += len(prompt.reference or ()) > room
        tokens = (prompt.reference or ())[:room]
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
            except ValueError:  # no room in the context for the turns from here on
                turn = None
