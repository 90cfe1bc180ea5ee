"""A certificate of a pretrained model, SmolLM2 with the kept draft, held against running vLLM, llama.cpp and SGLang.

Each serves it right, then with a fault; in float32 the right counts are exact.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from redraft.checkpoints.load import read_draft
from redraft.core.errors import UserError
from redraft.core.files import write_text
from redraft.core.records import Prompt
from redraft.models.loading import load_target
from redraft.serving.certificate import certify
from redraft.serving.certificate_check import CheckResult, check, read_certificate
from redraft.serving.engine import Engine, Serving, Speculation
from redraft.serving.llamacpp import LLAMACPP
from redraft.serving.verify import method_of
from redraft.serving.vllm import VLLM
from redraft_experiments.kept_parts import restore
from redraft_experiments.pretrained import build_model, missing
from redraft_experiments.real_demo import questions
from tests.engines_real import sglang
from tests.engines_real.conftest import BUILD, environment_of

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(bool(missing("smollm2")), reason=missing("smollm2")),
]
K, TOKENS, PROMPTS = 4, 32, 16
LOST = "midlayer.self_attn.o_proj.weight"


@pytest.fixture(scope="module")
def folder() -> Path:
    """base, draft and certificate.json, kept in `build/engines`."""
    out = BUILD / "smollm2"
    build_model("smollm2", out / "base")
    restore(out / "base", out / "draft")
    if not (out / "certificate.json").is_file():
        target = load_target(str(out / "base"), dtype="float32")
        rows = [{"role": "user", "content": text} for text in questions()[::18]]
        asked = [Prompt(str(i), tuple(target.render([row]))) for i, row in enumerate(rows)]
        found = certify(target, read_draft(str(out / "draft")), asked[:PROMPTS], TOKENS)
        write_text(out / "certificate.json", found.to_text())
    return out


def held(engine: Engine, folder: Path, draft: Path, logs: Path) -> CheckResult:
    """What the check finds at a server of the base with this draft."""
    try:
        environment = environment_of(engine)
    except UserError as absent:
        pytest.skip(f"no {engine.title}: {str(absent).splitlines()[0]}")
    speculation = Speculation(method_of(read_draft(str(draft)), engine), str(draft), K)
    what = Serving(str(folder / "base"), "float32", 512, speculation=speculation)
    what = engine.prepare(environment, what, logs)
    with engine.serve(environment, what, logs / f"{draft.name}.log") as running:
        return check(read_certificate(folder / "certificate.json"), running.server.url)


@pytest.mark.parametrize(
    "engine",
    [pytest.param(VLLM, marks=pytest.mark.full, id="vllm"), pytest.param(LLAMACPP, id="llama.cpp")],
)
def test_it_holds_and_a_fault_is_named(engine: Engine, folder: Path, tmp_path: Path) -> None:
    right = held(engine, folder, folder / "draft", tmp_path)
    print(right.to_text())
    assert right.holds
    assert right.exact
    assert right.different == 0
    assert right.equal + right.near_ties == right.prompts == PROMPTS
    wrong = held(engine, folder, faulty(folder, tmp_path), tmp_path)
    print(wrong.to_text())
    assert not wrong.holds
    assert LOST in wrong.cause


@pytest.mark.full
@pytest.mark.skipif(
    not sglang.PYTHON, reason="needs $REDRAFT_SGLANG_PYTHON, as `make test-sglang` has"
)
def test_it_holds_in_sglang_and_a_fault_is_named(folder: Path, tmp_path: Path) -> None:
    found = []
    for draft in (folder / "draft", faulty(folder, tmp_path)):
        with sglang.served(folder / "base", draft, K, tmp_path / f"{draft.name}.log") as server:
            found.append(check(read_certificate(folder / "certificate.json"), server.url))
        print(found[-1].to_text())
    right, wrong = found
    assert (right.engine, right.k, right.holds, right.exact) == ("sglang", K, True, True)
    assert right.equal + right.near_ties == right.prompts == PROMPTS
    assert not wrong.holds
    assert LOST in wrong.cause


def faulty(folder: Path, out: Path) -> Path:
    """The draft as of an engine that did not load one tensor."""
    stored = read_draft(str(folder / "draft"))
    tensors = dict(stored.tensors)
    tensors[LOST] = torch.zeros_like(tensors[LOST])
    stored.with_tensors(tensors, {}).save(out / "faulty")
    return out / "faulty"
