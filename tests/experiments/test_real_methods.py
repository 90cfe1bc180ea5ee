"""The race on real models, on a tiny one: what a cell holds, what a second run skips, what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from redraft.checkpoints.load import read_draft, stored
from redraft.config import RegenerateConfig
from redraft.core.errors import UserError
from redraft.generation.answer_file import read_answers
from redraft.models.loading import load_target
from redraft_experiments import real_methods, real_suite
from redraft_experiments.real_cells import (
    MEASURED,
    WHOLE,
    RealCell,
    change,
    print_real_cells,
    read_real_cells,
)
from redraft_experiments.real_methods import _between, bench_real_methods
from redraft_experiments.real_rows import MORE
from redraft_experiments.real_suite import build_real_suite
from redraft_experiments.rivals import speculators_run
from tests.conftest import fresh_draft

POOL = 5


@pytest.fixture
def suite(
    data: Path, tmp_path: Path, small_real: list[RegenerateConfig], monkeypatch: pytest.MonkeyPatch
) -> Path:
    for name, value in (
        ("POOL", POOL),
        ("ASIDE", 2),
        ("EVALUATED", 3),
        ("CHAT", 3),
        ("GENERAL", 2),
    ):
        monkeypatch.setattr(real_methods, name, value)
    monkeypatch.setattr(real_methods, "made_up_questions", lambda target, count: ["a b?", "c d?"])
    monkeypatch.setitem(real_suite.QUESTIONS, "adapt", round(MORE * POOL) + 2)
    small = {"epochs": 2.0, "batch_tokens": 128, "precision": "fp32", "evaluations": 1}
    monkeypatch.setattr(real_methods, "TRAIN", {**real_methods.TRAIN, **small})
    build_real_suite(tmp_path / "real", data=str(data), members=["math-sft", "code-lora"])
    return tmp_path / "real"


@pytest.mark.parametrize("member", ["math-sft", "code-lora"])
@pytest.mark.bench
def test_a_cell_measures_the_draft_on_the_way_to_the_trained_one(
    suite: Path, tmp_path: Path, small_real: list[RegenerateConfig], member: str
) -> None:
    rows = ["unadapted", "expert", "people 1"]
    out = tmp_path / "race"
    cells = bench_real_methods(suite, out, members=[member], rows=rows, seeds=[1])
    zero, expert, people = cells
    assert list(zero.counts) == ["1.0"]
    assert list(expert.counts) == ["1.0", "0.25", "0.5", "0.75"]
    for cell in cells:
        for counts in cell.counts.values():
            assert tuple(counts) == MEASURED
    steps = {name: [n for _, n in some] for name, some in zero.counts["1.0"].items()}
    assert all(steps.values())
    assert not expert.general_tokens
    assert people.general_tokens
    assert people.answer_tokens == expert.answer_tokens
    assert expert.train["steps"]
    assert read_draft(str(out / member / "drafts" / "expert.s1")).config
    asked = len(small_real)
    again = bench_real_methods(suite, out, members=[member], rows=rows, seeds=[1])
    assert again == cells == sorted(read_real_cells(out), key=lambda c: rows.index(c.row))
    assert len(small_real) == asked
    print_real_cells(cells)


def test_rows_adapt_on_parts_of_the_answers_and_on_more(
    suite: Path,
    tmp_path: Path,
    small_real: list[RegenerateConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, asked = tmp_path / "race", {"members": ["math-sft"], "seeds": [1]}
    plain, quarter = bench_real_methods(suite, out, rows=["body", "body quarter"], **asked)
    answered = len(small_real)
    more, again = bench_real_methods(suite, out, rows=["scratch more", "body quarter"], **asked)
    assert len(small_real) == answered + 1
    assert again == quarter
    folder = out / "math-sft"
    lengths = {
        name: {a.id: a.length for a in read_answers(folder / f"{name}.jsonl")}
        for name in ("answers/adapt-greedy", "answers/adapt-sampled", "more-answers/adapt")
    }
    greedy, sampled, others = lengths.values()
    assert len(greedy) == POOL
    assert len(others) == round(MORE * POOL) - POOL
    assert not set(greedy) & set(others)
    assert not set(others) & {a.id for a in read_answers(folder / "answers/heldout-greedy.jsonl")}
    assert 0 < quarter.answer_tokens < plain.answer_tokens
    assert quarter.answer_tokens in {*greedy.values(), *sampled.values()}, "one of five prompts"
    assert more.answer_tokens == plain.answer_tokens + sum(others.values())
    assert more.answer_seconds > plain.answer_seconds
    monkeypatch.setattr(real_methods, "POOL", POOL + 1)
    with pytest.raises(UserError, match=r"has 18 prompts .* need 21"):
        bench_real_methods(suite, tmp_path / "other", rows=["body more"], **asked)


def test_another_draft_has_rows_and_cells_of_its_own(
    suite: Path, tmp_path: Path, small_real: list[RegenerateConfig]
) -> None:
    """An MTP head on the answers of the race, next to the suite's draft."""
    out, asked = tmp_path / "race", {"members": ["math-sft"], "seeds": [1]}
    bench_real_methods(suite, out, rows=["unadapted"], **asked)
    answered = len(small_real)
    base = load_target(str(suite / "base"))
    stored(fresh_draft(base, kind="mtp"), base).save(tmp_path / "head")
    rows = ["unadapted", "hard labels decay"]
    cells = bench_real_methods(suite, out, rows=rows, draft=tmp_path / "head", **asked)
    assert [(cell.draft, list(cell.counts)) for cell in cells] == [("mtp", ["1.0"])] * 2
    assert cells[1].train["steps"]
    assert read_draft(str(out / "math-sft" / "drafts-mtp" / "hard labels decay.s1")).kind == "mtp"
    assert len(small_real) == answered
    assert [cell.draft for cell in read_real_cells(out)] == ["eagle3"]
    assert len(read_real_cells(out, "mtp")) == 2
    with pytest.raises(UserError, match="unknown row"):
        bench_real_methods(suite, out, rows=["expert"], draft=tmp_path / "head", **asked)


def test_no_share_of_the_way_is_the_unadapted_draft_and_all_of_it_the_trained_one(
    suite: Path,
) -> None:
    draft = read_draft(str(suite / "draft"))
    moved = {n: t + 1 if t.is_floating_point() else t for n, t in draft.tensors.items()}
    end = draft.with_tensors(moved, {})
    assert _between(draft, end, 0.0).hash() == draft.hash()
    assert _between(draft, end, 1.0).hash() == end.hash() != draft.hash()
    quarter = _between(draft, end, 0.25).tensors
    for name, tensor in draft.tensors.items():
        way = tensor.lerp(moved[name], 0.25) if tensor.is_floating_point() else tensor
        assert torch.equal(quarter[name], way), name


@pytest.mark.parametrize("code", [0, 3])
@pytest.mark.bench
def test_a_rival_trains_in_an_environment_of_its_own(
    suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Its script is a stand-in that gives the draft back, or ends with an error."""
    script = tmp_path / "script.py"
    script.write_text(
        "import argparse, json, pathlib, shutil\n"
        "parser = argparse.ArgumentParser()\n"
        "for name in ('draft', 'data', 'out', 'target'): parser.add_argument('--' + name)\n"
        "asked, rest = parser.parse_known_args()\n"
        "assert len(list(pathlib.Path(asked.data, 'hidden_states').iterdir())) == 5 + 2, rest\n"
        "shutil.copytree(asked.draft, asked.out)\n"
        "about = dict.fromkeys(('seconds', 'steps', 'tokens', 'tokens_per_second'), 7)\n"
        "about |= {'trained': {'a': '[3, 4] float32', 'b': '[5] float32'}, 'validation_loss': rest}\n"
        "pathlib.Path(asked.out, 'summary.json').write_text(json.dumps(about))\n"
        f"if {code}: raise SystemExit({code})\n"
    )
    monkeypatch.setattr(speculators_run, "SCRIPT", script)
    asked = {"members": ["math-sft"], "rows": ["unadapted", "speculators"], "seeds": [1]}
    monkeypatch.delenv(speculators_run.VARIABLE, raising=False)
    with pytest.raises(UserError, match="runs speculators, which was not found; install it"):
        bench_real_methods(suite, tmp_path / "race", **asked)
    monkeypatch.setenv(speculators_run.VARIABLE, sys.executable)
    if code:
        with pytest.raises(UserError, match="speculators ended with 3"):
            bench_real_methods(suite, tmp_path / "race", **asked)
        return
    unadapted, made = bench_real_methods(suite, tmp_path / "race", **asked)
    assert made.counts == unadapted.counts
    assert made.train["trained_parameters"] == 3 * 4 + 5
    assert made.train["validation_loss"][:2] == ["--epochs", "2"]


def test_no_file_beside_the_rivals_script_hides_its_package() -> None:
    """A script's folder comes first when Python looks for a module."""
    beside = {path.stem for path in speculators_run.SCRIPT.parent.glob("*.py")}
    assert "speculators_finetune" in beside
    assert not beside & {"speculators", "torch", "safetensors"}


def test_changes_over_seeds_are_against_the_one_unadapted_draft() -> None:
    def cell(row: str, seed: int, more: int) -> RealCell:
        counts = tuple((5 + more + i % 3, 10) for i in range(12))
        return RealCell("m", row, seed, {str(WHOLE): {"greedy": counts}})

    zero = [cell("unadapted", 1, 0), cell("unadapted", 2, 0)]
    for seeds in (1, 2):
        cells = [cell("kl", seed, 2) for seed in range(1, seeds + 1)]
        found = change(cells, zero, "greedy", WHOLE)
        assert found.value == pytest.approx(0.2)
        assert found == change(cells, zero[:1], "greedy", WHOLE)


def test_mistakes_are_named(suite: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown row 'experts'; did you mean"):
        bench_real_methods(suite, tmp_path, members=["math-sft"], rows=["experts"], seeds=[1])
    with pytest.raises(UserError, match="has no members/medical-sft; build it"):
        bench_real_methods(suite, tmp_path, members=["medical-sft"], rows=["expert"], seeds=[1])
