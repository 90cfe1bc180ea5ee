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
from ..core.records import Acceptance, EngineSpeed, Prompt, StepTrace, Verification, versions
from ..decoding.sampling import Sampling
from ..metrics.config_diagnosis import better_variants
from ..metrics.lossless import compare
from ..metrics.measure import Measured, answer_all, measure
from ..models.kv_cache import is_recurrent
from ..models.target import Target, weights_hash
from .diagnosis import diagnose
from .engine import Engine, Serving, Speculation
from .environment import Environment
from .judgement import conclusion, judge, notes_on, slower_everywhere, tolerance
from .own_count import Limits, count_own
from .trial import Trial, try_server
from .vllm import VLLM

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Request:
    """What to try. Logs of the two servers go to the folder `logs`.

    `converted` is the folder that keeps what the engine reads instead of Hugging Face folders; None: it is
    removed at the end. `engine_args` are the user's own flags of the engine's server. See `Serving` for
    the rest.
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
    began = time.monotonic()
    method_of(stored, request.engine)
    served = stored.as_served(request.engine.name)
    draft = served.build(target)  # refuses a draft that does not fit, before anything is started
    prompts = fitting(prompts, target, request)
    plain, drafted = _try_both(environment, target, stored, prompts, request)
    if torch.cuda.is_available():
        target.model.to("cuda")
        draft.to("cuda")
    say("redraft's own loop on the same token ids")
    own = measure(
        target,
        draft,
        prompts,
        k=request.k,
        max_new_tokens=request.max_new_tokens,
        mode="replay" if is_recurrent(target.model) else "live",
    )
    answers = answer_all(target, prompts, request.max_new_tokens, request.k, Sampling())
    found = dataclasses.replace(
        _compared(environment, target, stored, prompts, plain, drafted, own, request),
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
    )


def _try_both(
    environment: Environment,
    target: Target,
    stored: StoredDraft,
    prompts: Sequence[Prompt],
    request: Request,
) -> tuple[Trial, Trial]:
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
    return found[0], found[1]


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
    target: Target,
    stored: StoredDraft,
    prompts: Sequence[Prompt],
    plain: Trial,
    drafted: Trial,
    own: Measured,
    request: Request,
) -> Verification:
    """Everything counted and compared, not judged yet."""
    own_answers = [answer.answer for answer in own.answers]
    limits = Limits(request.k, request.max_new_tokens, target.stop_ids)
    traces = [trace for trace in own.traces if isinstance(trace, StepTrace)]
    counted = count_own(traces, own.answers, limits, request.engine.cut)
    dtype = str(target.dtype).removeprefix("torch.")
    outputs = {
        level: compare(target, prompts, plain.answers[level], drafted.answers[level])
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
        against_redraft=compare(target, prompts, own_answers, plain.answers[1]),
        tau=drafted.counted.acceptance(),
        own=own.acceptance,
        tolerance=tolerance(dtype, inside=_inside(stored, request.engine)),
        speed=speed,
        expected=counted.acceptance(),
        engine_args=request.engine_args,
        versions=versions(),
    )
