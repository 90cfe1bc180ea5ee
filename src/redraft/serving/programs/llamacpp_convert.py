"""llama.cpp's own converter to GGUF, with three differences.

    python llamacpp_convert.py LLAMA_CPP [the arguments of LLAMA_CPP/convert_hf_to_gguf.py]

- Code of a model's folder is never run, whatever the converter asks of Transformers.
- A tokenizer whose way of splitting text the converter does not know is stored as "default" instead of
  refused, and this is printed. Token ids mean the same; only text from a client is split otherwise.
- The package sentencepiece is needed only for a folder that has a tokenizer.model.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

OTHER_SPLITTING = "llamacpp_convert: unknown way of splitting text, stored as 'default'"


def main() -> None:
    sys.path.insert(0, sys.argv.pop(1))
    run_no_code_of_models()
    model = import_module("conversion.base").TextModel
    take_any_splitting(model)
    look_for_sentencepiece_last(model)
    import_module("convert_hf_to_gguf").main()


def run_no_code_of_models() -> None:
    transformers = import_module("transformers")
    for kind in (transformers.AutoTokenizer, transformers.AutoConfig):
        kind.from_pretrained = without_code(kind.from_pretrained)


def without_code(load: Any) -> Any:
    def loading(*arguments: Any, **options: Any) -> Any:
        return load(*arguments, **{**options, "trust_remote_code": False})

    return loading


def take_any_splitting(model: Any) -> None:
    known = model.get_vocab_base_pre

    def splitting(self: Any, tokenizer: Any) -> str:
        try:
            return str(known(self, tokenizer))
        except NotImplementedError:
            print(OTHER_SPLITTING, flush=True)  # noqa: T201 - a script
            return "default"

    model.get_vocab_base_pre = splitting


def look_for_sentencepiece_last(model: Any) -> None:
    read = model._create_vocab_sentencepiece

    def reading(self: Any) -> Any:
        file = self.dir_model / "tokenizer.model"
        if not file.is_file():
            raise FileNotFoundError(f"File not found: {file}")
        return read(self)

    model._create_vocab_sentencepiece = reading


if __name__ == "__main__":
    main()
