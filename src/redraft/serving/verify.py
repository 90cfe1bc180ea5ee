"""The job of `redraft verify`: is this draft, in the engine that will serve it, what it should be?

    engine without the draft -> engine with it -> redraft's own loop on the same token ids -> judgement

The two servers run one after the other, so that neither slows the other down.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..checkpoints.load import StoredDraft
from ..checkpoints.own_head import stitch
from ..config import MeasureConfig
from ..core.console import say
from ..core.errors import UserError
from ..core.records import (
    Acceptance,
    Answer,
    EngineSpeed,
    Prompt,
    StepTrace,
    Verification,
    versions,
)
from ..decoding.sampling import Sampling
from ..metrics.config_diagnosis import better_variants
from ..metrics.lossless import compare
from ..metrics.measure import Measured, answer_all, measure, measure_answers
from ..models.gguf_file import gguf_file, rounds, stored_type
from ..models.kv_cache import is_recurrent
from ..models.loading import stored_in
from ..models.target import Target, weights_hash
from .diagnosis import diagnose
from .engine import Engine, Serving, Speculation
from .environment import Environment
from .judgement import conclusion, judge, notes_on, slower_everywhere, tolerance
from .own_count import Limits, count_own
from .trial import Trial, try_server
from .vllm import VLLM

DTYPES = ("float32", "bfloat16", "float16")
STATES = torch.int8
"""To what an engine rounds the states that it multiplies by rounded weights."""


@dataclass(frozen=True)
class Request:
    """What to try. Logs of the two servers go to the folder `logs`.

    `converted` is the folder that keeps what the engine reads instead of Hugging Face folders; None: it is
    removed at the end. `engine_args` are the user's own flags of the engine's server, `outtype` the type to convert the
    target to. See `Serving` for the rest.
    """

    logs: Path
    k: int = MeasureConfig.k
    max_new_tokens: int = 128
    concurrencies: tuple[int, ...] = (1, 4, 16)
    repeats: int = 3
    eager: bool | None = None
    port: int | None = None
    patience: float = 900.0
    engine: Engine = VLLM
    converted: Path | None = None
    engine_args: tuple[str, ...] = ()
    outtype: str | None = None


@dataclass(frozen=True)
class Tried:
    """The engine without the draft and with it, and the target with the weights that it served.

    `outtype` and `unread` are those of `Verification`.
    """

    plain: Trial
    drafted: Trial
    target: Target
    outtype: str = ""
    unread: str = ""


def verify(
    environment: Environment,
    target: Target,
    stored: StoredDraft,
    prompts: Sequence[Prompt],
    request: Request,
    *,
    recorded: Acceptance | None = None,
    findings: Sequence[str] = (),
) -> Verification:
    """Try a draft in `request.engine` on `prompts` and compare with redraft's own counts.

    `target` may sit on the CPU: it moves to a GPU once the servers are gone. `recorded` is what the
    run that made the draft measured; `findings` are fatal findings in its files, to which readings of
    them that accept clearly more are added. Raises UserError
    when draft and target do not fit or the engine cannot be run.
    """
    began, name = time.monotonic(), target.name
    method_of(stored, request.engine)
    served = stored.as_served(request.engine.name)
    draft = served.build(target)  # refuses a draft that does not fit, before anything is started
    prompts = fitting(prompts, target, request)
    tried = _try_both(environment, target, stored, prompts, request)
    if tried.target is not target:
        target = tried.target
        draft = served.build(target)
    if torch.cuda.is_available():
        target.model.to("cuda")
        draft.to("cuda")
    say("redraft's own loop on the same token ids")
    answers = answer_all(target, prompts, request.max_new_tokens, request.k, Sampling())
    said = tried.drafted.answers[1]
    if (tried.outtype and not tried.unread) or _parted(target, answers, said, request):
        given = with_lookahead(target, prompts, said, request.k)
        own, texts = measure_answers(target, draft, given, k=request.k), answers
    else:
        own = measure(
            target,
            draft,
            prompts,
            k=request.k,
            max_new_tokens=request.max_new_tokens,
            mode="replay" if is_recurrent(target.model) else "live",
        )
        texts = own.answers
    found = dataclasses.replace(
        _compared(environment, tried, stored, prompts, texts, own, request),
        target=name,
        recorded=recorded,
        findings=(*findings, *better_variants(target, served, answers, request.k)),
        seconds=time.monotonic() - began,
    )
    reasons = judge(found)
    causes = diagnose(stored, target, found) if reasons else []
    return dataclasses.replace(
        found,
        good=not reasons and not slower_everywhere(found),
        conclusion=conclusion(found, reasons),
        causes=tuple(causes),
        notes=tuple(notes_on(found)),
    )


def method_of(stored: StoredDraft, engine: Engine = VLLM) -> str:
    """An engine's name of the method for a draft. Raises UserError for a kind that it does not serve."""
    if engine.name not in stored.row.methods:
        raise UserError(f"{engine.title} has no method for a draft of kind {stored.kind}")
    return stored.row.methods[engine.name]


def fitting(prompts: Sequence[Prompt], target: Target, request: Request) -> list[Prompt]:
    """The prompts whose longest answer, and the last step past its end, fit the target's context."""
    needed = request.max_new_tokens + 2 * request.k
    kept = [p for p in prompts if len(p.tokens) + needed <= target.max_positions]
    if not kept:
        raise UserError(
            f"none of the {len(prompts)} prompts leaves space for {request.max_new_tokens} tokens "
            f"in the target's context of {target.max_positions}; lower --max-new-tokens"
        )
    if len(kept) < len(prompts):
        say(
            f"{len(prompts) - len(kept)} prompts left out: too long for {request.max_new_tokens} "
            f"more tokens in a context of {target.max_positions}"
        )
    return kept


def _parted(
    target: Target, answers: Sequence[Answer], said: Sequence[Sequence[int]], request: Request
) -> bool:
    """Whether rounding alone may have given the engine other answers, whose steps are then those to compare."""
    same = all(one.answer == list(other) for one, other in zip(answers, said, strict=True))
    return not same and target.dtype != torch.float32 and not request.engine_args


def with_lookahead(
    target: Target, prompts: Sequence[Prompt], given: Sequence[Sequence[int]], k: int
) -> list[Answer]:
    """Answers of an engine as the target might have given them, each continued by the target for a step of K."""
    wholes = [Prompt(p.id, [*p.tokens, *tokens]) for p, tokens in zip(prompts, given, strict=True)]
    rest = answer_all(target, wholes, 1, k, Sampling())
    return [
        Answer(
            prompt.id,
            prompt.tokens,
            [*tokens, *after.tokens],
            len(tokens),
            "stop" if tokens and tokens[-1] in target.stop_ids else "length",
        )
        for prompt, tokens, after in zip(prompts, given, rest, strict=True)
    ]


def serving_of(target: Target, prompts: Sequence[Prompt], request: Request) -> Serving:
    """How `target` is served for these prompts: in the dtype it was loaded in, with the context
    that the longest prompt needs."""
    dtype = str(target.dtype).removeprefix("torch.")
    engine = request.engine
    if dtype not in engine.dtypes:
        raise UserError(
            f"{engine.title} does not serve {dtype}; use --dtype with {', '.join(engine.dtypes)}"
        )
    longest = max(len(p.tokens) for p in prompts)
    source, *adapters = target.sources
    if gguf_file(source) and not engine.outtypes:
        raise UserError(
            f"target {source}: {engine.title} is run on model folders here; use --engine llama.cpp, or name the folder that "
            "the file was made of"
        )
    if gguf_file(source) and request.outtype:
        raise UserError(
            f"--outtype {request.outtype}: target {source} is served unchanged; leave it out, or name the folder that "
            "the file was made of"
        )
    return Serving(
        target=source,
        dtype=dtype,
        max_model_len=longest + request.max_new_tokens + 2 * request.k,
        adapter=adapters[0] if adapters else None,
        eager=request.eager,
        port=request.port,
        patience=request.patience,
        at_a_time=max(1, *request.concurrencies),
        flags=request.engine_args,
        outtype=request.outtype,
    )


def _try_both(
    environment: Environment,
    target: Target,
    stored: StoredDraft,
    prompts: Sequence[Prompt],
    request: Request,
) -> Tried:
    """The engine without the draft, then with it."""
    engine, method = request.engine, method_of(stored, request.engine)
    found = []
    with _converted(request) as folder:
        what, draft = served_folders(serving_of(target, prompts, request), stored, engine, folder)
        speculation = Speculation(method, draft, request.k)
        with_draft = dataclasses.replace(what, speculation=speculation)
        with_draft = engine.prepare(environment, with_draft, folder)
        without = dataclasses.replace(with_draft, speculation=None)
        for name, what in (("plain", without), ("draft", with_draft)):
            with engine.serve(environment, what, request.logs / f"{name}.log") as running:
                found.append(
                    try_server(
                        running,
                        prompts,
                        stop_ids=target.stop_ids,
                        max_new_tokens=request.max_new_tokens,
                        concurrencies=request.concurrencies,
                        repeats=request.repeats,
                        label=f"{engine.title} {name}",
                    )
                )
        plain, drafted = found
        return _as_served(Tried(plain, drafted, target), Path(with_draft.target), request)


def _as_served(tried: Tried, file: Path, request: Request) -> Tried:
    """With the target's weights as the engine read them from `file`."""
    own = gguf_file(tried.target.sources[0]) is not None
    if request.outtype is None and not own:
        return tried
    try:
        if not rounds(file, tried.target.dtype):
            return tried
        target = tried.target if own else stored_in(tried.target, file)
    except UserError as problem:
        return dataclasses.replace(tried, outtype=request.outtype or "", unread=str(problem))
    return dataclasses.replace(tried, target=target, outtype=stored_type(file))


def served_folders(
    what: Serving, stored: StoredDraft, engine: Engine, folder: Path
) -> tuple[Serving, str]:
    """What is served, and the draft's folder: for an engine that wants a draft inside its target's checkpoint, a copy of
    that with the draft, in `folder`.
    """
    if not _inside(stored, engine):
        return what, str(stored.folder)
    whole = folder / f"{Path(what.target).name}-{weights_hash(what.target)}-{stored.hash()}"
    if not whole.is_dir():  # it appears whole
        stitch(what.target, stored, whole)
    return dataclasses.replace(what, target=str(whole)), str(whole)


def _inside(stored: StoredDraft, engine: Engine) -> bool:
    return engine.inside and stored.row.inside is not None


@contextlib.contextmanager
def _converted(request: Request) -> Iterator[Path]:
    """The folder of converted models: the caller's, else one that is removed after the block."""
    if request.converted is not None:
        yield request.converted
        return
    request.logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="converted-", dir=request.logs) as folder:
        yield Path(folder)


def _compared(
    environment: Environment,
    tried: Tried,
    stored: StoredDraft,
    prompts: Sequence[Prompt],
    texts: Sequence[Answer],
    own: Measured,
    request: Request,
) -> Verification:
    """Everything counted and compared, not judged yet. `texts` are redraft's own answers, `own` its steps."""
    target, plain, drafted = tried.target, tried.plain, tried.drafted
    own_answers = [text.answer for text in texts]
    limits = Limits(request.k, request.max_new_tokens, target.stop_ids)
    traces = [trace for trace in own.traces if isinstance(trace, StepTrace)]
    counted = count_own(traces, own.answers, limits, request.engine.cut)
    dtype = str(target.dtype).removeprefix("torch.")
    rounding = STATES if tried.outtype else None
    outputs = {
        level: compare(
            target, prompts, plain.answers[level], drafted.answers[level], rounding=rounding
        )
        for level in plain.answers
    }
    speed = tuple(
        EngineSpeed(
            level,
            plain.speed[level],
            drafted.speed[level],
            drafted.speed[level].tokens_per_second / plain.speed[level].tokens_per_second,
            outputs[level],
        )
        for level in plain.answers
    )
    return Verification(
        engine=request.engine.name,
        engine_version=environment.version,
        target=target.name,
        draft=str(stored.folder),
        method=method_of(stored, request.engine),
        dtype=dtype,
        k=request.k,
        max_new_tokens=request.max_new_tokens,
        prompts=len(prompts),
        outputs=outputs[1],
        against_redraft=compare(target, prompts, own_answers, plain.answers[1], rounding=rounding),
        tau=drafted.counted.acceptance(),
        own=own.acceptance,
        tolerance=tolerance(
            dtype, inside=_inside(stored, request.engine), rounded=bool(tried.outtype)
        ),
        speed=speed,
        expected=counted.acceptance(),
        engine_args=request.engine_args,
        outtype=tried.outtype,
        unread=tried.unread,
        versions=versions(),
    )
