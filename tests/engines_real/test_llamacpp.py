"""The exports in a running llama.cpp: the same words as without a draft, the same steps as redraft's.

redraft's steps are cut as llama.cpp cuts them. In fp32 the counts must be equal, in whatever order requests
are served: llama.cpp computes every slot's tokens alike.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from redraft.checkpoints.inspect import REFUSED, inspect_draft
from redraft.checkpoints.load import read_draft
from redraft.cli.app import app
from redraft.core.errors import UserError
from redraft.core.records import Verification
from redraft.generation.answer_file import read_answers
from redraft.metrics.lossless import compare
from redraft.models.loading import stored_in
from redraft.prompts.prompts import read_prompts
from redraft.serving.engine import Speculation
from redraft.serving.environment import Environment
from redraft.serving.judgement import HALF_TOLERANCE
from redraft.serving.llamacpp import LLAMACPP, convert, converter_of
from redraft.serving.programs import llamacpp_server as server
from redraft.serving.verify import Request, serving_of
from redraft_experiments.demo import AdaptedDraft
from tests.checkpoints.crafted import edit
from tests.engines_real.cells import Cell, K, Table, own_plain
from tests.engines_real.conftest import BUILD, PROMPTS, environment_of, keep

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]
ROWS = 256
"""Of the reduced vocabulary; the target has 2,048."""
ONE_THREAD = ("--threads", "1", "--threads-batch", "1", "-td", "1", "-tbd", "1")
"""Its threads wait for each other by spinning: next to any other process two are far slower than one."""


@pytest.fixture(scope="session", autouse=True)
def environment() -> Environment:
    """First of all, so that nothing is built where there is no engine to try it in."""
    try:
        found = environment_of(LLAMACPP)
        converter_of(found)
    except UserError as missing:
        pytest.skip(f"no llama.cpp (make engine installs it): {str(missing).splitlines()[0]}")
    return found


@pytest.fixture(scope="module")
def llamacpp(environment: Environment, repaired: AdaptedDraft) -> Iterator[Table]:
    """llama.cpp: every load of the session goes through it; its cells are written at the end."""
    prompts = read_prompts(repaired.evaluation, repaired.target, PROMPTS).prompts
    found = Table(LLAMACPP, environment, BUILD / "logs", prompts, ONE_THREAD)
    yield found
    keep(found)


@pytest.fixture(scope="module")
def reduced(drafts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The adapted draft with the rows of the tokens that its target writes most."""
    whole = read_draft(drafts["adapted"])
    answers = read_answers(Path(drafts["adapted"]).parent / "answers" / "eval.jsonl")
    counts = collections.Counter(token for answer in answers for token in answer.answer)
    ids = torch.tensor(sorted(token for token, _ in counts.most_common(ROWS)))
    tensors = {
        **whole.tensors,
        "lm_head.weight": whole.tensors["lm_head.weight"][ids],
        "d2t": ids - torch.arange(len(ids)),
    }
    config = dataclasses.replace(whole.config, draft_vocab_size=len(ids))
    folder = tmp_path_factory.mktemp("reduced") / "draft"
    dataclasses.replace(whole, config=config, tensors=tensors).save(folder)
    return str(folder)


def check(cell: Cell) -> None:
    """Every word and every step."""
    assert (cell.identical, cell.different) == (cell.prompts, 0)
    assert cell.drafts > cell.prompts
    assert (cell.drafts, cell.accepted) == (cell.own_drafts, cell.own_accepted)


def test_every_flag_of_the_server_script_has_a_place(environment: Environment) -> None:
    tables = (server.NUMBERS, server.FRACTIONS, server.TEXTS, server.SWITCHES, server.CACHE_TYPES)
    places = [place for table in tables for place in table.values()]
    kinds = [f"GGML_TYPE_{name.upper()}" for name in server.CACHE_NAMES]
    code = (
        "import operator, sys, xllamacpp\n"
        "for place in sys.argv[1].split(): operator.attrgetter(place)(xllamacpp.CommonParams())\n"
        "for kind in sys.argv[2].split(): getattr(xllamacpp.ggml_type, kind)"
    )
    subprocess.run([environment.python, "-c", code, " ".join(places), " ".join(kinds)], check=True)


def test_the_engine_without_a_draft_decodes_as_redraft_does(
    repaired: AdaptedDraft, llamacpp: Table
) -> None:
    own = own_plain(repaired.target, llamacpp.prompts)
    assert compare(repaired.target, llamacpp.prompts, own, llamacpp.plain(repaired.target)).holds


@pytest.mark.parametrize("draft", ["unadapted", "adapted", "from-scratch"])
def test_eagle3(
    repaired: AdaptedDraft, drafts: dict[str, str], llamacpp: Table, draft: str
) -> None:
    check(llamacpp.cell(f"eagle3 {draft}", repaired.target, drafts[draft]))


def test_the_adapted_draft_beats_the_unadapted_one(
    repaired: AdaptedDraft, drafts: dict[str, str], llamacpp: Table
) -> None:
    unadapted, adapted = (
        llamacpp.cell(f"eagle3 {name}", repaired.target, drafts[name])
        for name in ("unadapted", "adapted")
    )
    assert adapted.tau > 1.5 * unadapted.tau


def test_a_reduced_vocabulary(repaired: AdaptedDraft, reduced: str, llamacpp: Table) -> None:
    cell = llamacpp.cell(f"eagle3 adapted, {ROWS} rows", repaired.target, reduced)
    check(cell)
    assert cell.accepted > 0


def test_the_speculators_layout(
    repaired: AdaptedDraft, drafts: dict[str, str], llamacpp: Table, tmp_path: Path
) -> None:
    read_draft(drafts["adapted"]).save(tmp_path / "draft", "speculators")
    check(llamacpp.cell("speculators adapted", repaired.target, str(tmp_path / "draft")))


def test_a_small_language_model(repaired: AdaptedDraft, llamacpp: Table) -> None:
    """The base as a draft of its fine-tune."""
    cell = llamacpp.cell("token_lm base", repaired.target, repaired.suite["base"])
    assert cell.method == "draft-simple"
    check(cell)


def test_four_requests_at_a_time(
    repaired: AdaptedDraft, drafts: dict[str, str], llamacpp: Table
) -> None:
    check(llamacpp.cell("eagle3 adapted x4", repaired.target, drafts["adapted"], concurrency=4))


def test_a_quantised_target(
    repaired: AdaptedDraft, drafts: dict[str, str], llamacpp: Table, tmp_path: Path
) -> None:
    """Its steps on its own answers are those that redraft counts with the same numbers as weights."""
    model = Path(repaired.target.sources[0])
    file = tmp_path / f"{model.name}.gguf"
    shutil.copy(convert(llamacpp.environment, model, "q8_0", BUILD / "logs" / "converted"), file)
    target = stored_in(repaired.target, file)
    cell = llamacpp.cell("eagle3 adapted, q8_0", target, drafts["adapted"])
    assert cell.different == 0
    assert cell.drafts > cell.prompts
    assert abs(cell.tau - cell.own_tau) <= HALF_TOLERANCE * cell.own_tau


def test_its_own_sampling_loses_acceptance_with_several_slots(
    repaired: AdaptedDraft, drafts: dict[str, str], llamacpp: Table
) -> None:
    """The loss that `redraft inspect` notes: when this fails, the note is out of date."""
    table = dataclasses.replace(
        llamacpp,
        flags=(*ONE_THREAD, "--spec-draft-backend-sampling"),
        logs=BUILD / "logs" / "slots",
    )
    cell = table.cell(
        "eagle3 adapted x4, its default sampling",
        repaired.target,
        drafts["adapted"],
        concurrency=4,
        reference=llamacpp.plain(repaired.target),
    )
    assert cell.different == 0
    assert cell.accepted < 0.9 * cell.own_accepted


def test_what_inspect_calls_wrong_is_served_otherwise(
    repaired: AdaptedDraft, drafts: dict[str, str], llamacpp: Table, tmp_path: Path
) -> None:
    whole = read_draft(drafts["adapted"])
    other = dataclasses.replace(whole, config=dataclasses.replace(whole.config, norm_output=True))
    other.save(tmp_path / "draft", "speculators")
    assert inspect_draft(str(tmp_path / "draft")).serves("llama.cpp") == "serves another function"
    table = dataclasses.replace(llamacpp)
    cell = table.cell("norm_output", repaired.target, str(tmp_path / "draft"))
    assert cell.different == 0
    assert (cell.drafts, cell.accepted) != (cell.own_drafts, cell.own_accepted)


def test_what_inspect_calls_refused_is_refused(
    repaired: AdaptedDraft, drafts: dict[str, str], llamacpp: Table, tmp_path: Path
) -> None:
    shutil.copytree(drafts["adapted"], tmp_path / "draft")
    edit(tmp_path / "draft", draft_vocab_size=...)
    assert inspect_draft(str(tmp_path / "draft")).serves("llama.cpp") == REFUSED
    request = Request(tmp_path, engine=LLAMACPP)
    what = dataclasses.replace(
        serving_of(repaired.target, llamacpp.prompts, request),
        speculation=Speculation("draft-eagle3", str(tmp_path / "draft"), K),
    )
    with pytest.raises(UserError, match=r"converter does not take .*Can not map tensor"):
        LLAMACPP.prepare(llamacpp.environment, what, tmp_path)


def verify(repaired: AdaptedDraft, draft: str, llamacpp: Table, *more: str) -> tuple[int, Any]:
    arguments = ["verify", "--engine", "llama.cpp", "--python", llamacpp.environment.python]
    arguments += ["--target", repaired.target.sources[0], "--draft", draft, "--dtype", "float32"]
    arguments += ["--prompts", repaired.evaluation, "--limit", "6", "--max-new-tokens", "48"]
    arguments += ["--repeats", "1", "--json", "--quiet"]
    done = CliRunner().invoke(app, [*arguments, *more])
    assert done.exit_code in (0, 3), done.output
    return done.exit_code, json.loads(done.stdout)


def test_verify(repaired: AdaptedDraft, drafts: dict[str, str], llamacpp: Table) -> None:
    flags = ["--concurrency", "1,4", "--engine-args", " ".join(ONE_THREAD)]
    code, row = verify(repaired, drafts["adapted"], llamacpp, *flags)
    found = Verification.from_json(row)
    print(found.conclusion, [at.ratio for at in found.speed])
    assert found.outputs.holds
    assert found.against_redraft.holds
    assert found.expected == found.tau
    assert found.engine_args == ONE_THREAD
    assert code == (0 if found.good else 3)


@pytest.mark.full
def test_verify_with_a_quantised_target(
    repaired: AdaptedDraft, drafts: dict[str, str], llamacpp: Table
) -> None:
    flags = ["--concurrency", "1", "--outtype", "q8_0", "--engine-args", " ".join(ONE_THREAD)]
    code, row = verify(repaired, drafts["adapted"], llamacpp, *flags)
    found = Verification.from_json(row)
    assert (found.outtype, found.unread) == ("q8_0", "")
    assert found.outputs.holds
    assert found.good or found.conclusion.startswith("do not serve it on this machine: slower")
    assert code == (0 if found.good else 3)


def test_verify_under_flags_that_change_the_target(
    repaired: AdaptedDraft, drafts: dict[str, str], llamacpp: Table
) -> None:
    """The plain pass has the same flags, so that the draft is compared with the target as it is served."""
    quantised = (*ONE_THREAD, "-ctk", "q4_0", "-ctv", "q4_0", "-fa", "on")
    flags = ["--concurrency", "1", "--engine-args", " ".join(quantised)]
    _, row = verify(repaired, drafts["adapted"], llamacpp, *flags)
    found = Verification.from_json(row)
    print(found.conclusion, found.notes, found.against_redraft)
    assert found.outputs.identical == found.prompts
    assert not any("even without a draft" in reason for reason in found.conclusion.split(";"))
