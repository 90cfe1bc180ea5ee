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

import contextlib
import copy
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...core.errors import UserError, as_sentence
from ...core.rng import seeded
from ...models.kv_cache import Rows
from ...models.target import Target
from ..base import MOST_PADDING, Draft, token_count
from ..layers import ACTIVATIONS, GatedFFN

LAYERS = 2
"""Decoder layers of a token LM that is made for a target."""
ATTENTION = {"full_attention", "sliding_attention"}
FFN = ("gate_proj", "up_proj", "down_proj")


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
        if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
            raise UserError(
                f"config.json: model_type '{model_type}' is none that Transformers knows without "
                "remote code"
            )
        with as_sentence(f"config.json of a {model_type} model"):
            return CONFIG_MAPPING[model_type].from_dict(self.json())

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
        self.aux_layers = ()
        self.feature_size = 0
        self.hidden_size = config.hidden_size
        self.vocab_size = self.rows = config.vocab_size
        self.register_buffer("draft_vocab", None, persistent=False)
        lm = new_lm(config, filled=False)
        use_gated_ffns(lm, config.intermediate_size)
        # The LM's children become the draft's own, so that tensors have their stored names.
        self.body_name: str = lm.base_model_prefix
        self.add_module(self.body_name, lm.base_model)
        name = _head_name(lm)
        self.head_name = None if is_tied(lm) else name
        if self.head_name is not None:
            self.add_module(self.head_name, lm.get_output_embeddings())
        _check_head(self, lm)
        self.eval()

    @classmethod
    def for_target(
        cls,
        target: Target,
        *,
        width: int | None = None,
        draft_vocab: Tensor | None = None,
        aux_layers: tuple[int, ...] | None = None,
    ) -> TokenLMDraft:
        """A small LM of the target's own architecture, half as wide, not yet bound.

        Raises UserError for aux layers or a draft vocabulary: this kind has neither.
        """
        if aux_layers is not None or draft_vocab is not None:
            raise UserError(
                f"a {cls.kind} draft reads tokens only and speaks its whole vocabulary: --aux-layers and "
                "--draft-vocab belong to --kind eagle3"
            )
        config = target.model.config.get_text_config()
        with as_sentence(
            f"no small {config.model_type} model can be made for target {target.name}; name a small "
            "LM with its tokenizer as --draft instead"
        ):
            draft = cls(_small(config, width))
        draft.reinitialise(0)
        return draft

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

    def extend(
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

    def step(self, cache: Cache, token_B1: Tensor, state_B1H: Tensor) -> Tensor:
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
        in_vocab = token_count(target)
        if min(in_vocab, V) > D or abs(D - V) > MOST_PADDING:
            raise UserError(
                f"vocabularies differ: target {target.name} has {V} rows"
                f"{f' for {in_vocab} tokens' if in_vocab else ''}, this token_lm draft has {D}, and that "
                "is more than padding; a draft needs the target's own tokenizer"
            )
        named = getattr(self.config.of_transformers, "max_position_embeddings", None)
        context = named or target.max_positions
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

    def reinitialise(self, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            begun = dict(new_lm(self.config).named_parameters())
        for name, parameter in self.named_parameters():
            with torch.no_grad():
                if parameter.dim() == 1:  # norms and biases begin where their architecture has them
                    parameter.copy_(begun[name])
                else:
                    noise = torch.randn(parameter.shape, generator=seeded(seed, "init", name))
                    parameter.copy_(noise * parameter[0].numel() ** -0.5)

    def _apply(self, fn: Any, recurse: bool = True) -> TokenLMDraft:
        """Cast the weights; what else an LM holds (rotary frequencies, the scale of its embedding) is
        as in a model made in that dtype, which may be more exact than a cast."""
        before = self._beside_weights()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        after = self._beside_weights()
        if any(after[name].dtype != buffer.dtype for name, buffer in before.items()):
            dtype = self.body.get_input_embeddings().weight.dtype
            made = dict(new_lm(self.config, filled=False, dtype=dtype).named_buffers())
            for name, buffer in after.items():
                home, _, attribute = name.rpartition(".")
                setattr(self.get_submodule(home), attribute, made[name].to(buffer.device))
        return self

    def _beside_weights(self) -> dict[str, Tensor]:
        """Floating buffers that no checkpoint holds, by name."""
        stored = self.state_dict()
        return {
            name: buffer
            for name, buffer in self.named_buffers()
            if buffer.is_floating_point() and name not in stored
        }


def new_lm(
    config: TokenLMConfig, *, filled: bool = True, dtype: torch.dtype = torch.float32
) -> Any:
    """The Transformers model of a config, with fresh weights or (much faster) with none.

    Raises UserError for a model that is no plain causal LM with an attention cache.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    theirs = config.of_transformers
    name = theirs.model_type
    if theirs.get_text_config() is not theirs:
        raise UserError(
            f"a {name} model reads more than text; a token_lm draft is a plain causal LM"
        )
    unknown = set(getattr(theirs, "layer_types", None) or ()) - ATTENTION
    with (
        as_sentence(f"config.json of a {name} model"),
        contextlib.nullcontext() if filled else no_init_weights(),
    ):
        lm: Any = AutoModelForCausalLM.from_config(theirs, dtype=dtype, trust_remote_code=False)
    if unknown or getattr(lm, "_is_stateful", False):
        what = f"layers of kind {', '.join(sorted(unknown))}" if unknown else "a recurrent state"
        raise UserError(
            f"a {name} model has {what}, which cannot be rolled back after a rejected token; a "
            "token_lm draft needs full or sliding attention"
        )
    lm.tie_weights()
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


def use_gated_ffns(lm: Any, width: int) -> None:
    """Replace gated FFNs by `GatedFFN` with the same tensors, in place, where that computes the same.

    All or none: an expert goes to every layer, and config.json has one width.
    """
    ffns = {name: module for name, module in lm.named_modules() if name.endswith(".mlp")}
    gated = {name: made for name, module in ffns.items() if (made := _gated(module, width))}
    if len(gated) != lm.config.num_hidden_layers or len({type(m) for m in ffns.values()}) != 1:
        return
    name, made = next(iter(gated.items()))
    x = torch.randn(1, made.gate_proj.in_features, generator=seeded(0, "gated"))
    with torch.no_grad():
        for weight in made.parameters():
            weight.copy_(torch.randn(weight.shape, generator=seeded(0, "gated", "weights")))
        if not torch.allclose(made(x), ffns[name](x), rtol=1e-4, atol=1e-4):
            return
    for name, made in gated.items():
        parent, _, attribute = name.rpartition(".")
        setattr(lm.get_submodule(parent), attribute, made)


def _gated(module: nn.Module, width: int) -> GatedFFN | None:
    """A `GatedFFN` of an FFN's own parts, if it has just those."""
    from transformers.activations import ACT2FN

    parts = [getattr(module, name, None) for name in FFN]
    linears: list[Any] = [p for p in parts if isinstance(p, nn.Linear) and p.bias is None]
    act = getattr(module, "act_fn", None)
    names = [name for name in ACTIVATIONS if type(ACT2FN[name]) is type(act)]
    if len(linears) != len(list(module.parameters())) or len(linears) != len(FFN) or not names:
        return None
    if linears[0].out_features != width:
        return None
    made = GatedFFN(1, 1, names[0])
    made.gate_proj, made.up_proj, made.down_proj = linears
    return made


def _head_name(lm: Any) -> str:
    """The attribute of the LM that is its head. Raises UserError where there is none to take."""
    head = lm.get_output_embeddings()
    name = "" if head is None else _name_of(lm, head)
    others = {child for child, _ in lm.named_children()} - {lm.base_model_prefix, name}
    if lm.base_model is lm or not name or "." in name or others:
        raise UserError(
            f"{type(lm).__name__} is not a body and a head ({', '.join(sorted(others)) or 'no head'} "
            "next to them), so it cannot be a token_lm draft"
        )
    return name


def _name_of(lm: Any, module: nn.Module) -> str:
    names: dict[int, str] = {id(other): name for name, other in lm.named_modules()}
    return names[id(module)]


@torch.no_grad()
def _check_head(draft: TokenLMDraft, lm: Any) -> None:
    """Refuse an LM whose logits are another function of its states than `TokenLMDraft.logits`.

    Tried on weights and states large enough that a scale or a cap shows.
    """
    head = lm.get_output_embeddings()
    rows, H = head.weight.shape
    row = torch.randn(H, generator=seeded(0, "head", "row"))
    torch.mul(torch.linspace(-1, 1, rows)[:, None], row, out=head.weight)
    if head.bias is not None:
        head.bias.zero_()
    states = 4 * torch.randn(1, 3, H, generator=seeded(0, "head", "states"))

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
