"""Settings that are given as text, as values: a width, a budget, learning rates, servers.

Each reader raises ValueError with what was expected and what was found. Methods are read in
`adapters/table.py`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from ..adapters.table import ADAPTERS
from ..core.errors import UserError, nearest

LARGEST_SHARE = 8.0
Width = int | float
"""Neurons of an expert: a number (64), or a share of the shared FFN's (0.25) where it is a float."""


TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")
"""The experiment trackers that training can be followed with."""


def read_trackers(text: str) -> tuple[str, ...]:
    """Names joined by commas. Raises ValueError for an unknown one."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if name not in TRACKERS:
            raise ValueError(f"names the tracker '{name}'; {nearest(name, TRACKERS)}")
    return names


@dataclass(frozen=True)
class Budget:
    """How many samples are kept: a `count`, a `share`, `tokens`, or what `auto` finds to pay."""

    text: str
    kind: str
    number: float

    @property
    def auto(self) -> bool:
        return self.kind == "auto"


def read_width(text: str) -> Width | None:
    """`train.width`; None for 'auto'."""
    if text == "auto":
        return None
    try:
        width = float(text) if "." in text else int(text)
    except ValueError:
        width = 0
    if 0 < width <= (LARGEST_SHARE if isinstance(width, float) else 1 << 30):
        return width
    raise ValueError(
        f"must be a number of neurons (64), a share of the shared ones (0.25, 1.0, at most 8.0) or auto; got '{text}'"
    )


def read_budget(text: str) -> Budget:
    """`select.budget`: 500, 0.5, 20000t or auto."""
    word = text.strip()
    try:
        if word == "auto":
            return Budget(word, "auto", 0)
        kind = "tokens" if word.endswith("t") else "share" if "." in word else "count"
        number = float(word) if kind == "share" else int(word.removesuffix("t"))
        if number > 0 and (kind != "share" or number <= 1):
            return Budget(word, kind, number)
    except ValueError:
        pass
    raise ValueError(
        "is not a count (500), a share between 0 and 1 (0.5), a number of tokens (20000t) or auto; "
        f"got '{text}'"
    )


def read_shares(text: str) -> dict[str, float]:
    """`train.lr_parts` by adapter."""
    shares: dict[str, float] = {}
    for pair in filter(None, text.split(",")):
        adapter, _, number = pair.partition("=")
        try:
            shares[adapter] = float(number)
        except ValueError:
            shares[adapter] = 0.0
        if adapter not in ADAPTERS or not 0 < shares[adapter] < math.inf:
            raise ValueError(
                f"takes adapter=multiple pairs ('expert=2,fc=0.5') of {', '.join(ADAPTERS)}; got '{pair}'"
            )
    return shares


_BARE = re.compile(r"(https?)://(?:[^@/?#,]*@)?([^@/?#,\s]+(?:/[^@?#,\s]*)?)(?:[?#][^@]*)?")
"""A URL in which it is clear where a user, a password or a query begins and ends."""


def read_endpoints(text: str) -> tuple[str, ...]:
    """`regenerate.endpoints`, each as its root URL: without a last slash or /v1.

    A user, a password or a query in a URL is refused without being repeated, as settings are stored.
    """
    if set(text) & set("@?#"):
        bare = _BARE.fullmatch(text.strip())
        raise ValueError(
            "takes no user, password or query in a URL, because settings are stored; give "
            f"{'://'.join(bare.groups()) if bare else 'the rest'} and put the key into the environment "
            "variable REDRAFT_API_KEY"
        )
    found: list[str] = []
    for url in filter(None, (part.strip() for part in text.split(","))):
        try:
            parts = urlsplit(url)
            usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            usable = False
        if not usable:
            raise ValueError(
                "takes URLs of OpenAI-compatible servers (http://127.0.0.1:8000, "
                f"https://host/v1); got '{url}'"
            )
        shown = f"{parts.scheme}://{parts.netloc}{parts.path}"
        root = shown.rstrip("/").removesuffix("/v1").rstrip("/")
        if root in found:
            raise ValueError(f"names {root} twice; --concurrency sets the requests to one server")
        found.append(root)
    return tuple(found)


def read_format(text: str) -> None:
    """Raise ValueError for an export format that no kind of draft has."""
    if text != "auto":
        from ..drafts.kinds import format_named  # the networks need torch

        try:
            format_named(text)
        except UserError as problem:
            raise ValueError(f"names an {problem}") from None
