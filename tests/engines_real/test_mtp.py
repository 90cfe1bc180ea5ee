"""MTP heads in running engines: a tiny MiMo's and a tiny Qwen3.5's in vLLM, the latter in llama.cpp too; with routed experts a
tiny GLM-4.5's and a tiny Qwen3.5 MoE's.

llama.cpp runs Qwen3.5's layers with a recurrent state, which a vLLM for CPUs does not in float32, and needs one; it has no graph
for MiMo.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from redraft.checkpoints.load import StoredDraft, read_draft, stored
from redraft.checkpoints.own_head import stitch
from redraft.config import TrainConfig
from redraft.core.records import Prompt, StepTrace
from redraft.decoding.sampling import Sampling
from redraft.drafts.new import new_draft
from redraft.metrics.measure import answer_all, measure
from redraft.models.loading import load_target
from redraft.models.target import Target
from redraft.serving.counters import Counters
from redraft.serving.engine import Engine, Serving, Speculation
from redraft.serving.environment import Environment
from redraft.serving.llamacpp import LLAMACPP
from redraft.serving.own_count import Limits, count_own
from redraft.serving.verify import Request, verify
from redraft.serving.vllm import VLLM
from redraft.training.train import train
from tests.conftest import asked
from tests.drafts.mtp_targets import (
    routed_head,
    save_glm4_moe,
    save_mimo,
    save_qwen3_5,
    save_qwen3_5_moe,
)
from tests.engines_real.cells import TOKENS, K, Table, own_plain
from tests.engines_real.conftest import environment_of
from tests.engines_real.test_llamacpp import ONE_THREAD

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]


Parts = tuple[Target, StoredDraft, Path]


@pytest.fixture(scope="module")
def mimo(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    folder = tmp_path_factory.mktemp("mimo")
    return trained(save_mimo(folder / "target"))


def trained(source: Path, epochs: float = 40, *, routed: bool = False) -> Parts:
    """A target, a head that is right some of the time, and the folder of both. Routed experts stay random."""
    folder, target = source.parent, load_target(str(source))
    answers = answer_all(target, asked(target), 32, 8, Sampling())
    draft = routed_head(target) if routed else new_draft(target, answers, kind="mtp")
    how = TrainConfig(
        method="body" if routed else "scratch",
        lr=1e-2,
        epochs=epochs,
        batch_tokens=512,
        rollout=4,
        evaluations=1,
    )
    train(target, draft, answers, answers[:4], how, k=4)
    head = stored(draft, target)
    head.save(folder / "head")
    stitch(str(folder / "target"), head, folder / "whole")
    return target, read_draft(str(folder / "head")), folder / "whole"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, mimo: Parts) -> Table:
    prompts: list[Prompt] = asked(mimo[0])[:12]
    return Table(VLLM, environment_of(VLLM), tmp_path_factory.mktemp("logs"), prompts)


def test_a_head_of_its_own_folder(mimo: Parts, served: Table) -> None:
    """Words as without it, and counts equal to the last step; a head read otherwise would be seen."""
    target, head, _ = mimo
    cell = served.cell("mtp head", target, str(head.folder))
    assert (cell.identical, cell.different) == (cell.prompts, 0)
    assert cell.tau > 1.3
    assert (cell.drafts, cell.accepted) == (cell.own_drafts, cell.own_accepted)
    for name in ("before_norm", "state_first", "zero_first"):
        config = dataclasses.replace(head.config, **{name: not getattr(head.config, name)})
        other = dataclasses.replace(head, config=config).build(target)
        own = served.own_count(target, other, K)
        assert (own.drafts, own.accepted) != (cell.drafts, cell.accepted), name


@pytest.mark.full
def test_a_stitched_checkpoint(mimo: Parts, served: Table) -> None:
    target, head, whole = mimo
    cell = served.cell("mtp head", target, str(head.folder))
    stitched = load_target(str(whole))
    answers, counted = served.ask("stitched", stitched, Speculation("mtp", str(whole), K))
    assert answers == served.plain(target)
    assert (counted.drafts, counted.accepted) == (cell.drafts, cell.accepted)


STAND_IN = {
    "__init__.py": '__version__ = "0"\n',
    "io.py": "ImageReadMode = decode_image = None\n",
    "transforms/__init__.py": "import enum\nInterpolationMode = enum.Enum('InterpolationMode', 'NEAREST NEAREST_EXACT "
    "BILINEAR BICUBIC BOX HAMMING LANCZOS')\n",
    "transforms/functional.py": "pil_to_tensor = None\n",
    "transforms/v2/__init__.py": "from . import functional\n",
    "transforms/v2/functional.py": "",
}
"""Stands for torchvision, which vLLM imports for Qwen3.5 though no picture is read; PyPI's is made for another torch."""


@pytest.fixture(scope="module")
def vllm_of_qwen(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("imports")
    for name, text in STAND_IN.items():
        path = folder / "torchvision" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def variables(environment: Environment, what: Serving) -> dict[str, str]:
        return {**VLLM.variables(environment, what), "PYTHONPATH": str(folder)}

    return dataclasses.replace(VLLM, variables=variables)


def test_a_head_of_qwen_in_vllm(
    vllm_of_qwen: Engine, tmp_path_factory: pytest.TempPathFactory
) -> None:
    target, head, _ = trained(save_qwen3_5(tmp_path_factory.mktemp("q") / "target"), epochs=20)
    table = Table(
        vllm_of_qwen, environment_of(VLLM), tmp_path_factory.mktemp("logs"), asked(target)[:6]
    )
    cell = table.cell("mtp head", target, str(head.folder))
    assert (cell.identical, cell.different) == (cell.prompts, 0)
    assert cell.tau > 1.1
    assert (cell.drafts, cell.accepted) == (cell.own_drafts, cell.own_accepted)
    for change in ({"before_norm": True}, {"state_first": True}):
        other = dataclasses.replace(head, config=dataclasses.replace(head.config, **change))
        own = table.own_count(target, other.build(target), K)
        assert (own.drafts, own.accepted) != (cell.drafts, cell.accepted), change


@pytest.mark.full
def test_routed_experts(tmp_path_factory: pytest.TempPathFactory) -> None:
    """GLM-4.5's: words as without the head, and equal counts; another routing would be seen."""
    folder = tmp_path_factory.mktemp("glm")
    target, head, _ = trained(save_glm4_moe(folder / "target"), 30, routed=True)
    table = Table(VLLM, environment_of(VLLM), tmp_path_factory.mktemp("logs"), asked(target)[:8])
    cell = table.cell("routed mtp head", target, str(head.folder))
    assert (cell.identical, cell.different) == (cell.prompts, 0)
    assert cell.tau > 1.2
    assert (cell.drafts, cell.accepted) == (cell.own_drafts, cell.own_accepted)
    config, seen = head.config, 0
    changes = {"normalised": False}, {"scale": 1.0}, {"groups_per_token": 4}, {"per_token": 2}
    for change in changes:
        routed = dataclasses.replace(config.routed, **change)  # type: ignore[attr-defined]
        other = dataclasses.replace(head, config=dataclasses.replace(config, routed=routed))
        own = table.own_count(target, other.build(target), K)
        seen += (own.drafts, own.accepted) != (cell.drafts, cell.accepted)
    assert seen >= 3


# -- llama.cpp -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    folder = tmp_path_factory.mktemp("qwen")
    return trained(save_qwen3_5(folder / "target", linear=True), epochs=14)


def own_count(parts: Parts, prompts: list[Prompt], **changes: bool) -> Counters:
    """redraft's count by replay, of the head as llama.cpp computes it, with changes."""
    target, head, _ = parts
    as_served = head.as_served(LLAMACPP.name)
    config = dataclasses.replace(as_served.config, **changes)
    draft = dataclasses.replace(as_served, config=config).build(target)
    found = measure(target, draft, prompts, k=K, max_new_tokens=TOKENS)
    limits = Limits(K, TOKENS, target.stop_ids)
    traces = [trace for trace in found.traces if isinstance(trace, StepTrace)]
    return count_own(traces, found.answers, limits, LLAMACPP.cut)


def test_a_head_of_a_recurrent_target_in_llamacpp(
    qwen: Parts, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Counts are equal while a request is its slot's first: a later one begins with a state of the one before."""
    target, _, whole = qwen
    logs, environment = tmp_path_factory.mktemp("logs"), environment_of(LLAMACPP)
    prompts: list[Prompt] = asked(target)[:8]
    table = Table(LLAMACPP, environment, logs, prompts, ONE_THREAD)
    stitched = load_target(str(whole))
    plain = table.plain(stitched)
    assert plain == own_plain(target, prompts)
    words, together = table.ask("mtp", stitched, Speculation("draft-mtp", str(whole), K))
    assert words == plain
    assert together.acceptance().tau == pytest.approx(
        own_count(qwen, prompts).acceptance().tau, rel=0.02
    )
    seen = set()
    for prompt in prompts[:4]:
        alone = Table(LLAMACPP, environment, logs, [prompt], ONE_THREAD)
        speculation = Speculation("draft-mtp", str(whole), K)
        _, counted = alone.ask(f"mtp {prompt.id}", stitched, speculation)
        own = own_count(qwen, [prompt])
        assert (counted.drafts, counted.accepted) == (own.drafts, own.accepted)
        for change in ({"leading_pair": False}, {"before_norm": True}, {"state_first": True}):
            other = own_count(qwen, [prompt], **change)
            if (other.drafts, other.accepted) != (own.drafts, own.accepted):
                seen.add(*change)
    assert seen == {"leading_pair", "before_norm", "state_first"}


@pytest.mark.full
def test_routed_experts_in_llamacpp(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Qwen3.5 MoE's, one by one and packed. Counts are compared where both have the same words."""
    folder = tmp_path_factory.mktemp("moe")
    parts = trained(save_qwen3_5_moe(folder / "target", linear=True), 5, routed=True)
    target, head, whole = parts
    routed = dataclasses.replace(head.config.routed, packed=True)  # type: ignore[attr-defined]
    packed = dataclasses.replace(head, config=dataclasses.replace(head.config, routed=routed))
    stitch(str(whole), packed, folder / "packed")
    logs, environment, compared = tmp_path_factory.mktemp("logs"), environment_of(LLAMACPP), 0
    for prompt in asked(target)[:2]:
        table = Table(LLAMACPP, environment, logs, [prompt], ONE_THREAD)
        plain = table.plain(load_target(str(whole)))
        own = own_count(parts, [prompt])
        for form in (whole, folder / "packed"):
            speculation = Speculation("draft-mtp", str(form), K)
            name = f"{form.name} {prompt.id}"
            words, counted = table.ask(name, load_target(str(form)), speculation)
            assert words == plain
            if words == own_plain(target, [prompt]):
                assert (counted.drafts, counted.accepted) == (own.drafts, own.accepted)
                compared += 1
    assert compared >= 2


def test_verify_stitches_for_llamacpp(
    qwen: Parts, tmp_path_factory: pytest.TempPathFactory
) -> None:
    target, head, _ = qwen
    request = Request(
        tmp_path_factory.mktemp("verify"),
        k=K,
        max_new_tokens=48,
        concurrencies=(1,),
        repeats=1,
        engine=LLAMACPP,
        engine_args=ONE_THREAD,
    )
    found = verify(environment_of(LLAMACPP), target, head, asked(target)[:8], request)
    assert (found.method, found.outputs.holds, found.against_redraft.holds) == (
        "draft-mtp",
        True,
        True,
    )
    assert found.tau.tau == pytest.approx(found.expected.tau, rel=0.05)
    assert not found.causes
