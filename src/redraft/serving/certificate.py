"""`redraft certify`: a file that any serving engine can be checked against, without a model.

    prompts -> the target's greedy answers -> near-ties -> accepted tokens at every K -> those of known faults

Answers with few near-ties come first, because an engine's rounding parts from the others' texts. What is
written and how it is checked is in `certificate_check.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date
from types import MappingProxyType
from typing import TypeVar

from ..checkpoints.load import StoredDraft
from ..core.console import say
from ..core.errors import UserError
from ..core.published import without_paths
from ..core.records import Answer, Prompt, versions
from ..decoding.sampling import Sampling
from ..metrics.lossless import audit, near_ties, slack_of
from ..metrics.measure import answer_all
from ..metrics.replay import accepted_runs
from ..metrics.simulated_faults import signatures
from ..models.target import Target
from .certificate_check import Certificate, CertifiedPrompt, FaultSignature, Probe, steps_of

T = TypeVar("T")
LARGEST_K = 7
CANDIDATES, WANTED, FEWEST = 64, 24, 16
"""Prompts that are answered, those that a certificate holds, and the least that it may hold."""
LARGEST = 200_000
"""Bytes of a certificate."""
MAX_NEW_TOKENS = 64
PROBE = ({"role": "user", "content": "Which is larger, 7 or 12? Answer in one word."},)
"""The conversation whose rendering shows which chat template a server uses."""


def certify(
    target: Target,
    stored: StoredDraft,
    prompts: Sequence[Prompt],
    max_new_tokens: int = MAX_NEW_TOKENS,
    others: Mapping[str, StoredDraft] = MappingProxyType({}),
) -> Certificate:
    """The certificate of a draft for its target, on the first CANDIDATES of `prompts`.

    `others` are drafts that might be served in its place, by what they are.

    Raises UserError when draft and target do not fit, or fewer than FEWEST prompts are of use.
    """
    draft = stored.build(target)  # refuses a draft that does not fit, before anything is answered
    asked = _fitting(target, prompts, max_new_tokens)
    answers = answer_all(target, asked, max_new_tokens, LARGEST_K, Sampling())
    answered = [(p, a) for p, a in zip(asked, answers, strict=True) if a.length >= 2]
    slack = slack_of([audit(target, p, a.answer) for p, a in answered], target.dtype)
    ties = [near_ties(target, p, a.answer, slack) for p, a in answered]
    order = sorted(range(len(answered)), key=lambda at: (len(ties[at]), at))
    chosen = sorted(order[:WANTED])
    if len(chosen) < FEWEST:
        raise UserError(
            f"{len(chosen)} of {len(prompts)} prompts are of use (they leave space for {max_new_tokens} tokens in "
            f"the target's context of {target.max_positions}, and are answered by two tokens or more); a "
            f"certificate needs {FEWEST}: name a file with more prompts, or lower --max-new-tokens"
        )
    kept = [answered[at][1] for at in chosen]
    served = {engine: stored.as_served(engine).build(target) for engine in stored.row.as_served}
    runs, *elsewhere = accepted_runs(target, [draft, *served.values()], kept, LARGEST_K)
    say(f"{len(kept)} prompts, {sum(len(ties[at]) for at in chosen)} near-ties")
    faults, unseen = _faults(target, stored, kept, runs, others)
    found = Certificate(
        target={
            "name": without_paths(target.name),
            "weights_hash": target.weights_hash(),
            "vocab_size": target.vocab_size,
            "tokenizer_hash": target.tokenizer_hash(),
            "template_hash": target.template_hash(),
        },
        draft={
            "name": without_paths(str(stored.folder)),
            "kind": stored.kind,
            "tensors_hash": stored.hash(),
            "aux_layers": list(draft.aux_layers),
        },
        dtype=str(target.dtype).removeprefix("torch."),
        stop_ids=target.stop_ids,
        largest_k=LARGEST_K,
        max_new_tokens=max_new_tokens,
        prompts=tuple(
            _certified(a, t, r)
            for a, t, r in zip(kept, [ties[at] for at in chosen], runs, strict=True)
        ),
        faults=faults,
        unseen=unseen,
        probe=_probe(target),
        versions=versions(),
        date=date.today().isoformat(),
        engines={
            engine: tuple(theirs)
            for engine, theirs in zip(served, elsewhere, strict=True)
            if theirs != runs
        },
    )
    return _small_enough(found)


def _fitting(target: Target, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Prompt]:
    """The first CANDIDATES that leave space for an answer and the last step past its end."""
    needed = max_new_tokens + 2 * LARGEST_K
    fitting = [p for p in prompts if len(p.tokens) + needed <= target.max_positions]
    return fitting[:CANDIDATES]


def _certified(answer: Answer, ties: tuple[int, ...], runs: tuple[int, ...]) -> CertifiedPrompt:
    return CertifiedPrompt(
        prompt=tuple(answer.prompt),
        answer=tuple(answer.answer),
        lookahead=tuple(answer.tokens[answer.length :]),
        near_ties=ties,
        accepted={k: steps_of(runs, k) for k in range(1, LARGEST_K + 1)},
    )


def _faults(
    target: Target,
    stored: StoredDraft,
    answers: Sequence[Answer],
    right: Sequence[tuple[int, ...]],
    others: Mapping[str, StoredDraft],
) -> tuple[tuple[FaultSignature, ...], tuple[str, ...]]:
    """Signatures of faults, those that count alike together; and the faults that change no count."""
    alike: dict[tuple[tuple[int, ...], ...], dict[str, str]] = {}
    for one in signatures(stored, target, answers, LARGEST_K, others):
        alike.setdefault(tuple(one.runs), {})[one.name] = one.cause
    unseen = alike.pop(tuple(right), {})
    return tuple(FaultSignature(causes, runs) for runs, causes in alike.items()), tuple(unseen)


def _probe(target: Target) -> Probe | None:
    """The probe as the target renders it; None without a chat template, and for one that writes the time."""
    if not target.template_text or "strftime_now" in target.template_text:
        return None
    try:
        tokens = target.render(list(PROBE))
    except ValueError as problem:
        say(f"the chat template will not be checked: {problem}")
        return None
    return Probe(PROBE, target.template_args, tuple(tokens))


def _small_enough(found: Certificate) -> Certificate:
    """The certificate without its longest prompts, if it is too large with them."""
    while (size := len(found.to_text().encode())) > LARGEST:
        if len(found.prompts) <= FEWEST:
            raise UserError(
                f"the certificate would take {size:,} bytes with {FEWEST} prompts, {LARGEST:,} are allowed; name "
                "shorter prompts, or lower --max-new-tokens"
            )
        lengths = [len(one.prompt) for one in found.prompts]
        longest = lengths.index(max(lengths))
        found = replace(
            found,
            prompts=_without(found.prompts, longest),
            faults=tuple(replace(f, runs=_without(f.runs, longest)) for f in found.faults),
            engines={name: _without(runs, longest) for name, runs in found.engines.items()},
        )
    return found


def _without(items: tuple[T, ...], at: int) -> tuple[T, ...]:
    return (*items[:at], *items[at + 1 :])
