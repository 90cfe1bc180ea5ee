"""The whole job on a tiny pair: what it leaves behind, what a second run skips, what it refuses."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from redraft.adapters.merge import extract
from redraft.adapters.table import read_method
from redraft.checkpoints.adapter_folder import load_adapter
from redraft.checkpoints.load import load_draft, read_draft, stored
from redraft.config import Resolved, resolve
from redraft.core.console import set_quiet
from redraft.core.errors import UserError
from redraft.core.folders import read_file, tensor_hash
from redraft.core.records import Answer, Prompt, to_json
from redraft.core.report_record import AdaptReport
from redraft.decoding.sampling import Sampling
from redraft.generation.answer_file import read_answers
from redraft.metrics.acceptance import pooled_tau
from redraft.metrics.measure import answer_all
from redraft.metrics.replay import accepted_runs, replay
from redraft.models.target import Target
from redraft.pipeline import adapt as pipeline
from redraft.pipeline import stages
from redraft.pipeline.job import Job
from redraft.pipeline.run_folder import RunFolder
from redraft.pipeline.start import begin_with
from redraft.report.page import write_page
from redraft.report.terminal import print_report
from redraft.serving.certificate_check import read_certificate
from redraft.training.guard import Guard
from tests.conftest import write_prompts

SETTINGS = {
    "general.guard": "off",
    "regenerate.max_new_tokens": 24,
    "train.method": "expert+fc+norms",
    "train.width": 8,
    "train.epochs": 2,
    "train.batch_tokens": 256,
    "train.rollout": 3,
    "train.evaluations": 2,
    "measure.k": 3,
    "measure.eval_limit": 6,
    "measure.heldout": 4,
    "measure.eval_new_tokens": 20,
    "select.budget": "0.5",
}
ANSWERED = ["regenerate adapt", "regenerate heldout", "regenerate eval"]
STAGES = [*ANSWERED, "select", "train", "export", "measure"]


def settings(**changes: object) -> Resolved:
    return resolve(
        [("test", {**SETTINGS, **{k.replace("__", "."): v for k, v in changes.items()}})]
    )


@pytest.fixture(scope="module")
def done(
    target: Target, draft_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[pipeline.AdaptResult, Path]:
    folder = tmp_path_factory.mktemp("flow")
    prompts = write_prompts(folder / "p.jsonl", 24)
    prompts.write_text(prompts.read_text() + "{broken\n")
    other = write_prompts(folder / "o.jsonl", 5, start=100)
    result = pipeline.adapt(
        target,
        str(draft_folder),
        str(prompts),
        out=folder / "run",
        config=settings(),
        off_domain={"other": str(other)},
    )
    return result, folder


def test_the_run_folder_holds_everything(done: tuple[pipeline.AdaptResult, Path]) -> None:
    result, folder = done
    run = folder / "run"
    for name in (
        "run.json",
        "state.json",
        "answers/adapt.jsonl",
        "selection.jsonl",
        "checkpoints/checkpoint.safetensors",
        "adapter/model.safetensors",
        "adapter/adapter.json",
        "draft/model.safetensors",
        "draft/config.json",
        "measure/eval-before.json",
        "measure/off-other-after.json",
        "report.json",
        "report.html",
    ):
        assert (run / name).is_file(), name
    report = result.report
    assert report.prompts["left_out"] == 1
    assert report.prompts["answered"] == 24 - 6 - 4
    assert report.prompts["trained_on"] == 7
    assert report.before.prompts == report.after.prompts
    assert set(report.off_domain) == {"other-before", "other-after"}
    assert report.origins["train.width"] == "test"
    assert report.origins["train.seed"] == "default"
    assert set(report.cost["seconds"]) == {*STAGES, "regenerate off-other"}
    assert AdaptReport.from_json(to_json(report)) == report


def test_the_exported_draft_is_the_shared_one_made_wider(
    done: tuple[pipeline.AdaptResult, Path], draft_folder: Path, target: Target
) -> None:
    result, folder = done
    shared = read_file(draft_folder / "model.safetensors")
    merged = read_file(folder / "run" / "draft" / "model.safetensors")
    part = load_adapter(folder / "run" / "adapter")
    assert result.merged.config.intermediate_size == 64 + 8
    for name, tensor in shared.items():
        if name.startswith("midlayer.mlp."):
            dimension = 1 if "down_proj" in name else 0
            assert tensor_hash(merged[name].narrow(dimension, 0, 64)) == tensor_hash(tensor)
        elif name not in part.tensors:
            assert tensor_hash(merged[name]) == tensor_hash(tensor), name
    back = extract(merged, shared, read_method(part.method))
    assert {n: tensor_hash(t) for n, t in back.items()} == {
        n: tensor_hash(t) for n, t in part.tensors.items()
    }
    assert load_draft(str(folder / "run" / "draft"), target).source is not None


def test_a_second_run_does_nothing_and_says_so(
    done: tuple[pipeline.AdaptResult, Path],
    target: Target,
    draft_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    result, folder = done
    written = {p: p.stat().st_mtime_ns for p in (folder / "run").rglob("*.safetensors")}
    set_quiet(False)
    try:
        again = pipeline.adapt(
            target,
            load_draft(str(draft_folder), target),
            str(folder / "p.jsonl"),
            out=folder / "run",
            config=settings(),
            off_domain={"other": str(folder / "o.jsonl")},
        )
    finally:
        set_quiet(True)
    said = " ".join(capsys.readouterr().err.split())
    for stage in STAGES:
        assert f"{stage}: nothing to do, already done" in said
    assert {p: p.stat().st_mtime_ns for p in (folder / "run").rglob("*.safetensors")} == written
    assert again.report.after == result.report.after


def test_a_changed_setting_redoes_only_what_depends_on_it(
    done: tuple[pipeline.AdaptResult, Path], target: Target, draft_folder: Path, tmp_path: Path
) -> None:
    _, folder = done
    run = Path(shutil.copytree(folder / "run", tmp_path / "run"))
    before = json.loads((run / "state.json").read_text())
    pipeline.adapt(
        target,
        str(draft_folder),
        str(folder / "p.jsonl"),
        out=run,
        config=settings(train__width=12),
        off_domain={"other": str(folder / "o.jsonl")},
    )
    after = json.loads((run / "state.json").read_text())
    changed = {stage for stage in STAGES if before[stage] != after[stage]}
    assert changed == {"train", "export", "measure"}
    assert json.loads((run / "draft" / "config.json").read_text())["intermediate_size"] == 76


def test_an_interrupted_stage_keeps_what_was_paid_for(
    target: Target, draft_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = write_prompts(tmp_path / "p.jsonl", 16)
    arguments = (target, str(draft_folder), str(prompts))

    def broken(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "train_adapter", broken)
    with pytest.raises(KeyboardInterrupt):
        pipeline.adapt(*arguments, out=tmp_path / "run", config=settings())
    monkeypatch.undo()
    paid = (tmp_path / "run" / "answers" / "adapt.jsonl").stat().st_mtime_ns
    pipeline.adapt(*arguments, out=tmp_path / "run", config=settings())
    assert (tmp_path / "run" / "answers" / "adapt.jsonl").stat().st_mtime_ns == paid


def test_a_folder_with_other_files_is_refused(
    target: Target, draft_folder: Path, tmp_path: Path
) -> None:
    prompts = write_prompts(tmp_path / "p.jsonl", 16)
    with pytest.raises(UserError, match="holds other files .* name an empty folder"):
        pipeline.adapt(target, str(draft_folder), str(prompts), out=tmp_path)
    with pytest.raises(UserError, match="is a file; name a folder"):
        pipeline.adapt(target, str(draft_folder), str(prompts), out=prompts)


def test_a_draft_made_in_memory_has_to_be_saved_first(target: Target, tmp_path: Path) -> None:
    from tests.conftest import fresh_draft

    with pytest.raises(UserError, match="save it to a folder"):
        pipeline.adapt(target, fresh_draft(target), "p.jsonl", out=tmp_path / "run")


def test_the_page_says_what_the_report_says(
    done: tuple[pipeline.AdaptResult, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = done[0].report
    write_page(tmp_path / "r.html", report)
    page = (tmp_path / "r.html").read_text()
    assert f"tau {report.before.tau:.2f} → {report.after.tau:.2f}" in page
    assert f"{report.train.trained_parameters:,}" in page
    assert "off domain: other" in page
    assert "<script" not in page
    assert "http" not in page
    assert (tmp_path / "r.html").read_bytes() == (done[1] / "run" / "report.html").read_bytes()
    print_report(report)
    out = capsys.readouterr().out
    assert f"{report.after.tau:.2f} [" in out
    assert "off domain: other" in out


def test_a_draft_can_be_refreshed_without_training(
    target: Target, draft_folder: Path, tmp_path: Path
) -> None:
    """What a check's verdict to weight-sync says to run: a page without a training curve too."""
    prompts = write_prompts(tmp_path / "p.jsonl", 24)
    result = pipeline.adapt(
        target,
        str(draft_folder),
        str(prompts),
        out=tmp_path / "run",
        config=settings(
            train__method="feature-map+weight-sync+expert", train__epochs=0, train__loss="ce"
        ),
        base=target,
    )
    assert result.report.train.steps == 0
    assert "held-out tau by step" in (tmp_path / "run" / "report.html").read_text()


def test_the_target_computes_in_bf16_too(
    target_folder: Path, draft_folder: Path, tmp_path: Path
) -> None:
    """A bf16 target is served a bf16 draft; training stays in float32."""
    from redraft.models.loading import load_target

    target = load_target(str(target_folder), dtype="bfloat16")
    prompts = write_prompts(tmp_path / "p.jsonl", 12)
    result = pipeline.adapt(
        target, str(draft_folder), str(prompts), out=tmp_path / "run", config=settings()
    )
    assert load_draft(str(result.run / "draft"), target).get_parameter("fc.weight").dtype == (
        torch.bfloat16
    )
    assert (
        result.merged.tensors["fc.weight"].dtype == torch.float32
    )  # as the shared draft is stored


def test_evaluation_prompts_of_their_own_are_never_trained_on(
    target: Target, draft_folder: Path, tmp_path: Path
) -> None:
    prompts = write_prompts(tmp_path / "p.jsonl", 16)
    own = write_prompts(tmp_path / "e.jsonl", 5, start=12)  # four of them are in the first file too
    result = pipeline.adapt(
        target,
        str(draft_folder),
        str(prompts),
        out=tmp_path / "run",
        config=settings(),
        eval_prompts=str(own),
    )
    rows = {
        name: [
            tuple(json.loads(line)["prompt"])
            for line in (tmp_path / "run" / "answers" / f"{name}.jsonl").read_text().splitlines()
        ]
        for name in ("adapt", "heldout", "eval")
    }
    assert result.after.prompts == len(rows["eval"]) == 5
    assert len(rows["adapt"]) + len(rows["heldout"]) == 12
    assert not set(rows["eval"]) & {*rows["adapt"], *rows["heldout"]}


def test_a_run_of_another_method_is_not_trained_over(
    target: Target, draft_folder: Path, tmp_path: Path
) -> None:
    prompts = write_prompts(tmp_path / "p.jsonl", 20)
    run = tmp_path / "run"

    def adapt(method: str) -> pipeline.AdaptResult:
        config = settings(train__method=method)
        return pipeline.adapt(target, str(draft_folder), str(prompts), out=run, config=config)

    first = adapt("expert+fc")
    kept = {n: tensor_hash(t) for n, t in read_file(run / "adapter/model.safetensors").items()}
    assert not adapt("expert+fc").worked
    with pytest.raises(UserError, match=r"holds a run of method expert\+fc; for full name another"):
        adapt("full")
    more = str(write_prompts(tmp_path / "q.jsonl", 24))
    with pytest.raises(
        UserError, match=r"holds a run with prompts .*p\.jsonl; name another folder"
    ):
        pipeline.adapt(target, str(draft_folder), more, out=run, method="expert+fc")
    now = {n: tensor_hash(t) for n, t in read_file(run / "adapter/model.safetensors").items()}
    assert now == kept
    shutil.rmtree(run / "adapter")
    other = adapt("full")  # on the same answers
    assert other.report.train.trained_parameters > first.report.train.trained_parameters


def test_relay_without_its_base_is_refused_before_anything_is_paid_for(
    target: Target, draft_folder: Path, tmp_path: Path
) -> None:
    prompts = write_prompts(tmp_path / "p.jsonl", 20)
    config = settings(train__method="feature-map+expert")
    with pytest.raises(UserError, match="name that with --base"):
        pipeline.adapt(target, str(draft_folder), str(prompts), out=tmp_path / "run", config=config)
    assert not (tmp_path / "run").exists()


def test_an_automatic_width_is_chosen_and_resumed(
    target: Target, draft_folder: Path, tmp_path: Path
) -> None:
    prompts = write_prompts(tmp_path / "p.jsonl", 20)
    config = settings(train__width="auto", train__method="feature-map+expert")

    def adapt() -> pipeline.AdaptResult:
        out = tmp_path / "run"
        return pipeline.adapt(
            target, str(draft_folder), str(prompts), out=out, config=config, base=target
        )

    result = adapt()
    tried = load_adapter(tmp_path / "run/adapter").card["widths_tried"]
    assert len(tried) == 5
    gate = read_file(tmp_path / "run/adapter/model.safetensors")[
        "midlayer.mlp.private.gate_proj.weight"
    ]
    best = max(tried.values())
    assert len(gate) == min(int(w) for w, tau in tried.items() if tau >= 0.99 * best)
    assert result.worked
    assert not adapt().worked


def test_a_job_of_enough_prompts_writes_a_certificate(
    target: Target, draft_folder: Path, tmp_path: Path
) -> None:
    """Its answers are the target's own, and its counts those that replay finds at every K."""
    prompts = write_prompts(tmp_path / "p.jsonl", 60)
    asked = settings(measure__eval_limit=12, measure__heldout=6, train__epochs=8, train__lr=0.01)
    run = tmp_path / "run"
    pipeline.adapt(target, str(draft_folder), str(prompts), out=run, config=asked)
    found = read_certificate(run / stages.CERTIFICATE)
    assert len(found.prompts) == 18
    assert found.draft["tensors_hash"] == read_draft(str(run / "draft")).hash()
    rows = [Prompt(str(i), one.prompt) for i, one in enumerate(found.prompts)]
    answers = answer_all(target, rows, found.max_new_tokens, 8, Sampling())
    draft = load_draft(str(run / "draft"), target)
    for k in (1, 3, 7):
        traces = replay(target, draft, answers, k)
        assert [t.accepted for t in traces] == [one.accepted[k] for one in found.prompts]
    assert replay(target, draft, answers, 3) != replay(target, draft, answers, 4)
    named = {name: one.runs for one in found.faults for name in one.causes}
    (unadapted,) = accepted_runs(target, [load_draft(str(draft_folder), target)], answers, 7)
    assert named["the unadapted draft"] == tuple(unadapted)
    off = resolve([("test", {**SETTINGS, "measure.eval_limit": 12, "export.certificate": "off"})])
    pipeline.adapt(target, str(draft_folder), str(prompts), out=tmp_path / "off", config=off)
    assert not (tmp_path / "off" / stages.CERTIFICATE).exists()


def test_the_better_of_two_drafts_is_what_training_begins_with(
    done: tuple[pipeline.AdaptResult, Path],
    target: Target,
    draft_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The draft of a run before, named by its folder, against one that is accepted less; and the other way round."""
    _, folder = done
    (tmp_path / "adapted").symlink_to(folder / "run")
    own = str(folder / "run" / "draft")
    untrained = load_draft(str(draft_folder), target)
    untrained.reinitialise(7)
    stored(untrained, target).save(tmp_path / "poor")
    how = settings(
        train__method="body",
        general__guard="on",
        general__prompts=str(write_prompts(tmp_path / "g.jsonl", 40, 300)),
    )
    prompts = str(write_prompts(tmp_path / "p.jsonl", 24))

    def run(draft: object, previous: object, out: str) -> pipeline.AdaptResult:
        return pipeline.adapt(
            target, str(draft), prompts, out=tmp_path / out, config=how, previous=str(previous)
        )

    guards: list[Guard] = []

    def guard(*given: Any) -> Guard:
        guards.append(Guard(*given))
        return guards[-1]

    monkeypatch.setattr(stages, "Guard", guard)
    first = run(tmp_path / "poor", tmp_path / "adapted", "run")
    start = first.report.start
    assert start is not None
    answers = [a for a in read_answers(tmp_path / "run/answers/heldout.jsonl") if a.length > 1]
    general = [
        a for a in read_answers(tmp_path / "run/answers/general-heldout.jsonl") if a.length > 1
    ]

    def tau(draft: object, some: list[Answer]) -> float:
        traces = replay(target, load_draft(str(draft), target), some, 3)
        return pooled_tau([trace for trace in traces if trace.accepted])

    taus = [tau(tmp_path / "poor", answers), tau(tmp_path / "adapted/draft", answers)]
    assert [start.draft_tau, start.previous_tau] == pytest.approx(taus)
    assert taus[0] < taus[1]
    assert start.chosen == first.report.shared == str(tmp_path / "adapted/draft")
    measured = read_answers(tmp_path / "run/answers/eval.jsonl")
    assert first.before.tau == pytest.approx(tau(tmp_path / "adapted/draft", measured))
    reference = json.loads((tmp_path / "run/start.json").read_text())["reference"]
    assert reference == {"general prompts": pytest.approx(tau(tmp_path / "poor", general))}
    assert [each.reference for each in guards] == [reference]
    assert load_adapter(tmp_path / "run/adapter").card["shared_hash"] == read_draft(own).hash()
    out = io.StringIO()
    print_report(first.report, Console(file=out, width=200))
    assert f"training began with {start.chosen}" in out.getvalue()
    assert "training began with" in (tmp_path / "run/report.html").read_text()
    assert (
        AdaptReport.from_json(json.loads((tmp_path / "run/report.json").read_text()))
        == first.report
    )
    again = run(tmp_path / "poor", tmp_path / "adapted", "run")
    assert not again.worked

    other = run(own, tmp_path / "poor", "other")
    assert other.report.start is not None
    assert other.report.start.chosen == other.report.shared == own
    plain = pipeline.adapt(target, own, prompts, out=tmp_path / "other", config=how)
    assert plain.report.start is None


def test_a_draft_of_before_that_cannot_be_gone_on_with_is_refused(
    done: tuple[pipeline.AdaptResult, Path], target: Target, draft_folder: Path, tmp_path: Path
) -> None:
    """Before anything is generated: what would be written over, widened again, or moved twice."""
    _, folder = done
    prompts = str(write_prompts(tmp_path / "p.jsonl", 24))

    def run(out: Path, **changes: object) -> None:
        how = settings(**changes)
        pipeline.adapt(
            target, str(draft_folder), prompts, out=out, config=how, previous=str(folder / "run")
        )

    state = (folder / "run" / "state.json").read_text()
    with pytest.raises(UserError, match="which this job writes"):
        run(folder / "run")
    assert (folder / "run" / "state.json").read_text() == state
    with pytest.raises(UserError, match="was widened for its own version already"):
        run(tmp_path / "wide")
    with pytest.raises(UserError, match="a part of that way already"):
        run(tmp_path / "moved", train__method="feature-map")
    assert not (tmp_path / "wide").exists()
    assert not (tmp_path / "moved").exists()


def test_answers_of_one_token_choose_no_draft(
    done: tuple[pipeline.AdaptResult, Path], target: Target, tmp_path: Path
) -> None:
    """Of general prompts that are answered so there is no reference; of held-out ones the named draft is kept."""
    result, folder = done
    (tmp_path / "answers").mkdir()
    for name in ("heldout", "general-heldout"):
        single = replace(read_answers(folder / "run/answers/heldout.jsonl")[0], length=1)
        (tmp_path / "answers" / f"{name}.jsonl").write_text(single.to_line() + "\n")
    with RunFolder.open(tmp_path / "run") as run:
        (tmp_path / "answers").rename(run.path / "answers")
        job = Job(run, target, result.merged, None, settings().config, result.merged)
        begun = begin_with(job, {"heldout": "a", "general-heldout": "b"})
    assert begun.draft is result.merged
    assert begun.reference == {}
