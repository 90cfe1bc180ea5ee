"""A base with eight LoRA adapters and one draft in one vLLM: each is served as redraft counts it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from redraft.checkpoints.load import read_draft
from redraft.config import RegenerateConfig
from redraft.fleet.check import check_fleet
from redraft.fleet.check_served import check_served_fleet
from redraft.fleet.member import read_fleet
from redraft.fleet.verify import verify_fleet
from redraft.models.loading import load_target
from redraft.serving.engine import TARGET, Serving, Speculation
from redraft.serving.verify import Request
from redraft.serving.vllm import VLLM
from redraft_experiments.demo import AdaptedDraft
from tests.engines_real.conftest import BUILD, environment_of

pytestmark = [pytest.mark.engine, pytest.mark.full, pytest.mark.timeout(1200)]
ADAPTERS, PROMPTS, TOKENS, K = 8, 3, 32, 4


def fleet_of(base: str, prompts: str, folder: Path) -> Path:
    """Adapters that change what the base says, each more than the one before."""
    rows = {"base": {"prompts": prompts}}
    for at in range(ADAPTERS):
        torch.manual_seed(at)
        model = AutoModelForCausalLM.from_pretrained(base)
        how = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
        tuned = get_peft_model(model, how)
        for parameter in (p for n, p in tuned.named_parameters() if "lora_B" in n):
            torch.nn.init.normal_(parameter, std=0.01 * (at + 1))
        tuned.save_pretrained(folder / f"tuned.{at}")
        rows[f"tuned.{at}"] = {"adapter": f"tuned.{at}", "prompts": prompts}
    (folder / "fleet.yaml").write_text(yaml.safe_dump(rows))
    return folder / "fleet.yaml"


def test_every_adapter_is_served_as_redraft_counts_it(
    repaired: AdaptedDraft, tmp_path: Path
) -> None:
    base = load_target(str(BUILD / "suite" / "base"))
    fleet = read_fleet(fleet_of(base.name, repaired.evaluation, tmp_path))
    request = Request(tmp_path / "logs", k=K, max_new_tokens=TOKENS, concurrencies=(1,))
    draft = read_draft(repaired.result.report.shared)
    found = verify_fleet(environment_of(VLLM), base, draft, fleet, request, most=PROMPTS)
    assert found.good, found.conclusion
    assert len(found.members) == ADAPTERS + 1
    for row in found.members:
        assert row.outputs.identical + row.outputs.excused == PROMPTS
        if not row.outputs.excused and not row.against_redraft.excused:
            assert row.compared == PROMPTS
        if row.compared:
            assert (row.counted.drafts, row.counted.accepted) == (row.own.drafts, row.own.accepted)
    taus = {row.name: row.counted.tau for row in found.members}
    print(taus)
    assert len({round(tau, 6) for tau in taus.values()}) > ADAPTERS // 2, (
        "the adapters are not used"
    )


def test_a_served_fleet_is_checked_by_its_counters(repaired: AdaptedDraft, tmp_path: Path) -> None:
    """By the names that the server knows, without the weights: the taus that redraft replays."""
    base = load_target(str(BUILD / "suite" / "base"))
    file = fleet_of(base.name, repaired.evaluation, tmp_path)
    rows = yaml.safe_load(file.read_text())
    some = {name: rows[name] for name in ("base", "tuned.1", "tuned.7")}
    file.write_text(yaml.safe_dump(some))
    members, draft = read_fleet(file), read_draft(repaired.result.report.shared)
    answering = RegenerateConfig(max_new_tokens=TOKENS)
    own = check_fleet(base, draft, members, tmp_path / "own", k=K, most=16, answering=answering)
    what = Serving(
        base.name,
        "float32",
        128,
        speculation=Speculation("eagle3", str(draft.folder), K),
        fleet=tuple((m.name, m.adapter) for m in members if m.adapter is not None),
    )
    with VLLM.serve(environment_of(VLLM), what, tmp_path / "vllm.log") as running:
        url = running.server.url
        found = check_served_fleet(url, members, most=16, answering=answering)
    assert (found.base, found.k) == (TARGET, K)
    theirs = {row.name: row for row in found.members}
    for row in own.members:
        assert theirs[row.name].tau[0] == pytest.approx(row.tau[0], rel=0.03)
        assert theirs[row.name].on_base[0] == pytest.approx(row.on_base[0], rel=0.03)
    print({row.name: (row.tau[0], theirs[row.name].tau[0]) for row in own.members})
    assert len({round(row.tau[0], 3) for row in own.members}) > 1
