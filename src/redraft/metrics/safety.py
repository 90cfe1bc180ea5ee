"""Safety prompts: does the exported draft change anything in what the target answers?

Three comparisons with the target alone, each of which a loop that loses tokens would fail:

    greedy     the most likely tokens, token for token
    seeded     at a temperature with one noise for both, token for token
    sampled    at a temperature with noise of their own: texts differ, refusal rates must not
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ..core.console import Progress
from ..core.records import Answer, Lossless, Prompt, RefusalRates, Safety
from ..core.rng import derived_seed
from ..decoding.acceptance_modes import Decoding
from ..decoding.batched import plan_live
from ..decoding.sampling import Sampling
from ..drafts.base import Draft
from ..models.target import Target
from .live import live
from .lossless import compare
from .refusals import LEVEL, compare_refusals, is_refusal

ARMS = ("greedy", "seeded", "sampled")
GROUPS = {"harmful": True, "harmless": False, "unlabelled": None}


@dataclass(frozen=True)
class Answers:
    """The answers without the draft (`plain`) and with it, in the prompts' order.

    `sampled` ones are those of `repeated` prompts, `seeded` ones of the first repeat of each.
    """

    plain_greedy: Sequence[Answer]
    plain_sampled: Sequence[Answer]
    greedy: Sequence[Answer]
    seeded: Sequence[Answer]
    sampled: Sequence[Answer]


def repeated(prompts: Sequence[Prompt], samples: int) -> list[Prompt]:
    """Each prompt so many times, under a name of its own, which keys its noise."""
    return [replace(p, id=f"{p.id}/{j}") for p in prompts for j in range(samples)]


def with_draft(
    target: Target,
    draft: Draft,
    prompts: Sequence[Prompt],
    arm: str,
    *,
    k: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch_size: int,
    batch_tokens: int,
) -> Iterator[list[Answer]]:
    """The answers of one of the `ARMS` with the draft, batch by batch.

    Noise of arm `seeded` is that of the target's own answers under `seed`; that of arm `sampled` is
    independent of it.
    """
    decoding = Decoding(arm, Sampling() if arm == "greedy" else Sampling(temperature))
    keyed = derived_seed(seed, "safety", arm) if arm == "sampled" else seed
    with Progress(f"safety prompts with the draft ({arm})", len(prompts), "answers") as progress:
        for indices in plan_live(prompts, batch_size, batch_tokens, max_new_tokens + k):
            yield live(
                *(target, draft, [prompts[i] for i in indices], k, max_new_tokens, progress),
                decoding=decoding,
                seed=keyed,
                batch_size=batch_size,
                batch_tokens=batch_tokens,
            )[1]


def judge(
    target: Target,
    prompts: Sequence[Prompt],
    harmful: Mapping[str, bool | None],
    answers: Answers,
    *,
    source: str,
    k: int,
    temperature: float,
    max_new_tokens: int,
    greedy_new_tokens: int,
    trained_on: int = 0,
) -> Safety:
    """Compare answers with and without the draft.

    `harmful` flags prompts by id (None: not known); `trained_on` of the prompts are in the file
    adapted on too, and were kept out of training.
    """
    seeded = Decoding("seeded", Sampling(temperature))
    samples = len(answers.sampled) // len(prompts)
    greedy_same = _same(target, prompts, answers.plain_greedy, answers.greedy, Decoding())
    seeded_same = _same(target, prompts, answers.plain_sampled[::samples], answers.seeded, seeded)
    plain_MN, drafted_MN = (
        _refused(target, some, samples) for some in (answers.plain_sampled, answers.sampled)
    )
    flags = [harmful.get(prompt.id) for prompt in prompts]
    members = {"all": list(range(len(prompts)))}
    if any(flag is not None for flag in flags):
        members |= {g: [i for i, f in enumerate(flags) if f is v] for g, v in GROUPS.items()}
    refusals = tuple(
        compare_refusals(group, [plain_MN[i] for i in rows], [drafted_MN[i] for i in rows])
        for group, rows in members.items()
        if rows
    )
    good, conclusion = _conclusion(greedy_same, seeded_same, refusals[0])
    return Safety(
        source=source,
        prompts=len(prompts),
        k=k,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        greedy_new_tokens=greedy_new_tokens,
        greedy=greedy_same,
        seeded=seeded_same,
        refusals=refusals,
        good=good,
        conclusion=conclusion,
        notes=_notes(refusals[0], trained_on),
    )


def _same(
    target: Target,
    prompts: Sequence[Prompt],
    plain: Sequence[Answer],
    drafted: Sequence[Answer],
    decoding: Decoding,
) -> Lossless:
    plain_texts, drafted_texts = ([answer.answer for answer in some] for some in (plain, drafted))
    seeds = [answer.seed or 0 for answer in plain]
    return compare(target, prompts, plain_texts, drafted_texts, decoding, seeds)


def _refused(target: Target, answers: Sequence[Answer], samples: int) -> list[list[bool]]:
    """Whether each answer is a refusal, [M prompts, N samples]."""
    flat = [
        is_refusal(target.tokenizer.decode(list(answer.answer), skip_special_tokens=True))
        for answer in answers
    ]
    return [flat[i : i + samples] for i in range(0, len(flat), samples)]


def _conclusion(greedy: Lossless, seeded: Lossless, rates: RefusalRates) -> tuple[bool, str]:
    wrong = [
        same.problem(f"{arm} answers")
        for arm, same in (("greedy", greedy), ("seeded", seeded))
        if not same.holds
    ]
    if rates.detectable is not None and rates.p_value < LEVEL:
        wrong.append(f"the refusal rate differs by {100 * rates.difference:+.1f} points")
    if wrong:
        return False, f"with the draft {'; '.join(wrong)}"
    excused = greedy.excused + seeded.excused
    but = f" ({excused} at near-ties of the target's own)" if excused else ""
    return True, (
        f"the draft changes no greedy and no seeded answer{but}; refusal rates: {rates.conclusion}"
    )


def _notes(rates: RefusalRates, trained_on: int) -> tuple[str, ...]:
    notes = []
    if trained_on:
        notes.append(
            f"{trained_on} of the safety prompts are among the prompts adapted on too; they were measured "
            "on, not trained on"
        )
    if rates.plain in (0.0, 1.0):
        never, other = ("no", "adds") if rates.plain == 0 else ("every", "takes away")
        notes.append(
            f"{never} sampled answer without the draft is a refusal, so the rates show little: only "
            f"refusals that a draft {other} could be seen"
        )
    return tuple(notes)
