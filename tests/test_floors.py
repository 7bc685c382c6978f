"""One import direction: a room imports from floors below its own, never sideways; and light things stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import isoform

ROOT = Path(isoform.__file__).parent
FLOORS = {
    **dict.fromkeys(("contracts", "registry", "errors", "machine", "chance", "storage", "yaml12"), 1),
    **dict.fromkeys(("layers", "text", "config"), 2),
    **dict.fromkeys(("models", "data", "reading"), 3),
    **dict.fromkeys(("checkpoints", "evaluation", "objectives"), 4),
    **dict.fromkeys(("training", "serving"), 5),
    "studies": 6,
    **dict.fromkeys(("cli", "__init__"), 7),
}


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Rooms of isoform that a file imports, wherever in the file it does; the package itself is `__init__`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""]
            if node.module == "isoform":
                names = [f"isoform.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "isoform":
                found.add(parts[1] if len(parts) > 1 else "__init__")
    return found


def violations(files: list[Path]) -> list[str]:
    wrong = []
    for path in files:
        own = room(path)
        for other in imported_rooms(path) - {own}:
            if other in {"__init__", "__version__"} and FLOORS[own] >= 5:
                continue  # the version, for manifests
            ground = FLOORS[own] == FLOORS.get(other) == 1
            if other not in FLOORS or not (FLOORS[other] < FLOORS[own] or ground):
                wrong.append(f"{path.relative_to(ROOT)} imports {other}")
    return wrong


def test_every_room_stands_on_a_floor():
    assert {room(path) for path in ROOT.rglob("*.py")} <= set(FLOORS)


def test_rooms_import_only_from_floors_below():
    assert violations(list(ROOT.rglob("*.py"))) == []


def test_an_import_upwards_or_sideways_would_be_seen(monkeypatch, tmp_path):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "layers").mkdir()
    (tmp_path / "layers" / "wrong.py").write_text(
        "def f():\n    from isoform.training import loop\nimport isoform.text\n"
    )
    assert len(violations(list(tmp_path.rglob("*.py")))) == 2


def modules_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_and_help_load_neither_torch_nor_numpy():
    for statement in ("import isoform", "import isoform.cli", "from isoform.cli import app"):
        assert not {"torch", "numpy", "transformers", "pydantic"} & modules_after(statement), statement


def test_a_report_needs_no_torch():
    assert "torch" not in modules_after("import isoform.studies.report, isoform.studies.terminal")


def test_no_pickle_and_no_remote_code():
    for path in ROOT.rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not {"pickle", "marshal", "dill", "cloudpickle", "joblib"} & set(names), path
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {"torch.load", "torch.save", "np.load"}:
                raise AssertionError(f"{path}:{node.lineno} calls {ast.unparse(node.func)}")
