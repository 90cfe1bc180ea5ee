"""Token LMs on disk: a stock Hugging Face folder of a causal LM and its tokenizer.

Written back as it was read, so that vLLM (`draft_model`), SGLang (`STANDALONE`) and Transformers
(`assistant_model=`) load it: config.json but for the FFN's width, the tensors by their own names (a
head tied to the embedding once), and the files next to them byte for byte.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...core.config_values import architectures_of, is_positive, shown
from ...core.errors import UserError, as_sentence
from ...core.folders import read_json
from ...core.published import without_paths
from ...models.target import Target
from ..base import Draft
from ..kind import Config, Files, Tensors
from ..stored.layer import check_tensors, config_values
from ..stored.second_reading import IDS, STEPS, TOKENS, apart, random_tokens
from .lm import TokenLMConfig, skeleton
from .network import TokenLMDraft

TOKENIZER_CONFIG = "tokenizer_config.json"
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    TOKENIZER_CONFIG,
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files next to the weights that are copied through."""
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json")
LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
TRIED = 6
"""Tokens that a built LM is tried on."""
ELSEWHERE = ("dtype", "torch_dtype", "intermediate_size", "_name_or_path")
"""Keys of config.json that follow from the tensors, and the path that old versions wrote."""


def recognises(raw: Config, tensors: Tensors, where: Path) -> bool:
    """Whether these are config.json and tensor names of a causal LM that Transformers knows."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if not known & set(architectures_of(raw)):
        return False
    return any(re.search(r"\.(embed\w*|wte|word_embeddings)\.weight$", name) for name in tensors)


def parse(
    raw: Mapping[str, Any], stored: Mapping[str, Tensor], where: Path
) -> tuple[TokenLMConfig, dict[str, Tensor]]:
    """The config of a stored LM and its tensors.

    Raises UserError naming what is missing, extra, or not to be used as a draft.
    """
    if raw.get("quantization_config"):
        raise UserError(
            f"{where}: a quantised LM; redraft reads float32, bfloat16 or float16 drafts"
        )
    _check_layer_counts(raw, stored, where)
    try:
        with as_sentence("config.json"):
            config = _config(raw)
            expected = skeleton(config)
    except UserError as problem:
        raise UserError(f"{where}: {problem}") from None
    tensors = {
        name: tensor
        for name, tensor in stored.items()
        if name in expected.shapes or not any(re.search(p, name) for p in expected.ignored)
    }
    head = None if expected.tied is None else tensors.pop(expected.tied, None)
    if head is not None and not torch.equal(head, tensors.get(expected.vocabulary[0], head)):
        raise UserError(
            f"{where}: config.json ties the head to the embedding (tie_word_embeddings), but "
            f"{expected.tied} is stored and differs; engines disagree about which one counts"
        )
    check_tensors(tensors, expected.shapes, {}, str(where))
    return config, tensors


def _check_layer_counts(raw: Mapping[str, Any], stored: Mapping[str, Tensor], where: Path) -> None:
    """Refuse a number of layers beyond the number of tensors, before Transformers makes as many."""
    values = config_values(raw, where)
    for key in LAYER_COUNTS:
        if values.given(key) and values.positive(key) > len(stored):
            values.refuse(key, f"at most the number of tensors in the file ({len(stored)})")
    for value in raw.values():
        if isinstance(value, dict):
            _check_layer_counts(value, stored, where)


def _config(raw: Mapping[str, Any]) -> TokenLMConfig:
    kept = {key: value for key, value in raw.items() if key not in ELSEWHERE}
    width = raw.get("intermediate_size")
    if width is None:
        theirs = TokenLMConfig(kept, 0).of_transformers
        width = getattr(theirs, "ffn_dim", None) or 4 * theirs.hidden_size
    if not is_positive(width):
        raise UserError(
            f"config.json: expected one intermediate_size for all layers, found {shown(width)}"
        )
    return TokenLMConfig(kept, width)


def build(config: TokenLMConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> TokenLMDraft:
    """A draft computing in `dtype` from tensors as stored.

    Raises UserError for one that does not compute: Transformers takes values that fail, or give no
    numbers, only when a model runs.
    """
    with as_sentence("this LM cannot be run"), torch.no_grad():
        draft = TokenLMDraft(config)
        draft.to(dtype).load_state_dict({n: t.to(dtype) for n, t in tensors.items()})
        tokens = torch.arange(TRIED)[None] % config.vocab_size
        states = next(draft.rollout(tokens, torch.zeros(1, TRIED, 0), 0, 1))
        if bool(draft.logits(states).isnan().any()):
            raise UserError("this LM cannot be run: its logits are not numbers (NaN)")
    return draft.eval().requires_grad_(False)


def expected_shapes(
    c: TokenLMConfig,
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Required tensors of an LM of config `c`, name -> shape; none are optional."""
    return skeleton(c).shapes, {}


def lay_out(config: TokenLMConfig, tensors: dict[str, Tensor], target: str) -> Files:
    """config.json and tensors as they were read."""
    return config.json(), dict(tensors)


def companions(folder: Path) -> dict[str, bytes]:
    """The files next to the weights, unchanged but for the path that old tokenizers wrote."""
    found = [folder / name for name in COMPANIONS if (folder / name).is_file()]
    files = {path.name: path.read_bytes() for path in found}
    if TOKENIZER_CONFIG in files:
        config = read_json(folder / TOKENIZER_CONFIG)
        named = without_paths(config.get("name_or_path"))
        if named != config.get("name_or_path"):
            text = json.dumps({**config, "name_or_path": named}, indent=2, ensure_ascii=False)
            files[TOKENIZER_CONFIG] = text.encode()
    return files


def pad_vocabulary(
    config: TokenLMConfig, tensors: Mapping[str, Tensor], rows: int
) -> tuple[TokenLMConfig, dict[str, Tensor]]:
    """The LM with rows of zeros in embedding and head, up to `rows` of them: engines want as many
    as the target has. Raises UserError when it has more already."""
    missing = rows - config.vocab_size
    if missing < 0:
        raise UserError(
            f"this LM has {config.vocab_size} vocabulary rows and the target {rows}: rows can be "
            "added to a draft, not taken away"
        )
    names = skeleton(config).vocabulary
    padded = {
        name: pad(t, (*[0] * (2 * t.dim() - 1), missing)) if name in names else t
        for name, t in tensors.items()
    }
    return TokenLMConfig({**config.raw, "vocab_size": rows}, config.intermediate_size), padded


def check_vocabulary(folder: Path, target: Target) -> None:
    """Raise UserError where the tokenizer in `folder` and the target's mean other tokens by an id.

    Only ids that the target has rows for count, and a token that just one of them has is no
    difference: it may be a special one that fine-tuning added.
    """
    if not any((folder / name).is_file() for name in TOKENIZER):
        return
    from transformers import AutoTokenizer

    with as_sentence(f"{folder}: its tokenizer could not be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        own = tokenizer.get_vocab()
    theirs = {
        i: token for token, i in target.tokenizer.get_vocab().items() if i < target.vocab_size
    }
    wrong = sorted((i, token) for token, i in own.items() if theirs.get(i, token) != token)
    if wrong:
        first, token = wrong[0]
        raise UserError(
            f"tokenizers differ: {len(wrong)} token ids of {folder} mean something else in target "
            f"{target.name} (id {first} is {token!r} here and {theirs[first]!r} there); a token_lm "
            "draft needs the target's own tokenizer"
        )


def reads(config: TokenLMConfig | None, num_layers: int | None) -> str:
    """What it reads of the target, in words."""
    return "none: it reads tokens only"


def vocabulary(config: TokenLMConfig, tensors: Tensors) -> str:
    """The vocabulary, in words."""
    return f"its own {config.vocab_size:,} rows, cut or left impossible to fit the target"


def second_reading(draft: Draft, folder: Path) -> float:
    """Transformers', on the same tokens."""
    from transformers import AutoModelForCausalLM

    tokens = random_tokens(min(IDS, draft.config.vocab_size))
    with as_sentence(f"{folder}: Transformers could not load the export"):
        other = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=torch.float64, trust_remote_code=False
        ).eval()
    expected = other(input_ids=tokens).logits
    worst = 0.0
    for step, states in enumerate(draft.rollout(tokens, tokens[..., None], 0, STEPS)):
        worst = max(worst, apart(draft.logits(states), expected[:, 1 + step : TOKENS - 1]))
    return worst
