"""Starts in closed form: feature-map against least squares by numpy, weight-sync against loops over rows."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from redraft.adapters import weight_sync
from redraft.adapters.adapter import prepare, take
from redraft.adapters.feature_map import PENALTY, DownFit, FeatureMap, folded
from redraft.adapters.kind import Setup
from redraft.adapters.table import read_method
from redraft.checkpoints.load import load_draft, read_draft
from redraft.config import TrainConfig
from redraft.core.errors import UserError
from redraft.core.folders import tensor_hash
from redraft.core.records import Answer
from redraft.drafts.base import Draft
from redraft.models.batching import collate
from redraft.models.target import Reading, Target
from redraft.pipeline.stages import train_adapter
from redraft.training import closed_form as closed_form_module
from redraft.training.closed_form import fit_closed_form
from redraft.training.teacher_batch import TeacherBatch, read_teacher_batch, rollout_loss
from redraft.training.train import Trained, train
from tests.conftest import fresh_draft

F, N = 6, 40
CONFIG = TrainConfig(
    method="feature-map",
    width="8",
    rank=4,
    lr=1e-3,
    epochs=1,
    batch_tokens=256,
    rollout=3,
    evaluations=1,
    precision="fp32",
)


# -- the map --------------------------------------------------------------------------------------


def features(seed: int = 0, positions: int = N) -> tuple[Tensor, Tensor]:
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(positions, F)) * np.linspace(0.2, 3, F)
    turn = np.eye(F) + 0.4 * draw.normal(size=(F, F))
    return torch.from_numpy(x), torch.from_numpy(
        x @ turn.T + 0.1 * draw.normal(size=(positions, F))
    )


def solved(x: Tensor, y: Tensor, penalty: float = PENALTY, pieces: int = 1) -> Tensor:
    fitted = FeatureMap(F)
    for a, b in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
        fitted.add(a, b)
    return fitted.solve(penalty)


def least_squares(x: Tensor, y: Tensor, weight: float, towards: np.ndarray) -> Tensor:
    """The penalty as further rows: sqrt(weight) I is to be mapped onto sqrt(weight) `towards`."""
    root = weight**0.5
    left = np.concatenate([x.numpy(), root * np.eye(F)])
    right = np.concatenate([y.numpy(), root * towards])
    return torch.from_numpy(np.linalg.lstsq(left, right, rcond=None)[0].T)


def weight_of(x: Tensor, penalty: float) -> float:
    return penalty * sum(float(value) ** 2 for row in x for value in row) / F


@pytest.mark.parametrize("penalty", [1e-6, PENALTY, 0.5])
@pytest.mark.parametrize("positions", [3, N])
def test_the_map_is_the_ridge_towards_the_identity(penalty: float, positions: int) -> None:
    x, y = features(positions=positions)
    expected = least_squares(x, y, weight_of(x, penalty), np.eye(F))
    assert torch.allclose(solved(x, y, penalty), expected, rtol=0, atol=1e-8)


def test_wrong_maps_are_caught() -> None:
    x, y = features()
    weight = weight_of(x, PENALTY)
    found = solved(x, y)
    wrong = {
        "the base's features onto the target's": least_squares(y, x, weight, np.eye(F)),
        "transposed": least_squares(x, y, weight, np.eye(F)).T,
        "away from the identity": 2 * torch.eye(F) - found,
        "without a penalty": least_squares(x, y, 0.0, np.eye(F)),
        "towards zero": least_squares(x, y, weight, np.zeros((F, F))),
        "a penalty that does not grow with the positions": least_squares(
            x, y, weight / N, np.eye(F)
        ),
    }
    for name, other in wrong.items():
        assert float((found - other).abs().max()) > 1e-3, name


@pytest.mark.parametrize("pieces", [2, 7, N])
def test_any_batching_gives_the_same_map(pieces: int) -> None:
    x, y = features()
    assert torch.allclose(solved(x, y, pieces=pieces), solved(x, y), rtol=0, atol=1e-10)


def test_without_evidence_features_pass_unchanged() -> None:
    """Where the target never goes, the map is the identity; equal features give it exactly."""
    x, y = features()
    seen = torch.zeros(F, F, dtype=torch.float64)
    seen[0, 0] = seen[1, 1] = 1.0
    found = solved(x @ seen, y)
    assert torch.allclose(found[:, 2:], torch.eye(F, dtype=torch.float64)[:, 2:], atol=1e-12)
    assert float((found[:, :2] - torch.eye(F, dtype=torch.float64)[:, :2]).abs().max()) > 0.1
    assert torch.equal(solved(x, x), torch.eye(F, dtype=torch.float64))


def test_a_map_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no features were added"):
        FeatureMap(F).solve()


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_folding_applies_the_map_before_fc(share: float) -> None:
    x, y = features()
    map_ff = solved(x, y)
    fc = torch.randn(4, F, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    moved = torch.stack([(1 - share) * row + share * (map_ff @ row) for row in x])
    expected = torch.stack([fc @ row for row in moved])
    got = x @ folded(fc, map_ff, share).T
    assert torch.allclose(got, expected, atol=1e-12)
    if share:  # the map on the other side of the product, or transposed
        assert float((x @ folded(fc, map_ff.T, share).T - expected).abs().max()) > 1e-2
    assert folded(fc.to(torch.bfloat16), map_ff, share).dtype == torch.bfloat16


# -- feature-map on a draft -----------------------------------------------------------------------------


class Turned(Target):
    """A target that says what `base` says, with features that are a linear map of the base's."""

    def __init__(self, base: Target, map_ff: Tensor):
        super().__init__(base.model, base.tokenizer, base.sources, base.template)
        self.map_ff = map_ff

    def read(self, *args: Any, **named: Any) -> Reading:
        reading = super().read(*args, **named)
        if not reading.features_BTF.shape[-1]:
            return reading
        width = len(self.map_ff)
        features, rest = reading.features_BTF[..., :width], reading.features_BTF[..., width:]
        mapped = features @ self.map_ff.T.to(self.dtype)
        return Reading(torch.cat([mapped, rest], -1), reading.logits_BTV)


def turn(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.eye(size) + torch.randn(size, size, generator=generator) * size**-0.5


@pytest.fixture(scope="module")
def turned(target: Target) -> Turned:
    return Turned(target, turn(96))


def mapped(
    target: Target, base: Target | None, draft: Draft, answers: Sequence[Answer], **changes: Any
) -> Trained:
    config = replace(CONFIG, **changes)
    return train(target, draft, answers, answers[:4], config, k=3, base=base)


def test_feature_map_gives_the_draft_the_bases_features_back(
    target: Target, turned: Turned, draft_folder: Path, answers: list[Answer]
) -> None:
    """fc' of the tuned model's features is fc of the base's; the unadapted fc is far from it."""
    unadapted = load_draft(str(draft_folder), target, torch.float32)
    draft = load_draft(str(draft_folder), target, torch.float32)
    trained = mapped(turned, target, draft, answers)
    assert set(trained.tensors) == {"fc.weight"}
    assert trained.record.steps == trained.record.trained_parameters == 0
    assert torch.equal(trained.tensors["fc.weight"], draft.get_parameter("fc.weight"))
    fc, repaired = (d.get_parameter("fc.weight").detach() for d in (unadapted, draft))
    tokens = torch.tensor([[*answers[0].prompt, *answers[0].answer]])
    with torch.no_grad():
        own = target.read(tokens, unadapted.aux_layers).features_BTF
        seen = turned.read(tokens, unadapted.aux_layers).features_BTF
    expected = own @ fc.T
    size = float(expected.norm())
    assert float((seen @ fc.T - expected).norm()) > 0.3 * size
    assert float((seen @ repaired.T - expected).norm()) < 0.05 * size
    # The map's other direction, and one step of it more, repair nothing.
    mistaken = [fc @ turned.map_ff, 2 * fc - repaired]
    for wrong in mistaken:
        assert float((seen @ wrong.T - expected).norm()) > 0.3 * size
    reuse = mapped(turned, target, unadapted, answers, method="fc", epochs=0.01, lr=1e-12)
    before = mapped(target, target, load_draft(str(draft_folder), target), answers)
    assert trained.record.best_tau() == pytest.approx(before.record.best_tau(), abs=0.02)
    assert trained.record.best_tau() > reuse.record.best_tau() + 0.1


def test_without_a_difference_feature_map_leaves_the_draft_as_it_is(
    target: Target, draft_folder: Path, answers: list[Answer]
) -> None:
    shared = read_draft(str(draft_folder))
    part = train_adapter(target, shared, answers, answers[:4], CONFIG, 3, base=target)
    assert part.tensors == {}, "an adapter holds only what changed"


def test_the_share_with_the_smallest_loss_is_taken(
    target: Target,
    turned: Turned,
    draft_folder: Path,
    answers: list[Answer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = load_draft(str(draft_folder), target).get_parameter("fc.weight").detach().clone()
    seen: list[Tensor] = []
    losses = iter([3.0] * 4 + [2.0] * 4 + [1.0] * 4 + [1.5] * 4 + [9.0] * 4)

    def scripted(
        teacher_batch: TeacherBatch, draft: Any, config: TrainConfig
    ) -> tuple[Tensor, int]:
        seen.append(draft.fc.weight.detach().clone())
        return torch.tensor(next(losses)), 1

    monkeypatch.setattr(closed_form_module, "rollout_loss", scripted)
    draft = load_draft(str(draft_folder), target, torch.float32)
    found = fit_closed_form(
        turned, target, draft, read_method("feature-map"), CONFIG, answers, [[i] for i in range(24)]
    ).tensors
    assert torch.equal(seen[0], before)
    assert torch.equal(found["fc.weight"], seen[8])
    half = (seen[0].double() + seen[16].double()) / 2
    assert torch.allclose(found["fc.weight"].double(), half, atol=1e-6)
    assert not torch.equal(seen[8], seen[16])


def test_padding_teaches_the_map_nothing(
    target: Target, turned: Turned, draft_folder: Path, answers: list[Answer]
) -> None:
    """One answer at a time, where nothing is padded, gives the map of whole batches."""

    def fitted(plan: list[list[int]]) -> Tensor:
        draft = load_draft(str(draft_folder), target, torch.float32)
        method = read_method("feature-map")
        return fit_closed_form(turned, target, draft, method, CONFIG, uneven, plan).tensors[
            "fc.weight"
        ]

    uneven = [replace(a, length=2 + i, finish="length") for i, a in enumerate(answers[:12])]
    single, together = fitted([[i] for i in range(12)]), fitted([list(range(12))])
    assert torch.allclose(single, together, atol=1e-4)


@pytest.mark.parametrize("flags", [{"norm_before_fc": True}, {"fc_norm": 3}])
def test_the_map_is_of_what_enters_fc(
    target: Target, answers: list[Answer], flags: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a draft norms its features first, the normed ones are mapped."""
    entered: list[Tensor] = []
    add = FeatureMap.add
    monkeypatch.setattr(
        FeatureMap, "add", lambda self, x, y: (entered.append(x.clone()), add(self, x, y))[1]
    )
    draft = fresh_draft(target, **flags)
    fit_closed_form(target, target, draft, read_method("feature-map"), CONFIG, answers[:1], [[0]])
    tokens = torch.tensor([[*answers[0].prompt, *answers[0].answer]])
    raw = target.read(tokens, draft.aux_layers).features_BTF[0]
    caught: list[Tensor] = []
    draft.fc.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    draft.first_state(raw)
    assert torch.allclose(entered[0], caught[0], atol=1e-5)
    assert not torch.allclose(entered[0], raw, atol=1e-2)


@pytest.mark.parametrize("method", ["feature-map", "weight-sync", "expert+feature-map"])
def test_a_start_needs_the_base_model(
    target: Target, draft_folder: Path, answers: list[Answer], method: str
) -> None:
    draft = load_draft(str(draft_folder), target, torch.float32)
    name = read_method(method).name.replace("+", r"\+")
    with pytest.raises(UserError, match=rf"method {name} compares .* name that with --base"):
        mapped(target, None, draft, answers, method=method)


@pytest.mark.parametrize("kind", ["eagle", "token_lm"])
def test_feature_map_is_refused_where_fc_takes_more_than_features(
    target: Target, answers: list[Answer], kind: str
) -> None:
    draft = fresh_draft(target, kind=kind)
    before = {name: tensor_hash(t) for name, t in draft.state_dict().items()}
    with pytest.raises(
        UserError, match=f"only features enter fc, which this {kind} draft does not"
    ):
        mapped(target, target, draft, answers)
    assert {name: tensor_hash(t) for name, t in draft.state_dict().items()} == before


@pytest.mark.parametrize(
    "method", ["feature-map+expert", "feature-map+lora", "feature-map+fc", "feature-map+full"]
)
def test_training_goes_on_from_the_feature_maped_draft(
    target: Target, turned: Turned, draft_folder: Path, answers: list[Answer], method: str
) -> None:
    alone = load_draft(str(draft_folder), target, torch.float32)
    mapped(turned, target, alone, answers)
    draft = load_draft(str(draft_folder), target, torch.float32)
    trained = mapped(turned, target, draft, answers, method=method, lr=1e-9)
    now = trained.tensors["fc.weight"]
    assert torch.allclose(now, alone.get_parameter("fc.weight"), atol=1e-4)
    if method in ("feature-map+expert", "feature-map+lora"):  # fitted, and not trained
        assert torch.equal(now, alone.get_parameter("fc.weight"))
    private = {n for n in trained.tensors if n != "fc.weight"}
    assert bool(private) == (method != "feature-map+fc")
    # What was trained at almost no rate computes what the relayed draft does.
    tokens = torch.tensor([[*answers[0].prompt, *answers[0].answer]])
    seen = turned.read(tokens, draft.aux_layers).features_BTF
    with torch.no_grad():
        ours, theirs = (d.logits(next(iter(d.rollout(tokens, seen, 1, 1)))) for d in (draft, alone))
    assert torch.allclose(ours, theirs, atol=1e-2)


# -- weight-sync --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(target: Target) -> Target:
    """The target after tuning: embedding, head and final norm have moved."""
    model = copy.deepcopy(target.model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in (model.model.embed_tokens.weight, model.lm_head.weight):
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
        model.model.norm.weight.add_(0.2 * torch.rand(32, generator=generator))
    return Target(model, target.tokenizer, [*target.sources, "tuned"])


def copying(target: Target, vocab: int | None = 40, dtype: torch.dtype = torch.float32) -> Any:
    """A draft that holds copies of the target's embedding, head and norm."""
    draft = fresh_draft(target, vocab=vocab)
    rows = slice(None) if vocab is None else draft.draft_vocab
    draft.embed_tokens = nn.Embedding.from_pretrained(target.embedding_VH.detach().clone())
    with torch.no_grad():
        draft.lm_head.weight.copy_(target.head.weight[rows])
        draft.norm.weight.copy_(target.model.model.norm.weight)
    return draft.to(dtype)


@pytest.mark.parametrize("vocab", [None, 40])
def test_copies_are_renewed_by_rows_of_the_draft_vocabulary(
    target: Target, tuned: Target, vocab: int | None
) -> None:
    draft = copying(target, vocab)
    found = weight_sync.renewed(draft, target, tuned)
    assert set(found) == {"embed_tokens.weight", "lm_head.weight", "norm.weight"}
    ids = list(range(261)) if vocab is None else draft.draft_vocab.tolist()
    for row, token in enumerate(ids):
        expected = tuned.head.weight[token]
        assert torch.allclose(found["lm_head.weight"][row], expected, atol=1e-5), (row, token)
    if vocab is not None:  # the target's first rows would be other tokens
        assert not torch.allclose(found["lm_head.weight"], tuned.head.weight[:40], atol=1e-2)
    assert torch.allclose(found["embed_tokens.weight"], tuned.embedding_VH, atol=1e-5)
    assert torch.allclose(found["norm.weight"], tuned.model.model.norm.weight, atol=1e-5)
    # Left as they were, or moved the other way, they would be far from it.
    assert float((draft.lm_head.weight - tuned.head.weight[ids]).abs().max()) > 0.1


def test_a_rounded_copy_moves_by_the_difference(target: Target, tuned: Target) -> None:
    draft = copying(target, dtype=torch.bfloat16)
    own = draft.lm_head.weight.detach().double()
    found = weight_sync.renewed(draft, target, tuned)["lm_head.weight"]
    assert found.dtype == torch.bfloat16
    rows = draft.draft_vocab
    moved = own + (tuned.head.weight[rows] - target.head.weight[rows]).double()
    assert torch.allclose(found.double(), moved, rtol=2**-6, atol=1e-3)


def test_what_the_draft_learned_itself_is_left_alone(target: Target, tuned: Target) -> None:
    draft = copying(target)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        draft.lm_head.weight.normal_(generator=generator)
    # The norm stands before a head of the draft's own, so it is the draft's own.
    assert set(weight_sync.renewed(draft, target, tuned)) == {"embed_tokens.weight"}
    draft = copying(target)
    with torch.no_grad():
        draft.norm.weight.mul_(1 + 0.1 * torch.rand(32, generator=generator))
    assert set(weight_sync.renewed(draft, target, tuned)) == {
        "embed_tokens.weight",
        "lm_head.weight",
    }
    # A head trained away from the copy it began as is the draft's own, too.
    draft = copying(target)
    head = draft.lm_head.weight
    with torch.no_grad():
        head.add_(0.5 * head.std() * torch.randn(head.shape, generator=generator))
    assert "lm_head.weight" not in weight_sync.renewed(draft, target, tuned)
    assert weight_sync.renewed(fresh_draft(target, kind="eagle"), target, tuned) == {}


def test_weight_sync_puts_the_copies_in_and_the_part_holds_them(
    target: Target, tuned: Target, answers: list[Answer]
) -> None:
    draft = copying(target)
    untouched = {n: tensor_hash(t) for n, t in draft.state_dict().items()}
    trained = mapped(tuned, target, draft, answers, method="weight-sync")
    names = {"embed_tokens.weight", "lm_head.weight", "norm.weight"}
    assert set(trained.tensors) == names
    assert torch.allclose(draft.lm_head.weight, tuned.head.weight[draft.draft_vocab], atol=1e-5)
    now = {n: tensor_hash(t) for n, t in draft.state_dict().items()}
    assert {n for n in now if now[n] != untouched[n]} == names


def test_nothing_to_sync_is_said(
    target: Target, tuned: Target, answers: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(weight_sync, "say", said.append)
    found = fit_closed_form(
        tuned, target, fresh_draft(target), read_method("weight-sync"), CONFIG, answers, [[0]]
    ).tensors
    assert found == {}
    assert said == [
        "weight-sync: the draft holds no copy of the base's tensors that changed; nothing to do"
    ]
    said.clear()
    fit_closed_form(
        tuned, target, copying(target), read_method("weight-sync"), CONFIG, answers, [[0]]
    )
    assert said == []
    fit_closed_form(
        target, target, copying(target), read_method("weight-sync"), CONFIG, answers, [[0]]
    )
    assert "nothing to do" in said[0], "the base itself has changed nothing"


def test_a_trained_part_beside_a_start_keeps_what_was_fitted(
    target: Target, tuned: Target, answers: list[Answer]
) -> None:
    """`weight-sync+head` trains the renewed head: one tensor, which is the trained one."""
    draft = copying(target)
    trained = mapped(tuned, target, draft, answers, method="weight-sync+head", lr=1e-3)
    assert set(trained.tensors) == {"embed_tokens.weight", "lm_head.weight", "norm.weight"}
    owned = take(draft, read_method("weight-sync+head"))
    assert set(owned) == {"lm_head.weight"}
    near = torch.allclose(owned["lm_head.weight"], tuned.head.weight[draft.draft_vocab], atol=0.05)
    assert near
    assert prepare(draft, read_method("head"), Setup(width=1, init="active", seed=0))[0][0] == (
        "lm_head.weight"
    )


def test_a_head_beneath_a_low_rank_pair_is_renewed_too(target: Target, tuned: Target) -> None:
    """What weight-sync finds does not depend on what else the method attaches."""
    plain, paired = copying(target), copying(target)
    prepare(
        paired, read_method("weight-sync+head-lora"), Setup(width=1, rank=4, init="active", seed=0)
    )
    found = [weight_sync.renewed(draft, target, tuned) for draft in (plain, paired)]
    assert set(found[0]) == set(found[1]) >= {"lm_head.weight"}
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


# -- an expert's down projection -------------------------------------------------------------------


def down_oracle(a: Any, g: Any, penalty: float) -> Any:
    """The same step as one linear system over all entries, vec(G D A) = (A x G) vec(D)."""
    n = len(a)
    left, right = g.T @ g / n, a.T @ a / n
    left += penalty * left.diagonal().mean() * np.eye(len(left))
    right += penalty * right.diagonal().mean() * np.eye(len(right))
    c = g.T @ a / n
    flat = np.linalg.solve(np.kron(left, right), -c.reshape(-1))
    return flat.reshape(c.shape)


def test_the_down_projection_solves_the_quadratic_problem() -> None:
    a, g = torch.randn(200, 7).double(), torch.randn(200, 5).double()
    fit = DownFit(5, 7)
    for begin in (0, 13, 120):  # any batching
        end = {0: 13, 13: 120, 120: 200}[begin]
        fit.add(a[begin:end], g[begin:end])
    wanted = torch.from_numpy(down_oracle(a.numpy(), g.numpy(), 0.3))
    assert torch.allclose(fit.solve(0.3), wanted, atol=1e-12)
    wrong = {
        "the other sign": -fit.solve(0.3),
        "another penalty": fit.solve(0.03),
        "activations without their curvature": -(g.T @ a) / 200,
    }
    for name, step in wrong.items():
        assert not torch.allclose(step, wanted, atol=1e-4), name
    with pytest.raises(ValueError, match="no positions"):
        DownFit(5, 7).solve()


def test_the_step_goes_downhill() -> None:
    """On a quadratic loss whose gradient is exact, a short step lowers it."""
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(300, 6, generator=generator).double()
    wanted = torch.randn(300, 4, generator=generator).double()
    fit = DownFit(4, 6)
    fit.add(a, -wanted)  # gradient of 0.5 |D a - wanted|^2 at D = 0
    step = fit.solve()
    losses = [float((a @ (share * step).T - wanted).square().sum()) for share in (0.0, 0.01, -0.01)]
    assert losses[1] < losses[0] < losses[2]


@pytest.mark.parametrize("kind", ["eagle3", "eagle", "token_lm"])
def test_an_expert_is_fitted_without_a_training_step(
    target: Target, answers: list[Answer], kind: str
) -> None:
    """The loss on the answers falls, shared tensors stay, nothing is stepped."""
    draft = fresh_draft(target, kind=kind)
    before = {name: t.clone() for name, t in draft.state_dict().items() if name != "fc.weight"}
    teacher_batch = read_teacher_batch(target, collate(answers, target.device), draft.aux_layers)
    config = TrainConfig(
        method="feature-map+expert",
        width="8",
        epochs=0,
        batch_tokens=256,
        rollout=2,
        precision="fp32",
    )
    was = rollout_loss(teacher_batch, draft, config)[0].item()
    record = train(target, draft, answers, answers[:4], config, k=3, base=target).record
    assert record.steps == 0
    assert rollout_loss(teacher_batch, draft, config)[0].item() < was - 0.05
    now = draft.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items())
