"""Logits processors: each that is allowed is pure, and decoding with them is plain decoding with them.

Every allowed processor is called by hand, position by position and made anew each time, against the
logits pipeline; speculative decoding runs against plain decoding, token for token at float64. Impure
processors, and a loop that hides drafted tokens from the processors, run through the same checks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation import logits_process as hf

from redraft.core.errors import UserError
from redraft.decoding import logits_pipeline as pipeline_module
from redraft.decoding import speculative
from redraft.decoding.acceptance_modes import Decoding
from redraft.decoding.logits_pipeline import PREFIX_FREE, PREFIX_PURE, LogitsPipeline, check_pure
from redraft.decoding.plain import decode_plain
from redraft.decoding.sampling import Sampling
from redraft.decoding.speculative import Decoded, speculate, stop_at
from redraft.models.target import Target
from tests.conftest import in_double
from tests.decoding.cheat import CheatingDraft

SIZE = 30
PREFIX = [3, 9, 3, 4, 9, 3]
CONTEXT = torch.tensor([[3, 9, 4, 9, 3, 9]])


def allowed_after(row: int, tokens: Tensor) -> list[int]:
    return [int(tokens[-1]), 1, 2] if len(tokens) else [0]


TABLE: dict[str, Callable[[], Any]] = {
    "TemperatureLogitsWarper": lambda: hf.TemperatureLogitsWarper(0.7),
    "TopKLogitsWarper": lambda: hf.TopKLogitsWarper(5),
    "TopPLogitsWarper": lambda: hf.TopPLogitsWarper(0.8),
    "TopHLogitsWarper": lambda: hf.TopHLogitsWarper(0.5),
    "MinPLogitsWarper": lambda: hf.MinPLogitsWarper(0.2),
    "TypicalLogitsWarper": lambda: hf.TypicalLogitsWarper(0.6),
    "EpsilonLogitsWarper": lambda: hf.EpsilonLogitsWarper(0.05),
    "EtaLogitsWarper": lambda: hf.EtaLogitsWarper(0.05),
    "SuppressTokensLogitsProcessor": lambda: hf.SuppressTokensLogitsProcessor([3, 4]),
    "InfNanRemoveLogitsProcessor": lambda: hf.InfNanRemoveLogitsProcessor(),
    "LogitNormalization": lambda: hf.LogitNormalization(),
    "MinLengthLogitsProcessor": lambda: hf.MinLengthLogitsProcessor(5, 4),
    "MinNewTokensLengthLogitsProcessor": lambda: hf.MinNewTokensLengthLogitsProcessor(2, 3, 4),
    "RepetitionPenaltyLogitsProcessor": lambda: hf.RepetitionPenaltyLogitsProcessor(1.3),
    "EncoderRepetitionPenaltyLogitsProcessor": lambda: hf.EncoderRepetitionPenaltyLogitsProcessor(
        1.3, CONTEXT
    ),
    "NoRepeatNGramLogitsProcessor": lambda: hf.NoRepeatNGramLogitsProcessor(2),
    "EncoderNoRepeatNGramLogitsProcessor": lambda: hf.EncoderNoRepeatNGramLogitsProcessor(
        2, CONTEXT
    ),
    "SequenceBiasLogitsProcessor": lambda: hf.SequenceBiasLogitsProcessor(
        [[[5], 1.5], [[3, 9], -2.0], [[9, 3, 4], 3.0]]
    ),
    "NoBadWordsLogitsProcessor": lambda: hf.NoBadWordsLogitsProcessor([[6], [3, 9]]),
    "PrefixConstrainedLogitsProcessor": lambda: hf.PrefixConstrainedLogitsProcessor(
        allowed_after, 1
    ),
    "ForcedBOSTokenLogitsProcessor": lambda: hf.ForcedBOSTokenLogitsProcessor(7),
    "ForcedEOSTokenLogitsProcessor": lambda: hf.ForcedEOSTokenLogitsProcessor(5, 4),
    "ExponentialDecayLengthPenalty": lambda: hf.ExponentialDecayLengthPenalty((1, 1.4), 4, 2),
    "SuppressTokensAtBeginLogitsProcessor": lambda: hf.SuppressTokensAtBeginLogitsProcessor(
        [3, 4], 3
    ),
    "WatermarkLogitsProcessor": lambda: hf.WatermarkLogitsProcessor(SIZE, "cpu"),
}
ONE_ROW_ONLY = {
    "EncoderRepetitionPenaltyLogitsProcessor",
    "EncoderNoRepeatNGramLogitsProcessor",
    "PrefixConstrainedLogitsProcessor",
}
PREFIX_IS_SEEN = sorted(PREFIX_PURE - PREFIX_FREE - {"EncoderRepetitionPenaltyLogitsProcessor"})


class Counting(hf.LogitsProcessor):  # type: ignore[misc]
    """Not pure: it counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        return scores * self.calls


class Remembering(hf.LogitsProcessor):  # type: ignore[misc]
    """Not pure: it penalises whatever it was ever shown."""

    def __init__(self) -> None:
        self.seen: set[int] = set()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.seen |= set(input_ids.flatten().tolist())
        lower = torch.zeros_like(scores)
        lower[:, sorted(self.seen)] = -5.0
        return scores + lower


class Pure(hf.LogitsProcessor):  # type: ignore[misc]
    """A user's own, which says so: the token two places back is not said again."""

    prefix_pure = True

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        out = scores.clone()
        out[torch.arange(len(out)), input_ids[:, -2]] = float("-inf")
        return out


class TopKLogitsWarper(hf.TopKLogitsWarper):  # type: ignore[misc]
    """A user's own under a trusted name."""


def some_logits(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return 2 * torch.randn(*shape, SIZE, generator=generator, dtype=torch.float64)


def ids(tokens: Sequence[int]) -> Tensor:
    return torch.tensor([list(tokens)], dtype=torch.long)


def is_pure(processor: Any) -> bool:
    """Whether other prefixes between two equal calls change nothing, nor the calls their inputs."""
    logits, one, other = some_logits(1), ids(PREFIX[:4]), ids([8, 1, 6, 9, 3, 9, 3])
    kept = logits.clone()
    first = processor(one, logits)
    processor(other, some_logits(1) - 1)
    processor(other[:, :2], logits)
    again = processor(one, logits)
    return torch.equal(first, again) and torch.equal(logits, kept)


# -- every processor by itself ---------------------------------------------------------------------


def test_the_table_holds_every_processor_that_is_allowed() -> None:
    assert set(TABLE) == PREFIX_PURE
    assert all(type(make()).__name__ == name for name, make in TABLE.items())


@pytest.mark.parametrize("name", TABLE)
def test_allowed_processors_are_pure(name: str) -> None:
    processor = TABLE[name]()
    check_pure([processor])
    assert is_pure(processor)


@pytest.mark.parametrize("make", [Counting, Remembering])
def test_impure_processors_are_seen_to_be(make: Callable[[], Any]) -> None:
    assert not is_pure(make())


@pytest.mark.parametrize("name", sorted(PREFIX_FREE))
def test_processors_that_are_given_no_prefix_do_not_look_at_it(name: str) -> None:
    logits = some_logits(1)
    found = [TABLE[name]()(ids(tokens), logits.clone()) for tokens in ([], [3], PREFIX)]
    assert all(torch.equal(found[0], other) for other in found)
    alone = torch.cat([TABLE[name]()(ids([]), row[None]) for row in some_logits(6)])
    together = TABLE[name]()(torch.zeros(6, 0, dtype=torch.long), some_logits(6))
    assert torch.equal(alone, together)


@pytest.mark.parametrize("name", PREFIX_IS_SEEN)
def test_the_other_processors_do_look_at_the_prefix(name: str) -> None:
    logits = some_logits(1)
    found = [TABLE[name]()(ids(PREFIX[:n]), logits.clone()) for n in range(1, len(PREFIX) + 1)]
    assert any(not torch.equal(found[0], other) for other in found)


def by_hand(makers: Sequence[Callable[[], Any]], logits: Tensor, prefixes: Any) -> Tensor:
    """Each position by itself, with processors made for it alone."""
    found = torch.empty_like(logits)
    for b in range(logits.shape[0]):
        for p in range(logits.shape[1]):
            row = logits[b, p, None].clone()
            for make in makers:
                row = make()(ids(prefixes(b, p)), row)
            found[b, p] = row[0]
    return found


def growing(b: int, p: int) -> list[int]:
    """Each row's own text, and one token more of it at each position."""
    return [*PREFIX[b:], *PREFIX][: 2 + b + p]


@pytest.mark.parametrize("name", TABLE)
def test_the_door_gives_every_position_its_own_prefix(name: str) -> None:
    logits = some_logits(1 if name in ONE_ROW_ONLY else 3, 4)
    logits_pipeline = LogitsPipeline(Sampling(1.0), [TABLE[name]()])
    right = by_hand([TABLE[name]], logits, growing)
    for _ in range(2):  # asked again, it says the same
        assert torch.equal(logits_pipeline.processed(logits, growing), right)


def test_processors_follow_each_other_in_their_order() -> None:
    logits = some_logits(3, 4)
    names = ["RepetitionPenaltyLogitsProcessor", "TopKLogitsWarper", "TemperatureLogitsWarper"]
    makers = [TABLE[name] for name in names]
    found = LogitsPipeline(Sampling(1.0), [make() for make in makers]).processed(logits, growing)
    assert torch.equal(found, by_hand(makers, logits, growing))
    assert not torch.equal(found, by_hand(makers[::-1], logits, growing))


@pytest.mark.parametrize("name", PREFIX_IS_SEEN)
def test_a_door_with_one_prefix_for_all_positions_is_caught(name: str) -> None:
    logits = some_logits(1, 4)
    right = by_hand([TABLE[name]], logits, growing)
    texts = [[7], PREFIX[:3], PREFIX]  # no single text is right for all positions
    for text in texts:
        if torch.equal(by_hand([TABLE[name]], logits, lambda b, p, t=text: t), right):
            assert name == "ForcedBOSTokenLogitsProcessor", "it acts on the first position alone"


BY_ROW: dict[str, Callable[[], Any]] = {
    "encoder penalty": lambda: hf.EncoderRepetitionPenaltyLogitsProcessor(1.5, OTHERS),
    "encoder n-grams": lambda: hf.EncoderNoRepeatNGramLogitsProcessor(2, OTHERS),
    "prefix function": lambda: hf.PrefixConstrainedLogitsProcessor(lambda row, ids: [row, 9], 1),
    "penalty after padding": lambda: hf.RepetitionPenaltyLogitsProcessor(
        1.5, torch.tensor([0, 1, 2])
    ),
}
OTHERS = torch.tensor([[3, 4, 5, 3], [6, 7, 8, 6], [1, 2, 11, 1]])


@pytest.mark.parametrize("name", BY_ROW)
def test_rows_are_served_by_their_number_also_when_others_have_left(name: str) -> None:
    logits = some_logits(3, 1)
    texts = torch.tensor([[3, 4, 5, 3], [1, 6, 2, 6], [0, 0, 11, 1]])
    together = BY_ROW[name]()(texts, logits[:, 0].clone())
    logits_pipeline = LogitsPipeline(Sampling(1.0), [BY_ROW[name]()])
    whole = logits_pipeline.processed(logits, lambda b, p: texts[b].tolist())
    assert torch.equal(whole[:, 0], together)
    left = logits_pipeline.processed(logits[[0, 2]], lambda b, p: texts[[0, 2]][b].tolist(), [0, 2])
    assert torch.equal(left[:, 0], together[[0, 2]])
    wrong = logits_pipeline.processed(
        logits[[0, 2]], lambda b, p: texts[[0, 2]][b].tolist(), [0, 1]
    )
    assert not torch.equal(wrong[:, 0], together[[0, 2]])


def test_shorter_dtypes_are_processed_in_float32_and_nothing_changes_without_processors() -> None:
    logits = some_logits(2, 3).bfloat16()
    assert LogitsPipeline(Sampling()).processed(logits, growing) is logits
    make = TABLE["RepetitionPenaltyLogitsProcessor"]
    found = LogitsPipeline(Sampling(), [make()]).processed(logits, growing)
    assert found.dtype == torch.float32
    assert torch.equal(found, by_hand([make], logits.float(), growing))


# -- what is refused -------------------------------------------------------------------------------


def synth_id() -> Any:
    return hf.SynthIDTextWatermarkLogitsProcessor(5, [1, 2, 3], 64, 0, 16, torch.device("cpu"))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (synth_id, "SynthIDTextWatermarkLogitsProcessor"),
        (
            lambda: hf.UnbatchedClassifierFreeGuidanceLogitsProcessor(1.5, None),
            "UnbatchedClassifierFreeGuidanceLogitsProcessor",
        ),
        (Counting, r"test_logits_pipeline\.Counting"),
        (lambda: TopKLogitsWarper(3), r"test_logits_pipeline\.TopKLogitsWarper"),
    ],
)
def test_processors_not_known_to_be_pure_are_refused_by_name(
    make: Callable[[], Any], name: str
) -> None:
    with pytest.raises(UserError, match=f"{name}: not known to depend on the prefix alone"):
        LogitsPipeline(Sampling(), [TABLE["TopKLogitsWarper"](), make()])


def test_a_users_class_is_taken_at_its_word_and_at_no_less() -> None:
    assert is_pure(Pure())
    LogitsPipeline(Sampling(), [Pure()])
    for word in (False, None, "yes", 1):
        wavering = type("Wavering", (Pure,), {"prefix_pure": word})()
        with pytest.raises(UserError, match="Wavering"):
            LogitsPipeline(Sampling(), [wavering])


def test_forbidding_every_token_is_an_error_that_names_the_processors() -> None:
    everything = hf.SuppressTokensLogitsProcessor(range(SIZE))
    others = TABLE["TopKLogitsWarper"]()
    with pytest.raises(
        UserError,
        match=r"TopKLogitsWarper, SuppressTokensLogitsProcessor\) forbid every token at some position",
    ):
        LogitsPipeline(Sampling(), [others, everything]).processed(some_logits(2, 3), growing)
    all_but_one = hf.SuppressTokensLogitsProcessor(range(1, SIZE))
    found = LogitsPipeline(Sampling(), [all_but_one]).processed(some_logits(2, 3), growing)
    assert bool((found.argmax(-1) == 0).all())


# -- decoding --------------------------------------------------------------------------------------

LONGEST = 14
K = 4
WAYS = {
    "greedy": Decoding(),
    "seeded": Decoding("seeded", Sampling(0.9)),
    "seeded, plain draft": Decoding("seeded", Sampling(0.9, top_k=20), "deterministic"),
}
SEEDS = [4, 5, 6]


@dataclass
class Bench:
    """A float64 target, a draft that is often right, and three prompts of different lengths."""

    target: Target
    draft: CheatingDraft
    prompts: list[list[int]]

    def plain(self, decoding: Decoding, processors: Sequence[Any] = ()) -> list[list[int]]:
        return [
            decode_plain(
                self.target,
                p,
                LONGEST,
                decoding,
                seed,
                LogitsPipeline(decoding.sampling, processors),
            )
            for p, seed in zip(self.prompts, SEEDS, strict=True)
        ]

    def drafted(
        self,
        decoding: Decoding,
        processors: Sequence[Any] = (),
        *,
        everything: bool | None = None,
        padding: Sequence[Sequence[int]] | None = None,
        draft: CheatingDraft | None = None,
    ) -> list[Decoded]:
        logits_pipeline = LogitsPipeline(decoding.sampling, processors)
        draft_pipeline = None
        if everything is not None:
            draft_pipeline = logits_pipeline.of_draft(everything, decoding.deterministic)
        tokens: list[list[int]] = [[] for _ in self.prompts]
        accepted: list[list[int]] = [[] for _ in self.prompts]
        lengths = [0] * len(self.prompts)
        for step in speculate(
            self.target,
            draft or self.draft,
            self.prompts,
            K,
            decoding,
            stop_at(self.target, self.prompts, LONGEST),
            logits_pipeline=logits_pipeline,
            draft_pipeline=draft_pipeline,
            seeds=SEEDS,
            padding=padding,
        ):
            for b, request in enumerate(step.requests):
                tokens[request] += step.tokens[b]
                accepted[request] += [step.accepted[b]] if step.drafted else []
                lengths[request] = step.lengths[b] or 0
        return [
            Decoded(row[:n], steps, row[n:])
            for row, steps, n in zip(tokens, accepted, lengths, strict=True)
        ]


@pytest.fixture(scope="module")
def bench(target_folder: Path) -> Bench:
    target = in_double(target_folder)
    words = ("Say 7 and 1.", "a", "Tell me more")
    prompts = [target.render([{"role": "user", "content": text}]) for text in words]
    return Bench(target, CheatingDraft(target), prompts)


def repetition(bench: Bench, decoding: Decoding) -> Any:
    return hf.RepetitionPenaltyLogitsProcessor(1.5)


def no_repeat(bench: Bench, decoding: Decoding) -> Any:
    return hf.NoRepeatNGramLogitsProcessor(1)


def sequence_bias(bench: Bench, decoding: Decoding) -> Any:
    """Against pairs of tokens that the target says by itself."""
    pairs = {pair for row in bench.plain(decoding) for pair in zip(row, row[1:], strict=False)}
    return hf.SequenceBiasLogitsProcessor([[list(pair), -9.0] for pair in sorted(pairs)[::2]])


def min_length(bench: Bench, decoding: Decoding) -> Any:
    """No token that the target says by itself, until the texts are so long."""
    tokens = sorted({token for row in bench.plain(decoding) for token in row})
    return hf.MinLengthLogitsProcessor(max(map(len, bench.prompts)) + 5, tokens)


PROCESSORS: dict[str, Callable[[Bench, Decoding], Any]] = {
    "repetition penalty": repetition,
    "no repeated tokens": no_repeat,
    "sequence bias": sequence_bias,
    "minimum length": min_length,
    "a user's own": lambda bench, decoding: Pure(),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", PROCESSORS)
def test_decoding_with_a_processor_is_plain_decoding_with_it(
    bench: Bench, name: str, way: str
) -> None:
    decoding = WAYS[way]
    processor = PROCESSORS[name](bench, decoding)
    plain = bench.plain(decoding, [processor])
    assert plain != bench.plain(decoding), "the processor must matter"
    for everything in (None, False, True):
        found = bench.drafted(decoding, [processor], everything=everything)
        assert [d.tokens for d in found] == plain
    assert sum(n for d in found for n in d.accepted) > 0


def test_several_processors_with_a_warper_are_plain_decoding(bench: Bench) -> None:
    decoding = WAYS["seeded"]
    processors = [repetition(bench, decoding), no_repeat(bench, decoding), hf.TopPLogitsWarper(0.9)]
    plain = bench.plain(decoding, processors)
    for everything in (False, True):
        found = bench.drafted(decoding, processors, everything=everything)
        assert [d.tokens for d in found] == plain


def test_a_draft_that_hears_of_the_penalty_is_accepted_more(bench: Bench) -> None:
    decoding = WAYS["greedy"]
    gained = {}
    for everything in (False, True):
        found = bench.drafted(decoding, [repetition(bench, decoding)], everything=everything)
        gained[everything] = sum(sum(d.accepted) for d in found) / sum(
            len(d.accepted) for d in found
        )
    assert gained[True] > gained[False]


@pytest.mark.parametrize("name", PROCESSORS)
def test_prefixes_without_the_drafted_tokens_are_caught(
    bench: Bench, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoding = WAYS["greedy"]
    processor = PROCESSORS[name](bench, decoding)
    plain = bench.plain(decoding, [processor])
    right = speculative._prefixes
    monkeypatch.setattr(
        speculative, "_prefixes", lambda rows, drafted, shift=0: right(rows, [[]] * len(rows))
    )
    found = bench.drafted(decoding, [processor], everything=True)
    assert [d.tokens for d in found] != plain


def test_a_stateful_processor_would_change_the_text(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why they are refused: let through, one gives another text than plain decoding."""
    monkeypatch.setattr(pipeline_module, "check_pure", lambda processors: None)
    decoding = WAYS["greedy"]
    plain = bench.plain(decoding, [Remembering()])
    assert [d.tokens for d in bench.drafted(decoding, [Remembering()])] != plain


def test_processors_see_the_padding_before_a_prompt(bench: Bench) -> None:
    """A length that counts five tokens of padding is a length five longer without them."""
    decoding = WAYS["greedy"]
    processor = min_length(bench, decoding)
    later = hf.MinLengthLogitsProcessor(processor.min_length + 5, processor.eos_token_id)
    padding = [[0] * 5 for _ in bench.prompts]
    plain = [d.tokens for d in bench.drafted(decoding, [processor])]
    assert [d.tokens for d in bench.drafted(decoding, [later], padding=padding)] == plain
    assert [d.tokens for d in bench.drafted(decoding, [later])] != plain


def test_forbidding_every_token_ends_decoding_with_a_sentence(bench: Bench) -> None:
    everything = hf.SuppressTokensLogitsProcessor(range(bench.target.vocab_size))
    with pytest.raises(UserError, match="forbid every token at some position"):
        bench.drafted(WAYS["greedy"], [everything])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("everything", [False, True])
def test_a_draft_whose_whole_vocabulary_is_forbidden_changes_nothing(
    bench: Bench, way: str, everything: bool
) -> None:
    """The target still has tokens to say, so decoding goes on without a word."""
    in_vocab = torch.arange(40, 60)
    draft = CheatingDraft(bench.target, vocabulary=in_vocab)
    processors = [hf.SuppressTokensLogitsProcessor(in_vocab.tolist())]
    plain = bench.plain(WAYS[way], processors)
    found = bench.drafted(WAYS[way], processors, everything=everything, draft=draft)
    assert [d.tokens for d in found] == plain
