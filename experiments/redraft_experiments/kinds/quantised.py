"""Stored forms of a model with fewer bits, each made by the library that serving uses, one row each."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redraft.serving.engines import engine_named
from redraft.serving.llamacpp import convert


@dataclass(frozen=True)
class Form:
    """How a form is made: of the model's folder, into a folder, with a Python that has llama.cpp where it needs that."""

    says: str
    make: Callable[[Path, Path, str | None], None]


def _gguf(outtype: str) -> Callable[[Path, Path, str | None], None]:
    def make(model: Path, out: Path, python: str | None) -> None:
        engine = engine_named("llama.cpp")
        found = convert(engine.find(python), model, outtype, out.parent / "converted")
        out.mkdir(parents=True, exist_ok=True)
        for file in model.iterdir():
            if file.suffix in (".json", ".jinja"):
                shutil.copyfile(file, out / file.name)
        shutil.copyfile(found, out / f"{out.name}.gguf")

    return make


def _bitsandbytes(**bits: Any) -> Callable[[Path, Path, str | None], None]:
    def make(model: Path, out: Path, python: str | None) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

        made = AutoModelForCausalLM.from_pretrained(
            model,
            quantization_config=BitsAndBytesConfig(**bits),
            dtype="auto",
            trust_remote_code=False,
        )
        made.save_pretrained(out)
        AutoTokenizer.from_pretrained(model, trust_remote_code=False).save_pretrained(out)

    return make


FORMS = {
    "q8_0": Form("llama.cpp, 8 bits", _gguf("q8_0")),
    "q4_k_m": Form("llama.cpp, 4 to 6 bits", _gguf("q4_k_m")),
    "q3_k_m": Form("llama.cpp, 3 to 5 bits", _gguf("q3_k_m")),
    "q2_k": Form("llama.cpp, 2 to 4 bits", _gguf("q2_k")),
    "int8": Form("bitsandbytes, LLM.int8()", _bitsandbytes(load_in_8bit=True)),
    "nf4": Form(
        "bitsandbytes, 4 bits", _bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    ),
}
