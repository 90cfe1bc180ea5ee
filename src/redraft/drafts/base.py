"""What every draft is, to the rest of redraft.

A draft turns the target's features and the tokens so far into logits over its own vocabulary. It
never decides what is accepted (that is `decoding/acceptance_rules.py`), and nothing outside `drafts/`
names a concrete kind.

One pair (features of position i, token i+1) is the unit of input; its output predicts token i+2.
A *chain* starts at a pair i, built from the target's features, and continues on the draft's own
states. Chain step j of start i has consumed token i+1+j and predicts token i+2+j.

Shapes: B batch, T tokens, F auxiliary features, H draft hidden size, D draft vocabulary,
S chain starts.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..core.rng import seeded
from ..models.target import Target

D = TypeVar("D", bound="Draft")
MOST_PADDING = 1280
"""Two vocabularies that differ by more rows than this differ by more than padding (gpt-oss has 1,069)."""


class Draft(nn.Module, ABC):
    """A proposer of tokens for one target."""

    kind: ClassVar[str]
    config: Any
    """Its shape, which its row knows how to store."""
    aux_layers: tuple[int, ...]
    """hs[] indices of the target whose concatenation this draft reads."""
    feature_size: int
    """Width of the concatenated features, F."""
    hidden_size: int
    """Width of the draft's own states, H."""
    feeds_back: ClassVar[bool] = True
    """Whether a chain continues on the draft's own states. Where it does not, all steps of a
    rollout are the same states, and training through more than one would only repeat them."""
    vocab_size: int
    """Width of the target's vocabulary, V."""
    source: str | None = None
    """The folder it was loaded from; None for one made in memory."""
    draft_vocab: Tensor | None
    """Target ids of the draft's rows, ascending, int64 [D]; None for all of V."""

    @abstractmethod
    def rollout(
        self, tokens_BT: Tensor, features_BTF: Tensor, first: int, steps: int
    ) -> Iterator[Tensor]:
        """Every chain from start `first` on, one step at a time, on the true tokens.

        Yields for step j = 0..steps-1 the states [B, T-2-j-first, H] of chain starts
        first..T-3-j, which predict tokens first+2+j..T-1. This is exactly what step-by-step
        decoding computes as long as its drafted tokens are accepted, so it serves both training
        and replay. Stops early when no start is left.
        """

    @abstractmethod
    def logits(self, states: Tensor) -> Tensor:
        """Logits over the draft vocabulary [..., D] of states [..., H]."""

    @abstractmethod
    def new_cache(self, first_B: Tensor) -> Any:
        """An empty decoding state for sequences of their own length; `first_B` are their first
        tokens, which belong to no pair."""

    @abstractmethod
    def extend(
        self,
        cache: Any,
        tokens_BT: Tensor,
        features_BTF: Tensor,
        counts: Sequence[int] | None = None,
    ) -> Tensor:
        """Consume true pairs, first dropping whatever the last chain drafted.

        `counts` says how many of the T pairs are real in each row, the rest being padding on the
        right. Returns the state [B, 1, H] after each row's last pair, which starts the next chain.
        """

    @abstractmethod
    def step(self, cache: Any, token_B1: Tensor, state_B1H: Tensor) -> Tensor:
        """One chain step on the draft's own states; returns the next ones [B, 1, H]."""

    @abstractmethod
    def keep_rows(self, cache: Any, rows: Sequence[int]) -> None:
        """Forget all other rows of a decoding state."""

    @abstractmethod
    def bind(self, target: Target) -> None:
        """Take over what the engines share from the target (the embedding where none is stored).

        Raises UserError when hidden size, aux layers or vocabulary do not fit.
        """

    def trainable_names(self) -> list[str]:
        """Every tensor that a from-scratch draft of this kind trains, by state-dict name."""
        return [name for name, _ in self.named_parameters()]

    def check_fresh(self) -> None:
        """Raise UserError for a draft that is not trained from nothing."""

    def reinitialise(self, seed: int) -> None:
        """Fresh weights for training from nothing, in place."""
        parameters = dict(self.named_parameters())
        for name in self.trainable_names():
            with torch.no_grad():
                if name.endswith("bias"):
                    parameters[name].zero_()
                elif parameters[name].dim() == 1:
                    parameters[name].fill_(1.0)
                else:
                    shape = parameters[name].shape
                    noise = torch.randn(shape, generator=seeded(seed, "init", name))
                    parameters[name].copy_(noise * shape[1] ** -0.5)

    def stored_state(self) -> dict[str, Tensor]:
        """The tensors that belong into a checkpoint folder, by stored name."""
        return {name: tensor.detach() for name, tensor in self.state_dict().items()}

    def copy_sharing(self: D, own: Collection[str]) -> D:
        """A copy that shares every tensor with this draft but the parameters named in `own`."""
        memo: dict[int, Any] = {
            id(tensor): tensor for name, tensor in self.named_parameters() if name not in own
        }
        memo |= {id(tensor): tensor for tensor in self.buffers()}
        # What it borrows from the target: an embedding, a head.
        borrowed = (v for v in vars(self).values() if isinstance(v, Tensor | nn.Module))
        memo |= {id(value): value for value in borrowed}
        return copy.deepcopy(self, memo)

    def to_target_ids(self, draft_ids: Tensor) -> Tensor:
        """Draft-vocabulary ids as the target's."""
        return draft_ids if self.draft_vocab is None else self.draft_vocab[draft_ids]

    def parameter_count(self) -> int:
        """Parameters stored in a checkpoint (an engine-shared embedding is not one)."""
        return sum(t.numel() for t in self.stored_state().values() if t.is_floating_point())


def token_count(target: Target) -> int:
    """How many ids the target's tokenizer uses; 0 without one. Its embedding may be padded to more rows."""
    if target.tokenizer is None:
        return 0
    return max(target.tokenizer.get_vocab().values(), default=-1) + 1


def select_columns(logits_V: Tensor, draft_vocab: Tensor | None) -> Tensor:
    """The target's logits over the draft vocabulary: [..., V] -> [..., D]."""
    return logits_V if draft_vocab is None else logits_V.index_select(-1, draft_vocab)


def vocabulary_map(draft_vocab: Tensor, vocab_size: int) -> dict[str, Any]:
    """d2t as offsets (target id = row + d2t[row]) and t2d as a mask, as checkpoints store them."""
    rows = torch.arange(len(draft_vocab), device=draft_vocab.device)
    in_vocab = torch.zeros(vocab_size, dtype=torch.bool)
    in_vocab[draft_vocab.cpu()] = True
    return {"d2t": draft_vocab - rows, "t2d": in_vocab}
