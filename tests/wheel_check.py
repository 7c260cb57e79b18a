"""The package as strangers get it: wheel and sdist, in an environment of its own, from elsewhere.

`python -m tests.wheel_check` (CI runs it after `make test`) builds both, installs the wheel, runs
the whole debug run by its name and the tests of the public API against what was installed.
tests/test_wheel.py does the cheap part of it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
API_TESTS = ("tests/test_run.py", "tests/test_library.py", "tests/release/test_opening.py")
# What the tests read beside the package. The package itself must not be among it.
_BESIDE = ("tests", "docs", "configs", "README.md", "pyproject.toml", "constraints.txt")


def build(out: Path) -> tuple[Path, Path]:
    """Build sdist, and the wheel from it; both files."""
    # From a copy: setuptools writes into the tree that it builds.
    tree = out / "tree"
    kept = ("rldecoder", "flows", "tasks", "configs", "prefect.yaml", "pyproject.toml")
    for name in (*kept, "README.md", "LICENSE"):
        _copy(ROOT / name, tree / name)
    _run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(tree)], out)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def install(wheel: Path, folder: Path) -> Path:
    """Install the wheel into a new environment that borrows this one's dependencies; its bin/."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    _run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python),
         "install", "-q", "--no-deps", "--no-index", str(wheel)],
        folder,
    )  # fmt: skip
    # A line of a .pth file is a folder to look into: its own .pth files, with the checkout that
    # is installed there, are not read.
    (site,) = folder.glob("lib/python*/site-packages")
    borrowed = [path for path in sys.path if path.endswith("site-packages")]
    (site / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    return folder / "bin"


def clean_env() -> dict[str, str]:
    """The environment without what would lead back to the checkout."""
    dropped = ("PYTHONPATH", "VIRTUAL_ENV", "PREFECT_API_URL")
    return {key: value for key, value in os.environ.items() if key not in dropped}


def api_tests(scripts: Path, folder: Path) -> None:
    """Run the tests of the public API from a folder that holds no package."""
    for name in _BESIDE:
        _copy(ROOT / name, folder / name)
    _run([str(scripts / "python"), "-m", "pytest", "-q", "-m", "not slow", *API_TESTS], folder)


def _copy(source: Path, to: Path) -> None:
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    to.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, to, symlinks=True, ignore=ignore)
    else:
        shutil.copy2(source, to)


def _run(command: list[str], cwd: Path) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=clean_env(), stdin=subprocess.DEVNULL, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise SystemExit(f"{command}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def main() -> None:
    """All of it, in a temporary folder."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        sdist, wheel = build(place / "dist")
        print(f"built {sdist.name}, {wheel.name}", flush=True)
        scripts = install(wheel, place / "env")
        elsewhere = place / "elsewhere"
        elsewhere.mkdir()
        shown = _run([str(scripts / "rldecoder"), "run", "debug", "--no-prefect"], elsewhere)
        assert (elsewhere / "artifacts" / "report").is_dir(), shown
        print("rldecoder run debug: done", flush=True)
        os.environ["RLDECODER_DEBUG_STORE"] = str(elsewhere / "artifacts")
        api_tests(scripts, place / "tests")
        print("tests of the public API: passed")


if __name__ == "__main__":
    main()
