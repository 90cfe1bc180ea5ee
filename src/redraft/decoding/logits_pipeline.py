"""Logits processors and sampling together, at several positions at once.

A logits processor is allowed when its result depends on nothing but the prefix and the logits:
then it is applied at every position with that position's own prefix, on the target's side, and
the output is what plain decoding with the same processors gives. One that counts its calls, keeps
a state, or runs the model itself would be asked about tokens that are rejected later: it is refused
by name. A class of the user's own says of itself that it is pure: `prefix_pure = True`.

Shapes: B rows, P positions, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.errors import UserError
from .sampling import Sampling, scores

Prefixes = Callable[[int, int], list[int]]
"""(row, position) -> the token ids before that position, prompt included."""

PREFIX_FREE = {
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "TopHLogitsWarper",
    "MinPLogitsWarper",
    "TypicalLogitsWarper",
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
    "SuppressTokensLogitsProcessor",
    "InfNanRemoveLogitsProcessor",
    "LogitNormalization",
}
"""Processors of Transformers that look at the logits alone."""

PREFIX_PURE = PREFIX_FREE | {
    "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor",
    "RepetitionPenaltyLogitsProcessor",
    "EncoderRepetitionPenaltyLogitsProcessor",
    "NoRepeatNGramLogitsProcessor",
    "EncoderNoRepeatNGramLogitsProcessor",
    "SequenceBiasLogitsProcessor",
    "NoBadWordsLogitsProcessor",
    "PrefixConstrainedLogitsProcessor",
    "ForcedBOSTokenLogitsProcessor",
    "ForcedEOSTokenLogitsProcessor",
    "ExponentialDecayLengthPenalty",
    "SuppressTokensAtBeginLogitsProcessor",
    "WatermarkLogitsProcessor",
}
"""Processors of Transformers that look at the prefix too, and at nothing else."""


def _repetition(own: Any, row: int) -> None:
    if isinstance(own.prompt_ignore_length, Tensor):
        own.prompt_ignore_length = _row(own.prompt_ignore_length, row)


def _encoder_repetition(own: Any, row: int) -> None:
    own.encoder_input_ids = _row(own.encoder_input_ids, row)


def _encoder_ngrams(own: Any, row: int) -> None:
    own.generated_ngrams, own.batch_size = _row(own.generated_ngrams, row), 1


def _prefix_constrained(own: Any, row: int) -> None:
    allowed = own._prefix_allowed_tokens_fn
    own._prefix_allowed_tokens_fn = lambda batch_id, tokens: allowed(row, tokens)


ROW_BOUND: dict[str, Callable[[Any, int], None]] = {
    "RepetitionPenaltyLogitsProcessor": _repetition,
    "EncoderRepetitionPenaltyLogitsProcessor": _encoder_repetition,
    "EncoderNoRepeatNGramLogitsProcessor": _encoder_ngrams,
    "PrefixConstrainedLogitsProcessor": _prefix_constrained,
}
"""Those that go by a row's number in the batch, and how a copy of one is made to serve that row."""


class LogitsPipeline:
    """Logits processors in their order, then sampling."""

    def __init__(
        self, sampling: Sampling, processors: Sequence[Any] = (), *, of_draft: bool = False
    ):
        check_pure(processors)
        self.sampling = sampling
        self._drafts = of_draft
        self.processors = tuple(processors)
        self._of_row: dict[tuple[int, int], Any] = {}

    def processed(
        self, logits_BPV: Tensor, prefixes: Prefixes, requests: Sequence[int] | None = None
    ) -> Tensor:
        """The logits behind the processors, before sampling.

        `requests` are the rows' numbers in the batch that decoding began with. Raises UserError
        where no token is left; a draft may then say anything, and keeps its own logits.
        """
        if not self.processors:
            return logits_BPV
        B, P, V = logits_BPV.shape
        # Transformers processes in float32; float64 stays, as everywhere here.
        wide = logits_BPV if logits_BPV.dtype == torch.float64 else logits_BPV.float()
        for processor in self.processors:
            if _name(processor) in PREFIX_FREE:
                flat = processor(_ids([], B * P, wide.device), wide.reshape(B * P, V).clone())
                wide = flat.view(B, P, V)
            else:
                wide = self._by_prefix(processor, wide, prefixes, requests or range(B))
        nothing_BP1 = torch.isneginf(wide).all(-1, keepdim=True)
        if self._drafts:
            return torch.where(nothing_BP1, logits_BPV.to(wide), wide)
        if bool(nothing_BP1.any()):
            names = ", ".join(_name(p) for p in self.processors)
            raise UserError(
                f"the logits processors ({names}) forbid every token at some position, so there is "
                "nothing to choose from; loosen them"
            )
        return wide

    def scores(self, processed_BPV: Tensor) -> Tensor:
        """Scores [B, P, V], whose softmax the tokens are drawn from."""
        return scores(processed_BPV, self.sampling)

    def _by_prefix(
        self, processor: Any, wide_BPV: Tensor, prefixes: Prefixes, requests: Sequence[int]
    ) -> Tensor:
        found = torch.empty_like(wide_BPV)
        for b, request in enumerate(requests):
            own = self._serving(processor, request)
            for p in range(wide_BPV.shape[1]):
                ids = _ids(prefixes(b, p), 1, wide_BPV.device)
                found[b, p] = own(ids, wide_BPV[b, p, None].clone())[0]
        return found

    def _serving(self, processor: Any, row: int) -> Any:
        """The processor for one row of the batch."""
        if _name(processor) not in ROW_BOUND:
            return processor
        key = (id(processor), row)
        if key not in self._of_row:
            self._of_row[key] = copy.copy(processor)
            ROW_BOUND[_name(processor)](self._of_row[key], row)
        return self._of_row[key]

    def of_draft(self, everything: bool, deterministic: bool) -> LogitsPipeline:
        """The logits pipeline for the draft's logits. It changes how much is accepted, never what is emitted.

        The draft goes through those processors that look at the logits alone, or through all.
        """
        chosen = [p for p in self.processors if everything or _name(p) in PREFIX_FREE]
        sampling = Sampling() if deterministic else self.sampling
        return LogitsPipeline(sampling, chosen, of_draft=True)


def check_pure(processors: Sequence[Any]) -> None:
    """Raise UserError naming every processor that is not known to depend on the prefix alone."""
    refused = [
        _name(p)
        for p in processors
        if _name(p) not in PREFIX_PURE and getattr(p, "prefix_pure", False) is not True
    ]
    if refused:
        raise UserError(
            f"logits processor {', '.join(refused)}: not known to depend on the prefix alone, and "
            "one that keeps a state would count tokens that are rejected later; leave it out, or "
            "if it is a pure function of prefix and logits, set prefix_pure = True on it"
        )


def _row(rows: Any, row: int) -> Any:
    """One row of a batch, or the only one there is."""
    return rows[row : row + 1] if len(rows) > 1 else rows


def _name(processor: Any) -> str:
    kind = type(processor)
    inside = kind.__module__.startswith("transformers.")
    return kind.__name__ if inside else f"{kind.__module__}.{kind.__name__}"


def _ids(tokens: list[int], rows: int, device: torch.device) -> Tensor:
    return torch.tensor([tokens] * rows, dtype=torch.long, device=device)
