"""A prompt as the body of a /v1/completions request, and its reply as an answer.

The prompt travels as token ids, rendered here by the target's template, and the answer comes back
as token ids where the server returns them (`return_token_ids`). From a server that does not, the text
is tokenised again, which need not give the tokens that were sampled: that is marked.

Every sampling setting is sent, off or not: servers may take what is missing from the model's
generation config, a repetition penalty for instance.

Lookahead tokens come with a second request: the prompt and the whole answer, to be continued by so many
tokens with `ignore_eos` and without stop tokens. The server reads again what it has just written, from
its prefix cache if it has one; asking for both at once would generate `max_new_tokens` for every prompt.
Greedy tokens are those of one long request up to near-ties; sampled ones are drawn with a seed of
their own, derived like the answer's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..core.records import Answer, Prompt
from ..core.rng import derived_seed
from ..decoding.sampling import Sampling
from ..models.target import Target
from .reply import Trouble, Unable, finish_of, first_choice

UNBOUNDED = 1 << 30
NO_IDS = (
    "returns no token ids, and lookahead tokens (--lookahead) must be those that it generated; ask a server "
    "that returns them (vLLM from 0.10.2 on, a recent SGLang), or leave out --endpoint"
)


@dataclass(frozen=True)
class Completion:
    """An answer and how far it can be trusted.

    `retokenised`: its tokens are those of the text, not the server's own. `doubtful`: and they are not as
    many as the server counted, or do not give the text again. `short`: the server ended it before
    the length that was asked for.
    """

    answer: Answer
    retokenised: bool = False
    doubtful: bool = False
    short: bool = False


@dataclass(frozen=True)
class Asking:
    """What every prompt of a run is asked with. The run's `seed` keys each sampled prompt's own.

    `lookahead` is how many lookahead tokens are kept past each answer's end.
    """

    target: Target
    sampling: Sampling
    max_new_tokens: int
    seed: int
    lookahead: int = 0

    def space(self, prompt: Prompt, context: int = UNBOUNDED) -> int:
        """The longest answer that fits the target's context and the server's with its lookahead tokens."""
        return self.space_after(len(prompt.tokens), context)

    def space_after(self, length: int, context: int = UNBOUNDED) -> int:
        """The same after a prompt of `length` tokens."""
        most = min(self.target.max_positions, context) - length - self.lookahead
        return min(self.max_new_tokens, most)

    def body(self, prompt: Prompt, model: str, context: int = UNBOUNDED) -> dict[str, Any]:
        """The request for one prompt's answer."""
        most = max(self.space(prompt, context), 1)
        stops = {"stop_token_ids": list(self.target.stop_ids)}
        return self._request(prompt.tokens, most, model, ("answer", prompt.id)) | stops

    def lookahead_body(self, so_far: Answer, count: int, model: str) -> dict[str, Any]:
        """The request for the next `count` tokens after an answer, whatever they are."""
        tokens = (*so_far.prompt, *so_far.tokens)
        # Without `stop_token_ids` of its own: servers heed those in spite of `ignore_eos`.
        going_on = {"stop_token_ids": [], "ignore_eos": True}
        return self._request(tokens, count, model, ("lookahead", so_far.id)) | going_on

    def _request(
        self, tokens: Sequence[int], most: int, model: str, place: tuple[str, str]
    ) -> dict[str, Any]:
        s = self.sampling
        drawn = derived_seed(self.seed, *place) % (1 << 31)
        return {
            "model": model,
            "prompt": list(tokens),
            "max_tokens": most,
            "temperature": s.temperature,
            "top_p": s.top_p,
            "top_k": s.top_k or -1,
            "min_p": s.min_p,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "return_token_ids": True,
            **({"seed": drawn} if s.temperature else {}),
        }

    def read(self, prompt: Prompt, reply: dict[str, Any], asked: int) -> Completion:
        """The answer in a reply to a request for `asked` tokens.

        Raises Trouble for half a one, and Unable for text where lookahead tokens are to follow.
        """
        choice = first_choice(reply)
        finish = finish_of(choice)
        retokenised = choice.get("token_ids") is None
        if retokenised and self.lookahead:
            raise Unable(NO_IDS)
        tokens, doubtful = (
            self._from_text(choice, reply, finish == "stop")
            if retokenised
            else (token_ids(choice["token_ids"], self.target), False)
        )
        end = next((i for i, t in enumerate(tokens) if t in self.target.stop_ids), None)
        stop = self._stop_of(choice)
        if end is None and finish == "stop" and stop is not None:  # it keeps the stop to itself
            tokens, end = (*tokens, stop), len(tokens)
        tokens = tokens[: min(asked, len(tokens) if end is None else end + 1)]
        if not tokens:
            raise Trouble("gave an empty answer")
        # Without a stop token an answer is one that was cut, whatever the server calls it.
        ended = "stop" if tokens[-1] in self.target.stop_ids else "length"
        short = ended == "length" and len(tokens) < self.space(prompt)
        keyed = asdict(self.sampling) if self.sampling.temperature else {}
        answer = Answer(prompt.id, prompt.tokens, tokens, len(tokens), ended, **keyed)
        return Completion(answer, retokenised, doubtful, short)

    def read_lookahead(self, reply: dict[str, Any], count: int) -> tuple[int, ...]:
        """The `count` tokens in a reply to `lookahead_body`. Raises Unable when it ended before them."""
        choice = first_choice(reply)
        finish = finish_of(choice)
        if choice.get("token_ids") is None:
            raise Unable(NO_IDS)
        ahead = token_ids(choice["token_ids"], self.target)[:count]
        if len(ahead) == count:
            return ahead
        if finish == "stop":
            raise Unable(
                f"stopped after {len(ahead)} of {count} tokens although asked to go on (ignore_eos), so it "
                "gives no lookahead tokens (--lookahead); ask a server that does (vLLM, SGLang), or leave "
                "out --endpoint"
            )
        raise Trouble(f"gave {len(ahead)} of {count} tokens past an answer's end")

    def _stop_of(self, choice: dict[str, Any]) -> int | None:
        """The stop token that a server names next to an answer."""
        named = choice.get("stop_reason")
        return named if type(named) is int and named in self.target.stop_ids else None

    def _from_text(
        self, choice: dict[str, Any], reply: dict[str, Any], stopped: bool
    ) -> tuple[tuple[int, ...], bool]:
        """The tokens of an answer's text, its stop token added; and whether they are doubtful."""
        text = choice.get("text")
        if not isinstance(text, str):
            raise Trouble("gave neither token ids nor a text")
        tokenizer = self.target.tokenizer
        tokens = token_ids(tokenizer.encode(text, add_special_tokens=False), self.target)
        doubtful = tokenizer.decode(list(tokens), skip_special_tokens=False) != text
        usage = reply.get("usage")
        counted = usage.get("completion_tokens") if isinstance(usage, dict) else None
        if isinstance(counted, int):  # some servers count the stop token, some do not
            doubtful |= counted not in (len(tokens), len(tokens) + stopped)
        stops = self.target.stop_ids
        if stopped and stops and not (tokens and tokens[-1] in stops):
            named = [self._stop_of(choice), tokenizer.eos_token_id]
            tokens += (next((stop for stop in named if stop in stops), stops[0]),)
        return tokens, doubtful


def token_ids(ids: Any, target: Target) -> tuple[int, ...]:
    """The token ids of a completion. Raises Trouble for what are no ids of the target's."""
    if not isinstance(ids, list) or not all(
        type(i) is int and 0 <= i < target.vocab_size for i in ids
    ):
        raise Trouble(f"gave token ids that the target's vocabulary of {target.vocab_size} lacks")
    return tuple(ids)
