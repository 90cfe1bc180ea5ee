"""Safety prompts: a right loop changes nothing, one that loses tokens is found out in every arm."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from redraft.config import resolve
from redraft.core.errors import UserError
from redraft.core.records import Prompt, Safety, to_json
from redraft.core.report_record import AdaptReport
from redraft.decoding import acceptance_modes
from redraft.decoding.sampling import Sampling
from redraft.generation.answer_file import read_answers
from redraft.metrics.measure import answer_all
from redraft.metrics.safety import ARMS, Answers, judge, repeated, with_draft
from redraft.models.target import Target
from redraft.pipeline import adapt as pipeline
from redraft.pipeline import safety
from redraft.report.page import write_page
from redraft.report.terminal import print_report
from tests.conftest import fresh_draft, in_double, write_prompts
from tests.pipeline.test_adapt import settings

K, LONGEST, SAMPLES, WARM = 3, 6, 8, 1.5


@dataclasses.dataclass(frozen=True)
class MadeUp:
    """A target that refuses by its second token: where it is one that the draft can propose."""

    target: Target
    draft: Any
    prompts: list[Prompt]

    def safety(self, harmful: dict[str, bool | None] | None = None) -> Safety:
        again = repeated(self.prompts, SAMPLES)
        asked = {"greedy": self.prompts, "seeded": again[::SAMPLES], "sampled": again}
        drafted = {
            arm: [
                answer
                for batch in with_draft(
                    *(self.target, self.draft, asked[arm], arm),
                    k=K,
                    max_new_tokens=LONGEST,
                    temperature=WARM,
                    seed=5,
                    batch_size=64,
                    batch_tokens=4096,
                )
                for answer in batch
            ]
            for arm in ARMS
        }
        plain = [
            answer_all(self.target, some, LONGEST, K, sampling, 5)
            for some, sampling in ((self.prompts, Sampling()), (again, Sampling(WARM)))
        ]
        return judge(
            self.target,
            self.prompts,
            harmful or {},
            Answers(*plain, **drafted),
            source="made up",
            k=K,
            temperature=WARM,
            max_new_tokens=LONGEST,
            greedy_new_tokens=LONGEST,
        )


@pytest.fixture(scope="module")
def made_up(target_folder: Path, prompts: list[Prompt]) -> MadeUp:
    target = copy.copy(in_double(target_folder))
    draft = fresh_draft(target, vocab=40)
    proposed = set(draft.draft_vocab.tolist())

    def decode(tokens: list[int], **_: Any) -> str:
        return "I can't help with that." if tokens[1:2] and tokens[1] in proposed else "Certainly."

    target.tokenizer = SimpleNamespace(decode=decode, eos_token_id=target.tokenizer.eos_token_id)
    return MadeUp(target, draft, prompts)


def everything_accepted(patch: pytest.MonkeyPatch) -> None:
    """A loop that takes over whatever the draft says."""

    def all_of(drafted_BK: Tensor) -> Tensor:
        return torch.full((len(drafted_BK),), drafted_BK.shape[1], device=drafted_BK.device)

    patch.setattr(acceptance_modes, "accept_chosen", lambda drafted, chosen: all_of(drafted))
    patch.setattr(
        acceptance_modes, "accept_sampled", lambda p, q, drafted, u: (all_of(drafted), p[:, -1])
    )


def test_a_right_loop_changes_nothing(made_up: MadeUp) -> None:
    harmful = {p.id: i % 2 == 0 for i, p in enumerate(made_up.prompts[:20])}
    found = made_up.safety(harmful)
    assert (found.greedy.identical, found.seeded.identical) == (24, 24)  # float64: no excuses
    assert [r.group for r in found.refusals] == ["all", "harmful", "harmless", "unlabelled"]
    assert [r.prompts for r in found.refusals] == [24, 10, 10, 4]
    rates = found.refusals[0]
    assert 0.02 < rates.plain < 0.9
    assert rates.conclusion.startswith("equal within")
    assert rates.detectable is not None
    assert rates.detectable < 0.2
    assert found.good
    assert "changes no greedy and no seeded answer" in found.conclusion
    assert Safety.from_json(to_json(found)) == found
    parts = [(r.plain * r.prompts, r.drafted * r.prompts) for r in found.refusals]
    assert parts[0] == pytest.approx(tuple(map(sum, zip(*parts[1:], strict=True))))


def test_a_loop_that_accepts_everything_is_found_out(
    made_up: MadeUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything_accepted(monkeypatch)
    found = made_up.safety()
    assert found.greedy.different > 12
    assert found.seeded.different > 12
    assert found.refusals[0].conclusion == "differ"
    assert found.refusals[0].difference > (found.refusals[0].detectable or 1)
    assert not found.good
    for arm in ("greedy", "seeded", "refusal rate"):
        assert arm in found.conclusion


def test_sampled_answers_have_noise_of_their_own(made_up: MadeUp) -> None:
    """With one noise for both, equal rates would say nothing of the acceptance rule."""
    again = repeated(made_up.prompts[:6], 4)
    names = {p.id for p in again}
    assert len(names) == 24
    arms = {
        arm: list(
            itertools.chain.from_iterable(
                with_draft(
                    *(made_up.target, made_up.draft, again, arm),
                    k=K,
                    max_new_tokens=LONGEST,
                    temperature=WARM,
                    seed=5,
                    batch_size=9,
                    batch_tokens=4096,
                )
            )
        )
        for arm in ("seeded", "sampled")
    }
    plain = answer_all(made_up.target, again, LONGEST, K, Sampling(WARM), 5)
    assert [a.answer for a in arms["seeded"]] == [a.answer for a in plain]
    same = sum(a.answer == b.answer for a, b in zip(arms["sampled"], plain, strict=True))
    assert same < 12
    assert not {a.seed for a in arms["sampled"]} & {a.seed for a in plain}


@pytest.mark.parametrize(
    ("text", "says"), [("I can't help with that.", "takes away"), ("Yes.", "adds")]
)
def test_a_target_that_always_or_never_refuses_is_said_to_show_little(
    made_up: MadeUp, text: str, says: str
) -> None:
    target = copy.copy(made_up.target)
    target.tokenizer = SimpleNamespace(
        decode=lambda tokens, **_: text, eos_token_id=made_up.target.tokenizer.eos_token_id
    )
    found = dataclasses.replace(made_up, target=target).safety()
    assert f"only refusals that a draft {says}" in found.notes[0]
    assert found.refusals[0].conclusion == "equal within 4.2 points"  # 8 of 192 answers
    assert found.refusals[0].plain_ci[1] - found.refusals[0].plain_ci[0] > 0.1


# -- the file, and the stages in a run ---------------------------------------------------------------


def test_flags_are_read_from_harmful_and_from_labels(target: Target, tmp_path: Path) -> None:
    file = tmp_path / "s.jsonl"
    extra = [{"harmful": True}, {"harmful": False}, {"label": "unsafe"}, {"label": "safe"}, {}]
    rows = [{"id": f"r{i}", "prompt": f"Say {i}", **flag} for i, flag in enumerate(extra)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = safety.read_safety_prompts(str(file), target, 99)
    assert list(found.harmful.values()) == [True, False, True, False, None]
    file.write_text(json.dumps({"id": "x", "prompt": "Hi", "harmful": "yes"}) + "\n")
    with pytest.raises(UserError, match="row x: harmful is true or false.*got 'yes'"):
        safety.read_safety_prompts(str(file), target, 99)
    file.write_text("{}\n")
    with pytest.raises(UserError, match="no prompts left"):
        safety.read_safety_prompts(str(file), target, 99)


WITH_SAFETY = {
    "safety.samples": 4,
    "safety.max_new_tokens": 8,
    "measure.eval_new_tokens": 12,
    "regenerate.batch_size": 8,
    "train.epochs": 1,
}


@pytest.fixture(scope="module")
def job(draft_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("safety")
    prompts = write_prompts(folder / "p.jsonl", 16)
    own = write_prompts(folder / "s.jsonl", 10, start=14)  # two are in the first file too
    rows = [json.loads(line) for line in own.read_text().splitlines()]
    flagged = [{**row, "harmful": i % 2 == 0} for i, row in enumerate(rows)]
    own.write_text("".join(json.dumps(row) + "\n" for row in flagged))
    changes = {key.replace(".", "__"): value for key, value in WITH_SAFETY.items()}
    return {
        "draft": str(draft_folder),
        "prompts": str(prompts),
        "config": settings(**changes),
        "safety_prompts": str(own),
    }


@pytest.fixture(scope="module")
def whole(target: Target, job: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    return pipeline.adapt(target, out=tmp_path_factory.mktemp("run") / "run", **job)


def test_the_report_shows_the_comparison(
    whole: pipeline.AdaptResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = whole.report.safety
    assert found is not None
    assert found.prompts == found.greedy.prompts == found.seeded.prompts == 10
    assert found.greedy.holds
    assert found.seeded.holds
    assert [(r.group, r.prompts, r.samples) for r in found.refusals] == [
        ("all", 10, 4),
        ("harmful", 5, 4),
        ("harmless", 5, 4),
    ]
    assert "2 of the safety prompts are among the prompts adapted on too" in found.notes[0]
    asked = {a.prompt for a in read_answers(whole.run / "safety" / "greedy.jsonl")}
    trained = {a.prompt for a in read_answers(whole.run / "answers" / "adapt.jsonl")}
    assert len(asked) == 10
    assert not asked & trained
    assert set(whole.report.off_domain) == {"safety-before", "safety-after"}
    assert AdaptReport.from_json(to_json(whole.report)) == whole.report
    page = " ".join((whole.run / "report.html").read_text().split())
    print_report(whole.report)
    out = " ".join(capsys.readouterr().out.split())
    for shown in ("10/10 same", found.refusals[0].conclusion, "harmful: 5", found.notes[0][:40]):
        assert shown in page
        assert shown in out
    older = to_json(whole.report)
    del older["safety"]
    del older["config"]["safety"]
    assert AdaptReport.from_json(older).safety is None
    write_page(tmp_path / "r.html", AdaptReport.from_json(older))
    assert "Safety prompts" not in (tmp_path / "r.html").read_text()


def test_an_interrupted_comparison_goes_on_where_it_was(
    whole: pipeline.AdaptResult,
    target: Target,
    job: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right, batches = safety.append_lines, itertools.count()

    def killed(file: Path, lines: list[str]) -> None:
        if next(batches) == 6:  # two batches of greedy, two of seeded, two of sampled answers
            raise KeyboardInterrupt
        right(file, lines)

    monkeypatch.setattr(safety, "append_lines", killed)
    with pytest.raises(KeyboardInterrupt):
        pipeline.adapt(target, out=tmp_path / "run", **job)
    kept = (tmp_path / "run" / "safety" / "sampled.jsonl").read_text()
    assert len(kept.splitlines()) == 16
    asked: list[int] = []

    def counted(file: Path, lines: list[str]) -> None:
        asked.append(len(lines))
        right(file, lines)

    monkeypatch.setattr(safety, "append_lines", counted)
    again = pipeline.adapt(target, out=tmp_path / "run", **job)
    assert asked == [8, 8, 8]
    for arm in ("greedy", "seeded", "sampled"):
        name = f"safety/{arm}.jsonl"
        assert (again.run / name).read_text() == (whole.run / name).read_text()
    assert again.report.safety == whole.report.safety
    assert not pipeline.adapt(target, out=tmp_path / "run", **job).worked


def test_settings_of_the_comparison_redo_the_comparison_alone(
    whole: pipeline.AdaptResult, target: Target, job: dict[str, Any]
) -> None:
    before = json.loads((whole.run / "state.json").read_text())
    origins = [("test", dataclasses.asdict(job["config"].config)), ("again", {"safety.samples": 2})]
    found = pipeline.adapt(target, out=whole.run, **{**job, "config": resolve(origins)})
    after = json.loads((whole.run / "state.json").read_text())
    assert {name for name in after if after[name] != before[name]} == {
        "regenerate safety-sampled",
        "measure safety",
    }
    assert found.report.safety is not None
    assert found.report.safety.refusals[0].samples == 2


def test_the_name_safety_is_taken(target: Target, job: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'safety' is that of --safety-prompts"):
        pipeline.adapt(target, out=tmp_path / "run", off_domain={"safety": job["prompts"]}, **job)


def test_what_is_measured_at_a_temperature_leaves_greedy_compared_with_greedy(
    target: Target,
    job: dict[str, Any],
    whole: pipeline.AdaptResult,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changes = {key.replace(".", "__"): value for key, value in WITH_SAFETY.items()}
    warm = settings(**changes, measure__temperature=0.4, select__budget="1.0")
    found = pipeline.adapt(target, out=tmp_path / "run", **{**job, "config": warm})
    for name, temperature in {"eval": 0.4, "heldout": 0.4, "off-safety": 0.0, "adapt": 0.0}.items():
        answers = read_answers(found.run / "answers" / f"{name}.jsonl")
        assert {a.temperature for a in answers} == {temperature}, name
    report = found.report
    assert (report.before.temperature, report.after.temperature) == (0.4, 0.4)
    assert (report.before.acceptance, report.before.draft_token) == ("sampled", "deterministic")
    assert report.safety is not None
    assert report.safety.greedy.holds
    assert report.safety.greedy.prompts == 10
    print_report(report)
    shown = capsys.readouterr().out
    assert "temperature 0.4" in shown
    assert "off domain: safety (greedy)" in shown
    assert "off domain: safety (greedy)" in (found.run / "report.html").read_text()
    assert "temperature 0.4.</p>" in " ".join((found.run / "report.html").read_text().split())
    assert "greedy.</p>" in " ".join((whole.run / "report.html").read_text().split())
