"""The check as a whole: what it asks, what it says, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from redraft.check import evidence as module
from redraft.check import trial as trial_module
from redraft.check.calibration_runs import CalibrationRun, as_text, read_runs
from redraft.check.check import check
from redraft.check.evidence import gather
from redraft.check.trial import MORE
from redraft.checkpoints.load import read_draft
from redraft.cli.app import app
from redraft.config import RegenerateConfig
from redraft.core.errors import UserError
from redraft.core.records import Answer, to_json
from redraft.decoding.acceptance_modes import Decoding
from redraft.decoding.sampling import Sampling
from redraft.generation import regenerate as regenerate_module
from redraft.metrics.replay import replay
from redraft.models.target import Target
from tests.conftest import write_prompts


def test_a_check_of_a_fine_tune(
    target: Target,
    tuned: Callable[..., Target],
    draft_folder: Path,
    prompts_file: Path,
    runs: list[CalibrationRun],
    tmp_path: Path,
) -> None:
    child, stored = tuned(0.02), read_draft(str(draft_folder))
    found = check(
        child,
        stored,
        str(prompts_file),
        tmp_path / "out",
        base=target,
        most=20,
        answering=RegenerateConfig(max_new_tokens=24),
        runs=runs,
    )
    e = found.evidence
    assert e.on_base is not None
    assert e.retention is not None
    assert e.retention[0] == pytest.approx(e.unadapted.tau / e.on_base.tau)
    assert e.retention[1] < e.retention[0] < e.retention[2]
    assert e.closed_form is not None
    assert [option.action for option in found.recommendation.options] == [
        "keep",
        "closed-form",
        "adapt",
        "from-scratch",
    ]
    assert sum(option.probability for option in found.recommendation.options) == pytest.approx(1.0)
    step = 4 * found.step_cost.c + found.step_cost.v(4)
    assert found.speeds["now"] == pytest.approx(e.unadapted.tau / step)
    assert all(option.cost.seconds is not None for option in found.recommendation.options)
    json.dumps(to_json(found))


def test_a_check_resumes_without_asking_twice(
    target: Target, draft_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts_file = write_prompts(tmp_path / "p.jsonl", 40)
    monkeypatch.setattr(module, "NARROW", 0.0)  # never narrow enough: all are asked
    asked: list[int] = []
    true = regenerate_module.generate_answers

    def counting(target: Target, prompts: Any, plan: Any, **more: Any) -> Any:
        asked.append(sum(map(len, plan)))
        return true(target, prompts, plan, **more)

    monkeypatch.setattr(regenerate_module, "generate_answers", counting)
    stored, out = read_draft(str(draft_folder)), tmp_path / "out"
    gather(
        target,
        stored,
        str(prompts_file),
        out,
        most=20,
        answering=RegenerateConfig(max_new_tokens=16),
    )
    again = gather(
        target,
        stored,
        str(prompts_file),
        out,
        most=40,
        answering=RegenerateConfig(max_new_tokens=16),
    )
    assert again.evidence.prompts == 40
    assert asked == [16, 4, 16, 8], "the first batch was asked again"


def test_a_larger_check_with_its_base_goes_on(
    target: Target, draft_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = str(write_prompts(tmp_path / "p.jsonl", 40))
    monkeypatch.setattr(module, "NARROW", 0.0)
    stored, out = read_draft(str(draft_folder)), tmp_path / "out"
    rates = []
    for most in (20, 40, 40):
        seen = gather(
            target,
            stored,
            file,
            out,
            base=target,
            most=most,
            answering=RegenerateConfig(max_new_tokens=8),
        )
        assert seen.evidence.prompts == most
        assert seen.evidence.cut > 0
        rates.append(seen.evidence.answer_rate)
    assert rates[2] == rates[1], "reading answers is not answering"


def test_where_the_runs_are_of_smaller_targets_adapting_is_what_the_trial_says(
    target: Target,
    tuned: Callable[..., Target],
    draft_folder: Path,
    prompts_file: Path,
    runs: list[CalibrationRun],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Else a timing decides, and two checks may train in other arithmetic.
    plain = dataclasses.replace(trial_module.DEFAULTS, precision="fp32")
    monkeypatch.setattr(trial_module, "DEFAULTS", plain)
    small = [dataclasses.replace(run, parameters=target.parameter_count // 20) for run in runs]
    child, stored = tuned(0.02), read_draft(str(draft_folder))
    how: dict[str, Any] = {
        "base": target,
        "most": 24,
        "answering": RegenerateConfig(max_new_tokens=24),
    }
    found = check(child, stored, str(prompts_file), tmp_path / "out", runs=small, **how)
    assert found.runs == 0
    options = {option.action: option for option in found.recommendation.options}
    assert list(options) == ["keep", "closed-form", "adapt"]
    assert list(found.speeds) == ["now"]
    keep, adapt, trial = options["keep"].tau, options["adapt"].tau, found.trial
    assert trial.answers == trial.prompts == 12
    rise = trial.tau - trial.unadapted
    assert trial.difference[0] < rise < trial.difference[1]
    assert trial.method == "body"
    assert trial.rate > 0
    least, most = MORE
    assert keep[0] + rise + least < adapt[0] < keep[0] + rise + most
    predicted = check(child, stored, str(prompts_file), tmp_path / "out", runs=runs, **how)
    assert predicted.runs == len(runs)
    assert predicted.trial.tau == trial.tau
    assert predicted.recommendation.options[2].tau[0] != pytest.approx(adapt[0], abs=0.02)


def test_what_does_not_fit_is_refused_before_anything_is_asked(
    target: Target,
    kind_folder: Callable[[str], Path],
    prompts_file: Path,
    runs: list[CalibrationRun],
    tmp_path: Path,
) -> None:
    stored, out = read_draft(str(kind_folder("token_lm"))), tmp_path / "out"
    with pytest.raises(UserError, match="no fc to train"):
        check(target, stored, str(prompts_file), out, runs=runs, method="fc")
    assert not out.exists()
    found = check(
        target,
        stored,
        str(prompts_file),
        out,
        runs=runs,
        most=16,
        answering=RegenerateConfig(max_new_tokens=12),
    )
    assert found.recommendation.options


def test_prompts_are_asked_until_tau_is_known(
    target: Target, draft_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_prompts(tmp_path / "p.jsonl", 64)
    stored = read_draft(str(draft_folder))
    found = {}
    for narrow in (10.0, 0.0):
        monkeypatch.setattr(module, "NARROW", narrow)
        seen = gather(
            target,
            stored,
            str(file),
            tmp_path / str(narrow),
            most=48,
            answering=RegenerateConfig(max_new_tokens=16),
        )
        found[narrow] = seen.evidence.prompts
    assert found == {10.0: 16, 0.0: 48}


def test_a_check_at_a_temperature_samples_and_scores_there(
    target: Target,
    draft_folder: Path,
    prompts_file: Path,
    runs: list[CalibrationRun],
    tmp_path: Path,
) -> None:
    stored, warm = (
        read_draft(str(draft_folder)),
        RegenerateConfig(temperature=0.3, max_new_tokens=16),
    )
    found, again = (
        check(
            *(target, stored, str(prompts_file), tmp_path / name),
            base=target,
            most=16,
            answering=answering,
            runs=runs,
        ).evidence
        for name, answering in (
            ("warm", warm),
            ("greedy", dataclasses.replace(warm, temperature=0.0)),
        )
    )
    assert (found.unadapted.temperature, again.unadapted.temperature) == (0.3, 0.0)
    assert found.unadapted.acceptance == "sampled"
    lines = (tmp_path / "warm" / "answers-1-16.jsonl").read_text().splitlines()
    answers = [Answer.from_line(line) for line in lines]
    kept = [a for a in answers if a.length >= 2]
    by_hand = replay(
        target,
        stored.build(target),
        kept,
        4,
        decoding=Decoding("sampled", Sampling(0.3), "deterministic"),
    )
    assert found.unadapted.accepted == sum(sum(t.accepted) for t in by_hand)
    assert found.unadapted.accepted != again.unadapted.accepted
    gather(
        target, stored, str(prompts_file), tmp_path / "warm", most=16
    )  # greedy, in the same folder
    aside = tmp_path / "warm" / "set-aside" / "answers-1-16-1.jsonl"
    assert aside.read_text().splitlines() == lines


def test_too_few_prompts_for_any_verdict(
    target: Target, draft_folder: Path, tmp_path: Path
) -> None:
    file = write_prompts(tmp_path / "p.jsonl", 5)
    with pytest.raises(
        UserError, match="5 prompts with an answer to draft for are too few .* 8 at"
    ):
        gather(target, read_draft(str(draft_folder)), str(file), tmp_path / "out")


def test_the_command(
    target_folder: Path,
    draft_folder: Path,
    prompts_file: Path,
    runs: list[CalibrationRun],
    tmp_path: Path,
) -> None:
    table = tmp_path / "runs.json"
    table.write_text(as_text(runs))
    asked = ["check", "--prompts", str(prompts_file), "--calibration", str(table), "--most", "16"]
    asked += ["--max-new-tokens", "16"]
    models = ["--target", str(target_folder), "--draft", str(draft_folder)]
    run = CliRunner().invoke(app, [*asked, *models, "--base", str(target_folder)])
    assert run.exit_code == 0, run.output
    for word in (
        "retention    1.00",
        "speed here",
        "closed form",
        "recommended  ",
        "error prob",
    ):
        assert word in run.output
    alone = CliRunner().invoke(app, [*asked, *models, "--json", "--published", "2.5"])
    found = json.loads(alone.stdout)
    assert found["evidence"]["on_base"] is None
    assert [o["action"] for o in found["recommendation"]["options"]] == [
        "keep",
        "adapt",
        "from-scratch",
    ]
    sampled = [*asked, *models, "--json", "--temperature", "0.4", "--top-k", "9", "--top-p", "0.8"]
    warm = json.loads(CliRunner().invoke(app, [*sampled, "--min-p", "0.1"]).stdout)
    wanted = {"temperature": 0.4, "top_k": 9, "top_p": 0.8, "min_p": 0.1}
    assert warm["sampling"] == wanted
    assert warm["evidence"]["unadapted"]["temperature"] == 0.4
    assert warm["evidence"]["unadapted"]["tau"] != found["evidence"]["unadapted"]["tau"]
    outside = ["temperature" in each["outside"] for each in (found, warm)]
    assert outside == [False, True], "no calibration run was sampled"
    more = CliRunner().invoke(app, [*asked, *models, "--json", "--cases", "ours"])
    assert json.loads(more.stdout)["runs"] == found["runs"] + len(read_runs())
    twice = CliRunner().invoke(app, [*asked, *models, "--json", "--calibration", str(table)])
    assert json.loads(twice.stdout)["runs"] == found["runs"], "a file counts once"
    table.write_text(as_text(runs[:7]))
    few = CliRunner().invoke(app, [*asked, *models])
    assert "three kinds at least, found 7 of 5" in str(few.exception)
    assert "answers (" in run.output, "what tells that prompts are answered"
    assert "answers (" not in few.output, "something was paid for first"
    table.write_text(as_text(runs))
    served = CliRunner().invoke(app, [*asked, "--endpoint", "http://127.0.0.1:1", "--min-p", "0.1"])
    assert "cannot use --min-p" in str(served.exception)
    bare = ["check", "--prompts", str(prompts_file), "--endpoint", "http://127.0.0.1:1"]
    weighed = CliRunner().invoke(app, [*bare, "--worth", "0.05"])
    assert "--worth 0.05 is the least gain that is recommended" in str(weighed.exception)
    assert "does not answer" in str(CliRunner().invoke(app, [*bare, "--worth", "0.1"]).exception)
    odd = CliRunner().invoke(app, [*asked, *models, "--method", "exprt"])
    assert "train.method names the adapter 'exprt'" in str(odd.exception)
    parts = CliRunner().invoke(app, [*asked, *models, "--method", "fc"])
    assert "time is that of fc, tau that of expert+fc+norms" in parts.output
    nothing = CliRunner().invoke(app, asked)
    assert isinstance(nothing.exception, UserError)
    both = [*asked, *models, "--serve", "512", "--endpoint", "http://127.0.0.1:1"]
    both = CliRunner().invoke(app, both)
    assert "cannot use --target, --draft, --serve" in str(both.exception)
