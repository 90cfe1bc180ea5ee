"""`redraft verify` against a stand-in for vLLM: conclusions, causes, exit codes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from redraft.checkpoints.load import read_draft, stored
from redraft.config import resolve
from redraft.core.errors import UserError
from redraft.core.records import Acceptance, Lossless, Prompt, Verification, to_json
from redraft.decoding.sampling import Sampling
from redraft.metrics.measure import answer_all
from redraft.metrics.replay import replay
from redraft.models.loading import load_target
from redraft.models.target import Target
from redraft.pipeline import adapt as pipeline
from redraft.serving.diagnosis import diagnose
from redraft.serving.judgement import conclusion, judge, notes_on, slower_everywhere
from redraft.serving.verify import Request, fitting, serving_of, verify, with_lookahead
from tests.checkpoints.crafted import edit, retensor
from tests.cli.test_cli import run
from tests.conftest import fresh_draft, write_prompts
from tests.serving.conftest import PROMPTS, FakeEngine, K, install_fake, key

TOKENS = 12
SLOWER = 0.2
"""Seconds that every request without a draft takes longer."""


@pytest.fixture(scope="session")
def good(
    target: Target,
    draft_folder: Path,
    few_prompts: list[Prompt],
    truthful: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Verification:
    """A verification in an engine that does what it should."""
    folder = tmp_path_factory.mktemp("good")
    fake = install_fake(folder / "engine")
    fake.plan(**truthful, plain_delay=SLOWER)
    request = Request(folder / "logs", K, TOKENS, concurrencies=(1, 4), repeats=2)
    return verify(fake.environment, target, read_draft(str(draft_folder)), few_prompts, request)


def recorded(found: Verification, low: float, high: float) -> Acceptance:
    return dataclasses.replace(found.own, tau=(low + high) / 2, ci=(low, high))


def low_tau(found: Verification) -> Verification:
    """The same draft far below what its run recorded, in the engine and in redraft alike."""
    return dataclasses.replace(found, recorded=recorded(found, 3.9, 4.0))


def test_a_good_draft_is_served(good: Verification) -> None:
    assert good.good
    assert good.conclusion == "serve it"
    assert good.causes == ()
    assert good.outputs == good.against_redraft == Lossless(PROMPTS, PROMPTS, 0)
    assert (good.tau.drafts, good.tau.accepted) == (good.own.steps, good.own.accepted)
    assert good.tau.accepted > 0
    assert good.tau.drafted == K * good.tau.drafts
    assert good.tau.per_position == pytest.approx(good.own.per_position)
    assert [at.concurrency for at in good.speed] == [1, 4]
    assert all(at.plain.repeats == 2 and at.plain.tokens_per_second > 0 for at in good.speed)


def test_a_record_read_back_is_the_one_written(good: Verification) -> None:
    for found in (good, low_tau(good)):
        assert Verification.from_json(json.loads(json.dumps(to_json(found)))) == found


def test_other_outputs_with_the_draft(good: Verification) -> None:
    speed = list(good.speed)
    speed[1] = dataclasses.replace(speed[1], outputs=Lossless(PROMPTS, 3, 1))
    assert judge(dataclasses.replace(good, speed=tuple(speed))) == [
        "with the draft 1 of 5 outputs differ from those without it (4 at a time)"
    ]


def test_near_ties_are_no_difference(good: Verification) -> None:
    few = Lossless(PROMPTS, 3, 2, ties=3, tokens=40, own_ties=2, own_tokens=40)
    speed = (dataclasses.replace(good.speed[0], outputs=few),)
    assert judge(dataclasses.replace(good, speed=speed)) == []


def test_more_near_ties_than_plain_decoding_has_are_one(good: Verification) -> None:
    many = Lossless(PROMPTS, 0, 5, ties=12, tokens=200, own_ties=1, own_tokens=200)
    speed = (dataclasses.replace(good.speed[0], outputs=many),)
    (reason,) = judge(dataclasses.replace(good, speed=speed))
    assert "12 in 200 tokens where plain decoding has 1 in 200: more than rounding" in reason
    unaudited = Lossless(PROMPTS, 3, 2)
    speed = (dataclasses.replace(good.speed[0], outputs=unaudited),)
    assert judge(dataclasses.replace(good, speed=speed))


@pytest.mark.parametrize(
    ("dtype", "tolerance", "reasons"), [("float32", 0.01, 1), ("bfloat16", 0.03, 0)]
)
def test_an_engine_that_counts_otherwise(
    good: Verification, dtype: str, tolerance: float, reasons: int
) -> None:
    tau = dataclasses.replace(good.tau, tau=good.own.tau * 0.98)
    found = dataclasses.replace(good, tau=tau, dtype=dtype, tolerance=tolerance)
    judged = judge(found)
    assert len(judged) == reasons
    assert all("the engine counts tau" in text and "differ by 1%" in text for text in judged)


def test_an_engine_with_another_target(good: Verification) -> None:
    other = dataclasses.replace(good, against_redraft=Lossless(PROMPTS, 2, 0))
    words = "even without a draft 3 of 5 answers differ between the engine and redraft"
    assert words in judge(other)[0]
    half = dataclasses.replace(other, dtype="bfloat16")
    assert judge(half) == []
    assert any(words in note and "rounding" in note for note in notes_on(half))


def test_a_fatal_finding_in_the_files(good: Verification) -> None:
    found = dataclasses.replace(good, findings=("norm.weight is missing",))
    assert judge(found) == ["norm.weight is missing"]


def test_tau_against_the_runs_record(good: Verification) -> None:
    assert "lies below the run's record 3.95 [3.90, 4.00]" in judge(low_tau(good))[0]
    same = dataclasses.replace(good, recorded=good.own)
    assert judge(same) == []
    other_k = dataclasses.replace(low_tau(good), k=K + 1)
    assert judge(other_k) == []
    assert any("not compared" in note for note in notes_on(other_k))
    low = low_tau(good)
    assert low.recorded is not None
    warm = dataclasses.replace(low, recorded=dataclasses.replace(low.recorded, temperature=0.7))
    assert judge(warm) == []
    assert any("temperature 0.7, this at" in note for note in notes_on(warm))


@pytest.mark.parametrize(
    ("ratios", "sentence"),
    [
        ((1.5, 1.0), "serve it"),
        (
            (1.07, 0.79),
            "serve it where it gains: 1 (1.07x) request at a time; it is slower than without a draft at "
            "4 (0.79x) requests at a time",
        ),
        (
            (0.9, 0.8),
            "do not serve it on this machine: slower than without a draft at 1 (0.90x), 4 (0.80x) "
            "requests at a time",
        ),
    ],
)
def test_the_conclusion_follows_the_speeds(
    good: Verification, ratios: tuple[float, ...], sentence: str
) -> None:
    speed = tuple(
        dataclasses.replace(at, ratio=ratio) for at, ratio in zip(good.speed, ratios, strict=True)
    )
    found = dataclasses.replace(good, speed=speed)
    assert judge(found) == []
    assert conclusion(found, []) == sentence
    assert slower_everywhere(found) == sentence.startswith("do not")
    assert conclusion(found, ["another reason"]) == "do not serve it: another reason"


def test_an_engine_that_drafts_nothing(good: Verification) -> None:
    tau = dataclasses.replace(good.tau, tau=1.0, drafts=0, drafted=0, accepted=0)
    (reason,) = judge(dataclasses.replace(good, tau=tau))
    assert reason == "the engine drafted nothing; its log (draft.log) tells why"


def test_flags_that_change_the_target_excuse_other_answers(good: Verification) -> None:
    """Texts with the draft are still compared with those without it, under the same flags."""
    tau = dataclasses.replace(good.tau, tau=good.own.tau * 0.8)
    other = dataclasses.replace(
        good,
        tau=tau,
        against_redraft=Lossless(PROMPTS, 2, 0),
        engine_args=("--kv-cache-dtype", "fp8"),
    )
    assert judge(other) == []
    notes = notes_on(other)
    assert "these --engine-args can do that" in notes[0]
    assert notes[1].startswith("so its tau is not compared")
    same = dataclasses.replace(other, against_redraft=good.against_redraft)
    assert "the engine counts tau" in judge(same)[0]


def test_the_users_flags_reach_both_servers(
    fake: FakeEngine,
    target: Target,
    draft_folder: Path,
    few_prompts: list[Prompt],
    truthful: dict[str, Any],
    tmp_path: Path,
) -> None:
    fake.plan(**truthful)
    flags = ("--kv-cache-dtype", "fp8")
    request = Request(tmp_path, K, TOKENS, (1,), repeats=1, engine_args=flags)
    found = verify(fake.environment, target, read_draft(str(draft_folder)), few_prompts, request)
    assert found.engine_args == flags
    assert tuple(fake.started["argv"][-2:]) == flags
    plain = dataclasses.replace(serving_of(target, few_prompts, request), speculation=None)
    assert plain.flags == flags


def test_a_misread_draft_is_named_with_what_the_files_show(
    good: Verification, target: Target, draft_folder: Path
) -> None:
    tau = dataclasses.replace(good.tau, tau=1.0)
    stored = read_draft(str(draft_folder))
    found = dataclasses.replace(good, tau=tau)
    (cause,) = diagnose(stored, target, found)
    assert cause.startswith("the engine computes another function from these files")
    assert cause.endswith("nothing in the files explains it")
    found = dataclasses.replace(found, findings=("d2t holds absolute ids",))
    (cause,) = diagnose(stored, target, found)
    assert cause.endswith("in the files: d2t holds absolute ids")


def test_a_changed_target_is_named(good: Verification, target: Target, draft_folder: Path) -> None:
    stored = read_draft(str(draft_folder))

    def causes(**changed: Any) -> list[str]:
        provenance = {**stored.provenance, **changed}
        draft = dataclasses.replace(stored, provenance=provenance)
        return diagnose(draft, target, low_tau(good))

    assert "these prompts are harder" in causes()[0]
    assert causes(target_fingerprint="0123") == [
        "the target changed since this draft was adapted (fingerprint 0123 then, "
        f"{target.fingerprint()} now)"
    ]
    assert "the chat template is not the one" in causes(template_hash="4567")[0]
    nothing = dataclasses.replace(stored, provenance={})
    (cause,) = diagnose(nothing, target, low_tau(good))
    assert "does not record which target it was made for" in cause


def test_another_dtype_is_not_called_another_target(
    good: Verification, target_folder: Path, draft_folder: Path
) -> None:
    half = load_target(str(target_folder), dtype="bfloat16")
    (cause,) = diagnose(read_draft(str(draft_folder)), half, low_tau(good))
    assert (
        cause == "this draft was adapted to the target in float32, here the target runs in bfloat16"
    )


def test_steps_of_answers_that_part_in_half_precision_are_compared(
    target_folder: Path,
    draft_folder: Path,
    few_prompts: list[Prompt],
    fake: FakeEngine,
    tmp_path: Path,
) -> None:
    """The engine's answers are continued from another token than the target's own, and its steps are of those."""
    half = load_target(str(target_folder), dtype="bfloat16")
    own = answer_all(half, few_prompts, TOKENS, K, Sampling())
    said = []
    for prompt, answer in zip(few_prompts, own, strict=True):
        begin = [*answer.answer[:2], (answer.answer[2] + 1) % 90]
        (rest,) = answer_all(half, [Prompt("", (*prompt.tokens, *begin))], 9, K, Sampling())
        said.append([*begin, *rest.answer])
    given = with_lookahead(half, few_prompts, said, K)
    stored_draft = read_draft(str(draft_folder))
    traces = replay(half, stored_draft.build(half), given, K)
    fake.plan(
        k=K,
        answers={key(p.tokens): tokens for p, tokens in zip(few_prompts, said, strict=True)},
        steps={key(p.tokens): list(t.accepted) for p, t in zip(few_prompts, traces, strict=True)},
    )
    request = Request(tmp_path / "logs", K, TOKENS, concurrencies=(1,), repeats=1)
    found = verify(fake.environment, half, stored_draft, few_prompts, request)
    assert found.against_redraft.identical == 0
    assert (found.tau.drafts, found.tau.accepted) == (found.own.steps, found.own.accepted)
    assert not any("where redraft counts" in reason for reason in judge(found))
    whole = load_target(str(target_folder))
    strict = verify(fake.environment, whole, stored_draft, few_prompts, request)
    assert any("even without a draft" in reason for reason in judge(strict))
    flagged = dataclasses.replace(request, engine_args=("--kv-cache-dtype", "fp8"))
    other = verify(fake.environment, half, stored_draft, few_prompts, flagged)
    for loaded, found in ((whole, strict), (half, other)):  # there redraft's own answers count
        answers = answer_all(loaded, few_prompts, TOKENS, K, Sampling())
        steps = replay(loaded, stored_draft.build(loaded), answers, K)
        assert found.own.accepted == sum(int(trace.gained) for trace in steps)
        assert found.own.accepted != found.tau.accepted


def test_prompts_without_room_are_left_out(target: Target, few_prompts: list[Prompt]) -> None:
    long = Prompt("long", tuple([5] * 240))
    assert fitting([*few_prompts, long], target, Request(Path())) == few_prompts
    with pytest.raises(UserError, match="none of the 1 prompts leaves space for 128 tokens"):
        fitting([long], target, Request(Path()))


def test_a_dtype_the_engine_has_not(target_folder: Path, few_prompts: list[Prompt]) -> None:
    double = load_target(str(target_folder), dtype="float64")
    with pytest.raises(UserError, match="vLLM does not serve float64"):
        serving_of(double, few_prompts, Request(Path()))


# -- the command -------------------------------------------------------------------------------


@pytest.fixture
def redraft(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda *arguments: run(capsys, monkeypatch, *arguments)


@pytest.fixture(scope="session")
def finished_run(
    target: Target, draft_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run of `redraft adapt` whose adapter hardly moved."""
    folder = tmp_path_factory.mktemp("runs")
    prompts = write_prompts(folder / "prompts.jsonl", 16)
    settings = {
        "train": {"method": "expert", "width": 4, "epochs": 0.1, "lr": 1e-6},
        "measure": {"k": K, "eval_limit": 4, "heldout": 4, "eval_new_tokens": TOKENS},
        "regenerate": {"max_new_tokens": TOKENS},
    }
    pipeline.adapt(
        target,
        str(draft_folder),
        str(prompts),
        out=folder / "run",
        config=resolve([("test", settings)]),
    )
    return folder / "run"


def plan_of(finished: Path, target: Target, draft: str) -> dict[str, Any]:
    """What a truthful engine does with a run's own evaluation prompts."""
    from redraft.checkpoints.load import load_draft
    from redraft.generation.answer_file import read_answers
    from redraft.metrics.replay import replay
    from tests.serving.conftest import key

    answers = read_answers(finished / "answers" / "eval.jsonl")
    traces = replay(target, load_draft(draft, target), answers, K)
    return {
        "k": K,
        "answers": {key(a.prompt): list(a.answer) for a in answers},
        "steps": {key(a.prompt): list(t.accepted) for a, t in zip(answers, traces, strict=True)},
    }


def test_verify_a_run(redraft: Any, fake: FakeEngine, finished_run: Path, target: Target) -> None:
    plan = plan_of(finished_run, target, str(finished_run / "draft"))
    fake.plan(**plan, plain_delay=SLOWER)
    arguments = ("verify", "--run", finished_run, "--python", fake.python, "--quiet")
    code, out, err = redraft(*arguments, "--concurrency", "1", "--repeats", 1, "--json")
    assert code == 0, err
    found = Verification.from_json(json.loads(out))
    assert found.good
    assert found.k == K
    assert found.draft == str(finished_run / "draft")
    assert found.recorded is not None
    assert (found.tau.drafts, found.tau.accepted) == (found.recorded.steps, found.recorded.accepted)
    assert (finished_run / "verify" / "draft.log").is_file()
    assert f"{found.speed[0].ratio:.2f}× at 1 request" in (finished_run / "report.html").read_text()


def test_a_draft_not_fit_to_serve_exits_with_3(
    redraft: Any,
    fake: FakeEngine,
    finished_run: Path,
    target: Target,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    plan = plan_of(finished_run, target, str(finished_run / "draft"))
    first = next(iter(plan["answers"]))
    fake.plan(
        **{**plan, "steps": {key: [0] * 11 for key in plan["steps"]}},
        drafted_answers={first: [1, 2, 3]},
    )
    code, out, err = redraft(
        *("verify", "--run", finished_run, "--python", fake.python, "--quiet"),
        *("--concurrency", "1", "--repeats", 1),
    )
    assert code == 3, err
    printed = " ".join(out.split())
    assert "do not serve it: with the draft 1 of 4 outputs differ from those without it" in printed
    assert "the engine counts tau 1.000" in printed
    assert "cause: the engine computes another function" in printed
    assert "3/4 same, 1 DIFFERENT" in printed


@pytest.mark.parametrize(
    ("options", "planted", "named"),
    [
        ({}, {"midlayer__mlp__up_proj__weight": None}, "missing midlayer.mlp.up_proj.weight"),
        ({"vocab": 40}, {"d2t": "absolute"}, "these look like absolute ids"),
        ({}, {"config": {"model_type": ...}}, "vllm does not load it"),
    ],
)
def test_files_wrong_as_they_lie_there_need_no_engine(
    redraft: Any,
    fake: FakeEngine,
    target: Target,
    target_folder: Path,
    tmp_path: Path,
    options: dict[str, Any],
    planted: dict[str, Any],
    named: str,
) -> None:
    draft = fresh_draft(target, **options)
    stored(draft, target).save(tmp_path / "d")
    planted = dict(planted)
    edit(tmp_path / "d", **planted.pop("config", {}))
    ids = {name: draft.draft_vocab for name, value in planted.items() if value == "absolute"}
    retensor(tmp_path / "d", **{**planted, **ids})
    prompts = write_prompts(tmp_path / "p.jsonl", 3)
    arguments = ("verify", "--target", target_folder, "--draft", tmp_path / "d")
    arguments += ("--prompts", prompts, "--python", fake.python)
    code, out, _ = redraft(*arguments)
    assert code == 3
    assert named in out
    assert not (fake.folder / "started.json").exists()
    code, out, _ = redraft(*arguments, "--json")
    assert code == 3
    assert named in json.loads(out)["conclusion"]
    assert json.loads(out)["findings"]


def test_another_reading_that_accepts_more_is_a_reason_and_a_cause(
    good: Verification, target: Target, draft_folder: Path
) -> None:
    found = dataclasses.replace(low_tau(good), findings=("the aux layers are wrong: hs[1, 2, 3]",))
    assert "the aux layers are wrong: hs[1, 2, 3]" in judge(found)
    assert diagnose(read_draft(str(draft_folder)), target, found) == []  # the finding says it


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "sglang"], "checked against its loaders' names and shapes only"),
        (["--engine", "vlm"], "unknown --engine 'vlm'; did you mean 'vllm'?"),
        (["--engine-args", "--a 'b"], "takes flags as a shell does, in one argument"),
        (["--engine-args", "--port=1"], "redraft gives vLLM this flag itself; leave it out"),
        (
            ["--engine", "llama.cpp", "--engine-args", "-t 1 -m x.gguf"],
            "--engine-args -m: redraft gives llama.cpp this flag itself",
        ),
        (["--concurrency", "1,x"], "--concurrency takes counts of at least 1"),
        (["--concurrency", "0"], "--concurrency takes counts of at least 1"),
        (["--draft", "d"], "name --target, --draft and --prompts, or a finished run with --run"),
        (["--run", "nowhere"], "nowhere: expected a file report.json"),
        (
            ["--target", "t", "--draft", "d", "--prompts", "p", "--python", "nowhere"],
            "--python nowhere: expected the Python interpreter of an environment with vLLM",
        ),
    ],
)
def test_mistakes_exit_with_2(redraft: Any, arguments: list[str], message: str) -> None:
    code, out, err = redraft("verify", *arguments)
    assert code == 2
    assert message in " ".join(err.split())
    assert out == ""
