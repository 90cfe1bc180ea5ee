"""Injected faults are named: a confusion matrix over all three dialects.

Faults are injected where they happen, in a folder's files, in the network or in the target, and not by the
code that simulates them.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from redraft.checkpoints.load import StoredDraft, read_draft, stored
from redraft.core.records import Answer
from redraft.drafts.base import Draft
from redraft.metrics.replay import accepted_runs
from redraft.metrics.simulated_faults import FAULTS, eight_bit, four_bit
from redraft.models.loading import load_target
from redraft.models.target import Target
from redraft.serving.certificate_check import (
    ANOTHER_ARITHMETIC,
    ANOTHER_TARGET,
    ANOTHER_TEMPLATE,
    APART,
    NEAR,
    NOTHING,
    UNKNOWN,
    Certificate,
    steps_of,
)
from tests.certify.conftest import OWNERS, checked, served
from tests.certify.stand_in import Known
from tests.checkpoints.crafted import WEIGHTS, edit, retensor
from tests.conftest import FAMILIES, fresh_draft, make_tokenizer, save_target

K = 4
LAYER = "midlayer."


def _config(folder: Path, target: Target, **changes: Any) -> Draft:
    edit(folder, **changes)
    return read_draft(str(folder)).build(target)


def _aux(by: int, folder: Path, target: Target) -> Draft:
    ids = [layer + by for layer in (2, 4, 5)]
    nested = {"eagle_aux_hidden_state_layer_ids": [i - 1 for i in ids]}
    return _config(folder, target, eagle_aux_hidden_state_layer_ids=ids, eagle_config=nested)


def _residual(folder: Path, target: Target) -> Draft:
    return _config(folder, target, norm_before_residual=True)


def _tensor(name: str, value: float, folder: Path, target: Target) -> Draft:
    retensor(folder, **{name: torch.full_like(load_file(folder / WEIGHTS)[name], value)})
    return read_draft(str(folder)).build(target)


def _head(folder: Path, target: Target) -> Draft:
    draft: Any = read_draft(str(folder)).build(target)
    draft.lm_head, draft.draft_vocab = target.head, None
    return draft


def _map(by: str, folder: Path, target: Target) -> Draft:
    draft = read_draft(str(folder)).build(target)
    d2t = load_file(folder / WEIGHTS)["d2t"]
    draft.draft_vocab = d2t if by == "absolute" else torch.arange(len(d2t))
    return draft


def _four_bits(folder: Path, target: Target) -> Draft:
    """Q4_0, written again: 32 numbers share a scale of half precision."""
    draft = read_draft(str(folder)).build(target)
    for name, weight in draft.named_parameters():
        if weight.dim() == 2 and not name.startswith("embed"):
            rows = []
            for block in weight.detach().numpy().reshape(-1, 32):
                scale = max(block, key=abs) / np.float32(-8)
                inverse = np.float32(1) / scale
                kept = [min(15, int(x * inverse + np.float32(8.5))) - 8 for x in block]
                rows.append(np.float32(kept) * np.float32(np.float16(scale)))
            with torch.no_grad():
                weight.copy_(torch.from_numpy(np.concatenate(rows)).view_as(weight))
    return draft


INJECTED: dict[str, tuple[str, Callable[[Path, Target], Draft]]] = {
    "layers up": ("aux layers +1", functools.partial(_aux, 1)),
    "layers down": ("aux layers -1", functools.partial(_aux, -1)),
    "head": ("head of the target", _head),
    "unmapped": ("d2t ignored", functools.partial(_map, "ignored")),
    "residual": ("norm_before_residual read wrongly", _residual),
    "no final norm": (
        "missing tensor norm.weight",
        functools.partial(_tensor, "norm.weight", 1.0),
    ),
    "no fc": ("missing tensor fc.weight", functools.partial(_tensor, "fc.weight", 0.0)),
    "no queries": (
        f"missing tensor {LAYER}self_attn.q_proj.weight",
        functools.partial(_tensor, f"{LAYER}self_attn.q_proj.weight", 0.0),
    ),
    "no values": (
        f"missing tensor {LAYER}self_attn.v_proj.weight",
        functools.partial(_tensor, f"{LAYER}self_attn.v_proj.weight", 0.0),
    ),
    "no gate": (
        f"missing tensor {LAYER}mlp.gate_proj.weight",
        functools.partial(_tensor, f"{LAYER}mlp.gate_proj.weight", 0.0),
    ),
    "quantised": ("draft quantised to 4 bits", _four_bits),
}


@pytest.fixture(scope="module")
def faulty(
    target: Target, reduced_folder: Path, certificate: Certificate, tmp_path_factory: Any
) -> Callable[[str], Known]:
    """What the live loop makes of the certificate's prompts with each injected fault."""

    @functools.cache
    def made(fault: str) -> Known:
        folder = tmp_path_factory.mktemp("faulty") / "draft"
        shutil.copytree(reduced_folder, folder)
        return served(certificate, target, INJECTED[fault][1](folder, target), K)

    return made


@pytest.mark.parametrize("owner", OWNERS)
@pytest.mark.parametrize("fault", INJECTED)
def test_an_injected_fault_is_named(
    certificate: Certificate, faulty: Callable[[str], Known], fault: str, owner: str
) -> None:
    found = checked(certificate, owner, faulty(fault), K)
    assert not found.holds
    assert INJECTED[fault][0] in found.cause.split(" | "), found.conclusion
    assert found.different == 0, "a wrong draft changes no text"
    assert found.nearest[0].distance == 0
    assert "its counts are equal, answer by answer" in found.conclusion


def test_no_two_injected_faults_share_a_name_but_those_that_compute_the_same(
    certificate: Certificate, faulty: Callable[[str], Known]
) -> None:
    """The matrix off its diagonal: each cause names its own fault and, of the others, none."""
    named = {
        fault: set(checked(certificate, "vllm", faulty(fault), K).cause.split(" | "))
        for fault in INJECTED
    }
    confused = [
        (fault, other)
        for fault in INJECTED
        for other, (cause, _) in INJECTED.items()
        if other != fault and cause in named[fault]
    ]
    assert confused == []


def test_a_draft_rounded_a_little_holds_within_rounding_and_not_exactly(
    target: Target, certificate: Certificate, reduced_folder: Path
) -> None:
    draft = read_draft(str(reduced_folder)).build(target)
    for weight in draft.parameters():
        weight.data = eight_bit(weight.data) if weight.dim() > 1 else weight.data
    found = checked(certificate, "vllm", served(certificate, target, draft, K), K)
    assert (found.holds, found.exact, found.cause) == (True, False, "")
    assert found.distance
    assert found.conclusion.startswith("holds within rounding")


def test_another_target_is_told_by_its_texts(
    certificate: Certificate, reduced_folder: Path, tmp_path: Path
) -> None:
    other = load_target(
        str(save_target(tmp_path / "other", FAMILIES["llama"](len(make_tokenizer())), seed=7))
    )
    draft = read_draft(str(reduced_folder)).build(other)
    found = checked(certificate, "vllm", served(certificate, other, draft, K), K)
    assert (found.holds, found.cause) == (False, ANOTHER_TARGET)
    assert found.different == len(certificate.prompts)


def test_a_quantised_target_is_told_by_texts_that_part_later(
    certificate: Certificate, reduced_folder: Path, target_folder: Path
) -> None:
    rounded = load_target(str(target_folder))
    with torch.no_grad():
        for weight in rounded.model.parameters():
            if weight.dim() == 2:
                weight.copy_(eight_bit(weight))
    draft = read_draft(str(reduced_folder)).build(rounded)
    found = checked(certificate, "llamacpp", served(certificate, rounded, draft, K), K)
    assert (found.holds, found.cause) == (False, ANOTHER_ARITHMETIC), found.conclusion
    assert found.different


def test_an_unknown_draft_is_no_known_fault(
    target: Target, certificate: Certificate, reduced_folder: Path
) -> None:
    draft = read_draft(str(reduced_folder)).build(target)
    noise = torch.Generator().manual_seed(2)
    with torch.no_grad():
        weight = draft.get_parameter(f"{LAYER}mlp.down_proj.weight")
        weight.add_(torch.randn(weight.shape, generator=noise) * weight.std())
    found = checked(certificate, "sglang", served(certificate, target, draft, K), K)
    assert not found.holds
    assert found.cause == UNKNOWN, found.conclusion
    assert "accepted tokens away, the certificate" in found.conclusion


@pytest.mark.parametrize("owner", OWNERS)
def test_a_draft_of_which_nothing_is_accepted_has_several_explanations(
    target: Target, certificate: Certificate, reduced_folder: Path, owner: str
) -> None:
    absolute = _map("absolute", reduced_folder, target)
    found = checked(certificate, owner, served(certificate, target, absolute, K), K)
    assert (found.holds, found.cause) == (False, NOTHING)
    assert "d2t as absolute ids, missing tensor lm_head.weight" in found.conclusion


def test_the_nearest_fault_is_named_with_its_margin(
    target: Target, certificate: Certificate, reduced_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(reduced_folder, tmp_path / "draft")
    draft = _aux(1, tmp_path / "draft", target)
    for weight in draft.parameters():
        weight.data = weight.data.bfloat16().float()
    found = checked(certificate, "vllm", served(certificate, target, draft, K), K)
    assert found.cause == "aux layers +1", found.conclusion
    assert 0 < found.nearest[0].distance <= NEAR * found.distance
    assert APART * found.nearest[0].distance <= found.nearest[1].distance
    assert "its counts are the nearest" in found.conclusion


@pytest.mark.parametrize("owner", ["vllm", "llamacpp"])
def test_another_chat_template_is_told_by_the_probe(
    certificate: Certificate, decoded: Callable[[int], Known], owner: str
) -> None:
    assert certificate.probe is not None
    same = list(certificate.probe.tokens)
    found = checked(certificate, owner, decoded(K), K, rendered=same)
    assert (found.holds, found.template) == (True, "same")
    found = checked(certificate, owner, decoded(K), K, rendered=same[1:])
    assert (found.holds, found.cause) == (False, ANOTHER_TEMPLATE)
    assert checked(certificate, owner, decoded(K), K).template == "not checked"


# -- the signatures themselves ---------------------------------------------------------------------


def test_a_signature_is_what_the_live_loop_accepts(
    certificate: Certificate, faulty: Callable[[str], Known]
) -> None:
    known = faulty("layers up")
    (runs,) = [f.runs for f in certificate.faults if "aux layers +1" in f.causes]
    lived = [tuple(known[tuple(one.prompt)].accepted) for one in certificate.prompts]
    assert [steps_of(row, K) for row in runs] == lived
    right = [one.accepted[K] for one in certificate.prompts]
    assert right != lived, "a wrong signature would be seen"
    assert [steps_of(row[1:], K) for row in runs] != lived, "and one that is a token off"


def test_every_k_follows_from_the_largest(
    target: Target, certificate: Certificate, decoded: Callable[[int], Known]
) -> None:
    for k in (1, 3, 4, 7):
        lived = [tuple(decoded(k)[tuple(one.prompt)].accepted) for one in certificate.prompts]
        assert [one.accepted[k] for one in certificate.prompts] == lived
    short = [steps_of(one.accepted[7], 3) for one in certificate.prompts]
    assert short != [one.accepted[3] for one in certificate.prompts], "steps are no runs"


def test_every_row_is_made_by_some_draft(
    target: Target, answers: list[Answer], kind_folder: Callable[[str], Path], reduced_folder: Path
) -> None:
    """Each fault is simulated for one of these drafts, and changes none of the draft's own tensors."""
    odd = fresh_draft(target, hidden_act="gelu", norm_before_fc=True, qkv_bias=True, o_bias=True)
    folders = [kind_folder("eagle3"), kind_folder("eagle"), kind_folder("token_lm"), reduced_folder]
    drafts: list[StoredDraft] = [*(read_draft(str(f)) for f in folders), stored(odd, target)]
    made: set[str] = set()
    for draft in drafts:
        built, before = draft.build(target), draft.hash()
        for fault in FAULTS:
            made |= {fault.name for _ in fault.make(draft, built, target)}
        assert draft.hash() == before
        (first, again) = accepted_runs(target, [draft.build(target), built], answers[:4], 4)
        assert first == again
    never = {fault.name for fault in FAULTS} - made
    assert never <= {
        *("fc_norm read wrongly", "fc_bias read wrongly", "head_norms read wrongly"),
        *("embedding of the target", "another rotary base", "default aux layers"),
    }, never


def test_blocks_of_a_quantised_matrix_are_rounded_each_by_itself() -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    weight[:, 32:] *= 100
    for rounding, steps in ((eight_bit, 127), (four_bit, 8)):
        off = (rounding(weight) - weight).abs()
        for half in (slice(0, 32), slice(32, 64)):
            largest = weight[:, half].abs().amax(-1, keepdim=True)
            assert bool((off[:, half] <= largest / steps * 1.01).all())
            assert bool((off[:, half] > 0).any())
    assert eight_bit(weight[:, :33]).equal(weight[:, :33]), "no whole blocks"
