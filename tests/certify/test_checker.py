"""The checker: near-ties, servers that cannot be checked, the command, and the file on its own."""

from __future__ import annotations

import ast
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from redraft.decoding.speculative import Decoded
from redraft.serving import certificate_check as module
from redraft.serving.certificate_check import (
    DIALECTS,
    FEW,
    VARYING_K,
    Certificate,
    CheckError,
    Counts,
    Served,
    check,
    cut_steps,
    found_k,
    read_certificate,
    whole_steps,
)
from tests.certify.conftest import MOST, OWNERS, checked
from tests.certify.stand_in import Known, StandIn, llama_counts, running
from tests.cli.test_cli import run
from tests.conftest import write_prompts

K = 4


def texted(known: Known, certificate: Certificate, rows: range, at: int) -> Known:
    """What was served, with another token at one place of some answers."""
    changed = dict(known)
    for one in certificate.prompts[rows.start : rows.stop]:
        found = known[one.prompt]
        tokens = [*found.tokens[:at], found.tokens[at] ^ 1, *found.tokens[at + 1 :]]
        changed[one.prompt] = Decoded(tokens, found.accepted, found.lookahead)
    return changed


def tied(certificate: Certificate, rows: range, at: int) -> Certificate:
    """The certificate with a near-tie marked in some answers."""
    prompts = tuple(
        dataclasses.replace(one, near_ties=(at,)) if index in rows else one
        for index, one in enumerate(certificate.prompts)
    )
    return dataclasses.replace(certificate, prompts=prompts)


def test_a_text_that_parts_at_a_near_tie_is_reported_and_no_error(
    certificate: Certificate, decoded: Callable[[int], Known]
) -> None:
    rows = range(3)
    parted = texted(decoded(K), certificate, rows, 9)
    found = checked(tied(certificate, rows, 9), "vllm", parted, K)
    assert (found.holds, found.equal, found.near_ties, found.different) == (True, 21, 3, 0)
    assert "21 of 24 answers" in found.conclusion
    for elsewhere in (8, 10):
        found = checked(tied(certificate, rows, elsewhere), "vllm", parted, K)
        assert (found.holds, found.cause) == (False, module.ANOTHER_ARITHMETIC)


def test_half_precision_excuses_a_tenth_of_the_texts(
    certificate: Certificate, decoded: Callable[[int], Known]
) -> None:
    half = dataclasses.replace(certificate, dtype="bfloat16")
    for count, holds in ((2, True), (3, False)):
        parted = texted(decoded(K), certificate, range(count), 9)
        assert checked(half, "vllm", parted, K).holds is holds


def test_too_few_equal_texts_are_no_proof(
    certificate: Certificate, decoded: Callable[[int], Known]
) -> None:
    rows = range(22)
    found = checked(tied(certificate, rows, 9), "vllm", texted(decoded(K), certificate, rows, 9), K)
    assert (found.holds, found.cause) == (False, FEW)


def test_a_k_that_varies_is_told(
    certificate: Certificate, decoded: Callable[[int], Known], monkeypatch: pytest.MonkeyPatch
) -> None:
    def adaptive(self: StandIn, found: Decoded) -> dict[str, Any]:
        reply = plain(self, found)
        reply["meta_info"]["spec_num_proposed_drafts"] -= 3
        return reply

    plain = StandIn._sglang
    monkeypatch.setattr(StandIn, "_sglang", adaptive)
    found = checked(certificate, "sglang", decoded(K), K)
    assert (found.holds, found.cause, found.k) == (False, VARYING_K, None)


def test_chains_that_are_cut_short_are_told(
    certificate: Certificate, decoded: Callable[[int], Known], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As llama.cpp does with a least probability of drafted tokens."""

    def unsure(self: StandIn, found: Decoded) -> dict[str, Any]:
        reply = plain(self, found)
        reply["timings"]["draft_n"] -= 5
        return reply

    plain = StandIn._llama
    monkeypatch.setattr(StandIn, "_llama", unsure)
    found = checked(certificate, "llamacpp", decoded(K), K)
    assert (found.holds, found.cause, found.distance) == (False, VARYING_K, 0)
    in_half = dataclasses.replace(certificate, dtype="bfloat16")
    found = checked(in_half, "llamacpp", decoded(K), K)
    assert (found.holds, found.cause, found.distance) == (False, VARYING_K, 0)


def test_chains_that_are_cut_short_and_accept_less_are_told(
    certificate: Certificate, decoded: Callable[[int], Known], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A high least probability: most steps draft nothing or little, so fewer tokens are accepted too."""

    def unsure(self: StandIn, found: Decoded) -> dict[str, Any]:
        reply = plain(self, found)
        timings = reply["timings"]
        timings["draft_n"] //= 3
        timings["draft_n_accepted"] = min(timings["draft_n_accepted"], timings["draft_n"]) // 2
        return reply

    plain = StandIn._llama
    monkeypatch.setattr(StandIn, "_llama", unsure)
    found = checked(certificate, "llamacpp", decoded(K), K)
    assert (found.holds, found.cause, found.k) == (False, VARYING_K, None)


def test_the_end_of_a_step_may_move_in_half_precision(
    certificate: Certificate, decoded: Callable[[int], Known], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A draft's near-tie can end a step one token earlier, where as many are accepted in all."""
    moved = []

    def rounded(self: StandIn, found: Decoded) -> dict[str, Any]:
        reply = plain(self, found)
        if not moved:
            reply["timings"]["draft_n"] -= 1
            moved.append(found)
        return reply

    plain = StandIn._llama
    monkeypatch.setattr(StandIn, "_llama", rounded)
    in_half = dataclasses.replace(certificate, dtype="bfloat16")
    found = checked(in_half, "llamacpp", decoded(K), K)
    assert (found.holds, found.exact, found.cause) == (True, True, "")
    moved.clear()
    assert checked(certificate, "llamacpp", decoded(K), K).cause == VARYING_K
    right = [Counts(40, 10, 12), Counts(30, 5, 9)]
    for fewer, cause in ((K, ""), (K + 1, VARYING_K)):  # more is no end of a step
        counts = [right[0], dataclasses.replace(right[1], drafted=30 - fewer)]
        assert module._in_counts(in_half, K, counts, right, [])[0] == cause


@pytest.mark.parametrize("owner", OWNERS)
def test_a_server_without_speculation(
    certificate: Certificate, decoded: Callable[[int], Known], owner: str
) -> None:
    with pytest.raises(
        CheckError, match=r"without speculation; start (vLLM|llama.cpp|SGLang) with"
    ):
        checked(certificate, owner, decoded(K), K, speculates=False)


@pytest.mark.parametrize("owner", OWNERS)
def test_a_server_that_hides_its_counters(
    certificate: Certificate, decoded: Callable[[int], Known], owner: str
) -> None:
    with pytest.raises(CheckError, match=r"hides its count.*; (start it|ask)"):
        checked(certificate, owner, decoded(K), K, hides=True)


@pytest.mark.parametrize(
    "names",
    [
        ("spec_num_proposed_drafts", "spec_num_correct_drafts"),
        ("spec_proposed_drafts", "spec_accepted_drafts"),
        ("spec_draft_token_num", "spec_accept_token_num"),
    ],
    ids=("0.5.12", "0.5.11", "0.5.9"),
)
def test_sglang_has_named_its_counts_in_three_ways(
    certificate: Certificate,
    decoded: Callable[[int], Known],
    monkeypatch: pytest.MonkeyPatch,
    names: tuple[str, str],
) -> None:
    def named(self: StandIn, found: Decoded) -> dict[str, Any]:
        reply = plain(self, found)
        meta = reply["meta_info"]
        counts = meta.pop("spec_num_proposed_drafts"), meta.pop("spec_num_correct_drafts")
        return {**reply, "meta_info": {**meta, **dict(zip(names, counts, strict=True))}}

    plain = StandIn._sglang
    monkeypatch.setattr(StandIn, "_sglang", named)
    found = checked(certificate, "sglang", decoded(K), K)
    assert (found.holds, found.exact) == (True, True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spec_num_correct_drafts": None}, r"counts that are no numbers \(.*\); is it SGLang"),
        ({"spec_num_correct_drafts": ...}, r"hides its counts .* ask SGLang \(0.5.9 or newer\)"),
    ],
)
def test_counts_that_cannot_be_read(
    certificate: Certificate,
    decoded: Callable[[int], Known],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    message: str,
) -> None:
    def odd(self: StandIn, found: Decoded) -> dict[str, Any]:
        reply = plain(self, found)
        meta = {**reply["meta_info"], **changes}
        return {**reply, "meta_info": {k: v for k, v in meta.items() if v is not ...}}

    plain = StandIn._sglang
    monkeypatch.setattr(StandIn, "_sglang", odd)
    with pytest.raises(CheckError, match=message):
        checked(certificate, "sglang", decoded(K), K)


@pytest.mark.parametrize("owner", OWNERS)
def test_a_server_that_dies_midway(
    certificate: Certificate, decoded: Callable[[int], Known], owner: str
) -> None:
    with pytest.raises(CheckError, match=r"stopped replying after 6 answers .* read its log"):
        checked(certificate, owner, decoded(K), K, dies_at=7)


def test_a_server_that_is_not_there(certificate: Certificate) -> None:
    with pytest.raises(CheckError, match=r"127.0.0.1:9 cannot be reached \(.*\); start the server"):
        check(certificate, "http://127.0.0.1:9/v1/")
    with pytest.raises(CheckError, match="--endpoint expects an address like"):
        check(certificate, "127.0.0.1:8000")


def test_a_server_of_another_kind(
    certificate: Certificate, decoded: Callable[[int], Known]
) -> None:
    with pytest.raises(
        CheckError, match=r"owned_by: somebody\); name it with --engine vllm, llama"
    ):
        checked(certificate, "somebody", decoded(K), K)
    with running(StandIn("vllm", decoded(K), K, MOST)) as url:
        with pytest.raises(CheckError, match="unknown --engine 'tgi'; known: vllm, llama.cpp"):
            check(certificate, url, "tgi")
        with pytest.raises(CheckError, match="refused a prompt of the certificate .HTTP 404"):
            check(certificate, url, "sglang")


@pytest.mark.parametrize("owner", OWNERS)
def test_a_server_that_refuses_the_token_ids(certificate: Certificate, owner: str) -> None:
    with pytest.raises(CheckError, match="is the certificate of another target") as problem:
        checked(certificate, owner, {}, K)
    assert "vocabulary 261" in str(problem.value)


def test_a_server_that_others_use(
    certificate: Certificate, decoded: Callable[[int], Known]
) -> None:
    with pytest.raises(CheckError, match="other requests are served, .* check it alone"):
        checked(certificate, "vllm", decoded(K), K, others=30)


def test_a_server_that_stopped_drafting(
    certificate: Certificate, decoded: Callable[[int], Known]
) -> None:
    silent = {p: Decoded(d.tokens, [], d.lookahead) for p, d in decoded(K).items()}
    with pytest.raises(CheckError, match="counted no step for an answer of 48 tokens; start vLLM"):
        checked(certificate, "vllm", silent, K)


def test_a_server_that_drafts_more_than_is_certified(
    certificate: Certificate, decoded: Callable[[int], Known]
) -> None:
    with pytest.raises(CheckError, match="drafts 9 tokens a step, .* up to 7; start it with fewer"):
        checked(certificate, "sglang", decoded(7), 9)


def test_prompts_travel_as_ids_and_greedily(
    certificate: Certificate, decoded: Callable[[int], Known]
) -> None:
    for owner in OWNERS:
        stand_in = StandIn(owner, decoded(K), K, MOST)
        with running(stand_in) as url:
            check(certificate, f"{url}/v1")
        asked = [(path, body) for path, body in stand_in.bodies if "token" not in path]
        bodies = [body for path, body in asked if path != "/apply-template"]
        assert len(bodies) == len(certificate.prompts)
        for body, one in zip(bodies, certificate.prompts, strict=True):
            assert list(one.prompt) == body.get("prompt", body.get("input_ids"))
            assert body.get("sampling_params", body)["temperature"] == 0


@pytest.mark.parametrize("k", [1, 2, 5, 7])
def test_cut_steps_are_those_of_a_walk_token_by_token(k: int) -> None:
    """Answers of every length that end by themselves or not; the wrong rule is caught."""
    wrong = 0
    for length in range(2, 14):
        for stop_at in (None, *range(1, length)):
            tokens = [9 if i == stop_at else 5 for i in range(length + 8)]
            accepted, emitted = [], 1
            while emitted < (length if stop_at is None else stop_at + 1):
                accepted.append((emitted * 7 + k) % (k + 1))
                emitted += accepted[-1] + 1
            end = length if stop_at is None else stop_at + 1
            found = Decoded(tokens[:end], accepted, tokens[end:])
            right = llama_counts(found, k, length, [9])
            cut, whole = (
                (sum(drafted for drafted, _ in steps), sum(gained for _, gained in steps))
                for steps in (
                    rule(accepted, tokens, [9], k, length) for rule in (cut_steps, whole_steps)
                )
            )
            assert cut == right
            wrong += whole != right
    assert wrong > 10


@pytest.mark.parametrize("k", range(1, 8))
def test_k_is_found_however_an_answer_ends(k: int) -> None:
    """The last chain ends with the stop token, before it, or at the longest answer."""
    llama = next(row for row in DIALECTS if row.cut is cut_steps)
    served = []
    for length in range(40, 64):
        for at in (length - 1, *range(length - 9, length)):
            tokens = [9 if i == at else 5 for i in range(length + 8)]
            accepted, emitted = [], 1
            while emitted <= at:
                accepted.append((emitted * 7 + length) % (k + 1))
                emitted += accepted[-1] + 1
            steps = cut_steps(accepted, tokens, [9], k, length)
            drafted, gained = (sum(counts) for counts in zip(*steps, strict=True))
            counts = Counts(drafted, gained, at - gained)
            served.append(Served(tuple(tokens[: at + 1]), counts))
    assert found_k(llama, served) == k
    ended = [one for one in served if one.counts.drafted > k * one.counts.steps]
    assert ended, "the stop token is accepted as a chain's last"
    assert found_k(llama, ended) == k


# -- the command, and the file on its own ----------------------------------------------------------


@pytest.fixture
def redraft(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda *arguments: run(capsys, monkeypatch, *arguments)


def test_the_command_writes_and_checks(
    redraft: Any,
    target_folder: Path,
    reduced_folder: Path,
    tmp_path: Path,
    certificate: Certificate,
    decoded: Callable[[int], Known],
) -> None:
    prompts, out = write_prompts(tmp_path / "prompts.jsonl", 24), tmp_path / "certificate.json"
    models = ("--target", target_folder, "--draft", reduced_folder)
    made = ("certify", *models, "--prompts", prompts, "--out", out, "--max-new-tokens", MOST)
    code, printed, _ = redraft(*made, "--json")
    assert code == 0
    found = json.loads(printed)
    assert (found["prompts"], found["bytes"]) == (24, out.stat().st_size)
    assert "aux layers +1" in found["faults"]
    assert [o.prompt for o in read_certificate(out).prompts] == [
        o.prompt for o in certificate.prompts
    ]
    with running(StandIn("vllm", decoded(K), K, MOST)) as url:
        code, printed, _ = redraft("certify", "check", out, "--endpoint", url)
        assert (code, printed.splitlines()[0]) == (0, "vllm serving served, K = 4")
        assert printed.splitlines()[-1].startswith("holds: the counts of 24 of 24 answers")
    parted = texted(decoded(K), certificate, range(24), 1)
    with running(StandIn("sglang", parted, K, MOST)) as url:
        code, printed, _ = redraft("certify", "check", out, "--endpoint", url, "--json")
        assert (code, json.loads(printed)["cause"]) == (module.DIFFERS, module.ANOTHER_TARGET)
    code, printed, error = redraft("certify", "check", prompts, "--endpoint", url)
    assert (code, printed) == (2, "")
    assert "no whole JSON file" in error


def test_the_commands_name_what_is_missing(redraft: Any, tmp_path: Path) -> None:
    code, _, error = redraft("certify", "--out", tmp_path / "c.json")
    assert code == 2
    assert "name --target, --draft, --prompts and --out" in error
    code, _, error = redraft("certify", "check", "c.json")
    assert code == 2
    assert "name the server with --endpoint" in error


def test_the_file_runs_on_its_own(
    certificate: Certificate, decoded: Callable[[int], Known], tmp_path: Path
) -> None:
    source = Path(str(module.__file__))
    tree = ast.parse(source.read_text(encoding="utf-8"))
    imported = {
        (n.module or "").split(".")[0] if isinstance(n, ast.ImportFrom) else n.names[0].name
        for n in ast.walk(tree)
        if isinstance(n, ast.Import | ast.ImportFrom)
    }
    assert all(getattr(n, "level", 0) == 0 for n in ast.walk(tree))
    assert {name.split(".")[0] for name in imported} - set(sys.stdlib_module_names) == {"httpx"}
    alone, file = tmp_path / "check.py", tmp_path / "certificate.json"
    alone.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    file.write_text(certificate.to_text(), encoding="utf-8")

    def alone_with(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-I", str(alone), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)

    with running(StandIn("llamacpp", decoded(K), K, MOST)) as url:
        done = alone_with(str(file), "--endpoint", url, "--json")
        assert (done.returncode, done.stderr) == (0, "")
        assert json.loads(done.stdout)["engine"] == "llama.cpp"
    done = alone_with(str(file), "--endpoint", url)
    assert done.returncode == 2
    assert "cannot be reached" in done.stderr
