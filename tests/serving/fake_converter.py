"""A stand-in for llama.cpp's converter and what it imports, installed as each of these modules.

The file that it writes tells what it was asked.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


class AutoTokenizer:
    """Of `transformers`."""

    @classmethod
    def from_pretrained(cls, folder: Any, trust_remote_code: bool = False) -> bool:
        return trust_remote_code


AutoConfig = AutoTokenizer


class TextModel:
    """Of `conversion.base`."""

    def __init__(self, folder: Path) -> None:
        self.dir_model = folder

    def get_vocab_base_pre(self, tokenizer: Any) -> str:
        if os.path.exists(self.dir_model / "own-splitting"):  # noqa: PTH110
            raise NotImplementedError("BPE pre-tokenizer was not recognized")
        return "known"

    def _create_vocab_sentencepiece(self) -> str:
        raise ModuleNotFoundError("No module named 'sentencepiece'")


def main() -> None:
    """Of `convert_hf_to_gguf`."""
    from conversion.base import TextModel as Model  # type: ignore[import-not-found]
    from transformers import AutoTokenizer as Tokenizer

    given = dict(zip(sys.argv[2::2], sys.argv[3::2], strict=True))
    folder = Path(sys.argv[1])
    if (folder / "refused").exists():
        raise ValueError("Can not map tensor 'fc_norm.weight'")
    model = Model(folder)
    try:
        vocabulary = model._create_vocab_sentencepiece()
    except FileNotFoundError:
        vocabulary = model.get_vocab_base_pre(None)
    trusted = Tokenizer.from_pretrained(folder, trust_remote_code=True)
    about = {"folder": str(folder), "given": given, "vocabulary": vocabulary, "trusted": trusted}
    Path(given["--outfile"]).write_text(json.dumps(about))
