"""The house's one law: subjects <- stages <- tasks <- flows, read from the syntax trees."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SUBJECTS = (
    "config", "lm", "data", "sae", "decoder", "rl", "interp", "explain", "evals", "dashboard",
    "serve",
)  # fmt: skip
CORE = (
    "errors", "seeds", "schemas", "artifacts", "mirror", "devices", "lease_files", "checkpoints",
    "curves", "provenance", "terminal", "urls", "json_text",
)  # fmt: skip
ABOVE_SUBJECTS = ("rldecoder.stages", "rldecoder.runner", "rldecoder.cli", "tasks", "flows")


TABLE = ("table", "context", "fingerprints")  # what the rooms are furnished with


def imports(path: Path) -> set[str]:
    """Dotted names of everything a file imports, at any depth of nesting."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.ImportFrom):
            pytest.fail(f"{path}: relative imports hide layers; use absolute ones")
    return found


def offenders(paths: list[Path], forbidden: tuple[str, ...]) -> list[str]:
    """`file imports name` for every import of a forbidden package."""
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in paths
        for name in sorted(imports(path))
        if any(name == bad or name.startswith(bad + ".") for bad in forbidden)
    ]


def files(*folders: str) -> list[Path]:
    """All Python files below the folders."""
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def test_subjects_know_no_stage_and_no_prefect() -> None:
    paths = files(*(f"rldecoder/{name}" for name in SUBJECTS))
    paths += [ROOT / "rldecoder" / f"{name}.py" for name in CORE]
    assert len(paths) > 40
    assert offenders(paths, (*ABOVE_SUBJECTS, "prefect")) == []


def test_stages_know_no_other_stage_and_no_prefect() -> None:
    rooms = [p for p in files("rldecoder/stages") if p.stem not in ("__init__", *TABLE)]
    assert len(rooms) == 19
    names = {path.stem for path in rooms}
    for path in rooms:
        others = tuple(f"rldecoder.stages.{name}" for name in names | {"table", "fingerprints"})
        assert offenders([path], (*others, "rldecoder.runner", "tasks", "flows", "prefect")) == []


def test_tasks_know_no_flow() -> None:
    assert files("tasks")
    assert offenders(files("tasks"), ("flows",)) == []


def test_only_tasks_and_flows_know_prefect() -> None:
    assert offenders(files("rldecoder"), ("prefect",)) == []


def test_rooms_stay_small() -> None:
    paths = files("rldecoder", "tasks", "flows", "tests", "benchmarks")
    long = [p for p in paths if len(p.read_text(encoding="utf-8").splitlines()) > 500]
    assert long == []


def test_nothing_reads_a_pickle() -> None:
    forbidden = ("pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal")
    assert offenders(files("rldecoder", "tasks", "flows"), forbidden) == []
    for path in files("rldecoder", "tasks", "flows"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                target = ast.unparse(node.func)
                assert target not in ("torch.load", "torch.save", "yaml.load"), (path, node.lineno)
                keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert keywords.get("trust_remote_code") in (None, "False"), (path, node.lineno)
                assert keywords.get("shell") in (None, "False"), (path, node.lineno)
