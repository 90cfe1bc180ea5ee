"""MTP heads, the layer for further tokens in a model's own checkpoint: the row, with network and files."""

from __future__ import annotations

from ..kind import DraftKind, Inside, Layout
from ..stored.layer import VARIANTS
from ..stored.rows import rows_in_words
from . import engines, files
from .network import MtpDraft

MTP = DraftKind(
    name="mtp",
    network=MtpDraft,
    new=MtpDraft.for_target,
    stored_as="MTP heads (of Qwen3.5, MiMo, GLM and DeepSeek-V3 layout)",
    layouts=(
        Layout(
            name="mtp",
            recognise=files.recognises,
            parse=files.parse,
            lay_out=files.lay_out,
            engines=("vllm", "sglang", "llama.cpp"),
            serve="""vLLM:       redraft stitch --target TARGET --draft THIS --out STITCHED, then
            vllm serve STITCHED --speculative-config '{"method": "mtp", "num_speculative_tokens": 4}'
SGLang:     python -m sglang.launch_server --model STITCHED --speculative-algorithm NEXTN \\
            --speculative-num-steps 4 --speculative-eagle-topk 1 --speculative-num-draft-tokens 5
llama.cpp:  the same folder through convert_hf_to_gguf.py, then llama-server --spec-type draft-mtp""",
        ),
    ),
    build=files.build,
    tensors=files.expected_shapes,
    with_rows_of=files.fitting,
    second_reading=files.second_reading,
    function="x = fc([norm(E[t+1]); norm(hs[n] or own state)]); one decoder layer; logits = target's lm_head(norm(x))",
    variants={
        "state_first": "fc reads the state first, then the embedding",
        "before_norm": "a chain starts in the state before the target's final norm",
        "raw_feedback": "a chain goes on in the state before the head's own norm",
        "zero_first": "the first pair's embedding is zeros",
        "routed": "the FFN is routed experts, and a shared one",
        "leading_pair": "zeros with the first token are a pair before the others",
        **VARIANTS,
    },
    reads=files.reads,
    vocabulary=rows_in_words,
    config_variants=files.other_readings,
    engines=engines.ENGINES,
    inside=Inside(
        find=files.find_inside,
        declared=files.declared_inside,
        not_computed=files.not_computed,
        declaring=files.declare_inside,
        from_target=MtpDraft.from_last_layer,
        rename=files.rename_inside,
    ),
    as_served=engines.AS_SERVED,
    methods={"vllm": "mtp", "llama.cpp": "draft-mtp"},
)
