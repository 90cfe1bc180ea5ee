"""`redraft bench bank`: what a bank of many adapters takes, on disk and in memory, and how long it takes to load one.

The adapters are low-rank pairs with random numbers: their sizes count, not their figures. Memory is counted as
`VmRSS` of this process before and after all of them are attached to one draft, next to as many drafts of their own.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import typer

from redraft.adapters.adapter import Adapter, prepare, take
from redraft.adapters.kind import Setup
from redraft.adapters.table import read_method
from redraft.checkpoints.adapter_folder import save_adapter
from redraft.checkpoints.load import StoredDraft, read_draft
from redraft.core.console import Progress
from redraft.core.folders import state_hash
from redraft.core.rng import seeded
from redraft.drafts.base import Draft
from redraft.fleet.bank import DRAFT, add, read_bank, size_of

METHOD = read_method("lora")


@dataclass(frozen=True)
class BankCell:
    """Sizes in bytes, times in seconds of one adapter in the mean. `held` is what all of them take in memory, `tensors` what
    of it is not the frozen draft's; `apart` what as many drafts would take by themselves."""

    draft: str
    adapters: int
    rank: int
    draft_bytes: int
    adapter_bytes: float
    bank_bytes: int
    add_seconds: float
    load_seconds: float
    held: int
    tensors: int
    apart: int


def bench_bank(draft: str, adapters: int, rank: int) -> BankCell:
    """Fill a bank with `adapters` adapters of the draft's folder, and load them all."""
    stored = read_draft(draft)
    with tempfile.TemporaryDirectory() as scratch:
        folder, made = Path(scratch) / "bank", Path(scratch) / "made"
        network = stored.build()
        prepare(network, METHOD, Setup(rank=rank))
        adding = 0.0
        with Progress("adding", adapters, "adapters") as progress:
            for at in range(adapters):
                save_adapter(made, _random(stored, network, at))
                began = time.monotonic()
                add(folder, f"tune-{at}", made, draft if at == 0 else None)
                adding += time.monotonic() - began
                progress.advance()
        bank = read_bank(folder)
        frozen = bank.frozen.build()
        began, before = time.monotonic(), _resident()
        drafts = [bank.adapter(name).attached_to(frozen) for name in bank.adapters]
        seconds, held = time.monotonic() - began, _resident() - before
        shared = {tensor.data_ptr() for tensor in frozen.parameters()}
        own = _bytes(p for each in drafts for p in each.parameters() if p.data_ptr() not in shared)
        return BankCell(
            draft=draft,
            adapters=adapters,
            rank=rank,
            draft_bytes=size_of(folder / DRAFT),
            adapter_bytes=(size_of(folder) - size_of(folder / DRAFT)) / adapters,
            bank_bytes=size_of(folder),
            add_seconds=adding / adapters,
            load_seconds=seconds / adapters,
            held=held,
            tensors=own,
            apart=adapters * _bytes(frozen.parameters()),
        )


def _random(stored: StoredDraft, network: Draft, at: int) -> Adapter:
    tensors = {
        name: 0.01 * torch.randn(tensor.shape, generator=seeded(at, name)).to(tensor)
        for name, tensor in take(network, METHOD).items()
    }
    card = {
        "shared": str(stored.folder),
        "shared_hash": stored.hash(),
        "adapter_hash": state_hash(tensors),
        "target": f"tune-{at}",
        "target_fingerprint": str(at),
    }
    return Adapter(METHOD.name, tensors, card)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _resident() -> int:
    """Bytes of this process in memory."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    (line,) = (line for line in status.splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def print_cell(cell: BankCell) -> None:
    mega = 1e6
    typer.echo(
        f"{cell.adapters} adapters of rank {cell.rank} of {cell.draft}\n"
        f"on disk    {cell.bank_bytes / mega:.1f} MB: the draft {cell.draft_bytes / mega:.1f}, an adapter "
        f"{cell.adapter_bytes / mega:.2f}\n"
        f"in memory  {cell.held / mega:.1f} MB for all, of which tensors {cell.tensors / mega:.1f}; as drafts of their own "
        f"{cell.apart / mega:.0f}\n"
        f"seconds    {cell.add_seconds:.3f} to add one, {cell.load_seconds:.3f} to load one"
    )
