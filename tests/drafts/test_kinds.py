"""The matrix that every kind of draft passes, the toy of `docs/add-a-draft.md` among them."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from redraft.adapters.adapter import Adapter
from redraft.adapters.merge import extract
from redraft.adapters.table import read_method
from redraft.checkpoints.adapter_folder import load_adapter, save_adapter
from redraft.checkpoints.inspect import inspect_draft
from redraft.checkpoints.load import StoredDraft, load_draft, read_draft
from redraft.checkpoints.reload_check import check_export
from redraft.config import TrainConfig, read_format
from redraft.core.errors import UserError
from redraft.core.folders import WEIGHTS
from redraft.core.records import Answer, Prompt
from redraft.decoding.plain import decode_plain
from redraft.decoding.speculative import decode_speculative
from redraft.drafts import kinds
from redraft.drafts.kind import DraftKind, Layout
from redraft.drafts.kinds import format_named, kind_named
from redraft.metrics.live import live
from redraft.metrics.measure import measure
from redraft.models.target import Target
from redraft.pipeline.stages import merge_draft, train_adapter
from tests.conftest import in_double
from tests.drafts import recurrent
from tests.drafts.recurrent import RECURRENT

ROOT = Path(__file__).parents[2]
every_kind = pytest.mark.parametrize("kind", [row.name for row in (*kinds.KINDS, RECURRENT)])


@pytest.fixture(scope="module", autouse=True)
def _toy_in_the_table() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kinds, "KINDS", (*kinds.KINDS, RECURRENT))
        yield


@pytest.fixture(scope="module")
def adapted(
    target: Target, kind_folder: Callable[[str], Path], answers: list[Answer]
) -> Callable[[str], tuple[StoredDraft, Adapter]]:
    """The trained draft of a kind, and an adapter trained next to it."""

    @functools.cache
    def made(kind: str) -> tuple[StoredDraft, Adapter]:
        shared = read_draft(str(kind_folder(kind)))
        config = TrainConfig(
            method="expert", width="8", init="random", epochs=1, batch_tokens=256, rollout=2
        )
        return shared, train_adapter(target, shared, answers, answers[:4], config, k=3)

    return made


@every_kind
def test_a_folder_is_recognised_and_inspected(
    target: Target, kind_folder: Callable[[str], Path], kind: str
) -> None:
    found = inspect_draft(str(kind_folder(kind)), target)
    row = kind_named(kind)
    assert (found.kind, found.unreadable) == (kind, None)
    assert found.layout in [layout.name for layout in row.layouts]
    assert {finding.engine for finding in found.engines} <= set(row.engines)
    assert read_draft(str(kind_folder(kind))).hash() == found.provenance["tensors_hash"]


@every_kind
def test_every_format_reads_back_and_a_second_reader_agrees(
    kind_folder: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    draft = read_draft(str(kind_folder(kind)))
    for format in kind_named(kind).formats:
        folder = tmp_path / format
        draft.save(folder, format)
        back = read_draft(str(folder))
        assert (back.kind, back.hash()) == (kind, draft.hash())
        assert check_export(draft, folder) < 1e-6
        assert f"(format `{format}`)" in (folder / "README.md").read_text()
        tensors = load_file(folder / WEIGHTS)
        name = next(name for name in tensors if name.endswith("up_proj.weight"))
        save_file({**tensors, name: tensors[name].flip(0)}, folder / WEIGHTS)
        with pytest.raises(UserError, match="computes another function"):
            check_export(draft, folder)


@every_kind
def test_padding_for_tensor_parallelism_is_exact(
    target: Target, kind_folder: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    draft = read_draft(str(kind_folder(kind)))
    tp = draft.config.num_key_value_heads or 5
    draft.save(tmp_path / "d", tp=(tp, 1))
    assert read_draft(str(tmp_path / "d")).config.intermediate_size % tp == 0
    assert check_export(draft, tmp_path / "d") < 1e-6


@every_kind
def test_an_adapter_is_trained_merged_exported_and_taken_out_again(
    target: Target,
    adapted: Callable[[str], tuple[StoredDraft, Adapter]],
    tmp_path: Path,
    kind: str,
) -> None:
    shared, part = adapted(kind)
    assert part.card["train"]["steps"] > 0
    assert all(tensor.any() for tensor in part.tensors.values())
    save_adapter(tmp_path / "adapter", part)
    merged = merge_draft(shared, load_adapter(tmp_path / "adapter"))
    merged.save(tmp_path / "d")
    assert check_export(merged, tmp_path / "d") < 1e-6
    back = read_draft(str(tmp_path / "d"))
    assert back.config.intermediate_size == shared.config.intermediate_size + 8
    taken = extract(back.tensors, shared.tensors, read_method(part.method))
    assert taken.keys() == part.tensors.keys()
    assert all(torch.equal(taken[name], part.tensors[name]) for name in taken)


@every_kind
def test_generation_is_lossless_and_replay_is_the_live_loop(
    target_folder: Path, kind_folder: Callable[[str], Path], prompts: list[Prompt], kind: str
) -> None:
    target = in_double(target_folder)
    draft = load_draft(str(kind_folder(kind)), target)
    some = prompts[:6]
    rows = decode_speculative(target, draft, [prompt.tokens for prompt in some], 4, 40)
    for prompt, decoded in zip(some, rows, strict=True):
        assert decoded.tokens == decode_plain(target, prompt.tokens, 40)
    steps, spoken = live(target, draft, some, 4, 40)
    measured = measure(target, draft, some, k=4, max_new_tokens=40)
    assert measured.traces == steps
    assert [a.answer for a in measured.answers] == [a.answer for a in spoken]
    assert len({n for trace in steps for n in trace.accepted}) > 1


# -- the table -----------------------------------------------------------------------------------


def parts(row: Any) -> dict[str, Any]:
    return {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}


@pytest.mark.parametrize("part", ["network", "build", "layouts", "second_reading", "engines"])
def test_a_row_with_a_missing_part_fails_with_its_name(part: str) -> None:
    rest = {name: value for name, value in parts(RECURRENT).items() if name != part}
    with pytest.raises(TypeError, match=f"DraftKind 'recurrent' has no {part}"):
        DraftKind(**rest)


def test_all_missing_parts_are_named_at_once() -> None:
    with pytest.raises(TypeError, match="'x' has no network, new, stored_as, layouts, build"):
        DraftKind(name="x")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"name": "other"}, "'other' has a network of kind 'recurrent'"),
        ({"layouts": ()}, "'recurrent' has no layout that is written"),
    ],
)
def test_a_row_that_does_not_fit_together_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        DraftKind(**{**parts(RECURRENT), **changed})


@pytest.mark.parametrize("part", ["recognise", "parse", "serve"])
def test_a_layout_with_half_a_way_in_or_out_is_refused(part: str) -> None:
    rest = {name: value for name, value in parts(RECURRENT.layouts[0]).items() if name != part}
    with pytest.raises(TypeError, match=f"Layout 'recurrent' has no {part}"):
        Layout(**rest)


def test_unknown_names_list_the_rows_that_exist() -> None:
    with pytest.raises(UserError, match="did you mean 'eagle3'.*known: eagle, .*recurrent"):
        kind_named("eagel3")
    with pytest.raises(UserError, match="known: eagle3, hf, mtp, recurrent, sglang-eagle, specul"):
        format_named("gguf")
    read_format("recurrent")
    with pytest.raises(
        ValueError, match="unknown export format 'gguf'; known: eagle3, hf, mtp, rec"
    ):
        read_format("gguf")


# -- the page ------------------------------------------------------------------------------------


def test_the_page_builds_the_toy() -> None:
    """The blocks of the page, in their order, are the file but for its docstring and headings."""
    page = (ROOT / "docs" / "add-a-draft.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    toy = Path(recurrent.__file__).read_text().split('"""', 2)[2]
    toy = re.sub(r"^# -- .*\n", "", toy, flags=re.MULTILINE)
    assert "".join("".join(blocks).split()) == "".join(toy.split())
