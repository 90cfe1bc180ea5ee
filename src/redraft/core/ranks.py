"""Processes that work on one job together, as `torchrun` and `accelerate launch` start them: its ranks.

Every rank runs the whole job in step with the others. What takes time is shared out (`mine`), what was found is put
together again (`merged`, `summed`), and rank 0 alone decides (`first`), writes (see `files.py`) and speaks. Where the
ranks hold a model together nothing is shared out: all compute the same, each with its share of the model. A process of
its own is a job of one rank, for which all of this does nothing.

A rank that fails leaves its sentence where rank 0 finds it, so that rank 0 can say it and end; a rank that dies
without a word is noticed by the next exchange, or by the time-out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
K = TypeVar("K")

TIMEOUT = "REDRAFT_RANK_TIMEOUT"
"""Environment variable: seconds that ranks wait for each other."""
WAIT_SECONDS = 1800
POLL_SECONDS = 0.2
GRACE_SECONDS = 1.0
"""After which a rank takes its mistake for its own alone."""
FAILED, TOLD = "redraft/failed", "redraft/told"
"""Where a failing rank leaves its sentence, and where rank 0 says that it has told it."""
AGAIN = "everything finished so far is kept, so run the same command again"


@dataclass(frozen=True)
class Place:
    """Which of how many processes this one is; `local` counts those of this machine."""

    rank: int = 0
    size: int = 1
    local: int = 0


_joined = _here = Place()
_together = False
"""Whether the ranks hold a model together."""


def launched() -> int:
    """How many processes a launcher started, by its environment; 1 without one.

    Some clusters set WORLD_SIZE by themselves, but a launcher sets RANK as well.
    """
    size = os.environ.get("WORLD_SIZE", "")
    return int(size) if size.isdigit() and "RANK" in os.environ else 1


def join(tell: Callable[[str], None]) -> None:
    """Meet the other processes of this job, if there are any. `tell` prints another rank's sentence on rank 0.

    Raises UserError where they cannot be reached.
    """
    global _joined, _here
    if launched() == 1:
        return
    import torch
    import torch.distributed as dist
    import torch.distributed.nn.functional  # its default arguments hold the group that it finds: none yet

    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    try:
        place = Place(*(int(os.environ[name]) for name in names))
        seconds = float(os.environ.get(TIMEOUT) or WAIT_SECONDS)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(place.local % torch.cuda.device_count())
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=seconds))
    except (KeyError, ValueError, RuntimeError, OSError) as problem:
        raise UserError(
            f"WORLD_SIZE is {launched()}, but the other processes of this job cannot be met ({problem}); start it with "
            "torchrun or accelerate launch, or without WORLD_SIZE"
        ) from None
    _joined = _here = place
    if place.rank == 0:
        _watcher.start(tell)
        signal.signal(signal.SIGTERM, lambda *_: _told_to_end(tell))


def leave() -> None:
    """Part from the other ranks, at the end of a job. Ends gloo's threads too: one that still lets go of tensors when
    Python ends aborts the process (pytorch/pytorch#179291).
    """
    global _joined, _here, _together
    if _joined.size > 1:
        import torch.distributed as dist

        _watcher.stop()
        dist.destroy_process_group()
    _joined = _here = Place()
    _together = False


def fail(sentence: str) -> None:
    """Of a rank that is about to end: leave the sentence to rank 0, and wait until it has told it.

    A mistake that all ranks find is told by rank 0 alone, which ends soon after.
    """
    if _joined.size == 1:
        return
    with contextlib.suppress(RuntimeError, ValueError):  # rank 0 may have ended already
        store = _store()
        if _joined.rank == 0:
            _watcher.stop()
            store.set(TOLD, "1")
            time.sleep(GRACE_SECONDS + 3 * POLL_SECONDS)
            return
        time.sleep(GRACE_SECONDS)
        if not store.check([TOLD]):
            store.set(FAILED, f"rank {_joined.rank} of {_joined.size}: {sentence}")
            store.wait([TOLD], datetime.timedelta(seconds=20))


def size() -> int:
    return _here.size


def rank() -> int:
    return _here.rank


def local() -> int:
    """Which of this machine's ranks this is."""
    return _joined.local


def is_first() -> bool:
    """Whether this process decides, writes and speaks."""
    return _here.rank == 0


def compute_together() -> None:
    """From here on every rank computes the same, because each holds its share of one model."""
    global _together
    _together = True


def shares() -> int:
    """Among how many ranks work is shared out."""
    return 1 if _together else _here.size


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """In the block this process is a job of one rank: nothing is shared out, and it may write. Ranks that compute
    together go on so."""
    global _here
    before = _here
    _here = before if _together else dataclasses.replace(before, rank=0, size=1)
    try:
        yield
    finally:
        _here = before


def mine(items: Sequence[T], of: int | None = None) -> Sequence[T]:
    """The share of a rank (None: this one) of a list that is the same on all ranks."""
    return items if shares() == 1 else items[_here.rank if of is None else of :: _here.size]


def everyone(said: T) -> list[T]:
    """What each rank says, in their order."""
    if _here.size == 1:
        return [said]
    import torch.distributed as dist

    found: list[Any] = [None] * _here.size
    with _exchange():
        dist.all_gather_object(found, said)
    return found


def all_agree(own: bool) -> bool:
    """Whether each rank says yes."""
    return all(everyone(own))


def of_each_share(found: T) -> list[T]:
    """What was found in each share of the work."""
    return [found] if shares() == 1 else everyone(found)


def merged(found: Mapping[K, T]) -> dict[K, T]:
    """The entries of all shares."""
    return {key: value for part in of_each_share(dict(found)) for key, value in part.items()}


def first(work: Callable[[], T]) -> T:
    """What `work` gives on rank 0, for all; its UserError is everybody's."""
    if _here.size == 1:
        return work()
    import torch.distributed as dist

    said: list[Any] = [None, None]
    if is_first():
        try:
            said[0] = work()
        except UserError as problem:
            said[1] = str(problem)
    with _exchange():
        dist.broadcast_object_list(said, src=0)
    if said[1] is not None:
        raise UserError(said[1])
    result: T = said[0]
    return result


def agreed(own: T) -> T:
    """Of ranks that compute together, what rank 0 says; else what this one does. For what differs by chance, as times do."""
    return everyone(own)[0] if _together else own


def of_all(own: float) -> float:
    """Of ranks that compute together, the sum of what each did of the work; else what this one did."""
    return sum(everyone(own)) if _together else own


def wait() -> None:
    """Go on when all ranks are here, for instance before one reads what rank 0 wrote."""
    everyone(None)


def summed(tensors: Sequence[Tensor]) -> None:
    """Add the tensors of all shares, in place; they have the same shapes on all ranks."""
    if shares() == 1 or not tensors:
        return
    import torch.distributed as dist

    _in_one(tensors, lambda whole: dist.all_reduce(whole))


def owners(sizes: Sequence[int]) -> list[int]:
    """The rank that each of these things belongs to, so that all ranks have about as much: the largest first."""
    held, found = [0] * _here.size, [0] * len(sizes)
    for at in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        found[at] = held.index(min(held))
        held[found[at]] += sizes[at]
    return found


def given(tensors: Sequence[Tensor], owned_by: Sequence[int]) -> None:
    """Give all ranks the tensors of those that own them, in place."""
    if _here.size == 1:
        return
    import torch.distributed as dist

    for owner in range(_here.size):
        own = [tensor for tensor, by in zip(tensors, owned_by, strict=True) if by == owner]
        _in_one(own, lambda whole, owner=owner: dist.broadcast(whole, owner))  # type: ignore[misc]


def to_first(said: T) -> list[T]:
    """On rank 0, what each rank says; nothing elsewhere."""
    if _here.size == 1:
        return [said]
    import torch.distributed as dist

    found: list[Any] = [None] * _here.size if is_first() else []
    with _exchange():
        dist.gather_object(said, found if is_first() else None)
    return found


def _in_one(tensors: Sequence[Tensor], exchange: Callable[[Tensor], object]) -> None:
    """Exchange tensors in place, those of a kind as one."""
    import torch

    kinds = dict.fromkeys((tensor.dtype, tensor.device) for tensor in tensors)
    for kind in kinds:
        some = [tensor for tensor in tensors if (tensor.dtype, tensor.device) == kind]
        whole = torch.cat([tensor.reshape(-1) for tensor in some])
        with _exchange():
            exchange(whole)
        parts = torch.split(whole, [tensor.numel() for tensor in some])
        for tensor, part in zip(some, parts, strict=True):
            tensor.copy_(part.view_as(tensor))


def check_same(what: str, about: Mapping[str, Any]) -> None:
    """Raise UserError, naming what differs and where, unless `about` is the same on all ranks."""
    known = everyone(dict(about))
    for name in known[0]:
        for other, found in enumerate(known):
            if found.get(name) != known[0][name]:
                raise UserError(
                    f"{what}: {name} is {known[0][name]} on rank 0 and {found.get(name)} on rank {other}; all ranks need the "
                    "same files, settings and versions"
                )


@contextlib.contextmanager
def _exchange() -> Iterator[None]:
    """Turn the failure of an exchange into a sentence: another rank is gone."""
    try:
        yield
    except RuntimeError as problem:
        time.sleep(
            2 * POLL_SECONDS
        )  # a sentence that was left is told first, and ends this process
        raise UserError(
            f"another process of this job ended or did not answer in time ({str(problem).splitlines()[0]}); {AGAIN}"
        ) from None


def _store() -> Any:
    import torch.distributed as dist

    return dist.distributed_c10d._get_default_store()


def _told_to_end(tell: Callable[[str], None]) -> None:
    """A launcher ends the other processes of a job when one of them died."""
    tell(f"told to end, perhaps because another process of this job died; {AGAIN}")
    os._exit(2)


class _Watcher:
    """On rank 0: tells what another rank failed of, and ends. Files are written so that this loses nothing."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, tell: Callable[[str], None]) -> None:
        self._thread = threading.Thread(target=self._watch, args=(tell,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        if self._thread is not None:
            self._ended.set()
            self._thread.join()

    def _watch(self, tell: Callable[[str], None]) -> None:
        store = _store()
        with contextlib.suppress(RuntimeError, ValueError):  # who keeps the store is gone
            while not store.check([FAILED]):
                if self._ended.wait(POLL_SECONDS):
                    return
            tell(store.get(FAILED).decode("utf-8"))
            store.set(TOLD, "1")
            os._exit(2)


_watcher = _Watcher()
