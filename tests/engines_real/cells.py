"""One cell of the table: a target and a draft in a running engine, against redraft's own counts."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from redraft.checkpoints.load import read_draft
from redraft.core.records import Lossless, Prompt
from redraft.decoding.plain import decode_plain
from redraft.drafts.base import Draft
from redraft.metrics.live import live
from redraft.metrics.lossless import compare
from redraft.metrics.replay import replay
from redraft.models.gguf_file import gguf_file
from redraft.models.target import Target
from redraft.serving.counters import Counters
from redraft.serving.engine import Engine, Speculation
from redraft.serving.environment import Environment
from redraft.serving.own_count import Limits, count_own
from redraft.serving.verify import STATES, Request, method_of, serving_of, with_lookahead

K, TOKENS = 4, 96


@dataclass(frozen=True)
class Cell:
    """What one engine load gave. `drafts` and `accepted` are the engine's counters, `own_drafts`
    and `own_accepted` those of redraft's live loop on the same token ids, cut as the engine cuts. Of a target with
    rounded weights they are those of the engine's answers."""

    name: str
    engine: str
    date: str
    target: str
    method: str
    k: int
    dtype: str
    concurrency: int
    prompts: int
    max_new_tokens: int
    identical: int
    excused: int
    different: int
    drafts: int
    accepted: int
    tau: float
    own_drafts: int
    own_accepted: int
    own_tau: float
    seconds: float

    @property
    def outputs(self) -> Lossless:
        return Lossless(self.prompts, self.identical, self.excused)


@dataclass
class Table:
    """Runs cells, keeps each, and keeps the engine's plain answers of each target and dtype."""

    engine: Engine
    environment: Environment
    logs: Path
    prompts: Sequence[Prompt]
    flags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.cells: dict[str, Cell] = {}
        self._plain: dict[str, list[list[int]]] = {}

    def ask(
        self, name: str, target: Target, speculation: Speculation | None, concurrency: int = 1
    ) -> tuple[list[list[int]], Counters]:
        """The engine's answers, and what it counted while giving them. One engine load."""
        request = Request(
            self.logs,
            max_new_tokens=TOKENS,
            engine=self.engine,
            concurrencies=(concurrency,),
            engine_args=self.flags,
        )
        what = dataclasses.replace(
            serving_of(target, self.prompts, request), speculation=speculation
        )
        what = self.engine.prepare(self.environment, what, self.logs / "converted")
        log = self.logs / f"{self.engine.name} {name}.log"
        with self.engine.serve(self.environment, what, log) as client:
            before = client.counters()
            answers = client.complete_all(
                self.prompts, TOKENS, target.stop_ids, concurrency=concurrency, label=name
            )
            return answers, client.counters().since(before)

    def plain(self, target: Target) -> list[list[int]]:
        """The engine's answers without a draft; one engine load per target and dtype."""
        name = f"plain {'+'.join(Path(s).name for s in target.sources)} {target.dtype}"
        if name not in self._plain:
            self._plain[name] = self.ask(name.replace(" ", "-"), target, None)[0]
        return self._plain[name]

    def cell(
        self,
        name: str,
        target: Target,
        folder: str,
        *,
        k: int = K,
        concurrency: int = 1,
        reference: Sequence[Sequence[int]] | None = None,
    ) -> Cell:
        """Try a draft in the engine. `reference` stands in for the engine's plain answers."""
        if name in self.cells:
            return self.cells[name]
        stored = read_draft(folder)
        draft = stored.build(target)
        plain = self.plain(target) if reference is None else reference
        began = time.monotonic()
        speculation = Speculation(method_of(stored, self.engine), folder, k)
        answers, counted = self.ask(name.replace(" ", "-"), target, speculation, concurrency)
        seconds = time.monotonic() - began
        rounded = gguf_file(target.sources[0]) is not None
        own = self.own_count(target, draft, k, answers if rounded else None)
        rounding = STATES if rounded else None
        outputs = compare(target, self.prompts, plain, answers, rounding=rounding)
        self.cells[name] = Cell(
            name=name,
            engine=f"{self.environment.package} {self.environment.version}",
            date=date.today().isoformat(),
            target="+".join(Path(source).name for source in target.sources),
            method=speculation.method,
            k=k,
            dtype=str(target.dtype).removeprefix("torch."),
            concurrency=concurrency,
            prompts=len(self.prompts),
            max_new_tokens=TOKENS,
            identical=outputs.identical,
            excused=outputs.excused,
            different=outputs.different,
            drafts=counted.drafts,
            accepted=counted.accepted,
            tau=counted.acceptance().tau,
            own_drafts=own.drafts,
            own_accepted=own.accepted,
            own_tau=own.acceptance().tau,
            seconds=round(seconds, 1),
        )
        return self.cells[name]

    def own_count(
        self, target: Target, draft: Draft, k: int, given: list[list[int]] | None = None
    ) -> Counters:
        if given is None:
            traces, answers = live(target, draft, self.prompts, k, TOKENS)
        else:
            answers = with_lookahead(target, self.prompts, given, k)
            traces = replay(target, draft, answers, k)
        return count_own(traces, answers, Limits(k, TOKENS, target.stop_ids), self.engine.cut)


def own_plain(target: Target, prompts: Sequence[Prompt]) -> list[list[int]]:
    """redraft's own plain decoding of all prompts."""
    return [decode_plain(target, prompt.tokens, TOKENS) for prompt in prompts]
