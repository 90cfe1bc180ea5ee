"""Planning an adaptation of a target that is not there."""

from __future__ import annotations

import typer

from ..config import Resolved
from ..core.records import to_json
from .bundles import OutputFlags


def plan(
    target: str,
    config: Resolved,
    output: OutputFlags,
    dtype: str = "auto",
    kind: str | None = None,
    draft_vocab: int | None = None,
    prompt_count: int = 500,
    prompt_tokens: int = 128,
    answer_tokens: int = 192,
    gpu: str | None = None,
    gpus: int = 1,
) -> None:
    """What an adaptation will take: memory, tokens and time, from config.json alone. No weights are read.

    Operations are counted; memory is a lower bound, of which runs took up to twice as much; seconds are estimates.

    Example: redraft plan --target org/my-70b --gpu H100 --gpus 8 --prompt-count 2000
    """
    from ..check.devices import device_named, this_machine
    from ..check.plan import Sizes, lines_of, target_of_shapes
    from ..check.plan import plan as work

    device = device_named(gpu) if gpu else None
    shapes = target_of_shapes(target, dtype)
    sizes = Sizes(prompt_count, prompt_tokens, answer_tokens, kind, draft_vocab)
    here = device or this_machine(shapes.hidden_size, shapes.dtype)
    found = work(shapes, sizes, config.config.train, here, gpus)
    content = {**to_json(found), "fits": found.fits}
    output.show(content, lambda: typer.echo("\n".join(lines_of(found))))
