"""Model folders of safetensors: read whole with errors that name the file; written manifest last."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .config_values import ConfigValues, shown
from .errors import UserError
from .files import remove, write_bytes, write_tensors, write_text

WEIGHTS = "model.safetensors"
PICKLE = "pytorch_model.bin"
MOST_NESTED = 64
"""Levels of a JSON file that is read; code that walks through it calls itself."""


def find_folder(source: str, *, unpickle: bool = False) -> Path:
    """A local folder, or the local snapshot of a Hub id (downloaded if it is not cached)."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists() or source.startswith((".", "/")) or source.count("/") != 1:
        raise UserError(
            f"draft {source}: expected a folder with config.json and {WEIGHTS}, or a Hub id "
            "(org/name); no such folder"
        )
    from huggingface_hub import snapshot_download

    companions = ["*.json", "*.jinja", "merges.txt", "tokenizer.model"]
    wanted = [*companions, "*.safetensors", *(["*.bin"] if unpickle else [])]
    try:
        return Path(snapshot_download(source, allow_patterns=wanted))
    except Exception as problem:  # noqa: BLE001 - the Hub's client and its HTTP library raise many kinds
        raise UserError(
            f"draft {source} is no local folder, and the Hub reported: {problem}"
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        here = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
        raise UserError(
            f"{path.parent}: expected a file {path.name}, found {', '.join(here) or 'nothing'}"
        )
    try:
        loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as problem:  # not JSON, not even text, or nested too deep
        raise UserError(f"{path} is not valid JSON: {problem}") from None
    except OSError as problem:
        raise UserError(f"{path} could not be read: {problem}") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: expected a JSON object, found a {type(loaded).__name__}")
    if _too_deep(loaded):
        raise UserError(f"{path}: JSON is nested more than {MOST_NESTED} levels deep")
    return loaded


def _too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MOST_NESTED):
        level = [
            inner
            for item in level
            if isinstance(item, dict | list)
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
    return bool(level)


def read_tensors(folder: Path, *, unpickle: bool = False) -> dict[str, Tensor]:
    """Every tensor of a folder, single-file or sharded, on the CPU in its stored dtype.

    A pickle (`.bin`) is opened only with `unpickle`, and then by a loader that accepts nothing but
    tensors. Raises UserError for a missing, damaged or refused file.
    """
    kinds = [(WEIGHTS, read_file), *([(PICKLE, _read_pickle)] if unpickle else [])]
    for single, read in kinds:
        if (folder / single).is_file():  # before an index, as Transformers has it
            return read(folder / single)
        index = folder / f"{single}.index.json"
        if index.is_file():
            return _read_shards(index, read)
    pickles = sorted(p.name for p in folder.glob("*.bin"))
    if pickles:
        raise UserError(
            f"{folder}: found only the pickle {pickles[0]}. Opening a pickle can run code of "
            "whoever made it; if you trust it, convert it once with redraft export --allow-pickle "
            f"--draft {folder} --out NEW"
        )
    found = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
    raise UserError(f"{folder}: expected {WEIGHTS} or {WEIGHTS}.index.json; found {found}")


def _read_shards(index: Path, read: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Every tensor that an index lists, from the file that it names for it, whatever others hold."""
    files: dict[str, list[str]] = {}
    for tensor, file in ConfigValues(read_json(index), str(index)).inside("weight_map").raw.items():
        if not isinstance(file, str) or Path(file).name != file or file == "..":
            raise UserError(
                f"{index}: {shown(file)}, named for {tensor}, is no file name; shards lie next to the "
                "index"
            )
        files.setdefault(file, []).append(tensor)
    tensors: dict[str, Tensor] = {}
    for file, listed in files.items():
        held = read(index.parent / file)
        missing = [tensor for tensor in listed if tensor not in held]
        if missing:
            raise UserError(
                f"{index} lists {', '.join(missing[:3])} in {file}, which does not hold "
                f"{'it' if len(missing) == 1 else 'them'}: the index belongs to other files; "
                "download the folder again"
            )
        tensors.update({tensor: held[tensor] for tensor in listed})
    if not tensors:
        raise UserError(f"{index}: expected an object weight_map of tensors and files, found none")
    return tensors


def tensor_files(folder: Path) -> dict[str, str]:
    """Which safetensors file of a folder holds each tensor, read from the files' headers alone.

    Raises UserError for no such file, a damaged one, and a tensor that two of them hold.
    """
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as stream:
                names = list(stream.keys())
        except (SafetensorError, OSError, ValueError) as problem:
            raise UserError(
                f"{path} is not a whole safetensors file ({problem}); copy it again"
            ) from None
        for name in names:
            if name in found:
                raise UserError(
                    f"{folder}: {found[name]} and {path.name} both hold {name}; remove the stale file"
                )
            found[name] = path.name
    if not found:
        raise UserError(f"{folder}: expected safetensors files with tensors, found none")
    return found


def read_some(folder: Path, files: Mapping[str, str]) -> dict[str, Tensor]:
    """The named tensors, each from its file, without reading the others."""
    tensors = {}
    for file in sorted(set(files.values())):
        with safe_open(folder / file, framework="pt") as stream:
            tensors.update({n: stream.get_tensor(n) for n, f in files.items() if f == file})
    return tensors


def _read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.bin` file, through the loader that refuses everything else."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: listed in the index but missing; download it again") from None
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
        OSError,
    ) as problem:
        reason = " ".join(str(problem).split())[:200]
        raise UserError(
            f"{path}: refused, or not a whole file: a pickle may hold tensors and nothing else "
            f"({reason})"
        ) from None
    if not isinstance(loaded, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in loaded.items()
    ):
        raise UserError(f"{path}: expected a mapping of names to tensors, found other objects")
    return loaded


def read_file(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file. Raises UserError when it is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as stream:
            return {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(f"{path}: listed in the index but missing; download it again") from None
    except (SafetensorError, OSError, ValueError) as problem:
        raise UserError(
            f"{path} is not a whole safetensors file ({problem}); copy it again"
        ) from None


def write_folder(
    folder: Path, tensors: Mapping[str, Tensor], files: Mapping[str, str | bytes]
) -> None:
    """Write tensors and other files; each file appears whole or not at all.

    The last of `files` is the manifest, without which the folder is not read: an old one goes first,
    so that it never lies next to the new tensors, and the new one comes last.
    """
    remove(folder / list(files)[-1])
    write_tensors(folder / WEIGHTS, tensors)
    for name, content in files.items():
        if isinstance(content, str):
            write_text(folder / name, content)
        else:
            write_bytes(folder / name, content)


def tensor_hash(tensor: Tensor) -> str:
    """A short hash of a tensor's dtype, shape and bytes."""
    raw = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{raw.dtype} {tuple(raw.shape)} ".encode())
    digest.update(raw.view(-1).view(torch.uint8).numpy().tobytes() if raw.numel() else b"")
    return digest.hexdigest()[:16]


def state_hash(tensors: Mapping[str, Tensor]) -> str:
    """A short hash of a whole set of named tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensor_hash(tensors[name])}\n".encode())
    return digest.hexdigest()[:16]
