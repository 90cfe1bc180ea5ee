"""speculators 0.9 as a rival: its own fine-tune of a draft, on the same answers and as many passes."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redraft.checkpoints.load import StoredDraft, read_draft
from redraft.core.console import Waiting
from redraft.core.errors import UserError
from redraft.core.files import remove
from redraft.core.records import Answer
from redraft.features.extract import Plan, convert_features
from redraft.features.stored_target import StoredTarget
from redraft.serving.environment import clean_environment
from redraft.serving.server import last_words

VARIABLE = "REDRAFT_SPECULATORS_PYTHON"
INSTALL = f"""install it into an environment of its own:
  python3 -m venv .venv-speculators && .venv-speculators/bin/pip install torch==2.13.0 speculators==0.9.0
  .venv-speculators/bin/pip uninstall -y torchvision torchaudio
then name it in {VARIABLE}"""
SCRIPT = Path(__file__).with_name("speculators_finetune.py")


@dataclass(frozen=True)
class Finetune:
    """What is asked of it. Tokens of a batch are padded to `batch_tokens`; its own validation rows come last."""

    epochs: int
    batch_tokens: int
    seed: int


def finetune(
    shared: StoredDraft,
    target: StoredTarget,
    answers: Sequence[Answer],
    heldout: Sequence[Answer],
    out: Path,
    how: Finetune,
) -> tuple[StoredDraft, dict[str, Any]]:
    """The fine-tuned draft, and the record of its training. Answers longer than a batch are cut by its loader.

    Its own settings, but for the passes and the tokens of a step. Raises UserError where it is not installed or ends
    with an error.
    """
    python = os.environ.get(VARIABLE)
    if not python:
        raise UserError(f"row speculators runs speculators, which was not found; {INSTALL}")
    remove(out)  # of an interrupted run
    out.mkdir(parents=True)
    draft, data, made = out / "draft", out / "data", out / "made"
    shared.save(draft, "speculators")
    rows = [*answers, *heldout]
    plan = Plan(data, layout="speculators")
    convert_features(target, target.features[0], rows, plan, target.normed)
    command = [python, str(SCRIPT), "--draft", str(draft), "--target", target.sources[0]]
    command += ["--data", str(data), "--out", str(made)]
    command += ["--epochs", str(how.epochs), "--batch-tokens", str(how.batch_tokens)]
    command += ["--seed", str(how.seed), "--train-data-ratio", str(len(answers) / len(rows))]
    log = out / "speculators.log"
    with log.open("wb") as stream, Waiting(f"speculators, log {log}") as waiting:
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, env=clean_environment()
        )
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(1.0)
                waiting.tick()
        finally:
            process.kill()
    if process.returncode:
        raise UserError(
            f"speculators ended with {process.returncode}: {last_words(log)}; log {log}"
        )
    remove(data)
    summary = json.loads((made / "summary.json").read_text(encoding="utf-8"))
    return read_draft(str(made)), record_of(summary)


def record_of(summary: dict[str, Any]) -> dict[str, Any]:
    """What a cell keeps of its summary: no folders, and of the tensors how many numbers were trained."""
    shapes = (re.findall(r"\d+", text.split("]")[0]) for text in summary["trained"].values())
    names = ("seconds", "steps", "tokens", "tokens_per_second", "validation_loss")
    return {
        "trained_parameters": sum(math.prod(map(int, shape)) for shape in shapes),
        **{name: summary[name] for name in names},
    }
