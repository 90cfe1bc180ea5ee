"""`redraft bench real`: a suite of real models: SmolLM2-135M-Instruct, fine-tunes of it, and drafts of the base.

    base              the model, in bf16
    prompts/          questions by domain and split, disjoint by their first turn
    safety/           those of the fine-tune by preferences
    answers/          what the base says, from vLLM: `base` is trained on, `heldout` stops the training
    features/         the base's states on these answers, so that it reads them once
    draft             its EAGLE-3 draft; draft-eagle, draft-lm: others, where they are asked for
    members/NAME      a fine-tune (of LoRA the adapter)
    runs/NAME         the draft adapted to it, where that is asked for
    fleet.yaml        the members of LoRA that were made, and chat of the base, for `redraft fleet`
    suite.json        the manifest

Every part is a stage of a run folder: building again continues where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from redraft.config import RegenerateConfig, resolve
from redraft.core.console import say
from redraft.core.errors import UserError, check_known
from redraft.core.files import write_text
from redraft.core.records import Prompt
from redraft.features.extract import Plan, write_features
from redraft.generation.answer_file import read_answers
from redraft.generation.regenerate import regenerate
from redraft.models.loading import load_target
from redraft.models.target import Target, default_aux_layers
from redraft.pipeline.adapt import AdaptResult, adapt
from redraft.pipeline.run_folder import RunFolder
from redraft.prompts.prompts import read_prompts
from redraft.serving.engine import Serving
from redraft.serving.engines import engine_named

from .datasets import VARIABLE, data_folder
from .language_model import save_merged
from .pretrained import build_model
from .real_drafts import DRAFTS, K, Kept, Pruned, Trained, make_draft
from .real_members import (
    BASE,
    LONGEST_QUESTION,
    MEMBERS,
    SAFETY,
    make_member,
    questions,
    write_questions,
)

MODEL = "smollm2"
DOMAINS = ("chat", "math", "code", "medical")
QUESTIONS = {"base": 700, "heldout": 16, "adapt": 900, "eval": 64}
"""Questions of each domain and split at most; chat, which no fine-tune is tuned on, has more for the draft."""
MORE_CHAT = 350
ANSWERS = RegenerateConfig(
    temperature=0.7, greedy_share=0.5, max_new_tokens=192, concurrency=64, timeout=1800.0
)
HELDOUT = RegenerateConfig(max_new_tokens=128, concurrency=64, timeout=1800.0)
CONTEXT = 1024
SHOWN = 330
"""Prompts of the run that README shows."""
SETTINGS = {
    "regenerate.max_new_tokens": 128,
    "measure.eval_limit": 48,
    "measure.heldout": 24,
    "measure.eval_new_tokens": 96,
    "train.batch_tokens": 2048,
    "train.precision": "bf16",
}


def build_real_suite(
    out: Path,
    *,
    data: str | None = None,
    members: Sequence[str] | None = None,
    drafts: Sequence[str] = ("eagle3",),
    python: str | None = None,
) -> dict[str, Any]:
    """Build what is missing of the suite in `out`, with the named members (all by default); its manifest.

    `python` is one with vLLM, which writes the answers. Raises UserError for an unknown member or draft, for two drafts
    of one folder, and where there is no folder of data or no vLLM.
    """
    folder = data_folder(data)
    if folder is None:
        raise UserError(f"name a folder of real data: --data FOLDER, or ${VARIABLE}")
    chosen = list(MEMBERS) if members is None else list(members)
    check_known("member", chosen, MEMBERS)
    check_known("draft", drafts, DRAFTS)
    if {"eagle3", "kept"} <= set(drafts):
        raise UserError("the drafts eagle3 and kept would be the same folder; name one of them")
    with RunFolder.open(out) as run:
        base = run.stage("base", {"model": MODEL}, [BASE], lambda: _base(run.path))
        prompts = run.stage(
            "prompts",
            {"questions": QUESTIONS, "more chat": MORE_CHAT, "longest": LONGEST_QUESTION},
            ["prompts"],
            lambda: _write_prompts(run.path, folder),
        )
        run.stage(
            "safety prompts",
            {"questions": QUESTIONS},
            [SAFETY],
            lambda: _write_safety_prompts(run.path, folder),
        )
        _drafts(run, drafts, base, prompts, python)
        for name in chosen:
            row = MEMBERS[name]
            run.stage(
                name,
                {"base": base, **row.about()},
                [f"members/{name}"],
                partial(make_member, run.path, folder, name),
            )
        write_text(run.path / "fleet.yaml", yaml.safe_dump(_fleet(chosen), sort_keys=False))
        manifest = {
            "model": MODEL,
            "k": K,
            "base": str(run.path / BASE),
            "draft": str(run.path / "draft"),
            "prompts": str(run.path / "prompts"),
            "members": {name: asdict(MEMBERS[name]) for name in chosen},
            "seconds": run.seconds(),
        }
        write_text(run.path / "suite.json", json.dumps(manifest, indent=2) + "\n")
    return manifest


def _fleet(members: Sequence[str]) -> dict[str, Any]:
    rows: dict[str, Any] = {
        name: {
            "adapter": f"members/{name}",
            "prompts": str(prompts_of(Path(), MEMBERS[name].domain, "adapt")),
        }
        for name in members
        if MEMBERS[name].rank is not None
    }
    return {**rows, BASE: {"prompts": str(prompts_of(Path(), "chat", "adapt"))}}


def adapt_real(out: Path, name: str) -> AdaptResult:
    """The run that README shows: the suite's draft adapted to a member, in runs/NAME."""
    domain = MEMBERS[name].domain
    return adapt(
        load_real(out, name),
        str(out / "draft"),
        str(prompts_of(out, domain, "adapt")),
        out=out / "runs" / name,
        limit=SHOWN,
        off_domain={"chat": str(prompts_of(out, "chat", "eval"))},
        config=resolve([("bench real", SETTINGS)]),
    )


def load_real(out: Path, name: str) -> Target:
    """The base, or a member."""
    folder, adapter = folders_of(out, name)
    return load_target(folder, adapter=adapter)


def folders_of(out: Path, name: str) -> tuple[str, str | None]:
    """The folder of the base or of a member, and that of its LoRA adapter if it is one."""
    if name == BASE:
        return str(out / BASE), None
    folder = str(out / "members" / name)
    return (str(out / BASE), folder) if MEMBERS[name].rank else (folder, None)


@dataclass(frozen=True)
class Ask:
    """Prompts to be answered into the file `out`."""

    prompts: Sequence[Prompt]
    out: Path
    config: RegenerateConfig
    lookahead: int = 0


@contextmanager
def merged(source: tuple[str, str | None]) -> Iterator[str]:
    """In the block, the folder of a model with its adapter merged. On a CPU vLLM 0.32 is several times slower with LoRA."""
    folder, adapter = source
    if adapter is None:
        yield folder
        return
    with tempfile.TemporaryDirectory() as scratch:
        save_merged(Path(scratch), folder, adapter)
        yield scratch


def answer_with_engine(
    target: Target, source: tuple[str, str | None], asks: Sequence[Ask], python: str | None
) -> None:
    """A real vLLM answers. `source` is the target's folder and its adapter's.

    Every prompt is read in one step: vLLM 0.32 for CPUs dies where a request with a seed is read in parts.
    """
    engine = engine_named("vllm")
    most = max(ask.config.concurrency for ask in asks)
    log = asks[0].out.parent / "vllm.log"
    with merged(source) as folder:
        what = Serving(folder, "bfloat16", CONTEXT, step_tokens=CONTEXT * most)
        with engine.serve(engine.find(python), what, log) as running:
            for ask in asks:
                config = dataclasses.replace(
                    ask.config, endpoints=running.server.url, endpoint_model=running.model
                )
                regenerate(target, ask.prompts, ask.out, config, ask.lookahead)


def _base(out: Path) -> None:
    build_model(MODEL, out / BASE)


def _drafts(
    run: RunFolder, names: Sequence[str], base: str, prompts: str, python: str | None
) -> None:
    """The base's drafts, and what they are made of: its answers, and for some its states on these."""
    kinds = {type(DRAFTS[name]) for name in names}
    made_of: dict[type, str] = {Kept: base}
    if kinds - {Kept}:
        answers = _answers_of_base(run, base, prompts, python)
        made_of[Pruned] = answers["base"]
        if Trained in kinds:
            work = partial(_features, run.path)
            made_of[Trained] = run.stage("features", answers, ["features"], work, ["features"])
    for name in names:
        draft = DRAFTS[name]
        run.stage(
            draft.folder,
            {"features": made_of[type(draft)], **draft.about()},
            [f"{draft.folder}/config.json", f"{draft.folder}/model.safetensors"],
            partial(make_draft, run.path, name),
            [draft.folder],
        )


def _answers_of_base(run: RunFolder, base: str, prompts: str, python: str | None) -> dict[str, str]:
    """The base's answers; the keys of those that are trained on and of those that are held out."""
    keys = {}
    for name, config, lookahead in (("base", ANSWERS, 0), ("heldout", HELDOUT, K)):
        file = f"answers/{name}.jsonl"
        keys[name] = run.stage(
            f"answers {name}",
            {"base": base, "prompts": prompts, "lookahead": lookahead, **asdict(config)},
            [file],
            partial(_answers, run.path, name, config, lookahead, python),
            keeps=[file],
        )
    return keys


def _answers(
    out: Path, name: str, config: RegenerateConfig, lookahead: int, python: str | None
) -> None:
    folder = str(out / BASE)
    target = load_target(folder)
    found = read_prompts(str(out / "prompts" / f"{name}.jsonl"), target)
    say(found.summary())
    ask = Ask(found.prompts, out / "answers" / f"{name}.jsonl", config, lookahead)
    answer_with_engine(target, (folder, None), [ask], python)


def _features(out: Path) -> None:
    base = load_target(str(out / BASE))
    answers = [a for n in ("base", "heldout") for a in read_answers(out / "answers" / f"{n}.jsonl")]
    plan = Plan(out / "features", batch_tokens=8192)
    write_features(base, answers, default_aux_layers(base.num_layers), plan)


def _write_prompts(out: Path, data: Path) -> None:
    (out / "prompts").mkdir(parents=True, exist_ok=True)
    for split, most in QUESTIONS.items():
        asked = {d: questions(data, d, split)[:most] for d in DOMAINS}
        if split == "base":
            asked["chat"] += questions(data, "chat", "tune")[:MORE_CHAT]
        if split in ("adapt", "eval"):
            for domain, samples in asked.items():
                write_questions(out / "prompts" / f"{domain}-{split}.jsonl", samples)
        else:
            every = [sample for some in asked.values() for sample in some]
            write_questions(out / "prompts" / f"{split}.jsonl", every)


def _write_safety_prompts(out: Path, data: Path) -> None:
    """Apart from the others, which the draft's training depends on."""
    (out / SAFETY).mkdir(parents=True, exist_ok=True)
    for split in ("adapt", "eval"):
        path = out / SAFETY / f"{SAFETY}-{split}.jsonl"
        write_questions(path, questions(data, SAFETY, split)[: QUESTIONS[split]])


def prompts_of(out: Path, domain: str, split: str) -> Path:
    """The questions of a domain that are adapted on, or measured on."""
    return out / (SAFETY if domain == SAFETY else "prompts") / f"{domain}-{split}.jsonl"
