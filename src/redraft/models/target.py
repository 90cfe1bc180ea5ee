"""The target: the fine-tuned Hugging Face causal LM that a draft is aligned with.

Hidden states use Hugging Face numbering throughout redraft: hs[0] is the embedding output, hs[k]
the output of layer k-1, hs[n] the state after the final norm (n = number of layers).

Shapes: B batch, T tokens, V target vocabulary, H target hidden size, F = aux layers * H.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateSyntaxError
from torch import Tensor

from ..core.errors import UserError
from ..core.records import Answer
from . import versions
from .gguf_file import SUFFIX as GGUF
from .gguf_file import WEIGHTS, gguf_file
from .head import logits_from
from .templates import DIRECTIVES, FIXED_TIME, check_variables, unreadable
from .tool_calls import forms, written_as_python, written_as_text

MOST_ADDED = 64
"""Tokens added by a fine-tune that are looked for when a draft was made for the tokenizer without them."""
SAMPLES, BLOCK = 64, 4096
"""Blocks of a weight file that `weights_hash` looks at, and their bytes."""


@dataclass(frozen=True)
class Reading:
    """One forward pass of the target: the auxiliary features and the next-token logits."""

    features_BTF: Tensor
    logits_BTV: Tensor


class Target:
    """A loaded target model with its tokenizer. Its weights are never changed.

    `runs_layers` is False where reading a row looks up stored states, so that keeping them again saves nothing.
    """

    runs_layers = True

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        sources: Sequence[str],
        template: str | None = None,
        *,
        template_args: Mapping[str, Any] | None = None,
        freeze: bool = True,
    ):
        """Around a loaded model, which is set to evaluation and frozen unless `freeze` is off.

        `template_args` are variables that the chat template is given, such as `enable_thinking`.
        """
        self.model: Any = model.eval().requires_grad_(False) if freeze else model
        self.tokenizer = tokenizer
        self.sources = tuple(sources)
        self.name = "+".join(sources)
        # The commit of a Hub snapshot; local folders have none.
        self.revision: str | None = getattr(self.model.config, "_commit_hash", None)
        self.template = template
        self.template_args = dict(template_args or {})
        self.rendered_at = datetime.now()
        """The time that a chat template is given when it asks; kept next to answers, see `prompts/clock.py`."""
        config = self.model.config.get_text_config()
        self.hidden_size: int = config.hidden_size
        self.num_layers: int = config.num_hidden_layers
        self.vocab_size: int = config.vocab_size
        if self.head is not None and _contiguous not in self.head._forward_pre_hooks.values():
            self.head.register_forward_pre_hook(_contiguous)
        self.max_positions: int = getattr(config, "max_position_embeddings", 1 << 30)
        self.context_note = ""
        if (switch := _frequency_switch(config)) and switch[1] < self.max_positions:
            kind, self.max_positions = switch
            self.context_note = (
                f" (its {kind} rotary frequencies change past that, where plain and cached passes "
                "compute different functions)"
            )

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = next(self.model.parameters()).dtype
        return dtype

    @property
    def parameter_count(self) -> int:
        """How many numbers the whole model has."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def embedding_VH(self) -> Tensor:
        """The input embedding matrix, which engines share with a draft that carries none."""
        weight: Tensor = self.model.get_input_embeddings().weight
        return weight

    @property
    def head(self) -> Any:
        """The module that turns the last hidden state into logits; some drafts share it."""
        return self.model.get_output_embeddings()

    @property
    def head_VH(self) -> Tensor | None:
        """The output head's matrix; None where there is none in plain numbers, as in quantised models."""
        weight: Tensor | None = getattr(self.head, "weight", None)
        if weight is None or not weight.is_floating_point() or len(weight) < self.vocab_size:
            return None
        return weight.detach()

    @property
    def decoder(self) -> Any:
        """The model without its head, in the usual model layouts; None in others."""
        return getattr(self.model, "get_decoder", lambda: None)()

    @property
    def final_norm(self) -> Any:
        """The module before the head, in the usual model layouts; None in others."""
        return getattr(self.decoder, "norm", None)

    @property
    def norm_scale(self) -> Tensor:
        """What the final norm multiplies by, [H]: a state after it, divided by this, is the state before it but for its
        length. Raises UserError where there is no such norm.
        """
        with torch.no_grad():
            ones = torch.ones(1, self.hidden_size, device=self.device, dtype=self.dtype)
            scale: Tensor | None = None if self.final_norm is None else self.final_norm(ones)[0]
        if scale is None or not (scale.is_meta or bool(scale.all())):
            raise UserError(
                f"the state before the final norm of target {self.name} cannot be had from the state after it, which "
                "this draft needs"
            )
        return scale

    @property
    def template_text(self) -> str:
        """The chat template in use; '' where there is none."""
        return self.template or str(getattr(self.tokenizer, "chat_template", None) or "")

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Token ids that end an answer: the generation config's, and the tokenizer's own."""
        ids = self.model.generation_config.eos_token_id
        listed = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
        if self.tokenizer is not None and self.tokenizer.eos_token_id is not None:
            listed.append(self.tokenizer.eos_token_id)
        return tuple(sorted(set(listed)))

    def read(
        self,
        tokens_BT: Tensor,
        aux_layers: Sequence[int],
        cache: Any = None,
        *,
        keep: Tensor | int = 0,
        **placed: Any,
    ) -> Reading:
        """Run the target once over `tokens_BT`, continuing `cache` if one is given.

        Rows are read without an attention mask: pad on the right only, where causality hides the
        padding from every real position. `aux_layers` are hs[] indices; features are concatenated in
        the order of `aux_layers` (F = 0 without any). `keep` limits the logits: the last so many (0:
        all), or those of the token indices given. `placed` are `position_ids` and `attention_mask`
        of rows that need them.
        """
        if cache is None and tokens_BT.shape[1] > self.max_positions:
            raise UserError(
                f"a row of {tokens_BT.shape[1]} tokens is longer than the context of target "
                f"{self.name}, {self.max_positions} tokens{self.context_note}; shorten it, or leave it out"
            )
        named = versions.at_least(versions.NAMES_STATES)
        output = self.model(
            input_ids=tokens_BT,
            past_key_values=cache,
            use_cache=cache is not None,
            output_hidden_states=(list(aux_layers) if named else bool(aux_layers)) or None,
            logits_to_keep=keep,
            **placed,
        )
        if not aux_layers:
            return Reading(output.logits[..., :0], output.logits)
        # Of a target on several devices each layer leaves its states on its own.
        place = output.logits.device
        features = [output.hidden_states[aux_layer].to(place) for aux_layer in aux_layers]
        return Reading(torch.cat(features, dim=-1), output.logits)

    def giving(self, answers: Sequence[Answer]) -> contextlib.AbstractContextManager[None]:
        """In the block, rows that are read are these answers', in their order, and are read as what gave them."""
        return contextlib.nullcontext()

    def logits_from(self, last_NH: Tensor, columns_D: Tensor | None = None) -> Tensor:
        """Logits [N, V] of states after the final norm (hs[n]), as the model itself makes them.

        With `columns_D` those of these token ids alone, [N, D].
        """
        return logits_from(self.model, last_NH, columns_D)

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        answered: bool = False,
        tools: Sequence[dict[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation under the target's chat template.

        With `answered` the last (assistant) message is included and no generation prompt follows.
        `tools` are the functions that the target may call, as JSON schemas; `variables` are for the
        template and win over `template_args`.
        Raises UserError when there is no chat template, ValueError when it refuses the roles.
        """
        if not self.template_text:
            raise UserError(
                f"the tokenizer of {self.name} has no chat template, so prompts cannot be rendered "
                "as the target saw them; pass one with --chat-template FILE (a Jinja file)"
            )
        variables = {**self.template_args, **(variables or {})}
        check_variables(variables)
        how = {
            "tools": list(tools) if tools else None,
            "add_generation_prompt": not answered,
            **variables,
        }
        if any(message.get("tool_calls") for message in messages):
            messages = self._as_it_reads_calls(messages, how)
        return self.checked(list(self._apply(messages, how, tokenize=True)["input_ids"]))

    def render_text(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        answered: bool = False,
        tools: Sequence[dict[str, Any]] | None = None,
    ) -> str:
        """The text that `render` makes token ids of; raises as it does."""
        how = {"tools": tools, "add_generation_prompt": not answered, **self.template_args}
        return str(self._apply(messages, how, tokenize=False))

    def checked(self, ids: list[int]) -> list[int]:
        """The token ids. Raises UserError for one that the embedding does not have."""
        rows = self.embedding_VH.shape[0]
        if ids and max(ids) >= rows:
            token = self.tokenizer.convert_ids_to_tokens(max(ids))
            raise UserError(
                f"the tokenizer of {self.name} writes {token!r} as token {max(ids)}, but the model's embedding "
                f"has {rows} rows: the tokenizer is not this model's. Put the model's own tokenizer in its "
                "folder, or train the model with an embedding of the tokenizer's size"
            )
        return ids

    def _apply(
        self, messages: Sequence[dict[str, Any]], how: dict[str, Any], tokenize: bool
    ) -> Any:
        """What the tokenizer's `apply_chat_template` makes of a conversation, under this target's template,
        at `rendered_at`; `how` are further arguments of that function."""
        try:
            template = self.tokenizer.get_chat_template(self.template, tools=how["tools"])
            if "strftime_now" in template:
                template = FIXED_TIME + template
                times = {name: self.rendered_at.strftime(name) for name in DIRECTIVES}
                how = {**how, "rendered_at": times}
            return self.tokenizer.apply_chat_template(
                list(messages),
                chat_template=template,
                tokenize=tokenize,
                return_dict=tokenize,
                **how,
            )
        except TemplateSyntaxError as problem:
            raise unreadable(f"the chat template of {self.name}", problem) from None
        except Exception as problem:
            # Templates are user code in Jinja and raise what they like; name the source.
            raise ValueError(f"the chat template refused the row: {problem}") from problem

    def _as_it_reads_calls(
        self, messages: Sequence[dict[str, Any]], how: dict[str, Any]
    ) -> Sequence[dict[str, Any]]:
        """The messages with the arguments of tool calls in the form that the template writes as JSON."""

        def rendered(form: Sequence[dict[str, Any]]) -> str | None:
            try:
                return str(self._apply(form, how, tokenize=False))
            except ValueError:
                return None  # where both are refused, rendering the first raises the reason

        objects, texts = forms(messages)
        first = rendered(objects)
        if first is not None and not written_as_python(messages, first):
            return objects
        second = rendered(texts)
        fits = second is not None and (first is None or written_as_text(messages, second))
        return texts if fits else objects

    def fingerprint(self, dtype: torch.dtype | None = None) -> str:
        """Changes when the weights, the adapter, the chat template or the dtype change.

        `dtype` asks for the fingerprint the same target would have in another dtype.
        """
        parts = [fingerprint(source) for source in self.sources]
        parts += [self.template_hash(), str(dtype or self.dtype), str(self.revision)]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]

    def weights_hash(self) -> str:
        """Identifies the weights alone, wherever their folder lies (see `weights_hash`)."""
        parts = [weights_hash(source) for source in self.sources]
        return hashlib.sha256(" ".join([*parts, str(self.revision)]).encode()).hexdigest()[:16]

    @cached_property
    def earlier_tokenizer_hashes(self) -> frozenset[str]:
        """The tokenizer's hashes without its last token, its last two, and so on, up to MOST_ADDED."""
        most = min(len(self.tokenizer.get_added_vocab()), MOST_ADDED)
        return frozenset(self.tokenizer_hash(without=n) for n in range(1, most + 1))

    def template_hash(self) -> str:
        text = self.template or str(getattr(self.tokenizer, "chat_template", None))
        if self.template_args:
            text += json.dumps(self.template_args, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def tokenizer_hash(self, without: int = 0) -> str:
        """Identifies the mapping from token to id, whatever files it is stored in.

        `without` leaves out so many of the highest ids, to compare an extended vocabulary with the one before.
        """
        tokens = sorted(self.tokenizer.get_vocab().items(), key=lambda entry: entry[1])
        vocabulary = json.dumps(sorted(tokens[: len(tokens) - without]))
        return hashlib.sha256(vocabulary.encode()).hexdigest()[:16]


def default_aux_layers(num_layers: int) -> tuple[int, int, int]:
    """The three hidden states every engine feeds an EAGLE-3 draft: hs[2], hs[n//2], hs[n-3].

    Raises UserError for fewer than 7 layers, where they collapse into each other.
    """
    aux_layers = (2, num_layers // 2, num_layers - 3)
    if not aux_layers[0] < aux_layers[1] < aux_layers[2]:
        raise UserError(
            f"the default aux layers hs[2], hs[n//2], hs[n-3] collapse to {aux_layers} in a target of "
            f"{num_layers} layers (7 are needed); name three layers with --aux-layers, for example "
            f"--aux-layers {','.join(str(t) for t in _spread(num_layers))}"
        )
    return aux_layers


def check_aux_layers(aux_layers: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Ascending, distinct hs[] indices below hs[n] (engines read hs[n] before its norm, HF after).

    Raises UserError naming the aux layer that is out of range.
    """
    for aux_layer in aux_layers:
        if not 0 <= aux_layer < num_layers:
            raise UserError(
                f"aux layer {aux_layer} is out of range: a target of {num_layers} layers has hs[0] (embeddings) "
                f"to hs[{num_layers - 1}]; hs[{num_layers}] is left out because engines aux layer it "
                "before the final norm and Transformers after"
            )
    if list(aux_layers) != sorted(set(aux_layers)):
        raise UserError(
            f"aux layers {tuple(aux_layers)} must ascend without repeats: engines sort and deduplicate them, "
            "so any other order would be served differently from how it was trained"
        )
    return tuple(aux_layers)


def fingerprint(source: str) -> str:
    """A short hash that changes when a local model changes, without reading its weights.

    From each safetensors file's header, size and modification time, other weight files' size and
    time, and the JSON files' bytes; a Hub id stands for itself (see `Target.revision`).
    """
    digest = hashlib.sha256()
    if not (files := _files(source)):
        digest.update(source.encode())
    for path in files:
        if path.suffix in (".bin", ".model", ".pt", GGUF):
            digest.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
        elif path.suffix == ".safetensors":
            with path.open("rb") as stream:
                header = stream.read(8)
                digest.update(header + stream.read(int.from_bytes(header, "little")))
            digest.update(f"{path.stat().st_size} {path.stat().st_mtime_ns}".encode())
        elif path.suffix in (".json", ".jinja"):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def weights_hash(source: str) -> str:
    """A short hash of a local model's weights that a copy has too, without reading all of them.

    From each weight file's name, size and SAMPLES blocks spread over it; a Hub id stands for itself.
    """
    digest = hashlib.sha256()
    if not (files := _files(source)):
        digest.update(source.encode())
    for path in files:
        if path.suffix in (".safetensors", ".bin", ".pt", GGUF):
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with path.open("rb") as stream:
                for i in range(SAMPLES):
                    stream.seek(max(size - BLOCK, 0) * i // (SAMPLES - 1))
                    digest.update(stream.read(BLOCK))
    return digest.hexdigest()[:16]


def _files(source: str) -> list[Path]:
    """The files of a local model, none of a Hub id. Of a GGUF file what lies next to it, but for other weights."""
    weights = gguf_file(source)
    folder = Path(source) if weights is None else weights.parent
    others = (GGUF,) if weights is None else (GGUF, *WEIGHTS)
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in files if path == weights or path.suffix not in others]


def _contiguous(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The head's input in one block. The last states of several rows are a view with gaps, for which
    PyTorch copies the head's weight once per row (2.4 GB for 16 rows, 150,000 tokens, hidden 512)."""
    return (args[0].contiguous(), *args[1:])


def _frequency_switch(config: Any) -> tuple[str, int] | None:
    """The rope type and the length up to which its frequencies are those of the first position.

    None where they never depend on how long a sequence is.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope] if "rope_type" in rope else [r for r in rope.values() if isinstance(r, dict)]
    found = []
    for kind in kinds:
        name = str(kind.get("rope_type"))
        if name == "longrope" or "dynamic" in name:
            most = kind.get("original_max_position_embeddings")
            most = most or getattr(config, "original_max_position_embeddings", None)
            found.append((name, int(most or config.max_position_embeddings)))
    return min(found, key=lambda f: f[1], default=None)


def _spread(num_layers: int) -> tuple[int, ...]:
    """Three distinct layers of a shallow target, as far apart as they get."""
    last = max(num_layers - 1, 0)
    return tuple(sorted({min(1, last), (last + 1) // 2, last}))
