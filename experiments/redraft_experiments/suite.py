"""`redraft bench suite`: a toy suite built from nothing, to try methods on.

    base         a Llama-shaped target trained on dialogues, records and functions
    members      made from the base: fine-tunes, weak to strong, on word problems and on other
                 domains, and those of other kinds (see members.py)
    draft        the base's EAGLE-3 draft, trained on the base's own answers
    prompts/     disjoint splits per domain, as JSONL
    suite.json  the manifest: paths, recipes, losses, quality gates

Every part is a stage of a run folder, so building again continues where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from redraft.checkpoints.load import load_draft
from redraft.core.console import say
from redraft.core.errors import UserError, nearest
from redraft.core.files import write_text
from redraft.core.records import Answer, Prompt, to_json
from redraft.decoding.sampling import Sampling
from redraft.drafts.base import Draft
from redraft.drafts.kinds import kind_named
from redraft.drafts.new import new_draft
from redraft.metrics.measure import Measured, answer_all, measure_answers
from redraft.models.loading import load_target
from redraft.models.target import Target
from redraft.pipeline.run_folder import RunFolder
from redraft.pipeline.stages import save_fresh
from redraft.training.train import train

from .corpus import DRAFT, DRAFT_LR, SIZES, Corpus, chat_of
from .datasets import data_folder
from .kinds import make_member, meant_chats
from .language_model import (
    Example,
    chat_ids,
    fit,
    load_tokenizer,
    new_model,
    packed,
    save_model,
    supervised,
    train_tokenizer,
    validation_loss,
)
from .members import MEMBERS, TUNED, Member, Spec, chosen_members
from .synthetic import Sample
from .synthetic_harm import HARM


def build_suite(
    out: Path,
    *,
    size: str,
    data: str | None = None,
    members: Sequence[str] | None = None,
    kinds: Sequence[str] = (),
    seed: int = 0,
) -> dict[str, Any]:
    """Build what is missing of a toy suite in `out` and return its manifest.

    `members` are names of members or of groups of them; what those are made from is built too.
    `kinds` are the kinds of draft that the base gets next to eagle3. `data` is a folder of real data
    for sizes that read it (default $REDRAFT_DATA). Raises UserError for unknown sizes, members or
    kinds, and for a size that needs data where there is none.
    """
    if size not in SIZES:
        raise UserError(f"unknown size '{size}'; {nearest(size, SIZES)}")
    chosen = chosen_members(members)
    s = SIZES[size]
    folder = data_folder(data) if s.real else None
    if s.real and folder is None:
        raise UserError(
            f"size {size} reads real data: name its folder with --data or in REDRAFT_DATA"
        )
    for kind in kinds:
        kind_named(kind)
    corpus = Corpus(s, folder, seed, chosen)
    with RunFolder.open(out) as run:
        _build(run, corpus, size, kinds)
    manifest: dict[str, Any] = json.loads((out / "suite.json").read_text(encoding="utf-8"))
    return manifest


def _build(run: RunFolder, corpus: Corpus, size: str, kinds: Sequence[str]) -> None:
    """Every part of a toy suite, as stages of its folder."""
    out = run.path
    about = {
        "size": asdict(corpus.size),
        "seed": corpus.seed,
        "real": bool(corpus.folder),
    }
    prompts = run.stage("prompts", about, ["prompts"], lambda: write_prompts(out, corpus))
    key = run.stage(
        "tokenizer", {"prompts": prompts}, ["tokenizer"], lambda: write_tokenizer(out, corpus)
    )
    data = {"tokenizer": key, "shared_out": list(corpus.shared_out)}
    key = run.stage("base", data, ["base"], lambda: _base(out, corpus))
    harm = None
    if any(MEMBERS[name].domain == HARM for name in corpus.members):
        files = [f"prompts/{HARM}-{split}.jsonl" for split in ("adapt", "heldout", "eval")]
        harm = run.stage(HARM, {"prompts": prompts}, files, lambda: _write_harm(out, corpus))
    tuned: dict[str, str] = {}
    for name in corpus.members:
        row = MEMBERS[name]
        tuned[name] = run.stage(
            name,
            stage_inputs(row, key, tuned, harm),
            [f"members/{name}"],
            lambda name=name: make_member(out, corpus, name),  # type: ignore[misc]
        )
    drafted = {
        kind: run.stage(
            draft_folder(kind),
            {"base": key},
            [draft_folder(kind)],
            lambda kind=kind: _base_draft(out, corpus, kind),  # type: ignore[misc]
        )
        for kind in dict.fromkeys(("eagle3", *kinds))
    }
    run.stage(
        "gates",
        {
            "draft": drafted["eagle3"],
            "members": list(tuned.values()),
            "kinds": [MEMBERS[name].kind for name in tuned],
        },
        ["suite.json"],
        lambda: run.write_json("suite.json", _manifest(out, corpus, size)),
    )


def stage_inputs(
    row: Spec, base: str, built: Mapping[str, str], harm: str | None
) -> dict[str, Any]:
    """What a member's stage depends on: the base, its record, and the parts that it is made from."""
    inputs: dict[str, Any] = {"base": base, **asdict(row)}
    if row.needs:
        inputs["made_from"] = {name: built[name] for name in row.needs}
    if row.domain == HARM:
        inputs["harm"] = harm
    return inputs


def describe_suite(suite: dict[str, Any], out: Console | None = None) -> None:
    """The members and gates as tables."""
    out = out or Console(highlight=False)
    table = Table(title=f"suite {suite['size']}: {suite['parameters']:,} parameters per target")
    for heading in ("member", "kind", "how", "domain", "loss on it", "base's draft unadapted: tau"):
        table.add_column(heading)
    for name, row in suite["members"].items():
        unadapted = row["unadapted"]
        low, high = unadapted["ci"]
        tau = f"{unadapted['tau']:.2f} [{low:.2f}, {high:.2f}]"
        loss = f"{row['loss']:.2f}"
        table.add_row(name, row["kind"], row["says"], row["domain"], loss, tau)
    out.print(table)
    for gate in suite["gates"]:
        mark = "pass" if gate["passed"] else "FAIL"
        out.print(f"{mark}  {gate['gate']}: {gate['value']:.3g} (wanted {gate['wanted']})")


# -- stages ------------------------------------------------------------------------------------


def write_prompts(out: Path, corpus: Corpus) -> None:
    """A prompts file for each domain and split, in `out`/prompts."""
    adapt = corpus.size.answers + 300
    # name -> (split it is drawn from, how many, how many of that split other files take first)
    files = {
        "adapt": ("adapt", adapt, 0),
        "draft": ("adapt", corpus.size.answers // 2, adapt),
        "heldout": ("heldout", 64, 0),
        "eval": ("eval", 128, 0),
    }
    for domain in (*corpus.general, TUNED):
        for name, (split, count, skipped) in files.items():
            rows = corpus.chats(domain, skipped + count, split)[skipped:]
            write_chats(out / "prompts" / f"{domain}-{name}.jsonl", domain, rows)


def _write_harm(out: Path, corpus: Corpus) -> None:
    """Prompts files of the harm domain: each row says whether it is harmful, and answers well.

    A real data folder may have fewer rows than other domains do.
    """
    for split, count in {"adapt": corpus.size.answers + 300, "heldout": 64, "eval": 128}.items():
        lines = [
            {
                "id": pair.id,
                "domain": HARM,
                "harmful": pair.harmful,
                "messages": list(chat_of(pair, pair.better).messages),
            }
            for pair in corpus.pairs(count, split)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_text(out / "prompts" / f"{HARM}-{split}.jsonl", text)


def write_chats(file: Path, domain: str, rows: Sequence[Sample]) -> None:
    """Chats as a prompts file, their answers with them."""
    lines = [{"id": r.id, "domain": domain, "messages": list(r.messages)} for r in rows]
    write_text(file, "".join(json.dumps(line) + "\n" for line in lines))


def write_tokenizer(out: Path, corpus: Corpus) -> None:
    """The tokenizer of the corpus, in `out`/tokenizer."""
    said = [
        message["content"]
        for domain in (*corpus.general, TUNED)
        for sample in corpus.chats(domain, 1500, "base")
        for message in sample.messages
    ]
    train_tokenizer(
        said + corpus.base_texts()[::4],
        corpus.size.shape.vocab,
        out / "tokenizer",
        superwords=corpus.folder is None,
    )


def base_examples(corpus: Corpus, tokenizer: Any) -> list[Example]:
    """Windows of the chats and texts that a base learns."""
    rows = [chat_ids(tokenizer, sample) for sample in corpus.base_chats()]
    rows += [
        [*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in corpus.base_texts()
    ]
    random.Random(corpus.seed).shuffle(rows)
    return packed(rows, corpus.size.window)


def _base(out: Path, corpus: Corpus) -> None:
    s, tokenizer = corpus.size, load_tokenizer(out / "tokenizer")
    model = new_model(s.shape, corpus.seed).to(_device())
    fit(
        model,
        base_examples(corpus, tokenizer),
        steps=s.base_steps,
        batch=s.base_batch,
        lr=s.base_lr,
        seed=corpus.seed,
        label="base",
    )
    save_model(out / "base", model, tokenizer)


def draft_folder(kind: str) -> str:
    """Where in a toy suite the base's draft of a kind lies."""
    return "draft" if kind == "eagle3" else f"draft-{kind}"


def base_draft_answers(
    out: Path, corpus: Corpus, base: Target
) -> tuple[list[Answer], list[Answer]]:
    """What a draft of the base is trained on and stopped by, as a published draft's data is:
    general talk, and a little of the domain tuned later."""
    s = corpus.size
    answers = [
        answer
        for domains, share in ((corpus.general, 0.3), ((TUNED,), 0.1))
        for answer in _answers(
            out, base, domains, "draft", int(s.answers * share), s.answer_tokens, 0
        )
    ]
    return answers, _answers(out, base, corpus.general, "heldout", 12, s.answer_tokens, 4)


def _base_draft(out: Path, corpus: Corpus, kind: str) -> None:
    s = corpus.size
    target = load_target(str(out / "base"))
    answers, heldout = base_draft_answers(out, corpus, target)
    draft = new_draft(target, answers, kind=kind, width=s.draft_width)
    config = dataclasses.replace(DRAFT, lr=DRAFT_LR / s.shape.hidden)
    trained = train(target, draft, answers, heldout, config, k=4)
    save_fresh(out / draft_folder(kind), draft, target, trained.record)


def _manifest(out: Path, corpus: Corpus, size: str) -> dict[str, Any]:
    """Measure what a toy suite must be like to show anything: unadapted and native tau, loops.

    Each member is measured on its own domain.
    """
    s, tokenizer = corpus.size, load_tokenizer(out / "tokenizer")
    base = load_target(str(out / "base"))
    native = _unadapted(
        out, base, load_draft(str(out / "draft"), base), corpus.general, s.answer_tokens
    )
    general = [
        chat_ids(tokenizer, c) for d in corpus.general for c in corpus.chats(d, 64, "heldout")
    ]
    entries: dict[str, Any] = {}
    for name in corpus.members:
        row, target = MEMBERS[name], load_member(out, name)
        domain = corpus.named(row.domain)
        heldout = [
            supervised(target.tokenizer, c) for c in meant_chats(corpus, row, 128, "heldout")
        ]
        draft = load_draft(str(out / "draft"), target)
        unadapted = _unadapted(out, target, draft, (domain,), s.answer_tokens)
        entries[name] = {
            "says": row.says,
            "kind": row.kind,
            "domain": domain,
            **member_source(out, name),
            "loss": validation_loss(target.model, heldout),
            "unadapted": to_json(unadapted.acceptance),
        }
        say(f"{name}: base's draft unadapted, tau {unadapted.acceptance.tau:.2f}")
    gates = [_gate("tau of the base's draft on its base", native.acceptance.tau, 2.0, 4.5)]
    gates += [
        _gate(f"loop rate of {name}", row["unadapted"]["loop_rate"], 0.0, 0.05)
        for name, row in entries.items()
    ]
    if "sft" in entries:
        gates.append(_gate("tau unadapted on sft", entries["sft"]["unadapted"]["tau"], 1.2, 2.2))
    return {
        "size": size,
        "seed": corpus.seed,
        "parameters": base.model.num_parameters(),
        "base": str(out / "base"),
        "draft": str(out / "draft"),
        "prompts": str(out / "prompts"),
        "tuned_domain": TUNED,
        "general_domains": list(corpus.general),
        "base_loss": validation_loss(base.model, packed(general, s.window)),
        "native": to_json(native.acceptance),
        "members": entries,
        "gates": gates,
    }


def read_manifest(suite: Path, members: Sequence[str], scales: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of a toy suite that is to have `members` and a size for which a bench has a scale.

    Raises UserError where it is no suite, or lacks one of them.
    """
    path = suite / "suite.json"
    if not path.is_file():
        raise UserError(f"{suite} is no suite: expected {path}; build one with bench suite")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if found["size"] not in scales:
        raise UserError(
            f"no scale is set for suites of size {found['size']}; {nearest(found['size'], scales)}"
        )
    for member in members:
        if member not in found["members"]:
            raise UserError(
                f"suite {suite} has no fine-tune '{member}'; {nearest(member, found['members'])}; "
                "build it with redraft bench suite"
            )
    return found


def member_source(out: Path, name: str) -> dict[str, str | None]:
    """`--target` and `--target-adapter` of a member."""
    folder = str(out / "members" / name)
    row = MEMBERS[name]
    if isinstance(row, Member) and row.lora_rank is not None:
        return {"target": str(out / "base"), "adapter": folder}
    return {"target": folder, "adapter": None}


def load_member(out: Path, name: str) -> Target:
    source = member_source(out, name)
    return load_target(str(source["target"]), adapter=source["adapter"])


def suite_prompts(
    out: Path, target: Target, domains: Sequence[str], split: str, count: int
) -> list[Prompt]:
    """`count` prompts of each domain's split, rendered for `target`."""
    from redraft.prompts.prompts import read_prompts

    return [
        prompt
        for domain in domains
        for prompt in read_prompts(
            str(out / "prompts" / f"{domain}-{split}.jsonl"), target, count, "last"
        ).prompts
    ]


def _answers(
    out: Path,
    target: Target,
    domains: Sequence[str],
    split: str,
    count: int,
    longest: int,
    lookahead: int,
) -> list[Answer]:
    prompts = suite_prompts(out, target, domains, split, count)
    found = answer_all(target, prompts, longest, lookahead, Sampling(), batch_size=128)
    return [answer for answer in found if answer.length >= 2]


def _unadapted(
    out: Path, target: Target, draft: Draft, domains: Sequence[str], longest: int
) -> Measured:
    answers = _answers(out, target, domains, "eval", 96 // len(domains), longest, 4)
    return measure_answers(target, draft, answers, k=4)


def _gate(name: str, value: float, low: float, high: float) -> dict[str, Any]:
    return {
        "gate": name,
        "value": value,
        "wanted": f"{low:g} to {high:g}",
        "passed": low <= value <= high,
    }


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
