"""Vocabulary remap: new tokens for a draft of a reduced vocabulary.

A token without a row in the draft's head can never be proposed, whatever else is trained: the
target's tokens outside the draft vocabulary cap tau. `remap` gives the rows of tokens that the
answers do not need to tokens that they do. The size D stays, and so does every kept row, bit for
bit; the rows of new tokens are the adapter.

A new row is predicted from the target's own output embedding by a ridge map onto the draft's rows,

    row(token) = mean row + (E[token] - mean E) M      M fitted on the tokens in the draft vocabulary,

whose penalty is chosen on rows held back. The largest "penalty" is the mean row itself, which is
also the start where the target has no output embedding. Training then moves these rows alone.

The adapter tensors are NEW_ROWS [M, H] in the order of ADDED [M], and REMOVED [M], both ascending
target ids in int64.

Shapes: V target vocabulary, D draft vocabulary, M exchanged tokens, E target's hidden size, H draft
hidden size, N rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..core.errors import UserError
from ..core.records import Answer
from ..drafts.base import Draft, vocabulary_map
from ..models.target import Target
from .kind import AddedTensors, Setup, Tensors
from .table import Method

HEAD = "lm_head.weight"
NEW_ROWS = "lm_head.new_rows.weight"
ADDED = "draft_vocab.added"
REMOVED = "draft_vocab.removed"
NAMES = (NEW_ROWS, ADDED, REMOVED)
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Of the ridge map, times the mean square of a centred embedding value, per row."""
HELD_BACK = 5
"""Every so many rows, one decides the penalty."""
CHUNK = 4096


class Vocabulary(AddedTensors):
    """The rows that `remap` made, as an adapter that is stored, merged and restored."""

    def check(self, draft: Draft, method: Method, setup: Setup) -> None:
        reduced_vocabulary(draft)
        if "weight-sync" in method.adapters:
            raise UserError(
                "weight-sync renews the rows of the draft's head, and train.vocab remap exchanges them: "
                "leave one of the two out"
            )

    def attach(self, draft: Draft, method: Method, setup: Setup) -> None:
        """Nothing: `remap` needs the answers (see `training/train.py`)."""

    def adds(self, name: str) -> bool:
        return name in NAMES

    def home(self, name: str) -> str:
        return HEAD

    def restore(self, draft: Draft, tensors: Tensors) -> None:
        attach(draft, tensors)

    def merge(self, merged: Tensors, tensors: Tensors) -> dict[str, Tensor]:
        return apply(merged, tensors)

    def extract(self, merged: Tensors, shared: Tensors) -> tuple[dict[str, Tensor], Tensors]:
        if "d2t" not in shared or torch.equal(merged["d2t"], shared["d2t"]):
            return {}, {}
        ids, original = _ids(merged["d2t"]), _ids(shared["d2t"])
        found = _exchange_of(ids, original, merged[HEAD])
        kept = merged[HEAD][torch.isin(ids, original)]
        before = {name: shared[name] for name in ("d2t", "t2d") if name in shared}
        if torch.equal(kept, shared[HEAD][torch.isin(original, ids)]):
            before[HEAD] = shared[HEAD]
        return found, before


@dataclass(frozen=True)
class Remapped:
    """The draft vocabulary [D] before, the target ids that it gained and lost (ascending, int64 [M], CPU),
    and its miss rate."""

    original: Tensor
    added: Tensor
    removed: Tensor
    missed_before: float
    missed_after: float

    @property
    def changed(self) -> bool:
        return len(self.added) > 0


def miss_rate(draft_vocab: Tensor | None, answers: Sequence[Answer]) -> float:
    """Share of the supervised tokens (an answer's from the second on) that are outside the draft vocabulary.

    0 for a draft with all of V, and for answers without supervised tokens.
    """
    labels = _supervised(answers)
    if draft_vocab is None or not len(labels):
        return 0.0
    return float((~torch.isin(labels, draft_vocab.cpu())).double().mean())


@torch.no_grad()
def remap(draft: Draft, target: Target, answers: Sequence[Answer]) -> Remapped:
    """Give rows of `draft` to the tokens that `answers` use most, in place.

    As few tokens as possible are exchanged: a token comes in only for one that the answers use
    less, and the target's stop tokens always stay. The draft gets a new buffer and a new head
    parameter; tensors it shared with a copy are left unchanged. Nothing is added where the draft
    already has what the answers use most. Raises UserError for a draft with all of V.
    """
    vocab_D = reduced_vocabulary(draft)
    counts_V = torch.bincount(_supervised(answers), minlength=target.vocab_size)
    added, removed = exchange(vocab_D.cpu(), counts_V, target.stop_ids)
    before = miss_rate(vocab_D, answers)
    if len(added):
        rows_DH = _head(draft).weight.detach()
        new_MH = predict_rows(target.head_VH, vocab_D, rows_DH, added)
        _replace(draft, added, removed, new_MH)
    return Remapped(vocab_D, added, removed, before, miss_rate(draft.draft_vocab, answers))


def exchange(vocab_D: Tensor, counts_V: Tensor, never_drop: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The ids to add and to remove, int64 [M] each, ascending.

    The most frequent missing tokens replace the least frequent current ones, as long as they are
    more frequent. Ties favour what is there, then the lower id.
    """
    in_vocab_V = torch.zeros(len(counts_V), dtype=torch.bool)
    in_vocab_V[vocab_D] = True
    missing = (~in_vocab_V & (counts_V > 0)).nonzero().flatten()
    missing = missing[counts_V[missing].argsort(descending=True, stable=True)]
    in_vocab_V[list(never_drop)] = False
    spare = in_vocab_V.nonzero().flatten().flip(0)
    spare = spare[counts_V[spare].argsort(stable=True)]
    both = min(len(missing), len(spare))
    M = int((counts_V[missing[:both]] > counts_V[spare[:both]]).sum())
    return missing[:M].sort().values, spare[:M].sort().values


# -- rows of new tokens ------------------------------------------------------------------------


def predict_rows(
    embedding_VE: Tensor | None, vocab_D: Tensor, rows_DH: Tensor, added_M: Tensor
) -> Tensor:
    """Rows [M, H] for new tokens, from the rows of those in the draft vocabulary; in the rows' dtype.

    Without an embedding, each is the mean row.
    """
    if embedding_VE is None:
        return rows_DH.double().mean(0).to(rows_DH).expand(len(added_M), -1).clone()
    device = embedding_VE.device
    known_DE, rows = embedding_VE[vocab_D.to(device)], rows_DH.to(device)
    held = torch.arange(len(rows), device=device) % HELD_BACK == HELD_BACK - 1
    best: float | None = None
    if held.any():
        sums = _Sums.of(known_DE[~held], rows[~held])
        errors = {
            p: float((sums.predict(known_DE[held], p) - rows[held].double()).square().sum())
            for p in (None, *PENALTIES)
        }
        best = min(errors, key=lambda p: errors[p])
    new_MH = _Sums.of(known_DE, rows).predict(embedding_VE[added_M.to(device)], best)
    return new_MH.to(rows_DH)


@dataclass(frozen=True)
class _Sums:
    """What the ridge map follows from, float64: means, and products of centred x [N, E], y [N, H]."""

    mean_E: Tensor
    mean_H: Tensor
    xx_EE: Tensor
    xy_EH: Tensor

    @staticmethod
    def of(x_NE: Tensor, y_NH: Tensor) -> _Sums:
        mean_E, mean_H = x_NE.mean(0, dtype=torch.float64), y_NH.mean(0, dtype=torch.float64)
        xx = torch.zeros(len(mean_E), len(mean_E), dtype=torch.float64, device=mean_E.device)
        xy = torch.zeros(len(mean_E), len(mean_H), dtype=torch.float64, device=mean_E.device)
        for x, y in zip(torch.split(x_NE, CHUNK), torch.split(y_NH, CHUNK), strict=True):
            centred = x.double() - mean_E
            xx += centred.T @ centred
            xy += centred.T @ (y.double() - mean_H)
        return _Sums(mean_E, mean_H, xx, xy)

    def predict(self, x_NE: Tensor, penalty: float | None) -> Tensor:
        """y [N, H] in float64; with a penalty of None it is the mean."""
        scale = float(self.xx_EE.diagonal().mean())
        if penalty is None or scale == 0.0:
            return self.mean_H.expand(len(x_NE), -1)
        eye = torch.eye(len(self.mean_E), dtype=torch.float64, device=self.mean_E.device)
        map_EH = torch.linalg.solve(self.xx_EE + penalty * scale * eye, self.xy_EH)
        predicted: Tensor = self.mean_H + (x_NE.double() - self.mean_E) @ map_EH
        return predicted


# -- the adapter tensors -----------------------------------------------------------------------


def extract(draft: Draft, original_D: Tensor) -> dict[str, Tensor]:
    """The adapter tensors of a draft that began with vocabulary `original_D`; copies, on the CPU.

    All are empty for a draft that still has it.
    """
    vocab_D, rows_DH = reduced_vocabulary(draft).cpu(), _head(draft).weight.detach().cpu()
    return _exchange_of(vocab_D, original_D.cpu(), rows_DH)


def _exchange_of(vocab_D: Tensor, original_D: Tensor, rows_DH: Tensor) -> dict[str, Tensor]:
    new = ~torch.isin(vocab_D, original_D)
    return {
        NEW_ROWS: rows_DH[new],
        ADDED: vocab_D[new],
        REMOVED: original_D[~torch.isin(original_D, vocab_D)],
    }


def _ids(d2t_D: Tensor) -> Tensor:
    """The draft vocabulary [D] of the offsets that a checkpoint stores."""
    return d2t_D.long() + torch.arange(len(d2t_D), device=d2t_D.device)


@torch.no_grad()
def attach(draft: Draft, adapter: Mapping[str, Tensor]) -> None:
    """Put adapter tensors into a draft, which has its first vocabulary or already theirs.

    In the second case only the new rows are written, into the parameter that is there, so that an
    optimizer keeps hold of it. Raises ValueError for a draft of any other vocabulary.
    """
    vocab_D = reduced_vocabulary(draft)
    added = adapter[ADDED].to(vocab_D.device)
    new = torch.isin(vocab_D, added)
    if int(new.sum()) == len(added) and not torch.isin(vocab_D, adapter[REMOVED].to(added)).any():
        weight = _head(draft).weight
        weight[new] = adapter[NEW_ROWS].to(weight)
    else:
        _replace(draft, adapter[ADDED], adapter[REMOVED], adapter[NEW_ROWS])


def apply(stored: Mapping[str, Tensor], adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of a stored draft the new vocabulary replaces: `lm_head.weight`, `d2t`, `t2d`.

    In the stored dtypes; `t2d` only where the draft stores one. Raises ValueError for tensors that
    belong to another draft vocabulary.
    """
    ids, rows = exchanged(
        _ids(stored["d2t"]), stored[HEAD], adapter[ADDED], adapter[REMOVED], adapter[NEW_ROWS]
    )
    size = len(stored["t2d"]) if "t2d" in stored else int(ids.max()) + 1
    maps = vocabulary_map(ids, size)
    return {HEAD: rows, **{n: maps[n].to(stored[n]) for n in ("d2t", "t2d") if n in stored}}


def exchanged(
    vocab_D: Tensor, rows_DH: Tensor, added_M: Tensor, removed_M: Tensor, new_MH: Tensor
) -> tuple[Tensor, Tensor]:
    """Vocabulary [D], ascending, and its rows [D, H] after an exchange; kept rows are not touched.

    Raises ValueError unless all of `removed_M` and none of `added_M` were in the vocabulary.
    """
    added, removed = added_M.to(vocab_D), removed_M.to(vocab_D)
    gone = torch.isin(vocab_D, removed)
    fits = len(added) == len(removed) == len(new_MH) == int(gone.sum())
    if not fits or torch.isin(vocab_D, added).any():
        raise ValueError(
            f"this adapter's vocabulary exchanges {len(removed)} tokens for {len(added)}, but of a "
            f"draft vocabulary with {int(gone.sum())} and {int(torch.isin(vocab_D, added).sum())} "
            "of them: it belongs to another draft"
        )
    ids, order = torch.cat([vocab_D[~gone], added]).sort()
    return ids, torch.cat([rows_DH[~gone], new_MH.to(rows_DH)])[order]


def row_mask(draft: Draft, added_M: Tensor) -> RemovableHandle:
    """From now on only the rows of `added_M` get a gradient; `remove()` of the handle ends it.

    The head must require a gradient already. An optimizer's weight decay would still move the kept
    rows: do not decay this tensor.
    """
    vocab_D = reduced_vocabulary(draft)
    new_D1 = torch.isin(vocab_D, added_M.to(vocab_D))[:, None]
    handle: RemovableHandle = _head(draft).weight.register_hook(lambda grad: grad * new_D1)
    return handle


# -- a draft's vocabulary and head --------------------------------------------------------------


def _replace(draft: Draft, added_M: Tensor, removed_M: Tensor, new_MH: Tensor) -> None:
    head = _head(draft)
    ids, rows = exchanged(
        reduced_vocabulary(draft), head.weight.detach(), added_M, removed_M, new_MH
    )
    draft.draft_vocab = ids
    head.weight = nn.Parameter(rows, requires_grad=head.weight.requires_grad)


def reduced_vocabulary(draft: Draft) -> Tensor:
    """The draft vocabulary [D]; UserError when it is the target's own."""
    if draft.draft_vocab is None or "d2t" not in draft.stored_state():
        raise UserError(
            f"the {draft.kind} draft {draft.source or 'in memory'} has a row for each of the target's "
            f"{draft.vocab_size} tokens; nothing to remap; leave out --vocab"
        )
    return draft.draft_vocab


def _head(draft: Draft) -> Any:
    head = draft.get_submodule(HEAD.removesuffix(".weight"))
    return getattr(head, "base_layer", head)  # beneath a low-rank pair


def _supervised(answers: Sequence[Answer]) -> Tensor:
    """Every answer's tokens from the second on, int64."""
    tokens = chain.from_iterable(answer.answer[1:] for answer in answers)
    return torch.tensor(list(tokens), dtype=torch.int64)
