"""Every flag that is no setting: its help, once, by the name of the parameter that takes it."""

from __future__ import annotations

from dataclasses import dataclass

MODELS, DATA, SAMPLING, OUTPUT = "Models", "Data", "Decoding", "Output"
RUN = "This run"
SETTING_GROUPS = {
    "regenerate": "Answers",
    "general": "General prompts",
    "select": "Selection",
    "train": "Training",
    "measure": "Measuring",
    "safety": "Safety prompts",
    "export": "Export",
}
"""The heading of each stage's settings in a command's help."""


@dataclass(frozen=True)
class Flag:
    """`name` where it is not that of the parameter; `old` are names of before, which are still read."""

    help: str
    group: str = RUN
    name: str = ""
    old: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    argument: bool = False


FLAGS: dict[str, Flag] = {
    # models
    "target": Flag("target model: folder, GGUF file or Hub id", MODELS),
    "target_adapter": Flag("PEFT adapter on top of the target", MODELS),
    "base": Flag("the model that the target was fine-tuned from: folder or Hub id", MODELS),
    "from_layer": Flag(
        "begin with the target's last layer, where neither it nor its base has a head", MODELS
    ),
    "verify_in": Flag("try the result in this engine, vllm or llama.cpp, at the end"),
    "only_check": Flag("recommend, and train nothing", name="--check"),
    "previous": Flag(
        "draft of the model's version before, or its run folder: training begins with it if the target accepts it more often than "
        "--draft",
        MODELS,
    ),
    "draft": Flag("draft model: folder or Hub id", MODELS),
    "adapter": Flag(
        "adapter to merge in; without one only the layout changes", MODELS, old=("--private",)
    ),
    "chat_template": Flag("Jinja file, where the tokenizer has none", MODELS),
    "template_arg": Flag(
        "variable for the chat template, e.g. enable_thinking=false; repeatable", MODELS
    ),
    "dtype": Flag("target's dtype: auto (as stored), float32, bfloat16, ...", MODELS),
    "device_map": Flag(
        "where one device is too small: auto spreads the target's layers over GPUs, memory and disk; tensor-parallel "
        "shares each among the processes that torchrun started",
        MODELS,
    ),
    "max_memory": Flag("how much of each to use, e.g. 0=20GiB,cpu=60GiB", MODELS),
    "kind": Flag("kind of a new draft, see docs/formats.md", MODELS),
    "aux_layers": Flag(
        "hs[] indices of the target's layers, e.g. 2,14,25", MODELS, old=("--taps",)
    ),
    "draft_vocab": Flag("tokens of a new draft's vocabulary", MODELS, low=1),
    "draft_width": Flag("FFN neurons of a new draft", MODELS, low=1),
    "allow_pickle": Flag(
        "open pickles, which can run code; only tensors are accepted from them", MODELS
    ),
    "path": Flag("draft: folder or Hub id", argument=True),
    "file": Flag("prompts file, or a data set on the Hub", argument=True),
    "log": Flag("log of a service (JSONL, JSON, Parquet; .gz is fine)", argument=True),
    # data
    "consent": Flag(
        "field that says whose rows may be used, FIELD=VALUE, as metadata.training=true", DATA
    ),
    "everyone_agreed": Flag("every row of the log may be used", DATA),
    "logged_model": Flag(
        "only rows that this model was asked, as the log names it", DATA, "--model"
    ),
    "prompts": Flag(
        "prompts file (JSONL, JSON, Parquet; .gz is fine), or a data set on the Hub", DATA
    ),
    "prompt": Flag("the user's message", DATA),
    "answers": Flag("answers file of `redraft regenerate`", DATA),
    "heldout": Flag("answers (with --lookahead K) for early stopping", DATA),
    "eval_prompts": Flag("measure on this file, not on a part of --prompts", DATA),
    "off_domain": Flag("name=FILE of prompts measured but not trained on; repeatable", DATA),
    "safety_prompts": Flag(
        "prompts on which the answers with the adapted draft are compared with those without", DATA
    ),
    "fleet": Flag("YAML file of adapters: NAME: {adapter: FOLDER, prompts: FILE, share: 2}", DATA),
    "selection": Flag("selection file of `redraft select`", DATA),
    "limit": Flag("use only the first N prompts", DATA, low=1),
    "features": Flag(
        "stored features of the answers: the target's layers are not loaded; repeatable", DATA
    ),
    "feature_aux_layers": Flag(
        "hs[] indices that foreign features hold, whose files do not name them, e.g. 2,14,25",
        DATA,
        old=("--feature-taps",),
    ),
    "rows": Flag("rows to show rendered", DATA, low=0),
    "source": Flag(
        "take stored or captured features instead of running the target", DATA, "--from"
    ),
    "capture": Flag(
        "address of a running vLLM that captures hidden states; of several, comma-separated", DATA
    ),
    "endpoint": Flag(
        "a vLLM server that serves both, asked in place of the weights (key: $REDRAFT_API_KEY)",
        DATA,
    ),
    "endpoint_model": Flag("the target's name at the endpoint", DATA),
    "calibration": Flag(
        "calibration runs of `bench case` or `bench triage`, in place of those that come with redraft; "
        "repeatable, `ours` adds those",
        DATA,
        old=("--cases",),
    ),
    # decoding
    "k": Flag("draft tokens per step", SAMPLING),
    "temperature": Flag("sampling temperature; 0 is greedy", SAMPLING, low=0.0),
    "top_k": Flag("keep the k most likely tokens; 0 keeps all", SAMPLING, low=0),
    "top_p": Flag("nucleus mass; 1 keeps all", SAMPLING, low=1e-6, high=1.0),
    "min_p": Flag(
        "keep tokens this likely against the most likely one", SAMPLING, low=0.0, high=1.0
    ),
    "acceptance": Flag("acceptance mode: greedy, seeded or sampled", SAMPLING),
    "draft_token": Flag(
        "how the draft picks a token: deterministic, coupled (seeded), sampled (sampled)", SAMPLING
    ),
    "seed": Flag("seed of sampled answers", SAMPLING),
    "max_new_tokens": Flag("longest answer, in tokens", SAMPLING, low=2),
    "lookahead": Flag(
        "tokens kept past each answer's end, for replay at K", SAMPLING, old=("--overrun",), low=0
    ),
    "show_drafts": Flag("colour tokens by where they come from", OUTPUT),
    "turns": Flag("of a conversation: all user turns, or the last", DATA),
    # this run
    "run": Flag(
        "run folder of `redraft adapt`: its record is compared, and its target, draft, prompts and K are "
        "the defaults"
    ),
    "bank": Flag("folder of the bank", argument=True),
    "name": Flag("what an adapter is called in the bank", argument=True),
    "replace": Flag("in place of another adapter of that name"),
    "folder": Flag("run folder of `redraft adapt`", argument=True),
    "mode": Flag("replay (exact, batched), expected (over sampled draft tokens), or live"),
    "batch": Flag("requests served at a time", low=1),
    "most": Flag("prompts answered; a trial learns from half of the answers", low=1),
    "published": Flag("the draft's tau on its base, for retention without --base", low=1.0),
    "worth": Flag("the gain in speed from which adapting is worth it (0.1: 10 %)", low=0.0),
    "serve": Flag("tokens that will be served: the least time in all decides", low=1),
    "method": Flag(
        "adapters whose training is timed, for drafts that lack the default's [default: expert+fc+norms]"
    ),
    "prompt_count": Flag("prompts that are answered and trained on", low=1),
    "prompt_tokens": Flag("tokens of a prompt, in the mean", low=2),
    "answer_tokens": Flag("tokens of an answer, in the mean", low=2),
    "gpu": Flag("a GPU by name, e.g. H100 [default: this machine, tried for a second]"),
    "gpus": Flag("how many of them train on shares of each batch", low=1),
    "expected": Flag("the tau that is expected [default: that of the first looks]", low=1.0),
    "every": Flag("seconds between two looks", low=0.1),
    "drop": Flag("the share of tau whose loss matters (0.1: 10 %)", low=0.01, high=0.9),
    "days": Flag("days from one false alarm to the next, in the mean", low=0.01),
    "learn": Flag("looks that are learned on before any alarm", low=8),
    "looks": Flag("end after so many looks [default: go on for ever]", low=1),
    "until_alarm": Flag("end at the first alarm, with exit code 3"),
    "metrics_file": Flag("also write Prometheus gauges into this file at every look", OUTPUT),
    "engine": Flag("the serving engine: vllm or llama.cpp"),
    "python": Flag(
        "Python of the engine's environment (default: $REDRAFT_VLLM_PYTHON or $REDRAFT_LLAMACPP_PYTHON)"
    ),
    "concurrency": Flag("requests at a time whose speed is measured"),
    "repeats": Flag("timed passes at each concurrency", low=1),
    "port": Flag("port [default: a free one]", low=1, high=65535),
    "engine_args": Flag("flags of your own for the engine's server, without and with the draft"),
    "outtype": Flag(
        "type that the target is converted to, as llama.cpp names it: q8_0, q4_k_m [default: that of --dtype]"
    ),
    "converted": Flag("folder that keeps models converted for the engine [default: none is kept]"),
    "start_timeout": Flag("seconds the engine may take to start", low=1),
    "check": Flag("check stored features: every checksum, some rows' states"),
    "batch_tokens": Flag("tokens that the target reads at a time", low=1),
    "verify": Flag("read the folder back by a second reader, compare logits"),
    # output
    "examples": Flag("print samples from the top, the middle, the bottom", OUTPUT, "--explain"),
    "save_ids": Flag("write the rendered prompts as a JSON list of id lists", OUTPUT),
    "layout": Flag("layout to write: redraft, speculators or specforge", OUTPUT),
    "max_gb": Flag("refuse to write more than this", OUTPUT, low=0.0),
    "shard_mb": Flag("largest shard of a store; four times this is held", OUTPUT, low=1),
    "form": Flag("draft (merged, stock) or peft (the adapter alone, of low rank)", OUTPUT, "--as"),
    "format": Flag("auto (the kind's own for vLLM) or one of docs/formats.md", OUTPUT),
    "tp": Flag("tensor-parallel sizes to pad the FFN for, e.g. 1,2,4,8", OUTPUT),
    "push_to_hub": Flag("also upload to this Hub id, privately", OUTPUT),
    "out": Flag("what to write; run again to resume", OUTPUT),
    "as_json": Flag("print one JSON object on stdout", OUTPUT, "--json"),
    "quiet": Flag("no progress on stderr", OUTPUT, "--quiet", old=("-q",)),
}
