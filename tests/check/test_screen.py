"""What the screen adds to the figures: one note for each thing that one should know."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from rich.console import Console

from redraft.check.check import Check, check
from redraft.check.screen import notes, print_check
from redraft.checkpoints.load import read_draft
from redraft.config import RegenerateConfig
from redraft.decoding.sampling import Sampling
from redraft.models.target import Target
from tests.check.conftest import made_up_runs
from tests.conftest import write_prompts


@pytest.fixture(scope="module")
def checked(target: Target, draft_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Check:
    folder = tmp_path_factory.mktemp("screen")
    return check(
        target,
        read_draft(str(draft_folder)),
        str(write_prompts(folder / "p.jsonl", 16)),
        folder / "out",
        base=target,
        most=16,
        answering=RegenerateConfig(max_new_tokens=16),
        runs=made_up_runs(),
    )


def with_unadapted(check: Check, **changes: object) -> Check:
    unadapted = dataclasses.replace(check.evidence.unadapted, **changes)  # type: ignore[arg-type]
    return dataclasses.replace(
        check, evidence=dataclasses.replace(check.evidence, unadapted=unadapted)
    )


def one_note(check: Check, words: str) -> str:
    (found,) = (note for note in notes(check) if words in note)
    return found


def test_answers_that_loop_are_noted_with_tau_without_them(checked: Check) -> None:
    straight = with_unadapted(checked, loop_rate=0.05)
    assert not any("loop" in note for note in notes(straight))
    looping = with_unadapted(checked, loop_rate=0.25, tau_without_loops=1.5)
    assert one_note(looping, "loop").startswith("25% of the answers loop")
    assert "without them tau is 1.50" in one_note(looping, "loop")
    sampled = dataclasses.replace(looping, sampling=Sampling(0.7))
    assert "--temperature" in one_note(looping, "loop")
    assert "--temperature" not in one_note(sampled, "loop")
    all_loop = with_unadapted(checked, loop_rate=1.0, tau_without_loops=None)
    assert "nothing is left without them" in one_note(all_loop, "loop")


def test_the_settings_of_the_prediction_are_printed(checked: Check) -> None:
    """The settings that are not adapt's own, and, where answers were sampled, how to sample and measure."""
    said = one_note(checked, "settings of")
    assert (
        ": --set train.method=expert+fc+norms --set train.loss=ce --set train.batch_tokens=512; 256 answers"
    ) in said
    assert not any("cuts" in note for note in notes(checked))
    sampled = dataclasses.replace(checked, sampling=Sampling(0.7, top_p=0.9))
    sets = (
        "--set regenerate.temperature=0.7 --set regenerate.top_p=0.9 --set measure.temperature=0.7;"
    )
    assert sets in one_note(sampled, "settings of")
    assert "cuts (top_p) shift tau" in one_note(sampled, "only the temperature")


def test_from_scratch_names_what_was_not_weighed(checked: Check) -> None:
    for action in ("keep", "adapt", "from-scratch"):
        recommendation = dataclasses.replace(checked.recommendation, action=action)
        said = notes(dataclasses.replace(checked, recommendation=recommendation))
        found = any("adapting on 1,024 answers was not predicted" in note for note in said)
        assert found == (action == "from-scratch")


def test_what_adapting_is_taken_from_is_said(checked: Check) -> None:
    assert one_note(checked, "are predicted from 25 calibration runs")
    tried = notes(dataclasses.replace(checked, runs=0))
    assert any(
        "adapt is by body and 240 answers: the trial's rise and 0.05 to 0.35 more" in n
        for n in tried
    )
    assert any(note.startswith("settings of the closed form: --set") for note in tried)
    assert not any("predicted from" in note for note in tried)
    out = Console(width=200, record=True)
    print_check(checked, out)
    assert (
        f"trial        body, on 8 answers in {checked.trial.seconds:.0f} s: tau"
        in out.export_text()
    )


def test_an_extrapolation_is_called_one(checked: Check) -> None:
    within = dataclasses.replace(checked, outside=())
    assert not any("extrapolation" in note for note in notes(within))
    beyond = dataclasses.replace(checked, outside=("closed_form", "entropy", "temperature"))
    assert "tau after the closed form, the target's entropy, the temperature;" in one_note(
        beyond, "extrapolation"
    )


def test_the_screen_prints_how_answers_were_drawn(checked: Check) -> None:
    ways = {
        Sampling(0.0, top_p=0.9): "K=4, greedy",
        Sampling(0.7, top_p=0.9): "K=4, temperature 0.7, top_p 0.9",
    }
    for sampling, words in ways.items():
        out = Console(width=160, record=True)
        print_check(dataclasses.replace(checked, sampling=sampling), out)
        assert words in out.export_text()


def test_where_plain_decoding_is_faster_that_is_printed_first(checked: Check) -> None:
    for slow, words in (
        (False, f"recommended  {checked.recommendation.action.upper()}: "),
        (
            True,
            f"recommended  plain decoding is faster than any option here: serve without a draft. Of the options {checked.recommendation.action.upper()}: ",
        ),
    ):
        out = Console(width=160, record=True)
        print_check(
            dataclasses.replace(
                checked,
                recommendation=dataclasses.replace(checked.recommendation, faster_plain=slow),
            ),
            out,
        )
        assert words in out.export_text()
