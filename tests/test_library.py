"""The Python of the documents runs, against the debug run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType

import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from traitlets.config import Config

from rldecoder import open_run
from rldecoder.release.writing import write_release
from tests.conftest import ROOT

OPENED = 'rldecoder.open_run("configs/quickstart.yaml")'
RELEASE = '"my-release/"'


def python_of(page: str) -> str:
    """All Python of a page, in order."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return "\n".join(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))


@pytest.mark.parametrize("page", ["library.md", "decoder.md"])
def test_the_pages_python_runs(
    page: str,
    debug_store: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    code = python_of(page)
    assert code.count(OPENED) == 1
    monkeypatch.chdir(ROOT)
    if RELEASE in code:
        monkeypatch.setenv("RLDECODER_CACHE", str(tmp_path / "cache"))
        write_release(open_run("configs/debug.yaml", debug_store), tmp_path / "release")
        code = code.replace(RELEASE, repr(str(tmp_path / "release")))
    opened = f'rldecoder.open_run("configs/debug.yaml", {str(debug_store)!r})'
    exec(compile(code.replace(OPENED, opened), page, "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) >= code.count("print(")


def test_the_first_ten_lines_are_ten() -> None:
    first = python_of("library.md").split("steering =")[0]
    assert len([line for line in first.splitlines() if line.strip()]) <= 11


def test_a_releases_three_lines_are_three() -> None:
    code = python_of("library.md")
    lines = [line for line in code[code.rindex("import rldecoder") :].splitlines() if line.strip()]
    assert len(lines) == 3
    assert RELEASE in lines[1]


def test_the_tour_runs(debug_store: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In the shell that is inside every kernel: a kernel would import all of it once more."""
    cells = json.loads((ROOT / "docs" / "tour.ipynb").read_text(encoding="utf-8"))["cells"]
    assert all(not cell.get("outputs") for cell in cells)  # committed without results
    monkeypatch.setenv("RLDECODER_TOUR_STORE", str(debug_store))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.chdir(ROOT / "docs")
    quiet = Config({"HistoryManager": {"enabled": False}})
    shell = InteractiveShell(config=quiet, user_module=ModuleType("tour"))
    shown = []
    for cell in cells:
        if cell["cell_type"] == "code":
            with capture_output():
                ran = shell.run_cell("".join(cell["source"]))
            ran.raise_error()
            data, _ = shell.display_formatter.format(ran.result)
            shown += [data["text/html"]] if "text/html" in data else []
    assert len(shown) == 4  # the run, a reading, a feature table, an explanation
    assert all('class="rldecoder"' in html for html in shown)
