"""An MTP head in a running vLLM: alone in a folder, and stitched into its target's checkpoint.

A tiny target of MiMo's architecture, whose heads a vLLM for CPUs serves; Qwen3.5's need a GPU's build there.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from redraft.checkpoints.load import StoredDraft, read_draft, stored
from redraft.checkpoints.own_head import stitch
from redraft.config import TrainConfig
from redraft.core.records import Prompt
from redraft.decoding.sampling import Sampling
from redraft.drafts.new import new_draft
from redraft.metrics.measure import answer_all
from redraft.models.loading import load_target
from redraft.models.target import Target
from redraft.serving.engine import Speculation
from redraft.serving.vllm import VLLM
from redraft.training.train import train
from tests.conftest import asked
from tests.drafts.mtp_targets import save_mimo
from tests.engines_real.cells import K, Table
from tests.engines_real.conftest import environment_of

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def mimo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Target, StoredDraft, Path]:
    """A target, a head that is right some of the time, and the folder of both."""
    folder = tmp_path_factory.mktemp("mimo")
    target = load_target(str(save_mimo(folder / "target")))
    answers = answer_all(target, asked(target), 32, 8, Sampling())
    draft = new_draft(target, answers, kind="mtp")
    how = TrainConfig(
        method="scratch", lr=1e-2, epochs=40, batch_tokens=512, rollout=4, evaluations=1
    )
    train(target, draft, answers, answers[:4], how, k=4)
    head = stored(draft, target)
    head.save(folder / "head")
    stitch(str(folder / "target"), head, folder / "whole")
    return target, read_draft(str(folder / "head")), folder / "whole"


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, mimo: tuple[Target, StoredDraft, Path]
) -> Table:
    prompts: list[Prompt] = asked(mimo[0])[:12]
    return Table(VLLM, environment_of(VLLM), tmp_path_factory.mktemp("logs"), prompts)


def test_a_head_of_its_own_folder(mimo: tuple[Target, StoredDraft, Path], served: Table) -> None:
    """Words as without it, and counts equal to the last step; a head read otherwise would be seen."""
    target, head, _ = mimo
    cell = served.cell("mtp head", target, str(head.folder))
    assert (cell.identical, cell.different) == (cell.prompts, 0)
    assert cell.tau > 1.3
    assert (cell.drafts, cell.accepted) == (cell.own_drafts, cell.own_accepted)
    for name in ("before_norm", "state_first", "zero_first"):
        config = dataclasses.replace(head.config, **{name: not getattr(head.config, name)})
        other = dataclasses.replace(head, config=config).build(target)
        own = served._own_count(target, other, K)
        assert (own.drafts, own.accepted) != (cell.drafts, cell.accepted), name


def test_a_stitched_checkpoint(mimo: tuple[Target, StoredDraft, Path], served: Table) -> None:
    target, head, whole = mimo
    cell = served.cell("mtp head", target, str(head.folder))
    stitched = load_target(str(whole))
    answers, counted = served.ask("stitched", stitched, Speculation("mtp", str(whole), K))
    assert answers == served.plain(target)
    assert (counted.drafts, counted.accepted) == (cell.drafts, cell.accepted)
