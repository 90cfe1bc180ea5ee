"""One draft for many LoRA adapters of one base."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..config import MeasureConfig, RegenerateConfig, Resolved
from ..core.errors import UserError
from .bundles import (
    MaybeTargetFlags,
    OutputFlags,
    TargetFlags,
    refuse_with_endpoint,
    template_args_from,
)
from .command import Group, add_command
from .engine import NOT_GOOD, engine_flags

if TYPE_CHECKING:
    from ..fleet.check import FleetCheck

STAGES_OF_ADAPT = ("regenerate", "general", "select", "train", "measure", "export")
FLAGS_OF_ADAPT = ("train.method", "train.width", "train.vocab", "select.budget")
"""The settings of `redraft fleet adapt`, and those of them that are flags."""

app = typer.Typer(help="One draft for many LoRA adapters of one base.", cls=Group)


@app.callback()
def root() -> None:
    """One draft for many LoRA adapters of one base."""


def check(
    models: MaybeTargetFlags,
    fleet: str,
    out: str,
    output: OutputFlags,
    draft: str | None = None,
    endpoint: str | None = None,
    endpoint_model: str | None = None,
    batch: int = 1,
    k: int = MeasureConfig.k,
    most: int = 16,
    max_new_tokens: int = 128,
) -> None:
    """Which adapters lost acceptance, how much of the fleet's time that costs, and which to adapt to first; OUT/fleet.html.

    Each adapter's prompts are answered by the base and by the adapter; nothing is trained. With --endpoint a vLLM that serves the
    base, all adapters and the draft (--enable-lora) is asked, and its counters are read.

    Example: redraft fleet check --target org/base --draft org/EAGLE3-base --fleet fleet.yaml --out fleet
    """
    from ..core.records import to_json
    from ..fleet.page import PAGE, write_check_page
    from ..fleet.table import print_fleet

    asked: dict[str, Any] = {
        "most": most,
        "answering": RegenerateConfig(max_new_tokens=max_new_tokens),
    }
    if endpoint:
        found = _check_served(
            models, draft, endpoint, fleet, base=endpoint_model, rows=batch, **asked
        )
    else:
        found = _check_weights(models, draft, fleet, Path(out), k=k, **asked)
    write_check_page(Path(out) / PAGE, found)
    output.show(to_json(found), lambda: print_fleet(found))


def _check_served(
    models: MaybeTargetFlags, draft: str | None, endpoint: str, fleet: str, **asked: Any
) -> FleetCheck:
    from ..fleet.check_served import check_served_fleet
    from ..fleet.member import read_fleet

    refuse_with_endpoint(
        {
            "target": models.target,
            "draft": draft,
            "target-adapter": models.target_adapter,
            "chat-template": models.chat_template,
        }
    )
    members, variables = (
        read_fleet(Path(fleet), served=True),
        template_args_from(models.template_arg),
    )
    return check_served_fleet(endpoint, members, template_args=variables, **asked)


def _check_weights(
    models: MaybeTargetFlags, draft: str | None, fleet: str, out: Path, **asked: Any
) -> FleetCheck:
    from ..checkpoints.load import read_draft
    from ..core.files import writing
    from ..core.lock import held
    from ..fleet.check import check_fleet
    from ..fleet.member import read_fleet

    named = models.named()
    if named is None or draft is None:
        raise UserError(
            "name what is checked: --target and --draft (folders or Hub ids), or --endpoint URL of the vLLM that serves them"
        )
    _check_bare(named)
    members, stored = read_fleet(Path(fleet)), read_draft(draft)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    with held(out):
        return check_fleet(named.load(), stored, members, out, **asked)


def adapt(
    models: TargetFlags,
    draft: str,
    fleet: str,
    out: str,
    config: Resolved,
    output: OutputFlags,
) -> None:
    """Adapt one draft for all adapters and for the base, so that none loses more than general.tolerance where it is held out; a stock checkpoint in OUT/draft.

    The budget is split by the passes that each adapter lost and its share of the traffic, with a floor for each and for the base.

    Example: redraft fleet adapt --target org/base --draft org/EAGLE3-base --fleet fleet.yaml --out run
    --budget 1000
    """
    from ..core.records import to_json
    from ..fleet.adapt import adapt_fleet
    from ..fleet.member import read_fleet
    from ..fleet.page import PAGE, write_adapted_page
    from ..fleet.table import print_adapted

    _check_bare(models)
    members = read_fleet(Path(fleet))
    found = adapt_fleet(models.load(), draft, members, out, config, fleet)
    write_adapted_page(Path(out) / PAGE, found)
    output.show(to_json(found), lambda: print_adapted(found))


def verify(
    models: TargetFlags,
    draft: str,
    fleet: str,
    output: OutputFlags,
    python: str | None = None,
    k: int = MeasureConfig.k,
    limit: int = 8,
    max_new_tokens: int = 64,
    port: int | None = None,
    start_timeout: float = 900.0,
    engine_args: str = "",
    out: str | None = None,
) -> None:
    """Serve the base with all its adapters and one draft in a real vLLM: same outputs, same tau as redraft counts, of each.

    Exit codes: 0 it is, 3 it is not, 2 a mistake in the command, 1 our fault.

    Example: redraft fleet verify --target org/base --draft run/draft --fleet fleet.yaml
    --python .venv-vllm/bin/python
    """
    from ..checkpoints.load import read_draft
    from ..core.records import to_json
    from ..fleet.member import read_fleet
    from ..fleet.table import print_served
    from ..fleet.verify import verify_fleet
    from ..serving.verify import Request
    from ..serving.vllm import VLLM

    _check_bare(models)
    flags = engine_flags(engine_args)
    VLLM.check_flags(flags)
    environment, members = VLLM.find(python), read_fleet(Path(fleet))
    request = Request(
        logs=Path(out or tempfile.mkdtemp(prefix="redraft-fleet-")),
        k=k,
        max_new_tokens=max_new_tokens,
        concurrencies=(1,),
        port=port,
        patience=start_timeout,
        engine_args=flags,
    )
    base = models.load(device="cpu")
    found = verify_fleet(environment, base, read_draft(draft), members, request, most=limit)
    output.show(to_json(found), lambda: print_served(found))
    if not found.good:
        raise typer.Exit(NOT_GOOD)


def _check_bare(models: TargetFlags) -> None:
    if models.target_adapter:
        raise UserError("--target-adapter: name every adapter in the file of --fleet")


add_command(
    app,
    check,
    help={
        "target": "the base: folder or Hub id",
        "out": "folder of the page and of the answers (run again to resume; of a server none are kept)",
        "most": "most prompts of each adapter",
        "k": "draft tokens per step (of a server its own)",
        "endpoint": "a vLLM that serves the base, the adapters under the fleet's names, and a draft (key: $REDRAFT_API_KEY)",
        "endpoint_model": "what the server calls the base [default: its one model without a parent]",
    },
)
add_command(
    app,
    adapt,
    shares=True,
    settings=STAGES_OF_ADAPT,
    flags_of=FLAGS_OF_ADAPT,
    help={
        "target": "the base: folder or Hub id",
        "out": "run folder; run again to resume",
    },
)
add_command(
    app,
    verify,
    help={
        "target": "the base: folder or Hub id",
        "limit": "prompts of each member, the first ones",
        "out": "folder of the server's logs",
        "python": "Python of vLLM's environment (default: $REDRAFT_VLLM_PYTHON)",
    },
)
