"""The house's one law, read from the imports and from the words of every module.

    subjects <- artifacts <- stages | dashboard | serve <- cli <- tasks <- flows

A module imports its own layer or a lower one. A subject knows no stage, not even by name.
`rldecoder` never imports `flows`: it finds the Prefect runner by an entry point.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections import defaultdict
from functools import cache

import pytest

from rldecoder.artifacts.catalogue import CATALOGUE
from tests.conftest import ROOT

SUBJECTS = ("lm", "data", "sae", "decoder", "rl", "interp", "explain", "evals")
LAYERS: tuple[tuple[str, ...], ...] = (
    # Ground: what everything may use. Settings know the names of stages, for these are their keys.
    (
        "rldecoder.axes", "rldecoder.checkpoints", "rldecoder.config", "rldecoder.curves",
        "rldecoder.devices",
        "rldecoder.entry",
        "rldecoder.errors", "rldecoder.executors", "rldecoder.failures", "rldecoder.far_failures",
        "rldecoder.far_reports",
        "rldecoder.figures", "rldecoder.files",
        "rldecoder.gates",
        "rldecoder.interrupts", "rldecoder.json_records", "rldecoder.json_text",
        "rldecoder.lease_files",
        "rldecoder.precision", "rldecoder.provenance",
        "rldecoder.reporting", "rldecoder.schemas", "rldecoder.sealed", "rldecoder.seeds",
        "rldecoder.optimizer_state", "rldecoder.terminal",
        "rldecoder.tracking", "rldecoder.urls", "rldecoder.user_files", "rldecoder.visible_text",
    ),
    tuple(f"rldecoder.{name}" for name in SUBJECTS),
    ("rldecoder.artifacts",),
    (
        "rldecoder", "rldecoder.dashboard", "rldecoder.opened", "rldecoder.planning",
        "rldecoder.release",
        "rldecoder.run", "rldecoder.runner", "rldecoder.serve", "rldecoder.stages",
    ),
    ("rldecoder.cli",),
    ("tasks",),
    ("flows",),
)  # fmt: skip
FURNITURE = (
    "table",
    "context",
    "fingerprints",
    "preflight",
    "inputs",
    "overview",
    "streams",
    "replay_text",
)  # what the rooms are furnished with


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the project by dotted name."""
    found = {}
    for top in ("rldecoder", "tasks", "flows"):
        for path in sorted((ROOT / top).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = ast.parse(path.read_text(encoding="utf-8"))
    return found


@cache
def imports(name: str, *, typing: bool = True) -> frozenset[str]:
    """Dotted names of all that a module imports, at any depth of nesting.

    Args:
        typing: with what is imported under TYPE_CHECKING alone.
    """
    tree = modules()[name]
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if not typing and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            skipped |= {id(inner) for inner in ast.walk(node)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative imports hide layers; use absolute ones"
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {part if part in modules() else str(node.module) for part in parts}
    return frozenset(found)


def unit(name: str) -> str:
    """The package of a module: a folder of rldecoder, a file beside those, `tasks` or `flows`."""
    parts = name.split(".")
    if parts[0] != "rldecoder" or len(parts) == 1:
        return parts[0]
    return ".".join(parts[:2])


def layer(name: str) -> int:
    """How high a module is."""
    (number,) = (i for i, units in enumerate(LAYERS) if unit(name) in units)
    return number


def test_every_module_has_a_layer() -> None:
    assert len(modules()) > 250
    homeless = sorted({unit(name) for name in modules()} - {u for units in LAYERS for u in units})
    assert homeless == []


def test_no_module_imports_a_higher_layer() -> None:
    wrong = [
        f"{name} imports {imported}"
        for name in modules()
        for imported in sorted(imports(name))
        if imported in modules() and layer(imported) > layer(name)
    ]
    assert wrong == []


def test_packages_form_no_circle() -> None:
    """Entry points count: what a group offers is used by the package that looks it up."""
    edges: dict[str, set[str]] = defaultdict(set)
    for name in modules():
        for imported in imports(name, typing=False):
            if imported in modules() and unit(imported) != unit(name):
                edges[unit(name)].add(unit(imported))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    # `flows.cli_run` is reached from the command line, and must not come back to it.
    (runner,) = project["entry-points"]["rldecoder.runners"].values()
    edges["rldecoder.cli"].add(unit(runner.partition(":")[0]))

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for following in edges[waiting.pop()] - seen:
                seen.add(following)
                waiting.append(following)
        return seen

    assert [package for package in list(edges) if package in reached(package)] == []


def test_rooms_know_no_other_room_and_no_runner() -> None:
    rooms = {
        name for name in modules()
        if name.startswith("rldecoder.stages.") and name.split(".")[2] not in FURNITURE
    }  # fmt: skip
    assert len(rooms) == len(CATALOGUE) == 19
    forbidden = {*rooms, "rldecoder.stages.table", "rldecoder.runner", "rldecoder.run"}
    assert [(room, sorted(imports(room) & forbidden)) for room in rooms
            if imports(room) & forbidden] == []  # fmt: skip


def test_readers_of_artifacts_stand_beside_the_stages() -> None:
    """The report and the server read the catalogue; of the stages they know the inputs' types."""
    for name in modules():
        if unit(name) in ("rldecoder.dashboard", "rldecoder.serve"):
            stages = {n for n in imports(name) if n.startswith("rldecoder.stages")}
            assert stages <= {"rldecoder.stages.inputs"}, name


def test_only_tasks_and_flows_know_prefect() -> None:
    users = {unit(n) for n in modules() if any(i.split(".")[0] == "prefect" for i in imports(n))}
    assert users == {"tasks", "flows"}


def test_only_the_session_knows_ray() -> None:
    users = {n for n in modules() if any(i.split(".")[0] == "ray" for i in imports(n))}
    assert users == {"rldecoder.executors.ray_session"}


def test_nothing_but_the_command_line_imports_it() -> None:
    users = {unit(n) for n in modules() if any(unit(i) == "rldecoder.cli" for i in imports(n))}
    assert users <= {"rldecoder.cli"}


def strings(tree: ast.Module) -> list[ast.Constant]:
    """String constants that are no docstrings."""
    docs = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)
    }  # docstrings, of fields too
    return [
        node for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs
    ]  # fmt: skip


def test_subjects_know_no_stage_by_name() -> None:
    """In an error a *setting* may be named, `train_sae.lr`: it is what the user can change."""
    # `ingest`, `frontier`, `baselines`, `evaluate` and `report` are words of their own.
    names = {kind.stage for kind in CATALOGUE if "_" in kind.stage}
    word = re.compile(rf"\b({'|'.join(sorted(names))})\b(?!\.[a-z`{{])")
    wrong = [
        f"{name}:{node.lineno} {node.value!r}"
        for name, tree in modules().items()
        if unit(name).removeprefix("rldecoder.") in SUBJECTS
        for node in strings(tree)
        if word.search(node.value)
    ]
    assert wrong == []


def test_a_published_file_is_named_in_the_catalogue_alone() -> None:
    names = {file.name for kind in CATALOGUE for file in kind.files().values() if "." in file.name}
    assert len(names) > 30
    wrong = [
        f"{name}:{node.lineno} {node.value!r}"
        for name, tree in modules().items()
        if name != "rldecoder.artifacts.catalogue"
        for node in strings(tree)
        if node.value in names
    ]
    assert wrong == []


def test_rooms_stay_small() -> None:
    paths = [p for top in ("rldecoder", "tasks", "flows") for p in (ROOT / top).rglob("*.py")]
    long = [str(p) for p in paths if len(p.read_text(encoding="utf-8").splitlines()) > 450]
    assert long == []
    tests = [p for top in ("tests", "benchmarks") for p in (ROOT / top).rglob("*.py")]
    assert [str(p) for p in tests if len(p.read_text(encoding="utf-8").splitlines()) > 500] == []


@pytest.mark.parametrize("top", ["rldecoder", "tasks", "flows"])
def test_nothing_reads_a_pickle(top: str) -> None:
    forbidden = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    for name, tree in modules().items():
        if name.split(".")[0] != top:
            continue
        assert not {i.split(".")[0] for i in imports(name)} & forbidden, name
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                target = ast.unparse(node.func)
                assert target not in ("torch.load", "torch.save", "yaml.load"), (name, node.lineno)
                keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert keywords.get("trust_remote_code") in (None, "False"), (name, node.lineno)
                assert keywords.get("shell") in (None, "False"), (name, node.lineno)
