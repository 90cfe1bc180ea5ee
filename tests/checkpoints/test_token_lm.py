"""Token LMs on disk: stock folders in, stock folders out, and what does not belong to the target."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from redraft.checkpoints.inspect import inspect_draft
from redraft.checkpoints.load import load_draft, read_draft, stored
from redraft.checkpoints.reload_check import check_export
from redraft.core.errors import UserError
from redraft.core.folders import WEIGHTS, read_json
from redraft.drafts.base import Draft
from redraft.drafts.token_lm.files import COMPANIONS
from redraft.models.target import Target
from tests.checkpoints.crafted import edit
from tests.conftest import FAMILIES, fresh_draft, make_tokenizer, save_target

V = len(make_tokenizer())
TOKENS = torch.randint(5, 200, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a small LM as Transformers saved it."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            made[family] = save_target(folder, FAMILIES[family](V), seed=5)
        return made[family]

    return get


@pytest.fixture
def folder(folders: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders("llama"), tmp_path / "lm"))


def retensor(folder: Path, **changes: torch.Tensor | None) -> None:
    """Set, or with None remove, tensors of a folder; `__` stands for a dot."""
    tensors = load_file(folder / WEIGHTS)
    for name, tensor in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def first_logits(draft: Draft) -> torch.Tensor:
    """Of the chain starts' first step: those of the LM at positions 1 to T-2."""
    with torch.no_grad():
        states = next(iter(draft.rollout(TOKENS, torch.zeros(2, 12, 0), 0, 1)))
        return draft.logits(states)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_comes_back_as_it_was(
    target: Target, folders: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    source = folders(family)
    first = read_draft(str(source))
    first.save(tmp_path / "again")
    again = read_draft(str(tmp_path / "again"))
    assert (again.kind, again.config, again.hash()) == ("token_lm", first.config, first.hash())
    theirs, ours = load_file(source / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    assert set(theirs) == set(ours)
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    old, new = (read_json(path / "config.json") for path in (source, tmp_path / "again"))
    new["dtype"] = new.pop("torch_dtype")  # the older name of the key, which all readers know
    assert new == old
    beside = {path.name for path in source.iterdir()} & set(COMPANIONS)
    assert {"tokenizer.json", "generation_config.json", "chat_template.jinja"} <= beside
    for name in beside:
        assert (tmp_path / "again" / name).read_bytes() == (source / name).read_bytes()
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    draft = load_draft(str(tmp_path / "again"), target)
    with torch.no_grad():
        own = lm(input_ids=TOKENS).logits
    assert float((first_logits(draft) - own[:, 1:-1]).abs().max()) < 1e-4


def test_one_made_in_memory_is_saved_with_the_targets_tokenizer(
    target: Target, tmp_path: Path
) -> None:
    draft = fresh_draft(target, kind="token_lm")
    stored(draft, target).save(tmp_path / "d")
    back = load_draft(str(tmp_path / "d"), target)
    assert torch.equal(first_logits(back), first_logits(draft))
    assert (tmp_path / "d" / "tokenizer.json").is_file()
    found = inspect_draft(str(tmp_path / "d"), target)
    assert (found.kind, found.layout, found.unreadable) == ("token_lm", "hf", None)
    assert found.serves("vllm") == found.serves("sglang") == "serves it unchanged"


def test_transformers_takes_it_as_assistant(target: Target, folder: Path, tmp_path: Path) -> None:
    read_draft(str(folder)).save(tmp_path / "d")
    assistant = AutoModelForCausalLM.from_pretrained(tmp_path / "d")
    prompt = TOKENS[:1]
    plain = target.model.generate(prompt, max_new_tokens=12, do_sample=False)
    assisted = target.model.generate(
        prompt, max_new_tokens=12, do_sample=False, assistant_model=assistant
    )
    assert torch.equal(plain, assisted)


def test_a_wider_ffn_is_a_stock_folder(folder: Path, tmp_path: Path) -> None:
    shared = read_draft(str(folder))
    wide = {
        name: torch.cat([t, t[:8] if "down" not in name else 0 * t[:, :8]], int("down" in name))
        if ".mlp." in name
        else t
        for name, t in shared.tensors.items()
    }
    merged = shared.with_tensors(wide, {})
    merged.save(tmp_path / "fused")
    assert read_json(tmp_path / "fused" / "config.json")["intermediate_size"] == 48 + 8
    assert check_export(merged, tmp_path / "fused") < 1e-6
    assert check_export(shared, tmp_path / "fused") < 1e-6, "neurons of no effect were added"


@pytest.mark.parametrize("family", ["llama", "gemma", "phi"])
def test_the_second_reading_catches_a_wrong_export(
    folders: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    made = read_draft(str(folders(family)))
    made.save(tmp_path / "d")
    assert check_export(made, tmp_path / "d") < 1e-6
    name = next(n for n in made.tensors if n.endswith("q_proj.weight"))
    retensor(tmp_path / "d", **{name.replace(".", "__"): made.tensors[name].flip(0)})
    with pytest.raises(UserError, match="computes another function than what was exported"):
        check_export(made, tmp_path / "d")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__norm__weight": None}, "missing model.norm.weight"),
        ({"lm_head__weight": None}, "missing lm_head.weight"),
        ({"model__extra": torch.ones(2)}, "unknown model.extra"),
        ({"model__norm__weight": torch.ones(31)}, r"model.norm.weight should be \[32\]"),
        ({"model__norm__weight": torch.full((32,), float("nan"))}, "not finite"),
        ({"model__norm__weight": torch.ones(32, dtype=torch.int8)}, "quantised drafts"),
    ],
)
def test_tensors_that_do_not_match_are_named(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    retensor(folder, **changes)
    with pytest.raises(UserError, match=message):
        read_draft(str(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_config": {"bits": 4}}, "a quantised LM"),
        ({"model_type": "brandnew"}, "model_type 'brandnew' is none that Transformers knows"),
        ({"architectures": ["BrandNewForCausalLM"]}, "BrandNewForCausalLM.* is no draft"),
        ({"num_attention_heads": "four"}, "config.json of a llama model: .*num_attention_heads"),
        ({"layer_types": ["chunked_attention"] * 8}, "layers of kind chunked_attention"),
    ],
)
def test_a_config_that_cannot_be_a_draft_is_refused(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    edit(folder, **changes)
    with pytest.raises(UserError, match=message):
        read_draft(str(folder))


def test_a_tied_head_that_is_stored_too(folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders("gemma"), tmp_path / "lm"))
    hash_before = read_draft(str(folder)).hash()
    embedding = load_file(folder / WEIGHTS)["model.embed_tokens.weight"]
    retensor(folder, lm_head__weight=embedding)
    assert read_draft(str(folder)).hash() == hash_before
    retensor(folder, lm_head__weight=embedding.flip(0))
    with pytest.raises(UserError, match="ties the head to the embedding .* differs"):
        read_draft(str(folder))


def test_another_tokenizer_is_refused(target: Target, folder: Path) -> None:
    load_draft(str(folder), target)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(content))
    first = min(vocabulary["a"], vocabulary["b"])
    with pytest.raises(UserError, match=f"2 token ids .* mean something else .*id {first} is"):
        load_draft(str(folder), target)
    found = inspect_draft(str(folder), target)
    assert found.unreadable is not None
    assert "tokenizers differ" in found.unreadable
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    load_draft(str(folder), target)  # nothing to compare with


def test_a_token_that_only_one_of_them_has_is_no_difference(target: Target, tmp_path: Path) -> None:
    save_target(tmp_path, FAMILIES["llama"](V + 8))
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|added|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_draft(str(tmp_path), target).vocab_size == V


def test_padding_the_vocabulary(target: Target, folder: Path, tmp_path: Path) -> None:
    """Engines want equal vocab_size; rows of zeros leave every other logit as it was."""
    wide = Target(
        AutoModelForCausalLM.from_pretrained(
            save_target(tmp_path / "t", FAMILIES["llama"](V + 40))
        ),
        target.tokenizer,
        ["wide"],
    )
    found = inspect_draft(str(folder), wide)
    assert found.unreadable is None
    for engine in ("vllm", "sglang", "transformers"):
        assert found.serves(engine) == "does not load it", engine
    assert found.serves("llama.cpp") == "serves it unchanged"
    said = [f.says for f in found.engines if f.engine == "vllm"]
    assert f"needs a vocab_size equal to the target's {V + 40}, here it is {V}" in said[0]
    alone = inspect_draft(str(folder))
    assert [f.level for f in alone.engines] == ["note"] * 4
    narrow = read_draft(str(folder))
    narrow.with_vocabulary(V + 40).save(tmp_path / "padded")
    assert inspect_draft(str(tmp_path / "padded"), wide).serves("vllm") == "serves it unchanged"
    padded, plain = load_draft(str(tmp_path / "padded"), wide), narrow.build(wide)
    assert padded.draft_vocab is None
    assert plain.draft_vocab is not None
    assert torch.equal(first_logits(padded)[..., :V], first_logits(plain))
    assert not first_logits(padded)[..., V:].any()
    with pytest.raises(UserError, match="rows can be added to a draft, not taken away"):
        narrow.with_vocabulary(V - 1)
    eagle = stored(fresh_draft(target), target)
    assert eagle.with_vocabulary(V + 40) is eagle


def test_padding_for_tensor_parallelism(folders: Callable[[str], Path], tmp_path: Path) -> None:
    made = read_draft(str(folders("llama")))
    made.save(tmp_path / "d", tp=[1, 2])
    assert read_draft(str(tmp_path / "d")).hash() == made.hash()
    with pytest.raises(UserError, match="--tp 5: a draft of 4 attention heads"):
        made.save(tmp_path / "e", tp=[5])
    odd = save_target(tmp_path / "odd", _odd("llama"))
    made = read_draft(str(odd))
    made.save(tmp_path / "f", tp=[2])
    back = read_draft(str(tmp_path / "f"))
    assert (back.config.intermediate_size, back.provenance["zero_neurons"]) == (48, 1)
    assert check_export(made, tmp_path / "f") < 1e-6
    phi = read_draft(str(save_target(tmp_path / "phi", _odd("phi"))))
    with pytest.raises(UserError, match="only one of gate_proj, up_proj and down_proj"):
        phi.save(tmp_path / "g", tp=[2])
    assert not (tmp_path / "g").exists()


def _odd(family: str) -> Any:
    """A config with an FFN of 47 neurons."""
    config = FAMILIES[family](V)
    config.intermediate_size = 47
    return config


def test_code_in_a_folder_is_never_run(
    target: Target, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor asked about: a yes on standard input must not run it."""
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w').close()\n"
    (folder / "code.py").write_text(code + "class Own: ...\n")
    auto = {"AutoConfig": "code.Own", "AutoModelForCausalLM": "code.Own"}
    edit(folder, auto_map=auto)
    tokens = json.loads((folder / "tokenizer_config.json").read_text())
    tokens |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["code.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    made = read_draft(str(folder))
    with contextlib.suppress(UserError):
        made.build(target)
    made.save(tmp_path / "out")
    with contextlib.suppress(UserError):
        check_export(made, tmp_path / "out")
    edit(folder, model_type="own")
    with pytest.raises(UserError, match="none that Transformers knows without remote code"):
        read_draft(str(folder))
    assert not ran.exists()


@pytest.mark.parametrize("raw", ["{", "[]", '{"added_tokens": 1}', ""])
def test_a_tokenizer_that_cannot_be_loaded_is_a_sentence(
    target: Target, folder: Path, raw: str
) -> None:
    (folder / "tokenizer.json").write_text(raw)
    with pytest.raises(UserError, match="its tokenizer could not be loaded"):
        read_draft(str(folder)).build(target)
