"""`redraft fleet check --endpoint`: the same of adapters that a running vLLM serves with one draft, by its counters.

No weights are read. Each adapter's prompts are asked of the base and of the adapter, one group after another; a quiet moment
is wanted, as what other clients ask is counted too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from ..check.counting_server import GROUPS, Counted, CountingServer, ask_all, read_asked
from ..check.evidence import ANSWERING
from ..config import RegenerateConfig
from ..core.console import say
from ..core.errors import UserError, check_known
from ..core.visible import visible
from .check import LEAST, Counts, FleetCheck, checked, ordered
from .member import Member

STRANGERS = 0.1
"""Above this share of the counted tokens a line warns that others may have asked."""


def check_served_fleet(
    url: str,
    members: Sequence[Member],
    *,
    base: str | None = None,
    rows: int = 1,
    most: int = 16,
    answering: RegenerateConfig = ANSWERING,
    template_args: Mapping[str, Any] | None = None,
    transport: httpx.BaseTransport | None = None,
) -> FleetCheck:
    """Ask up to `most` prompts of each member, whose names are those that the server calls its models, `rows` at a time.

    `base` is what it calls the base, by default the one model that has no parent. `template_args` are variables for the chat
    template that it uses. Tau has intervals over groups of prompts. Raises UserError for a server that cannot be reached, does not
    speculate, or does not serve a member.
    """
    with CountingServer(url, template_args, transport) as server:
        served = server.models()
        plain = base or _base_of(server.url, served)
        check_known("model of the server", [plain, *(m.name for m in members if m.adapter)], served)
        most = max(most, LEAST * rows, GROUPS)
        asked = {member.name: read_asked(member.prompts, most, 1) for member in members}
        total, k, found = sum(member.share for member in members), 0, []
        for member in members:
            say(f"{member.name}: {len(asked[member.name])} prompts")
            own = on_base = _ask(server, plain, asked[member.name], answering, rows)
            if member.adapter is not None:
                own = _ask(server, member.name, asked[member.name], answering, rows)
            k = max(k, own.k)
            share = member.share / total
            counts, theirs = _by_group(own), _by_group(on_base)
            found.append(checked(member.name, counts, theirs, own.k, share, prompts=own.answered))
    return FleetCheck(plain, server.url, k, ordered(found))


def _ask(
    server: CountingServer, name: str, asked: Any, how: RegenerateConfig, rows: int
) -> Counted:
    rows = min(
        rows, len(asked) // LEAST
    )  # a group fills the places, and there are to be enough groups
    found = ask_all(server, name, asked, how, rows)
    if found.answered < GROUPS or not found.whole.drafts:
        raise UserError(
            f"{server.url} answered {found.answered} of {len(asked)} prompts as {visible(name)} and drafted "
            f"{found.whole.drafted} tokens; expected {GROUPS} answers, with a draft (--speculative-config)"
            + (f"; first refusal: {server.refusal}" if server.refusal else "")
        )
    if found.others > STRANGERS:
        say(
            f"{visible(name)}: {found.others:.0%} of the tokens that {server.url} counted were not asked for here; where others ask "
            "it meanwhile, its tau is not this model's: check in a quiet moment"
        )
    return found


def _by_group(found: Counted) -> Counts:
    return {str(at): pair for at, pair in enumerate(found.counts()[0]) if pair[1]}


def _base_of(url: str, served: dict[str, dict[str, Any]]) -> str:
    plain = [name for name, about in served.items() if not about.get("parent")]
    if len(plain) != 1:
        raise UserError(
            f"{url} serves {visible(', '.join(served))}: name the base among them with --endpoint-model"
        )
    return plain[0]
