"""Is the model behind an endpoint the target? Found out by asking, before any answer is.

Three questions, each as far as the server lets itself be asked:
the name     /v1/models lists the model;
the prompts  /tokenize renders conversations to the target's own token ids (tokenizer and template);
the weights  the server continues a few prompts greedily, with log-probabilities, and the target reads
             what it wrote.

Where lookahead tokens are wanted there is a fourth: the server continues the same prompts past their stop
tokens, and what it writes is the target's own too. (Some servers forbid stop tokens when told to ignore
them, which gives other tokens.)

On the same tokens the same weights give the same log-probabilities up to rounding: fp32 against fp16
differs by 0.001 nats a token on average, against bf16 by 0.01, and another fine-tune of the same base
by 0.8 to 8, because it also writes what the target would not. What lies within `SAME` is taken for the
target, so a copy of it that was trained a few steps further is not told apart.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..core.errors import UserError, nearest
from ..core.records import Answer, Prompt
from ..core.visible import visible
from ..decoding.sampling import Sampling
from ..models.batching import lengths_of
from ..models.target import Target
from ..serving.client import KEY, OTHER_KEY, AsyncClient
from ..serving.completion import UNBOUNDED, Asking, Completion
from ..serving.reply import Refused, Trouble, Unable, first_choice, models_of

SAME = 0.1
"""Nats a token: the most that rounding, batching and half precision explain on average."""
EXACT = 0.002
"""Nats a token: more than this against an fp32 target is half precision at the server."""
FORBIDDEN = 1.0
"""Nats: no rounding makes a token the most likely one that is so much less likely than another."""
PROBES, PROBE_TOKENS = 4, 32
CONVERSATIONS: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "Hello! What is 12345 + 67?"}],
    [
        {"role": "user", "content": "  naïve\tœuvre\n\n東京 don't {x: [1, 2]}"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Go on…"},
    ],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}],
)


@dataclass(frozen=True)
class Findings:
    """What the check of one server gave.

    `context` is the longest prompt and answer it serves, in tokens. `returns_ids` is whether answers
    come as token ids. `difference` is the mean of the log-probabilities' distance in nats over
    `compared` tokens, None without log-probabilities; `gap` how much more likely than the
    server's the target's own token is, in nats a token. `skipped` are the questions it did not answer.
    """

    model: str
    server: str
    context: int
    returns_ids: bool
    compared: int
    difference: float | None
    gap: float
    skipped: tuple[str, ...]


def describe(found: Findings) -> dict[str, Any]:
    """What is recorded of a server next to its answers."""
    return {
        "model": found.model,
        "version": found.server,
        "context": None if found.context == UNBOUNDED else found.context,
        "token_ids": "from the server" if found.returns_ids else "from its text",
        "compared_tokens": found.compared,
        "logprob_difference": None if found.difference is None else round(found.difference, 6),
        "not_checked": list(found.skipped),
    }


def remarks(url: str, found: Findings, asking: Asking, prompts: Sequence[Prompt]) -> list[str]:
    """What the user should know of a server before its answers come."""
    apart = (
        f"{found.compared} tokens agree"
        if found.difference is None
        else f"log-probabilities {found.difference:.4f} nats apart on {found.compared} tokens"
    )
    lines = [f"{url}: '{visible(found.model)}' is the target ({apart})"]
    lines += [f"NOTE: {url}: not checked: {what}" for what in found.skipped]
    if asking.target.dtype.itemsize == 4 and (found.difference or 0.0) > EXACT:
        lines.append(
            f"NOTE: {url} computes in less than the target's float32; near-ties may fall otherwise"
        )
    if not found.returns_ids:
        lines.append(
            f"NOTE: {url} returns no token ids; its text is tokenised again, which may give other "
            "tokens than it sampled. vLLM from 0.10.2 on returns them"
        )
    cut = sum(
        asking.space_after(length, found.context) < asking.space_after(length)
        for length in lengths_of(prompts)
    )
    if cut:
        lines.append(
            f"NOTE: {url} serves a context of {found.context} tokens: {cut} answers may be cut short"
        )
    return lines


async def check(
    client: AsyncClient, target: Target, prompts: Sequence[Prompt], model: str, lookahead: int = 0
) -> Findings:
    """Ask a server for its model named `model` ('': the only one), and compare with `target`.

    `lookahead` is how many lookahead tokens will be asked for. Raises UserError when it is another model,
    tokenizer or template, or cannot be used; Trouble when it does not answer for now.
    """
    asking = Asking(target, Sampling(), PROBE_TOKENS, 0, lookahead)
    return await _Check(client, target, asking, model).run(prompts)


@dataclass
class _Check:
    """The check of one server. `model` and `context` become the server's own; see `Findings`."""

    client: AsyncClient
    target: Target
    asking: Asking
    model: str
    context: int = UNBOUNDED
    skipped: list[str] = field(default_factory=list)

    async def run(self, prompts: Sequence[Prompt]) -> Findings:
        await self._find_model()
        try:
            version = str((await self.client.ask("/version")).get("version", "unknown"))[:80]
        except Refused:
            version = "unknown"
        await self._compare_rendering()
        read = await self._compare_weights(prompts)
        return Findings(self.model, version, self.context, *read, tuple(self.skipped))

    def _error(self, text: str) -> UserError:
        return UserError(f"{self.client.url}{text}")

    async def _find_model(self) -> None:
        """The model's name at the server and the context that it is served with."""
        model = self.model
        try:
            known = models_of(await self.client.ask("/v1/models"))
        except Refused as problem:
            self._refuse_key(problem)
            if not model:
                raise self._error(
                    f" lists no models ({problem}); is it an OpenAI-compatible server? If so, name its "
                    "model with --endpoint-model"
                ) from None
            self.skipped.append(f"the model's name ({problem})")
            return
        if model and model not in known:
            hint = visible(nearest(model, known))
            raise self._error(f" does not serve --endpoint-model {model}; {hint}")
        if not model and len(known) != 1:
            names = visible(", ".join(sorted(known))) or "none"
            raise self._error(
                f" serves {len(known)} models ({names}); name the one that is the target with "
                "--endpoint-model"
            )
        self.model = model or next(iter(known))
        context = known[self.model].get("max_model_len")
        if type(context) is int and context > 0:
            self.context = context

    def _refuse_key(self, problem: Refused) -> None:
        """Raise UserError for a server that wants another API key."""
        if problem.status in (401, 403) and self.client.key:
            raise self._error(f" refuses the API key in {KEY} or {OTHER_KEY} ({problem})") from None
        if problem.status in (401, 403):
            raise self._error(
                f" wants an API key ({problem}); put it into the environment variable {KEY}"
            ) from None

    async def _compare_rendering(self) -> None:
        """The server's token ids of a few conversations against the target's."""
        for messages in CONVERSATIONS:
            try:
                expected = self.target.render(messages)
            except ValueError:
                continue  # a template that refuses these roles
            except UserError:
                self.skipped.append("the chat template (the target has none)")
                return
            body = {"model": self.model, "messages": messages, "add_generation_prompt": True}
            try:
                found = (await self.client.ask("/tokenize", body)).get("tokens")
            except Refused as problem:
                self.skipped.append(f"tokenizer and chat template (/tokenize: {problem})")
                return
            if not isinstance(found, list) or not all(type(token) is int for token in found):
                self.skipped.append("tokenizer and chat template (/tokenize gives no tokens)")
                return
            if found != expected:
                same = [a == b for a, b in zip(found, expected, strict=False)]
                at = [*same, False].index(False)
                raise self._error(
                    f" renders a conversation otherwise than {self.target.name}: {len(found)} tokens for "
                    f"{len(expected)}, apart from token {at} on (it: {found[at : at + 4]}, the target: "
                    f"{expected[at : at + 4]}); its tokenizer or chat template is another. Serve the "
                    "target with its own, or give both the same file with --chat-template"
                )

    async def _compare_weights(
        self, prompts: Sequence[Prompt]
    ) -> tuple[bool, int, float | None, float]:
        """Whether token ids come back, tokens compared, mean difference and mean gap in nats."""
        space = (self.asking.space_after(length, self.context) for length in lengths_of(prompts))
        fit = (i for i, most in enumerate(space) if most >= 1)
        probes = [prompts[i] for i in itertools.islice(fit, PROBES)]
        if not probes:
            raise self._error(
                f" serves a context of {self.context} tokens, and no prompt is that short; serve the "
                "target with a longer one (--max-model-len)"
            )
        apart: list[float] = []
        gaps: list[float] = []
        returns_ids = complete = True
        for prompt in probes:
            completion, given = await self._probe(prompt)
            returns_ids &= not completion.retokenised
            if completion.doubtful:
                continue  # tokens that the server did not choose show nothing of it
            own, best = await asyncio.to_thread(
                _read, self.target, prompt, completion.answer.tokens
            )
            gaps += [b - o for o, b in zip(own, best, strict=True)]
            complete &= len(given) == len(own)
            apart += [abs(g - o) for g, o in zip(given, own, strict=False)]
        if not gaps:
            self.skipped.append("the weights (no text that it wrote gives its tokens again)")
            return returns_ids, 0, None, 0.0
        gap = sum(gaps) / len(gaps)
        difference = sum(apart) / len(apart) if complete else None
        if not complete:
            self.skipped.append("log-probabilities (it returns none; the tokens were compared)")
        self._refuse_other_weights(len(gaps), difference, gap)
        if self.asking.lookahead:
            for prompt in probes:
                await self._check_lookahead(prompt)
        return returns_ids, len(gaps), difference, gap

    async def _probe(self, prompt: Prompt) -> tuple[Completion, list[float]]:
        """A completion with its log-probabilities, or without, where the server does not give them."""
        body = self.asking.body(prompt, self.model, self.context)
        try:
            reply = await self.client.ask("/v1/completions", {**body, "logprobs": 1})
        except Refused as refused:
            self._refuse_key(refused)
            try:
                reply = await self.client.ask("/v1/completions", body)
            except Refused as problem:
                raise self._error(
                    f" does not complete a prompt of token ids at /v1/completions ({problem}); redraft "
                    "sends prompts as the target's own template renders them, so an endpoint that takes "
                    "chat messages or text alone cannot be used: vLLM and SGLang servers can"
                ) from None
        try:
            completion = self.asking.read(prompt, reply, PROBE_TOKENS)
        except Unable as problem:
            raise self._error(f" {problem}") from None
        except Trouble as problem:
            if "vocabulary" in str(problem):
                raise self._error(f" {problem}: it serves another model") from None
            raise
        return completion, _logprobs(first_choice(reply))

    def _refuse_other_weights(self, tokens: int, difference: float | None, gap: float) -> None:
        found, what = (
            (gap, "the target finds other tokens more likely, by")
            if difference is None
            else (difference, "its log-probabilities differ from the target's by")
        )
        if not found <= SAME:  # a NaN is not the target's either
            raise self._error(
                f": its model '{visible(self.model)}' is not the target {self.target.name}: on {tokens} "
                f"tokens that it wrote {what} {found:.2f} nats a token on average; rounding explains "
                f"{SAME:g} at most. Serve the target there, or name the model that is the target with "
                "--endpoint-model"
            )

    async def _check_lookahead(self, prompt: Prompt) -> None:
        """Does the server go on after a stop token, and with the target's own tokens?"""
        count = self.asking.space(prompt, self.context)
        nothing = Answer(prompt.id, prompt.tokens, (), 0, "length")
        body = self.asking.lookahead_body(nothing, count, self.model)
        try:
            ahead = self.asking.read_lookahead(
                await self.client.ask("/v1/completions", body), count
            )
        except (Refused, Unable) as problem:
            raise self._error(f" {problem}") from None
        own, best = await asyncio.to_thread(_read, self.target, prompt, ahead)
        worst = max(b - o for o, b in zip(own, best, strict=True))
        if not worst <= FORBIDDEN:
            raise self._error(
                f": asked to ignore stop tokens (ignore_eos), its model '{visible(self.model)}' writes a "
                f"token where the target finds another more likely by {worst:.1f} nats; it may forbid stop "
                "tokens then. Lookahead tokens (--lookahead) have to come from another server (vLLM, "
                "SGLang), or leave out --endpoint"
            )


def _logprobs(choice: dict[str, Any]) -> list[float]:
    """The log-probabilities of a completion's tokens; none where they are not all numbers."""
    given = choice.get("logprobs")
    listed = given.get("token_logprobs") if isinstance(given, dict) else None
    try:
        return [float(each) for each in listed] if isinstance(listed, list) else []
    except (TypeError, ValueError, OverflowError):
        return []


@torch.inference_mode()
def _read(target: Target, prompt: Prompt, tokens: Sequence[int]) -> tuple[list[float], list[float]]:
    """The target's log-probability of each token, and of its own most likely token there."""
    row = torch.tensor([[*prompt.tokens, *tokens[:-1]]], device=target.device)
    logits_TV = target.read(row, ()).logits_BTV[0, len(prompt.tokens) - 1 :]
    logp_TV = logits_TV.float().log_softmax(-1)
    own_T = logp_TV.gather(-1, torch.tensor(tokens, device=target.device)[:, None])[:, 0]
    return own_T.tolist(), logp_TV.max(-1).values.tolist()
