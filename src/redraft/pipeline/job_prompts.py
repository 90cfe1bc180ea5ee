"""The prompts of a job, in disjoint parts: those adapted on, those that stop training, those measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..config import AdaptConfig
from ..core.console import say
from ..core.errors import UserError
from ..core.records import Prompt
from ..models.target import Target
from ..prompts.disk_list import Picked
from ..prompts.prompts import PromptSet, read_prompts, split_prompts
from .safety import OFF, SafetyPrompts, read_safety_prompts


@dataclass(frozen=True)
class Sources:
    """The files that a job reads. `off_domain` files (by name) and `safety` prompts are measured only;
    without `evaluation`, a part of `prompts` is kept aside."""

    prompts: str
    limit: int | None = None
    evaluation: str | None = None
    off_domain: Mapping[str, str] | None = None
    safety: str | None = None


@dataclass(frozen=True)
class JobPrompts:
    """`adapt` are trained on, `heldout` stop the training early, `measured` holds the others by the name of
    their answers file: eval, off-NAME. `whole` is the file that is adapted on."""

    whole: PromptSet
    adapt: Sequence[Prompt]
    heldout: Sequence[Prompt]
    measured: dict[str, Sequence[Prompt]]
    safety: SafetyPrompts | None


def read_job_prompts(target: Target, sources: Sources, config: AdaptConfig) -> JobPrompts:
    """Read all files. Raises UserError for a file without prompts and a name that cannot be used."""
    _check_names(sources)
    limit, turns = config.measure.eval_limit, config.regenerate.turns
    whole = read_prompts(sources.prompts, target, sources.limit, turns)
    say(whole.summary())
    measured = {
        f"off-{name}": read_prompts(file, target, limit, turns).prompts
        for name, file in (sources.off_domain or {}).items()
    }
    safety = None
    if sources.safety:
        safety = read_safety_prompts(sources.safety, target, config.safety.limit)
        say(safety.asked.summary())
        measured[OFF] = safety.asked.prompts
    if sources.evaluation:
        measured["eval"] = read_prompts(sources.evaluation, target, limit, turns).prompts
        limit = 0
    rest = apart(whole.prompts, measured.values())
    if len(rest) < len(whole.prompts):
        say(f"{len(whole.prompts) - len(rest)} prompts are measured on, so not trained on")
    adapt, heldout, aside = split_prompts(
        rest, limit, config.measure.heldout, config.regenerate.seed
    )
    return JobPrompts(whole, adapt, heldout, {"eval": aside, **measured}, safety)


def _check_names(sources: Sources) -> None:
    for name in sources.off_domain or ():
        if not name.replace("-", "").replace("_", "").isalnum():
            raise UserError(f"off-domain name '{name}': use letters, digits, - and _")
        if f"off-{name}" == OFF and sources.safety:
            raise UserError(
                f"off-domain name '{name}' is that of --safety-prompts, whose tau is measured as well; "
                "choose another"
            )


def apart(prompts: Sequence[Prompt], files: Iterable[Sequence[Prompt]]) -> Sequence[Prompt]:
    """The prompts that are in none of these files."""
    taken = {prompt.tokens for file in files for prompt in file}
    return Picked(prompts, (i for i, p in enumerate(prompts) if p.tokens not in taken))
