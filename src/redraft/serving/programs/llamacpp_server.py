"""llama.cpp's HTTP server out of the package xllamacpp, with the flags of `llama-server` that it has.

    python llamacpp_server.py --model TARGET.gguf --port PORT [more flags of llama-server]

Runs until it is ended. A model that cannot be loaded ends it with exit code 1.
"""

from __future__ import annotations

import argparse
import signal
from typing import Any

NUMBERS = {
    "--ctx-size -c": "n_ctx",
    "--parallel -np": "n_parallel",
    "--port": "port",
    "--batch-size -b": "n_batch",
    "--ubatch-size -ub": "n_ubatch",
    "--gpu-layers --n-gpu-layers -ngl": "n_gpu_layers",
    "--main-gpu -mg": "main_gpu",
    "--cache-reuse": "n_cache_reuse",
    "--cache-ram -cram": "cache_ram_mib",
    "--threads -t": "cpuparams.n_threads",
    "--threads-batch -tb": "cpuparams_batch.n_threads",
    "--poll": "cpuparams.poll",
    "--spec-draft-threads --threads-draft -td": "speculative.draft.cpuparams.n_threads",
    "--spec-draft-threads-batch -tbd": "speculative.draft.cpuparams_batch.n_threads",
    "--spec-draft-ngl --gpu-layers-draft -ngld": "speculative.draft.n_gpu_layers",
    "--spec-draft-n-max": "speculative.draft.n_max",
    "--spec-draft-n-min": "speculative.draft.n_min",
}
FRACTIONS = {"--spec-draft-p-min": "speculative.draft.p_min"}
TEXTS = {
    "--model -m": "model.path",
    "--spec-draft-model --model-draft -md": "speculative.draft.mparams.path",
}
SWITCHES = {
    "--cache-prompt": "cache_prompt",
    "--cont-batching": "cont_batching",
    "--kv-unified": "kv_unified",
    "--metrics": "endpoint_metrics",
    "--spec-draft-backend-sampling": "speculative.draft.backend_sampling",
    "--swa-full": "swa_full",
    "--ui": "ui",
    "--warmup": "warmup",
}
"""Each has a `--no-` form."""
CACHE_TYPES = {
    "--cache-type-k -ctk": "cache_type_k",
    "--cache-type-v -ctv": "cache_type_v",
    "--spec-draft-type-k -ctkd": "speculative.draft.cache_type_k",
    "--spec-draft-type-v -ctvd": "speculative.draft.cache_type_v",
}
CACHE_NAMES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")
ATTENTION = {"on": "ENABLED", "off": "DISABLED", "auto": "AUTO"}


def main() -> None:
    arguments = read_arguments()
    import xllamacpp

    params = xllamacpp.CommonParams()
    for place, value in vars(arguments).items():
        put(params, place, named_value(xllamacpp, place, value))
    kept = xllamacpp.Server(params)  # the server runs as long as this object lives
    print(f"listening on {kept.listening_address}", flush=True)  # noqa: T201 - a script
    signal.pause()


def read_arguments() -> argparse.Namespace:
    """The given flags, under the places of their values."""
    parser = argparse.ArgumentParser(allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for flags, kind in ((NUMBERS, int), (FRACTIONS, float), (TEXTS, str)):
        for names, place in flags.items():
            parser.add_argument(*names.split(), type=kind, dest=place)
    for name, place in SWITCHES.items():
        parser.add_argument(name, action=argparse.BooleanOptionalAction, dest=place)
    for names, place in CACHE_TYPES.items():
        parser.add_argument(*names.split(), choices=CACHE_NAMES, dest=place)
    parser.add_argument("--flash-attn", "-fa", choices=ATTENTION, dest="flash_attn_type")
    parser.add_argument("--spec-type", dest="speculative.types")
    return parser.parse_args()


def named_value(xllamacpp: Any, place: str, value: Any) -> Any:
    """The value as xllamacpp has it: a member of one of its enumerations for some names."""
    if place in CACHE_TYPES.values():
        return getattr(xllamacpp.ggml_type, f"GGML_TYPE_{value.upper()}")
    if place == "flash_attn_type":
        kinds = xllamacpp.llama_flash_attn_type
        return getattr(kinds, f"LLAMA_FLASH_ATTN_TYPE_{ATTENTION[value]}")
    if place == "speculative.types":
        return [speculation(xllamacpp.common_speculative_type.__members__, value)]
    return value


def speculation(kinds: Any, name: str) -> Any:
    """The kind of speculation of that name. Ends the process where this version has none."""
    prefix = "COMMON_SPECULATIVE_TYPE_"
    by_name = {k.removeprefix(prefix).lower().replace("_", "-"): kind for k, kind in kinds.items()}
    if name not in by_name:
        raise SystemExit(
            f"this version has no --spec-type {name}; it has {', '.join(sorted(by_name))}"
        )
    return by_name[name]


def put(params: Any, place: str, value: Any) -> None:
    *path, last = place.split(".")
    for name in path:
        params = getattr(params, name)
    setattr(params, last, value)


if __name__ == "__main__":
    main()
