"""`--budget auto`: the target answers in rounds, until more answers stop paying.

Each round doubles the answers and trains an adapter on all of them. When held-out tau has risen by
less than a share of itself though the answers doubled, no further prompt is answered. Trained from the
unadapted draft in each round, all rounds together cost about twice the last one's training, and no answer is given twice.

    rounds.json               the curve: prompts, tokens and held-out tau after each round
    answers/round-1.jsonl     the answers that a round added
    rounds/1/                 its adapter
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..checkpoints.adapter_folder import load_adapter, read_training, save_adapter
from ..core.console import say
from ..core.files import write_text
from ..core.folders import read_json
from ..core.records import Prompt, TrainRecord
from ..generation.answer_file import read_answers
from ..prompts.disk_list import Picked
from ..selection.scores import random_score
from .general import GENERAL, GUARDED_BY, GeneralPrompts, answering
from .job import Job
from .run_folder import RunFolder
from .stages import answer, train

AUTO = "auto"
ANSWERS = "answers/rounds.jsonl"
"""All rounds' answers. Not the file of a run with a budget, whose answers are left alone."""
FIRST = 64
"""Prompts of the first round; a sixteenth of the pool where that is more."""


@dataclass(frozen=True)
class Round:
    """All so far: prompts asked, tokens of their answers that were trained on, and the best held-out tau.
    `prompts` 0 is the unadapted draft."""

    prompts: int
    tokens: int
    heldout_tau: float


def in_order(prompts: Sequence[Prompt], seed: int) -> Sequence[Prompt]:
    """A shuffle keyed by the prompts' names, the order of selection by `random`."""
    drawn = [random_score(prompt.id, seed) for prompt in prompts]
    return Picked(prompts, sorted(range(len(drawn)), key=lambda i: -drawn[i]))


def round_sizes(pool: int) -> list[int]:
    """Prompts asked after each round: doubling, and all in the last."""
    sizes = [min(max(FIRST, pool // 16), pool)]
    while sizes[-1] < pool:
        sizes.append(min(2 * sizes[-1], pool))
    return sizes


def pays(before: Round, after: Round, least_gain: float) -> bool:
    """Whether a round's rise in held-out tau asks for another."""
    return after.heldout_tau >= before.heldout_tau * (1 + least_gain)


def train_in_rounds(
    job: Job, prompts: Sequence[Prompt], until: Sequence[str], general: GeneralPrompts | None
) -> str:
    """Answer and train until it stops paying; `prompts` are asked in an order that their ids decide.

    `until` are the stage keys of the answers that stop training. Each round asks the same share of the `general`
    prompts. Leaves the answers in answers/rounds.jsonl and
    the best round's adapter in adapter/, and returns the key of the latter.
    """
    least_gain = job.config.select.least_gain
    prompts = in_order(prompts, job.config.select.seed)
    rounds: list[Round] = []
    keys: list[str] = []
    begin = 0
    for number, size in enumerate(round_sizes(len(prompts)), 1):
        added = Picked(prompts, range(begin, size))
        keys.append(answer(job, f"round-{number}", added, job.config.regenerate))
        if general and general.trained:
            some = [round(len(general.trained) * n / len(prompts)) for n in (begin, size)]
            added = Picked(general.trained, range(*some))
            keys.append(answer(job, f"{GENERAL}-{number}", added, answering(job.config.regenerate)))
        key = train(
            job,
            _files(number),
            [*keys, *until],
            general=[f"{GENERAL}-{n}" for n in range(1, number + 1) if general and general.trained],
            guarded_by=GUARDED_BY if general else None,
            name=f"train round {number}",
            folder=f"rounds/{number}",
            checkpoints=f"checkpoints/round-{number}",
        )
        record = TrainRecord(**load_adapter(job.run.path / "rounds" / str(number)).card["train"])
        rounds = rounds or [Round(0, 0, record.heldout_tau[0][1])]
        rounds.append(Round(size, record.unique_answer_tokens, record.best_tau()))
        say(
            f"round {number}: {size} of {len(prompts)} prompts, {rounds[-1].tokens:,} tokens, held-out "
            f"tau {rounds[-2].heldout_tau:.3f} -> {rounds[-1].heldout_tau:.3f}"
        )
        begin = size
        if number > 1 and not pays(rounds[-2], rounds[-1], least_gain):
            break
    job.run.write_json("rounds.json", curve(rounds, len(prompts), least_gain))
    return _keep_best(job, rounds, [*keys, key])


def curve(rounds: Sequence[Round], pool: int, least_gain: float) -> dict[str, Any]:
    """The rounds as JSON, with what was not generated: prompts, and tokens at the length so far."""
    last = rounds[-1]
    left = pool - last.prompts
    return {
        "least_gain": least_gain,
        "rounds": [asdict(r) for r in rounds],
        "pool": pool,
        "prompts_saved": left,
        "tokens_saved": round(left * last.tokens / last.prompts),
    }


def _keep_best(job: Job, rounds: Sequence[Round], keys: Sequence[str]) -> str:
    """All answers in one file, and the adapter of the round with the best held-out tau."""
    best = max(range(1, len(rounds)), key=lambda number: rounds[number].heldout_tau)

    def work() -> None:
        files = [job.answers(name) for name in _files(len(rounds) - 1)]
        lines = [answer.to_line() + "\n" for file in files for answer in read_answers(file)]
        write_text(job.run.path / ANSWERS, "".join(lines))
        save_adapter(job.run.path / "adapter", load_adapter(job.run.path / "rounds" / str(best)))
        say(f"kept round {best}, held-out tau {rounds[best].heldout_tau:.3f}")

    outputs = [ANSWERS, "adapter/model.safetensors", "adapter/adapter.json"]
    return job.run.stage("train", {"rounds": list(keys), "best": best}, outputs, work)


def trained_in_all(run: RunFolder) -> int:
    """Supervised tokens of all rounds' trainings, those not kept included."""
    rounds = len(read_json(run.path / "rounds.json")["rounds"])
    records = [read_training(run.path / "rounds" / str(number)) for number in range(1, rounds)]
    return sum(record["supervised_tokens"] for record in records)


def _files(upto: int) -> list[str]:
    return [f"round-{number}" for number in range(1, upto + 1)]
