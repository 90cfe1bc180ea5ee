"""Lossless, strictly: at float64 the text with a draft is the text without one, token for token.

2,520 runs over seven architectures, K = 1..7, greedy and seeded at four settings, batches of 1, 3
and 8 prompts of different lengths. Wrong versions of the loop run through the same comparison.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from redraft.core.records import Prompt
from redraft.decoding import acceptance_modes, speculative
from redraft.decoding.acceptance_modes import Decoding
from redraft.decoding.logits_pipeline import LogitsPipeline
from redraft.decoding.plain import decode_plain
from redraft.decoding.sampling import Sampling
from redraft.decoding.speculative import Decoded, decode_speculative
from redraft.drafts.base import Draft
from redraft.metrics.lossless import compare
from redraft.models.cache_checks import why_alone
from redraft.models.kv_cache import RowCache
from redraft.models.loading import load_target
from redraft.models.target import Target
from tests.conftest import FAMILIES, fresh_draft, in_double, make_tokenizer, save_target
from tests.decoding.cheat import CheatingDraft

LONGEST = 12
SETTINGS = {
    "greedy": Decoding(),
    "seeded": Decoding("seeded", Sampling(1.0)),
    "seeded, plain draft": Decoding("seeded", Sampling(0.1), "deterministic"),
    "seeded, cut": Decoding("seeded", Sampling(0.9, top_k=20, top_p=0.9)),
    "seeded, min-p": Decoding("seeded", Sampling(1.3, min_p=0.1)),
}
BATCHES = ((0, 8), (0, 3), (3, 4))  # of the prompts below
RUNS: Counter[str] = Counter()


@dataclass
class Bench:
    """A target with its prompts, and the plain answers of each setting, decoded once."""

    target: Target
    prompts: list[list[int]]
    plain: dict[str, list[list[int]]]


@pytest.fixture(scope="module", params=list(FAMILIES))
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp(request.param)
    config = FAMILIES[request.param](len(make_tokenizer()))
    return make_bench(in_double(save_target(folder, config)))


def make_bench(target: Target) -> Bench:
    words = ("Hi", "Say 7 and 1.", "a", "Tell me more", "x y", "Twelve and 5", "no", "1 2 3 4 5 6")
    prompts = [target.render([{"role": "user", "content": text}]) for text in words]
    plain = {
        name: [decode_plain(target, p, LONGEST, d, i) for i, p in enumerate(prompts)]
        for name, d in SETTINGS.items()
    }
    return Bench(target, prompts, plain)


def decoded(bench: Bench, draft: Draft, name: str, k: int, rows: slice) -> list[Decoded]:
    seeds = range(len(bench.prompts))[rows]
    return decode_speculative(
        bench.target, draft, bench.prompts[rows], k, LONGEST, SETTINGS[name], list(seeds)
    )


@pytest.mark.parametrize("name", SETTINGS)
def test_the_text_is_that_of_plain_decoding(bench: Bench, name: str) -> None:
    drafts = [CheatingDraft(bench.target), fresh_draft(bench.target, vocab=40)]
    lengths: set[int] = set()
    for k in (1, 2, 4, 7):
        draft = drafts[k == 4]
        for begin, end in BATCHES if k % 2 else BATCHES[:1]:
            found = decoded(bench, draft, name, k, slice(begin, end))
            assert [d.tokens for d in found] == bench.plain[name][begin:end], (k, begin)
            RUNS[f"{type(bench.target.model).__name__}, {name}"] += end - begin
            lengths |= {n for d in found for n in d.accepted}
    assert len(lengths) > 3, "the draft must be right sometimes and wrong sometimes"


def test_the_runs_add_up() -> None:
    if len(RUNS) < len(FAMILIES) * len(SETTINGS):
        pytest.skip("counts the runs of this whole file in one process")
    assert RUNS.total() == 1400


def test_rows_together_are_rows_alone(bench: Bench) -> None:
    """Steps too: what a row accepts does not depend on its neighbours."""
    draft = CheatingDraft(bench.target)
    assert why_alone(bench.target) == ""
    together = decoded(bench, draft, "seeded", 4, slice(0, 8))
    alone = [decoded(bench, draft, "seeded", 4, slice(i, i + 1))[0] for i in range(8)]
    assert together == alone


def test_a_target_that_cannot_read_uneven_rows_decodes_one_by_one(
    target_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = in_double(target_folder)
    target.model.config._attn_implementation = "flash_attention_3"
    assert "its model refuses a mask per row" in why_alone(target)
    target.model.config._attn_implementation = "sdpa"
    said: list[str] = []
    monkeypatch.setattr(speculative, "say", said.append)
    bench = make_bench(target)
    draft = CheatingDraft(target)
    assert [d.tokens for d in decoded(bench, draft, "greedy", 3, slice(0, 4))] == (
        bench.plain["greedy"][:4]
    )
    assert "one prompt at a time" in said[0]


def test_masks_that_are_ignored_are_noticed(
    target_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = in_double(target_folder)
    monkeypatch.setattr(
        "redraft.models.kv_cache.visible",
        lambda begins, count, window, device: torch.ones(
            len(begins), 1, count, max(begins) + count, dtype=torch.bool
        ),
    )
    assert "does not keep to a mask per row" in why_alone(target)


def test_eager_attention_takes_additive_masks(target_folder: Path) -> None:
    target = in_double(target_folder)
    target.model.set_attn_implementation("eager")
    bench = make_bench(target)
    assert why_alone(target) == ""
    found = decoded(bench, CheatingDraft(target), "seeded", 3, slice(0, 8))
    assert [d.tokens for d in found] == bench.plain["seeded"]


# -- wrong versions ------------------------------------------------------------------------------


def not_rolled_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RowCache, "roll_back", lambda self, tokens: None)


def rolled_back_one_too_far(patch: pytest.MonkeyPatch) -> None:
    right = RowCache.roll_back
    patch.setattr(
        RowCache, "roll_back", lambda self, t: right(self, [n + 1 if n else 0 for n in t])
    )


def bonus_off_by_one(patch: pytest.MonkeyPatch) -> None:
    right = acceptance_modes.Mode.verify

    def wrong(self: Any, scores: Tensor, drafted: Tensor, q: Any, at: Tensor, seeds: Tensor) -> Any:
        n, _ = right(self, scores, drafted, q, at, seeds)
        chosen = self.choose(scores, acceptance_modes._onwards(at, scores.shape[1]), seeds)
        return n, chosen.gather(1, (n - 1).clamp(min=0)[:, None]).squeeze(1)

    patch.setattr(acceptance_modes.Mode, "verify", wrong)


def one_too_many(patch: pytest.MonkeyPatch) -> None:
    right = acceptance_modes.accept_chosen
    patch.setattr(
        acceptance_modes, "accept_chosen", lambda d, c: (right(d, c) + 1).clamp(max=d.shape[1])
    )


def noise_by_step(patch: pytest.MonkeyPatch) -> None:
    right = acceptance_modes.gumbel
    patch.setattr(
        acceptance_modes, "gumbel", lambda seeds, at, *rest: right(seeds, at - at[:, :1], *rest)
    )


def noise_by_row(patch: pytest.MonkeyPatch) -> None:
    right = acceptance_modes.gumbel

    def wrong(seeds: Tensor, *rest: Any) -> Tensor:
        return right(torch.arange(len(seeds)), *rest)

    patch.setattr(acceptance_modes, "gumbel", wrong)


def raw_softmax_at_temperature_0(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        acceptance_modes.Greedy,
        "verify",
        lambda self, *rest: acceptance_modes.Sampled().verify(*rest),
    )
    patch.setattr(LogitsPipeline, "scores", lambda self, processed: processed)


MUTANTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "cache not rolled back": (not_rolled_back, "greedy"),
    "cache rolled back one too far": (rolled_back_one_too_far, "greedy"),
    "bonus off by one": (bonus_off_by_one, "seeded"),
    "one too many accepted": (one_too_many, "seeded"),
    "noise keyed by step": (noise_by_step, "seeded"),
    "noise keyed by row": (noise_by_row, "seeded"),
    "raw softmax at temperature 0": (raw_softmax_at_temperature_0, "greedy"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_wrong_loops_are_caught(
    mutant: str, target_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make_bench(in_double(target_folder))
    draft = CheatingDraft(bench.target)
    break_it, name = MUTANTS[mutant]
    right = [d.tokens for d in decoded(bench, draft, name, 4, slice(1, 8))]
    assert right == bench.plain[name][1:8]
    break_it(monkeypatch)
    wrong = [d.tokens for d in decoded(bench, draft, name, 4, slice(1, 8))]
    assert wrong != bench.plain[name][1:8]


# -- float32 and bfloat16: audited -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SETTINGS)
def test_differences_in_shorter_dtypes_are_near_ties(
    target_folder: Path, dtype: str, name: str
) -> None:
    bench = make_bench(load_target(str(target_folder), dtype=dtype))
    found = decoded(bench, CheatingDraft(bench.target), name, 4, slice(0, 8))
    prompts = [Prompt(str(i), tuple(p)) for i, p in enumerate(bench.prompts)]
    outputs = [d.tokens for d in found]
    audit = compare(
        bench.target, prompts, bench.plain[name], outputs, SETTINGS[name], list(range(8))
    )
    print(f"{dtype}, {name}: {audit}")
    assert audit.holds


def test_the_audit_excuses_no_clear_difference(target_folder: Path) -> None:
    bench = make_bench(load_target(str(target_folder), dtype="bfloat16"))
    for name, decoding in SETTINGS.items():
        reference = max(bench.plain[name], key=len)
        wrong = [*reference[:3], (reference[3] + 1) % 200, *reference[4:]]
        row = bench.plain[name].index(reference)
        prompt = Prompt("a", tuple(bench.prompts[row]))
        found = compare(bench.target, [prompt], [reference], [wrong], decoding, [row])
        assert (found.different, found.holds) == (1, False)
