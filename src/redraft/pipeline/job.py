"""A job: what every stage works with, and what is refused before anything is generated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..adapters.table import ADAPTERS, read_method
from ..checkpoints.load import StoredDraft
from ..config import AdaptConfig, Resolved
from ..core import ranks
from ..core.errors import UserError
from ..core.folders import read_json
from ..core.remote import address_of
from ..generation.regenerate import check_backend
from ..models.target import Target
from ..prompts.clock import kept_time
from ..prompts.prompts import PromptSet
from ..selection.scoring import Scorers, check_scorers
from ..training.preconditions import check_fits
from .run_folder import RunFolder


@dataclass(frozen=True)
class Job:
    """The run folder, the models and the settings. `draft` is the unadapted one; `base` is None where no
    model is named that the target was tuned from.

    `previous` is the draft of the version before, where one is named. `reference` are taus by a guard's names that it holds against,
    in place of the unadapted draft's.
    """

    run: RunFolder
    target: Target
    draft: StoredDraft
    base: Target | None
    config: AdaptConfig
    previous: StoredDraft | None = None
    reference: Mapping[str, float] = field(default_factory=dict)

    @property
    def k(self) -> int:
        return self.config.measure.k

    def answers(self, name: str) -> Path:
        """The answers file of this name."""
        return self.run.path / "answers" / f"{name}.jsonl"

    def fingerprint(self, model: str) -> str | None:
        """What identifies the `target`, the `draft` or the `base` among a stage's inputs."""
        if model == "draft":
            return self.draft.hash()
        found: Target | None = self.base if model == "base" else self.target
        return found.fingerprint() if found else None


def check_job(target: Target, draft: StoredDraft, base: Target | None, config: AdaptConfig) -> None:
    """Raise UserError for models and settings that do not go together."""
    check_backend(config.regenerate, 0)
    if config.measure.answers == "endpoints" and not config.regenerate.endpoints:
        raise UserError(
            "measure.answers=endpoints needs a server that writes the answers; name one with --endpoint, or "
            "leave it out"
        )
    draft.check_servable()
    built = draft.build(target)
    check_fits(built, config.train, target, base)
    check_scorers(config.select, Scorers(target, base, built, config.measure.k))
    if config.select.budget_value.auto:
        _check_rounds(config)


def _check_rounds(config: AdaptConfig) -> None:
    """Rounds ask the target, in a random order."""
    wrong = {
        "--answers": config.regenerate.answers != "regenerate",
        f"--select {config.select.select}": config.select.select != "random",
        "select.by=prompts": config.select.by != "answers",
        "select.coverage": bool(config.select.coverage),
    }
    if any(wrong.values()):
        raise UserError(
            "--budget auto asks prompts in a random order until answers stop paying: leave out "
            f"{', '.join(name for name, there in wrong.items() if there)}, or name a budget (500, "
            "0.5 or 20000t)"
        )


def record_job(job: Job, prompts: PromptSet, resolved: Resolved) -> None:
    """Write run.json. Raises UserError where the folder holds the adapter of another job."""
    described = {
        "target": address_of(job.target.name),
        "target_fingerprint": job.target.fingerprint(),
        "shared": address_of(job.draft.folder),
        "shared_hash": job.draft.hash(),
        "prompts": address_of(prompts.source),
        "left_out": [list(row) for row in prompts.left_out],
        "config": asdict(resolved.config),
        "origins": resolved.origins,
        "template_args": job.target.template_args,
        **({"previous": str(job.previous.folder)} if job.previous else {}),
        **kept_time(job.target),
    }
    ranks.check_same("this job", described)
    _refuse_other_job(job, described)
    job.run.write_json("run.json", described)


def _refuse_other_job(job: Job, described: dict[str, Any]) -> None:
    folder, method = job.run.path, job.config.train.method_value
    if not (folder / "adapter").is_dir():
        return
    try:
        before = read_json(folder / "run.json")
        known = read_method(before["config"]["train"]["method"])
        known_by = {"target": "target_fingerprint", "shared": "shared_hash", "prompts": "prompts"}
        other = [name for name, by in known_by.items() if before[by] != described[by]]
    except (UserError, KeyError, TypeError, ValueError):
        return  # its stages report what is damaged
    if known != method:
        raise UserError(
            f"{folder} holds a run of method {known.name}; for {method.name} name another folder with "
            f"--out, or remove {folder / 'adapter'} to train again on the same answers (adapters: "
            f"{', '.join(ADAPTERS)})"
        )
    if other:
        was = ", ".join(f"{name} {before[name]}" for name in other)
        raise UserError(
            f"{folder} holds a run with {was}; name another folder with --out, or remove this one"
        )
