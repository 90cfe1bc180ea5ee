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

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...core.errors import UserError, as_sentence
from ...core.rng import seeded
from ...models.kv_cache import Rows
from ...models.target import Target
from ..base import MOST_PADDING, Draft, token_count
from .lm import TokenLMConfig, head_name, is_tied, new_lm, shaped, small_config, use_gated_ffns


class Cache:
    """The LM's own cache, and how many of each row's tokens are drafted ones."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.drafted = 0


class TokenLMDraft(Draft):
    """A causal LM as a draft; bound to a target, it proposes the tokens that both have."""

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
        name = head_name(lm)
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
    ) -> TokenLMDraft:
        """A small LM of the target's own architecture, half as wide, not yet bound."""
        config = target.model.config.get_text_config()
        with as_sentence(
            f"no small {config.model_type} model can be made for target {target.name}; name a small "
            "LM with its tokenizer as --draft instead"
        ):
            draft = cls(small_config(config, width))
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
        before = self._own_weights()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        after = self._own_weights()
        if any(after[name].dtype != buffer.dtype for name, buffer in before.items()):
            dtype = self.body.get_input_embeddings().weight.dtype
            made = dict(new_lm(self.config, filled=False, dtype=dtype).named_buffers())
            for name, buffer in after.items():
                home, _, attribute = name.rpartition(".")
                setattr(self.get_submodule(home), attribute, made[name].to(buffer.device))
        return self

    def _own_weights(self) -> dict[str, Tensor]:
        """Floating buffers that no checkpoint holds, by name."""
        stored = self.state_dict()
        return {
            name: buffer
            for name, buffer in self.named_buffers()
            if buffer.is_floating_point() and name not in stored
        }


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
