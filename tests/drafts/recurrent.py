"""A toy kind of draft, in one file: an FFN that carries the state on, without attention.

    x = fc([E[t+1]; s]),  s' = x + mlp(norm(x)),  s = the target's last hidden state or the own one
    logits = the target's lm_head(s')

It is what `docs/add-a-draft.md` builds, block by block.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from redraft.core.config_values import architectures_of
from redraft.core.errors import UserError
from redraft.drafts.base import Draft
from redraft.drafts.kind import Config, DraftKind, Files, Layout, Named, Shapes, Tensors
from redraft.drafts.layers import GatedFFN, RMSNorm
from redraft.drafts.stored.layer import check_tensors, config_values
from redraft.drafts.stored.rows import rows_in_words, with_embedding_rows
from redraft.drafts.stored.second_reading import (
    IDS,
    STEPS,
    TOKENS,
    apart,
    random,
    random_tokens,
    target_head,
)
from redraft.models.target import Target

# -- 1. the network ------------------------------------------------------------------------------


@dataclass(frozen=True)
class RecurrentConfig:
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    num_attention_heads: int = 0  # it has none, so any number of ranks divides them
    num_key_value_heads: int = 0


class RecurrentDraft(Draft):
    kind: ClassVar[str] = "recurrent"
    embedding_VH: Tensor
    head: nn.Module

    def __init__(self, config: RecurrentConfig):
        super().__init__()
        H = config.hidden_size
        self.config, self.vocab_size, self.draft_vocab = config, config.vocab_size, None
        self.hidden_size, self.feature_size, self.aux_layers = H, H, ()
        self.fc = nn.Linear(2 * H, H, bias=False)
        self.norm = RMSNorm(H, 1e-6)
        self.mlp = GatedFFN(H, config.intermediate_size, "silu")

    def _next(self, tokens_BT: Tensor, states_BTH: Tensor) -> Tensor:
        embedded = nn.functional.embedding(tokens_BT, self.embedding_VH)
        x = self.fc(torch.cat([embedded, states_BTH], dim=-1).to(self.fc.weight.dtype))
        out: Tensor = x + self.mlp(self.norm(x))
        return out

    def rollout(
        self, tokens_BT: Tensor, features_BTF: Tensor, first: int, steps: int
    ) -> Iterator[Tensor]:
        T = tokens_BT.shape[1]
        states = features_BTF[:, first : T - 1]
        for step in range(min(steps, T - 2 - first)):
            states = self._next(tokens_BT[:, first + 1 + step : T - 1], states[:, :-1])
            yield states

    def logits(self, states: Tensor) -> Tensor:
        out: Tensor = self.head(states.to(next(self.head.parameters()).dtype))
        return out

    def new_cache(self, first_B: Tensor) -> None:
        return None  # the state is all that it remembers

    def extend(
        self,
        cache: None,
        tokens_BT: Tensor,
        features_BTF: Tensor,
        counts: Sequence[int] | None = None,
    ) -> Tensor:
        B, T = tokens_BT.shape
        last_B = torch.tensor(counts or [T] * B, device=tokens_BT.device) - 1
        return self._next(tokens_BT, features_BTF)[torch.arange(B), last_B][:, None]

    def step(self, cache: None, token_B1: Tensor, state_B1H: Tensor) -> Tensor:
        return self._next(token_B1, state_B1H)

    def keep_rows(self, cache: None, rows: Sequence[int]) -> None:
        pass

    def bind(self, target: Target) -> None:
        own, theirs = (
            (self.hidden_size, self.vocab_size),
            (target.hidden_size, target.vocab_size),
        )
        if own != theirs:
            raise UserError(
                f"a {self.kind} draft of hidden size and vocabulary {own} does not fit target "
                f"{target.name}, which has {theirs}"
            )
        self.aux_layers = (target.num_layers,)
        # What is the target's stays out of the module tree: it is neither stored nor trained.
        object.__setattr__(self, "embedding_VH", target.embedding_VH.detach())
        object.__setattr__(self, "head", target.head)
        self.to(target.device)


def new(target: Target, *, width: int | None = None) -> RecurrentDraft:
    H = target.hidden_size
    return RecurrentDraft(RecurrentConfig(H, width or 2 * H, target.vocab_size))


# -- 2. the files --------------------------------------------------------------------------------

ARCHITECTURE = "RecurrentDraft"


def recognise(raw: Config, tensors: Tensors, where: Path) -> bool:
    return architectures_of(raw) == (ARCHITECTURE,)


def parse(raw: Config, tensors: Tensors, where: Path) -> Named:
    sizes = ("hidden_size", "intermediate_size", "vocab_size")
    values = config_values(raw, where)
    config = RecurrentConfig(*(values.positive(size) for size in sizes))
    check_tensors(tensors, *shapes(config), str(where))
    return config, dict(tensors)


def shapes(c: RecurrentConfig) -> tuple[Shapes, Shapes]:
    H, W = c.hidden_size, c.intermediate_size
    required: Shapes = {
        "fc.weight": (H, 2 * H),
        "norm.weight": (H,),
        "mlp.gate_proj.weight": (W, H),
        "mlp.up_proj.weight": (W, H),
        "mlp.down_proj.weight": (H, W),
    }
    return required, {}


def build(config: RecurrentConfig, tensors: Tensors, dtype: torch.dtype) -> RecurrentDraft:
    draft = RecurrentDraft(config).to(dtype)
    draft.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()})
    return draft.eval().requires_grad_(False)


def lay_out(config: RecurrentConfig, tensors: dict[str, Tensor], target: str) -> Files:
    return {"architectures": [ARCHITECTURE], **asdict(config)}, tensors


# -- 3. the proof: the folder, read once more and apart ------------------------------------------


def second_reading(draft: Draft, folder: Path) -> float:
    assert isinstance(draft, RecurrentDraft)
    H = json.loads((folder / "config.json").read_text())["hidden_size"]
    w = {name: t.double() for name, t in load_file(folder / "model.safetensors").items()}
    embedding, head = random((IDS, H), "embedding"), target_head(H)
    tokens, features = random_tokens(IDS), random((1, TOKENS, H), "features")
    draft.embedding_VH = embedding
    draft.head = nn.Linear(H, IDS, bias=False, dtype=torch.float64)
    draft.head.weight.copy_(head)
    worst = 0.0
    rolled = [draft.logits(states)[0] for states in draft.rollout(tokens, features, 0, STEPS)]
    for start in range(TOKENS - 1 - STEPS):
        state = features[0, start]
        for step in range(STEPS):
            x = w["fc.weight"] @ torch.cat([embedding[tokens[0, start + 1 + step]], state])
            normed = x / (x.square().mean() + 1e-6).sqrt() * w["norm.weight"]
            gate, up = (w[f"mlp.{name}_proj.weight"] @ normed for name in ("gate", "up"))
            state = x + w["mlp.down_proj.weight"] @ (gate * gate.sigmoid() * up)
            worst = max(worst, apart(rolled[step][start], head @ state))
    return worst


# -- 4. what engines do with it, and the row -----------------------------------------------------


def not_served(raw: Config, tensors: Tensors) -> Iterator[tuple[str, str]]:
    yield "refused", "has no recurrent drafts"


def reads(config: Any, num_layers: int | None) -> str:
    return "hs[n], the state after the target's final norm"


RECURRENT = DraftKind(
    name="recurrent",
    network=RecurrentDraft,
    new=new,
    stored_as="recurrent drafts",
    layouts=(
        Layout(
            name="recurrent",
            recognise=recognise,
            parse=parse,
            lay_out=lay_out,
            serve="redraft: redraft generate --target TARGET --draft THIS",
        ),
    ),
    build=build,
    tensors=shapes,
    with_rows_of=with_embedding_rows,
    second_reading=second_reading,
    function="x = fc([E[t+1]; hs[n] or own state]); logits = target's lm_head(x + mlp(norm(x)))",
    reads=reads,
    vocabulary=rows_in_words,
    engines={"vllm": (not_served,), "sglang": (not_served,)},
)
