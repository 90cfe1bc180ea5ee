"""A second reading of an MTP head's folder: loops in float64, sharing no code with the network or the reader.

The conventions of the families stand here once more, found by the tensors' names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..stored.reference_reader import Reference
from ..stored.second_reading import IDS, STEPS, TOKENS, apart, random, random_tokens, target_head

if TYPE_CHECKING:
    from .network import MtpDraft

QWEN, MIMO, NEXTN = "pre_fc_norm_hidden", "hidden_layernorm", "hnorm"
NORMS = {
    QWEN: ("pre_fc_norm_embedding", QWEN, "norm", "fc"),
    MIMO: ("token_layernorm", MIMO, "final_layernorm", "input_proj"),
    NEXTN: ("enorm", NEXTN, "shared_head.norm", "eh_proj"),
}


class MtpReference(Reference):
    """A head's folder read as vLLM reads it. `scale` is that of the target's final norm."""

    def __init__(self, folder: Path, embedding: Tensor, head: Tensor, scale: Tensor):
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.c = raw.get("text_config", raw)
        stored = {
            n: t.double()
            for file in folder.glob("*.safetensors")
            for n, t in load_file(file).items()
        }
        self.kind, prefix = next(
            (kind, name[: -len(f"{fc}.weight")])
            for kind, (_, _, _, fc) in NORMS.items()
            for name in stored
            if name.endswith(f".{fc}.weight")
        )
        self.w = {n.removeprefix(prefix).removeprefix("layers.0."): t for n, t in stored.items()}
        self.embedding, self.head = embedding.double(), head.double()
        self.heads = int(self.c["num_attention_heads"])
        self.groups = int(self.c["num_key_value_heads"])
        self.size = int(self.c.get("head_dim") or self.c["hidden_size"] // self.heads)
        self.eps = float(self.c["rms_norm_eps"])
        self.scale = scale if self.kind == MIMO else torch.ones_like(scale)
        rope = self.c["rope_parameters"]
        share = float(rope.get("partial_rotary_factor", self.c.get("partial_rotary_factor", 1.0)))
        self.turned = int(self.size * (1.0 if self.kind == MIMO else share))
        theta = float(rope["rope_theta"])
        self.angles = [theta ** (-2 * i / self.turned) for i in range(self.turned // 2)]

    def first(self, features: Tensor) -> Tensor:
        return features / self.scale

    def pair(self, token: int, state: Tensor, position: int) -> Tensor:
        of_embedding, of_state, last, fc = NORMS[self.kind]
        embedded = self.embedding[token]
        if position == 0 and self.kind != QWEN:
            embedded = torch.zeros_like(embedded)
        halves = [self.rms(embedded, of_embedding), self.rms(state, of_state)]
        x = self.linear(torch.cat(halves[::-1] if self.kind == MIMO else halves), fc)
        x = x + self.attention(self.rms(x, "input_layernorm"), position)
        y = self.rms(x, "post_attention_layernorm")
        x = x + (self.routed(y) if "mlp.gate.weight" in self.w else self.ffn(y, "mlp."))
        return x if self.kind == NEXTN else self.rms(x, last)

    def ffn(self, y: Tensor, at: str) -> Tensor:
        gate, up, down = (self.w[f"{at}{name}_proj.weight"] for name in ("gate", "up", "down"))
        return down @ (gate @ y / (1 + torch.exp(-(gate @ y))) * (up @ y))

    def one_expert(self, y: Tensor, index: int) -> Tensor:
        """One of the routed experts, from a tensor of its own or from one for all."""
        if "mlp.experts.gate_up_proj" not in self.w:
            return self.ffn(y, f"mlp.experts.{index}.")
        both = self.w["mlp.experts.gate_up_proj"][index] @ y
        half = len(both) // 2
        neurons = both[:half] / (1 + torch.exp(-both[:half])) * both[half:]
        return self.w["mlp.experts.down_proj"][index] @ neurons

    def routed(self, y: Tensor) -> Tensor:
        wanted, logits = int(self.c["num_experts_per_tok"]), self.w["mlp.gate.weight"] @ y
        if self.kind == QWEN:
            exact = torch.exp(logits - logits.max())
            scores = (exact / exact.sum()).tolist()
            chosen = sorted(range(len(scores)), key=lambda e: -scores[e])[:wanted]
        else:
            scores = (1 / (1 + torch.exp(-logits))).tolist()
            bias = self.w["mlp.gate.e_score_correction_bias"].tolist()
            ranks = [s + b for s, b in zip(scores, bias, strict=True)]
            chosen = self.within_groups(ranks, wanted)
        total = sum(scores[e] for e in chosen) if self.c.get("norm_topk_prob", True) else 1.0
        parts = [scores[e] / total * self.one_expert(y, e) for e in chosen]
        out = torch.stack(parts).sum(0)
        if self.kind == NEXTN:
            out = out * float(self.c.get("routed_scaling_factor", 1.0))
        if "mlp.shared_experts.up_proj.weight" in self.w:
            out = out + self.ffn(y, "mlp.shared_experts.")
        if "mlp.shared_expert.up_proj.weight" in self.w:
            gate = self.w["mlp.shared_expert_gate.weight"][0] @ y
            out = out + self.ffn(y, "mlp.shared_expert.") / (1 + torch.exp(-gate))
        return out

    def within_groups(self, ranks: list[float], wanted: int) -> list[int]:
        """The experts of the highest rank in the groups whose two highest add up to most."""
        count = int(self.c.get("n_group") or 1)
        size = len(ranks) // count
        groups = [range(g * size, (g + 1) * size) for g in range(count)]
        groups.sort(key=lambda group: -sum(sorted(ranks[e] for e in group)[-2:]))
        allowed = [e for group in groups[: int(self.c.get("topk_group") or 1)] for e in group]
        return sorted(allowed, key=lambda e: -ranks[e])[:wanted]

    def attention(self, x: Tensor, position: int) -> Tensor:
        q = self.linear(x, "self_attn.q_proj").view(self.heads, -1)
        k, v = (self.linear(x, f"self_attn.{n}_proj").view(self.groups, -1) for n in "kv")
        queries = [head[: self.size] for head in q]
        keys = list(k)
        if "self_attn.q_norm.weight" in self.w:
            queries = [self.rms(part, "self_attn.q_norm") for part in queries]
            keys = [self.rms(part, "self_attn.k_norm") for part in keys]
        self.seen.append(([self.turn(part, position) for part in keys], list(v)))
        mixed = []
        for head, part in enumerate(queries):
            group = head * self.groups // self.heads
            query = self.turn(part, position)
            shares = torch.stack([query @ ks[group] for ks, _ in self.seen]) / self.size**0.5
            shares = torch.exp(shares - shares.max())
            out = sum(
                s * vs[group] for s, (_, vs) in zip(shares / shares.sum(), self.seen, strict=True)
            )
            if self.kind == QWEN and self.c.get("attn_output_gate", True):
                out = out / (1 + torch.exp(-q[head][self.size :]))
            mixed.append(out)
        return self.linear(torch.cat(mixed), "self_attn.o_proj")  # type: ignore[arg-type]

    def turn(self, x: Tensor, position: int) -> Tensor:
        return torch.cat([super().turn(x[: self.turned], position), x[self.turned :]])

    def logits(self, state: Tensor) -> Tensor:
        assert self.head is not None
        return self.head @ (self.rms(state, NORMS[NEXTN][2]) if self.kind == NEXTN else state)

    def rms(self, x: Tensor, name: str) -> Tensor:
        weight = self.w[f"{name}.weight"] + (1.0 if self.kind == QWEN else 0.0)
        return x / torch.sqrt((x * x).mean() + self.eps) * weight


def by_the_second_reader(draft: MtpDraft, folder: Path) -> float:
    """The worst relative difference of a chain's logits, on random tokens, states, embedding and head."""
    H = draft.hidden_size
    embedding, head, scale = (
        random((IDS, H), "embedding"),
        target_head(H),
        random((H,), "scale").exp(),
    )
    tokens, features = random_tokens(IDS), random((1, TOKENS, H), "features")
    draft.shared_embedding = embedding
    draft.head = torch.nn.Linear(H, IDS, bias=False, dtype=torch.float64)
    draft.head.weight.copy_(head)
    if draft.config.before_norm:
        draft.target_norm = scale
    reference = MtpReference(folder, embedding, head, scale)
    worst = 0.0
    rolled = [draft.logits(states)[0] for states in draft.rollout(tokens, features, 0, STEPS)]
    for start in range(TOKENS - 1 - STEPS):
        chain = reference.chain_logits(tokens[0].tolist(), features[0], start, STEPS)
        for step, expected in enumerate(chain):
            worst = max(worst, apart(rolled[step][start], expected))
    return worst
