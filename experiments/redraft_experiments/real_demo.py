"""`redraft demo --real`: SmolLM2-135M-Instruct, a medical fine-tune of it, and the base's draft, adapted to it here.

    base           the model, from its PyPI package or the Hub
    draft          the base's EAGLE-3 draft (see `kept_parts.py`)
    prompts.jsonl  questions about common conditions
    run            `redraft adapt`

Each part is cached in the folder, so that running again goes on, or shows the result again.
"""

from __future__ import annotations

import json
from pathlib import Path

from redraft.config import resolve
from redraft.core.files import write_text
from redraft.core.report_record import AdaptReport
from redraft.models.loading import load_target
from redraft.pipeline.adapt import adapt
from redraft.pipeline.run_folder import RunFolder

from .kept_parts import KEPT, MEMBER, restore
from .pretrained import build_model

CONDITIONS = (
    *("asthma", "anemia", "arthritis", "bronchitis", "cataracts", "celiac disease", "chickenpox"),
    *(
        "the common cold",
        "Crohn's disease",
        "cystic fibrosis",
        "dementia",
        "depression",
        "diabetes",
    ),
    *("eczema", "epilepsy", "gallstones", "glaucoma", "gout", "hay fever", "heart failure"),
    *("hepatitis B", "high blood pressure", "influenza", "insomnia", "kidney stones", "leukemia"),
    *("lupus", "Lyme disease", "malaria", "measles", "migraine", "multiple sclerosis", "mumps"),
    *(
        "obesity",
        "osteoporosis",
        "Parkinson's disease",
        "pneumonia",
        "psoriasis",
        "rheumatic fever",
    ),
    *("scoliosis", "shingles", "sickle cell disease", "sleep apnea", "stroke", "tuberculosis"),
    *("ulcerative colitis", "vitiligo", "whooping cough"),
)
QUESTIONS = (
    "What are the symptoms of {}?",
    "What causes {}?",
    "What are the treatments for {}?",
    "Who is at risk for {}?",
    "How is {} diagnosed?",
    "How can {} be prevented?",
)
LIMIT = 200
SETTINGS = {
    "regenerate.max_new_tokens": 96,
    "general.aside": 24,
    "measure.eval_limit": 32,
    "measure.heldout": 24,
    "measure.eval_new_tokens": 96,
    "train.batch_tokens": 2048,
    "train.precision": "bf16",
}


def run_real_demo(out: Path) -> AdaptReport:
    """Adapt the base's draft to the fine-tune, in `out`; the report. Raises UserError where the base cannot be had."""
    with RunFolder.open(out) as run:
        run.stage("base", {"model": "smollm2"}, ["base"], lambda: _base(out))
        run.stage(
            "draft", {"kept": "smollm2"}, ["draft"], lambda: restore(out / "base", out / "draft")
        )
        run.stage("prompts", {"asked": questions()}, ["prompts.jsonl"], lambda: _write(out))
    target = load_target(str(out / "base"), adapter=str(KEPT / MEMBER))
    return adapt(
        target,
        str(out / "draft"),
        str(out / "prompts.jsonl"),
        out=out / "run",
        limit=LIMIT,
        config=resolve([("demo", SETTINGS)]),
    ).report


def questions() -> list[str]:
    return [question.format(name) for name in CONDITIONS for question in QUESTIONS]


def _base(out: Path) -> None:
    build_model("smollm2", out / "base")


def _write(out: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": text}]} for text in questions()]
    write_text(out / "prompts.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
