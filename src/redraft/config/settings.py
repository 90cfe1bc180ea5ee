"""One frozen dataclass per stage; YAML keys, `--set` and command-line flags derive from them.

A setting given as text keeps the text, which is what is stored; its value is the property
`<setting>_value` next to it, which is read once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

from ..adapters.table import ADAPTERS, Method, read_method
from ..losses.table import TABLE as LOSSES
from .values import (
    TRACKERS,
    Budget,
    Width,
    read_budget,
    read_endpoints,
    read_format,
    read_shares,
    read_trackers,
    read_width,
)


def _opt(default: Any, help: str, **checks: Any) -> Any:
    return field(default=default, metadata={"help": help, **checks})


def key_of(stage: Any) -> dict[str, Any]:
    """The settings that a stage's result depends on.

    A setting that was added later names in `since` the value that does what was done before it. At this value it is
    left out, so that a new version of redraft does not redo finished stages. One that is `keyless` never matters.
    """
    return {
        each.name: getattr(stage, each.name)
        for each in fields(stage)
        if not each.metadata.get("keyless")
        and ("since" not in each.metadata or getattr(stage, each.name) != each.metadata["since"])
    }


@dataclass(frozen=True)
class RegenerateConfig:
    """The target answers the prompts."""

    temperature: float = _opt(0.0, "sampling temperature of the answers; 0 is greedy", low=0.0)
    greedy_share: float = _opt(
        0.0,
        "with a temperature: the share of the prompts that are answered greedily all the same",
        low=0.0,
        high=1.0,
    )
    top_k: int = _opt(0, "keep the k most likely tokens when sampling; 0 keeps all", low=0)
    top_p: float = _opt(1.0, "nucleus mass when sampling; 1 keeps all", low=1e-6, high=1.0)
    min_p: float = _opt(
        0.0, "keep tokens this likely against the most likely when sampling", low=0.0, high=1.0
    )
    max_new_tokens: int = _opt(256, "longest answer, in tokens", low=2)
    batch_size: int = _opt(64, "most prompts answered together", low=1)
    batch_tokens: int = _opt(
        32768,
        "bounds the KV cache: the most tokens of a batch, its rows x (longest prompt + max_new_tokens + "
        "lookahead tokens); a prompt beyond it is answered alone",
        low=1,
    )
    answers: str = _opt(
        "regenerate",
        "'regenerate': the target writes the answers; 'original': take those in the prompts file",
        choices=("regenerate", "original"),
    )
    turns: str = _opt(
        "all",
        "of a conversation, 'all': each user turn is answered, on top of the target's own earlier "
        "answers; 'last': only the last one, with the turns before it unchanged",
        choices=("all", "last"),
    )
    seed: int = _opt(0, "seed of the sampled answers")
    endpoints: str = _opt(
        "",
        "OpenAI-compatible servers of the target that write the answers, as URLs; none: this process does",
        check=read_endpoints,
        flag="endpoint",
        many=True,
    )
    endpoint_model: str = _opt(
        "", "the target's name at the endpoints; '': the only one they serve"
    )
    concurrency: int = _opt(32, "requests under way at each endpoint", low=1, high=4096)
    timeout: float = _opt(600.0, "longest wait for one answer of an endpoint, in seconds", low=0.1)
    patience: float = _opt(
        600.0, "longest wait for an endpoint to come back when all are down, in seconds", low=0.0
    )

    @cached_property
    def endpoints_value(self) -> tuple[str, ...]:
        return read_endpoints(self.endpoints)


@dataclass(frozen=True)
class GeneralConfig:
    """General prompts keep other traffic from losing acceptance."""

    guard: str = _opt(
        "auto",
        "go back towards the unadapted draft until general prompts lose nothing: 'on', 'off' (a share above 0 guards "
        "all the same), or 'auto', on where the target can make such prompts up",
        choices=("auto", "on", "off"),
        flag="guard",
    )
    share: float = _opt(
        0.0,
        "general prompts trained on as well, as a share of the prompts adapted on",
        low=0.0,
        high=10.0,
        flag="general-share",
    )
    prompts: str = _opt(
        "",
        "file of general prompts; '': the target makes them up, from the beginning of a user's turn",
        flag="general-prompts",
    )
    aside: int = _opt(48, "general prompts that guard, and as many more that are measured", low=2)
    tolerance: float = _opt(
        0.01,
        "the share of tau on the general prompts that guard which the kept adapter may lose",
        low=0.0,
    )
    seed: int = _opt(0, "seed of the prompts that the target makes up")


@dataclass(frozen=True)
class SelectConfig:
    """Which answered prompts are trained on."""

    select: str = _opt(
        "random",
        "score: random; draft_loss and rejection (where the draft fails); flatness (of the target's "
        "distributions); shift and mahalanobis (how the target's states left the base's; needs the base)",
        choices=("random", "draft_loss", "rejection", "flatness", "shift", "mahalanobis"),
    )
    by: str = _opt(
        "answers",
        "what is scored: 'answers', all of which are generated, or 'prompts', of which only those "
        "chosen are answered",
        choices=("answers", "prompts"),
    )
    budget: str = _opt(
        "1.0",
        "how many samples to keep: a count (500), a share (0.5) or tokens (20000t); 'auto': prompts are "
        "answered in rounds until held-out tau stops rising",
        check=read_budget,
    )
    least_gain: float = _opt(
        0.05,
        "with budget auto: the rise of held-out tau, as a share of it, that a doubling of the answers "
        "must bring for another",
        low=0.0,
    )
    duplicates: float = _opt(
        0.8,
        "samples that share this much of their 5-token runs (Jaccard) with a better one come last; 0: "
        "not looked for",
        low=0.0,
        high=1.0,
    )
    coverage: int = _opt(
        0, "spread the budget over this many clusters of like samples; 0: by score alone", low=0
    )
    seed: int = _opt(0, "seed of the selection")

    @cached_property
    def budget_value(self) -> Budget:
        return read_budget(self.budget)


@dataclass(frozen=True)
class TrainConfig:
    """Training of the adapter."""

    method: str = _opt(
        "body",
        f"adapters, joined by +: {', '.join(ADAPTERS)}",
        check=read_method,
    )
    width: str = _opt(
        "1.0",
        "added FFN neurons of `expert`: a number (64), a share of the shared ones (0.25, 1.0), or 'auto', the "
        "smallest of five widths within 1 % of the best",
        check=read_width,
    )
    rank: int = _opt(16, "rank of `lora` and `head-lora`", low=1)
    init: str = _opt(
        "active",
        "start of the expert: 'active' copies the most active shared neurons (training starts "
        "exactly at the unadapted draft), 'random' is a random expert as in the paper",
        choices=("active", "random"),
    )
    vocab: str = _opt(
        "keep",
        "'remap' exchanges the tokens of a reduced draft vocabulary for those of the target's answers",
        choices=("keep", "remap"),
        old={"retarget": "remap"},
    )
    loss: str = _opt(
        "kl",
        "; ".join(row.help for row in LOSSES),
        choices=tuple(row.name for row in LOSSES),
    )
    optimizer: str = _opt(
        "adamw",
        "what moves the tensors; 'muon' (from PyTorch 2.9 on) is Muon for matrices but heads and embeddings, AdamW for the rest",
        choices=("adamw", "muon"),
        since="adamw",
    )
    lr: float = _opt(
        0.0,
        "peak learning rate; 0 takes 0.4 / hidden size (1e-4 at 4096) for body, full and scratch, a third more for "
        "smaller adapters, four times as much for low-rank ones",
        low=0.0,
    )
    lr_parts: str = _opt(
        "",
        "learning rates of single adapters, as multiples of lr: 'expert=2,fc=0.5'",
        check=read_shares,
    )
    epochs: float = _opt(
        4.0, "passes over the chosen answers; 0: only what is fitted in closed form", low=0.0
    )
    batch_tokens: int = _opt(4096, "tokens in a batch, padding included", low=16)
    accumulate: int = _opt(
        1,
        "parts of a step that are computed one after another and added up: less memory, the same step",
        low=1,
        since=1,
    )
    rollout: int = _opt(5, "draft steps trained through (positions beyond accept little)", low=1)
    step_decay: float = _opt(0.9, "weight of rollout step j is step_decay ** j", low=0.0, high=1.0)
    warmup: float = _opt(0.05, "share of the steps with a rising learning rate", low=0.0, high=1.0)
    weight_decay: float = _opt(
        0.0, "decoupled weight decay (never on a zero-started tensor)", low=0.0
    )
    clip: float = _opt(1.0, "largest gradient norm", low=0.0)
    feature_noise: float = _opt(
        0.0, "uniform noise on features, this * 512 / tokens wide (0.2 in the paper)", low=0.0
    )
    average: float = _opt(
        0.0,
        "decay per step of a running average of the weights, tried too; 0: none",
        low=0.0,
        high=0.9999,
    )
    evaluations: int = _opt(8, "how often held-out tau is measured during training", low=1)
    patience: int = _opt(
        3,
        "evaluations without a rise before training stops early, in its second half and once it beat its start",
        low=1,
    )
    precision: str = _opt(
        "auto",
        "'auto' probes which is faster",
        choices=("auto", "fp32", "bf16"),
    )
    seed: int = _opt(0, "seed of initialisation and batch order")
    track: str = _opt(
        "",
        f"experiment trackers to follow training with, on this machine: {', '.join(TRACKERS)}",
        many=True,
        check=read_trackers,
        keyless=True,
    )

    @cached_property
    def method_value(self) -> Method:
        return read_method(self.method)

    @cached_property
    def width_value(self) -> Width | None:
        return read_width(self.width)

    @cached_property
    def trackers(self) -> tuple[str, ...]:
        return read_trackers(self.track)

    @cached_property
    def lr_parts_value(self) -> Mapping[str, float]:
        return read_shares(self.lr_parts)


@dataclass(frozen=True)
class MeasureConfig:
    """How acceptance is measured before and after."""

    k: int = _opt(4, "draft tokens per verification step", low=1, high=16)
    eval_limit: int = _opt(64, "prompts kept aside for the before/after measurement", low=1)
    heldout: int = _opt(32, "prompts kept aside for early stopping", low=1)
    eval_new_tokens: int = _opt(128, "longest answer measured, in tokens", low=2)
    answers: str = _opt(
        "here",
        "who writes the answers that are measured on and stopped by: 'here', this process; 'endpoints', "
        "those of regenerate.endpoints (safety prompts are answered here)",
        choices=("here", "endpoints"),
    )
    temperature: float = _opt(
        0.0,
        "sampling temperature of what is measured and stopped by, with regenerate's cuts; 0 is greedy",
        low=0.0,
    )


@dataclass(frozen=True)
class SafetyConfig:
    """What is asked of safety prompts, where a file of them is named."""

    temperature: float = _opt(
        0.7, "sampling temperature of the seeded and sampled answers", low=1e-3
    )
    samples: int = _opt(8, "sampled answers per prompt, without and with the draft", low=1)
    limit: int = _opt(200, "safety prompts used, from the file's beginning", low=1)
    max_new_tokens: int = _opt(64, "longest sampled answer, in tokens", low=2)
    seed: int = _opt(0, "seed of the sampled answers")


@dataclass(frozen=True)
class ExportConfig:
    """The stock checkpoint that is written."""

    format: str = _opt(
        "auto",
        "layout of the exported draft; 'auto' is the kind's own layout for vLLM",
        check=read_format,
    )
    certificate: str = _opt(
        "auto",
        "'auto' writes certificate.json of the job's own prompts, against which a server can be checked, where there are "
        "16 or more; 'off' does not",
        choices=("auto", "off"),
        keyless=True,
    )


@dataclass(frozen=True)
class AdaptConfig:
    """Everything `redraft adapt` can be told, stage by stage."""

    regenerate: RegenerateConfig = field(default_factory=RegenerateConfig)
    general: GeneralConfig = field(default_factory=GeneralConfig)
    select: SelectConfig = field(default_factory=SelectConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    safety: SafetyConfig = field(default_factory=SafetyConfig)
    export: ExportConfig = field(default_factory=ExportConfig)


STAGES: dict[str, Any] = {
    "regenerate": RegenerateConfig,
    "general": GeneralConfig,
    "select": SelectConfig,
    "train": TrainConfig,
    "measure": MeasureConfig,
    "safety": SafetyConfig,
    "export": ExportConfig,
}
