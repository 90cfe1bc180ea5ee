"""Flags that several commands share, and flags derived from a stage's settings."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable
from typing import Annotated, Any

import typer

from ..config import stage_fields
from ..core.errors import UserError
from ..core.visible import visible

TargetFlag = Annotated[str, typer.Option("--target", help="target model: folder or Hub id")]
AdapterFlag = Annotated[
    str | None, typer.Option("--target-adapter", help="PEFT adapter on top of the target")
]
TemplateFlag = Annotated[
    str | None, typer.Option("--chat-template", help="Jinja file, where the tokenizer has none")
]
TemplateArgFlag = Annotated[
    list[str] | None,
    typer.Option(
        "--template-arg",
        help="variable for the chat template, e.g. enable_thinking=false; repeatable",
    ),
]
DtypeFlag = Annotated[
    str, typer.Option("--dtype", help="target's dtype: auto (as stored), float32, bfloat16, ...")
]
DraftFlag = Annotated[str, typer.Option("--draft", help="draft model: folder or Hub id")]
PromptsFlag = Annotated[str, typer.Option("--prompts", help="JSONL file of prompts (.gz is fine)")]
LimitFlag = Annotated[int | None, typer.Option("--limit", help="use only the first N prompts")]
JsonFlag = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout")]
BaseFlag = Annotated[
    str | None,
    typer.Option(
        "--base", help="the model the target was tuned from (for feature-map and weight-sync)"
    ),
]
QuietFlag = Annotated[bool, typer.Option("--quiet", "-q", help="no progress on stderr")]
TemperatureFlag = Annotated[
    float, typer.Option("--temperature", min=0.0, help="sampling temperature; 0 is greedy")
]
TopKFlag = Annotated[
    int, typer.Option("--top-k", min=0, help="keep the k most likely tokens; 0 keeps all")
]
TopPFlag = Annotated[
    float, typer.Option("--top-p", min=1e-6, max=1.0, help="nucleus mass; 1 keeps all")
]
MinPFlag = Annotated[
    float,
    typer.Option(
        "--min-p", min=0.0, max=1.0, help="keep tokens this likely against the most likely"
    ),
]
KFlag = Annotated[
    str,
    typer.Option("--k", help="draft tokens per step; auto: chosen from costs measured here"),
]
AcceptanceFlag = Annotated[
    str, typer.Option("--acceptance", help="acceptance mode: greedy, seeded or sampled")
]
DraftTokenFlag = Annotated[
    str,
    typer.Option(
        "--draft-token",
        help="how the draft picks a token: deterministic, coupled (seeded), sampled (sampled)",
    ),
]

EndpointFlag = Annotated[
    list[str] | None,
    typer.Option(
        "--endpoint",
        help="OpenAI-compatible server of the target that writes the answers to adapt on; repeatable "
        "(key: $REDRAFT_API_KEY)",
    ),
]
EndpointModelFlag = Annotated[
    str | None, typer.Option("--endpoint-model", help="the target's name at the endpoints")
]
ConcurrencyFlag = Annotated[
    int | None, typer.Option("--concurrency", help="requests under way at each endpoint")
]
TimeoutFlag = Annotated[
    float | None, typer.Option("--timeout", help="longest wait for one answer of an endpoint, s")
]


def flag_of(key: str) -> str:
    """The flag of a setting that is named by its dotted key."""
    field = stage_fields()[key][1]
    return "--" + str(field.metadata.get("flag", field.name)).replace("_", "-")


def with_settings(*stages: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add a flag for every setting of these stages; the command receives those that were given as
    `settings`, by dotted key."""

    def wrap(command: Callable[..., None]) -> Callable[..., None]:
        fields = {k: f for k, (stage, f) in stage_fields().items() if stage in stages}
        by_name = {key.replace(".", "__"): key for key in fields}

        @functools.wraps(command)
        def wrapper(**given: Any) -> None:
            settings = {key: joined(given.pop(name)) for name, key in by_name.items()}
            command(settings={k: v for k, v in settings.items() if v is not None}, **given)

        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.name != "settings"]
        kinds = {"int": int, "float": float, "str": str}
        for name, key in by_name.items():
            field = fields[key]
            choices = field.metadata.get("choices")
            text = f"{field.metadata['help']} [default: {field.default}]"
            text += f" (one of: {', '.join(choices)})" if choices else ""
            text += "; repeatable" if field.metadata.get("many") else ""
            flag = typer.Option(flag_of(key), help=text, show_default=False)
            kind: Any = list[str] if field.metadata.get("many") else kinds[str(field.type)]
            own.append(
                inspect.Parameter(
                    name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=None,
                    annotation=Annotated[kind | None, flag],
                )
            )
        ordered = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        wrapper.__signature__ = signature.replace(parameters=ordered)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in ordered}
        return wrapper

    return wrap


def joined(given: Any) -> Any:
    """A repeatable flag as the setting's text; no flag at all as None."""
    return ",".join(given) or None if isinstance(given, list) else given


def load(
    source: str,
    adapter: str | None,
    template: str | None,
    dtype: str,
    template_arg: list[str] | None = None,
) -> Any:
    """The target that the flags describe."""
    from ..models.loading import load_target

    given = template_args_from(template_arg)  # first: a slip should not cost the time of loading
    return load_target(
        source, adapter=adapter, chat_template=template, template_args=given, dtype=dtype
    )


def template_args_from(given: list[str] | None) -> dict[str, Any]:
    """The variables of `--template-arg key=value`; a value that is JSON (false, 3) is taken as JSON."""
    found: dict[str, Any] = {}
    for text in given or ():
        name, sign, value = text.partition("=")
        if not sign or not name.isidentifier():
            raise UserError(
                f"--template-arg takes NAME=VALUE, for example enable_thinking=false; got '{text}'"
            )
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def k_from(text: str) -> int | None:
    """The number that --k names; None for auto."""
    if text == "auto":
        return None
    if not text.isdigit() or not 1 <= int(text) <= 16:
        raise UserError(f"--k takes a whole number from 1 to 16, or auto; got '{text}'")
    return int(text)


def decoding_from(
    acceptance: str,
    draft_token: str,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> Any:
    """The `Decoding` that the flags describe."""
    from ..decoding.acceptance_modes import Decoding
    from ..decoding.sampling import Sampling

    return Decoding(acceptance, Sampling(temperature, top_k, top_p, min_p), draft_token)


def finish(as_json: bool, text: str, content: dict[str, Any]) -> None:
    if as_json:
        print_json(content)
    else:
        typer.echo(text)


def print_examples(examples: Any) -> None:
    """On stderr, as the result proper goes to stdout."""
    for example in examples:
        sample = example.sample
        fate = "kept" if sample.kept else "left out"
        if sample.duplicate_of:
            fate += f", like {sample.duplicate_of}"
        answer = f"\n  -> {_shortened(example.answer)}" if example.answer else ""
        text = (
            f"{example.where}, rank {example.rank}: {sample.score:.4g} ({fate}) {sample.id}\n"
            f"  {_shortened(example.prompt)}{answer}"
        )
        typer.echo(visible(text), err=True)


def _shortened(text: str, most: int = 300) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most // 2]} ... {line[-most // 2 :]}"


def print_json(content: Any) -> None:
    typer.echo(json.dumps(content))
