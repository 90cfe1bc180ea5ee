"""Peak memory: predicted against measured at a vocabulary of 150,000, and what does not fit is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from redraft.check.plan import Planned
from redraft.config import TrainConfig
from redraft.core.errors import UserError
from redraft.models.target import Target
from redraft.training import memory
from tests.conftest import fresh_draft, tiny_model

MEASURE = """
import json, sys
import torch
from redraft.models.batching import collate
from redraft.config import TrainConfig
from redraft.drafts.new import new_draft
from redraft.core.records import Answer
from redraft.models.target import Target
from redraft.training.teacher_batch import read_teacher_batch, rollout_loss
from redraft.training.memory import current_memory, peak_memory, predict_peak, restart_peak
from tests.conftest import tiny_model

family, dtype, kind, columns, loss = sys.argv[1:]
V, rows, prompt, length = 150_000, 4, 30, 120
torch.set_num_threads(1)
more = {"query_pre_attn_scalar": 16} if family == "gemma2" else {}
more |= {"logits_scaling": 8.0} if family == "granite" else {}
model = tiny_model(family, getattr(torch, dtype), vocab=V, hidden_size=256, **more)
target = Target(model, None, (family,))
answers = [
    Answer(str(i), tuple(range(5, 5 + prompt)), tuple(range(9, 9 + length)), length, "length")
    for i in range(rows)
]
size = int(columns) or None
draft = new_draft(target, answers, kind=kind, draft_vocab_size=size).float().requires_grad_(True)
draft.reinitialise(0)
config = TrainConfig(rollout=4, loss=loss)
optimizer = torch.optim.AdamW(draft.parameters())

class Run:
    parameters = list(draft.parameters())

Run.draft, Run.config = draft, config
restart_peak(target.device)
before = current_memory(target.device)
predicted = predict_peak(target, [Run], rows * (prompt + length), prompt + length, prompt - 1)
for _ in range(2):
    teacher_batch = read_teacher_batch(target, collate(answers, target.device), draft.aux_layers)
    rollout_loss(teacher_batch, draft, config)[0].backward()
    optimizer.step()
    optimizer.zero_grad()
print(json.dumps([before, predicted, peak_memory(target.device)]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    "case",
    [
        ("llama", "float32", "eagle3", "8000", "kl"),
        ("granite", "bfloat16", "eagle3", "32000", "tv"),
    ],
    ids=lambda case: f"{case[0]}-{case[4]}",
)
def test_the_predicted_peak_is_the_measured_one_within_a_quarter(case: tuple[str, ...]) -> None:
    done: Any = subprocess.run(
        [sys.executable, "-c", MEASURE, *case], capture_output=True, text=True, check=True
    )
    before, predicted, measured = json.loads(done.stdout)
    print(case, f"before {before:.0f}, predicted {predicted:.0f}, measured {measured:.0f} MB")
    assert 0.75 < predicted / measured < 1.25
    # All logits of all steps at once would be far more.
    assert measured - before < 4 * 4 * 120 * 150_000 * 4 / 1e6


READ = """
import json
import torch
from redraft.models.target import Target
from redraft.training.memory import current_memory, peak_memory, restart_peak
from tests.conftest import tiny_model
torch.set_num_threads(1)
target = Target(tiny_model("llama", torch.bfloat16, vocab=150_000), None, ("llama",))
restart_peak(target.device)
before = current_memory(target.device)
with torch.no_grad():
    target.read(torch.zeros(32, 9, dtype=torch.long), (), keep=1)
print(json.dumps(peak_memory(target.device) - before))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_last_logits_of_many_rows_cost_no_copies_of_the_head() -> None:
    done: Any = subprocess.run(
        [sys.executable, "-c", READ], capture_output=True, text=True, check=True
    )
    head = 150_000 * 64 * 2 / 1e6
    assert float(json.loads(done.stdout)) < 5 * head  # 32 copies before


def test_what_is_there_anyway_is_not_counted_for_each_token(target: Target) -> None:
    """A draft's table of positions grows with the longest row that it saw, and stays."""
    draft = fresh_draft(target).requires_grad_(True)
    run = Planned(draft, TrainConfig(rollout=3), list(draft.parameters()))

    def growth(tokens: int) -> float:
        return memory.predict_growth(target, [run], tokens, tokens)

    before = growth(10_000)
    draft.rotary(10_000, torch.zeros(1))
    assert growth(10_000) == before
    activations = growth(20_000) - growth(10_000)
    per_token = sum(memory._saved_per_token(draft, 3))
    assert per_token > 3 * 10 * draft.hidden_size, "of each step several states"
    assert activations * 1e6 > 10_000 * per_token


def test_a_run_that_does_not_fit_is_refused_with_the_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = Target(tiny_model("llama"), None, ("llama",))
    monkeypatch.setattr(memory, "current_memory", lambda _: 1000.0)
    monkeypatch.setattr(memory, "free_memory", lambda _: 2000.0)
    memory.check_memory(target, 2400.0, 4096, 512)
    with pytest.raises(
        UserError, match=r"about 2,600 MB.*3,000 MB can be had.*batch_tokens \(4,096"
    ):
        memory.check_memory(target, 2600.0, 4096, 512)
    with pytest.raises(UserError, match=r"a batch of its own with 20,000 tokens"):
        memory.check_memory(target, 9000.0, 4096, 20_000)


def test_grown_memory_is_given_back_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """When it has grown by so much, and not at every step."""
    calls: list[int] = []
    used, clock = [1000.0], [0.0]
    monkeypatch.setattr(memory, "_malloc_trim", lambda: calls.append)
    monkeypatch.setattr(memory, "current_memory", lambda _: used[0])
    monkeypatch.setattr(memory.time, "monotonic", lambda: clock[0])
    returned = memory.Returned(torch.device("cpu"))
    for seconds, megabytes, expected in (
        (9.0, 1200.0, 0),  # not grown
        (9.5, 1300.0, 1),
        (10.0, 1600.0, 1),  # too soon
        (15.0, 1600.0, 2),
    ):
        clock[0], used[0] = seconds, megabytes
        returned.after_step()
        assert len(calls) == expected
