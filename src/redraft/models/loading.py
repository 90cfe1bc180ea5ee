"""Loading a target: a causal LM whose every weight comes from its files, or one sentence with the reason.

Transformers fills weights that it does not find with random numbers and passes over those that it does not
know, with a warning. Both make another model, whose figures look like any others. Here they are refused.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..core import ranks
from ..core.errors import UserError, as_sentence, reason
from . import gguf_file
from .cache_checks import check_reads_on
from .placement import AUTO, layers_spread
from .target import Target
from .target_adapters import note_unused, with_adapter
from .templates import check_variables, read_template
from .tensor_parallel import TENSOR_PARALLEL, shared_layers

DTYPES = ("float32", "bfloat16", "float16", "float64")
"""The dtypes that a target can be loaded in."""
NOT_TEXT = ("visual", "vision", "image", "audio", "multi_modal", "multimodal", "mm_projector")
"""Parts of the names of modules that text never reaches."""
NOT_THE_MODEL = ("rotary_emb.inv_freq", "masked_bias", ".attn.bias", "v_head.", "value_head.")
"""Parts of the names of stored tensors that change no logit: old buffers, and a reward's value head."""
WARNS_EACH_TIME = "bitsandbytes.autograd._functions"
"""Says at every product of every layer that 8-bit weights round their input."""
AHEAD = ("mtp.", "mtp_layers.", "nextn.", "medusa", "eagle")
"""Beginnings of the names of modules that predict further tokens and are no part of plain decoding."""


def load_target(
    source: str,
    *,
    adapter: str | None = None,
    chat_template: str | None = None,
    template_args: Mapping[str, Any] | None = None,
    dtype: str = "auto",
    device: str | None = None,
    device_map: str | None = None,
    max_memory: str | None = None,
) -> Target:
    """Load a causal LM from a folder, a GGUF file or a Hub id, with an optional PEFT adapter on top.

    `dtype` is 'auto' (as stored; float32 of a GGUF file) or a torch dtype name. With `device_map` 'auto' its layers are spread over GPUs,
    memory and disk, of which `max_memory` ("0=20GiB,cpu=60GiB") gives the sizes; with 'tensor-parallel' the processes of
    this job share each layer. `chat_template` is a Jinja file,
    `template_args` are variables that it is given. Nothing is downloaded for a local path, no code of the
    folder is run, and no pickle is opened. Raises UserError when the folder or the adapter is not there, is
    no causal LM, does not hold exactly the weights of its config.json, or does not compute finite logits.
    """
    template = read_template(chat_template)
    torch_dtype = checked_source(source, dtype)
    config = read_config(source)
    tokenizer = read_tokenizer(source)
    _check_template_args(template_args or {}, template or str(tokenizer.chat_template), source)
    placed: dict[str, Any] = {}
    if device_map == TENSOR_PARALLEL:
        if max_memory is not None:
            raise UserError(f"--max-memory goes with --device-map {AUTO}, not {TENSOR_PARALLEL}")
        placed = shared_layers(source, config, adapter)
    elif device_map not in (None, AUTO):
        known = f"{AUTO}, {TENSOR_PARALLEL}"
        raise UserError(f"--device-map {device_map}: unknown; known: {known}")
    elif device_map or max_memory is not None:
        placed = {"device_map": layers_spread(source, config, torch_dtype, max_memory)}
    model = read_model(source, config, torch_dtype, placed=placed)
    if adapter is not None:
        model = with_adapter(model, adapter)
        note_unused(Path(adapter), tokenizer, chat_template)
    sources = [source] if adapter is None else [source, adapter]
    model = model if placed else on_device(model, device, source)
    found = Target(model, tokenizer, sources, template, template_args=template_args)
    _check_finite(found)
    check_reads_on(found)
    return found


def stored_in(target: Target, file: Path) -> Target:
    """`target` with the weights of a GGUF file that was made of it, in its dtype and on the CPU.

    Raises UserError for a file that Transformers does not read, or whose weights are not those of the target's model.
    """
    config = copy.deepcopy(target.model.config)
    model, info = gguf_file.read_model(file, config, target.dtype)
    _check_weights(str(file), model, info, lambda name: False)
    gguf_file.check_whole(file, model)
    model.generation_config = target.model.generation_config
    return Target(
        model, target.tokenizer, [str(file)], target.template, template_args=target.template_args
    )


def checked_source(source: str, dtype: str) -> torch.dtype | str:
    """The dtype to load in ('auto' stays). Raises UserError for no model folder, and no dtype."""
    where, file = Path(source), gguf_file.gguf_file(source)
    local = where.exists() or source.startswith((".", "/"))
    if local and file is None and not (where / "config.json").is_file():
        raise UserError(
            f"target {source}: expected a model folder with config.json, or a GGUF file; "
            f"{'found none in it' if where.exists() else 'no such folder'}"
        )
    if dtype == "auto":
        return dtype if file is None else torch.float32
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: unknown; known: auto, {', '.join(DTYPES)}")
    found: torch.dtype = getattr(torch, dtype)
    return found


def read_config(source: str) -> Any:
    """The configuration of a causal LM. Raises UserError for other models, by name."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    if file := gguf_file.gguf_file(source):
        config = gguf_file.read_config(file)
    else:
        with as_sentence(f"target {source}: its config.json could not be read"):
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        name = ", ".join(config.architectures or [type(config).__name__])
        sees = any(hasattr(config, part) for part in ("vision_config", "audio_config"))
        raise UserError(
            f"target {source} is {'a vision-language model' if sees else 'no causal language model'} "
            f"({name}); redraft reads text models: save its language model as a folder of its own, or let a "
            "server that runs it answer (--endpoint)"
        )
    _check_quantization(source, config)
    return config


def read_model(
    source: str,
    config: Any,
    dtype: torch.dtype | str,
    absent: Callable[[str], bool] | None = None,
    placed: Mapping[str, Any] | None = None,
) -> Any:
    """The model of `config` with the weights in its files, on the CPU or as options of `from_pretrained` place them.

    `absent` names the stored tensors that the caller left out of the model on purpose. Raises UserError
    naming the first weight that is missing, surplus or of another shape.
    """
    from transformers import AutoModelForCausalLM

    if file := gguf_file.gguf_file(source):
        assert isinstance(dtype, torch.dtype)
        model, info = gguf_file.read_model(file, config, dtype, placed)
        _check_weights(source, model, info, absent or (lambda name: False))
        if absent is None:
            gguf_file.check_whole(file, model)
        return model
    with as_sentence(f"target {source} could not be loaded"):
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            **(placed or {}),
        )
    logging.getLogger(WARNS_EACH_TIME).setLevel(logging.ERROR)
    _check_weights(source, model, info, absent or (lambda name: False))
    return model


def read_tokenizer(source: str) -> Any:
    """The tokenizer of a folder, a GGUF file or a Hub id. Raises UserError where it cannot be made from its files."""
    from transformers import AutoTokenizer

    if file := gguf_file.gguf_file(source):
        return gguf_file.read_tokenizer(file)
    with as_sentence(f"target {source}: its tokenizer could not be loaded"):
        found = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        if found.get_vocab().keys() <= found.get_added_vocab().keys():  # Transformers before 5.6
            raise UserError(
                f"target {source}: its tokenizer's files hold no tokens; copy them again"
            )
        return found


def on_device(model: Any, device: str | None, name: str) -> Any:
    """The model on its device (default: the first GPU, of several ranks each its own; else the CPU).

    Raises UserError where there is no such device, not enough memory, or no arithmetic in the model's dtype.
    """
    place = device or (f"cuda:{_own_gpu()}" if torch.cuda.is_available() else "cpu")
    try:
        model = model.to(place)
    except (RuntimeError, AssertionError, ValueError) as problem:  # out of memory, no such device
        raise UserError(
            f"target {name} cannot be put on device {place}: {reason(problem)}"
        ) from None
    parameter = next(model.parameters())
    check_computes(parameter.dtype, parameter.device, name)
    return model


def _own_gpu() -> int:
    return ranks.local() % torch.cuda.device_count()


def check_computes(dtype: torch.dtype, device: torch.device, name: str) -> None:
    """Raise UserError for a dtype in which this device computes no product and no attention."""
    try:
        x = torch.ones(1, 1, 2, 8, device=device, dtype=dtype)
        product = torch.nn.functional.linear(x, x[0, 0])
        attended = torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        finite = bool(torch.isfinite(product).all() & torch.isfinite(attended).all())
    except (RuntimeError, NotImplementedError) as problem:
        raise UserError(
            f"target {name} is in {str(dtype).removeprefix('torch.')}, in which {device} does not compute "
            f"({reason(problem)}); load it in another with --dtype, for example bfloat16"
        ) from None
    assert finite, f"{dtype} on {device}: a product of ones is not finite"


def _check_quantization(source: str, config: Any) -> None:
    """Refuse weights whose way of quantisation Transformers does not know: it would drop the scales."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return
    method = stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method
    known = {str(name) for name in AUTO_QUANTIZATION_CONFIG_MAPPING}
    if isinstance(stored, dict) and (stored.get("load_in_4bit") or stored.get("load_in_8bit")):
        method = method or "bitsandbytes_4bit"
    if str(method) not in known | {"bitsandbytes"}:
        raise UserError(
            f"target {source} is stored as quantised by '{method}' (quantization_config), which Transformers "
            "does not read; adapt on the unquantised weights, or let a server that runs it answer (--endpoint)"
        )


def _check_weights(
    source: str, model: Any, info: dict[str, Any], absent: Callable[[str], bool]
) -> None:
    """Raise UserError unless every weight of the model comes from its files, and the other way round."""
    total = len(model.state_dict())
    surplus = sorted(
        name
        for name in info["unexpected_keys"]
        if not absent(name) and not _never_reached(name) and not _ahead(name, model.config)
    )
    missing = sorted(name for name in info["missing_keys"] if not _never_reached(name))
    shapes = sorted(info["mismatched_keys"], key=lambda entry: entry[0])
    if missing:
        prefix = _common_prefix(missing, surplus)
        hint = (
            f"they are there under names that begin with '{prefix}': the weights were saved from inside a "
            "wrapper; rename them and run again"
            if prefix
            else f"the files hold {len(surplus)} others instead, first {surplus[0]}"
            if surplus
            else "the folder is no whole copy, or its config.json is another model's"
        )
        raise UserError(
            f"target {source}: {len(missing)} of its {total} weights are not in its files, first {missing[0]}; "
            f"{hint}"
        )
    if shapes:
        name, stored, wanted = shapes[0]
        raise UserError(
            f"target {source}: {len(shapes)} of its {total} weights have another shape than config.json says, "
            f"first {name}: expected {tuple(wanted)}, found {tuple(stored)}"
        )
    if surplus:
        scaled = any("scale" in name or "zero_point" in name for name in surplus)
        raise UserError(
            f"target {source}: its files hold {len(surplus)} tensors that its model does not take, first "
            f"{surplus[0]}"
            + (
                "; they scale quantised weights, which config.json does not describe: adapt on the unquantised "
                "weights, or let a server that runs it answer (--endpoint)"
                if scaled
                else "; is config.json this model's? Remove what does not belong to it"
            )
        )
    if info["error_msgs"]:
        raise UserError(f"target {source} could not be loaded: {info['error_msgs'][0]}")


def _never_reached(name: str) -> bool:
    return any(part in name for part in (*NOT_TEXT, *NOT_THE_MODEL))


def _ahead(name: str, config: Any) -> bool:
    """Whether a stored tensor belongs to layers that predict further tokens."""
    text = config.get_text_config()
    if any(name.removeprefix("model.").startswith(part) for part in AHEAD):
        return True
    number = next((word for word in name.split(".") if word.isdigit()), None)
    more = getattr(text, "num_nextn_predict_layers", None) or 0
    n = text.num_hidden_layers
    return number is not None and n <= int(number) < n + more


def _common_prefix(missing: Iterable[str], surplus: Iterable[str]) -> str:
    """What the surplus names have in front of the missing ones; '' where they are other names."""
    absent = set(missing)
    fronts = {
        name[: -len(end)]
        for name in surplus
        for end in (name[at + 1 :] for at, sign in enumerate(name) if sign == ".")
        if end in absent
    }
    return min(fronts, key=len) if fronts else ""


def _check_template_args(given: Mapping[str, Any], template: str, name: str) -> None:
    """Raise UserError for a variable that the chat template does not read, most likely misspelt, or that is
    not its own."""
    try:
        check_variables(given)
    except ValueError as problem:
        raise UserError(f"--template-arg: {problem}") from None
    unread = [variable for variable in given if variable not in template]
    if unread:
        raise UserError(
            f"--template-arg {unread[0]}: the chat template of {name} reads no variable of that name"
        )


def _check_finite(target: Target) -> None:
    """Raise UserError for weights or first logits that are not finite numbers."""
    for name, weight in target.model.named_parameters():
        # Quantised ones are integers and scales, of which the logits tell; those on the disk are not read for it.
        plain = type(weight.data) is torch.Tensor and not weight.is_meta
        floats = weight.is_floating_point() and weight.element_size() > 1
        if weight.numel() and floats and plain:
            low, high = weight.aminmax()
            if not bool(torch.isfinite(low) & torch.isfinite(high)):
                raise UserError(
                    f"target {target.name}: its weight {name} holds values that are not finite (NaN or "
                    "infinity): its training diverged, or the file is damaged"
                )
    tokens = torch.tensor([[0, min(1, target.vocab_size - 1)]], device=target.device)
    with as_sentence(f"target {target.name} does not compute"), torch.no_grad():
        logits = target.read(tokens, (), keep=1).logits_BTV
    if not bool(torch.isfinite(logits).all()):
        raise UserError(
            f"target {target.name}: its first logits are not finite, though its weights are; in "
            f"{str(target.dtype).removeprefix('torch.')} it may overflow: try another --dtype (float32)"
        )
