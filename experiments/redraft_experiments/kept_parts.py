"""What took long to make and is small enough to ship: the base's draft and a fine-tune of the suite of real models.

    kept/smollm2/draft/           the draft without its head, whose rows are the base's own (see `real_drafts.py`)
    kept/smollm2/medical-lora/    the fine-tune, a LoRA adapter in bf16

`pack` makes the folder from a suite, `restore` puts the parts next to a base, to the last bit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from redraft.checkpoints.load import PROVENANCE, interpret, read_draft
from redraft.core.errors import UserError
from redraft.core.files import write_bytes, write_tensors
from redraft.core.folders import WEIGHTS, find_folder, read_json, read_tensors
from redraft.models.loading import load_target

KEPT = Path(__file__).parent / "kept" / "smollm2"
DRAFT, MEMBER = "draft", "medical-lora"
HEAD = "lm_head.weight"
ADAPTER, SETTINGS = "adapter_model.safetensors", "adapter_config.json"


def pack(suite: Path, out: Path = KEPT) -> None:
    """Keep the draft and the fine-tune of a suite in `out`.

    Raises UserError for a draft whose head is not the base's rows, which could not be restored.
    """
    draft = read_draft(str(suite / DRAFT))
    rows = _rows(suite / "base", draft.tensors)
    if not torch.equal(rows, draft.tensors[HEAD]):
        raise UserError(f"{suite / DRAFT}: its head is not the base's, so it cannot be left out")
    body = {name: tensor for name, tensor in draft.tensors.items() if name != HEAD}
    write_tensors(out / DRAFT / WEIGHTS, body)
    for name in ("config.json", PROVENANCE):
        write_bytes(out / DRAFT / name, (suite / DRAFT / name).read_bytes())
    member = suite / "members" / MEMBER
    lora = {name: t.to(torch.bfloat16) for name, t in load_file(member / ADAPTER).items()}
    write_tensors(out / MEMBER / ADAPTER, lora)
    settings = read_json(member / SETTINGS)
    settings["base_model_name_or_path"] = "HuggingFaceTB/SmolLM2-135M-Instruct"
    write_bytes(out / MEMBER / SETTINGS, (json.dumps(settings, indent=2) + "\n").encode())


def restore(base: Path, out: Path, kept: Path = KEPT) -> None:
    """Write the kept draft into the folder `out`, with the head of the model in `base`.

    Raises UserError where nothing is kept, and for a base that is not the one the draft was made of.
    """
    folder = kept / DRAFT
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder} holds no draft; build one with redraft bench real")
    tensors = read_tensors(find_folder(str(folder)))
    tensors[HEAD] = _rows(base, tensors)
    try:
        made = interpret(folder, read_json(folder / "config.json"), tensors)
    except UserError:
        raise UserError(
            f"{base} is not the model that the kept draft was trained for: with this head it is another draft; give the "
            "base of the kept parts (redraft bench model smollm2)"
        ) from None
    made.save(out)


def _rows(base: Path, tensors: Mapping[str, Tensor]) -> Tensor:
    """The base's head, in the rows of the draft's vocabulary."""
    head = load_target(str(base)).head_VH
    if head is None:
        raise UserError(f"{base} has no output head of plain rows")
    offsets = tensors["d2t"]
    return head[offsets + torch.arange(len(offsets))].clone()
