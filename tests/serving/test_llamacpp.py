"""llama.cpp: conversion, the server's flags, how it counts, and every way in which it fails.

The server script and the converter's wrapper are the real ones; what they import are stand-ins.
"""

from __future__ import annotations

import dataclasses
import json
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from redraft.checkpoints.load import read_draft
from redraft.core.errors import UserError
from redraft.core.records import Answer, Prompt
from redraft.decoding.sampling import Sampling
from redraft.drafts.base import Draft
from redraft.drafts.eagle3.network import Eagle3Draft
from redraft.metrics.measure import answer_all, measure
from redraft.metrics.replay import replay
from redraft.models.loading import load_target
from redraft.models.target import Target
from redraft.serving.certificate_check import cut_steps, whole_steps
from redraft.serving.engine import Serving, Speculation
from redraft.serving.judgement import judge
from redraft.serving.llamacpp import LLAMACPP, prepare
from redraft.serving.own_count import Limits, count_own
from redraft.serving.verify import Request, serving_of, verify, with_lookahead
from redraft.serving.vllm import VLLM
from tests.models.gguf_writer import write
from tests.serving.conftest import FakeEngine, K, install_llamacpp, key

SLOWER, TOKENS = 0.05, 12
STOP = 1


@pytest.fixture
def what(tmp_path: Path) -> Serving:
    """A target and a draft, as folders with a file in each."""
    for name in ("target", "draft"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"name": name}))
        (tmp_path / name / "model.safetensors").write_text(name)
    return Serving(
        str(tmp_path / "target"),
        dtype="float32",
        max_model_len=300,
        speculation=Speculation("draft-eagle3", str(tmp_path / "draft"), 4),
    )


def written(file: str) -> dict[str, Any]:
    """What the stand-in for the converter was asked."""
    found: dict[str, Any] = json.loads(Path(file).read_text())
    return found


# -- the environment ---------------------------------------------------------------------------


def test_the_variable_names_the_environment(
    fake_llamacpp: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDRAFT_LLAMACPP_PYTHON", str(fake_llamacpp.python))
    assert LLAMACPP.find() == fake_llamacpp.environment


def test_an_environment_without_it() -> None:
    with pytest.raises(UserError, match=r"has no llama\.cpp; install its server(.|\n)*xllamacpp=="):
        LLAMACPP.find(sys.executable)


def test_a_version_too_old(tmp_path: Path) -> None:
    old = install_llamacpp(tmp_path / "old", version="2025.7.1")
    with pytest.raises(UserError, match=r"has xllamacpp 2025\.7\.1; 2026\.10 is the oldest"):
        LLAMACPP.find(str(old.python))


# -- conversion --------------------------------------------------------------------------------


def test_target_and_draft_are_converted(
    fake_llamacpp: FakeEngine, what: Serving, tmp_path: Path
) -> None:
    found = prepare(fake_llamacpp.environment, what, tmp_path / "gguf")
    assert found.speculation is not None
    target, draft = written(found.target), written(found.speculation.draft)
    assert target["folder"] == what.target
    assert target["given"]["--outtype"] == "f32"
    assert "--target-model-dir" not in target["given"]
    assert draft["folder"] == str(tmp_path / "draft")
    assert draft["given"]["--target-model-dir"] == what.target
    assert target["trusted"] is draft["trusted"] is False
    assert target["vocabulary"] == "known"
    plain = prepare(
        fake_llamacpp.environment, dataclasses.replace(what, speculation=None), tmp_path / "gguf"
    )
    assert plain == dataclasses.replace(found, speculation=None)


def test_what_is_there_is_not_converted_again(
    fake_llamacpp: FakeEngine, what: Serving, tmp_path: Path
) -> None:
    def convert() -> tuple[str, str]:
        found = prepare(fake_llamacpp.environment, what, tmp_path / "gguf")
        assert found.speculation is not None
        return found.target, found.speculation.draft

    target, draft = convert()
    for file in (target, draft):
        Path(file).write_text("kept")
    assert convert() == (target, draft)
    assert Path(target).read_text() == Path(draft).read_text() == "kept"
    (tmp_path / "draft" / "model.safetensors").write_text("trained on")
    same, other = convert()
    assert (same, other == draft) == (target, False)
    (tmp_path / "target" / "tokenizer.json").write_text("{}")
    assert not {target, other} & set(convert())  # the draft's file holds the target's tokenizer


@pytest.mark.parametrize("wrong", ["an unknown way of splitting text", "a tokenizer.model"])
def test_tokenizers(fake_llamacpp: FakeEngine, what: Serving, tmp_path: Path, wrong: str) -> None:
    target = tmp_path / "target"
    (target / ("tokenizer.model" if "model" in wrong else "own-splitting")).write_text("")
    plain = dataclasses.replace(what, speculation=None)
    if "model" in wrong:
        with pytest.raises(UserError, match=r"not take .*target .exit code 1.: .*sentencepiece"):
            prepare(fake_llamacpp.environment, plain, tmp_path / "gguf")
    else:
        found = prepare(fake_llamacpp.environment, plain, tmp_path / "gguf")
        assert written(found.target)["vocabulary"] == "default"


def test_a_draft_that_the_converter_refuses(
    fake_llamacpp: FakeEngine, what: Serving, tmp_path: Path
) -> None:
    (tmp_path / "draft" / "refused").write_text("")
    with pytest.raises(
        UserError,
        match=r"converter does not take .*draft .exit code 1.: ValueError: Can not map tensor "
        r"'fc_norm.weight'; its log: .*\.log",
    ):
        prepare(fake_llamacpp.environment, what, tmp_path / "gguf")
    assert [path.name.split("-")[0] for path in (tmp_path / "gguf").glob("*.gguf")] == ["target"]
    assert not list((tmp_path / "gguf").glob("*.part"))


def test_an_environment_without_the_converter(
    fake_llamacpp: FakeEngine, what: Serving, tmp_path: Path
) -> None:
    (fake_llamacpp.folder / "llama.cpp" / "convert_hf_to_gguf.py").unlink()
    with pytest.raises(
        UserError, match=r"expected llama.cpp's source with convert_hf_to_gguf.py, found a folder"
    ):
        prepare(fake_llamacpp.environment, what, tmp_path / "gguf")


def test_an_adapter_is_refused(fake_llamacpp: FakeEngine, what: Serving, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="adapter a: .* save the target with its adapter"):
        prepare(fake_llamacpp.environment, dataclasses.replace(what, adapter="a"), tmp_path)


# -- quantised targets -------------------------------------------------------------------------


def install_quantiser(fake: FakeEngine) -> None:
    """A stand-in that writes what it was asked and given."""
    tool = fake.folder / "bin" / "llama-quantize"
    tool.write_text('#!/bin/sh\n(echo "$3"; cat "$1") > "$2"\n')
    tool.chmod(0o755)


def test_a_type_is_the_targets_alone(
    fake_llamacpp: FakeEngine, what: Serving, tmp_path: Path
) -> None:
    q8_0 = dataclasses.replace(what, outtype="q8_0")
    found = prepare(fake_llamacpp.environment, q8_0, tmp_path / "gguf")
    assert found.speculation is not None
    assert written(found.target)["given"]["--outtype"] == "q8_0"
    assert written(found.speculation.draft)["given"]["--outtype"] == "f32"


def test_types_of_the_quantiser(
    fake_llamacpp: FakeEngine, what: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    q4 = dataclasses.replace(what, outtype="q4_k_m", speculation=None)
    with pytest.raises(
        UserError, match=r"llama-quantize, .*xllamacpp does not have it(.|\n)*cmake"
    ):
        prepare(fake_llamacpp.environment, q4, tmp_path / "gguf")
    install_quantiser(fake_llamacpp)
    found = prepare(fake_llamacpp.environment, q4, tmp_path / "gguf")
    kind, exact = Path(found.target).read_text().split("\n", 1)
    assert kind == "Q4_K_M"
    assert json.loads(exact)["given"]["--outtype"] == "f32"
    assert found.outtype is None
    (fake_llamacpp.folder / "bin" / "llama-quantize").write_text(
        "#!/bin/sh\necho bad row; exit 1\n"
    )
    (Path(q4.target) / "model.safetensors").write_text("of another model")
    with pytest.raises(UserError, match=r"llama-quantize does not take .*exit code 1.: bad row"):
        prepare(fake_llamacpp.environment, q4, tmp_path / "gguf")


def test_a_type_that_an_engine_does_not_have() -> None:
    with pytest.raises(UserError, match=r"unknown --outtype 'q8'; did you mean 'q8_0'"):
        LLAMACPP.check_outtype("q8")
    with pytest.raises(UserError, match=r"--outtype q8_0: vLLM serves the target's own files"):
        VLLM.check_outtype("q8_0")
    LLAMACPP.check_outtype("q4_k_m")
    VLLM.check_outtype(None)


@pytest.fixture(scope="session")
def quantised(target_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Target:
    """The session's target as a file of Q8_0, with nothing next to it."""
    file = tmp_path_factory.mktemp("quantised") / "target.gguf"
    write(file, target_folder)
    return load_target(str(file))


@pytest.fixture(scope="session")
def quantised_plan(
    quantised: Target, draft_folder: Path, few_prompts: list[Prompt], short_answers: list[Answer]
) -> dict[str, Any]:
    """The plan of a llama.cpp that serves that file: without the draft it answers as redraft, with it as the unrounded target."""
    draft = read_draft(str(draft_folder)).build(quantised)
    given = with_lookahead(quantised, few_prompts, [a.answer for a in short_answers], K)
    drafted = plan_of(quantised, draft, given)
    plain = answer_all(quantised, few_prompts, TOKENS, K, Sampling())
    answers = {key(a.prompt): list(a.answer) for a in plain}
    return {**drafted, "answers": answers, "drafted_answers": drafted["answers"]}


def test_a_file_is_served_unchanged_and_counted_on_the_engines_answers(
    fake_llamacpp: FakeEngine,
    quantised: Target,
    target: Target,
    draft_folder: Path,
    few_prompts: list[Prompt],
    quantised_plan: dict[str, Any],
    tmp_path: Path,
) -> None:
    fake_llamacpp.plan(**quantised_plan)
    request = Request(tmp_path / "logs", K, TOKENS, (1,), repeats=1, engine=LLAMACPP)
    request = dataclasses.replace(request, converted=tmp_path / "kept")
    stored = read_draft(str(draft_folder))
    found = verify(fake_llamacpp.environment, quantised, stored, few_prompts, request)
    assert fake_llamacpp.started["params"]["model"]["path"] == quantised.sources[0]
    assert (found.outtype, found.unread, found.tolerance) == ("q8_0", "", 0.03)
    assert found.expected == found.tau
    assert found.outputs.identical < found.outputs.prompts
    assert found.outputs.slack >= 8 / 128  # roundings of states to 8 bits, not of float32
    assert found.outputs.holds
    assert judge(found) == []
    (draft,) = (written(str(path)) for path in (tmp_path / "kept").glob("*.gguf"))
    around = Path(draft["given"]["--target-model-dir"])
    assert {"config.json", "tokenizer.json"} <= {path.name for path in around.iterdir()}
    live = measure(quantised, stored.build(quantised), few_prompts, k=K, max_new_tokens=TOKENS)
    assert found.own.accepted != live.acceptance.accepted  # redraft's answers have other steps
    assert not any("only the engine" in note for note in found.notes)


def test_a_converted_target_is_read_back(
    fake_llamacpp: FakeEngine,
    target: Target,
    target_folder: Path,
    draft_folder: Path,
    few_prompts: list[Prompt],
    quantised: Target,
    quantised_plan: dict[str, Any],
    tmp_path: Path,
) -> None:
    fake_llamacpp.plan(**quantised_plan)
    tool = fake_llamacpp.folder / "bin" / "llama-quantize"
    tool.write_text(f'#!/bin/sh\ncp {quantised.sources[0]} "$2"\n')
    tool.chmod(0o755)
    request = Request(tmp_path / "logs", K, TOKENS, (1,), repeats=1, engine=LLAMACPP)
    request = dataclasses.replace(request, outtype="q4_k_m")
    stored = read_draft(str(draft_folder))
    found = verify(fake_llamacpp.environment, target, stored, few_prompts, request)
    assert (found.outtype, found.unread) == ("q8_0", "")  # what the file says
    assert found.expected == found.tau
    assert found.target == str(target_folder)


def test_a_converted_target_that_redraft_cannot_read(
    fake_llamacpp: FakeEngine,
    target: Target,
    draft_folder: Path,
    few_prompts: list[Prompt],
    plan: dict[str, Any],
    tmp_path: Path,
) -> None:
    steps = {prompt: [[K, 0]] * 3 for prompt in plan["steps"]}
    fake_llamacpp.plan(**{**plan, "steps": steps})  # another tau than redraft counts
    request = Request(tmp_path / "logs", K, TOKENS, (1,), repeats=1, engine=LLAMACPP)
    request = dataclasses.replace(request, outtype="q8_0")
    found = verify(
        fake_llamacpp.environment, target, read_draft(str(draft_folder)), few_prompts, request
    )
    assert found.outtype == "q8_0"
    assert "is no whole GGUF file" in found.unread
    assert judge(found) == []
    assert (
        "only the engine with the draft was compared with the engine without it" in found.notes[0]
    )


def test_engines_of_folders_refuse_a_file(
    quantised: Target, few_prompts: list[Prompt], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"vLLM is run on model folders here; use --engine llama"):
        serving_of(quantised, few_prompts, Request(tmp_path, engine=VLLM))
    with pytest.raises(UserError, match=r"--outtype q8_0: target .* is served unchanged"):
        serving_of(quantised, few_prompts, Request(tmp_path, engine=LLAMACPP, outtype="q8_0"))


# -- the server --------------------------------------------------------------------------------


def test_the_server_gets_what_makes_its_counts_comparable(
    fake_llamacpp: FakeEngine, what: Serving, tmp_path: Path
) -> None:
    four = dataclasses.replace(what, at_a_time=4)
    with LLAMACPP.serve(fake_llamacpp.environment, four, tmp_path / "log"):
        params = fake_llamacpp.started["params"]
    draft = params["speculative"]["draft"]
    assert params["model"] == {"path": what.target}
    assert draft["mparams"] == {"path": str(tmp_path / "draft")}
    assert params["speculative"]["types"] == [2]
    assert (draft["n_max"], draft["n_min"], draft["p_min"]) == (4, 0, 0.0)
    assert (params["n_parallel"], params["n_ctx"]) == (4, 4 * 512)
    assert not params["cache_prompt"]
    assert not draft["backend_sampling"]
    assert {params["cache_type_k"], params["cache_type_v"], draft["cache_type_k"]} == {"F32"}
    assert params["endpoint_metrics"]
    assert params["flash_attn_type"] == "DISABLED"
    half = LLAMACPP.command(
        fake_llamacpp.environment, dataclasses.replace(what, dtype="bfloat16"), 1
    )
    assert half[half.index("--cache-type-k") + 1] == "bf16"
    assert "--flash-attn" not in half


def test_the_users_flags_come_last(
    fake_llamacpp: FakeEngine, what: Serving, tmp_path: Path
) -> None:
    flags = ("-ctk", "q8_0", "--cache-prompt", "-fa", "on", "--threads", "1")
    mine = dataclasses.replace(what, flags=flags)
    with LLAMACPP.serve(fake_llamacpp.environment, mine, tmp_path / "log"):
        params = fake_llamacpp.started["params"]
    assert (params["cache_type_k"], params["cache_type_v"]) == ("Q8_0", "F32")
    assert params["cache_prompt"]
    assert params["flash_attn_type"] == "ENABLED"
    assert params["cpuparams"] == {"n_threads": 1}


NOISE = "0.00.01 E llama_init_from_model: eagle3 requires ctx_other (this warning is normal during fitting)\n"


@pytest.mark.parametrize(
    ("plan", "flags", "cause"),
    [
        (
            {},
            ("--mlok",),
            r"exit code 2\): llamacpp_server.py: error: unrecognized arguments: --mlok",
        ),
        (
            {"kinds": ["NONE", "DRAFT_SIMPLE"]},
            (),
            r"this version has no --spec-type draft-eagle3; it has draft-simple, none",
        ),
        (
            {
                "die_at_start": f"{NOISE}0.00.02 E llama_model_load: missing tensor 'fc'\n"
                "0.00.03 E srv load_model: failed to load draft model"
            },
            (),
            r"exit code 1\): llama_model_load: missing tensor 'fc'\n",
        ),
        ({"die_at_start": NOISE}, (), r"RuntimeError: Failed to init server"),
    ],
)
def test_death_at_the_start_quotes_the_cause(
    fake_llamacpp: FakeEngine,
    what: Serving,
    tmp_path: Path,
    plan: dict[str, Any],
    flags: tuple[str, ...],
    cause: str,
) -> None:
    fake_llamacpp.plan(answers={}, **plan)
    with pytest.raises(UserError, match=rf"llama.cpp 2026.10.11549 died while starting .*{cause}"):
        with LLAMACPP.serve(
            fake_llamacpp.environment, dataclasses.replace(what, flags=flags), tmp_path / "log"
        ):
            pytest.fail("must not start")


def test_death_in_the_middle_quotes_the_assertion(
    fake_llamacpp: FakeEngine, what: Serving, tmp_path: Path
) -> None:
    fake_llamacpp.plan(answers={"1,2": [5, 6, 7]}, die_at_request=2)
    with pytest.raises(
        UserError, match=r"died while answering .exit code 9.: GGML_ASSERT\(n > 0\) failed\n"
    ):
        with LLAMACPP.serve(fake_llamacpp.environment, what, tmp_path / "log") as running:
            assert running.complete((1, 2), 2, ()) == [5, 6]
            running.complete((1, 2), 2, ())


def test_a_port_that_is_taken(fake_llamacpp: FakeEngine, what: Serving, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"--port {port} on 127\.0\.0\.1 cannot be used"):
            with LLAMACPP.serve(
                fake_llamacpp.environment, dataclasses.replace(what, port=port), tmp_path / "log"
            ):
                pytest.fail("must not start")


# -- counting ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accepted", "tokens", "most", "steps"),
    [
        ([4, 0, 2], range(5, 20), 20, [(4, 4), (4, 0), (4, 2)]),
        ([4, 3], range(5, 20), 9, [(4, 4), (2, 2)]),  # space for two and the step's own
        ([4, 3], range(5, 20), 7, [(4, 4)]),  # a plain step
        ([4, 3], range(5, 20), 6, [(4, 4)]),  # the answer is whole
        ([3], [5, 6, STOP, 7, 8], 20, [(4, 1)]),  # the stop token is the step's own
        ([2], [5, 6, 7, STOP], 20, [(4, 2)]),  # and was not drafted
        ([4], [5, 6, 7, 8, STOP, 9], 20, [(4, 4)]),  # the chain's last
        ([], [STOP], 20, []),
    ],
)
def test_what_it_counts_of_an_answers_last_step(
    accepted: list[int], tokens: list[int], most: int, steps: list[tuple[int, int]]
) -> None:
    assert cut_steps(accepted, list(tokens), (STOP,), 4, most) == steps


@pytest.fixture(scope="session")
def plan(target: Target, trained_draft: Eagle3Draft, short_answers: list[Answer]) -> dict[str, Any]:
    """The plan of a llama.cpp that does what it should."""
    return plan_of(target, trained_draft, short_answers)


def plan_of(target: Target, draft: Draft, given: Sequence[Answer]) -> dict[str, Any]:
    """Of a llama.cpp that gives these answers, and counts as the draft's replay does."""
    steps = {
        key(a.prompt): cut_steps(t.accepted, a.tokens, target.stop_ids, K, TOKENS)
        for a, t in zip(given, replay(target, draft, given, K), strict=True)
    }
    answers = {key(a.prompt): list(a.answer) for a in given}
    return {"k": K, "answers": answers, "steps": steps, "plain_delay": SLOWER}


def test_verify(
    fake_llamacpp: FakeEngine,
    target: Target,
    draft_folder: Path,
    few_prompts: list[Prompt],
    plan: dict[str, Any],
    tmp_path: Path,
) -> None:
    fake_llamacpp.plan(**plan)
    request = Request(tmp_path / "logs", K, TOKENS, (1, 4), repeats=1, engine=LLAMACPP)
    stored = read_draft(str(draft_folder))
    found = verify(fake_llamacpp.environment, target, stored, few_prompts, request)
    assert found.good, found.conclusion
    assert (found.engine, found.method) == ("llama.cpp", "draft-eagle3")
    assert found.expected == found.tau
    assert 0 < found.tau.accepted < found.own.accepted  # the cut matters here
    assert sorted(path.name for path in request.logs.iterdir()) == ["draft.log", "plain.log"]


def test_verify_keeps_what_it_converted_where_it_is_told(
    fake_llamacpp: FakeEngine,
    target: Target,
    draft_folder: Path,
    few_prompts: list[Prompt],
    plan: dict[str, Any],
    tmp_path: Path,
) -> None:
    fake_llamacpp.plan(**{**plan, "steps": {}})
    request = Request(tmp_path / "logs", K, TOKENS, (1,), repeats=1, engine=LLAMACPP)
    request = dataclasses.replace(request, converted=tmp_path / "kept")
    stored = read_draft(str(draft_folder))
    found = verify(fake_llamacpp.environment, target, stored, few_prompts, request)
    assert len(list((tmp_path / "kept").glob("*.gguf"))) == 2
    assert not found.good
    assert "the engine drafted nothing" in found.conclusion


def test_a_kind_that_it_does_not_serve(
    fake_llamacpp: FakeEngine,
    target: Target,
    few_prompts: list[Prompt],
    kind_folder: Any,
    tmp_path: Path,
) -> None:
    stored = read_draft(str(kind_folder("eagle")))
    request = Request(tmp_path, K, TOKENS, engine=LLAMACPP)
    with pytest.raises(UserError, match="llama.cpp has no method for a draft of kind eagle"):
        verify(fake_llamacpp.environment, target, stored, few_prompts, request)


def test_whole_steps_are_those_of_replay(
    target: Target, trained_draft: Eagle3Draft, short_answers: list[Answer]
) -> None:
    """What every other engine counts."""
    traces = replay(target, trained_draft, short_answers, K)
    limits = Limits(K, TOKENS, target.stop_ids)
    found = count_own(traces, short_answers, limits, whole_steps)
    assert found.drafts == sum(t.steps for t in traces)
    assert found.accepted == sum(t.gained for t in traces) == sum(found.per_position)
    assert found.drafted == K * found.drafts
