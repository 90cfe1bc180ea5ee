"""docs/engines.md from the record of `make test-engines`, and from the rules redraft judges by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from redraft.drafts.kinds import KINDS
from redraft.serving.engines import ENGINES

RECORD = Path(__file__).parent / "results" / "engines.json"
TRANSFORMERS = RECORD.with_name("transformers.json")
NAMES = {
    "vllm": "vLLM",
    "sglang": "SGLang",
    "llama.cpp": "llama.cpp",
    "transformers": "Transformers",
}
BY_SCHEMA = {
    "vllm": "checked by schema against vLLM 0.32's loader; the engine was not run",
    "sglang": "checked by schema against the loaders of SGLang 0.5.23; the engine was not run",
    "llama.cpp": "checked by schema against the converter and loader of build 11434; the engine was not run",
    "transformers": "no EAGLE drafts of its own; `redraft.generate` runs them inside `generate`",
}
PACKAGES = {row.name: row.package.names for row in ENGINES}
HEADER = """| draft | target | K | dtype | at a time | same words | engine: steps / accepted | redraft | tau | engine, date |
|---|---|---|---|---|---|---|---|---|---|"""
LANGUAGE_MODELS = {
    **BY_SCHEMA,
    "transformers": "ran here in the tests, as `assistant_model` and inside `redraft.generate`",
}


LLAMA_CPP = """## llama.cpp

`redraft verify --engine llama.cpp` converts target and draft, starts the server without the draft and with it, and compares
texts, counters and speed. It needs an environment with the package `xllamacpp`, which is llama.cpp's own server, and
llama.cpp's source next to it for the converter. `make engine` makes `.venv-llamacpp`; `redraft verify` prints the commands where it
finds none. Name the environment's Python with `--python` or in `REDRAFT_LLAMACPP_PYTHON`.

Run here on 2026-11-29: server xllamacpp 2026.10.11549, converter of llama.cpp 11434, Transformers 5.23.

**Converting by hand.** The converter's default `auto` writes 16 bits, also for a target in float32, and then answers differ now and
then. For a comparison say `--outtype f32`.

```
python convert_hf_to_gguf.py TARGET --outtype f32 --outfile target.gguf
python convert_hf_to_gguf.py DRAFT --target-model-dir TARGET --outtype f32 --outfile draft.gguf
llama-server -m target.gguf -md draft.gguf --spec-type draft-eagle3 --spec-draft-n-max 4 --no-spec-draft-backend-sampling
```

A small LM is converted without `--target-model-dir` and served with `--spec-type draft-simple`. The converter refuses a tokenizer
whose way of splitting text it does not know. `redraft verify` stores such a tokenizer as `default`, because it sends token ids. It
never lets the converter run code of a model's folder, which the converter would do by itself.

**What redraft sets.** K (the server's default is 3), `--spec-draft-p-min 0`, a cache of keys and values in the target's dtype,
no flash attention for a target in float32 (on a CPU it is less exact: one step of 725 was another), `--no-cache-prompt`, one slot for each request at a time, and `--no-spec-draft-backend-sampling`. With more than one slot the server's
default drafting loses acceptance, half of it at four slots on the CPU. Texts stay equal. `--engine-args` adds flags of
your own: those of `llama-server` for threads, batches, cache types, flash attention, layers on a GPU and the draft's limits.

**Quantised targets.** `--outtype q8_0` converts the target to that type; `q4_k_m` and the other types below 8 bits take llama.cpp's
`llama-quantize`, which xllamacpp does not have (`redraft verify` prints how to build it). A GGUF file of your own is a target too:
`--target model.gguf`, in every command, with the package `gguf` (`pip install 'redraft[gguf]'`). redraft reads it in float32 as the numbers
that its blocks mean. Put the model's config.json and tokenizer next to the file where you have them: the file's metadata does not say all.

A draft is adapted to the answers and states of the model that it is given as `--target`. Name the file there to adapt to the quantised model.
`redraft verify` counts redraft's steps on the engine's own answers, with the weights as the engine has them. With rounded weights
llama.cpp rounds the states that it multiplies by them to 8 bits, and passes of several tokens add up otherwise than passes of one. So answers with
the draft and without it differ more often than in float32. Differences are audited in that rounding ([what is proven](lossless.md)).

**What it counts.** Two rules cut the last step of an answer. A step drafts no more tokens than the longest answer leaves space for.
A drafted stop token that the target chooses too is the step's own token, unless it is the chain's last. So its tau is a little lower
than vLLM's where answers are short; redraft cuts its own steps alike before it compares.

**What it does with a draft.** It takes layer ids (vLLM's numbering, exactly three), `norm_before_residual` and `norm_before_fc` from the
top level of the draft's config.json, and ignores `eagle_config`, `norm_output` and `hidden_act`. Biases, `fc_norm`, `q_norm` and a missing
tensor are refused. It needs `draft_vocab_size`, one layer and `--target-model-dir`. It keeps the layers' states of some targets only
(Llama, Mistral, Qwen3, gpt-oss and a few more; not Qwen2 or Gemma 3). A server that cannot use a draft logs an error and goes on without
it: `redraft verify` then reports that nothing was drafted. `redraft inspect` says which of these a folder meets.

**Limits.** An adapter has to be merged into the target before. Stop tokens are those of the GGUF file: one that only
generation_config.json names does not end an answer. Threads wait by spinning: next to other work on the same cores give it fewer.
"""

SGLANG = """## SGLang

SGLang 0.5.23 ran here on 2026-11-29 with PyTorch 2.13 and Transformers 5.19, in float32, on a CPU without AMX. PyPI alone does not
make it run there; each of these was tried:

- The wheel without kernels stops at `kernels/ops/kvcache/cache_move.py`, line 10: `No module named 'sgl_kernel'`.
- The wheel `sglang-kernel` 0.4.10 is a CUDA build (`libnvrtc.so.13: cannot open shared object file`) without the functions for CPUs.
  PyPI has no source of them.
- With `--attention-backend torch_native` a target is served, but no draft: `speculative/draft_utils.py`, line 64, `EAGLE is not supported
  in decode attention backend torch_native`. `intel_amx` becomes `torch_native` where there is no AMX (`arg_groups/overrides.py`, line 1303).

It runs with `intel_amx` named for prefill and decode apart, and twelve functions of `sgl_kernel` in PyTorch: two of attention, ten that
move indices. `make test-sglang` does that. SmolLM2-135M and its EAGLE-3 draft, K = 4: `redraft certify check` found 16 of 16 answers equal
and 221 of 1,148 drafted tokens accepted, as certified, in every answer; with the draft's `o_proj` at 0, 72 of 1,708, and it named that tensor with `v_proj`, whose loss counts the same.
"""


def engines_page() -> str:
    """The whole page."""
    cells: list[dict[str, Any]] = json.loads(RECORD.read_text(encoding="utf-8"))["cells"]
    return "\n".join(
        [
            "# Engines\n",
            "Generated by `make docs` from the record of `make test-engines` (or `test-engines-full`) and "
            "from the rules behind `redraft inspect`.\n",
            "## What serves what\n",
            "| engine | kind | `--format` | how we know |",
            "|---|---|---|---|",
            *_rows(cells),
            "",
            "The method that made an adapter does not matter to an engine: all end as the plain "
            "tensors of their kind, `expert` with a wider FFN. Rows above were run with "
            "`expert+fc+norms` (adapted) and `scratch` (from-scratch).\n",
            "## Run in vLLM\n",
            "Greedy, on two CPU cores. *Same words*: outputs equal to those without the draft, token "
            "for token (near-ties of the target's two best logits are excused and counted). *Engine* "
            "and *redraft*: verification steps and accepted tokens by the engine's own counters and by "
            "redraft's live loop on the same token ids. The suite is nano (1.4 M parameters, "
            "templated text): the counts prove conventions, not what your model will reach.\n",
            HEADER,
            *(_cell(cell) for cell in _of("vllm", cells)),
            "",
            "## Run in llama.cpp\n",
            "The same, with target and drafts as f32 GGUF files but for targets that are named otherwise, whose steps "
            "redraft counts on the engine's own answers. redraft's steps are cut as llama.cpp cuts the last step of an "
            "answer (see below); whole steps are those of vLLM.\n",
            HEADER,
            *(_cell(cell) for cell in _of("llama.cpp", cells)),
            "",
            LLAMA_CPP,
            SGLANG,
            "## Transformers\n",
            "Chosen tests (`redraft.generate` inside `generate`, loading, captured states, caches, MTP heads, a certificate's counts) under "
            "each version; `make test-transformers` runs them. *Left out*: tests of targets with a recurrent state, which redraft "
            "refuses before Transformers 5.16. Before 5.23 a reading keeps the states of all layers and takes more memory: "
            "from 5.17 on a list of them is numbered otherwise.\n",
            "| Transformers | passed | failed | left out | PyTorch | date |",
            "|---|---|---|---|---|---|",
            *_versions(),
            "",
        ]
    )


def _versions() -> list[str]:
    """A row for each version of Transformers that was tried."""
    rows = json.loads(TRANSFORMERS.read_text(encoding="utf-8"))["rows"]
    keys = ("version", "passed", "failed", "left_out", "torch", "date")
    return ["| " + " | ".join(str(row[key]) for key in keys) + " |" for row in rows]


TRIED = {("mtp", "vllm"), ("mtp", "llama.cpp")}


def _rows(cells: list[dict[str, Any]]) -> list[str]:
    rows = []
    for row in KINDS:
        kind = row.name
        for engine in row.engines:
            formats = [layout.name for layout in row.layouts if engine in layout.engines]
            ran = [c for c in _of(engine, cells) if c["method"] == row.methods.get(engine)]
            if ran:
                how = (
                    f"ran here: {ran[0]['engine']}, {ran[-1]['date']}, {len(ran)} of the rows below"
                )
                if "speculators" in formats and not any("speculators" in c["name"] for c in ran):
                    how += "; `speculators` checked by schema"
            elif (kind, engine) in TRIED:
                how = "runs in `make test-engines`, on a tiny model"
            elif (kind, engine) == ("eagle3", "sglang"):
                how = (
                    "ran here: sglang 0.5.23, 2026-11-29, against a certificate ([below](#sglang))"
                )
            elif formats or engine == "transformers":
                how = (LANGUAGE_MODELS if kind == "token_lm" else BY_SCHEMA)[engine]
            else:
                how = "not supported: it has no EAGLE-1/2 drafts"
            shown = ", ".join(f"`{name}`" for name in formats) or "-"
            rows.append(f"| {NAMES[engine]} | {kind} | {shown} | {how} |")
    return rows


def _of(engine: str, cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cells of an engine that was run."""
    return [c for c in cells if c["engine"].split()[0] in PACKAGES.get(engine, ())]


def _cell(c: dict[str, Any]) -> str:
    words = f"{c['identical']} of {c['prompts']}"
    if c["excused"]:
        words += f" ({c['excused']} excused)"
    return (
        f"| {c['name']} | {c['target']} | {c['k']} | {c['dtype']} | {c['concurrency']} | {words} | "
        f"{c['drafts']:,} / {c['accepted']:,} | {c['own_drafts']:,} / {c['own_accepted']:,} | "
        f"{c['tau']:.3f} | {c['engine']}, {c['date']} |"
    )
