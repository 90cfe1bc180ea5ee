"""The stages of a job, each once: answer, select, train, export, measure.

A stage is keyed by its inputs in the run folder and returns its key, which later stages name among theirs. The
functions that do the work without a run folder (`answer_file`, `train_files`, `merge_draft`, `measure_file`) are
what the single commands call.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..adapters.adapter import Adapter
from ..adapters.expert import candidate_widths, shared_width, smallest_good
from ..adapters.kind import every_kind
from ..adapters.merge import home_of, merge, without_adapters
from ..checkpoints.adapter_folder import TRAINING, check_belongs, load_adapter, save_adapter
from ..checkpoints.load import StoredDraft, load_draft, made_for, read_draft, stored
from ..config import RegenerateConfig, TrainConfig, key_of
from ..core.console import say
from ..core.errors import UserError
from ..core.files import remove, write_text, writing
from ..core.folders import state_hash
from ..core.lock import held
from ..core.records import Answer, Prompt, StepTrace, TrainRecord, to_json
from ..drafts.base import Draft
from ..drafts.new import new_draft
from ..features.stored_target import StoredTarget
from ..generation.answer_file import answer_inputs, answers_for, prompts_hash, read_answers
from ..generation.on_policy import OnPolicy, check_on_policy
from ..generation.regenerate import regenerate
from ..metrics.acceptance import Steps
from ..metrics.measure import Measured, measure_answers
from ..metrics.replay import decoding_of
from ..models.target import Target
from ..selection.scoring import NEEDS, Scorers
from ..selection.select import kept_answers, write_selection
from ..selection.select import select as choose
from ..serving.certificate import FEWEST
from ..serving.certificate import certify as write_certificate
from ..training.guard import Guard
from ..training.train import Trained, train_adapters
from ..training.train import train as train_draft
from .job import Job

SELECTION = "selection.jsonl"
CERTIFICATE = "certificate.json"
CERTIFIED = 32
"""Prompts that are answered for the certificate, of which it holds those with the fewest near-ties."""
STEPS = "measure/steps.json"
"""The accepted tokens of each step, by measurement, then answer by answer."""


def answer(
    job: Job, name: str, prompts: Sequence[Prompt], config: RegenerateConfig, lookahead: int = 0
) -> str:
    """The target answers prompts into answers/NAME.jsonl.

    One stage per file, so that one more file costs only itself.
    """

    def work() -> None:
        _, whose = answer_file(job.target, prompts, job.answers(name), config, lookahead)
        if whose:
            job.run.write_json("on_policy.json", asdict(whose))

    inputs = answer_inputs(job.target, prompts, config, lookahead)
    file = f"answers/{name}.jsonl"
    return job.run.stage(f"regenerate {name}", inputs, [file], work, keeps=[file])


def answer_file(
    target: Target,
    prompts: Sequence[Prompt],
    out: Path,
    config: RegenerateConfig,
    lookahead: int,
    *,
    grow: bool = False,
) -> tuple[list[Answer], OnPolicy | None]:
    """The answers in the file `out` (see `regenerate`), and of those taken unchanged whether they are the
    target's own."""
    answers = regenerate(target, prompts, out, config, lookahead, grow=grow)
    if config.answers != "original":
        return answers, None
    found = check_on_policy(target, answers, config.batch_tokens)
    say(found.describe())
    return answers, found


def select(job: Job, pool: Callable[[], Sequence[Answer]], key: str) -> str:
    """Choose among the samples of `pool`, whose key is `key`, into selection.jsonl."""
    config, asked = job.config.select, NEEDS[job.config.select.select]

    def work() -> None:
        draft = load_draft(str(job.draft.folder), job.target) if "draft" in asked else None
        found = choose(pool(), config, Scorers(job.target, job.base, draft, job.k))
        write_selection(job.run.path / SELECTION, found)
        cost = {"tokens": found.tokens, "flops": found.flops, "seconds": found.seconds}
        job.run.write_json("selection.cost.json", cost)
        say(f"select: {found.summary()}")

    models = {model: job.fingerprint(model) for model in asked}
    inputs = {"pool": key, **models, "k": job.k, **key_of(config)}
    return job.run.stage("select", inputs, [SELECTION], work)


def train(
    job: Job,
    files: Sequence[str],
    chosen: Sequence[str],
    *,
    heldout: Sequence[str] = ("heldout",),
    general: Sequence[str] = (),
    guarded_by: Mapping[str, str] | None = None,
    selection: Path | None = None,
    name: str = "train",
    folder: str = "adapter",
    checkpoints: str = "checkpoints",
) -> str:
    """Train an adapter on the answers in `files` (of which `selection` keeps some) into `folder`.

    Those in the `heldout` files stop it. Those in the `general` files are trained on too; those in the files `guarded_by`
    (by what messages call them) guard it (see `Guard`).
    `chosen` are the keys of what is trained on and stopped by.
    """

    def work() -> None:
        answers = [a for file in files for a in read_answers(job.answers(file))]
        trained_on = list(kept_answers(answers, selection))
        trained_on += [a for file in general for a in read_answers(job.answers(file))]
        guard = None
        if guarded_by:
            guarding = {n: read_answers(job.answers(file)) for n, file in guarded_by.items()}
            guard = Guard(guarding, job.config.general.tolerance, job.reference)
        adapter = train_adapter(
            job.target,
            job.draft,
            trained_on,
            [a for file in heldout for a in read_answers(job.answers(file))],
            job.config.train,
            job.k,
            job.run.path / checkpoints,
            job.base,
            guard,
        )
        save_adapter(job.run.path / folder, adapter)

    inputs = {
        "chosen": chosen,
        "shared": job.draft.hash(),
        "k": job.k,
        "base": job.fingerprint("base") if job.config.train.method_value.closed_form else None,
        **({"general tolerance": job.config.general.tolerance} if guarded_by else {}),
        **({"reference": dict(job.reference)} if guarded_by and job.reference else {}),
        **key_of(job.config.train),
    }
    # Not training.json, which holds seconds: the same tensors trained again are the same adapter.
    outputs = [f"{folder}/model.safetensors", f"{folder}/adapter.json"]
    return job.run.stage(name, inputs, outputs, work, [checkpoints])


def export(job: Job, trained: str) -> str:
    """Merge the adapter in adapter/ into the stock checkpoint draft/."""
    config = job.config.export

    def work() -> None:
        merged = merge_draft(job.draft, load_adapter(job.run.path / "adapter"), job.target)
        merged.save(job.run.path / "draft", config.format)

    return job.run.stage("export", {"trained": trained, **key_of(config)}, ["draft"], work)


def measure(job: Job, exported: str, answered: Mapping[str, str]) -> None:
    """Measure the unadapted and the exported draft on the answers files named in `answered`."""

    def work() -> None:
        steps = {}
        for when, folder in (("before", job.draft.folder), ("after", job.run.path / "draft")):
            draft = load_draft(str(folder), job.target)
            for name in answered:
                found = measure_file(job.target, draft, job.answers(name), job.k)
                job.run.write_json(f"measure/{name}-{when}.json", to_json(found.acceptance))
                steps[f"{name}-{when}"] = accepted_by_step(found.traces)
        write_text(job.run.path / STEPS, json.dumps(steps, separators=(",", ":")))

    inputs = {"exported": exported, "answers": dict(answered), "k": job.k}
    job.run.stage("measure", inputs, ["measure"], work)


def certify(job: Job, exported: str, prompts: Sequence[Prompt]) -> None:
    """Write the certificate of the exported draft, on some of `prompts`; without enough of them, or where that draft can
    have none, a sentence."""
    if job.config.export.certificate == "off":
        return
    some = list(prompts[:CERTIFIED])
    if len(some) < FEWEST:
        say(
            f"no {CERTIFICATE}: {len(some)} prompts are kept aside, and it needs {FEWEST}; redraft certify writes one"
        )
        return

    def work() -> None:
        remove(job.run.path / CERTIFICATE)  # of another draft, should this one get none
        try:
            draft = read_draft(str(job.run.path / "draft"))
            found = write_certificate(
                job.target, draft, some, others={"the unadapted draft": job.draft}
            )
        except UserError as problem:
            say(f"no {CERTIFICATE}: {problem}")
            return
        write_text(job.run.path / CERTIFICATE, found.to_text())

    inputs = {"exported": exported, "prompts": prompts_hash(some)}
    job.run.stage("certify", inputs, [], work)


def accepted_by_step(traces: Sequence[Steps]) -> list[tuple[int, ...]]:
    """What STEPS keeps of replayed answers."""
    return [trace.accepted for trace in traces if isinstance(trace, StepTrace)]


def measure_file(
    target: Target,
    draft: Draft,
    file: Path,
    k: int,
    *,
    mode: str = "replay",
    acceptance: str = "",
    draft_token: str = "",
    limit: int | None = None,
) -> Measured:
    """Measure a draft on the first `limit` answers of a file. Answers of one token are counted as excluded.

    Raises UserError for a file without answers and for answers of another target.
    """
    answers = answers_for(target, file)[:limit]
    if not any(answer.length >= 2 for answer in answers):
        raise UserError(
            f"{file} holds no answer of two tokens or more, so there is nothing to score"
        )
    decoding = decoding_of(answers, acceptance, draft_token)
    return measure_answers(target, draft, answers, k=k, mode=mode, decoding=decoding)


def train_adapter(
    target: Target,
    shared: StoredDraft,
    answers: Sequence[Answer],
    heldout: Sequence[Answer],
    config: TrainConfig,
    k: int,
    checkpoints: Path | None = None,
    base: Target | None = None,
    guard: Guard | None = None,
) -> Adapter:
    """Train an adapter of a stored draft; its tensors are returned in the draft's own dtype.

    With `width` auto several widths are trained together, and the smallest good one is taken.
    """
    draft = shared.build(target, torch.float32)
    if config.width_value is not None or not config.method_value.reads("width"):
        trained = train_draft(
            target,
            draft,
            answers,
            heldout,
            config,
            k=k,
            base=base,
            checkpoints=checkpoints,
            guard=guard,
        )
        return as_adapter(target, shared, trained, answers, config)
    widths = candidate_widths(shared_width(draft))
    configs = [dataclasses.replace(config, width=str(width)) for width in widths]
    trained_together = train_adapters(
        target,
        draft,
        answers,
        heldout,
        configs,
        k=k,
        base=base,
        checkpoints=checkpoints,
        guard=guard,
    )
    taus = [trained.record.best_tau() for trained in trained_together]
    chosen = smallest_good(widths, taus)
    tried = ", ".join(f"{width}: {tau:.3f}" for width, tau in zip(widths, taus, strict=True))
    say(f"width {chosen}: the smallest within 1 % of the best held-out tau ({tried})")
    at = widths.index(chosen)
    adapter = as_adapter(target, shared, trained_together[at], answers, configs[at])
    adapter.card["widths_tried"] = dict(zip(map(str, widths), taus, strict=True))
    return adapter


def as_adapter(
    target: Target,
    shared: StoredDraft,
    trained: Trained,
    answers: Sequence[Answer],
    config: TrainConfig,
) -> Adapter:
    """The trained tensors that changed, in the shared draft's dtypes, with a card."""
    tensors = {}
    for name, tensor in trained.tensors.items():
        home = shared.tensors[home_of(name)]
        stored_tensor = tensor.to(home.dtype) if tensor.is_floating_point() else tensor
        if home_of(name) != name or not torch.equal(stored_tensor, home):
            tensors[name] = stored_tensor
    card = {
        "shared": str(shared.folder),
        "shared_hash": shared.hash(),
        **{k: v for kind in every_kind() for k, v in kind.card(shared.tensors, tensors).items()},
        "adapter_hash": state_hash(tensors),
        "samples": len(answers),
        "config": asdict(config),
        "train": to_json(trained.record),
        **made_for(target),
    }
    return Adapter(config.method, tensors, card)


def merge_draft(shared: StoredDraft, adapter: Adapter, target: Target | None = None) -> StoredDraft:
    """The stock draft of a shared draft and its adapter. Raises UserError if they differ."""
    check_belongs(adapter, shared)
    if target is not None and adapter.card["tokenizer_hash"] != target.tokenizer_hash():
        raise UserError(
            f"this adapter was trained for tokenizer {adapter.card['tokenizer_hash']}, target "
            f"{target.name} has {target.tokenizer_hash()}"
        )
    provenance = {"method": adapter.method, **adapter.card}
    if "train" in provenance:
        provenance["train"] = TrainRecord(**provenance["train"]).lasting()
    return shared.with_tensors(merge(shared.tensors, adapter.tensors), provenance)


def save_fresh(folder: Path, draft: Draft, target: Target, record: TrainRecord) -> None:
    """Save a draft that was trained from scratch, and the record of its training.

    An expert trained with it is left out: it belongs to the target, the draft is what is shared.
    """
    made = stored(draft, target)
    made = dataclasses.replace(made, tensors=without_adapters(made.tensors))
    made.provenance["train"] = record.lasting()
    write_text(folder / TRAINING, json.dumps(to_json(record), indent=2) + "\n")
    made.save(folder)


@dataclass(frozen=True)
class Shape:
    """The shape of a draft that is trained from scratch (see `new_draft`)."""

    kind: str | None = None
    aux_layers: tuple[int, ...] | None = None
    draft_vocab_size: int | None = None
    width: int | None = None


def train_files(
    target: Target,
    answers: Path,
    heldout: Path,
    out: Path,
    config: TrainConfig,
    k: int,
    *,
    selection: Path | None = None,
    draft: str | None = None,
    base: Target | None = None,
    shape: Shape | None = None,
) -> TrainRecord:
    """Train on answers files and save in `out`: an adapter of `draft`, or for scratch a whole draft.

    Raises UserError when another process works in `out`.
    """
    chosen = kept_answers(answers_for(target, answers), selection)
    stopping = answers_for(target, heldout)
    if isinstance(target, StoredTarget):
        agreed = target.check_says(chosen)
        say(f"the stored states make {agreed:.1%} of the answers' tokens the most likely")
    checkpoints = out / "checkpoints"
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    with held(out):
        if draft is not None:
            shared = read_draft(draft).fitted(target)
            adapter = train_adapter(target, shared, chosen, stopping, config, k, checkpoints, base)
            save_adapter(out, adapter)
            return TrainRecord(**adapter.card["train"])
        if not config.method_value.fresh:
            raise UserError(f"--method {config.method} adapts a draft: name it with --draft")
        fresh = new_draft(target, chosen, **vars(shape or Shape()))
        trained = train_draft(target, fresh, chosen, stopping, config, k=k, checkpoints=checkpoints)
        save_fresh(out, fresh, target, trained.record)
        return trained.record
