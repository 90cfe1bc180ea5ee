"""PEFT adapters on a target: one at a time, or the many of a fleet, each row of a batch with its own."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..core.console import say
from ..core.errors import UserError, as_sentence
from ..core.records import Answer
from .target import Reading, Target

ADAPTER = "adapter_model.safetensors"
BASE = "base"
"""What the base itself is called among the adapters of a fleet."""
NO_ADAPTER = "__base__"
"""PEFT's name for rows without an adapter."""
REWRITING = ("pissa", "olora", "corda", "loftq")
"""Ways to begin a LoRA that change the weights under it, when it is loaded too."""
AROUND_LAYERS = ("lm_head", "embed_tokens", "wte", "embed_in", "embed_out", "output_layer")
"""Parts of the names of modules that a draft shares with the base, whatever adapter is on."""


class FleetTarget(Target):
    """A base with many adapters, of which each row of a batch is read with its own.

    Whose an answer is, the beginning of its id says: "NAME/...". Rows that are read outside `giving` are the base's.
    """

    def __init__(self, model: Any, base: Target, adapters: Mapping[str, str]):
        """Around a PEFT model that holds the adapters (name -> folder) in their order, as `_stored(0)` and on."""
        super().__init__(
            model,
            base.tokenizer,
            [*base.sources, *adapters.values()],
            base.template,
            template_args=base.template_args,
        )
        self.name = f"{base.name} and {len(adapters)} adapters"
        self.rendered_at = base.rendered_at
        self.names = tuple(adapters)
        self._stored = {name: _stored(at) for at, name in enumerate(adapters)} | {BASE: NO_ADAPTER}
        self._rows: list[str] | None = None

    @contextlib.contextmanager
    def giving(self, answers: Sequence[Answer]) -> Iterator[None]:
        self._rows = [self._stored[answer.id.partition("/")[0]] for answer in answers]
        try:
            yield
        finally:
            self._rows = None

    def read(
        self,
        tokens_BT: Tensor,
        aux_layers: Sequence[int],
        cache: Any = None,
        *,
        keep: Tensor | int = 0,
        **placed: Any,
    ) -> Reading:
        rows = self._rows or [NO_ADAPTER] * len(tokens_BT)
        return super().read(tokens_BT, aux_layers, cache, keep=keep, adapter_names=rows, **placed)


@contextlib.contextmanager
def fleet_on(base: Target, adapters: Mapping[str, str]) -> Iterator[FleetTarget]:
    """In the block, the base with all these LoRA adapters (name -> folder); the base must not be used meanwhile.

    Raises UserError for an adapter that does not fit, that changes more than the base's layers, or that is none which
    PEFT applies row by row: what engines serve so is plain LoRA.
    """
    for name, folder in adapters.items():
        _check_row_by_row(name, Path(folder))
    model = None
    try:
        for at, folder in enumerate(adapters.values()):
            model = with_adapter(model or base.model, folder, "adapter", _stored(at))
        assert model is not None, "a fleet without adapters"
        fleet = FleetTarget(model, base, adapters)
        with as_sentence(
            f"{base.name} ({type(base.model).__name__}) cannot be read with an adapter of its own in each row; adapt a draft "
            "for each (redraft adapt --target-adapter)"
        ):
            _try(fleet)
        yield fleet
    finally:
        if model is not None:
            model.unload()


@torch.no_grad()
def _try(fleet: FleetTarget) -> None:
    """Read a row with each adapter, which some families' layers do not take."""
    rows = [Answer(f"{name}/try", (0,), (0,), 1, "length") for name in [*fleet.names, BASE]]
    with fleet.giving(rows):
        fleet.read(torch.zeros(len(rows), 3, dtype=torch.long, device=fleet.device), (), keep=1)


def _stored(at: int) -> str:
    """An adapter's name in the model: those that users give may hold dots, which PyTorch refuses."""
    return f"member{at}"


def _check_row_by_row(name: str, folder: Path) -> None:
    _check_leaves_base(folder)
    if not (folder / "adapter_config.json").is_file():
        return  # which is refused when it is loaded
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    kind = str(config.get("peft_type"))
    variants = [
        key
        for key in ("use_dora", "alora_invocation_tokens", "target_parameters", "megatron_config")
        if config.get(key)
    ]
    if kind != "LORA" or variants:
        what = f"{kind} with {variants[0]}" if variants else kind
        raise UserError(
            f"adapter {name} ({folder}) is {what}, and a fleet takes plain LoRA, which engines serve side by side; merge it into a model and adapt a draft "
            "for that alone (redraft adapt)"
        )
    with safe_open(folder / ADAPTER, framework="pt") as stream:
        around = [key for key in stream.keys() if any(part in key for part in AROUND_LAYERS)]  # noqa: SIM118
    if around:
        raise UserError(
            f"adapter {name} ({folder}) changes {around[0]}, which a draft takes from the base for all adapters; leave "
            "it out of the fleet and adapt a draft for it alone (redraft adapt --target-adapter)"
        )


@contextlib.contextmanager
def adapter_on(base: Target, adapter: str) -> Iterator[Target]:
    """In the block, the base with a PEFT adapter on its own weights; the base must not be used meanwhile.

    Raises UserError for an adapter that does not fit, and for one that replaces whole parts of the base, which
    could not be put back.
    """
    _check_leaves_base(Path(adapter))
    model = None
    try:
        model = with_adapter(base.model, adapter, "adapter")
        found = Target(
            model,
            base.tokenizer,
            [*base.sources, adapter],
            base.template,
            template_args=base.template_args,
        )
        found.rendered_at = base.rendered_at
        yield found
    finally:
        if model is not None:
            model.unload()


def _check_leaves_base(folder: Path) -> None:
    if not (folder / "adapter_config.json").is_file():
        return  # which is refused when it is loaded
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    parts = [key for key in ("modules_to_save", "trainable_token_indices") if config.get(key)]
    if config.get("bias", "none") != "none":
        parts.append("bias")
    start = str(config.get("init_lora_weights", ""))
    if start.lower().startswith(
        REWRITING
    ):  # PEFT takes the adapter's start out of the base's weights again
        parts.append(f"init_lora_weights: {start}")
    if (folder / ADAPTER).is_file():
        with safe_open(folder / ADAPTER, framework="pt") as stream:
            parts += [n for n in stream.keys() if "lora_" not in n and "magnitude" not in n][:1]  # noqa: SIM118
    if parts:
        raise UserError(
            f"adapter {folder} changes parts of the base itself ({parts[0]}), so the base would not be the same after it; check "
            "it by itself (redraft check --target-adapter), or save it as plain LoRA"
        )


def with_adapter(
    model: Any, adapter: str, flag: str = "--target-adapter", name: str = "default"
) -> Any:
    """The model with a PEFT adapter on top, or with one more, unmerged as engines serve it (a bf16 merge rounds).

    `flag` is what messages call it, `name` what PEFT does.
    """
    from peft import PeftConfig, PeftModel

    if any(weight.is_meta for weight in model.parameters()):
        raise UserError(
            f"{flag} {adapter}: some layers of the target are not on a GPU (--device-map), and PEFT adds nothing "
            "to those; merge the adapter into the model first"
        )
    folder = Path(adapter)
    if folder.exists() and not (folder / "adapter_config.json").is_file():
        raise UserError(f"{flag} {adapter}: expected a PEFT folder with adapter_config.json")
    if folder.exists() and not (folder / ADAPTER).is_file():
        raise UserError(
            f"{flag} {adapter}: expected its weights in {ADAPTER}; pickles (.bin) are not opened"
        )
    what = f"{flag} {adapter} does not fit this target"
    with as_sentence(what):
        settings = PeftConfig.from_pretrained(adapter)
    if settings.is_prompt_learning:
        raise UserError(
            f"{flag} {adapter}: {settings.peft_type.value} puts virtual tokens before the prompt, "
            "which engines and drafts do not see; adapters that change weights are read (LoRA and the like)"
        )
    with as_sentence(what), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of missing weights, which are refused below
        if isinstance(model, PeftModel):
            adapted = model
            adapted.load_adapter(adapter, name)
        else:
            adapted = PeftModel.from_pretrained(model, adapter, name)
    if folder.exists():
        try:
            _check_adapter_weights(adapter, adapted, folder / ADAPTER, name)
        except UserError:
            adapted.unload()
            raise
    return adapted


def _check_adapter_weights(adapter: str, adapted: Any, path: Path, name: str) -> None:
    """Raise UserError unless the adapter's file holds the adapter's weights and no others."""
    from peft import get_peft_model_state_dict

    wanted = set(get_peft_model_state_dict(adapted, adapter_name=name, save_embedding_layers=False))
    with safe_open(path, framework="pt") as stream:
        stored = set(stream.keys())
    missing = sorted(wanted - stored)
    surplus = sorted(stored - wanted - set(adapted.state_dict()))
    for names, what in (
        (missing, "weights of this adapter are not in its file"),
        (surplus, "tensors of its file find no place in this target"),
    ):
        if names:
            raise UserError(
                f"--target-adapter {adapter}: {len(names)} {what}, first {names[0]}; was it trained for "
                "another model, or saved from inside a wrapper?"
            )


def note_unused(adapter: Path, tokenizer: Any, chat_template: str | None) -> None:
    """Say what lies in the adapter's folder and is not used: trainers save tokenizer and template there."""
    template = adapter / "chat_template.jinja"
    if template.is_file() and chat_template is None:
        own = template.read_text(encoding="utf-8", errors="replace")
        if own != getattr(tokenizer, "chat_template", None):
            say(
                f"{template} differs from the target's chat template and is not used; if the adapter is "
                f"served with it, pass --chat-template {template}"
            )
    vocabulary = adapter / "tokenizer.json"
    if vocabulary.is_file():
        try:
            added = json.loads(vocabulary.read_text(encoding="utf-8")).get("added_tokens") or []
            names = {entry["content"] for entry in added}
        except (ValueError, TypeError, KeyError, AttributeError):
            return  # no tokenizer that anything would load
        new = sorted(names - set(tokenizer.get_vocab()))
        if new:
            say(
                f"{vocabulary} has {len(new)} tokens that the target's tokenizer lacks (first {new[0]}) and is "
                "not used; save the adapter merged into the model, with that tokenizer, to adapt for it"
            )
