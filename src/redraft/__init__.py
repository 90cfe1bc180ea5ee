"""redraft: re-align a speculative-decoding draft model with a fine-tuned LLM, and prove it.

    from redraft import load_target, load_draft, adapt, generate, measure

`import redraft` loads no torch; the parts are imported when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoints.load import load_draft
    from .decoding.transformers_generate import generate
    from .metrics.measure import measure
    from .models.loading import load_target
    from .pipeline.adapt import adapt

__version__ = "0.1.0"
__all__ = ["adapt", "generate", "load_draft", "load_target", "measure"]

_HOMES = {
    "adapt": "pipeline.adapt",
    "generate": "decoding.transformers_generate",
    "load_draft": "checkpoints.load",
    "load_target": "models.loading",
    "measure": "metrics.measure",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module 'redraft' has no attribute '{name}'")
