"""Tables of single records, for the guides: MTP heads, fleets, banks, versions, quantised targets, certificates, checks, a watch, processes, plans."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from redraft_experiments import recovery
from redraft_experiments.certificates import CertificateCell
from redraft_experiments.mtp_families import BASE, DROPPED, FROZEN, ROWS, FamilyCell, steps_of
from redraft_experiments.real_cells import WHOLE, RealCell, change, counts_of, grouped
from redraft_experiments.watch import shown

RESULTS = Path(__file__).parent / "results"


def mtp_table() -> str:
    """From `redraft bench real-mtp --record docs/results/mtp-smollm2.json`."""
    record = json.loads((RESULTS / "mtp-smollm2.json").read_text(encoding="utf-8"))
    base, grafted, fresh = (record[name] for name in ("on base", "grafted", "from layer"))
    parameters = f"{grafted['train']['trained_parameters'] / 1e6:.1f} million"
    rows = [
        "| the head | tau, own prompts | tau, people's chat | answers' tokens | seconds of training |",
        "|---|---|---|---|---|",
        "| dropped, as it was saved | 1.00 | 1.00 | | |",
        f"| the base's, grafted | {_tau(grafted['before'])} | {_tau(grafted['off_domain']['chat-before'])} | | |",
        _adapted("grafted and adapted", grafted, "eval", "off-chat"),
        _adapted("new, from the last layer, on the same answers", fresh, "eval", "off-chat"),
    ]
    note = (
        f"\n{grafted['before']['prompts']} own prompts, {grafted['off_domain']['chat-before']['prompts']} of people's chat, K = {grafted['before']['k']}, "
        f"greedy, {parameters} numbers trained, one seed, two CPU cores. On its own base the head has {_tau(base)} ({base['prompts']} prompts)."
    )
    return "\n".join(rows) + "\n" + note


def _adapted(name: str, report: dict[str, Any], own: str, chat: str) -> str:
    changes = report["changes"]
    return (
        f"| {name} | {_tau(report['after'])}, {_change(changes[own])} | {_tau(report['off_domain']['chat-after'])}, {_change(changes[chat])} | "
        f"{report['train']['unique_answer_tokens']:,} | {report['train']['seconds']:.0f} |"
    )


def _tau(found: dict[str, Any]) -> str:
    low, high = found["ci"]
    return f"{found['tau']:.2f} [{low:.2f}, {high:.2f}]"


def _change(found: dict[str, float]) -> str:
    return f"{found['value']:+.2f} [{found['low']:+.2f}, {found['high']:+.2f}]"


def families_table() -> str:
    """From `redraft bench mtp-families --record docs/results/mtp-families.jsonl`."""
    lines = (RESULTS / "mtp-families.jsonl").read_text(encoding="utf-8").splitlines()
    cells = sorted(
        (FamilyCell.from_json(json.loads(line)) for line in lines), key=lambda cell: cell.seed
    )
    rows = [
        "| the model, its head | tau, own prompts | tau, the base's traffic | loss, own | loss, the base's |",
        "|---|---|---|---|---|",
    ]
    for row, says in ROWS.items():
        some = [cell for cell in cells if cell.row == row]
        taus = " | ".join(_family_tau(cells, row, traffic) for traffic in ("own", "base"))
        losses = " | ".join(
            ", ".join(f"{getattr(cell, name):.2f}" for cell in some)
            for name in ("own_loss", "base_loss")
        )
        rows.append(f"| {says} | {taus} | {losses} |")
    one, adapted = cells[0], next(cell for cell in cells if cell.trained_parameters)
    return "\n".join(rows) + (
        f"\n\nSize {one.size}, K = {one.k}, greedy, {len(adapted.own)} prompts of each kind, seeds {', '.join(str(c.seed) for c in cells if c.row == BASE)}; 95 % over seeds and prompts. "
        f"Changes are against the head that was kept. Losses are the model's, in nats a token on held-out text, seed by seed. Adapting trains {adapted.trained_parameters:,} numbers on "
        f"{adapted.answer_tokens:,} tokens of answers."
    )


def _family_tau(cells: list[FamilyCell], row: str, traffic: str) -> str:
    steps, kept = (steps_of(cells, name, traffic) for name in (row, FROZEN))
    if not steps or not kept:
        return "1.00" if row == DROPPED else ""
    tau = recovery.tau(steps)
    if row in (BASE, FROZEN):
        return f"{tau.value:.2f} [{tau.low:.2f}, {tau.high:.2f}]"
    change = recovery.difference(steps, kept)
    return f"{tau.value:.2f}, {change.value:+.2f} [{change.low:+.2f}, {change.high:+.2f}]"


NAMES = {
    "unadapted": "unadapted",
    "shared": "one for all (`fleet adapt`)",
    "union": "one for all, no split, no guard, none of the base's answers",
    "own": "one for each adapter",
    "average": "the mean of these",
}


def fleet_table() -> str:
    """From `redraft bench fleet --record docs/results/fleet-smollm2.jsonl`."""
    lines = (RESULTS / "fleet-smollm2.jsonl").read_text(encoding="utf-8").splitlines()
    cells = [json.loads(line) for line in lines]
    members = list(dict.fromkeys(cell["member"] for cell in cells))
    rows = ["| the draft | " + " | ".join(members) + " |", "|---" * (len(members) + 1) + "|"]
    for draft, title in NAMES.items():
        found = {cell["member"]: cell for cell in cells if cell["draft"] == draft}
        shown = (_of_member(found[name]) if name in found else "" for name in members)
        rows.append(f"| {title} | " + " | ".join(shown) + " |")
    counts = {cell["member"]: cell["trained_on"] for cell in cells if cell["draft"] == "shared"}
    split = ", ".join(f"{name} {count}" for name, count in counts.items())
    return "\n".join(rows) + (
        f"\n\ntau at K = {cells[0]['k']}, {cells[0]['prompts']} prompts of each kept aside, greedy; changes against the unadapted draft on the same answers. "
        f"`fleet adapt` trained on {sum(counts.values())} answers ({split}). none: training found nothing better than the unadapted draft. One seed, "
        "two CPU cores."
    )


def _of_member(cell: dict[str, Any]) -> str:
    if cell["draft"] == "unadapted":
        return f"{cell['tau']:.2f} [{cell['low']:.2f}, {cell['high']:.2f}]"
    if cell["change"] == 0 and cell["change_low"] == -cell["change_high"]:
        return f"{cell['tau']:.2f}, none"
    return f"{cell['tau']:.2f}, {cell['change']:+.2f} [{cell['change_low']:+.2f}, {cell['change_high']:+.2f}]"


def watch_table() -> str:
    """From `redraft bench watch --record docs/results/watch.jsonl`."""
    lines = (RESULTS / "watch.jsonl").read_text(encoding="utf-8").splitlines()
    cells = [json.loads(line) for line in lines]
    sizes = sorted({cell["requests"] for cell in cells})
    rows = [
        "| requests a minute | " + " | ".join(str(size) for size in sizes) + " |",
        "|---" * (len(sizes) + 1) + "|",
    ]
    for fallen in sorted({cell["fallen"] for cell in cells}):
        some = {cell["requests"]: cell for cell in cells if cell["fallen"] == fallen}
        first = some[sizes[0]]
        name = f"tau {first['before']:.2f} to {first['after']:.2f}" if fallen else "no fall"
        rows.append(f"| {name} | " + " | ".join(_found(some[size]) for size in sizes) + " |")
    return "\n".join(rows)


def _found(cell: dict[str, Any]) -> str:
    if cell["false_alarms"] is not None:
        return f"{cell['false_alarms']} alarms in {cell['simulations']} months"
    return f"{shown(cell['median'])} min (95 %: {shown(cell['late'])})"


STARTS = {"base": "from the base's draft", "last": "from the last version's"}


def versions_table() -> str:
    """From `redraft bench versions --record docs/results/versions-smollm2.jsonl`."""
    lines = (RESULTS / "versions-smollm2.jsonl").read_text(encoding="utf-8").splitlines()
    cells = [json.loads(line) for line in lines]
    versions = list(dict.fromkeys(cell["version"] for cell in cells))
    rows = [
        "| the draft | "
        + " | ".join(f"on {name}" for name in versions)
        + " | seconds of training |",
        "|---" * (len(versions) + 2) + "|",
    ]
    for draft in dict.fromkeys(cell["draft"] for cell in cells):
        found = {cell["version"]: cell for cell in cells if cell["draft"] == draft}
        title = "the base's, unadapted"
        if draft != "unadapted":
            version, start = draft.split("-")
            title = f"adapted to {version}, {STARTS[start]}"
        shown = [_of_member(found[name]) for name in versions]
        seconds = f"{found[versions[0]]['seconds']:.0f}" if draft != "unadapted" else ""
        rows.append(f"| {title} | " + " | ".join([*shown, seconds]) + " |")
    trained = next(cell for cell in cells if cell["trained_on"])
    return "\n".join(rows) + (
        f"\n\ntau at K = {cells[0]['k']}, {cells[0]['prompts']} prompts kept aside, greedy; changes against the base's draft on the same answers. {trained['trained_on']} answers "
        "of each version are trained on, the same from both starts. One seed, two CPU cores."
    )


def bank_table() -> str:
    """From `redraft bench bank --record docs/results/bank-smollm2.jsonl`."""
    cell = json.loads((RESULTS / "bank-smollm2.jsonl").read_text(encoding="utf-8"))
    mega = 1e6
    return (
        f"| {cell['adapters']} adapters of rank {cell['rank']} | |\n|---|---|\n"
        f"| on disk | {cell['bank_bytes'] / mega:.0f} MB: the draft {cell['draft_bytes'] / mega:.1f}, each adapter {cell['adapter_bytes'] / mega:.2f} |\n"
        f"| in memory, all attached to one draft | {cell['held'] / mega:.0f} MB (as drafts of their own {cell['apart'] / mega:,.0f}) |\n"
        f"| to add one, to load one | {cell['add_seconds']:.2f} s, {cell['load_seconds']:.3f} s |\n\n"
        "Of the EAGLE-3 draft of SmolLM2-135M-Instruct, in bf16 (`redraft bench bank --draft real/draft`)."
    )


def scale_table() -> str:
    """From `redraft bench scale --record docs/results/scale-smollm2.jsonl`."""
    lines = (RESULTS / "scale-smollm2.jsonl").read_text(encoding="utf-8").splitlines()
    groups: dict[tuple[int, int, int, int], list[dict[str, Any]]] = {}
    for cell in map(json.loads, lines):
        what = ("rows", "tokens", "processes", "threads")
        groups.setdefault(tuple(cell[name] for name in what), []).append(cell)  # type: ignore[arg-type]
    rows = [
        "| rows a step | processes | tokens/s | MB of a process | predicted |",
        "|---|---|---|---|---|",
    ]
    for (count, tokens, processes, threads), cells in groups.items():
        each = f"{processes} of {threads} thread{'s' if threads > 1 else ''}"
        figures = (
            _least_and_most(cells, name)
            for name in ("tokens_per_second", "peak_mb", "predicted_peak_mb")
        )
        rows.append(f"| {count} of {tokens:,} tokens | {each} | {' | '.join(figures)} |")
    return "\n".join(rows)


def plan_table() -> str:
    """From `redraft bench plan --record docs/results/plan.jsonl`."""
    rows = [
        "| target, draft, method | peak, MB | target, TFLOP | draft, TFLOP | training, s | answers, s |",
        "|---|---|---|---|---|---|",
    ]
    figures = {
        "peak": (1, ",.0f"),
        "target_flops": (1e12, ",.2f"),
        "draft_flops": (1e12, ",.2f"),
        "train_seconds": (1, ",.0f"),
        "answer_seconds": (1, ",.0f"),
    }
    for line in (RESULTS / "plan.jsonl").read_text(encoding="utf-8").splitlines():
        cell = json.loads(line)
        found = (
            f"{cell[f'{name}_planned'] / unit:{how}} / {cell[name] / unit:{how}}"
            for name, (unit, how) in figures.items()
        )
        about = f"{cell['target']}, {cell['kind']}, {cell['method']}"
        rows.append(f"| {about} | {' | '.join(found)} |")
    return "\n".join(rows)


def _least_and_most(cells: Sequence[dict[str, Any]], name: str) -> str:
    """A figure of several runs."""
    found = sorted({f"{cell[name]:,.0f}": cell[name] for cell in cells}.items(), key=lambda x: x[1])
    return found[0][0] if len(found) == 1 else f"{found[0][0]} to {found[-1][0]}"


FORMS = {
    "bf16": "bf16",
    "q8_0": "llama.cpp `q8_0`",
    "q4_k_m": "llama.cpp `q4_k_m`",
    "q3_k_m": "llama.cpp `q3_k_m`",
    "q2_k": "llama.cpp `q2_k`",
    "int8": "bitsandbytes, 8 bits",
    "nf4": "bitsandbytes, NF4",
}
SEEN = {
    "bf16": "bf16",
    "states": "the form's answers, the states of bf16",
    "own": "the form's answers and states",
}


def quantised_table() -> str:
    """From `redraft bench quantised --record docs/results/quantised-smollm2.jsonl`."""
    lines = (RESULTS / "quantised-smollm2.jsonl").read_text(encoding="utf-8").splitlines()
    cells = [json.loads(line) for line in lines]
    rows = [
        "| served as | the draft, adapted to | greedy | over bf16's draft | temperature 0.7 | over bf16's draft |",
        "|---|---|---|---|---|---|",
    ]
    for form, draft in dict.fromkeys((cell["form"], cell["draft"]) for cell in cells):
        found = {c["measured"]: c for c in cells if (c["form"], c["draft"]) == (form, draft)}
        both = [found[name] for name in ("greedy", "sampled")]
        shown = " | ".join(f"{_of_member(cell)} | {_over(cell['over_plain'])}" for cell in both)
        size = both[0]["bytes"] / 1e6
        served = f"{FORMS[form]}, {size:.0f} MB" if draft == "unadapted" else ""
        rows.append(f"| {served} | {SEEN.get(draft, 'nothing (the base’s)')} | {shown} |")
    return "\n".join(rows) + (
        f"\n\ntau at K = {cells[0]['k']}, {cells[0]['prompts']} prompts, each form's own answers; changes against the unadapted draft, and against the draft adapted to bf16, on the same answers. "
        f"{max(cell['tokens'] for cell in cells):,} tokens of answers at most, half greedy and half at 0.7, two passes, `body`, bf16; one seed, two CPU cores."
    )


def _over(found: list[float] | None) -> str:
    return "" if found is None else f"{found[0]:+.2f} [{found[1]:+.2f}, {found[2]:+.2f}]"


def certificates_table() -> str:
    """From `redraft bench certificates --record docs/results/certificates.jsonl`, both engines into one folder."""
    lines = (RESULTS / "certificates.jsonl").read_text(encoding="utf-8").splitlines()
    cells = [CertificateCell.from_json(json.loads(line)) for line in lines]
    rows = ["| engine | right set-ups | exact | false alarms |", "|---|---|---|---|"]
    servers = list(dict.fromkeys(cell.server for cell in cells))
    for server in servers:
        right = [cell for cell in cells if cell.server == server and not cell.wanted]
        alarms = sum(not cell.holds for cell in right)
        rows.append(f"| {server} | {len(right)} | {sum(c.exact for c in right)} | {alarms} |")
    rows += ["", "| injected | " + " | ".join(servers) + " |", "|---" * (len(servers) + 1) + "|"]
    for fault in dict.fromkeys(cell.set_up.fault for cell in cells if cell.wanted):
        found = {c.server: c for c in cells if c.set_up.fault == fault}
        said = [_said(found[server]) if server in found else "" for server in servers]
        rows.append(f"| {fault} | " + " | ".join(said) + " |")
    return "\n".join(rows)


def _said(cell: CertificateCell) -> str:
    """What the check said of a fault."""
    if cell.right:
        others = [name for name in cell.cause.split(" | ") if name != cell.wanted]
        short = [name.removeprefix("missing tensor ").removesuffix(".weight") for name in others]
        return "named" + (f", with {', '.join(short)}" if others else "")
    if cell.cause and cell.wanted in cell.conclusion:
        return f"{cell.cause}; it is among the causes listed"
    return cell.cause or ("equal counts" if cell.exact else f"within rounding ({cell.distance})")


PARTS = {"body eighth": "30", "body quarter": "60", "body": "240", "body more": "840"}
SCRATCHES = {"scratch": "240", "scratch more": "840"}
"""Rows of the race, by their answers."""


def check_table() -> str:
    """What `redraft check --json` said of fine-tunes of the real suite (check-smollm2.jsonl), and what came out in the race."""
    checks = (RESULTS / "check-smollm2.jsonl").read_text(encoding="utf-8").splitlines()
    race = (RESULTS / "real-methods.jsonl").read_text(encoding="utf-8").splitlines()
    groups = grouped([RealCell.from_json(json.loads(line)) for line in race])
    columns = [_checked(json.loads(line), groups) for line in checks]
    names = list(columns[0])
    lines = [f"| {name} | {' | '.join(column[name] for column in columns)} |" for name in names]
    return "\n".join([lines[0], "|---" * (1 + len(columns)) + "|", *lines[1:]])


def _checked(
    found: dict[str, Any], groups: Mapping[tuple[str, str], list[RealCell]]
) -> dict[str, str]:
    """A fine-tune's column."""
    trial, member = found["trial"], Path(found["target"]).name
    options = {o["action"]: o["tau"] for o in found["recommendation"]["options"]}

    def taus(which: dict[str, str]) -> str:
        cells = (groups.get((member, row)) for row in which)
        return ", ".join(
            f"{recovery.tau(counts_of(some, 'greedy')).value:.2f}" if some else "-"
            for some in cells
        )

    rise = [end + trial["unadapted"] for end in trial["difference"]]
    after = _spread([trial["tau"], *rise])
    return {
        "the check": member,
        "retention": _spread(found["evidence"]["retention"]),
        "tau now": _spread(options["keep"]),
        "closed form": _spread(options["closed-form"]),
        "trial": f"{trial['unadapted']:.2f} -> {after}",
        "adapt": _spread(options["adapt"]),
        "recommended": f"{found['recommendation']['action']}, error {found['recommendation']['error']:.0%}",
        "**what came out:** unadapted": taus({"unadapted": ""}),
        "adapted on 30, 60, 240, 840 answers": taus(PARTS),
        "from scratch on 240, 840": taus(SCRATCHES),
    }


def _spread(figure: list[float]) -> str:
    return "{:.2f} [{:.2f}, {:.2f}]".format(*figure)


LOSSES = {
    "kl": "KL, four steps deep (default)",
    "hard labels": "hard labels, four steps deep",
    "lk": "LK blend, four steps deep",
    "kl one step": "KL, one step deep",
    "kl three steps": "KL, three steps deep",
    "hard labels one step": "hard labels, one step deep (as SpecForge)",
    "hard labels decay": "hard labels, three steps weighted 1, 0.6, 0.36 (as FastMTP)",
}


def losses_table() -> str:
    """From `redraft bench real-methods --draft HEAD --record docs/results/mtp-losses.jsonl`."""
    lines = (RESULTS / "mtp-losses.jsonl").read_text(encoding="utf-8").splitlines()
    groups = grouped([RealCell.from_json(json.loads(line)) for line in lines])
    rows = [
        "| fine-tune, seeds | trained by | own prompts, greedy | own, temperature 0.7 | chat | TFLOP |",
        "|---|---|---|---|---|---|",
    ]
    for member in dict.fromkeys(member for member, _ in groups):
        zero = groups[member, "unadapted"]
        for row, title in LOSSES.items():
            cells = groups.get((member, row))
            if cells is None:
                continue
            shown = [change(cells, zero, name, WHOLE) for name in ("greedy", "sampled", "chat")]
            figures = " | ".join(f"{c.value:+.2f} [{c.low:+.2f}, {c.high:+.2f}]" for c in shown)
            work = [c.train["draft_flops"] + c.train["target_flops"] for c in cells]
            rows.append(
                f"| {member}, {len(cells)} | {title} | {figures} | {sum(work) / len(work) / 1e12:.0f} |"
            )
    taus = (
        f"{member} {recovery.tau(counts_of(groups[member, 'unadapted'], 'greedy')).value:.2f}"
        for member in dict.fromkeys(member for member, _ in groups)
    )
    first = next(iter(groups.values()))[0]
    own, chat = (len(first.counts[str(WHOLE)][name]) for name in ("greedy", "chat"))
    return "\n".join(rows) + (
        f"\n\nChanges of tau against the base's head, grafted (greedy on own prompts: {', '.join(taus)}), at K = 4; {own} own prompts and {chat} of people's chat, `body`, two "
        "passes over 240 answers, half greedy and half at 0.7. TFLOP: operations of training."
    )
