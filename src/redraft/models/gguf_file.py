"""Targets in a GGUF file, as llama.cpp serves them: read by Transformers, each weight as the number that its block means.

So a target that is served quantised has the values here that the engine has. What the file's metadata cannot say of a
model, its config.json says where it lies in the same folder; the tokenizer's files too come before the file's own.
Transformers drops what it does not know. Here that is refused.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ..core.errors import UserError, as_sentence
from ..core.folders import read_json

SUFFIX = ".gguf"
WEIGHTS = (".safetensors", ".bin", ".pt")
TOKENIZER = ("tokenizer.json", "tokenizer.model")
COMPARED = (
    *("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
    *("num_key_value_heads", "intermediate_size", "vocab_size", "rms_norm_eps", "rope_theta"),
    "tie_word_embeddings",
)
"""What a config.json and the metadata of its model's file have to agree in."""
TYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
ENDS = ("eos", "eot", "eom")
"""Tokens of a GGUF file at which llama.cpp ends an answer."""
ROTARY = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
LAYER = re.compile(r"blk\.(\d+)\.")


def gguf_file(source: str) -> Path | None:
    """The GGUF file that a target is: the file named, or the only one of a folder that holds no other weights.

    None for any other source. Raises UserError for a folder that holds several.
    """
    where = Path(source)
    if where.suffix == SUFFIX and where.is_file():
        return where
    found = sorted(where.glob(f"*{SUFFIX}")) if where.is_dir() else []
    if not found or any(path.suffix in WEIGHTS for path in where.iterdir()):
        return None
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(f"target {source}: expected one GGUF file, found {names}; name one of them")
    return found[0]


@lru_cache(maxsize=2)
def header(file: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The metadata of a file, of lists their lengths, and how many numbers each of its tensors holds.

    Raises UserError without the package `gguf`, and for a file that is damaged or one part of several.
    """
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UserError(
            f"target {file}: reading GGUF needs the package gguf; pip install 'redraft[gguf]'"
        ) from None
    with as_sentence(f"target {file} is no whole GGUF file"):
        reader = GGUFReader(file)
        tensors = {tensor.name: int(tensor.n_elements) for tensor in reader.tensors}
        values = {name: _value(field) for name, field in reader.fields.items()}
    if int(values.get("split.count") or 1) > 1:
        raise UserError(
            f"target {file}: one of {values['split.count']} parts; put them together (llama-gguf-split --merge) "
            "and name that file"
        )
    return values, tensors


def _value(field: Any) -> Any:
    value = field.contents() if len(field.data) == 1 else None
    return len(field.data) if value is None or isinstance(value, list) else value


def stored_type(file: Path) -> str:
    """How most of a file's weights are stored, as llama.cpp names it: q8_0, q4_k_m."""
    from gguf import LlamaFileType

    number = header(file)[0].get("general.file_type")
    known: dict[int, str] = {kind.value: kind.name.lower() for kind in LlamaFileType}
    return known.get(int(number or 0), "mixed").removeprefix("all_").removeprefix("mostly_")


def rounds(file: Path, dtype: torch.dtype) -> bool:
    """Whether a file's type cannot hold every number of a dtype."""
    return stored_type(file) not in (TYPES[torch.float32], TYPES.get(dtype))


def read_config(file: Path) -> Any:
    """The model's configuration: its config.json, where that lies next to the file, else the file's metadata.

    Raises UserError where the two are of different models, and for an architecture that Transformers does not read from
    GGUF.
    """
    from transformers import AutoConfig, PreTrainedConfig

    metadata, tensors = header(file)
    with as_sentence(f"target {file}: Transformers does not read it"):
        said, _ = PreTrainedConfig.get_config_dict(str(file.parent), gguf_file=file.name)
    named = file.parent / "config.json"
    if named.is_file():
        with as_sentence(f"target {file.parent}: its config.json could not be read"):
            config = AutoConfig.from_pretrained(str(file.parent), trust_remote_code=False)
        _check_same_model(file, said, config)
        config.dtype = torch.float32
        return config
    with as_sentence(f"target {file}: Transformers does not read it"):
        config = AutoConfig.for_model(**said)
    kind = metadata.get(f"{metadata['general.architecture']}.rope.scaling.type", "none")
    frequencies = next((name for name in ROTARY if name in tensors), None)
    if frequencies or kind != "none":
        raise UserError(
            f"target {file}: its rotary frequencies are scaled ({frequencies or kind}), which Transformers does not read "
            "from GGUF; put the config.json of the model next to it"
        )
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ENDS]
    config.dtype = torch.float32
    config.eos_token_id = sorted({end for end in ends if end is not None}) or None
    return config


def _check_same_model(file: Path, said: dict[str, Any], config: Any) -> None:
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    for name in COMPARED:
        theirs, ours = said.get(name), getattr(text, name, rope.get(name))
        if theirs is None or ours is None or theirs == ours:
            continue
        floats = isinstance(ours, float) and isinstance(theirs, float | int)
        if floats and math.isclose(ours, theirs, rel_tol=1e-5):
            continue
        raise UserError(
            f"target {file}: its metadata has {name} {theirs}, the config.json next to it {ours}: they are of different "
            "models, or the file was made of an older one; put each into its own folder"
        )


def read_tokenizer(file: Path) -> Any:
    """The tokenizer: of its files, where they lie next to the GGUF file, else as that describes it."""
    from transformers import AutoTokenizer

    stored = _has_tokenizer(file)
    of_file = {} if stored else {"gguf_file": file.name}
    with as_sentence(f"target {file}: its tokenizer could not be loaded"), _no_bars():
        found = AutoTokenizer.from_pretrained(str(file.parent), trust_remote_code=False, **of_file)
        return found if stored else _without_others(file, found)


def _without_others(file: Path, tokenizer: Any) -> Any:
    """Without special tokens of the class that Transformers makes it of, which are none of the file's."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    count = header(file)[0]["tokenizer.ggml.tokens"]
    if len(tokenizer) <= count:
        return tokenizer
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [each for each in state["added_tokens"] if each["id"] < count]
    names = {
        name: token
        for name, token in tokenizer.special_tokens_map.items()
        if isinstance(token, str) and tokenizer.convert_tokens_to_ids(token) < count
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        chat_template=tokenizer.chat_template,
        **names,
    )


def _has_tokenizer(file: Path) -> bool:
    return any((file.parent / name).is_file() for name in TOKENIZER)


def surroundings(file: Path, scratch: Path) -> Path:
    """A folder with the model's config.json and its tokenizer's files: the file's own where it has them, else one in
    `scratch`, written of what the file describes.
    """
    if (file.parent / "config.json").is_file() and _has_tokenizer(file):
        return file.parent
    folder = scratch / f"{file.stem}-model"
    read_config(file).save_pretrained(folder)
    read_tokenizer(file).save_pretrained(folder)
    return folder


def read_model(
    file: Path, config: Any, dtype: torch.dtype, placed: Mapping[str, Any] | None = None
) -> tuple[Any, dict[str, Any]]:
    """The model of `config` with the file's weights, and Transformers' report of the loading.

    Raises UserError for what Transformers cannot read, and for a file of which it would drop something.
    """
    import transformers

    options = dict(placed or {})
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with as_sentence(f"target {file} could not be loaded"), _no_bars():
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            str(file.parent),
            gguf_file=file.name,
            config=config,
            dtype=dtype,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    stops = file.parent / "generation_config.json"
    if stops.is_file() and (ends := read_json(stops).get("eos_token_id")) is not None:
        model.generation_config.eos_token_id = ends
    return model, info


def check_whole(file: Path, model: Any) -> None:
    """Raise UserError unless the model has as many numbers as the file: Transformers passes over others' tensors."""
    layers = model.config.get_text_config().num_hidden_layers
    held = {
        name: count
        for name, count in header(file)[1].items()
        if name not in ROTARY and not _further(name, layers)
    }
    taken = sum(parameter.numel() for parameter in model.parameters())
    if sum(held.values()) != taken:
        raise UserError(
            f"target {file}: it holds {sum(held.values()):,} numbers in {len(held)} tensors, of which its model takes "
            f"{taken:,}: this version of Transformers does not read all of this architecture from GGUF; use the model's "
            "own folder"
        )


def _further(name: str, layers: int) -> bool:
    """Whether a tensor belongs to a layer past the model's, which predicts further tokens."""
    found = LAYER.match(name)
    return found is not None and int(found[1]) >= layers


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Without the progress bars that the reader of GGUF writes whatever the settings."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield
