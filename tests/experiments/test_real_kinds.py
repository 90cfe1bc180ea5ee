"""The drafts of the suite of real models on their base and on a fine-tune: what a live loop counts, and what a second run skips."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from redraft.checkpoints.load import load_draft, stored
from redraft.core.errors import UserError
from redraft.metrics.acceptance import pooled_tau
from redraft.metrics.live import live
from redraft.prompts.prompts import read_prompts
from redraft_experiments import real_kinds
from redraft_experiments.real_drafts import DRAFTS, K
from redraft_experiments.real_kinds import bench_real_kinds, print_cells
from redraft_experiments.real_suite import DOMAINS, build_real_suite, load_real, prompts_of

pytestmark = pytest.mark.usefixtures("small_real")
ROWS, LONGEST = ("eagle3", "eagle", "small-lm"), 12


@pytest.mark.bench
def test_every_kind_is_counted_as_a_live_loop_does(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(real_kinds, "ANSWERS", real_kinds.RegenerateConfig(max_new_tokens=LONGEST))
    out = tmp_path / "real"
    build_real_suite(out, data=str(data), members=["code-lora"], drafts=ROWS)
    cells = bench_real_kinds(out, ROWS, ["code-lora"])
    assert [(c.target, c.draft) for c in cells] == [
        (target, draft) for target in ("base", "code-lora") for draft in ROWS
    ]
    assert len({cell.kind for cell in cells}) == 3
    assert set(cells[0].tau) == set(DOMAINS)
    assert set(cells[-1].tau) == {"code", "chat"}
    for cell in cells:
        target = load_real(out, cell.target)
        draft = load_draft(str(out / DRAFTS[cell.draft].folder), target)
        for domain, (tau, low, high) in cell.tau.items():
            assert low <= tau <= high
            if cell.target == "base" and domain not in ("code", "chat"):
                continue  # a live loop on each domain would take the longest of this test
            prompts = read_prompts(str(prompts_of(out, domain, "eval")), target).prompts
            traces, _ = live(target, draft, prompts, K, LONGEST)
            assert tau == pytest.approx(pooled_tau(traces))
            assert cell.prompts[domain] == len(prompts)
        assert 1 <= cell.best <= K
        assert cell.c > 0
    print_cells(cells)
    assert "small-lm" in capsys.readouterr().out


@pytest.mark.bench
def test_a_second_run_measures_only_a_draft_that_changed(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "real"
    build_real_suite(out, data=str(data), members=[], drafts=["eagle3", "eagle"])
    before = bench_real_kinds(out, ["eagle3", "eagle"])
    assert bench_real_kinds(out, ["eagle3", "eagle"]) == before  # c is a time: it was not measured
    state = json.loads((out / "kinds" / "state.json").read_text())
    target = load_real(out, "base")
    draft = load_draft(str(out / "draft"), target)
    draft.reinitialise(5)
    stored(draft, target).save(out / "draft")
    bench_real_kinds(out, ["eagle3", "eagle"])
    after = json.loads((out / "kinds" / "state.json").read_text())
    assert [name for name in state if state[name]["inputs"] != after[name]["inputs"]] == [
        "base-eagle3.json"
    ]


def test_mistakes_are_named(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "real"
    build_real_suite(out, data=str(data), members=[])
    with pytest.raises(UserError, match="unknown draft 'eagle2'"):
        bench_real_kinds(out, ["eagle2"])
    with pytest.raises(UserError, match="unknown member 'code'; did you mean"):
        bench_real_kinds(out, ["eagle3"], ["code"])
    with pytest.raises(UserError, match="draft-eagle"):
        bench_real_kinds(out, ["eagle"])
