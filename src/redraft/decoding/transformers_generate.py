"""Speculative decoding inside Transformers: `model.generate(..., custom_generate=redraft.generate(draft))`.

Everything around decoding stays Transformers': generation config, logits processors, stopping
criteria, padding, outputs. The loop is ours (`decoding/speculative.py`): the model's own sampling
distribution, with tokens that are exactly its own in greedy and seeded decoding. What cannot be
decoded exactly is refused with a sentence.

Shapes: B rows, T tokens, P positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor

from ..checkpoints.load import load_draft
from ..config import MeasureConfig
from ..core.console import say
from ..core.errors import UserError
from ..drafts.base import Draft
from ..models.target import Target
from .acceptance_modes import Decoding
from .logits_pipeline import LogitsPipeline
from .sampling import Sampling
from .speculative import Step, speculate

SUPPORTED = 5
"""The major version of Transformers whose `generate` this was written for."""
UNDERSTOOD = {
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "logits_to_keep",
    "cache_position",
    "output_attentions",
    "output_hidden_states",
}
"""Model inputs that `generate` passes on and that decoding here knows how to honour or replace."""


def generate(
    draft: Draft | str,
    *,
    k: int = MeasureConfig.k,
    seed: int | Sequence[int] | None = None,
    streamer: Any = None,
    acceptance: str = "",
    draft_token: str = "",
    processors_on_draft: bool = False,
) -> CustomGenerate:
    """What `model.generate` takes as `custom_generate`, with K drafted tokens per step.

    `draft` is a loaded draft, or a folder or Hub id that is loaded for the model at first use.
    Sampling (`do_sample=True`) is `seeded` unless `acceptance` is `sampled`: with `seed`, row r
    gives what `seed + r` alone gives, whatever the draft, K and batch; a sequence names each row's.
    Without a seed one is drawn from torch's generator, so `torch.manual_seed` decides. A `streamer`
    belongs here, since `generate` does not pass its own on. `processors_on_draft` sends the draft's
    logits through all logits processors too: slower, accepted more often, the same text.

    Raises UserError for another major version of Transformers.
    """
    major = int(transformers.__version__.split(".")[0])
    if major != SUPPORTED:
        raise UserError(
            f"redraft.generate works with Transformers {SUPPORTED}.x, whose `generate` it plugs into; "
            f"installed is {transformers.__version__}. `redraft generate` and "
            "redraft.decoding.speculative work without it"
        )
    return CustomGenerate(draft, k, seed, streamer, acceptance, draft_token, processors_on_draft)


@dataclass(frozen=True)
class CustomGenerate:
    """The callable that `generate` made. `accepted` holds, for each row of the last call, the tokens
    accepted in each step, from which tau follows: 1 + sum / steps."""

    draft: Draft | str
    k: int
    seed: int | Sequence[int] | None
    streamer: Any
    acceptance: str
    draft_token: str
    processors_on_draft: bool
    accepted: list[list[int]] = field(default_factory=list, init=False)
    _pairs: dict[Any, tuple[Target, Draft]] = field(default_factory=dict, init=False, repr=False)

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """As `generate` calls it; the sequences [B, T], or its output class when asked for."""
        config = generation_config
        _check(model, config, model_kwargs)
        target, draft = self._pair(model)
        rows = _rows(input_ids, model_kwargs.get("attention_mask"))
        if self.streamer is not None:
            if len(rows) > 1:
                raise UserError("a streamer takes one sequence; this batch has several")
            self.streamer.put(input_ids.cpu())
        decoding = self._decoding(config)
        logits_pipeline = LogitsPipeline(decoding.sampling, list(logits_processor or ()))
        stop = _Stop(input_ids, stopping_criteria or (), config, target)
        kept = _Kept(config, len(rows))
        self.accepted[:] = [[] for _ in rows]
        for step in speculate(
            target,
            draft,
            [row.tokens for row in rows],
            self.k,
            decoding,
            stop,
            logits_pipeline=logits_pipeline,
            draft_pipeline=logits_pipeline.of_draft(
                self.processors_on_draft, decoding.deterministic
            ),
            seeds=self._seeds(len(rows), decoding),
            padding=[row.padding for row in rows],
        ):
            fresh = kept.take(step)
            for b, request in enumerate(step.requests):
                if step.drafted:
                    self.accepted[request].append(step.accepted[b])
            if self.streamer is not None and fresh:
                self.streamer.put(torch.tensor(fresh))
        if self.streamer is not None:
            self.streamer.end()
        return kept.output(input_ids, config)

    def _pair(self, model: Any) -> tuple[Target, Draft]:
        """The model as a target, and the draft bound to it; made once per model."""
        if model not in self._pairs:
            name = getattr(model, "name_or_path", "") or type(model).__name__
            target = Target(model, None, (name,), freeze=False)
            if isinstance(self.draft, str):
                draft = load_draft(self.draft, target)
            else:
                draft = self.draft
                draft.bind(target)
            self._pairs[model] = (target, draft)
        return self._pairs[model]

    def _decoding(self, config: Any) -> Decoding:
        """Temperature and cuts are among the logits processors; what is left is to sample or not."""
        if not config.do_sample:
            if self.acceptance not in ("", "greedy"):
                raise UserError(
                    f"acceptance mode {self.acceptance} samples, but generate was not asked to sample: pass "
                    "do_sample=True"
                )
            return Decoding("greedy", draft_token=self.draft_token)
        return Decoding(self.acceptance or "seeded", Sampling(1.0), self.draft_token)

    def _seeds(self, rows: int, decoding: Decoding) -> list[int]:
        if decoding.mode == "greedy":
            return [0] * rows
        if self.seed is None:
            return torch.randint(1 << 62, (rows,)).tolist()
        if isinstance(self.seed, int):
            return [self.seed + row for row in range(rows)]
        if len(self.seed) != rows:
            raise UserError(f"{len(self.seed)} seeds for a batch of {rows} rows; give one per row")
        return list(self.seed)


@dataclass(frozen=True)
class _Row:
    padding: list[int]
    tokens: list[int]


def _rows(input_ids: Tensor, mask: Tensor | None) -> list[_Row]:
    """Each prompt apart from the padding on its left."""
    rows = []
    for i, tokens in enumerate(input_ids.tolist()):
        pads = 0 if mask is None else int((mask[i] == 0).sum())
        if mask is not None and not bool((mask[i, pads:] != 0).all()):
            raise UserError(
                f"row {i} of attention_mask hides tokens that are not padding on the left; pad with "
                "tokenizer.padding_side = 'left'"
            )
        rows.append(_Row(tokens[:pads], tokens[pads:]))
    return rows


class _Stop:
    """Where each answer ends, by the stopping criteria that `generate` prepared.

    Every criterion is asked once for every token, in order and with that token's own prefix, as
    in a loop of one token at a time.
    """

    def __init__(self, input_ids: Tensor, criteria: Any, config: Any, target: Target):
        self.prompts = input_ids
        self.others = []
        eos = config.eos_token_id
        self.eos = set() if eos is None else set(eos) if isinstance(eos, list) else {eos}
        longest = config.max_length or 1 << 30
        for criterion in criteria:
            if type(criterion).__name__ == "MaxLengthCriteria":
                longest = min(longest, criterion.max_length)
            elif type(criterion).__name__ != "EosTokenCriteria":
                self.others.append(criterion)
        if target.max_positions < longest < 1 << 30:
            say(f"max_length {longest} is past the context: answers end at {target.max_positions}")
        self.space = min(longest, target.max_positions) - input_ids.shape[1]

    def __call__(self, request: int, tokens: list[int], new: int) -> int | None:
        for length in range(len(tokens) - new + 1, len(tokens) + 1):
            if tokens[length - 1] in self.eos or length >= self.space:
                return length
            if self.others and self._says(request, tokens[:length]):
                return length
        return None

    def _says(self, request: int, tokens: list[int]) -> bool:
        prefix = torch.cat([self.prompts[request], self.prompts.new_tensor(tokens)])[None]
        return any(bool(torch.as_tensor(c(prefix, None)).any()) for c in self.others)


class _Kept:
    """What is returned: the answers, and where asked for the logits of each of their tokens."""

    def __init__(self, config: Any, rows: int):
        dictionary = config.return_dict_in_generate
        self.answers: list[list[int]] = [[] for _ in range(rows)]
        self.scores: list[list[Tensor]] | None = (
            [[] for _ in range(rows)] if dictionary and config.output_scores else None
        )
        self.logits: list[list[Tensor]] | None = (
            [[] for _ in range(rows)] if dictionary and config.output_logits else None
        )

    def take(self, step: Step) -> list[int]:
        """Add a step's tokens; returns the last row's, as far as its answer goes."""
        fresh: list[int] = []
        for b, request in enumerate(step.requests):
            answer, length = self.answers[request], step.lengths[b]
            space = len(step.tokens[b]) if length is None else length - len(answer)
            fresh = step.tokens[b][:space]
            answer += fresh
            for kept, of_BPV in (
                (self.scores, step.processed_BJV),
                (self.logits, step.logits_BJV),
            ):
                if kept is not None:
                    kept[request] += [row.float().clone() for row in of_BPV[b, : len(fresh)]]
        return fresh

    def output(self, input_ids: Tensor, config: Any) -> Any:
        """Rows that ended earlier are filled with padding, and their logits with zeros."""
        eos = config.eos_token_id
        filler = config.pad_token_id
        if filler is None:
            filler = 0 if eos is None else eos[0] if isinstance(eos, list) else eos
        longest = max(map(len, self.answers))
        answers = [[*row, *[filler] * (longest - len(row))] for row in self.answers]
        sequences = torch.cat([input_ids, input_ids.new_tensor(answers)], dim=1)
        if not config.return_dict_in_generate:
            return sequences
        from transformers.generation import GenerateDecoderOnlyOutput

        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=_by_position(self.scores, longest),
            logits=_by_position(self.logits, longest),
        )


def _by_position(kept: list[list[Tensor]] | None, longest: int) -> tuple[Tensor, ...] | None:
    """A tensor [B, V] for each of the answers' positions."""
    if kept is None:
        return None
    empty = torch.zeros_like(kept[0][0])
    return tuple(
        torch.stack([row[at] if at < len(row) else empty for row in kept]) for at in range(longest)
    )


def _check(model: Any, config: Any, model_kwargs: dict[str, Any]) -> None:
    """Raise UserError, with all reasons at once, for what cannot be decoded exactly here."""
    cache = model_kwargs.get("past_key_values")
    inner = config.output_attentions or config.output_hidden_states
    given = [
        name
        for name, value in model_kwargs.items()
        if name not in UNDERSTOOD and value is not None and value is not False
    ]
    reasons = {
        "the model is an encoder-decoder": model.config.is_encoder_decoder,
        "the model is in training mode, with dropout: call model.eval()": model.training,
        f"num_beams={config.num_beams} searches": (config.num_beams or 1) > 1,
        "cache_implementation='quantized' cannot be rolled back exactly": (
            config.cache_implementation == "quantized"
        ),
        "past_key_values holds tokens already, and decoding begins with a cache of its own": (
            cache is not None and cache.get_seq_length() > 0
        ),
        "output_attentions and output_hidden_states are not kept": (
            config.return_dict_in_generate and inner
        ),
        f"model inputs {', '.join(given)} are not understood": given,
    }
    if found := [reason for reason, holds in reasons.items() if holds]:
        raise UserError(f"redraft.generate cannot decode this call: {'; '.join(found)}")
    if config.cache_implementation not in (None, "dynamic", "dynamic_full"):
        say(f"cache_implementation={config.cache_implementation}: a full-length cache, as exact")
