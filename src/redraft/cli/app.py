"""The commands put together, and what becomes of an exception."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from .. import __version__
from ..core.console import console
from ..core.errors import UserError
from . import (
    bank,
    certify,
    check,
    drafts,
    engine,
    env,
    features,
    fleet,
    generate,
    job,
    mtp,
    plan,
    prompts,
    recipes,
    stages,
    watch,
)
from .command import Group, add_command
from .extensions import add_extensions
from .together import one_voice, tell

app = typer.Typer(
    name="redraft",
    cls=Group,
    help="Re-align a speculative-decoding draft model with a fine-tuned LLM, and prove it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
STAGES_OF_ADAPT = ("regenerate", "general", "select", "train", "measure", "safety", "export")
add_command(
    app,
    check.check,
    help={"out": "keep the answers in this folder; run again to resume"},
)
add_command(
    app,
    job.adapt,
    shares=True,
    settings=STAGES_OF_ADAPT,
    flags_of=job.FLAGS_OF_ADAPT,
    help={
        "out": "run folder; run again to resume",
        "answers": "prompts with answers (production logs), used unchanged",
    },
)
add_command(
    app,
    stages.regenerate,
    shares=True,
    settings=("regenerate",),
    help={
        "out": "answers file (JSONL); run again to resume",
        "selection": "answer only the prompts that `select --by prompts` kept",
    },
)
add_command(
    app,
    stages.select,
    shares=True,
    settings=("select",),
    help={
        "out": "selection file (JSONL) to write",
        "prompts": "with --by prompts: the file to choose from",
        "target": "target model, for every score but random",
        "draft": "the draft in use, for draft_loss and rejection",
    },
)
add_command(
    app,
    features.features,
    shares=True,
    help={"out": "folder to write; run again to resume", "draft": "store what this draft reads"},
)
add_command(
    app,
    stages.train,
    shares=True,
    settings=("train",),
    help={
        "out": "folder of the adapter (of the draft with --method scratch)",
        "draft": "the shared draft",
        "aux_layers": "scratch without --draft: hs[] indices, e.g. 2,4,5",
    },
)
add_command(
    app,
    stages.measure,
    shares=True,
    help={
        "prompts": "prompts that the target answers first",
        "answers": "or an answers file (of `regenerate --lookahead K`), scored unchanged",
        "k": "draft tokens per step; auto: chosen from costs measured here",
    },
)
add_command(
    app,
    drafts.inspect,
    help={
        "path": "draft, or target with an MTP head of its own: folder or Hub id",
        "target": "also check that it fits this target",
        "base": "for a target: the model it was fine-tuned from, whose head is compared",
    },
)
add_command(
    app,
    drafts.export,
    help={
        "out": "folder of the stock draft to write",
        "target": "the target, where the draft has other vocabulary rows than it",
    },
)
add_command(
    app,
    mtp.mtp,
    shares=True,
    settings=STAGES_OF_ADAPT,
    flags_of=job.FLAGS_OF_ADAPT,
    help={
        "out": "run folder; run again to resume",
        "base": "the model that the target was fine-tuned from, whose head is grafted",
        "answers": "prompts with answers (production logs), used unchanged",
    },
)
add_command(app, drafts.stitch, help={"out": "folder of the checkpoint to write"})
add_command(app, engine.verify)
add_command(
    app,
    plan.plan,
    settings=("train",),
    flags_of=("train.method", "train.width", "train.rank", "train.epochs", "train.batch_tokens"),
    help={"target": "the target: a folder with config.json, or Hub id"},
)
add_command(
    app,
    watch.watch,
    help={
        "endpoint": "address of the vLLM server (key: $REDRAFT_API_KEY)",
        "run": "run folder of `redraft adapt`, whose adapted draft's tau is expected",
        "out": "JSONL file that keeps the looks; run again to go on with them",
    },
)
add_command(app, job.report)
add_command(
    app,
    generate.generate,
    help={"k": "draft tokens per step; auto: chosen from costs measured here"},
)
add_command(app, env.env)
app.add_typer(bank.app, name="bank")
app.add_typer(certify.app, name="certify")
app.add_typer(fleet.app, name="fleet")
app.add_typer(prompts.app, name="prompts")
app.add_typer(recipes.app, name="recipes")
add_extensions(app)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
) -> None:
    if version:
        typer.echo(f"redraft {__version__}")
        raise typer.Exit()


def main() -> None:
    """Entry point: exceptions become exit codes."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with one_voice():
        try:
            _calm_libraries()
            app(standalone_mode=True)
        except UserError as mistake:
            tell(str(mistake))
            if os.environ.get("REDRAFT_TRACEBACK"):
                raise
            sys.exit(2)
        except SystemExit as end:
            if end.code == 130:  # Ctrl-C, which Typer turns into this code
                console.print("redraft: interrupted; run the same command again to continue")
            raise


def _calm_libraries() -> None:
    """Loading bars and advice of the libraries would drown our own progress; what one caches, our memory."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")
    # Products compiled for a shape, of which 1,024 (the library's default) grew to gigabytes in bf16 training.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
