"""The model card next to an exported draft: what it is, for whom, how made, how to serve it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from ..drafts.kind import Layout, Shape

FACTS = {
    "target": "target",
    "target_fingerprint": "target fingerprint",
    "tokenizer_hash": "tokenizer hash",
    "template_hash": "chat template hash",
    "shared": "shared draft",
    "shared_hash": "shared draft's hash",
    "adapter_hash": "adapter's hash",
    "tensors_hash": "hash of these tensors",
    "method": "adapter",
    "samples": "answers trained on",
    "zero_neurons": "neurons of zeros for tensor parallelism",
}


def model_card(kind: str, layout: Layout, shape: Shape, provenance: Mapping[str, Any]) -> str:
    """README.md of an exported draft: a header for the Hub, then what its record knows."""
    target = provenance.get("target", "not recorded")
    header = {"library_name": "redraft", "tags": ["speculative-decoding", kind, "draft-model"]}
    if str(target).count("/") == 1 and not str(target).startswith((".", "/")):
        header["base_model"] = str(target)
    facts = [
        f"| {label} | `{provenance[key]}` |" for key, label in FACTS.items() if key in provenance
    ]
    facts.append(f"| FFN width | `{shape.intermediate_size}` |")
    settings = provenance.get("config") or {}
    recipe = yaml.safe_dump({"train": settings}, sort_keys=False) if settings else "not recorded\n"
    return "\n".join(
        [
            f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
            f"# A draft of kind {kind} for {target}\n",
            "A draft proposes tokens and the target decides, so it changes how fast the target "
            "answers and never what it answers. It fits this target only: for another one measure "
            "it first with `redraft measure`.\n",
            f"## Serve it (format `{layout.name}`)\n\n```\n{layout.serve}\n```\n",
            "| | |\n|---|---|\n" + "\n".join(facts) + "\n",
            f"## How it was trained\n\n```yaml\n{recipe}```\n",
            "## Licence\n\nA draft carries the terms of the draft it was made from and of the target "
            "whose answers it was trained on. This card does not grant a licence: check both before "
            "you publish it.\n",
            "Hashes are over tensors as redraft names them; `redraft.json` holds the full "
            "record.\n",
        ]
    )
