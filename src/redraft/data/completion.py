"""A prompt as the body of a /v1/completions request, and its reply as an answer.

The prompt travels as token ids, rendered here by the target's template, and the answer comes back
as token ids where the server returns them (`return_token_ids`). From a server that does not, the text
is tokenised again, which need not give the tokens that were sampled: that is marked.

Every sampling setting is sent, off or not: servers may take what is missing from the model's
generation config, a repetition penalty for instance.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..decode.sampling import Sampling
from ..records import Answer, Prompt
from ..rng import derived_seed
from ..target import Target
from .endpoint import Trouble

UNBOUNDED = 1 << 30


@dataclass(frozen=True)
class Heard:
    """An answer and how far it can be trusted.

    `retold`: its tokens are those of the text, not the server's own. `doubtful`: and they are not as
    many as the server counted, or do not give the text again. `short`: the server ended it before
    the length that was asked for.
    """

    answer: Answer
    retold: bool = False
    doubtful: bool = False
    short: bool = False


@dataclass(frozen=True)
class Asking:
    """What every prompt of a run is asked with. The run's `seed` keys each sampled prompt's own."""

    target: Target
    sampling: Sampling
    max_new_tokens: int
    seed: int

    def room(self, prompt: Prompt, context: int = UNBOUNDED) -> int:
        """The longest answer that fits the target's context and the server's, in tokens."""
        return self.room_after(len(prompt.tokens), context)

    def room_after(self, length: int, context: int = UNBOUNDED) -> int:
        """The same after a prompt of `length` tokens."""
        return min(self.max_new_tokens, min(self.target.max_positions, context) - length)

    def body(self, prompt: Prompt, model: str, context: int = UNBOUNDED) -> dict[str, Any]:
        """The request for one prompt."""
        s = self.sampling
        drawn = derived_seed(self.seed, "answer", prompt.id) % (1 << 31)
        return {
            "model": model,
            "prompt": list(prompt.tokens),
            "max_tokens": max(self.room(prompt, context), 1),
            "temperature": s.temperature,
            "top_p": s.top_p,
            "top_k": s.top_k or -1,
            "min_p": s.min_p,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop_token_ids": list(self.target.stop_ids),
            "return_token_ids": True,
            **({"seed": drawn} if s.temperature else {}),
        }

    def hear(self, prompt: Prompt, reply: dict[str, Any], asked: int) -> Heard:
        """The answer in a reply to a request for `asked` tokens. Raises Trouble for half a one."""
        choice = first_choice(reply)
        finish = choice.get("finish_reason")
        if finish not in ("stop", "length"):
            raise Trouble(f"broke off an answer (finish_reason: {finish!r})")
        retold = choice.get("token_ids") is None
        tokens, doubtful = (
            self._from_text(choice, reply, finish == "stop")
            if retold
            else (token_ids(choice, self.target), False)
        )
        end = next((i for i, t in enumerate(tokens) if t in self.target.stop_ids), None)
        if end is None and finish == "stop" and choice.get("stop_reason") in self.target.stop_ids:
            tokens, end = (
                (*tokens, choice["stop_reason"]),
                len(tokens),
            )  # it keeps the stop to itself
        tokens = tokens[: min(asked, len(tokens) if end is None else end + 1)]
        if not tokens:
            raise Trouble("gave an empty answer")
        # Without a stop token an answer is one that was cut, whatever the server calls it.
        ended = "stop" if tokens[-1] in self.target.stop_ids else "length"
        short = ended == "length" and len(tokens) < self.room(prompt)
        keyed = asdict(self.sampling) if self.sampling.temperature else {}
        answer = Answer(prompt.id, prompt.tokens, tokens, len(tokens), ended, **keyed)
        return Heard(answer, retold, doubtful, short)

    def _from_text(
        self, choice: dict[str, Any], reply: dict[str, Any], stopped: bool
    ) -> tuple[tuple[int, ...], bool]:
        """The tokens of an answer's text, its stop token added; and whether they are doubtful."""
        text = choice.get("text")
        if not isinstance(text, str):
            raise Trouble("gave neither token ids nor a text")
        tokenizer = self.target.tokenizer
        tokens = tuple(tokenizer.encode(text, add_special_tokens=False))
        doubtful = tokenizer.decode(list(tokens), skip_special_tokens=False) != text
        counted = (reply.get("usage") or {}).get("completion_tokens")
        if isinstance(counted, int):  # some servers count the stop token, some do not
            doubtful |= counted not in (len(tokens), len(tokens) + stopped)
        stops = self.target.stop_ids
        if stopped and stops and not (tokens and tokens[-1] in stops):
            named = [choice.get("stop_reason"), tokenizer.eos_token_id]
            tokens += (next((stop for stop in named if stop in stops), stops[0]),)
        return tokens, doubtful


def first_choice(reply: dict[str, Any]) -> dict[str, Any]:
    """The one completion in a reply. Raises Trouble when there is none."""
    choices = reply.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise Trouble(
            f"replied without a completion (fields: {', '.join(map(str, reply)) or 'none'})"
        )
    found: dict[str, Any] = choices[0]
    return found


def token_ids(choice: dict[str, Any], target: Target) -> tuple[int, ...]:
    """The token ids of a completion. Raises Trouble for what are no ids of the target's."""
    ids = choice["token_ids"]
    if not isinstance(ids, list) or not all(
        type(i) is int and 0 <= i < target.vocab_size for i in ids
    ):
        raise Trouble(f"gave token ids that the target's vocabulary of {target.vocab_size} lacks")
    return tuple(ids)
