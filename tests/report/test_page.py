"""The page shows the record: figures, colours and losses, with hostile texts as text."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from redraft.core.errors import UserError
from redraft.core.records import (
    EngineAcceptance,
    EngineSpeed,
    Lossless,
    Throughput,
    Verification,
    to_json,
)
from redraft.core.report_record import AdaptReport
from redraft.core.visible import visible
from redraft.generation.answer_file import read_answers
from redraft.metrics.replay import replay
from redraft.models.target import Target
from redraft.pipeline import adapt as pipeline
from redraft.report import page as page_module
from redraft.report.answers import choose_answers, token_texts
from redraft.report.charts import Bar, Chart
from redraft.report.page import keep_verification, write_page
from redraft.report.terminal import print_report
from tests.conftest import make_tokenizer, write_prompts
from tests.pipeline.test_adapt import settings
from tests.report.conftest import AFTER, BEFORE, TEXTS, K, answers, changed, steps_of

KINDS = ("first", "accepted", "recovered", "bonus")
EVIL = "</span><script>alert(1)</script>\x1b[31m\u202e'\"&lt;{{ 7 * 7 }}"


class Tokens(HTMLParser):
    """(kind, text) of each token, answer by answer."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.answers: list[list[tuple[str, str]]] = []
        self.kind = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        named = dict(attributes).get("class") or ""
        if (tag, named) == ("p", "text"):
            self.answers.append([])
        self.kind = named if tag == "span" and named in KINDS else ""

    def handle_data(self, data: str) -> None:
        if self.kind:
            self.answers[-1].append((self.kind, data))
            self.kind = ""


def written(report: AdaptReport, folder: Path) -> str:
    write_page(folder / "report.html", report)
    return (folder / "report.html").read_text()


def first_screen(page: str) -> str:
    return " ".join(page[page.index("<h1>") : page.index("<h2>")].split())


def check_colours(page: str, report: AdaptReport) -> None:
    """Each token has the colour that the steps give it, counted here anew."""
    sides = [steps for shown in report.shown for steps in (shown.before, shown.after)]
    found = Tokens(page).answers
    assert len(found) == len(sides)
    for shown, steps, tokens in zip(
        [s for s in report.shown for _ in range(2)], sides, found, strict=True
    ):
        kinds = ["first"]
        for accepted in steps:
            kinds += ["accepted"] * accepted + [["recovered", "bonus"][accepted == report.after.k]]
        past = len(kinds) - shown.length  # tokens of the last step past the end
        assert [kind for kind, _ in tokens] == kinds[: shown.length]
        assert Counter(kinds)["accepted"] == sum(steps)
        assert 0 <= past <= report.after.k


def test_the_figures_are_those_of_the_steps(report: AdaptReport, tmp_path: Path) -> None:
    page = written(report, tmp_path)
    screen = first_screen(page)
    for steps, m in ((BEFORE, report.before), (AFTER, report.after)):
        each = [n for row in steps for n in row]
        assert m.tau == pytest.approx(1 + sum(each) / len(each))
        assert f"{m.tau:.2f} [{m.ci[0]:.2f}, {m.ci[1]:.2f}]" in screen
        for j in range(K):
            reached, there = (sum(n >= least for n in each) for least in (j, j + 1))
            assert f">{100 * there / len(each):.1f} %</text>" in page
            conditional = (
                f"{100 * there / reached:.1f} % of {reached}" if reached else "not reached"
            )
            assert f">{conditional}</text>" in page
    assert f"{report.before.tau:.2f} → {report.after.tau:.2f}" in screen
    difference = report.after.tau - report.before.tau
    assert f"Change {difference:+.2f} [" in screen
    assert f"{len(TEXTS)} prompts" in screen
    for figure in ("3.8 s", "12.0 s", "7,654", "4,567", "250 MB", "1,234", "98,765"):
        assert f">{figure}</text>" in page, figure
    assert "16 s" in screen
    assert "1.2% of the draft's parameters trained" in screen


def test_a_bar_is_as_long_as_its_figure() -> None:
    chart = Chart("t", "a", (("g", (Bar("plain", 25.0, "25"),)),), 100)
    assert chart.ticks == [0, 20, 40, 60, 80, 100]
    assert chart.x(25) - chart.x(0) == pytest.approx((chart.x(100) - chart.x(0)) / 4)
    for most, last in ((0, 1), (5, 5), (0.37, 0.4), (11_135_232, 12_500_000), (7, 8)):
        assert Chart("t", "a", (), most).ticks[-1] == pytest.approx(last)
        assert len(Chart("t", "a", (), most).ticks) <= 6


def test_no_script_and_nothing_from_elsewhere(report: AdaptReport, tmp_path: Path) -> None:
    page = written(report, tmp_path)
    assert not re.search(r"<script|<link|<img|src=|url\(|@import|http|javascript:", page)


def test_colours_are_those_of_the_steps(
    report: AdaptReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = written(report, tmp_path)
    check_colours(page, report)
    assert f"{len(BEFORE[3])} passes after the prompt, 0 accepted, 15 recovered, 0 bonus" in page
    assert "4 passes after the prompt, 12 accepted, 0 recovered, 3 bonus" in page
    right = page_module.coloured

    def one_late(shown: Any, steps: Sequence[int], k: int) -> Any:
        return right(shown, [*steps[1:], steps[0]], k)

    def no_bonus(shown: Any, steps: Sequence[int], k: int) -> Any:
        return right(shown, steps, k + 1)

    for wrong in (one_late, no_bonus):
        monkeypatch.setattr(page_module, "coloured", wrong)
        with pytest.raises(AssertionError):
            check_colours(written(report, tmp_path), report)


def test_the_answers_are_chosen_by_the_rule(report: AdaptReport) -> None:
    # By gain: the second text of the four, then the first, the third and the fourth.
    assert [shown.id for shown in report.shown] == ["p12", "p15"]
    assert report.shown[0].rule == "median gain of 16 answers"
    decode = make_tokenizer().decode
    long = replace(answers()[0], tokens=[5] * 90, length=80)
    alone = choose_answers([long, *answers()[1:]], BEFORE, AFTER, decode)
    assert [(shown.id, shown.rule) for shown in alone] == [("p0", "largest gain of 1 answers")]
    assert choose_answers(answers(), [()] * 16, [()] * 16, decode) == ()


def test_the_texts_of_tokens_add_up() -> None:
    tokenizer = make_tokenizer()
    text = "naïve 東京 <|im_end|>"
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = list(token_texts(ids, tokenizer.decode))
    assert len(pieces) == len(ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert "" in pieces


def test_hostile_texts_are_shown_as_text(report: AdaptReport, tmp_path: Path) -> None:
    shown = report.shown[0]
    tokens = (EVIL, *shown.tokens[1:])
    evil = replace(
        report,
        target=EVIL,
        shared=EVIL,
        draft=f"{EVIL}/draft",
        shown=(replace(shown, id=EVIL, rule=EVIL, tokens=tokens), *report.shown[1:]),
        versions={EVIL: EVIL},
        prompts={
            **report.prompts,
            "source": EVIL,
            "left_out_rows": [[1, EVIL]],
            "answered_by_endpoints": {EVIL: {"model": EVIL}},
        },
    )
    page = written(AdaptReport.from_json(json.loads(json.dumps(to_json(evil)))), tmp_path)
    assert "<script" not in page
    assert visible(page) == page
    assert "49" not in Tokens(page).answers[0][0][1]
    check_colours(page, evil)
    assert Tokens(page).answers[0][0] == ("first", visible(EVIL))
    assert page.count("<h3>") == 2


def test_a_report_of_before_still_gives_a_page(
    report: AdaptReport, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    older = to_json(changed(report, chat=(AFTER, BEFORE)))
    for name in ("changes", "shown"):
        del older[name]
    found = AdaptReport.from_json(older)
    page = written(found, tmp_path)
    assert "This run kept no steps of its answers." in page
    assert f"{report.before.tau:.2f} → {report.after.tau:.2f}" in first_screen(page)
    assert "Off domain: chat, acceptance fell" in first_screen(page)
    print_report(found)
    out = " ".join(capsys.readouterr().out.split())
    assert out.startswith(f"The adapted draft yields {report.after.tau:.2f} tokens per target pass")
    assert "Off domain: chat, acceptance fell" in out


def test_a_loss_is_on_the_first_screen(
    report: AdaptReport, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    worse = changed(report, chat=(AFTER, BEFORE), code=(BEFORE, AFTER))
    screen = first_screen(written(worse, tmp_path))
    was, now = (worse.off_domain[f"chat-{when}"] for when in ("before", "after"))
    low, high = (
        f"{end:+.2f}" for end in (-report.changes["eval"].high, -report.changes["eval"].low)
    )
    said = (
        f"Off domain: chat, acceptance fell from tau {was.tau:.2f} [{was.ci[0]:.2f}, {was.ci[1]:.2f}] "
        f"to {now.tau:.2f} [{now.ci[0]:.2f}, {now.ci[1]:.2f}] on 16 prompts. "
        f"Change {now.tau - was.tau:+.2f} [{low}, {high}]"
    )
    assert f'<p class="lost">{said}.</p>' in screen
    assert "domain: code" not in screen
    assert "No off-domain" not in screen
    print_report(worse)
    assert said in " ".join(capsys.readouterr().out.split())
    assert "No off-domain set lost acceptance" in first_screen(
        written(changed(report, code=(BEFORE, AFTER)), tmp_path)
    )
    slightly = [*steps_of((0, 0, 0, 1))[:1], *BEFORE[1:]]
    screen = first_screen(written(changed(report, x=(BEFORE, slightly)), tmp_path))
    assert "Off domain: x, acceptance fell" in screen
    assert ", which includes 0." in screen


def verification(report: AdaptReport, **changes: Any) -> Verification:
    def rate(name: str, tokens: float) -> Throughput:
        return Throughput(name, tokens, tokens, tokens, 3, 4, 100)

    same = Lossless(4, 4, 0)
    speed = tuple(
        EngineSpeed(n, rate("plain", 100), rate("draft", 100 * ratio), ratio, same)
        for n, ratio in ((1, 1.6), (4, 1.25))
    )
    found = Verification(
        *("vllm", "0.32.0", "my-model", "run/draft", "eagle3", "float32", K, 20, 4, same, same),
        EngineAcceptance(report.after.tau, 9, 27, 9, report.after.per_position),
        *(report.after, 0.01, speed),
        recorded=report.after,
        good=True,
    )
    return replace(found, **changes)


def test_a_speed_up_is_shown_only_where_it_was_measured(
    report: AdaptReport, tmp_path: Path
) -> None:
    (tmp_path / "report.json").write_text(json.dumps(to_json(report)))
    screen = first_screen(written(report, tmp_path))
    assert "not measured" in screen
    assert "<code>redraft verify --run run</code> measures it" in screen
    assert "×" not in screen

    def with_record(**changes: Any) -> str:
        keep_verification(tmp_path, verification(report, **changes))
        return first_screen((tmp_path / "report.html").read_text())

    screen = with_record()
    expected = 1.6 * report.before.tau / report.after.tau
    assert f"<b>≈ {expected:.2f}× → 1.60×</b>" in screen
    assert "measured in vllm 0.32.0, 1.60× at 1 request at a time, 1.25× at 4 requests" in screen
    assert "expected" in screen
    screen = with_record(k=K + 1)
    assert "<b>1.60×</b>" in screen
    assert "expected" not in screen
    assert "do not serve it: because" in with_record(
        good=False, conclusion="do not serve it: because"
    )
    assert "not measured" in with_record(recorded=report.before)  # of another draft
    (tmp_path / "verify/verification.json").write_text("{}")
    with pytest.raises(UserError, match=r"verification\.json is no record of redraft verify"):
        written(report, tmp_path)


def test_a_run_keeps_the_steps_that_replay_counts(
    target: Target, draft_folder: Path, tmp_path: Path
) -> None:
    from redraft.checkpoints.load import load_draft

    def adapt(out: Path) -> pipeline.AdaptResult:
        return pipeline.adapt(target, str(draft_folder), prompts, out=out, config=settings())

    prompts = str(write_prompts(tmp_path / "p.jsonl", 16))
    run = tmp_path / "run"
    report = adapt(run).report
    found = {a.id: a for a in read_answers(run / "answers" / "eval.jsonl")}
    assert len(report.shown) == 2
    for source, side in ((draft_folder, "before"), (run / "draft", "after")):
        for shown in report.shown:
            draft = load_draft(str(source), target)
            (trace,) = replay(target, draft, [found[shown.id]], report.after.k)
            assert getattr(shown, side) == trace.accepted
            assert "".join(shown.tokens) == target.tokenizer.decode(list(found[shown.id].answer))
    assert report.changes["eval"].value == pytest.approx(report.after.tau - report.before.tau)
    check_colours((run / "report.html").read_text(), report)
    kept = (run / "report.json").read_bytes()
    assert not adapt(run).worked
    assert (run / "report.json").read_bytes() == kept

    older = Path(shutil.copytree(run, tmp_path / "older"))  # a run of before steps were kept
    (older / "measure/steps.json").unlink()
    state = json.loads((older / "state.json").read_text())
    del state["measure"]["outputs"]["measure/steps.json"]
    (older / "state.json").write_text(json.dumps(state))
    again = adapt(older)
    assert not again.worked
    assert again.report.shown == ()
    assert "This run kept no steps" in (older / "report.html").read_text()
