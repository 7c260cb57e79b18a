"""Facts about the machine and the code that go into every manifest."""

from __future__ import annotations

import ast
import hashlib
import platform
import resource
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PACKAGE = Path(__file__).parent
TRACKED_PACKAGES = (
    "torch", "transformers", "trl", "tokenizers", "safetensors", "pyarrow", "numpy", "scipy",
    "scikit-learn", "datasets", "prefect", "pydantic",
)  # fmt: skip


@cache
def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that results may depend on."""
    versions = {"python": platform.python_version()}
    for name in TRACKED_PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "absent"
    return versions


@cache
def git_commit() -> str | None:
    """The commit of the checkout this package runs from (`-dirty` when changed), or None."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--match="],
            cwd=PACKAGE, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()


@cache
def source_digest(module: str) -> str:
    """SHA-256 over a module's source and that of every rldecoder module it imports.

    Args:
        module: dotted name, such as `rldecoder.stages.train_sae`.
    """
    seen: dict[str, bytes] = {}
    queue = [module]
    while queue:
        name = queue.pop()
        path = _module_path(name)
        if name in seen or path is None:
            continue
        seen[name], imported = _read_source(path)
        queue += imported
    total = hashlib.sha256()
    for name in sorted(seen):
        total.update(name.encode() + b"\0" + seen[name])
    return total.hexdigest()


@cache
def _read_source(path: Path) -> tuple[bytes, tuple[str, ...]]:
    """A file's hash, and names that it may import; parsed once, though most stages share it."""
    source = path.read_bytes()
    imported: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            imported += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return hashlib.sha256(source).digest(), tuple(imported)


def await_device(device: torch.device) -> None:
    """Wait until all work is done that a GPU was given: else a clock stops too early."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak resident memory of this process so far, or peak allocation on the accelerator."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if platform.system() == "Darwin" else 1024
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit


def device_name(device: torch.device) -> str:
    """The model name of a GPU, or of the CPU."""
    if device.type == "cuda":
        import torch

        return str(torch.cuda.get_device_name(device))
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _module_path(name: str) -> Path | None:
    parts = name.split(".")
    if parts[0] != PACKAGE.name:
        return None
    base = PACKAGE.joinpath(*parts[1:])
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path
    return None
