"""The shape of the code: imports point one way, and `import redraft` is light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from redraft.adapters.table import TABLE, VOCABULARY, AdapterRow

ROOT = Path(__file__).parents[1] / "src" / "redraft"
LAYERS = [
    {"core"},
    {"models"},
    {"drafts"},
    {"adapters", "losses"},
    {"config"},
    {"checkpoints", "features", "prompts"},
    {"decoding"},
    {"metrics"},
    {"training"},
    {"selection", "serving"},
    {"generation"},
    {"report"},
    {"pipeline"},
    {"check"},
    {"fleet"},
    {"cli", "__init__", "__main__"},
]
"""Packages and top-level modules; each imports from those above it in this list only."""
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


MOST_ARROWS = 122


def packages() -> dict[Path, str]:
    return {p: p.relative_to(ROOT).parts[0].removesuffix(".py") for p in ROOT.rglob("*.py")}


def imported(path: Path) -> set[str]:
    """Modules of redraft that a file imports, wherever in the file it does so: `core.errors`."""
    found = set()
    folder = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        named = (node.module or "").split(".") if node.module else []
        if node.level:
            named = [*folder[: len(folder) - node.level + 1], *named]
        elif named[:1] == ["redraft"]:
            named = named[1:]
        else:
            continue
        for alias in node.names:
            inner = ROOT.joinpath(*named, alias.name)
            is_module = inner.with_suffix(".py").is_file() or inner.is_dir()
            found.add(".".join([*named, alias.name] if is_module else named))
    return found - {""}


def arrows() -> set[tuple[str, str]]:
    """Which package imports which."""
    return {
        (package, module.split(".")[0])
        for path, package in packages().items()
        for module in imported(path)
        if module.split(".")[0] != package
    }


def upward(found: set[tuple[str, str]]) -> list[str]:
    return [f"{a} imports {b}" for a, b in sorted(found) if RANK[b] >= RANK[a]]


def circles() -> list[str]:
    """Modules that import themselves by way of others, lazy imports included."""
    graph = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): imported(path)
        for path in ROOT.rglob("*.py")
    }
    found = []
    for module in graph:
        seen: set[str] = set()
        new = set(graph[module])
        while new:
            seen |= new
            new = {inner for one in new for inner in graph.get(one, ())} - seen
        if module in seen:
            found.append(module)
    return found


def test_every_package_has_a_place() -> None:
    assert set(packages().values()) == set(RANK)


def test_imports_point_one_way() -> None:
    assert upward({arrow for arrow in arrows() if not arrow[0].startswith("__")}) == []


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert circles() == []


def test_the_map_stays_small() -> None:
    assert len(arrows()) <= MOST_ARROWS


def test_a_wrong_import_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "drafts").mkdir()
    (tmp_path / "decoding").mkdir()
    bad, other = tmp_path / "drafts" / "bad.py", tmp_path / "decoding" / "verify.py"
    bad.write_text("def f():\n    from ..decoding.verify import accept_greedy\n")
    other.write_text("from ..drafts import bad\n")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert upward(arrows()) == ["drafts imports decoding"]
    assert sorted(circles()) == ["decoding.verify", "drafts.bad"]


def test_the_package_knows_nothing_of_the_experiments() -> None:
    for path in ROOT.rglob("*.py"):
        assert "redraft_experiments" not in path.read_text(), path


def test_decoding_and_metrics_name_no_concrete_draft() -> None:
    for package in ("decoding", "metrics"):
        for path in (ROOT / package).glob("*.py"):
            assert "eagle" not in path.read_text().lower(), path


def test_drafts_do_not_decide_acceptance() -> None:
    for path in (ROOT / "drafts").glob("*.py"):
        names = {
            n.name for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)
        }
        assert not any("accept" in name or "verify" in name for name in names), path


def asks_for_an_adapter(tree: ast.AST) -> set[str]:
    """Names of adapters, and marks in their tensors' names, that code decides by."""
    named = {row.name for row in TABLE if row.code != AdapterRow.code or row.fresh}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare | ast.Call | ast.MatchValue):
            texts = [n.value for n in ast.iter_child_nodes(node) if isinstance(n, ast.Constant)]
            found |= {text for text in texts if text in named and isinstance(node, ast.Compare)}
            found |= {
                t
                for t in texts
                if isinstance(t, str) and (".private" in t or "private." in t or ".lora" in t)
            }
        if isinstance(node, ast.Attribute) and node.attr in named:
            found.add(node.attr)
    return found


def test_nothing_outside_its_own_file_asks_which_adapter_it_is() -> None:
    own = {row.code.split(":")[0] for row in (*TABLE, VOCABULARY)} - {AdapterRow.code.split(":")[0]}
    for path in ROOT.rglob("*.py"):
        if not (path.parent.name == "adapters" and path.stem in own):
            assert asks_for_an_adapter(ast.parse(path.read_text())) == set(), path
    for wrong in (
        "if 'expert' in method.adapters: pass",
        "wide = name.endswith('private.down_proj.weight')",
        "if '.lora_' in name: pass",
        "rank = method.lora",
    ):
        assert asks_for_an_adapter(ast.parse(wrong)), wrong


def test_import_redraft_loads_no_torch() -> None:
    code = (
        "import sys, redraft, redraft.config, redraft.core.records; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_public_names_resolve() -> None:
    import redraft

    for name in redraft.__all__:
        assert callable(getattr(redraft, name))


KINDS = re.compile(r"\b(eagle3?|token_lm)\b|[\"']mtp[\"']|Eagle3?[A-Z]|TokenLM|Mtp[A-Z]")
NOT_A_KIND = {
    "models/loading.py": "names of tensors in a target's file",
    "features/specforge.py": "the path of a file in SpecForge",
}


def test_only_their_own_files_name_kinds_of_draft() -> None:
    """Whatever is special about a kind is in its row, so a new one touches `drafts/` alone."""
    for path in ROOT.rglob("*.py"):
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith("drafts/") and name not in NOT_A_KIND:
            found = KINDS.search(path.read_text())
            assert found is None, f"{name} names {found and found[0]}"


def test_what_kinds_share_names_none_of_them() -> None:
    shared = [path for path in (ROOT / "drafts").glob("*.py") if path.name != "kinds.py"]
    for path in [*shared, ROOT / "drafts" / "stored" / "rows.py"]:
        tree = ast.parse(path.read_text())
        texts = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
        assert not texts & {"eagle", "eagle3", "mtp", "token_lm"}, path
