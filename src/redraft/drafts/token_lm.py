"""The token LM: a small causal LM with the target's tokenizer, used as a draft.

    h = body(t_0 .. t_T-1)            final-normed states of any causal LM that Transformers knows
    logits of t_{i+2} = head(h_{i+1})

It reads tokens and nothing of the target's, so a chain has no states of its own to continue on: the
state after the pair (position i, token i+1) is the LM's state at position i+1, whoever proposed the
token. Tensor names are those of the LM's own checkpoint; a head tied to the embedding is stored once.

Vocabularies of one tokenizer are often padded to different sizes. Rows that the target does not have
are cut off, and rows that the draft does not have are impossible.

Shapes: B batch, T tokens, H hidden, D rows of the LM's head, V target vocabulary.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from ..errors import UserError
from ..model_cache import Rows
from ..rng import seeded
from ..target import Target
from .base import Draft
from .layers import ACTIVATIONS, GatedFFN

MOST_PADDING = 1024
"""Two vocabularies that differ by more rows than this differ by more than padding."""
LAYERS = 2
"""Decoder layers of a token LM that is made for a target."""
ATTENTION = {"full_attention", "sliding_attention"}
FFN = ("gate_proj", "up_proj", "down_proj")
REFUSALS = (ValueError, TypeError, KeyError, AttributeError, RuntimeError, StrictDataclassError)
"""How Transformers says that it cannot make a model of a config."""


@dataclass(frozen=True)
class TokenLMConfig:
    """The LM's config.json, but for the width of its FFN, which an expert changes."""

    raw: Mapping[str, Any]
    intermediate_size: int

    @cached_property
    def of_transformers(self) -> Any:
        """The same as Transformers' own config. Raises UserError for what that does not take."""
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        model_type = self.raw.get("model_type")
        if model_type not in CONFIG_MAPPING:
            raise UserError(
                f"config.json: model_type '{model_type}' is none that Transformers knows without "
                "remote code"
            )
        try:
            return CONFIG_MAPPING[model_type].from_dict(self.json())
        except REFUSALS as problem:
            raise UserError(f"config.json of a {model_type} model: {problem}") from None

    def json(self) -> dict[str, Any]:
        """The whole config.json."""
        return {**self.raw, "intermediate_size": self.intermediate_size}

    @property
    def hidden_size(self) -> int:
        return int(self.of_transformers.hidden_size)

    @property
    def vocab_size(self) -> int:
        return int(self.of_transformers.vocab_size)

    @property
    def num_attention_heads(self) -> int:
        return int(self.of_transformers.num_attention_heads)

    @property
    def num_key_value_heads(self) -> int:
        own = getattr(self.of_transformers, "num_key_value_heads", None)
        return int(own or self.num_attention_heads)

    @property
    def num_hidden_layers(self) -> int:
        return int(self.of_transformers.num_hidden_layers)


class Cache:
    """The LM's own cache, and how many of each row's tokens are drafted ones."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.drafted = 0


class TokenLMDraft(Draft):
    """A causal LM as a draft; bound to a target, it speaks as much of the vocabulary as both have."""

    kind: ClassVar[str] = "token_lm"
    feeds_back: ClassVar[bool] = False

    def __init__(self, config: TokenLMConfig):
        super().__init__()
        self.config = config
        self.taps = ()
        self.feature_size = 0
        self.hidden_size = config.hidden_size
        self.vocab_size = self.rows = config.vocab_size
        self.register_buffer("draft_vocab", None, persistent=False)
        with torch.random.fork_rng(devices=[]):
            lm = new_lm(config)
        widen_by_hand(lm, config.intermediate_size)
        # The LM's children become the draft's own, so that tensors have their stored names.
        self.body_name: str = lm.base_model_prefix
        self.add_module(self.body_name, lm.base_model)
        name = _head_name(lm)
        self.head_name = None if is_tied(lm) else name
        if self.head_name is not None:
            self.add_module(self.head_name, lm.get_output_embeddings())
        _check_head(self, lm)
        vectors = {n: p.detach() for n, p in self.named_parameters() if p.dim() == 1}
        self.starts = {name: float(vector[0]) for name, vector in vectors.items()}
        self.eval()

    @classmethod
    def for_target(
        cls,
        target: Target,
        *,
        width: int | None = None,
        draft_vocab: Tensor | None = None,
        taps: tuple[int, ...] | None = None,
    ) -> TokenLMDraft:
        """A small LM of the target's own architecture, half as wide, not yet bound.

        Raises UserError for taps or a draft vocabulary: this kind has neither.
        """
        if taps is not None or draft_vocab is not None:
            raise UserError(
                f"a {cls.kind} draft reads tokens only and speaks its whole vocabulary: --taps and "
                "--draft-vocab belong to --kind eagle3"
            )
        config = target.model.config.get_text_config()
        try:
            return cls(_small(config, width))
        except REFUSALS as problem:
            raise UserError(
                f"no small {config.model_type} model can be made for target {target.name} "
                f"({problem}); name a small LM with its tokenizer as --draft instead"
            ) from None

    # -- the LM ---------------------------------------------------------------------------------

    @property
    def body(self) -> Any:
        return getattr(self, self.body_name)

    def _states(self, tokens_BT: Tensor, rows: Rows | None = None) -> Tensor:
        """Final-normed states [B, T, H] of tokens that follow what `rows` hold."""
        # A token that only the target's vocabulary has is read as the last one of the draft's.
        known = tokens_BT if self.draft_vocab is None else tokens_BT.clamp(max=self.rows - 1)
        placed = {} if rows is None else rows.place(tokens_BT.shape[1])
        out = self.body(
            input_ids=known,
            past_key_values=None if rows is None else rows.layers,
            use_cache=rows is not None,
            **placed,
        )
        states: Tensor = out.last_hidden_state
        return states

    def logits(self, states: Tensor) -> Tensor:
        if self.head_name is None:
            out = nn.functional.linear(states, self.body.get_input_embeddings().weight)
        else:
            out = getattr(self, self.head_name)(states)
        return shaped(self.config.of_transformers, out[..., : self.vocab_size])

    def rollout(
        self, tokens_BT: Tensor, features_BTF: Tensor, first: int, steps: int
    ) -> Iterator[Tensor]:
        T = tokens_BT.shape[1]
        if T - 2 - first <= 0:
            return
        states = self._states(tokens_BT[:, : T - 1])
        for step in range(min(steps, T - 2 - first)):
            yield states[:, first + 1 + step :]

    def new_cache(self, first_B: Tensor) -> Cache:
        cache = Cache(Rows(self.body, len(first_B), f"the draft {self.source or 'LM'}"))
        self._read(cache, first_B[:, None], [1] * len(first_B))
        return cache

    def absorb(
        self,
        cache: Cache,
        tokens_BT: Tensor,
        features_BTF: Tensor,
        counts: Sequence[int] | None = None,
    ) -> Tensor:
        B, T = tokens_BT.shape
        cache.rows.roll_back([cache.drafted] * B)
        cache.drafted = 0
        return self._read(cache, tokens_BT, counts or [T] * B)

    def advance(self, cache: Cache, token_B1: Tensor, state_B1H: Tensor) -> Tensor:
        cache.drafted += 1
        return self._read(cache, token_B1, [1] * len(token_B1))

    def keep_rows(self, cache: Cache, rows: Sequence[int]) -> None:
        cache.rows.keep_rows(rows)

    def _read(self, cache: Cache, tokens_BT: Tensor, counts: Sequence[int]) -> Tensor:
        """Read the first `counts` tokens of each row; the state [B, 1, H] after its last one."""
        states = self._states(tokens_BT, cache.rows)
        cache.rows.grow(counts)
        if min(counts) == max(counts):
            return states[:, counts[0] - 1 : counts[0]]
        last_B = torch.tensor(list(counts), device=states.device) - 1
        return states[torch.arange(len(last_B), device=states.device), last_B][:, None]

    # -- ownership ------------------------------------------------------------------------------

    def bind(self, target: Target) -> None:
        D, V = self.rows, target.vocab_size
        spoken = 0 if target.tokenizer is None else max(target.tokenizer.get_vocab().values()) + 1
        if min(spoken, V) > D or abs(D - V) > MOST_PADDING:
            raise UserError(
                f"vocabularies differ: target {target.name} has {V} rows"
                f"{f' for {spoken} tokens' if spoken else ''}, this token_lm draft has {D}, and that "
                "is more than padding; a draft needs the target's own tokenizer"
            )
        context = getattr(
            self.config.of_transformers, "max_position_embeddings", target.max_positions
        )
        if context < target.max_positions and self._learns_positions():
            raise UserError(
                f"this token_lm draft has learned positions for {context} tokens and cannot read the "
                f"{target.max_positions} of target {target.name}'s context"
            )
        self.vocab_size = V
        self.draft_vocab = torch.arange(D) if D < V else None
        self.to(target.device)

    def _learns_positions(self) -> bool:
        tables = [m for m in self.body.modules() if isinstance(m, nn.Embedding)]
        return any(table is not self.body.get_input_embeddings() for table in tables)

    def trainable_names(self) -> list[str]:
        return [name for name, _ in self.named_parameters()]

    def reinitialise(self, seed: int) -> None:
        for name, parameter in self.named_parameters():
            with torch.no_grad():
                if parameter.dim() == 1:  # norms and biases begin where their architecture has them
                    parameter.fill_(self.starts[name])
                else:
                    noise = torch.randn(parameter.shape, generator=seeded(seed, "init", name))
                    parameter.copy_(noise * parameter[0].numel() ** -0.5)

    def stored_state(self) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in self.state_dict().items()}

    def _apply(self, fn: Any, recurse: bool = True) -> TokenLMDraft:
        """Cast weights only: rotary frequencies stay as exact as they were made, as engines do."""
        stored = set(self.state_dict())
        exact = [
            (module, name, buffer)
            for path, module in self.named_modules()
            for name, buffer in module.named_buffers(recurse=False)
            if buffer.is_floating_point() and (f"{path}.{name}" if path else name) not in stored
        ]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for module, name, buffer in exact:
            setattr(module, name, buffer.to(getattr(module, name).device))
        return self


def new_lm(config: TokenLMConfig) -> Any:
    """The Transformers model of a config, with fresh weights in float32.

    Raises UserError for a model that is no plain causal LM with an attention cache.
    """
    from transformers import AutoModelForCausalLM

    theirs = config.of_transformers
    name = theirs.model_type
    if theirs.get_text_config() is not theirs:
        raise UserError(
            f"a {name} model reads more than text; a token_lm draft is a plain causal LM"
        )
    unknown = set(getattr(theirs, "layer_types", None) or ()) - ATTENTION
    try:
        lm: Any = AutoModelForCausalLM.from_config(theirs, dtype=torch.float32)
    except REFUSALS as problem:
        raise UserError(f"config.json of a {name} model: {problem}") from None
    if unknown or getattr(lm, "_is_stateful", False):
        what = f"layers of kind {', '.join(sorted(unknown))}" if unknown else "a recurrent state"
        raise UserError(
            f"a {name} model has {what}, which cannot be rolled back after a rejected token; a "
            "token_lm draft needs full or sliding attention"
        )
    lm.eval()
    return lm


@dataclass(frozen=True)
class Skeleton:
    """What a config says of the LM's checkpoint: tensors by name, those with a row per token, and
    patterns of names that old checkpoints hold and nobody reads."""

    shapes: dict[str, tuple[int, ...]]
    vocabulary: tuple[str, ...]
    tied: str | None
    ignored: tuple[str, ...]


def skeleton(config: TokenLMConfig) -> Skeleton:
    """Found without making a tensor. `tied` is the head's name where it is stored as the embedding."""
    with torch.device("meta"):
        lm = new_lm(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in lm.state_dict().items()}
    head = f"{_head_name(lm)}.weight"
    tied = head if is_tied(lm) else None
    if tied:
        del shapes[head]
    embedding = _name_of(lm, lm.get_input_embeddings())
    rows = [f"{embedding}.weight", head, head.replace(".weight", ".bias")]
    return Skeleton(
        shapes,
        tuple(name for name in rows if name in shapes),
        tied,
        tuple(getattr(lm, "_keys_to_ignore_on_load_unexpected", None) or ()),
    )


def is_tied(lm: Any) -> bool:
    """Whether the LM's head is its embedding."""
    head, embedding = lm.get_output_embeddings(), lm.get_input_embeddings()
    return head is not None and head.weight is embedding.weight and head.bias is None


def shaped(config: Any, logits: Tensor) -> Tensor:
    """What an architecture does to its head's output: a scale, a soft cap."""
    scale, divisor = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
    cap = getattr(config, "final_logit_softcapping", None)
    if scale is not None:
        logits = logits * scale
    if divisor is not None:
        logits = logits / divisor
    return logits if cap is None else torch.tanh(logits / cap) * cap


def widen_by_hand(lm: Any, width: int) -> None:
    """Replace gated FFNs by `GatedFFN` with the same tensors, in place, where that computes the same.

    All or none: an expert goes to every layer, and config.json has one width.
    """
    gated = {
        name: made
        for name, module in lm.named_modules()
        if name.endswith(".mlp") and (made := _gated(module, width)) is not None
    }
    if len(gated) != lm.config.num_hidden_layers:
        return
    for name, made in gated.items():
        parent, _, attribute = name.rpartition(".")
        setattr(lm.get_submodule(parent), attribute, made)


def _gated(module: nn.Module, width: int) -> GatedFFN | None:
    """The same FFN as a `GatedFFN`, if it is one: tried on one input."""
    from transformers.activations import ACT2FN

    parts = [getattr(module, name, None) for name in FFN]
    if not all(isinstance(p, nn.Linear) and p.bias is None for p in parts):
        return None
    act = getattr(module, "act_fn", None)
    names = [name for name in ACTIVATIONS if type(ACT2FN[name]) is type(act)]
    if not names or parts[0].out_features != width or len(list(module.parameters())) != len(FFN):  # type: ignore[union-attr]
        return None
    made = GatedFFN(1, 1, names[0])
    made.gate_proj, made.up_proj, made.down_proj = parts  # type: ignore[assignment]
    weight = made.gate_proj.weight
    if weight.is_meta:
        return None
    x = torch.randn(1, weight.shape[1], generator=seeded(0, "gated")).to(weight)
    with torch.no_grad():
        return made if torch.allclose(made(x), module(x), rtol=1e-4, atol=1e-6) else None


def _head_name(lm: Any) -> str:
    """The attribute of the LM that is its head. Raises UserError where there is none to take."""
    head = lm.get_output_embeddings()
    name = "" if head is None else _name_of(lm, head)
    others = {child for child, _ in lm.named_children()} - {lm.base_model_prefix, name}
    if lm.base_model is lm or not name or "." in name or others:
        raise UserError(
            f"{type(lm).__name__} is not a body and a head ({', '.join(sorted(others)) or 'no head'} "
            "beside them), so it cannot be a token_lm draft"
        )
    return name


def _name_of(lm: Any, module: nn.Module) -> str:
    names: dict[int, str] = {id(other): name for name, other in lm.named_modules()}
    return names[id(module)]


@torch.no_grad()
def _check_head(draft: TokenLMDraft, lm: Any) -> None:
    """Refuse an LM whose logits are another function of its states than `TokenLMDraft.logits`.

    Tried on states large enough that a scale or a cap shows.
    """
    states = torch.randn(1, 3, draft.hidden_size, generator=seeded(0, "head"))
    states = states * 20 / draft.logits(states).std().clamp(min=1e-3)

    def replaced(module: nn.Module, inputs: Any, output: Any) -> Any:
        output.last_hidden_state = states
        return output

    hook = lm.base_model.register_forward_hook(replaced)
    try:
        theirs = lm(input_ids=torch.zeros(1, 3, dtype=torch.long), use_cache=False).logits
    finally:
        hook.remove()
    ours = draft.logits(states)
    if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-4, atol=1e-3):
        raise UserError(
            f"{type(lm).__name__} does more to its head's output than redraft knows (a scale, a soft "
            "cap), so it cannot be a token_lm draft"
        )


def _small(config: Any, width: int | None) -> TokenLMConfig:
    """The config of a small LM of the same architecture and vocabulary."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    small = copy.deepcopy(config)
    hidden, heads = config.hidden_size, config.num_attention_heads
    size = getattr(config, "head_dim", None) or hidden // heads
    layers = min(LAYERS, config.num_hidden_layers)
    small.num_attention_heads = max(heads // 2, 1)
    small.hidden_size = max(round(hidden / 2 / size), 1) * size
    if not hasattr(config, "head_dim"):
        small.hidden_size = small.num_attention_heads * size
    if (groups := getattr(config, "num_key_value_heads", None)) is not None:
        small.num_key_value_heads = math.gcd(groups, small.num_attention_heads)
    ffn = getattr(config, "intermediate_size", None) or 4 * hidden
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == config.num_hidden_layers:
            setattr(small, name, value[:layers])
    small.num_hidden_layers = layers
    small.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)]
    raw = json.loads(small.to_json_string())
    for key in ("quantization_config", "dtype", "torch_dtype", "intermediate_size"):
        raw.pop(key, None)
    return TokenLMConfig(raw, width or max(ffn * small.hidden_size // hidden, 1))
