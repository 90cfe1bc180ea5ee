"""`redraft bench family`: a small family built from nothing, to try methods on.

    base         a Llama-shaped target trained on dialogues, records and functions
    fine-tunes   of the base on word problems, weak to strong, and on other domains (see MEMBERS)
    draft        the base's EAGLE-3 draft, trained on the base's own answers
    prompts/     disjoint splits per domain, as JSONL
    family.json  the manifest: paths, recipes, losses, quality gates

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

from ..console import say
from ..decode.sampling import Sampling
from ..drafts.new import new_draft
from ..drafts.table import KINDS
from ..errors import UserError, nearest
from ..files import write_text, writing
from ..formats.load import load_draft
from ..measuring.measure import Measured, answer_all, measure_answers
from ..records import Answer, Prompt, to_json
from ..run_folder import RunFolder
from ..steps import save_fresh
from ..target import Target, load_target
from ..training.train import train
from .corpus import DRAFT, DRAFT_LR, MEMBERS, SIZES, TUNED, Corpus, Member
from .datasets import data_folder
from .language_model import (
    IGNORE,
    Example,
    fit,
    new_model,
    packed,
    train_tokenizer,
    validation_loss,
)
from .world import Sample


def build_family(
    out: Path,
    *,
    size: str,
    data: str | None = None,
    members: Sequence[str] | None = None,
    kinds: Sequence[str] = (),
    seed: int = 0,
) -> dict[str, Any]:
    """Build what is missing of a family in `out` and return its manifest.

    `kinds` are the kinds of draft that the base gets beside eagle3. `data` is a folder of real data
    for sizes that read it (default $REDRAFT_DATA). Raises UserError for unknown sizes, members or
    kinds, and for a size that needs data where there is none.
    """
    if size not in SIZES:
        raise UserError(f"unknown size '{size}'; {nearest(size, SIZES)}")
    for name in members or ():
        if name not in MEMBERS:
            raise UserError(f"unknown member '{name}'; {nearest(name, MEMBERS)}")
    s = SIZES[size]
    folder = data_folder(data) if s.real else None
    if s.real and folder is None:
        raise UserError(
            f"size {size} reads real data: name its folder with --data or in REDRAFT_DATA"
        )
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f"unknown kind of draft '{kind}'; {nearest(kind, KINDS)}")
    chosen = [name for name in MEMBERS if members is None or name in members]
    corpus = Corpus(s, folder, seed, tuple(chosen))
    with RunFolder.open(out) as run:
        _build(run, corpus, size, kinds)
    manifest: dict[str, Any] = json.loads((out / "family.json").read_text(encoding="utf-8"))
    return manifest


def _build(run: RunFolder, corpus: Corpus, size: str, kinds: Sequence[str]) -> None:
    """Every part of a family, as stages of its folder."""
    out = run.path
    about = {
        "size": asdict(corpus.size),
        "seed": corpus.seed,
        "real": bool(corpus.folder),
    }
    key = run.stage("prompts", about, ["prompts"], lambda: _write_prompts(out, corpus))
    key = run.stage("tokenizer", {"prompts": key}, ["tokenizer"], lambda: _tokenizer(out, corpus))
    data = {"tokenizer": key, "shared_out": list(corpus.shared_out)}
    key = run.stage("base", data, ["base"], lambda: _base(out, corpus))
    tuned = []
    for name in corpus.members:
        row = MEMBERS[name]
        version = run.stage(
            name,
            {"base": key, **asdict(row)},
            [f"members/{name}"],
            lambda name=name, row=row: _member(out, corpus, name, row),  # type: ignore[misc]
        )
        tuned.append(version)
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
        {"draft": drafted["eagle3"], "members": tuned},
        ["family.json"],
        lambda: run.write_json("family.json", _manifest(out, corpus, size)),
    )


def describe_family(family: dict[str, Any], out: Console | None = None) -> None:
    """The members and gates as tables."""
    out = out or Console(highlight=False)
    table = Table(title=f"family {family['size']}: {family['parameters']:,} parameters per target")
    for heading in ("member", "fine-tune", "domain", "loss on it", "base's draft reused: tau"):
        table.add_column(heading)
    for name, row in family["members"].items():
        reused = row["reused"]
        low, high = reused["ci"]
        tau = f"{reused['tau']:.2f} [{low:.2f}, {high:.2f}]"
        table.add_row(name, row["says"], row["domain"], f"{row['loss']:.2f}", tau)
    out.print(table)
    for gate in family["gates"]:
        mark = "pass" if gate["passed"] else "FAIL"
        out.print(f"{mark}  {gate['gate']}: {gate['value']:.3g} (wanted {gate['wanted']})")


# -- stages ------------------------------------------------------------------------------------


def _write_prompts(out: Path, corpus: Corpus) -> None:
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


def write_chats(file: Path, domain: str, rows: Sequence[Sample]) -> None:
    """Chats as a prompts file, their answers with them."""
    lines = [{"id": r.id, "domain": domain, "messages": list(r.messages)} for r in rows]
    write_text(file, "".join(json.dumps(line) + "\n" for line in lines))


def _tokenizer(out: Path, corpus: Corpus) -> None:
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


def _base(out: Path, corpus: Corpus) -> None:
    s, tokenizer = corpus.size, _load_tokenizer(out)
    rows = [_chat_ids(tokenizer, sample) for sample in corpus.base_chats()]
    rows += [
        [*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in corpus.base_texts()
    ]
    random.Random(corpus.seed).shuffle(rows)
    model = new_model(s.shape, corpus.seed).to(_device())
    fit(
        model,
        packed(rows, s.window),
        steps=s.base_steps,
        batch=s.base_batch,
        lr=s.base_lr,
        seed=corpus.seed,
        label="base",
    )
    _save(out / "base", model, tokenizer)


def _member(out: Path, corpus: Corpus, name: str, row: Member) -> None:
    s, tokenizer = corpus.size, _load_tokenizer(out)
    model: Any = load_target(str(out / "base")).model
    if row.lora_rank is not None:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(
            r=row.lora_rank, lora_alpha=2 * row.lora_rank, target_modules="all-linear"
        )
        with torch.random.fork_rng():
            torch.manual_seed(corpus.seed + 1)
            model = get_peft_model(model, lora)
    else:
        model.requires_grad_(True)
    domain = corpus.named(row.domain)
    if row.plain_text:
        found = corpus.tune_texts(domain)
        rows = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in found]
        examples = packed(rows, s.window)
    else:
        examples = [supervised(tokenizer, c) for c in corpus.tune_chats(domain)]
        if row.replay:
            replayed = _replayed(out, corpus, domain, row.replay)
            examples = examples[: len(replayed)] + replayed
    fit(
        model,
        examples,
        steps=s.tune_steps,
        batch=s.tune_batch,
        lr=s.tune_lr * row.rate,
        seed=corpus.seed + 1,
        label=name,
    )
    _save(out / "members" / name, model, tokenizer)


def _replayed(out: Path, corpus: Corpus, domain: str, count: int) -> list[Example]:
    """Questions of the other general domains with the base's own greedy answers, to be learned."""
    base = load_target(str(out / "base"))
    asked = [
        Prompt(sample.id, tuple(base.render(list(sample.messages[:-1]))))
        for other in corpus.general
        if other != domain
        for sample in corpus.chats(other, count, "tune")
    ]
    longest = corpus.size.answer_tokens
    answers = answer_all(base, asked, longest, 0, Sampling(), batch_size=128)
    return [([*a.prompt, *a.answer], [IGNORE] * len(a.prompt) + list(a.answer)) for a in answers]


def draft_folder(kind: str) -> str:
    """Where in a family the base's draft of a kind lies."""
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
    """Measure what a family must be like to show anything: reused and native tau, loops.

    Each member is measured on the domain it was tuned on.
    """
    s, tokenizer = corpus.size, _load_tokenizer(out)
    base = load_target(str(out / "base"))
    native = _reused(out, base, corpus.general, s.answer_tokens)
    general = [
        _chat_ids(tokenizer, c) for d in corpus.general for c in corpus.chats(d, 64, "heldout")
    ]
    entries: dict[str, Any] = {}
    for name in corpus.members:
        domain, target = corpus.named(MEMBERS[name].domain), load_member(out, name)
        heldout = [supervised(tokenizer, c) for c in corpus.chats(domain, 128, "heldout")]
        reused = _reused(out, target, (domain,), s.answer_tokens)
        entries[name] = {
            "says": MEMBERS[name].says,
            "domain": domain,
            **member_source(out, name),
            "loss": validation_loss(target.model, heldout),
            "reused": to_json(reused.acceptance),
        }
        say(f"{name}: base's draft reused, tau {reused.acceptance.tau:.2f}")
    gates = [_gate("tau of the base's draft on its base", native.acceptance.tau, 2.0, 4.5)]
    gates += [
        _gate(f"loop rate of {name}", row["reused"]["loop_rate"], 0.0, 0.05)
        for name, row in entries.items()
    ]
    if "sft" in entries:
        gates.append(_gate("tau reused on sft", entries["sft"]["reused"]["tau"], 1.2, 2.2))
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


def read_manifest(
    family: Path, members: Sequence[str], scales: Mapping[str, Any]
) -> dict[str, Any]:
    """The manifest of a family that is to have `members` and a size for which a bench has a scale.

    Raises UserError where it is no family, or lacks one of them.
    """
    path = family / "family.json"
    if not path.is_file():
        raise UserError(f"{family} is no family: expected {path}; build one with bench family")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if found["size"] not in scales:
        raise UserError(
            f"no scale is set for families of size {found['size']}; {nearest(found['size'], scales)}"
        )
    for member in members:
        if member not in found["members"]:
            raise UserError(
                f"family {family} has no fine-tune '{member}'; {nearest(member, found['members'])}; "
                "build it with redraft bench family"
            )
    return found


def member_source(out: Path, name: str) -> dict[str, str | None]:
    """`--target` and `--target-adapter` of a member."""
    folder = str(out / "members" / name)
    if MEMBERS[name].lora_rank is not None:
        return {"target": str(out / "base"), "adapter": folder}
    return {"target": folder, "adapter": None}


def load_member(out: Path, name: str) -> Target:
    source = member_source(out, name)
    return load_target(str(source["target"]), adapter=source["adapter"])


def family_prompts(
    out: Path, target: Target, domains: Sequence[str], split: str, count: int
) -> list[Prompt]:
    """`count` prompts of each domain's split, rendered for `target`."""
    from ..data.prompts import read_prompts

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
    overrun: int,
) -> list[Answer]:
    prompts = family_prompts(out, target, domains, split, count)
    found = answer_all(target, prompts, longest, overrun, Sampling(), batch_size=128)
    return [answer for answer in found if answer.length >= 2]


def _reused(out: Path, target: Target, domains: Sequence[str], longest: int) -> Measured:
    answers = _answers(out, target, domains, "eval", 96 // len(domains), longest, 4)
    return measure_answers(target, load_draft(str(out / "draft"), target), answers, k=4)


def _gate(name: str, value: float, low: float, high: float) -> dict[str, Any]:
    return {
        "gate": name,
        "value": value,
        "wanted": f"{low:g} to {high:g}",
        "passed": low <= value <= high,
    }


def _load_tokenizer(out: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(out / "tokenizer")


def _save(folder: Path, model: Any, tokenizer: Any) -> None:
    with writing(folder):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _chat_ids(tokenizer: Any, sample: Sample) -> list[int]:
    ids = tokenizer.apply_chat_template(list(sample.messages), tokenize=True, return_dict=True)
    return list(ids["input_ids"])


def supervised(tokenizer: Any, sample: Sample) -> Example:
    """A chat whose last assistant turn is learned."""
    whole = _chat_ids(tokenizer, sample)
    asked = tokenizer.apply_chat_template(
        list(sample.messages[:-1]), add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]
    return whole, [IGNORE] * len(asked) + whole[len(asked) :]
