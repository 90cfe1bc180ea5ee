"""EAGLE-3: the row, with its network and files next to it."""

from __future__ import annotations

from ..kind import DraftKind, Layout
from ..stored.layer import VARIANTS
from ..stored.second_reading import by_the_reference
from . import engines, files, speculators
from .network import Eagle3Draft

_IN_VLLM = """vLLM:    vllm serve TARGET --speculative-config '{"method": "eagle3", "model": "THIS", "num_speculative_tokens": 4}'"""
_IN_LLAMA_CPP = """llama.cpp:  convert_hf_to_gguf.py THIS --target-model-dir TARGET --outfile THIS.gguf, and the same for TARGET; then
         llama-server -m TARGET.gguf -md THIS.gguf --spec-type draft-eagle3 --spec-draft-n-max 4 --no-spec-draft-backend-sampling"""

EAGLE3 = DraftKind(
    name="eagle3",
    network=Eagle3Draft,
    new=Eagle3Draft.for_target,
    choices=("draft_vocab", "aux_layers"),
    stored_as="EAGLE-3 drafts (of SafeAILab, SpecForge, speculators, vLLM, SGLang)",
    layouts=(
        Layout(
            name="eagle3",
            recognise=files.recognises,
            parse=files.parse,
            lay_out=files.lay_out,
            engines=("vllm", "sglang", "llama.cpp"),
            serve=f"""{_IN_VLLM}
SGLang:  python -m sglang.launch_server --model-path TARGET --speculative-algorithm EAGLE3 --speculative-draft-model-path THIS
{_IN_LLAMA_CPP}""",
        ),
        Layout(
            name="speculators",
            recognise=speculators.recognises,
            parse=speculators.parse,
            lay_out=speculators.lay_out,
            engines=("vllm", "llama.cpp"),
            serve=f"{_IN_VLLM}\n{_IN_LLAMA_CPP}",
        ),
    ),
    build=files.build,
    tensors=files.expected_shapes,
    with_rows_of=files.with_rows_of,
    second_reading=by_the_reference,
    function="g = fc([hs[a]; hs[b]; hs[c]]); layer on [norm(E[t+1]); norm(g or own state)]; "
    "logits = lm_head(norm(state))",
    variants={
        "norm_before_residual": "the residual starts from the normed state",
        "norm_before_fc": "a norm before fc",
        "fc_norm": "a norm on each aux layer",
        "norm_output": "the normed state is fed back",
        **VARIANTS,
    },
    reads=files.reads,
    vocabulary=files.vocabulary,
    config_variants=files.config_variants,
    engines=engines.ENGINES,
    canonical=files.canonical,
    judged=engines.judged,
    methods={"vllm": "eagle3", "llama.cpp": "draft-eagle3"},
)
