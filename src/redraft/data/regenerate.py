"""Regeneration: the target answers the prompts, and each batch is on disk before the next begins.

An answers file is JSONL, one `Answer` per line. Written lines are never asked for again: batches
are planned from the prompts alone, so a resumed run redoes only what is missing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..config import RegenerateConfig
from ..console import Progress, say
from ..decode.batched import generate_answers, plan_generation
from ..decode.sampling import Sampling
from ..errors import UserError
from ..files import append_lines, write_text
from ..formats.folders import read_json
from ..records import Answer, Prompt
from ..target import Target
from .turns import next_turn


def regenerate(
    target: Target, prompts: Sequence[Prompt], out: Path, config: RegenerateConfig, overrun: int = 0
) -> list[Answer]:
    """Answer every prompt into the file `out`, continuing what is there; answers in file order.

    Conversations are answered turn by turn: all first turns, then all second ones, and so on.
    """
    _claim(out, answer_inputs(target, prompts, config, overrun))
    if config.answers == "original":
        return _write_originals(prompts, out, config.max_new_tokens, target)
    asked = prompts
    while len(asked):
        done = {answer.id: answer for answer in read_answers(out)} if out.exists() else {}
        _answer_round(target, asked, done, out, config, overrun)
        asked = _next_round(target, asked, out)
    return read_answers(out)


def _answer_round(
    target: Target,
    prompts: Sequence[Prompt],
    done: Container[str],
    out: Path,
    config: RegenerateConfig,
    overrun: int,
) -> None:
    """Append the answers to prompts that are not among `done`."""
    plan = plan_generation(prompts, config.batch_size)
    left = [batch for batch in plan if not all(prompts[i].id in done for i in batch)]
    if there := sum(prompt.id in done for prompt in prompts):
        say(f"{out.name}: {there} of {len(prompts)} answers are there already")
    if not left:
        return
    sampling = Sampling(config.temperature, config.top_k, config.top_p, config.min_p)
    batches = generate_answers(
        target,
        prompts,
        left,
        sampling=sampling,
        max_new_tokens=config.max_new_tokens,
        overrun=overrun,
        seed=config.seed,
    )
    tokens = 0
    with Progress(f"answers ({out.stem})", sum(map(len, left)), "answers") as progress:
        for answers in batches:
            append_lines(out, [answer.to_line() for answer in answers if answer.id not in done])
            tokens += sum(answer.length for answer in answers)
            progress.advance(len(answers), f"{tokens:,} tokens")


def _next_round(target: Target, asked: Sequence[Prompt], out: Path) -> list[Prompt]:
    """The next turns of the conversations that go on."""
    going_on = [prompt for prompt in asked if prompt.later]
    if not going_on:
        return []
    said = {answer.id: answer for answer in read_answers(out)}
    found, ended = [], []
    for prompt in going_on:
        try:
            turn = next_turn(prompt, said[prompt.id], target)
        except ValueError as problem:
            ended.append(str(problem))
            continue
        if turn is None:
            ended.append(f"answer {prompt.id} was cut by its length")
        else:
            found.append(turn)
    if ended:
        say(f"{len(ended)} conversations end early (first: {ended[0]})")
    return found


def answer_inputs(
    target: Target, prompts: Sequence[Prompt], config: RegenerateConfig, overrun: int
) -> dict[str, Any]:
    """All that an answer depends on (the batch size is not among it)."""
    settings = {k: v for k, v in asdict(config).items() if k != "batch_size"}
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
    about = out.with_suffix(".about.json")
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
    elif out.exists():
        raise UserError(
            f"{out} exists and was not written by `redraft regenerate`; name another file"
        )
    write_text(about, json.dumps(inputs, indent=2) + "\n")


def read_answers(path: Path) -> list[Answer]:
    """The answers of a file. A last line cut short by an interruption is dropped from the file."""
    if not path.is_file():
        raise UserError(f"answers {path}: no such file; `redraft regenerate` writes one")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as problem:
        raise UserError(f"{path} is damaged ({problem}); remove it to answer anew") from None
    whole, _, rest = text.rpartition("\n")
    if rest:
        write_text(path, whole + "\n" if whole else "")
    answers = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            answers.append(Answer.from_line(line))
        except (json.JSONDecodeError, KeyError, TypeError) as problem:
            raise UserError(
                f"{path}, line {number}: not an answer record ({problem}); remove the file to "
                "answer anew"
            ) from None
    return answers


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
    for prompt in kept:
        tokens = (prompt.reference or ())[:longest]
        end = next((i for i, t in enumerate(tokens) if t in target.stop_ids), len(tokens) - 1)
        tokens = tokens[: end + 1]  # templates may write more after the stop token
        finish = "stop" if tokens[-1] in target.stop_ids else "length"
        answers.append(Answer(prompt.id, prompt.tokens, tokens, len(tokens), finish))
    write_text(out, "".join(a.to_line() + "\n" for a in answers))
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
