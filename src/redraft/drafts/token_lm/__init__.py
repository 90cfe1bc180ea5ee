"""Token LMs: the row, with its network and files next to it."""

from __future__ import annotations

from ..kind import DraftKind, Layout
from . import engines, files
from .network import TokenLMDraft

TOKEN_LM = DraftKind(
    name="token_lm",
    network=TokenLMDraft,
    new=TokenLMDraft.for_target,
    stored_as="small causal LMs (of Transformers)",
    layouts=(
        Layout(
            name="hf",
            recognise=files.recognises,
            parse=files.parse,
            lay_out=files.lay_out,
            engines=("vllm", "sglang", "llama.cpp", "transformers"),
            serve="""vLLM:          vllm serve TARGET --speculative-config '{"method": "draft_model", "model": "THIS", "num_speculative_tokens": 4}'
SGLang:        python -m sglang.launch_server --model-path TARGET --speculative-algorithm STANDALONE --speculative-draft-model-path THIS
Transformers:  model.generate(..., assistant_model=AutoModelForCausalLM.from_pretrained("THIS"))
llama.cpp:     convert_hf_to_gguf.py THIS --outfile THIS.gguf, and the same for TARGET; then
               llama-server -m TARGET.gguf -md THIS.gguf --spec-type draft-simple --spec-draft-n-max 4""",
        ),
    ),
    build=files.build,
    tensors=files.expected_shapes,
    companions=files.companions,
    check_vocabulary=files.check_vocabulary,
    pad_vocabulary=files.pad_vocabulary,
    second_reading=files.second_reading,
    function="a causal LM of its own: logits = lm_head(body(tokens)); nothing of the target's is read",
    reads=files.reads,
    vocabulary=files.vocabulary,
    engines=engines.ENGINES,
    methods={"vllm": "draft_model", "llama.cpp": "draft-simple"},
)
