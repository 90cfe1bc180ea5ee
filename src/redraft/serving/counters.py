"""An engine's speculation counters, read from its Prometheus page."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import zip_longest

from ..core.records import EngineAcceptance

_LINE = r"^{}:spec_decode_num_(\w+)_total(?:\{{([^}}]*)\}})? ([0-9.eE+]+)$"
_POSITION = re.compile(r'position="(\d+)"')


@dataclass(frozen=True)
class Counters:
    """Totals since the server's start: drafts (verification steps), proposed and accepted tokens,
    and accepted tokens by position in the chain."""

    drafts: int = 0
    drafted: int = 0
    accepted: int = 0
    per_position: tuple[int, ...] = ()

    def since(self, before: Counters) -> Counters:
        """What was counted between `before` and this reading."""
        earlier = (*before.per_position, *([0] * len(self.per_position)))
        return Counters(
            self.drafts - before.drafts,
            self.drafted - before.drafted,
            self.accepted - before.accepted,
            tuple(now - then for now, then in zip(self.per_position, earlier, strict=False)),
        )

    def acceptance(self) -> EngineAcceptance:
        """As tau and conditional acceptance; tau is 1 where nothing was drafted."""
        reached = (self.drafts, *self.per_position)
        rates = (
            found / before if before else 0.0
            for found, before in zip(self.per_position, reached, strict=False)
        )
        tau = 1 + self.accepted / self.drafts if self.drafts else 1.0
        return EngineAcceptance(tau, self.drafts, self.drafted, self.accepted, tuple(rates))


def added(some: Iterable[Counters]) -> Counters:
    """The sum of what was counted at several times."""
    found = list(some)
    positions = zip_longest(*(each.per_position for each in found), fillvalue=0)
    return Counters(
        sum(each.drafts for each in found),
        sum(each.drafted for each in found),
        sum(each.accepted for each in found),
        tuple(sum(row) for row in positions),
    )


def read_counters(page: str, prefix: str = "vllm") -> Counters:
    """The counters on a /metrics page whose names begin with `prefix`, summed over engines; zeros
    where there are none."""
    totals: dict[str, float] = {}
    positions: dict[int, float] = {}
    for name, labels, value in re.findall(_LINE.format(prefix), page, re.MULTILINE):
        position = _POSITION.search(labels)
        if position:
            at = int(position.group(1))
            positions[at] = positions.get(at, 0.0) + float(value)
        else:
            totals[name] = totals.get(name, 0.0) + float(value)
    return Counters(
        int(totals.get("drafts", 0)),
        int(totals.get("draft_tokens", 0)),
        int(totals.get("accepted_tokens", 0)),
        tuple(int(positions[at]) for at in sorted(positions)),
    )


def steady(read: Callable[[], Counters], pause: float, looks: int | None = None) -> Counters:
    """The counters once two readings, `pause` seconds apart, are equal: they lag behind the answers.

    After `looks` more readings the last is given, because a server that others use is never steady.
    """
    last = read()
    for _ in itertools.count() if looks is None else range(looks):
        time.sleep(pause)
        now = read()
        if now == last:
            break
        last = now
    return last
