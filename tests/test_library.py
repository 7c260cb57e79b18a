"""The Python of the documents runs, against the debug run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

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


@pytest.mark.slow
def test_the_tour_runs(debug_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("RLDECODER_TOUR_STORE", str(debug_store))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "docs" / "tour.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells)  # committed without results
    where = {"metadata": {"path": str(ROOT / "docs")}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = [out.data["text/html"] for out in outputs if "text/html" in out.get("data", {})]
    assert len(shown) == 4  # the run, a reading, a feature table, an explanation
    assert all('class="rldecoder"' in html for html in shown)
