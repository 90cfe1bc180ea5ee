"""A target whose layers are read from features: the same readings, the same training, nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    OPTConfig,
    Qwen3MoeConfig,
)

from redraft.checkpoints.load import load_draft
from redraft.config import TrainConfig
from redraft.core.errors import UserError
from redraft.core.records import Answer
from redraft.features import stored_target as stored_module
from redraft.features.extract import Plan, write_features
from redraft.features.layouts import open_features
from redraft.features.rows import FeatureRows
from redraft.features.stored_target import StoredTarget, load_stored_target
from redraft.metrics.replay import replay
from redraft.models.batching import collate
from redraft.models.loading import load_target
from redraft.models.target import Target
from redraft.training.teacher_batch import read_teacher_batch
from redraft.training.train import train
from tests.conftest import FAMILIES, SHAPE, fresh_draft, make_tokenizer, save_target

AUX_LAYERS = (2, 4, 5)
V = len(make_tokenizer())
OTHERS: dict[str, Any] = {  # what they do after their layers, and what they call them, differs
    "gemma2": Gemma2Config(vocab_size=V, head_dim=8, final_logit_softcapping=5.0, **SHAPE),
    "granite": GraniteConfig(vocab_size=V, logits_scaling=3.0, embedding_multiplier=2.0, **SHAPE),
    "cohere": CohereConfig(vocab_size=V, logit_scale=0.3, **SHAPE),
    "qwen3_moe": Qwen3MoeConfig(
        vocab_size=V, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, **SHAPE
    ),
    "gpt2": GPT2Config(vocab_size=V, n_embd=32, n_layer=8, n_head=4),
    "gpt_neox": GPTNeoXConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=8,
        num_attention_heads=4,
    ),
    "opt": OPTConfig(
        vocab_size=V,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=8,
        num_attention_heads=4,
        word_embed_proj_dim=32,
    ),
}
CONFIG = TrainConfig(
    method="scratch",
    lr=1e-2,
    epochs=3,
    batch_tokens=16,  # so that each row is a batch of its own, stored and streamed
    rollout=3,
    evaluations=3,
    precision="fp32",
)


def written(
    target: Target,
    answers: list[Answer],
    out: Path,
    layout: str = "redraft",
    batch_tokens: int = 16,
) -> Path:
    write_features(target, answers, AUX_LAYERS, Plan(out, layout, batch_tokens=batch_tokens))
    return out


@pytest.fixture(scope="module")
def store(target: Target, answers: list[Answer], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The answers without what was kept past their ends, which is what training reads, bit for bit;
    and some with it, to hold out."""
    cut = [dataclasses.replace(answer, tokens=answer.answer) for answer in answers]
    return written(target, [*cut, *answers[:4]], tmp_path_factory.mktemp("features") / "store")


@pytest.fixture(scope="module")
def beside(target_folder: Path, store: Path) -> StoredTarget:
    return load_stored_target(str(target_folder), [open_features(store)])


# -- the same readings -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_every_family_reads_as_with_its_layers(family: str, tmp_path: Path) -> None:
    config = OTHERS[family] if family in OTHERS else FAMILIES[family](V)
    folder = save_target(tmp_path / "target", config)
    target = load_target(str(folder))
    rows = [Answer("a", (5, 9, 40), (41, 42, 7), 3, "length"), Answer("b", (9, 8), (7,), 1, "stop")]
    write_features(target, rows, AUX_LAYERS, Plan(tmp_path / "store", batch_tokens=1))
    beside = load_stored_target(str(folder), [open_features(tmp_path / "store")])
    kept, whole = (sum(p.numel() for p in t.model.parameters()) for t in (beside, target))
    assert kept < whole
    assert (beside.num_layers, beside.vocab_size) == (8, target.vocab_size)
    for row in rows:
        tokens = torch.tensor([[*row.prompt, *row.tokens]])
        aux_layers = (*AUX_LAYERS, target.num_layers)
        for keep in (0, 2):
            own, stored = (t.read(tokens, aux_layers, keep=keep) for t in (target, beside))
            assert torch.equal(stored.logits_BTV, own.logits_BTV)
            assert torch.equal(stored.features_BTF, own.features_BTF)


def test_a_bfloat16_target_reads_the_same(
    target_folder: Path, answers: list[Answer], tmp_path: Path
) -> None:
    target = load_target(str(target_folder), dtype="bfloat16")
    rows = [open_features(written(target, answers, tmp_path / "s"))]
    beside = load_stored_target(str(target_folder), rows, dtype="bfloat16")
    tokens = torch.tensor([[*answers[3].prompt, *answers[3].tokens]])
    own, stored = (t.read(tokens, (2, 8)) for t in (target, beside))
    assert torch.equal(stored.logits_BTV, own.logits_BTV)
    assert torch.equal(stored.features_BTF, own.features_BTF)
    with pytest.raises(UserError, match=r"dtype torch.bfloat16, expected torch.float32.*--dtype"):
        load_stored_target(str(target_folder), rows)


def test_a_padded_lesson_is_the_same_up_to_rounding(
    target: Target, beside: StoredTarget, answers: list[Answer]
) -> None:
    batch = collate(answers[:5], target.device)
    own, stored = (read_teacher_batch(t, batch, (2, 8)) for t in (target, beside))
    assert torch.allclose(stored.features_BTF, own.features_BTF, atol=1e-5)
    logits = [teacher_batch.logits(slice(None), None) for teacher_batch in (own, stored)]
    assert torch.allclose(*logits, atol=1e-4)
    padding = torch.arange(batch.tokens_BT.shape[1])[None] >= batch.ends_B[:, None]
    assert padding.any()
    assert not own.features_BTF[padding].any()


@pytest.mark.parametrize("layout", ["speculators", "specforge"])
def test_other_layouts_read_the_same(
    target: Target, target_folder: Path, answers: list[Answer], tmp_path: Path, layout: str
) -> None:
    folder = written(target, answers[:3], tmp_path / layout, layout)
    rows = open_features(folder, unpickle=layout == "specforge")
    beside = load_stored_target(str(target_folder), [rows])
    tokens = torch.tensor([[*answers[1].prompt, *answers[1].answer]])
    own, stored = (t.read(tokens, (4, 8)) for t in (target, beside))
    assert torch.allclose(stored.logits_BTV, own.logits_BTV, atol=1e-4)
    assert torch.allclose(stored.features_BTF, own.features_BTF, atol=1e-4)
    assert beside.check_says(answers[:3]) == 1.0


# -- the same training -----------------------------------------------------------------------------


def trained(target: Target, kind: str, answers: list[Answer], config: TrainConfig) -> Any:
    draft = fresh_draft(target, kind=kind).float().requires_grad_(False)
    return train(target, draft, answers, answers[:4], config, k=3)


@pytest.mark.parametrize("kind", ["eagle3", "eagle", "token_lm"])
def test_training_beside_features_ends_with_the_same_bits(
    target: Target, beside: StoredTarget, answers: list[Answer], kind: str
) -> None:
    own, stored = (trained(t, kind, answers, CONFIG) for t in (target, beside))
    assert own.record.best_step > 0  # there is something to be the same
    assert own.tensors.keys() == stored.tensors.keys()
    assert all(torch.equal(own.tensors[name], stored.tensors[name]) for name in own.tensors)
    assert own.record.final_loss == stored.record.final_loss
    assert own.record.heldout_tau == stored.record.heldout_tau
    assert stored.record.target_flops < own.record.target_flops


@pytest.mark.parametrize("method", ["expert+fc", "lora", "feature-map+expert"])
def test_private_parts_start_and_end_the_same(
    target: Target, beside: StoredTarget, answers: list[Answer], draft_folder: Path, method: str
) -> None:
    """Their starts read the features too. `base` is the target itself: what it says is read."""
    config = dataclasses.replace(CONFIG, method=method, width="8", rank=2, epochs=1)
    base = target if "feature-map" in method else None
    own, stored = (
        train(t, load_draft(str(draft_folder), t), answers, answers[:4], config, k=3, base=base)
        for t in (target, beside)
    )
    assert own.record.final_loss == stored.record.final_loss
    assert all(torch.equal(own.tensors[name], stored.tensors[name]) for name in own.tensors)


def test_training_on_padded_batches_ends_close(
    target: Target, target_folder: Path, answers: list[Answer], tmp_path: Path
) -> None:
    store = written(target, answers, tmp_path / "s", batch_tokens=512)
    beside = load_stored_target(str(target_folder), [open_features(store)])
    config = dataclasses.replace(CONFIG, batch_tokens=256)
    own, stored = (trained(t, "eagle3", answers, config) for t in (target, beside))
    assert own.record.final_loss == pytest.approx(stored.record.final_loss, rel=1e-3)
    for name in own.tensors:
        assert torch.allclose(stored.tensors[name], own.tensors[name], atol=1e-2), name


class Wrong(FeatureRows):
    """Rows that give other states than stored."""

    layout = "wrong"

    def __init__(self, rows: FeatureRows, change: Callable[[Tensor], Tensor]):
        self.rows, self.change = rows, change
        for name in ("folder", "aux_layers", "pre_norm", "dtype", "hidden_size", "tokens"):
            setattr(self, name, getattr(rows, name))

    def states(self, row: int, stop: int | None = None) -> Tensor:
        return self.change(self.rows.states(row))[:stop]

    def answers(self) -> list[Answer]:
        return self.rows.answers()


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "shifted by a position": lambda states: states.roll(1, 0),
    "another layer for the last": lambda states: states[:, [0, 1, 2, 0]],
    "before the norm taken for after": lambda states: states,
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_states_train_something_else(
    target: Target, target_folder: Path, store: Path, answers: list[Answer], wrong: str
) -> None:
    """The equality above would see them."""
    rows = Wrong(open_features(store), WRONG[wrong])
    rows.pre_norm = wrong != "before the norm taken for after"
    beside = load_stored_target(str(target_folder), [rows])
    own, stored = (trained(t, "eagle3", answers, CONFIG) for t in (target, beside))
    names = [name for name in own.tensors if own.tensors[name].is_floating_point()]
    assert all(
        not torch.allclose(stored.tensors[name], own.tensors[name], atol=1e-3) for name in names
    )


def test_states_that_do_not_say_the_answers_are_refused(
    target_folder: Path, store: Path, answers: list[Answer]
) -> None:
    """Foreign files hold no logits of their target; the answers tell whose states they are."""
    assert load_stored_target(str(target_folder), [open_features(store)]).check_says(answers) == 1.0
    rows = Wrong(open_features(store), WRONG["another layer for the last"])
    beside = load_stored_target(str(target_folder), [rows])
    with pytest.raises(
        UserError, match=r"the stored states make \d+ the most likely: they are not"
    ):
        beside.check_says(answers)


@pytest.mark.parametrize("wrong", WRONG)
def test_a_store_is_checked_by_the_targets_own_logits(
    target_folder: Path, store: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    rows: Any = open_features(store)
    honest = rows.states
    monkeypatch.setattr(rows, "states", lambda row, stop=None: WRONG[wrong](honest(row))[:stop])
    rows.pre_norm = wrong != "before the norm taken for after"
    with pytest.raises(UserError, match="logits made from the stored states differ .* by"):
        load_stored_target(str(target_folder), [rows])


def test_replay_beside_features_takes_the_same_steps(
    target: Target, beside: StoredTarget, answers: list[Answer], draft_folder: Path
) -> None:
    own, stored = (
        replay(t, load_draft(str(draft_folder), t), answers[:4], 4) for t in (target, beside)
    )
    assert stored == own


# -- what is not there -----------------------------------------------------------------------------


def test_what_is_not_stored_is_refused(
    beside: StoredTarget, answers: list[Answer], store: Path
) -> None:
    tokens = torch.tensor([[*answers[0].prompt, *answers[0].tokens]])
    with pytest.raises(UserError, match="holds hs.2., hs.4., hs.5. and the last state, not hs.3."):
        beside.read(tokens, (3,))
    other = tokens.clone()
    other[0, -1] = (other[0, -1] + 1) % 100 + 100
    with pytest.raises(UserError, match=rf"a row of {tokens.shape[1]} tokens .* is not among"):
        beside.read(other, ())
    with pytest.raises(UserError, match="loaded without its layers .--features."):
        beside.read(tokens, (), object())
    with pytest.raises(UserError, match="it cannot decode or read on"):
        beside.model(input_ids=tokens)
    with pytest.raises(UserError, match="it cannot decode or read on"):
        beside.model.generate(tokens, max_new_tokens=2)


def test_a_longer_row_holds_its_beginning_and_two_stores_are_one(
    target: Target, target_folder: Path, answers: list[Answer], tmp_path: Path
) -> None:
    rows = [
        open_features(written(target, part, tmp_path / str(i)))
        for i, part in enumerate((answers[:4], answers[4:8]))
    ]
    beside = load_stored_target(str(target_folder), rows)
    for answer in (answers[1], answers[6]):
        tokens = torch.tensor([[*answer.prompt, *answer.answer]])
        own, stored = (t.read(tokens, (2,)) for t in (target, beside))
        assert torch.allclose(stored.logits_BTV, own.logits_BTV, atol=1e-4)
    with pytest.raises(UserError, match=f"{tmp_path}/0, {tmp_path}/1; write those of all"):
        beside.read(torch.tensor([[1, 2, 3]]), ())


def test_another_target_is_refused(tmp_path: Path, store: Path, target_folder: Path) -> None:
    other = save_target(tmp_path / "other", FAMILIES["llama"](V), seed=1)
    with pytest.raises(UserError, match="with weights hashed .*: another model; write its own"):
        load_stored_target(str(other), [open_features(store)])
    smaller = {**SHAPE, "hidden_size": 16}
    small = save_target(tmp_path / "small", type(OTHERS["granite"])(vocab_size=V, **smaller))
    with pytest.raises(UserError, match="states of hidden size 32, expected 16"):
        load_stored_target(str(small), [open_features(store)])


def test_a_copy_of_the_target_is_the_same_target(
    target_folder: Path, store: Path, tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(target_folder, tmp_path / "copy")
    for path in (tmp_path / "copy").iterdir():
        path.touch()
    load_stored_target(str(tmp_path / "copy"), [open_features(store)])


@pytest.mark.parametrize(("modules", "fits"), [(["q_proj"], True), (["q_proj", "lm_head"], False)])
def test_an_adapter_of_layers_needs_no_layers(
    target_folder: Path, answers: list[Answer], tmp_path: Path, modules: list[str], fits: bool
) -> None:
    model = AutoModelForCausalLM.from_pretrained(target_folder)
    config = LoraConfig(r=2, target_modules=modules, init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    adapter = str(tmp_path / "adapter")
    if not fits:
        with pytest.raises(UserError, match="changes .*lm_head.* which is no layer: merge it"):
            load_stored_target(str(target_folder), [], adapter=adapter)
        return
    target = load_target(str(target_folder), adapter=adapter)
    rows = [open_features(written(target, answers[:3], tmp_path / "s"))]
    beside = load_stored_target(str(target_folder), rows, adapter=adapter)
    tokens = torch.tensor([[*answers[1].prompt, *answers[1].tokens]])
    own, stored = (t.read(tokens, AUX_LAYERS) for t in (target, beside))
    assert torch.equal(stored.logits_BTV, own.logits_BTV)
    assert torch.equal(stored.features_BTF, own.features_BTF)
    with pytest.raises(UserError, match="another model"):
        load_stored_target(str(target_folder), rows)


def test_padding_is_told_from_tokens_by_their_agreement(
    beside: StoredTarget, target: Target, answers: list[Answer]
) -> None:
    short, long = sorted(answers[:6], key=lambda a: len(a.prompt) + a.length)[::5]
    batch = collate([short, long], target.device)
    features = beside.read(batch.tokens_BT, (2,)).features_BTF
    end = int(batch.ends_B[0])
    assert features[0, end - 1].any()
    assert not features[0, end:].any()
    assert np.flatnonzero(batch.tokens_BT[0].numpy())[-1] == end - 1
    assert stored_module.LEAST_SAID < 1
