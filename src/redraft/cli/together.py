"""A command run by several processes at once (`torchrun -m redraft ...`, `accelerate launch -m redraft ...`)."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

from ..core import ranks
from ..core.console import console, set_quiet
from ..core.errors import UserError
from ..core.visible import visible


@contextlib.contextmanager
def together(command: str, shares: bool) -> Iterator[None]:
    """Run the block as one rank of the job that a launcher started; without one, just run it.

    Ranks but the first leave the sentence of a mistake to the first. Raises UserError for a command that does not share
    its work out.
    """
    if ranks.launched() == 1:
        yield
        return
    if not shares:
        raise UserError(
            f"`redraft {command}` runs in one process; start it without torchrun or accelerate launch"
        )
    ranks.join(tell)
    set_quiet(False)  # of the first rank alone
    try:
        yield
    except UserError as mistake:
        ranks.fail(str(mistake))
        raise
    ranks.wait()
    ranks.leave()


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """In the block, processes of a job other than the first print nothing; what they fail of comes after the first has
    had time to say it."""
    if ranks.launched() == 1 or os.environ.get("RANK") == "0":
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere:  # noqa: PTH123
        try:
            with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
                yield
        except SystemExit as end:
            if end.code:
                time.sleep(2 * ranks.GRACE_SECONDS)
            raise


def tell(sentence: str) -> None:
    """Print a mistake."""
    console.print(visible(f"redraft: {sentence}"), style="red", soft_wrap=True, markup=False)
