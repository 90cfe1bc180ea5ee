"""A target is made of exactly the weights in its files, or it is refused in one sentence that names the cause."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Lfm2Config, LlamaConfig, MiniMaxConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from redraft.core import console
from redraft.core.errors import UserError
from redraft.core.records import Prompt
from redraft.decoding.sampling import Sampling
from redraft.metrics.measure import answer_all
from redraft.models import versions
from redraft.models.cache_checks import check_rolls_back
from redraft.models.kv_cache import PromptCache, RowCache, is_recurrent
from redraft.models.loading import load_target
from redraft.models.target import Target
from tests.conftest import FAMILIES, SHAPE, make_tokenizer, save_target

Tensors = dict[str, Tensor]
V = len(make_tokenizer())
NORM = "model.layers.3.input_layernorm.weight"


@pytest.fixture
def folder(target_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(target_folder, tmp_path / "target"))


def edit(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})


def configure(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def refusal(folder: Path, **how: Any) -> str:
    with pytest.raises(UserError) as found:
        load_target(str(folder), **how)
    text = str(found.value)
    assert len(text) < 700
    assert "\n" not in text
    return text


WRONG_WEIGHTS: dict[str, tuple[Callable[[Tensors], Tensors], list[str]]] = {
    "compiled": (
        lambda t: {f"_orig_mod.{name}": x for name, x in t.items()},
        ["of its", "weights are not in its files", "begin with '_orig_mod.'"],
    ),
    "wrapped twice": (
        lambda t: {f"base_model.model.{name}": x for name, x in t.items()},
        ["begin with 'base_model.model.'"],
    ),
    "a layer gone": (
        lambda t: {n: x for n, x in t.items() if ".layers.3." not in n},
        ["9 of its", "first model.layers.3.input_layernorm.weight", "no whole copy"],
    ),
    "no head": (
        lambda t: {n: x for n, x in t.items() if n != "lm_head.weight"},
        ["1 of its", "first lm_head.weight"],
    ),
    "misnamed": (
        lambda t: {n.replace("q_proj", "query"): x for n, x in t.items()},
        ["q_proj.weight", "8 others instead, first model.layers.0.self_attn.query.weight"],
    ),
    "another shape": (
        lambda t: {**t, NORM: torch.ones(16)},
        [NORM, "expected (32,), found (16,)"],
    ),
    "surplus": (
        lambda t: {**t, "score.weight": torch.ones(2, 32)},
        ["1 tensors that its model does not take, first score.weight"],
    ),
    "scales": (
        lambda t: {**t, "model.layers.0.mlp.up_proj.weight_scale": torch.ones(1)},
        ["weight_scale", "scale quantised weights"],
    ),
    "a layer too many": (
        lambda t: {**t, NORM.replace("3", "8"): torch.ones(32)},
        ["first model.layers.8.input_layernorm.weight"],
    ),
    "not a number": (
        lambda t: {**t, NORM: torch.full((32,), float("nan"))},
        [f"its weight {NORM} holds values that are not finite"],
    ),
    "infinity": (
        lambda t: {**t, NORM: torch.full((32,), float("-inf"))},
        [NORM, "not finite"],
    ),
    "overflow": (
        lambda t: {**t, "model.norm.weight": torch.full((32,), 3e38)},
        ["first logits are not finite, though its weights are", "another --dtype"],
    ),
}


@pytest.mark.parametrize("wrong", WRONG_WEIGHTS)
def test_other_weights_are_named(wrong: str, folder: Path) -> None:
    change, words = WRONG_WEIGHTS[wrong]
    edit(folder, change)
    text = refusal(folder)
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", (4,)),
        ("mtp.layers.0.eh_proj.weight", (2, 2)),
        ("v_head.summary.weight", (1, 32)),
        ("visual.patch_embed.weight", (2, 2)),
    ],
)
def test_what_changes_no_logit_may_lie_there_too(
    name: str, shape: tuple[int, ...], folder: Path
) -> None:
    tokens = torch.tensor([[5, 6, 7]])
    before = load_target(str(folder)).read(tokens, ()).logits_BTV
    edit(folder, lambda t: {**t, name: torch.ones(shape)})
    assert torch.equal(load_target(str(folder)).read(tokens, ()).logits_BTV, before)


def test_a_tied_head_need_not_be_stored(tmp_path: Path) -> None:
    config = LlamaConfig(vocab_size=V, tie_word_embeddings=True, **SHAPE)
    target = load_target(str(save_target(tmp_path, config)))
    assert target.head.weight is target.embedding_VH


QUANTISED = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32},
    "modelopt": {"quant_method": "modelopt", "quant_algo": "FP8"},
    "made-up": {"quant_method": "made-up"},
}


@pytest.mark.parametrize("method", QUANTISED)
def test_quantised_weights_are_named(method: str, folder: Path) -> None:
    configure(folder, quantization_config=QUANTISED[method])
    assert method in refusal(folder).lower()


BROKEN: dict[str, Callable[[Path], Any]] = {
    "config no json": lambda f: (f / "config.json").write_text("{"),
    "config a list": lambda f: (f / "config.json").write_text("[]"),
    "config empty": lambda f: (f / "config.json").write_text("{}"),
    "unknown model": lambda f: configure(f, model_type="nobody-knows"),
    "heads as text": lambda f: configure(f, num_attention_heads="many"),
    "no heads": lambda f: configure(f, num_attention_heads=0),
    "null layers": lambda f: configure(f, num_hidden_layers=None),
    "unknown activation": lambda f: configure(f, hidden_act="siluu"),
    "unknown rope": lambda f: configure(f, rope_parameters={"rope_type": "spiral"}),
    "flash attention": lambda f: configure(f, _attn_implementation="flash_attention_2"),
    "weights cut short": lambda f: (f / "model.safetensors").write_bytes(b"\x10" * 20),
    "weights gone": lambda f: (f / "model.safetensors").unlink(),
    "no tokenizer": lambda f: [p.unlink() for p in f.glob("tokenizer*")],
    "tokenizer damaged": lambda f: (f / "tokenizer.json").write_text("{"),
    "tokenizer of nothing": lambda f: (f / "tokenizer.json").write_text('{"version": "1.0"}'),
    "a shard gone": lambda f: (
        (f / "model.safetensors").rename(f / "model-1.safetensors")
        and (f / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": "model-2.safetensors"}})
        )
    ),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_whatever_a_folder_lacks_ends_in_a_sentence(broken: str, folder: Path) -> None:
    BROKEN[broken](folder)
    assert str(folder) in refusal(folder)


def test_pickles_are_not_opened(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    assert "safetensors" in refusal(folder)


def test_code_of_a_folder_is_never_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = folder / "it-ran"
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    configure(
        folder,
        model_type="own",
        auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},
    )
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    refusal(folder)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": [None, "own.Tokenizer"]}})
    )
    refusal(folder)
    assert not marker.exists()


def save(config: Any, folder: Path) -> Path:
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


RECURRENT_SHAPE = {**SHAPE, "num_hidden_layers": 2, "vocab_size": V}
RECURRENT: dict[str, Callable[[], Any]] = {
    "lfm2": lambda: Lfm2Config(**RECURRENT_SHAPE, layer_types=["conv", "full_attention"]),
    "qwen3_5": lambda: CONFIG_MAPPING["qwen3_5_text"](
        **RECURRENT_SHAPE,
        head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
}


@pytest.mark.parametrize("kind", RECURRENT)
def test_a_target_with_a_recurrent_state_answers_but_is_not_rolled_back(
    kind: str, tmp_path: Path
) -> None:
    """Batches of several lengths, and rows that leave early, answer as one prompt at a time without a cache does."""
    torch.manual_seed(0)
    found = load_target(str(save(RECURRENT[kind](), tmp_path)), dtype="float32")
    prompts = [Prompt(f"p{n}", tuple(range(5, 8 + 3 * n))) for n in range(5)]
    for answer in answer_all(found, prompts, 12, 2, Sampling()):
        tokens = list(answer.prompt)
        for token in answer.answer:
            logits = found.read(torch.tensor([tokens]), (), keep=1).logits_BTV[0, -1]
            assert logits[token] >= logits.max() - 1e-4
            tokens.append(token)
    with pytest.raises(UserError, match=r"keeps a recurrent state \(layers of kind.*not decode"):
        RowCache(found, 1)


def test_a_transformers_that_does_not_read_on_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(RECURRENT["lfm2"](), tmp_path)
    monkeypatch.setattr(versions, "READS_ON", (6, 0))
    text = refusal(tmp_path)
    assert f"Transformers {transformers.__version__} does not read on from it exactly" in text
    assert "install 6.0 or later" in text


@pytest.mark.parametrize("kind", ["llama", *RECURRENT])
@torch.no_grad()
def test_tokens_after_a_prompt_are_taken_back(kind: str, tmp_path: Path) -> None:
    """A second reading after the same prompt is that of the whole; without taking back, it is of other tokens."""
    torch.manual_seed(0)
    made = {"llama": lambda: LlamaConfig(**RECURRENT_SHAPE), **RECURRENT}[kind]()
    found = load_target(str(save(made, tmp_path)), dtype="float64")
    tokens = torch.tensor([[5, 6, 7, 8, 9, 10, 11]] * 2)
    whole = found.read(tokens, ()).logits_BTV[:, 4:]
    cache = PromptCache(found, tokens[:, :4], ())
    assert torch.allclose(cache.reading.logits_BTV[:, -1], found.read(tokens, ()).logits_BTV[:, 3])
    cache.read(tokens[:, 1:3], ())
    other = cache.read(tokens[:, 4:], ()).logits_BTV
    for _ in range(2):
        cache.back()
        assert torch.allclose(cache.read(tokens[:, 4:], ()).logits_BTV, whole)
    assert not torch.allclose(other, whole, atol=1e-4)


def test_a_hybrid_family_with_full_attention_alone_is_rolled_back(tmp_path: Path) -> None:
    config = RECURRENT["qwen3_5"]()
    config.layer_types = ["full_attention"] * 2
    found = load_target(str(save(config, tmp_path)), dtype="float32")
    assert not is_recurrent(found.model)
    RowCache(found, 1)


def test_a_recurrent_state_that_transformers_does_not_cache_is_refused(tmp_path: Path) -> None:
    kinds = ["linear_attention", "full_attention"]
    config = MiniMaxConfig(**RECURRENT_SHAPE, layer_types=kinds, num_local_experts=2)
    text = refusal(save(config, tmp_path))
    assert "keeps a recurrent state, and does not read on from Transformers' cache" in text
    assert "--endpoint" in text


def test_a_cache_that_does_not_read_on_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(RECURRENT["lfm2"](), tmp_path)
    real = Target.read

    def forgets(self: Target, tokens: Tensor, aux: Any, cache: Any = None, **more: Any) -> Any:
        read = real(self, tokens, aux, cache, **more)
        scale = 1.0 if cache is None else 2.0
        return dataclasses.replace(read, logits_BTV=scale * read.logits_BTV)

    monkeypatch.setattr(Target, "read", forgets)
    with pytest.raises(UserError, match="reading on from Transformers' cache of it gives logits"):
        load_target(str(tmp_path), dtype="float64")


class Stateful(torch.nn.Module):
    """A model with a state of its own, which no cache rolls back."""

    def __init__(self, model: Any, failing: bool):
        super().__init__()
        self.inner, self.failing, self.calls = model, failing, 0
        self.config = model.config

    def forward(self, **given: Any) -> Any:
        self.calls += 1
        if self.failing and self.calls > 1:
            raise IndexError("list index out of range")
        output = self.inner(**given)
        output.logits = output.logits * (1 + self.calls)
        return output


@pytest.mark.parametrize(
    ("failing", "words"),
    [(False, "logits that differ by"), (True, "does not read on .*IndexError: list index")],
)
def test_a_cache_that_does_not_forget_is_found_by_trying(
    failing: bool, words: str, target_folder: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(target_folder).eval()
    check_rolls_back(model, "m")
    with pytest.raises(UserError, match=f"m: .*{words}"):
        check_rolls_back(Stateful(model, failing), "m")


def test_models_that_read_pictures_are_named(tmp_path: Path) -> None:
    config = CONFIG_MAPPING["qwen2_5_vl"]()
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    text = refusal(tmp_path)
    assert "a vision-language model (Qwen2_5_VLForConditionalGeneration)" in text
    assert "--endpoint" in text
    config = CONFIG_MAPPING["t5"]()
    config.save_pretrained(tmp_path)
    assert "no causal language model (T5Config)" in refusal(tmp_path)


@pytest.fixture(scope="module")
def adapter(target_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    model = AutoModelForCausalLM.from_pretrained(target_folder)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).save_pretrained(
        folder
    )
    return folder


WRONG_ADAPTERS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "prefix": (
        lambda t: {f"module.{name}": x for name, x in t.items()},
        "32 weights of this adapter are not in its file",
    ),
    "half": (
        lambda t: {n: x for n, x in t.items() if ".q_proj." in n},
        "16 weights of this adapter are not in its file, first base_model",
    ),
    "more": (
        lambda t: {**t, "base_model.model.model.layers.9.x.lora_A.weight": torch.ones(1)},
        "1 tensors of its file find no place in this target",
    ),
    "another width": (
        lambda t: {n: torch.ones(2, 16) if "lora_A" in n else x for n, x in t.items()},
        "does not fit this target",
    ),
}


@pytest.mark.parametrize("wrong", WRONG_ADAPTERS)
def test_adapters_fit_whole(wrong: str, adapter: Path, target_folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    path = copy / "adapter_model.safetensors"
    change, words = WRONG_ADAPTERS[wrong]
    load_target(str(target_folder), adapter=str(copy))
    save_file(change(load_file(path)), path, {"format": "pt"})
    assert words in refusal(target_folder, adapter=str(copy))


def test_virtual_tokens_and_other_adapters_are_refused(
    adapter: Path, target_folder: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(target_folder)
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(model, prompts).save_pretrained(tmp_path / "prompts")
    assert "virtual tokens" in refusal(target_folder, adapter=str(tmp_path / "prompts"))
    copy = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    (copy / "adapter_config.json").write_text('{"peft_type": "UNHEARD_OF"}')
    assert "does not fit" in refusal(target_folder, adapter=str(copy))
    (copy / "adapter_config.json").write_text("{")
    assert "does not fit" in refusal(target_folder, adapter=str(copy))


def test_what_lies_beside_an_adapter_unused_is_said(
    adapter: Path,
    target_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    monkeypatch.setattr(console, "say", said.append)
    monkeypatch.setattr("redraft.models.target_adapters.say", said.append)
    copy = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    make_tokenizer().save_pretrained(copy)
    load_target(str(target_folder), adapter=str(copy))
    assert not said
    tokenizer = make_tokenizer("{{ messages[0].content }}")
    tokenizer.add_tokens(["<think>"], special_tokens=True)
    tokenizer.save_pretrained(copy)
    load_target(str(target_folder), adapter=str(copy))
    assert "chat_template.jinja differs" in said[0]
    assert "--chat-template" in said[0]
    assert "1 tokens that the target's tokenizer lacks (first <think>)" in said[1]
    said.clear()
    load_target(
        str(target_folder), adapter=str(copy), chat_template=str(copy / "chat_template.jinja")
    )
    assert len(said) == 1


def test_template_variables_are_given_hashed_and_checked(tmp_path: Path) -> None:
    template = "{% if think is defined and not think %}no {% endif %}{{ messages[0].content }}"
    folder = save_target(tmp_path, FAMILIES["llama"](V), template=template)
    asked = [{"role": "user", "content": "x"}]
    plain = load_target(str(folder))
    without = load_target(str(folder), template_args={"think": False})
    assert plain.tokenizer.decode(plain.render(asked)) == "x"
    assert without.tokenizer.decode(without.render(asked)) == "no x"
    assert plain.fingerprint() != without.fingerprint()
    with pytest.raises(UserError, match="--template-arg thnk: the chat template .* reads no"):
        load_target(str(folder), template_args={"thnk": False})
