"""A target that the processes of one job hold together, each with its share of every layer: Transformers' tensor
parallelism.

Embedding, final norm and head are whole in each process, because drafts use them too.
"""

from __future__ import annotations

from typing import Any

from ..core import ranks
from ..core.console import say
from ..core.errors import UserError, as_sentence
from .gguf_file import gguf_file
from .placement import empty_model

TENSOR_PARALLEL = "tensor-parallel"
WHOLE = "replicate"


def shared_layers(source: str, config: Any, adapter: str | None) -> dict[str, Any]:
    """The options of `from_pretrained` that give each process its share of every layer of `config`'s model.

    From here on no other work is shared out. Raises UserError in one process, for a model that cannot be cut so, and
    for what cannot be put on it.
    """
    flag = f"--device-map {TENSOR_PARALLEL}"
    if ranks.size() == 1:
        raise UserError(
            f"{flag}: the target is shared by the processes of one job, and this is one process; start several: torchrun "
            "--nproc-per-node 2 -m redraft ..."
        )
    if gguf_file(source):
        raise UserError(f"{flag}: a GGUF file is read whole; name the checkpoint it was made from")
    if adapter is not None:
        raise UserError(
            f"{flag}: --target-adapter {adapter} cannot be put on layers that are shared out; merge it into the "
            "target first (PEFT's merge_and_unload)"
        )
    try:
        from transformers.distributed import DistributedConfig
        from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES
    except ImportError:
        styles: list[str] = []
    else:
        styles = list(ALL_PARALLEL_STYLES)
    if WHOLE not in styles:
        raise UserError(f"{flag} needs a newer Transformers, such as 5.23")
    text = config.get_text_config()
    for what in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(text, what, None)
        if heads and heads % ranks.size():
            raise UserError(
                f"target {source}: its {what} are {heads}, which {ranks.size()} processes cannot share; start a number of "
                "processes that divides them"
            )
    with as_sentence(f"target {source} could not be laid out"):
        model = empty_model(config)
    whole = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    names = [name for name, module in model.named_modules() if id(module) in whole]
    if not any(style != WHOLE for name, style in model.tp_plan.items() if name not in names):
        raise UserError(
            f"{flag}: Transformers has no plan to cut {type(model).__name__}; spread its layers "
            "instead (--device-map auto)"
        )
    ranks.compute_together()
    say(f"target {source}: its layers shared by {ranks.size()} processes")
    return {
        "distributed_config": DistributedConfig(
            tp_size=ranks.size(), tp_plan=dict.fromkeys(names, WHOLE)
        )
    }
