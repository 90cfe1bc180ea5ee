"""The job on a target's own head: taken from the base or the target, adapted, and stitched into the target's checkpoint.

OUT/head/         the head that was grafted, a draft
OUT/check/        answers of `--check`
OUT/run/          the run of `adapt` on it
OUT/checkpoint/   the target with the adapted head
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ..checkpoints.load import read_draft
from ..checkpoints.own_head import check_stitch, inspect_head, new_head, stitch, take_head
from ..core import ranks
from ..core.console import say
from ..core.errors import UserError
from ..core.files import remove
from ..models.target import Target

R = TypeVar("R")
HEAD, CHECK, RUN, CHECKPOINT = "head", "check", "run", "checkpoint"


def graft(
    target: str, base: str | None, out: Path, layer_of: Callable[[], Target] | None = None
) -> Path:
    """The folder of the head to begin with, written if it is not there.

    Without a `base` the head is the target's own; with `layer_of`, which loads the target, one is made of its last layer. Raises
    UserError where neither has one, and for a `base` whose head is of another shape.
    """
    head = out / HEAD

    def taken() -> None:
        source = base or target
        found = new_head(layer_of()) if layer_of is not None else take_head(source)
        before = inspect_head(target)
        say(
            f"MTP head of {target}: {'none' if before is None else before.state}; from {source}, hash {found.hash()}"
        )
        check_stitch(target, found)  # before anything is trained
        saved = (head / "config.json").is_file()
        if saved and read_draft(str(head)).hash() != found.hash():
            raise UserError(
                f"{head} is another head (hash {read_draft(str(head)).hash()}) than that of {source} ({found.hash()}); "
                "use another --out"
            )
        if not saved:
            found.save(head)

    ranks.first(taken)
    return head


def give_head(
    target: str,
    base: str | None,
    out: Path,
    adapt: Callable[[str, Path], R],
    layer_of: Callable[[], Target] | None = None,
) -> tuple[R, dict[str, Any]]:
    """`graft` a head, `adapt` it (by its folder, into a run folder), and stitch it in; the report, and what was written."""
    head = graft(target, base, out, layer_of)
    report = adapt(str(head), out / RUN)

    def stitched() -> dict[str, Any]:
        draft, checkpoint = read_draft(str(out / RUN / "draft")), out / CHECKPOINT
        remove(checkpoint)  # of an earlier run
        return stitch(target, draft, checkpoint)

    return report, ranks.first(stitched)
