"""Hidden states from several vLLM servers of one target: rows go to whichever is free, those of a server that fails to the others.

A server is asked for the next row when the one before was read and removed, so the folder holds no more files than there are
requests at a time.

Shapes: S tokens of a row, L aux layers, H target hidden size.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from torch import Tensor

from ..core.console import say
from ..core.errors import UserError
from .capture import Capture

APART = 0.05
"""How far two servers' states of a row may be from each other, as a share: half precision rounds them otherwise."""


class CaptureFleet:
    """Asks like one `Capture`. Every server is asked for the first row, and has to give the states that the first one gives."""

    def __init__(self, servers: Sequence[Capture]):
        self.servers = list(servers)
        self._compared = False

    def __call__(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """States [S, L+1, H] of rows of token ids, in their order.

        Raises UserError for servers whose states differ, and with the last problem once no server is left.
        """
        if rows and not self._compared:
            self._compare(rows[0])
            self._compared = True
        waiting, found = deque(range(len(rows))), dict[int, Tensor]()
        lost: dict[str, UserError] = {}
        turn = threading.Lock()

        def work(server: Capture) -> None:
            while server.address not in lost:
                with turn:
                    if not waiting:
                        return
                    row = waiting.popleft()
                try:
                    (found[row],) = server([rows[row]])
                except UserError as problem:
                    with turn:
                        waiting.append(row)
                        if server.address not in lost:
                            lost[server.address] = problem

        while waiting:
            left = [server for server in self.servers if server.address not in lost]
            if not left:
                raise next(reversed(lost.values()))
            # Servers alternate: a batch of fewer rows than `concurrency` would go to the first server alone.
            turns = range(max(server.concurrency for server in left))
            workers = [s for at in turns for s in left if at < s.concurrency]
            with ThreadPoolExecutor(len(workers)) as pool:
                list(pool.map(work, workers))
        for address, problem in lost.items():
            say(f"{address} is asked no more: {problem}")
        self.servers = [server for server in self.servers if server.address not in lost]
        return [found[row] for row in range(len(rows))]

    def _compare(self, row: Sequence[int]) -> None:
        first, *others = self.servers
        (wanted,) = first([row])
        for server in others:
            (states,) = server([row])
            apart = float((states.float() - wanted.float()).norm() / wanted.float().norm())
            if not apart < APART:
                raise UserError(
                    f"{server.address} and {first.address} give other states of the same tokens (relative difference "
                    f"{apart:.1e}): another target or revision; name servers of one target"
                )
