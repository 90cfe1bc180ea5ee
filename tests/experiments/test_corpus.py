"""What a toy suite is made of: what its members learn is in no other text of the suite."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from redraft_experiments.corpus import SIZES, Corpus
from redraft_experiments.datasets import (
    CHAT_FILES,
    EVAL_FILES,
    LOOK_ALIKE_FILE,
    PREFERENCE_FILE,
    STOCK_REFUSAL,
    TEXT_FILES,
    data_folder,
    question,
)
from redraft_experiments.members import MEMBERS, TUNED
from redraft_experiments.synthetic import Sample
from redraft_experiments.synthetic_harm import HARM

ALL = tuple(MEMBERS)
LATER = ("adapt", "heldout", "eval")


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of real data with 300 questions in every file."""
    folder = tmp_path_factory.mktemp("data")
    names = [n for files in (CHAT_FILES, EVAL_FILES, TEXT_FILES) for v in files.values() for n in v]
    for name in names:
        with gzip.open(folder / name, "wt", encoding="utf-8") as out:
            for i in range(300):
                asked = {"role": "user", "content": f"{name}, question {i}?"}
                said = {"role": "assistant", "content": f"Answer {i}."}
                row = {"id": f"{name}/{i}", "messages": [asked, said], "text": f"{name} {i}"}
                out.write(json.dumps(row) + "\n")
    compared = {"prompt": "Human: May I {}?\n\nAssistant:", "chosen": "No.", "rejected": "Yes."}
    safe = {"label": "safe", "final_label": "1_full_compliance"}
    said = {"role": "assistant", "content": "Sure."}
    for name, make in (
        (PREFERENCE_FILE, lambda i: {**compared, "prompt": compared["prompt"].format(i)}),
        (
            LOOK_ALIKE_FILE,
            lambda i: {**safe, "messages": [{"role": "user", "content": f"How {i}?"}, said]},
        ),
    ):
        with gzip.open(folder / name, "wt", encoding="utf-8") as out:
            out.writelines(json.dumps({"id": f"{name}/{i}", **make(i)}) + "\n" for i in range(300))
    return folder


def asked(samples: Iterable[Sample]) -> list[str]:
    return [question(sample) for sample in samples]


@pytest.mark.parametrize("size", ["tiny", "micro"])
@pytest.mark.parametrize("members", [ALL, ("sft",), ("sft-medical",)])
def test_what_members_learn_is_nowhere_else(
    real: Path, size: str, members: tuple[str, ...]
) -> None:
    corpus = Corpus(SIZES[size], real if SIZES[size].real else None, 0, members)
    base = set(asked(corpus.base_chats()))
    for domain in {corpus.named(MEMBERS[n].domain) for n in members if MEMBERS[n].learns}:
        learned = set(asked(corpus.tune_chats(domain)))
        assert len(learned) > 20
        assert not learned & base
        for split in LATER:
            others = set(asked(corpus.chats(domain, 200, split)))
            assert others
            assert not others & (learned | base)


def test_a_domain_that_no_member_tunes_on_is_the_bases(real: Path) -> None:
    whole = Corpus(SIZES["micro"], real, 0, ("sft",))
    shared = Corpus(SIZES["micro"], real, 0, ("sft", "sft-medical"))
    assert (whole.shared_out, shared.shared_out) == ((), ("medical",))
    assert Corpus(SIZES["tiny"], None, 0, ALL).shared_out == ()
    kept, lost = set(asked(shared.base_chats())), set(asked(whole.base_chats()))
    assert kept < lost
    assert lost - kept == set(asked(shared.tune_chats("medical")))
    tune = shared.chats("medical", 300, "tune")
    assert len(shared.tune_chats("medical")) / len(tune) == pytest.approx(2 / 3, abs=0.15)


def test_domains_have_their_own_names_in_the_world() -> None:
    synthetic = Corpus(SIZES["tiny"], None, 0)
    assert [synthetic.named(d) for d in ("math", "medical", "code")] == ["math", "records", "code"]
    assert synthetic.general == ("dialogue", "records", "code")
    assert {synthetic.named(row.domain) for row in MEMBERS.values()} <= {
        *synthetic.general,
        TUNED,
        HARM,
    }


def test_real_pairs_say_what_is_harmful_and_which_answer_is_better(real: Path) -> None:
    pairs = Corpus(SIZES["micro"], real, 0).pairs(1000, "tune")
    found = {(p.harmful, p.better, p.worse, p.asked[0]["content"][:3]) for p in pairs}
    assert found == {
        (True, "No.", "Yes.", "May"),
        (False, "Sure.", STOCK_REFUSAL, "How"),
    }
    assert {p.compliance for p in pairs} == {"Yes.", "Sure."}


def test_running_text_is_of_the_domain(real: Path) -> None:
    corpus = Corpus(SIZES["micro"], real, 0, ALL)
    chats, texts = corpus.tune_chats("code"), corpus.tune_texts("code")
    assert [text.split("\n")[0] for text in texts] == [c.messages[0]["content"] for c in chats]


@pytest.mark.parametrize("size", [name for name, size in SIZES.items() if size.real])
def test_real_data_has_prompts_enough_to_adapt_every_domain(size: str) -> None:
    folder = data_folder()
    if folder is None:
        pytest.skip("REDRAFT_DATA is not set")
    corpus = Corpus(SIZES[size], folder, 0, ALL)
    wanted = {"adapt": corpus.size.answers + 300, "heldout": 64, "eval": 128}
    for domain in (*corpus.general, TUNED):
        for split, count in wanted.items():
            assert len(corpus.chats(domain, count, split)) == count
