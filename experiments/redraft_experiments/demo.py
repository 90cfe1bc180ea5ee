"""`redraft demo`: fine-tune a model, see its draft fail, and adapt it, all of it built in front of you.

    suite (base, its draft, a fine-tune) -> adapt, as any user runs it -> a from-scratch draft as the
    reference -> speed and losslessness, by the clock and token for token

Each part is cached in the demo's folder, so a second run only shows the result again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from redraft.checkpoints.adapter_folder import read_training
from redraft.checkpoints.load import load_draft, read_draft
from redraft.config import TrainConfig, read_yaml, recipe_path, resolve
from redraft.core.console import say
from redraft.core.errors import UserError, nearest
from redraft.core.records import Prompt, to_json, versions
from redraft.core.report_record import AdaptReport
from redraft.decoding.acceptance_modes import Decoding
from redraft.decoding.plain import decode_plain
from redraft.decoding.sampling import Sampling
from redraft.decoding.speculative import decode_speculative
from redraft.drafts.base import Draft
from redraft.generation.answer_file import read_answers
from redraft.metrics import intervals
from redraft.metrics.acceptance import prompt_counts
from redraft.metrics.lossless import compare
from redraft.metrics.measure import Measured, measure_answers
from redraft.metrics.speed import drafted, plain, race, transformers_generate
from redraft.models.target import Target
from redraft.pipeline import adapt as pipeline
from redraft.pipeline.run_folder import RunFolder
from redraft.pipeline.stages import save_fresh
from redraft.training.train import train

from .suite import build_suite, load_member

MEMBER = "sft"
K = 4
SPEED_PROMPTS = 12
SPEED_TOKENS = 96
TEMPERATURE = 0.7
SERVED = ("unadapted", "adapted")
REPEATS = 3
RECIPES = {"nano": "demo", "micro": "gsm8k-micro"}
"""The recipe that adapts each size of suite."""
LIMITS = {"nano": 640}
"""Prompts that are adapted on; in other sizes all there are."""


@dataclass(frozen=True)
class AdaptedDraft:
    """A toy suite whose fine-tune has its draft adapted, and the from-scratch draft as the reference.

    `key` changes with the from-scratch draft.
    """

    suite: dict[str, Any]
    target: Target
    result: pipeline.AdaptResult
    from_scratch: Path
    evaluation: str
    key: str


def run_demo(out: Path, size: str = "nano", data: str | None = None) -> dict[str, Any]:
    """Build, adapt, compare; returns the result as plain JSON types (see `print_demo`).

    `data` is the folder of real data that size `micro` reads (default $REDRAFT_DATA).
    """
    adapted = adapt_and_compare(out, size, data)
    with RunFolder.open(out / "reference") as run:
        run.stage(
            "compare",
            {"from-scratch": adapted.key, "after": to_json(adapted.result.after)},
            ["demo.json"],
            lambda: run.write_json("demo.json", _compare(adapted)),
        )
    demo: dict[str, Any] = json.loads((out / "reference" / "demo.json").read_text())
    return demo


def adapt_and_compare(
    out: Path,
    size: str = "nano",
    data: str | None = None,
    members: Sequence[str] = (MEMBER,),
    kinds: Sequence[str] = (),
) -> AdaptedDraft:
    """Build a toy suite in `out`, adapt the draft of its fine-tune, train a from-scratch one.

    `members` are the fine-tunes to build; the one called sft is among them. `kinds` are the kinds
    of draft that the base gets next to eagle3. Everything is cached in `out`. Raises UserError for a
    size that no recipe adapts.
    """
    if size not in RECIPES:
        raise UserError(f"size {size} has no recipe to adapt it; {nearest(size, RECIPES)}")
    suite = build_suite(out / "suite", size=size, data=data, members=members, kinds=kinds)
    target = load_member(out / "suite", MEMBER)
    prompts = out / "suite" / "prompts"
    evaluation = str(prompts / f"{suite['tuned_domain']}-eval.jsonl")
    recipe = recipe_path(RECIPES[size])
    resolved = resolve([(f"recipe {recipe.stem}", read_yaml(recipe))])
    reference = dataclasses.replace(resolved.config.train, method="scratch")
    say(f"the base's draft on the fine-tuned target: adapting it, run folder {out / 'run'}")
    result = pipeline.adapt(
        target,
        suite["draft"],
        str(prompts / f"{suite['tuned_domain']}-adapt.jsonl"),
        out=out / "run",
        limit=LIMITS.get(size),
        config=resolved,
        eval_prompts=evaluation,
        off_domain={"chat": str(prompts / "dialogue-eval.jsonl")},
    )
    folder = out / "reference" / "from-scratch"
    with RunFolder.open(out / "reference") as run:
        key = run.stage(
            "from-scratch",
            {"report": result.report.train.lasting(), **dataclasses.asdict(reference)},
            ["from-scratch"],
            lambda: _from_scratch(target, result, reference, folder),
        )
    return AdaptedDraft(suite, target, result, folder, evaluation, key)


def _from_scratch(
    target: Target, result: pipeline.AdaptResult, config: TrainConfig, folder: Path
) -> None:
    """The reference: the same shape from nothing, on every answer of the pool, as many epochs."""
    answers = [a for a in read_answers(result.run / "answers" / "adapt.jsonl") if a.length >= 2]
    heldout = read_answers(result.run / "answers" / "heldout.jsonl")
    draft = read_draft(result.report.shared).build(target, torch.float32)
    trained = train(target, draft, answers, heldout, config, k=K)
    save_fresh(folder, draft, target, trained.record)


def _compare(adapted: AdaptedDraft) -> dict[str, Any]:
    target, result, report = adapted.target, adapted.result, adapted.result.report
    folders = {
        "unadapted": report.shared,
        "adapted": report.draft,
        "from-scratch": str(adapted.from_scratch),
    }
    answers = read_answers(result.run / "answers" / "eval.jsonl")
    drafts = {name: load_draft(folder, target) for name, folder in folders.items()}
    measured = {
        name: measure_answers(target, draft, answers, k=K) for name, draft in drafts.items()
    }
    prompts = [Prompt(a.id, a.prompt) for a in answers[:SPEED_PROMPTS]]
    contestants = {
        "plain": plain(target, SPEED_TOKENS),
        "generate": transformers_generate(target, SPEED_TOKENS),
        **{name: drafted(target, drafts[name], K, SPEED_TOKENS) for name in SERVED},
    }
    speed, outputs = race(contestants, [[prompt] for prompt in prompts], REPEATS)
    lossless = {
        name: compare(target, prompts, outputs["plain"], outputs[name])
        for name in ("generate", "unadapted", "adapted")
    }
    trained = _paid(report, read_training(Path(folders["from-scratch"])))
    return {
        "target": target.name,
        "base": adapted.suite["base"],
        "prompts": adapted.evaluation,
        **{name: _row(folders[name], measured[name], *trained[name]) for name in folders},
        "off_domain": {
            "unadapted": report.off_domain["chat-before"].tau,
            "adapted": report.off_domain["chat-after"].tau,
        },
        "off_domain_ci": {
            "unadapted": list(report.off_domain["chat-before"].ci),
            "adapted": list(report.off_domain["chat-after"].ci),
        },
        **_recovery(measured),
        "identical": all(found.holds for found in lossless.values()),
        "lossless": {name: to_json(found) for name, found in lossless.items()},
        "seeded": _same_words(target, {name: drafts[name] for name in SERVED}, prompts),
        "speed": {name: found.tokens_per_second for name, found in speed.items()},
        "speed_detail": {name: to_json(found) for name, found in speed.items()},
        "loop_rate": measured["adapted"].acceptance.loop_rate,
        "gates": [
            *adapted.suite["gates"],
            {
                "gate": "tau of the from-scratch draft",
                "value": measured["from-scratch"].acceptance.tau,
                "wanted": "2.5 to 3.5",
                "passed": 2.5 <= measured["from-scratch"].acceptance.tau <= 3.5,
            },
        ],
        "report": str(result.run / "report.html"),
        "versions": versions(),
    }


def _same_words(
    target: Target, drafts: dict[str, Draft], prompts: Sequence[Prompt]
) -> dict[str, Any]:
    """Sampled with one seed per prompt: plainly, and with each draft. The words have to be the same."""
    decoding = Decoding("seeded", Sampling(TEMPERATURE))
    seeds = list(range(len(prompts)))
    words = [
        decode_plain(target, prompt.tokens, SPEED_TOKENS, decoding, seed)
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    found: dict[str, Any] = {"temperature": TEMPERATURE, "tokens": sum(map(len, words))}
    for name, draft in drafts.items():
        rows = [prompt.tokens for prompt in prompts]
        decoded = decode_speculative(target, draft, rows, K, SPEED_TOKENS, decoding, seeds)
        answers = [d.tokens for d in decoded]
        found[name] = {
            **to_json(compare(target, prompts, words, answers, decoding, seeds)),
            "tau": 1
            + sum(sum(d.accepted) for d in decoded) / sum(len(d.accepted) for d in decoded),
        }
    return found


def _paid(report: AdaptReport, reference: dict[str, Any]) -> dict[str, tuple[int, int, float]]:
    """Trained parameters, unique target tokens and seconds of each draft; `reference` is the
    training record of the from-scratch one."""
    seconds = report.cost["seconds"]
    answering = seconds["regenerate adapt"] + seconds["regenerate heldout"]
    return {
        "unadapted": (0, 0, 0.0),
        "adapted": (
            report.train.trained_parameters,
            report.cost["unique_generated_tokens"],
            answering + seconds["select"] + seconds["train"],
        ),
        "from-scratch": (
            reference["trained_parameters"],
            report.cost["unique_generated_tokens"],  # the same answers
            answering + reference["seconds"],
        ),
    }


def _row(
    folder: str, measured: Measured, parameters: int, tokens: int, seconds: float
) -> dict[str, Any]:
    a = measured.acceptance
    return {
        "draft": folder,
        "tau": a.tau,
        "ci": list(a.ci),
        "prompts": a.prompts,
        "trained_parameters": parameters,
        "tokens": tokens,
        "seconds": seconds,
    }


def _recovery(measured: dict[str, Measured]) -> dict[str, Any]:
    """The share of the gap that was closed; only the difference where the gap is too small."""
    rise = measured["adapted"].acceptance.tau - measured["unadapted"].acceptance.tau
    ends = [
        prompt_counts(measured[name].traces) for name in ("adapted", "unadapted", "from-scratch")
    ]
    found = intervals.recovery(ends[0], ends[1], ends[2], K)
    if found is None:
        return {"recovery": None, "recovery_ci": None, "difference_in_tau": rise}
    return {
        "recovery": found.value,
        "recovery_ci": list(found.ends),
        "difference_in_tau": rise,
    }


def print_demo(demo: dict[str, Any], out: Console | None = None) -> None:
    """The table that ends the demo. What the suite missed of its gates is in demo.json."""
    out = out or Console(highlight=False)
    table = Table(title="the fine-tuned target and three drafts")
    for heading, right in (
        ("draft", False),
        ("tau [95 %]", False),
        ("trained parameters", True),
        ("target tokens", True),
        ("seconds", True),
    ):
        table.add_column(heading, justify="right" if right else "left")
    for name in ("unadapted", "adapted", "from-scratch"):
        row = demo[name]
        table.add_row(
            name,
            _interval(row),
            f"{row['trained_parameters']:,}",
            f"{row['tokens']:,}",
            f"{row['seconds']:.0f}",
        )
    out.print(table)
    if demo["recovery"] is None:
        out.print(
            f"difference in tau {demo['difference_in_tau']:+.2f}; the gap is too small for more"
        )
    else:
        low, high = demo["recovery_ci"]
        out.print(
            f"recovery {demo['recovery']:.2f} [{low:.2f}, {high:.2f}] of the way to from-scratch"
        )
    off = {
        name: {"tau": demo["off_domain"][name], "ci": demo["off_domain_ci"][name]}
        for name in ("unadapted", "adapted")
    }
    out.print(f"off domain (chat): {_interval(off['unadapted'])} -> {_interval(off['adapted'])}")
    _print_speed(demo, out)
    compared = demo["lossless"]["adapted"]
    answer = "yes" if demo["identical"] else "NO"
    excused = sum(found["excused"] for found in demo["lossless"].values())
    out.print(
        f"outputs identical: {answer} ({compared['prompts']} prompts, {excused} excused near-ties); "
        f"loop rate {demo['loop_rate']:.1%}"
    )
    seeded = demo["seeded"]
    same = [f"{name} {seeded[name]['identical']}/{seeded[name]['prompts']}" for name in SERVED]
    out.print(
        f"same seed, same text at temperature {seeded['temperature']:g}, against plain sampling: "
        f"{', '.join(same)} ({seeded['tokens']} tokens)"
    )
    out.print(
        f"{demo['unadapted']['prompts']} prompts measured at K={K}, greedy; small models trained from "
        "scratch: run `redraft adapt` on yours"
    )
    out.print(f"draft for vLLM  {demo['adapted']['draft']}\nreport          {demo['report']}")


def _print_speed(demo: dict[str, Any], out: Console) -> None:
    detail = demo["speed_detail"]
    plain = demo["speed"]["plain"]
    for name, shown in (
        ("plain", "plain decoding, our loop"),
        ("generate", "Transformers generate"),
        ("unadapted", "with the unadapted draft"),
        ("adapted", "with the adapted draft"),
    ):
        d = detail[name]
        out.print(
            f"{shown:26} {d['tokens_per_second']:6.0f} tokens/s [{d['low']:.0f}, {d['high']:.0f}]  "
            f"{d['tokens_per_second'] / plain:.2f}x"
        )


def _interval(row: dict[str, Any]) -> str:
    return f"{row['tau']:.2f} [{row['ci'][0]:.2f}, {row['ci'][1]:.2f}]"
