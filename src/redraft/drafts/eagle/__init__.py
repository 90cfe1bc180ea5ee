"""EAGLE-1 and EAGLE-2: the row, with its network and files next to it."""

from __future__ import annotations

from ..kind import DraftKind, Layout
from ..stored.layer import VARIANTS
from ..stored.rows import rows_in_words, with_embedding_rows
from . import engines, files
from .network import EagleDraft

EAGLE = DraftKind(
    name="eagle",
    network=EagleDraft,
    new=EagleDraft.for_target,
    stored_as="EAGLE-1/2 drafts (of SafeAILab, EDA, vLLM, SGLang)",
    layouts=(
        Layout(
            name=files.REFERENCE,
            recognise=files.recognises_reference,
            parse=files.parse,
            describe=files.in_words,
        ),
        Layout(name="eagle", recognise=files.recognises, parse=files.parse),
        Layout(
            name="vllm-eagle",
            lay_out=files.for_vllm,
            engines=("vllm",),
            serve="""vLLM:    vllm serve TARGET --speculative-config '{"method": "eagle", "model": "THIS", "num_speculative_tokens": 4}'""",
        ),
        Layout(
            name="sglang-eagle",
            lay_out=files.for_sglang,
            engines=("sglang",),
            serve="""SGLang:  python -m sglang.launch_server --model-path TARGET --speculative-algorithm EAGLE --speculative-draft-model-path THIS""",
        ),
    ),
    build=files.build,
    tensors=files.expected_shapes,
    with_rows_of=with_embedding_rows,
    check_servable=files.check_servable,
    second_reading=files.second_reading,
    function="x = fc([E[t+1]; hs[n] or own state]); one decoder layer; logits = target's "
    "lm_head(state)",
    variants={
        "fc_bias": "fc has a bias",
        "routed": "the FFN is experts that routers choose token by token: runs here, no engine loads it",
        **VARIANTS,
    },
    reads=files.reads,
    vocabulary=rows_in_words,
    config_variants=files.config_variants,
    engines=engines.ENGINES,
    canonical=files.canonical,
    judged=engines.judged,
    methods={"vllm": "eagle"},
)
