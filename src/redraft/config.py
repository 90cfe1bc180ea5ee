"""One frozen dataclass per stage; YAML keys, `--set` and command-line flags derive from them.

A resolved value knows where it came from (default, file, --set or flag). All mistakes are
reported at once, before a model is loaded.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from .adapters.table import ADAPTERS, read_method
from .core.errors import UserError, nearest
from .losses.table import TABLE as LOSSES


def _opt(default: Any, help: str, **checks: Any) -> Any:
    return field(default=default, metadata={"help": help, **checks})


LARGEST_SHARE = 8.0


def read_width(text: str) -> int | float | None:
    """`width` as a number of neurons (64), a share of the shared ones (0.25), or None for 'auto'.

    Raises ValueError for anything else.
    """
    if text == "auto":
        return None
    try:
        width = float(text) if "." in text else int(text)
    except ValueError:
        width = 0
    if 0 < width <= (LARGEST_SHARE if isinstance(width, float) else 1 << 30):
        return width
    raise ValueError(
        f"must be a number of neurons (64), a share of the shared ones (0.25, 1.0, at most 8.0) or auto; got '{text}'"
    )


def read_budget(text: str) -> tuple[str, float]:
    """`budget` as ('auto', 0), ('tokens', n), ('share', s) or ('count', n). Raises ValueError."""
    word = text.strip()
    try:
        if word == "auto":
            return "auto", 0
        kind = "tokens" if word.endswith("t") else "share" if "." in word else "count"
        number = float(word) if kind == "share" else int(word.removesuffix("t"))
        if number > 0 and (kind != "share" or number <= 1):
            return kind, number
    except ValueError:
        pass
    raise ValueError(
        "is not a count (500), a share between 0 and 1 (0.5), a number of tokens (20000t) or auto; "
        f"got '{text}'"
    )


def read_shares(text: str) -> dict[str, float]:
    """`lr_parts` by adapter. Raises ValueError for what is no adapter or no positive number."""
    shares: dict[str, float] = {}
    for pair in filter(None, text.split(",")):
        name, _, number = pair.partition("=")
        try:
            shares[name] = float(number)
        except ValueError:
            shares[name] = 0.0
        if name not in ADAPTERS or not 0 < shares[name] < math.inf:
            raise ValueError(
                f"takes adapter=multiple pairs ('expert=2,fc=0.5') of {', '.join(ADAPTERS)}; got '{pair}'"
            )
    return shares


_BARE = re.compile(r"(https?)://(?:[^@/?#,]*@)?([^@/?#,\s]+(?:/[^@?#,\s]*)?)(?:[?#][^@]*)?")
"""A URL in which it is clear where a user, a password or a query begins and ends."""


def read_endpoints(text: str) -> tuple[str, ...]:
    """The servers in `endpoints`, each as its root URL: without a last slash or /v1.

    Raises ValueError for what is no http(s) URL, for one named twice, and for a user, password or
    query in it, which would be stored with the settings and are therefore not repeated.
    """
    if set(text) & set("@?#"):
        bare = _BARE.fullmatch(text.strip())
        raise ValueError(
            "takes no user, password or query in a URL, because settings are stored; give "
            f"{'://'.join(bare.groups()) if bare else 'the rest'} and put the key into the environment "
            "variable REDRAFT_API_KEY"
        )
    found: list[str] = []
    for url in filter(None, (part.strip() for part in text.split(","))):
        try:
            parts = urlsplit(url)
            usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            usable = False
        if not usable:
            raise ValueError(
                "takes URLs of OpenAI-compatible servers (http://127.0.0.1:8000, "
                f"https://host/v1); got '{url}'"
            )
        shown = f"{parts.scheme}://{parts.netloc}{parts.path}"
        root = shown.rstrip("/").removesuffix("/v1").rstrip("/")
        if root in found:
            raise ValueError(f"names {root} twice; --concurrency sets the requests to one server")
        found.append(root)
    return tuple(found)


@dataclass(frozen=True)
class RegenerateConfig:
    """The target answers the prompts."""

    temperature: float = _opt(0.0, "sampling temperature of the answers; 0 is greedy", low=0.0)
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
        "answers; 'last': only the last one, with the turns before it as they are in the file",
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


@dataclass(frozen=True)
class TrainConfig:
    """Training of the adapter."""

    method: str = _opt(
        "expert+fc+norms",
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
        "'remap' chooses the tokens of a reduced-vocabulary draft anew, for the target's answers",
        choices=("keep", "remap"),
        old={"retarget": "remap"},
    )
    loss: str = _opt(
        "kl",
        "; ".join(row.help for row in LOSSES),
        choices=tuple(row.name for row in LOSSES),
    )
    lr: float = _opt(
        0.0,
        "peak learning rate; 0 takes 1.6 / hidden size (4e-4 at 4096), a quarter for full and scratch",
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
    patience: int = _opt(3, "evaluations without a rise before training stops early", low=1)
    precision: str = _opt(
        "auto",
        "'auto' probes which is faster",
        choices=("auto", "fp32", "bf16"),
    )
    seed: int = _opt(0, "seed of initialisation and batch order")


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
        choices=("auto", "eagle3", "speculators", "vllm-eagle", "sglang-eagle", "hf"),
    )


@dataclass(frozen=True)
class AdaptConfig:
    """Everything `redraft adapt` can be told, stage by stage."""

    regenerate: RegenerateConfig = field(default_factory=RegenerateConfig)
    select: SelectConfig = field(default_factory=SelectConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    safety: SafetyConfig = field(default_factory=SafetyConfig)
    export: ExportConfig = field(default_factory=ExportConfig)


STAGES: dict[str, Any] = {
    "regenerate": RegenerateConfig,
    "select": SelectConfig,
    "train": TrainConfig,
    "measure": MeasureConfig,
    "safety": SafetyConfig,
    "export": ExportConfig,
}


@dataclass(frozen=True)
class Resolved:
    """A configuration together with the origin of each value, by dotted key."""

    config: AdaptConfig
    origins: dict[str, str]


def stage_fields() -> dict[str, tuple[str, dataclasses.Field[Any]]]:
    """Every setting by dotted key: `train.lr` -> ("train", the dataclass field)."""
    found: dict[str, tuple[str, dataclasses.Field[Any]]] = {}
    for stage, stage_class in STAGES.items():
        for setting in dataclasses.fields(stage_class):
            found[f"{stage}.{setting.name}"] = (stage, setting)
    return found


def resolve(layers: list[tuple[str, Mapping[str, Any]]]) -> Resolved:
    """Lay settings over the defaults, later layers winning.

    `layers` are (origin, {key: value}); a key is dotted (`train.lr`), nested mappings are fine.
    Raises UserError listing every unknown key (with the nearest known one) and bad value at once.
    """
    known = stage_fields()
    values: dict[str, Any] = {}
    origins = dict.fromkeys(known, "default")
    mistakes: list[str] = []
    for origin, layer in layers:
        for key, value in _flatten(layer):
            if key not in known:
                mistakes.append(f"{origin}: unknown key '{key}'; {_near(key, known)}")
                continue
            try:
                values[key] = check_value(known[key][1], value)
                origins[key] = origin
            except ValueError as problem:
                mistakes.append(f"{origin}: {key} {problem}")
    if mistakes:
        raise UserError("configuration not usable:\n  " + "\n  ".join(mistakes))
    stages = {
        stage: stage_class(
            **{k.split(".", 1)[1]: v for k, v in values.items() if k.startswith(f"{stage}.")}
        )
        for stage, stage_class in STAGES.items()
    }
    return Resolved(AdaptConfig(**stages), origins)


def check_value(setting: dataclasses.Field[Any], value: Any) -> Any:
    """`value` as the field's type, within its bounds. Raises ValueError saying what was expected."""
    kind: type = {"int": int, "float": float, "str": str}[str(setting.type)]
    if isinstance(value, bool) or value is None:
        raise ValueError(f"expected {kind.__name__}, got {value!r}")
    try:
        typed = kind(value)
    except (TypeError, ValueError):
        raise ValueError(f"expected {kind.__name__}, got {value!r}") from None
    if kind is int and float(value) != typed:
        raise ValueError(f"expected a whole number, got {value!r}")
    typed = setting.metadata.get("old", {}).get(typed, typed)
    choices = setting.metadata.get("choices")
    if choices and typed not in choices:
        raise ValueError(f"must be one of {', '.join(choices)}; got '{typed}'")
    if "check" in setting.metadata:
        setting.metadata["check"](typed)
    low, high = setting.metadata.get("low"), setting.metadata.get("high")
    if (low is not None and typed < low) or (high is not None and typed > high) or typed != typed:
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ValueError(f"must be {bounds}; got {typed}")
    return typed


def read_yaml(path: Path) -> dict[str, Any]:
    """A configuration file or recipe: a mapping of stages to settings."""
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as problem:
        raise UserError(f"cannot read the configuration file {path}: {problem.strerror}") from None
    except yaml.YAMLError as problem:
        raise UserError(f"{path} is not valid YAML: {problem}") from None
    if not isinstance(loaded, dict):
        raise UserError(
            f"{path}: expected a mapping of stages to settings, got {type(loaded).__name__}"
        )
    return loaded


def parse_set(assignments: list[str]) -> dict[str, Any]:
    """`--set train.lr=1e-3` arguments as {key: value}."""
    pairs: dict[str, Any] = {}
    for text in assignments:
        key, sign, value = text.partition("=")
        if not sign:
            raise UserError(f"--set takes key=value, for example --set train.lr=1e-3; got '{text}'")
        pairs[key.strip()] = value.strip()
    return pairs


def recipes_folder() -> Path:
    """Where the named recipes live: inside an installed package, or at the root of a checkout."""
    installed = Path(__file__).parent / "recipes"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "recipes"


def recipe_names() -> list[str]:
    return sorted(path.stem for path in recipes_folder().glob("*.yaml"))


def recipe_path(name: str) -> Path:
    """A recipe by name, or any YAML file by path."""
    named = recipes_folder() / f"{name}.yaml"
    if named.is_file():
        return named
    if Path(name).is_file():
        return Path(name)
    raise UserError(f"no recipe or file named '{name}'; {nearest(name, recipe_names())}")


def _flatten(layer: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in layer.items():
        if isinstance(value, Mapping):
            pairs += _flatten(value, f"{prefix}{key}.")
        else:
            pairs.append((f"{prefix}{key}", value))
    return pairs


def _near(key: str, known: Mapping[str, Any]) -> str:
    """Prefer a known key with the same last word: `adapt.lr` should suggest `train.lr`."""
    last = key.rsplit(".", 1)[-1]
    same = [name for name in known if name.endswith("." + last)]
    return f"did you mean '{same[0]}'?" if same else nearest(key, known)
