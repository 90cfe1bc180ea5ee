"""The bench of certificates: what it injects is what the certificate simulates, and every cell is of the set-up that it names."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from redraft.checkpoints.load import PROVENANCE, read_draft
from redraft.core.errors import UserError
from redraft.core.folders import WEIGHTS
from redraft.core.records import Answer
from redraft.drafts.base import Draft
from redraft.metrics.replay import accepted_runs
from redraft.metrics.simulated_faults import signatures
from redraft.models.loading import load_target
from redraft.models.target import Target
from redraft.serving.engine import Serving, Speculation
from redraft_experiments import certificates
from redraft_experiments.certificate_faults import INJECTED, LAYER, LLAMACPP, VLLM, Models
from redraft_experiments.certificates import NOT_SERVED, SetUp, bench_certificates, set_ups
from tests.conftest import FAMILIES, make_tokenizer, save_target

ANSWERED, K = 8, 4
FAINT = ("8 bits", f"no {LAYER}input_layernorm")
"""Faults that change no count of this draft."""


@pytest.fixture(scope="module")
def models(
    target_folder: Path, reduced_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Models:
    """A trained draft that has a part of the vocabulary; without training every fault accepts nothing."""
    tuned = tmp_path_factory.mktemp("models") / "tuned"
    save_target(tuned, FAMILIES["llama"](len(make_tokenizer())), seed=5)
    return Models(target_folder, read_draft(str(reduced_folder)), tuned, (2, 4, 5))


def served(models: Models, name: str, folder: Path) -> Serving:
    models.draft.save(folder / "right")
    speculation = Speculation("eagle3", str(folder / "right"), 4)
    what = Serving(str(models.target), "float32", 512, speculation=speculation)
    return INJECTED[name].inject(models, what, folder)


def network(folder: Path, target: Target) -> Draft:
    """A draft as engines read it, which do not look whether its map is one."""
    file = folder / WEIGHTS
    tensors = load_file(file)
    offsets = tensors.pop("d2t", None)
    if offsets is None:
        (folder / PROVENANCE).unlink()  # its hash is that of the tensors before
        return read_draft(str(folder)).build(target)
    rows = torch.arange(len(offsets))
    marked = torch.arange(target.vocab_size) < len(rows)
    save_file({**tensors, "d2t": torch.zeros_like(rows), "t2d": marked}, file)
    (folder / PROVENANCE).unlink()
    draft = read_draft(str(folder)).build(target)
    draft.draft_vocab = rows + offsets
    return draft


DRAFTS = [
    name
    for name, row in INJECTED.items()
    if row.wanted.startswith(("aux", "head", "d2t", "norm_", "another rotary", "missing", "draft"))
]


def test_enough_is_tried() -> None:
    every = [*set_ups(LLAMACPP), *set_ups(VLLM)]
    assert len(set(every)) == len(every)
    assert sum(not one.fault for one in every) >= 200
    for engine, least in ((LLAMACPP, 20), (VLLM, 12)):
        assert sum(one.engine == engine and bool(one.fault) for one in every) >= least


@pytest.mark.parametrize("name", DRAFTS)
def test_an_injected_fault_accepts_what_the_simulated_one_does(
    name: str, models: Models, target: Target, answers: list[Answer], tmp_path: Path
) -> None:
    if INJECTED[name].wanted == "another rotary base":  # for a draft whose own base is another
        rotary = {"rope_type": "default", "rope_theta": 50.0}
        config = dataclasses.replace(models.draft.config, rope_parameters=rotary)
        models = dataclasses.replace(models, draft=dataclasses.replace(models.draft, config=config))
    what = served(models, name, tmp_path)
    assert what.speculation is not None
    wrong = network(Path(what.speculation.draft), target)
    some = answers[:ANSWERED]
    right, found = (
        accepted_runs(target, [draft], some, K)[0] for draft in (models.draft.build(target), wrong)
    )
    known = {one.name: one.runs for one in signatures(models.draft, target, some, K)}
    assert found == known[INJECTED[name].wanted]
    assert (found != right) or name in FAINT


def test_faults_of_the_target_are_served(models: Models, tmp_path: Path) -> None:
    assert served(models, "a fine-tune", tmp_path / "a").target == str(models.tuned)
    other = load_target(served(models, "a template", tmp_path / "b").target)
    assert other.template_hash() != load_target(str(models.target)).template_hash()
    assert served(models, "a least probability", tmp_path / "c").flags == (
        "--spec-draft-p-min",
        "0.9",
    )


class Stub:
    """An engine that starts nothing."""

    name, title = LLAMACPP, "llama.cpp"

    def __init__(self, dies_of: str = "") -> None:
        self.served: list[Serving] = []
        self.dies_of = dies_of

    def find(self, python: str | None) -> Any:
        return dataclasses.make_dataclass("Environment", ["version"])("1")

    def prepare(self, environment: Any, what: Serving, folder: Path) -> Serving:
        return what

    @contextlib.contextmanager
    def serve(self, environment: Any, what: Serving, log: Path) -> Iterator[Any]:
        self.served.append(what)
        if self.dies_of in what.flags:
            raise UserError("it died")
        server = dataclasses.make_dataclass("Server", ["url"])("http://127.0.0.1:1")
        yield dataclasses.make_dataclass("Running", ["server"])(server)


def test_cells_are_kept_and_named(
    models: Models,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    engine = Stub("--spec-draft-p-min")
    chosen = [
        SetUp(LLAMACPP, "toy", "adapted", "float32", 3, 4),
        SetUp(LLAMACPP, "smollm2", "kept", "float32", 4, fault="no norm"),
        SetUp(LLAMACPP, "smollm2", "kept", "float32", 4, fault="a least probability"),
    ]
    monkeypatch.setattr(certificates, "set_ups", lambda _: chosen)
    monkeypatch.setattr(certificates, "engine_named", lambda _: engine)
    monkeypatch.setattr(certificates, "method_of", lambda *_: "eagle3")
    monkeypatch.setattr(certificates._Bench, "_models", lambda *_: models)
    monkeypatch.setattr(certificates._Bench, "_certificate", lambda *_: None)
    counts = dataclasses.make_dataclass("Counts", ["accepted", "drafted"])(5, 9)
    says = dataclasses.make_dataclass(
        "Found",
        [
            "holds",
            "exact",
            "cause",
            "conclusion",
            "equal",
            "near_ties",
            "different",
            "distance",
            "served",
        ],
    )
    found = iter(
        [
            says(True, True, "", "holds", 16, 0, 0, 0, counts),
            says(False, False, "missing tensor fc.weight", "differs", 16, 0, 0, 7, counts),
        ]
    )
    monkeypatch.setattr(certificates, "check", lambda *_: next(found))
    cells = bench_certificates(tmp_path, LLAMACPP)
    assert [cell.right for cell in cells] == [True, False, False]
    assert cells[2].cause == NOT_SERVED
    assert [what.at_a_time for what in engine.served] == [4, 1, 1]
    assert [what.speculation and what.speculation.k for what in engine.served] == [3, 4, 4]
    assert bench_certificates(tmp_path, LLAMACPP) == cells
    assert len(engine.served) == 3
    certificates.print_cells(cells)
    shown = capsys.readouterr().out
    assert "right set-ups: 1, false alarms 0, exact 1" in shown
    assert "wanted: missing tensor norm.weight" in shown


def test_an_error_of_a_right_set_up_is_no_finding(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certificates, "engine_named", lambda _: Stub("--threads"))
    monkeypatch.setattr(certificates, "method_of", lambda *_: "eagle3")
    monkeypatch.setattr(certificates._Bench, "_models", lambda *_: models)
    monkeypatch.setattr(certificates._Bench, "_certificate", lambda *_: None)
    with pytest.raises(UserError, match="it died"):
        bench_certificates(tmp_path, LLAMACPP)
    assert not list(tmp_path.glob("cells/*"))
