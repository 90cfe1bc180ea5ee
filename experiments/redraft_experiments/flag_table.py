"""Every flag of these commands that is none of redraft's own, with its help."""

from __future__ import annotations

from redraft.cli.flag_table import Flag

FLAGS: dict[str, Flag] = {
    "out": Flag("folder of the cells; run again to resume"),
    "real": Flag("SmolLM2-135M-Instruct with a medical fine-tune instead, as users run it"),
    "size": Flag("pico, nano, micro or small (the last two on real data)"),
    "data": Flag("folder of real data (default: $REDRAFT_DATA)"),
    "forms": Flag("how it is stored, comma-separated: q8_0, q4_k_m, q3_k_m, q2_k, int8, nf4"),
    "members": Flag("members to build, comma-separated; all is every one (default: default)"),
    "drafts": Flag(
        "drafts of the base, comma-separated: eagle3, eagle, small-lm; kept: the eagle3 that comes with the package"
    ),
    "kinds": Flag("kinds of draft next to eagle3, comma-separated"),
    "seed": Flag("seed of everything"),
    "name": Flag("smollm2 (SmolLM2-135M-Instruct, Apache-2.0)", argument=True),
    "source": Flag("package, hub, or auto: the package where it is installed"),
    "tune": Flag("also tune a LoRA adapter on the chats of this file (JSONL)"),
    "tuned": Flag("folder of that adapter (default: OUT-lora)"),
    "adapt_to": Flag("also adapt the draft to this fine-tune"),
    "steps": Flag("steps of --tune", low=1),
    "suite": Flag("folder of `redraft bench suite`", old=("--family",)),
    "base_draft": Flag("another draft of the base than the suite's", name="--draft"),
    "race": Flag("folder of `redraft bench real-methods`"),
    "called": Flag("what to call it (default: the target's name)", name="--name"),
    "model": Flag("folder of `bench model`, or another model: folder or GGUF file"),
    "adapters": Flag("adapters in the bank", low=1),
    "rank": Flag("their rank", low=1),
    "record": Flag("also write the result to this JSON file"),
    "assistant": Flag("a small LM for Transformers' assisted decoding"),
    "padded": Flag("also pad the target to so many parameters (1e8)"),
    "batches": Flag("prompts at a time"),
    "ks": Flag("draft tokens per step to try"),
    "runs": Flag("run folder of `redraft adapt`; repeatable"),
    "simulations": Flag("months that are simulated, and a tenth of the falls", low=1),
    "lengths": Flag("tokens of a row, comma-separated"),
    "processes": Flag("numbers of processes, comma-separated"),
    "limit": Flag("prompts raced on"),
    "max_new_tokens": Flag("longest answer, in tokens", low=2),
    "repeats": Flag("times each is run", low=1),
    "rows": Flag("rows, comma-separated; table: all rows, ideas: all ideas"),
    "answers": Flag("original, regenerated, sampled; comma-separated"),
    "seeds": Flag("training seeds"),
    "member": Flag("fine-tune of the suite"),
    "ways": Flag("ways to select, joined by ; (all: every one)"),
    "budgets": Flag("shares of the pool"),
    "schedules": Flag("steps, epochs: what all cells have equal"),
    "calibration": Flag("JSON file of calibration runs (default: ours)"),
    "kind": Flag("how it was tuned, in a word: sft, lora, dpo, merge, int8, template, ..."),
    "family": Flag("what its models are (default: the base's name)"),
    "problems": Flag(
        "word problems a turn, for which the fine-tune is tuned further; 1: unchanged", low=1
    ),
}
