"""The drafts of the race in Transformers: `model.generate` with and without one, one request at a time.

    RACE/MEMBER/served/transformers-ROW.sSEED.kK.json   one draft; `plain`, of K = 0, is `generate` without a draft

All of them take turns on the same prompts in one run, so where one is missing all of them run again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from redraft.checkpoints.load import load_draft
from redraft.core.files import write_text
from redraft.core.records import Prompt, to_json
from redraft.decoding.transformers_generate import generate
from redraft.metrics.speed import race, transformers_generate
from redraft.models.target import Target
from redraft.prompts.prompts import read_prompts

from .real_members import MEMBERS
from .real_serving import PLAIN, ServedCell
from .real_suite import load_real, prompts_of

ENGINE = "transformers"
PROMPTS, LONGEST, REPEATS = 8, 64, 3


def bench_real_generate(
    suite: Path,
    out: Path,
    *,
    member: str,
    drafts: Mapping[str, Path],
    ks: Sequence[int],
    seed: int,
) -> list[ServedCell]:
    """The cells of these drafts, by row, the plain one first."""
    asked = [(PLAIN, 0), *((row, k) for row in drafts for k in ks)]
    files = [out / "served" / f"{ENGINE}-{row}.s{seed}.k{k}.json" for row, k in asked]
    if not all(file.is_file() for file in files):
        target = load_real(suite, member)
        source = prompts_of(suite, MEMBERS[member].domain, "eval")
        prompts = read_prompts(str(source), target, PROMPTS, "last").prompts
        runners = {
            f"{row} {k}": _Runner(target, drafts[row], k)
            if row in drafts
            else transformers_generate(target, LONGEST)
            for row, k in asked
        }
        speed, answers = race(runners, [[prompt] for prompt in prompts], REPEATS)
        for (row, k), file in zip(asked, files, strict=True):
            name = f"{row} {k}"
            runner, tau, equal = runners[name], None, None
            if isinstance(runner, _Runner):
                pairs = zip(answers[f"{PLAIN} 0"], answers[name], strict=True)
                tau, equal = runner.tau(), sum(one == other for one, other in pairs)
            cell = ServedCell(member, row, seed, k, {"1": speed[name]}, tau, equal, ENGINE)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps(to_json(cell)) + "\n")
    rows = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    return [ServedCell.from_json(row) for row in rows]


class _Runner:
    """`model.generate` with a draft; counts the tokens accepted in each step."""

    def __init__(self, target: Target, draft: Path, k: int):
        self.how = generate(load_draft(str(draft), target), k=k)
        self.run = transformers_generate(target, LONGEST, custom_generate=self.how)
        self.accepted: list[int] = []

    def __call__(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        answers = self.run(prompts)
        self.accepted += [count for row in self.how.accepted for count in row]
        return answers

    def tau(self) -> float:
        return 1 + sum(self.accepted) / len(self.accepted)
