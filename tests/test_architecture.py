"""The shape of the code: imports point one way, and `import redraft` is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1] / "src" / "redraft"
LAYERS = [
    {"errors", "rng", "faults", "head", "tokens", "visible", "encodings", "tool_calls"},
    {"files", "methods", "templates"},
    {"records", "config", "console", "lock"},
    {"target", "batches", "slots"},
    {"model_cache", "final_norm"},
    {"loading"},
    {"drafts"},
    {"private", "decode"},
    {"formats"},
    {"measuring"},
    {"training"},
    {"data"},
    {"report", "run_folder"},
    {"engines"},
    {"steps", "custom_generate"},
    {"rounds", "triage", "safety"},
    {"summary"},
    {"flow"},
    {"bench"},
    {"cli", "__init__", "__main__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def rooms() -> dict[Path, str]:
    return {p: p.relative_to(ROOT).parts[0].removesuffix(".py") for p in ROOT.rglob("*.py")}


def imported(path: Path) -> set[str]:
    """Rooms that a file imports, wherever in the file it does so."""
    found = set()
    depth = len(path.relative_to(ROOT).parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            if node.level == depth:
                first = (node.module or "").split(".")[0]
                found |= {first} if first else {alias.name for alias in node.names}
            elif node.level == 0 and (node.module or "").startswith("redraft."):
                found.add((node.module or "").split(".")[1])
    return found


def violations(files: dict[Path, str]) -> list[str]:
    wrong = []
    for path, room in files.items():
        for other in imported(path) - {room, "__version__"}:
            if RANK[other] >= RANK[room]:
                wrong.append(f"{path.relative_to(ROOT)} imports {other}")
    return wrong


def test_every_room_has_a_place() -> None:
    assert set(rooms().values()) == set(RANK)


def test_imports_point_one_way() -> None:
    files = {p: r for p, r in rooms().items() if r not in ("__init__", "__main__")}
    assert violations(files) == []


def test_a_wrong_import_would_be_seen(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "drafts").mkdir()
    bad = tmp_path / "drafts" / "bad.py"
    bad.write_text("from ..decode.verify import accept_greedy\n")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert violations({bad: "drafts"}) == ["drafts/bad.py imports decode"]


def test_decoding_and_measuring_name_no_concrete_draft() -> None:
    for room in ("decode", "measuring"):
        for path in (ROOT / room).glob("*.py"):
            assert "eagle" not in path.read_text().lower(), path


def test_drafts_do_not_decide_acceptance() -> None:
    for path in (ROOT / "drafts").glob("*.py"):
        names = {
            n.name for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)
        }
        assert not any("accept" in name or "verify" in name for name in names), path


def test_import_redraft_loads_no_torch() -> None:
    code = "import sys, redraft, redraft.config, redraft.records; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_public_names_resolve() -> None:
    import redraft

    for name in redraft.__all__:
        assert callable(getattr(redraft, name))
