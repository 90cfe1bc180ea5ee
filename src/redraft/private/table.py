"""The private parts redraft can train: one row per method.

A row says which tensors are private: an expert beside the shared FFN, and patterns of the shared
tensors that are trained in place (stored in the private part, replaced on export). Everything
else is shared and stays frozen.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch


@dataclass(frozen=True)
class Method:
    """What a method owns. `fresh` methods start from new weights instead of the reused draft."""

    expert: bool
    in_place: tuple[str, ...]
    fresh: bool = False
    says: str = ""

    def owns(self, name: str) -> bool:
        """Whether a tensor of this name is private under the method."""
        if ".private." in name:
            return self.expert
        return any(fnmatch(name, pattern) for pattern in self.in_place)


METHODS: dict[str, Method] = {
    "expert": Method(True, (), says="private FFN neurons beside the shared ones"),
    "expert+fc": Method(
        True,
        ("fc.weight", "*norm.weight"),
        says="expert, plus the feature interface fc and the norms trained in place",
    ),
    "full": Method(False, ("*",), says="every trainable tensor, warm start"),
    "scratch": Method(False, ("*",), fresh=True, says="every trainable tensor, from nothing"),
}
