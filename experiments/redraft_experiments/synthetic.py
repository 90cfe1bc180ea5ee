"""A synthetic corpus: endless small chats and texts in four domains, from word lists alone.

`samples` gives chats (a user asks, the assistant answers) and `passages` gives running text about
the same things. Both are reproducible from (domain, seed, split) and a longer draw begins with the
shorter one. Each text belongs to exactly one split, decided by a hash of the text itself, so that
no two splits share a question however they were drawn. The word lists and the templates are in
`synthetic_tables.py`; here is what puts them together.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from . import synthetic_tables as tables

Message = dict[str, str]
Slots = dict[str, str]
Made = TypeVar("Made")

DOMAINS = ("dialogue", "records", "code", "math")
SPLITS = ("base", "tune", "adapt", "heldout", "eval")
SPLIT_SHARES = {"base": 5, "tune": 4, "adapt": 3, "heldout": 2, "eval": 2}
MAX_DRAWS = 2000
MAX_NUMBER = 200

_CHOICE = re.compile(r"\[([^\[\]]*)\]")


@dataclass(frozen=True)
class Sample:
    """One chat: messages with `role` and `content`, the last one by the assistant."""

    id: str
    domain: str
    messages: tuple[Message, ...]


def samples(domain: str, count: int, *, seed: int, split: str) -> list[Sample]:
    """Draw `count` chats of a domain whose opening questions differ from each other."""
    _check_domain(domain)
    chats = draw(_CHATS[domain], lambda turns: turns[0], f"chat/{domain}", count, seed, split)
    return [
        Sample(f"{domain}/{split}/{seed}/{index}", domain, _messages(turns))
        for index, turns in enumerate(chats)
    ]


def passages(domain: str, count: int, *, seed: int, split: str) -> list[str]:
    """Draw `count` different pieces of running text about the things of a domain."""
    _check_domain(domain)
    return draw(_PASSAGES[domain], str, f"text/{domain}", count, seed, split)


def split_of(text: str, shares: Mapping[str, int]) -> str:
    """Assign a text to one of the names in `shares` by a stable hash, in proportion to them."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    place = int.from_bytes(digest, "big") % sum(shares.values())
    for name, share in shares.items():
        if place < share:
            return name
        place -= share
    raise ValueError("the shares of the splits must be positive")


def check_split(split: str) -> None:
    """Raise a ValueError that names the valid splits unless `split` is one of them."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")


# ------------------------------------------------------------------------------------- drawing


def _check_domain(domain: str) -> None:
    if domain not in DOMAINS:
        raise ValueError(f"unknown domain {domain!r}: choose one of {', '.join(DOMAINS)}")


def draw(
    build: Callable[[random.Random], Made],
    key_of: Callable[[Made], str],
    label: str,
    count: int,
    seed: int,
    split: str,
) -> list[Made]:
    """Build until `count` things with new keys of the wanted split are found."""
    check_split(split)
    seen: set[str] = set()
    drawn: list[Made] = []
    for index in range(count):
        for attempt in range(MAX_DRAWS):
            made = build(random.Random(f"{label}/{seed}/{split}/{index}/{attempt}"))
            key = key_of(made)
            if key not in seen and split_of(key, SPLIT_SHARES) == split:
                break
        else:
            raise RuntimeError(
                f"no new {label} text for split {split!r} after {index} of {count}: "
                f"the templates are exhausted, so ask for fewer"
            )
        seen.add(key)
        drawn.append(made)
    return drawn


def _messages(turns: list[str]) -> tuple[Message, ...]:
    roles = ("user", "assistant")
    return tuple({"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns))


# ------------------------------------------------------------------------------------- wording


def worded(rng: random.Random, template: str, slots: Slots) -> str:
    """Choose among the wordings of a template, innermost brackets first, and fill its slots."""
    changed = 1
    while changed:
        template, changed = _CHOICE.subn(lambda m: rng.choice(m[1].split("|")), template)
    return template.format_map(slots)


def sentence(text: str) -> str:
    """Start with a capital letter and end with a mark."""
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "?", "!", ":")) else text + "."


def _listing(parts: list[str]) -> str:
    """Join parts as in "a, b, and c"."""
    if len(parts) < 3:
        return " and ".join(parts)
    return ", ".join(parts[:-1]) + ", and " + parts[-1]


def _join(sentences: list[str], between: str = " ") -> str:
    return between.join(sentence for sentence in sentences if sentence)


# ------------------------------------------------------------------------------------ dialogue


def _dialogue_slots(rng: random.Random) -> Slots:
    """One value for everything a booking may mention."""
    name, friend, singer = rng.sample(tables.PEOPLE, 3)
    city, start = rng.sample(tables.CITIES, 2)
    cool = rng.randint(2, 18)
    return {
        "name": name,
        "friend": friend,
        "artist": f"{singer} {rng.choice(tables.SURNAMES)}",
        "city": city,
        "start": start,
        "place": rng.choice(tables.TITLES),
        "song": rng.choice(tables.TITLES),
        "song2": rng.choice(tables.TITLES),
        "street": rng.choice(tables.STREETS),
        "food": rng.choice(tables.FOODS),
        "genre": rng.choice(tables.GENRES),
        "room": rng.choice(tables.ROOMS),
        "sky": rng.choice(tables.SKIES),
        "advice": rng.choice(tables.ADVICE),
        "color": rng.choice(tables.COLORS),
        "day": rng.choice(tables.DAYS),
        "time": rng.choice(tables.HOURS),
        "part": rng.choice(("morning", "afternoon", "evening", "night")),
        "unit": rng.choice(("Celsius", "Fahrenheit")),
        "party": rng.choice(list(tables.NUMBER_WORDS.values())),
        "nights": rng.choice(list(tables.NUMBER_WORDS.values())),
        "level": str(rng.randint(2, 10)),
        "few": str(rng.randint(2, 15)),
        "minutes": str(rng.randint(5, 59)),
        "price": str(rng.randint(8, 98)),
        "cool": str(cool),
        "warm": str(cool + rng.randint(3, 14)),
        "code": rng.choice("BCDFGHKLMNPRT") + str(rng.randint(10, 99)) + rng.choice("XYZW"),
    }


def _dialogue(rng: random.Random) -> list[str]:
    """A booking in two, four or six turns: question back and check are each optional."""
    task, slots = rng.choice(tables.TASKS), _dialogue_slots(rng)
    missing = rng.sample(task.slots, rng.choice((0, 0, 1, 1, 2)))
    given = [slot for slot in task.slots if slot not in missing]
    turns = [_opening(rng, task, given, slots)]
    if missing:
        turns += _asking(rng, missing, slots)
    checked = rng.random() < 0.35
    if checked:
        turns += _checking(rng, task, slots)
    return [*turns, _booking(rng, task, slots, recap=not checked or rng.random() < 0.4)]


def _values(rng: random.Random, wanted: list[tables.Slot], slots: Slots) -> str:
    return " ".join(worded(rng, slot.phrase, slots) for slot in wanted)


def _opening(rng: random.Random, task: tables.Task, given: list[tables.Slot], slots: Slots) -> str:
    want = worded(rng, rng.choice(tables.USER_OPEN) + task.want, slots)
    return f"{want} {_values(rng, given, slots)}."


def _asking(rng: random.Random, missing: list[tables.Slot], slots: Slots) -> list[str]:
    """The assistant asks for the missing values and the user gives them."""
    questions = ", and ".join(worded(rng, slot.ask, slots) for slot in missing)
    values = _values(rng, missing, slots)
    question = worded(rng, tables.BOT_ASK, {**slots, "questions": sentence(questions)[:-1]})
    return [question, sentence(worded(rng, tables.USER_GIVE, {**slots, "values": values}))]


def _checking(rng: random.Random, task: tables.Task, slots: Slots) -> list[str]:
    """The assistant repeats all values and the user agrees, or changes one of `slots`."""
    thing = worded(rng, task.thing, slots)
    values = _values(rng, list(task.slots), slots)
    check = worded(rng, rng.choice(tables.BOT_CHECK), {**slots, "thing": thing, "values": values})
    if rng.random() < 0.6:
        return [check, worded(rng, rng.choice(tables.USER_YES), slots)]
    changed = rng.choice(task.slots)
    slots[changed.name] = _dialogue_slots(rng)[changed.name]
    values = _values(rng, [changed], slots)
    return [check, worded(rng, tables.USER_CHANGE, {**slots, "values": values})]


def _booking(rng: random.Random, task: tables.Task, slots: Slots, *, recap: bool) -> str:
    done = worded(rng, task.done, slots)
    told = ""
    if recap:
        start = worded(rng, tables.BOT_RECAP, slots)
        told = f"{start} {task.thing.format_map(slots)} {_values(rng, list(task.slots), slots)}."
    extra = sentence(worded(rng, task.extra, slots))
    end = worded(rng, rng.choice(tables.BOT_END), slots)
    return _join(
        [sentence(worded(rng, tables.BOT_DONE, {**slots, "done": done})), told, extra, end]
    )


def _dialogue_passage(rng: random.Random) -> str:
    """Notes on two bookings, told afterwards."""
    chosen = rng.sample(tables.TASKS, 2)
    return _join([worded(rng, task.note, _dialogue_slots(rng)) for task in chosen])


# ------------------------------------------------------------------------------------- records


@dataclass(frozen=True)
class Table:
    """A small list of records: rows map the names of the fields (and `key`) to values."""

    kind: tables.Kind
    fields: list[tables.Field]
    rows: list[Slots]

    def numeric(self) -> list[tables.Field]:
        return [field for field in self.fields if field.most]


def _table(rng: random.Random) -> Table:
    kind = rng.choice(tables.KINDS)
    ranked = [field for field in kind.fields if field.most]
    first = rng.choice(ranked)
    others = [field for field in kind.fields if field is not first]
    fields = [first, *rng.sample(others, rng.choice((1, 1, 2)))]
    rng.shuffle(fields)
    size = rng.randint(3, 5) if len(fields) < 3 else 3
    rows = [{"key": key} for key in rng.sample(kind.keys, size)]
    for field in fields:
        for row, value in zip(rows, rng.sample(field.values, size), strict=True):
            row[field.name] = str(value)
    return Table(kind, fields, rows)


def _show(rng: random.Random, table: Table) -> str:
    """The list as the user writes it, in one of three layouts."""
    layout = rng.choice(("named", "bars", "dashes"))
    names = [field.name for field in table.fields]
    lines = ["item | " + " | ".join(names)] if layout == "bars" else []
    for row in table.rows:
        key = row["key"].removeprefix("the ")
        if layout == "bars":
            lines.append(" | ".join([key, *(row[name] for name in names)]))
        elif layout == "named":
            lines.append(f"{key}: " + ", ".join(f"{name} {row[name]}" for name in names))
        else:
            lines.append(f"- {key}, " + ", ".join(f"{name} {row[name]}" for name in names))
    return "\n".join(lines)


def _fact(rng: random.Random, field: tables.Field, row: Slots) -> str:
    return worded(rng, field.fact, {"key": row["key"], "v": row[field.name]})


def _aside(rng: random.Random, table: Table, row: Slots) -> str:
    """A fact about some other row."""
    other = rng.choice([each for each in table.rows if each is not row])
    return sentence(worded(rng, tables.CONTRAST, {}) + _fact(rng, rng.choice(table.fields), other))


def _more(rng: random.Random, field: tables.Field, row: Slots) -> str:
    """A further fact about the same row."""
    return sentence(worded(rng, tables.SUPPORT, {}) + _fact(rng, field, row))


def _other(rng: random.Random, table: Table, field: tables.Field) -> tables.Field:
    return rng.choice([each for each in table.fields if each is not field])


def _ask_lookup(rng: random.Random, table: Table) -> tuple[str, str]:
    row = rng.choice(table.rows)
    field, other = rng.sample(table.fields, 2)
    answer = sentence(worded(rng, tables.ANSWER_OPEN, {}) + _fact(rng, field, row))
    rest = _join([_more(rng, other, row), _aside(rng, table, row)])
    return worded(rng, field.ask, row), f"{answer} {rest}"


def _ask_reverse(rng: random.Random, table: Table) -> tuple[str, str]:
    row = rng.choice(table.rows)
    field, other = rng.sample(table.fields, 2)
    wording = f"which {table.kind.one} is [listed|given] with {field.name} {{{field.name}}}"
    answer = worded(rng, "[That is|It is|This must be|We look for] {key}, [since|because] ", row)
    rest = _join([_more(rng, other, row), _aside(rng, table, row)])
    return worded(rng, wording, row), f"{answer}{_fact(rng, field, row)}. {rest}"


def _ask_extreme(rng: random.Random, table: Table) -> tuple[str, str]:
    field = rng.choice(table.numeric())
    ordered = sorted(table.rows, key=lambda row: int(row[field.name]), reverse=True)
    word = field.most
    if rng.random() < 0.5:
        ordered, word = ordered[::-1], field.least
    question = worded(rng, f"which {table.kind.one} is the {word}", {})
    start = worded(rng, f"[The {word} is|It is|We find that the {word} is] {{key}}", ordered[0])
    more = _more(rng, _other(rng, table, field), ordered[0])
    rest = worded(rng, tables.CONTRAST, {}) + _fact(rng, field, rng.choice(ordered[1:]))
    return question, f"{start}: {_fact(rng, field, ordered[0])}. {more} {sentence(rest)}"


def _ask_compare(rng: random.Random, table: Table) -> tuple[str, str]:
    field = rng.choice(table.numeric())
    one, two = rng.sample(table.rows, 2)
    gap = int(one[field.name]) - int(two[field.name])
    slots = {"a": one["key"], "b": two["key"], "f": field.name, "gap": str(abs(gap))}
    asked = "is the [number|value] for {f} [higher|larger|greater] for {a} than for {b}"
    verdict = "[Yes, it is|Yes|Yes, right]" if gap > 0 else "[No, it is not|No|No, it is lower]"
    facts = f"{_fact(rng, field, one)} [and|while|but] {_fact(rng, field, two)}"
    last = "[The difference is|They differ by|The gap is] {gap}."
    answer = worded(rng, f"{verdict}: {facts}. {last}", slots)
    return worded(rng, asked, slots), f"{answer} {_more(rng, _other(rng, table, field), one)}"


def _ask_sort(rng: random.Random, table: Table) -> tuple[str, str]:
    field = rng.choice(table.numeric())
    down = rng.random() < 0.5
    ordered = sorted(table.rows, key=lambda row: int(row[field.name]), reverse=down)
    slots = {"f": field.name, "first": "highest" if down else "lowest"}
    asked = "[can you sort them by {f}|what is the order by {f}], [the |]{first} first"
    start = "[The order by {f} is|Sorted by {f}, we get|With the {first} first it is]"
    parts = _listing([f"{row['key']} with {row[field.name]}" for row in ordered])
    last = worded(rng, "[So|This means that|As you see,] ", {}) + _fact(rng, field, ordered[0])
    return worded(rng, asked, slots), f"{worded(rng, start, slots)} {parts}. {sentence(last)}"


def _ask_count(rng: random.Random, table: Table) -> tuple[str, str]:
    field = rng.choice(table.numeric())
    ordered = sorted(table.rows, key=lambda row: int(row[field.name]))
    cut = rng.randint(0, len(ordered) - 2)
    above = ordered[cut + 1 :]
    slots = {"f": field.name, "cut": ordered[cut][field.name], "n": str(len(above))}
    asked = "how many [lines|entries|rows] [show|list|have] {f} [above|over] {cut}"
    start = "[There are {n}|We count {n}|I find {n}|It is {n} of them]"
    start = start if len(above) > 1 else "[Only one|Just one|One]"
    facts = _listing([_fact(rng, field, row) for row in above[:2]])
    more = _more(rng, _other(rng, table, field), above[0])
    rest = sentence(worded(rng, tables.CONTRAST, {}) + _fact(rng, field, ordered[0]))
    return worded(rng, asked, slots), f"{worded(rng, start, slots)}: {facts}. {more} {rest}"


_QUESTIONS = (_ask_lookup, _ask_reverse, _ask_extreme, _ask_compare, _ask_sort, _ask_count)


def _records(rng: random.Random) -> list[str]:
    """A list and a question about it."""
    table = _table(rng)
    question, answer = rng.choice(_QUESTIONS)(rng, table)
    title = worded(rng, table.kind.title, {})
    intro = worded(rng, rng.choice(tables.LIST_INTRO), {"title": title})
    ask = sentence(worded(rng, tables.LIST_ASK, {"question": question}))
    return [f"{intro}\n{_show(rng, table)}\n{ask}", sentence(answer)]


def _records_passage(rng: random.Random) -> str:
    """The facts of a list in full sentences, and what stands out."""
    table = _table(rng)
    facts = [
        _join([sentence(_fact(rng, table.fields[0], row)), _more(rng, table.fields[1], row)])
        for row in table.rows
    ]
    _, best = _ask_extreme(rng, table)
    return _join([*facts, best])


# ---------------------------------------------------------------------------------------- code


def _code_slots(rng: random.Random, plan: tables.CodePlan) -> Slots:
    """Names and constants of one function."""
    mark = rng.choice(list(tables.MARKS))
    word, word2 = rng.sample(tables.CODE_WORDS, 2)
    unit, unit2 = rng.sample(tables.UNITS, 2)
    numbers = [str(rng.randint(1, 40)) for _ in range(rng.randint(3, 5))]
    slots = {
        "f": rng.choice(plan.names),
        "seq": rng.choice(tables.SEQ_NAMES),
        "text": rng.choice(tables.TEXT_NAMES),
        "one": rng.choice(tables.ONE_NAMES),
        "acc": rng.choice(tables.ACC_NAMES),
        "i": rng.choice(tables.LOOP_NAMES),
        "k": str(rng.randint(2, 12)),
        "m": str(rng.randint(13, 60)),
        "mark": mark,
        "sign": tables.MARKS[mark],
        "word": word,
        "word2": word2,
        "unit": unit,
        "unit2": unit2,
        "list": "[" + ", ".join(numbers) + "]",
    }
    slots["args"] = plan.args.format_map(slots)
    slots["call"] = plan.call.format_map(slots)
    slots["remark"] = plan.remark.format_map(slots)
    return slots


def _function(rng: random.Random, plan: tables.CodePlan, slots: Slots) -> str:
    """The text of the function, at times with a line that calls it."""
    does = sentence(worded(rng, plan.does, slots))
    body = [line.format_map(slots) for line in plan.body]
    lines = [f"def {slots['f']}({slots['args']}):", f'    """{does}"""']
    lines += [f"    {line}" for line in body]
    usage = rng.choice(("", "", "\nresult = {f}({call})", "\nprint({f}({call}))"))
    return "\n".join([*lines, *usage.format_map(slots).splitlines()])


def _code(rng: random.Random) -> list[str]:
    """A request for a function and the function."""
    plan = rng.choice(tables.CODE_PLANS)
    slots = _code_slots(rng, plan)
    does = {**slots, "does": worded(rng, plan.does, slots)}
    ask = worded(rng, rng.choice(tables.CODE_ASK) + tables.CODE_HINT, does)
    start = worded(rng, tables.CODE_OPEN, {**slots, "does": worded(rng, plan.does, slots)})
    end = worded(rng, rng.choice(tables.CODE_END), slots)
    code = f"```python\n{_function(rng, plan, slots)}\n```"
    return [ask, _join([start, code, sentence(end) if end else ""], "\n")]


def _code_passage(rng: random.Random) -> str:
    """A piece of a module: two functions, each under a comment."""
    parts = []
    for plan in rng.sample(tables.CODE_PLANS, 2):
        slots = _code_slots(rng, plan)
        parts.append(f"# {sentence(slots['remark'])}\n{_function(rng, plan, slots)}")
    return "\n\n\n".join(parts)


# ---------------------------------------------------------------------------------------- math


def _compute(expression: str, values: dict[str, int]) -> tuple[str, int]:
    """Evaluate "a op b" over `values`; gives the equation and its result, 0 if it is no integer."""
    left, sign, right = expression.split()
    a, b = (values[side] if side in values else int(side) for side in (left, right))
    if sign == "/":
        result = a // b if a % b == 0 else 0
    else:
        result = {"+": a + b, "-": a - b, "*": a * b}[sign]
    return f"{a} {sign} {b} = {result}", result


def _solve(rng: random.Random, plan: tables.MathPlan) -> tuple[dict[str, int], list[str]]:
    """Numbers for which every step of the plan is a small positive integer, and its equations."""
    for _ in range(MAX_DRAWS):
        values = {name: rng.randint(low, high) for name, (low, high) in plan.ranges.items()}
        equations: list[str] = []
        for name, expression, _wording in plan.steps:
            equation, values[name] = _compute(expression, values)
            if not 2 <= values[name] <= MAX_NUMBER:
                break
            equations.append(equation)
        else:
            return values, equations
    raise RuntimeError(f"no numbers fit the problem {plan.story!r}")


def _math_slots(rng: random.Random, values: dict[str, int]) -> Slots:
    who, pal, third = rng.sample(tables.PEOPLE, 3)
    things, others = rng.sample(tables.THINGS, 2)
    they = "she" if who in tables.GIRLS else "he"
    return {
        "who": who,
        "pal": pal,
        "third": third,
        "they": they,
        "They": they.capitalize(),
        "things": things,
        "others": others,
        "fruits": rng.choice(tables.FRUITS),
        "bakes": rng.choice(tables.BAKES),
        "plants": rng.choice(tables.PLANTS),
        "prize": rng.choice(tables.PRIZES),
        "shop": rng.choice(tables.SHOPS),
        "city": rng.choice(tables.CITIES),
        "day": rng.choice(tables.DAYS),
        **{name: str(value) for name, value in values.items()},
    }


def _problem(rng: random.Random) -> tuple[str, str, list[str], str]:
    """A story, its question, the sentences of the solution and the result."""
    plan = rng.choice(tables.MATH_PLANS)
    values, equations = _solve(rng, plan)
    slots = _math_slots(rng, values)
    steps = [
        worded(rng, wording, {**slots, "eq": equation})
        for (_, _, wording), equation in zip(plan.steps, equations, strict=True)
    ]
    story, question = worded(rng, plan.story, slots), worded(rng, plan.question, slots)
    return story, question, steps, equations[-1].split()[-1]


def _linked(rng: random.Random, steps: list[str]) -> list[str]:
    """Put "First," and "Then" before the steps."""
    first, then, last = tables.MATH_LINKS
    links = [first, *[then] * (len(steps) - 2), last]
    return [sentence(worded(rng, link, {}) + step) for link, step in zip(links, steps, strict=True)]


def _math(rng: random.Random) -> list[str]:
    """A word problem and its solution: numbered, linked or plain steps, then `#### result`."""
    story, question, steps, result = _problem(rng)
    style = rng.choice(("numbered", "linked", "plain"))
    lines = [sentence(step) for step in steps]
    if style == "numbered":
        lines = [f"Step {i}: {line}" for i, line in enumerate(lines, 1)]
    elif style == "linked":
        lines = _linked(rng, steps)
    lines.insert(0, worded(rng, rng.choice(tables.MATH_OPEN), {}))
    lines.append(worded(rng, rng.choice(tables.MATH_CLOSE), {"answer": result}))
    body = _join(lines, "\n" if style == "numbered" else rng.choice((" ", "\n")))
    task = worded(rng, tables.MATH_TASK, {})
    return [f"{task}{story} {question}", f"{body}\n#### {result}"]


def _math_passage(rng: random.Random) -> str:
    """A story with its numbers worked out, told without a question."""
    story, _, steps, _ = _problem(rng)
    return _join([story, *_linked(rng, steps)])


_CHATS: dict[str, Callable[[random.Random], list[str]]] = {
    "dialogue": _dialogue,
    "records": _records,
    "code": _code,
    "math": _math,
}
_PASSAGES: dict[str, Callable[[random.Random], str]] = {
    "dialogue": _dialogue_passage,
    "records": _records_passage,
    "code": _code_passage,
    "math": _math_passage,
}
