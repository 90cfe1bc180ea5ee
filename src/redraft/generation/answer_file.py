"""An answers file: JSONL, one `Answer` per line, and next to it a record of what the answers depend on.

    answers.jsonl              appended to batch by batch, by one process at a time
    answers.about.json         the target, the prompts and the settings that the answers depend on
    set-aside/answers-1.jsonl  what was there when one of these changed, with its own record

No answer is thrown away. Where the inputs of a file change, it is set aside, and every answer in it whose
prompt tokens and settings are asked for again is used again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..config import RegenerateConfig
from ..core.console import say
from ..core.errors import UserError
from ..core.files import append_lines, finish_lines, move, write_text
from ..core.folders import read_json
from ..core.records import Answer, Prompt
from ..core.renamed import with_today_keys
from ..models.target import Target
from ..prompts.disk_list import PromptPool

NO_INPUTS = (
    *("batch_size", "batch_tokens"),
    *("endpoints", "endpoint_model", "concurrency", "timeout", "patience"),
)
"""The settings that no answer depends on."""
NO_ANSWER = (ValueError, KeyError, TypeError, OverflowError)
"""What `Answer.from_line` raises for a line that is no answer."""
ENDPOINTS = "answered_by_endpoints"
"""Where the record names the servers that gave some of the answers."""
SET_ASIDE = "set-aside"
"""The folder, next to an answers file, of the files that it replaced."""


def answer_inputs(
    target: Target, prompts: Sequence[Prompt], config: RegenerateConfig, lookahead: int
) -> dict[str, Any]:
    """All that an answer depends on: not who computes it, nor how many at a time."""
    settings = {k: v for k, v in asdict(config).items() if k not in NO_INPUTS}
    if not config.temperature or not config.greedy_share:
        del settings["greedy_share"]
    return {
        "target": target.fingerprint(),
        "prompts": prompts_hash(prompts),
        "lookahead": lookahead,
        **settings,
    }


def prompts_hash(prompts: Sequence[Prompt]) -> str:
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps(prompt.to_row()).encode())
    return digest.hexdigest()[:16]


def claim(
    out: Path,
    inputs: dict[str, Any],
    prompts: Sequence[Prompt],
    *,
    grow: bool = False,
    more: Mapping[str, Any] | None = None,
) -> Sequence[Prompt]:
    """Make `out` the file of these answers; returns the prompts under the names they have in it.

    A file of other inputs is set aside, and a line names what changed. With `grow` its answers stay where
    only the prompts differ. `more` goes into the record too. Raises UserError for a file that is none of
    redraft's, and with `grow` for one that holds answers made with other settings.
    """
    record = about(out)
    known: dict[str, Any] = {}
    if out.exists():
        if not record.exists():
            raise UserError(
                f"{out} exists and was not written by `redraft regenerate`; name another file"
            )
        try:
            known = with_today_keys(read_json(record))
        except UserError as problem:
            raise UserError(f"{problem}; remove {out} and {record.name} to answer again") from None
        changed = sorted(key for key in inputs if known.get(key) != inputs[key])
        if grow and set(changed) - {"prompts"}:
            raise UserError(
                f"{out} holds answers made with other {', '.join(changed)}; name another file, or "
                "remove it to answer again"
            )
        if changed and not grow:
            aside = _set_aside(out)
            say(f"{out.name}: {', '.join(changed)} changed; the answers so far are kept as {aside}")
    kept = {key: known[key] for key in (ENDPOINTS,) if key in known} | dict(more or {})
    write_text(record, json.dumps({**inputs, **kept}, indent=2) + "\n")
    return _as_named(out, prompts) if grow and out.exists() else prompts


def _set_aside(out: Path) -> Path:
    """Move an answers file and its record into the folder of set-aside files, under a new number."""
    number = 1
    while (aside := out.parent / SET_ASIDE / f"{out.stem}-{number}{out.suffix}").exists():
        number += 1
    # The record first: without it the answers could not be used again.
    write_text(about(aside), about(out).read_text(encoding="utf-8"))
    move(out, aside)
    return aside


def _as_named(out: Path, prompts: Sequence[Prompt]) -> Sequence[Prompt]:
    """The prompts, each with the name of its answer in the file, or else with a name not yet in it.

    Rows without an id are named by their line, so the same name may stand for another prompt in a file
    that grows.
    """
    names = {answer.prompt: answer.id for answer in iter_answers(out)}
    taken = set(names.values())
    named: dict[int, str] = {}
    kept = 0
    for at, prompt in enumerate(prompts):
        name = names.get(prompt.tokens)
        kept += name is not None
        if name is None and prompt.id in taken:
            number = 2
            while f"{prompt.id}~{number}" in taken:
                number += 1
            name = f"{prompt.id}~{number}"
        if name not in (None, prompt.id):
            named[at] = str(name)
        taken.add(name or prompt.id)
    others = len(names) - kept
    if others and not any(prompt.later for prompt in prompts):
        say(f"{out.name}: {others} answers to other prompts stay in it")
    if not named:
        return prompts
    return PromptPool(
        dataclasses.replace(prompt, id=named[at]) if at in named else prompt
        for at, prompt in enumerate(prompts)
    )


def use_again(out: Path, inputs: dict[str, Any], missing: Sequence[Prompt]) -> int:
    """Append to `out` the answers to `missing` that other files next to it hold; returns how many.

    An answer is used again where its prompt's tokens and everything else that it depends on are equal.
    """
    wanted = {prompt.tokens: at for at, prompt in enumerate(missing)}
    found = 0
    for file in _compatible(out, inputs):
        lines = []
        try:
            for answer in iter_answers(file):
                at = wanted.pop(answer.prompt, None)
                if at is not None:
                    lines.append(dataclasses.replace(answer, id=missing[at].id).to_line())
        except UserError as damage:
            say(f"{damage}; its answers up to there are used")
        if lines:
            append_lines(out, lines)
            note_endpoints(out, endpoints_of(file))
            found += len(lines)
    return found


def _compatible(out: Path, inputs: dict[str, Any]) -> Iterator[Path]:
    """The answers files next to `out`, set aside or not, that differ in their prompts at most.

    None where nothing of `out` was set aside: a new file takes no answers of others.
    """
    aside = out.parent / SET_ASIDE
    if not any(_numbered(out, file) for file in aside.glob(f"*{out.suffix}")):
        return
    settings = {key: value for key, value in inputs.items() if key != "prompts"}
    for folder in (out.parent, aside):
        for record in sorted(folder.glob("*.about.json")):
            file = record.with_name(record.name.replace(".about.json", out.suffix))
            with contextlib.suppress(UserError):  # a damaged record describes no answers
                known = with_today_keys(read_json(record))
                if file != out and file.is_file() and settings.items() <= known.items():
                    yield file


def _numbered(out: Path, file: Path) -> bool:
    """Whether a file that was set aside had the name of `out`."""
    name, _, number = file.stem.rpartition("-")
    return name == out.stem and number.isdigit()


def note_endpoints(out: Path, found: dict[str, Any]) -> None:
    """Add servers to those that gave some of the answers in `out`."""
    known = read_json(about(out))
    if found and not found.items() <= known.get(ENDPOINTS, {}).items():
        known[ENDPOINTS] = {**known.get(ENDPOINTS, {}), **found}
        write_text(about(out), json.dumps(known, indent=2) + "\n")


def endpoints_of(answers: Path) -> dict[str, Any]:
    """The endpoints that gave some of the answers in a file: URL -> what was found of it."""
    record = about(answers)
    found: dict[str, Any] = read_json(record).get(ENDPOINTS, {}) if record.is_file() else {}
    return found


def about(out: Path) -> Path:
    return out.with_suffix(".about.json")


def read_answers(path: Path) -> list[Answer]:
    """The answers of a file, as `iter_answers`."""
    return list(iter_answers(path))


def answers_for(target: Target, path: Path) -> list[Answer]:
    """The answers of a file. Raises UserError where a token of theirs is none of the target's."""
    answers, rows = read_answers(path), target.embedding_VH.shape[0]
    for answer in answers:
        highest = max((*answer.prompt, *answer.tokens), default=0)
        if highest >= rows:
            raise UserError(
                f"{path}: answer {answer.id} has token {highest}, the embedding of target {target.name} has "
                f"{rows} rows: these are answers of another model"
            )
    return answers


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
        return UserError(f"{path} is damaged ({problem}); remove it to answer again")
    return UserError(
        f"{path}, line {number}: not an answer record ({problem}); remove the file to answer again"
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
