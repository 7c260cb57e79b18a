"""The corpus that needs no download: documentation of Python and of installed packages.

Sources are parsed with `ast`; nothing is imported or executed, so the corpus cannot run code and
does not depend on what a module does when it is imported. Text comes from docstrings, from the
help topics, from C extensions' docstrings that packages keep in Python calls (`add_docstr`), and
from the README in each package's metadata.

Leaks: every top-level module of the standard library belongs either to the documentation or to
the out-of-domain source code, never to both (`is_code_module`), and the code's docstrings are
removed, so that not even a docstring copied between modules is seen on both sides.
"""

from __future__ import annotations

import ast
import csv
import functools
import hashlib
import importlib.metadata
import inspect
import platform
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from rldecoder.data.documents import Candidate, Document, unit_hash
from rldecoder.errors import BadInputError

CORPUS_VERSION = 1
"""Raised when this file would make other documents from the same packages."""

STDLIB_LICENCE = "PSF-2.0"
CODE_SHARE = 0.15
"""Share of the standard library's top-level modules that are out-of-domain code."""

_SKIPPED_PARTS = {
    *("test", "tests", "testing", "idle_test", "conftest.py", "__pycache__"),
    # Other people's code, under other licences than the package that carries it.
    *("_vendor", "vendor", "_vendored", "extern", "_bundled", "node_modules", "site-packages"),
}
_DOCSTRING_CALLS = {"add_docstr", "add_newdoc", "add_docstr_all"}
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def is_code_module(name: str) -> bool:
    """Whether a standard library module (by its top-level name) is out-of-domain code."""
    return unit_hash("pysource", name.split(".")[0]) < CODE_SHARE


def pydocs_candidates(stdlib: bool, packages: tuple[str, ...]) -> Iterator[Candidate]:
    """Documents of the corpus, one a module, help topic or README, in a fixed order.

    Args:
        stdlib: read the standard library.
        packages: distributions to read, as `pip` names them.

    Raises:
        BadInputError: if a package is not installed or lists no files.
    """
    if stdlib:
        source = f"python=={platform.python_version()}"
        for name, path in _stdlib_modules():
            if not is_code_module(name):
                yield _docs_candidate("stdlib", name, path, source, STDLIB_LICENCE)
        yield from _topics(source)
    for package in packages:
        distribution = _distribution(package)
        source = f"{package}=={distribution.version}"
        licence = _licence(distribution)
        readme = distribution.metadata.get_payload()  # type: ignore[attr-defined]
        if isinstance(readme, str) and readme.strip():
            yield _text_candidate(
                f"pydocs:{package}:README", f"{package} README", source, licence, readme
            )
        for name, path in _package_modules(distribution):
            yield _docs_candidate(package, name, path, source, licence)


def pysource_candidates() -> Iterator[Candidate]:
    """Source code of the standard library modules that `pydocs` leaves out, no docstrings."""
    source = f"python=={platform.python_version()}"
    for name, path in _stdlib_modules():
        if is_code_module(name):
            yield _code_candidate(name, path, source)


def python_fingerprint(stdlib: bool, packages: tuple[str, ...]) -> dict[str, str]:
    """What the corpus depends on: versions, and the standard library's file names and sizes
    (systems ship it with or without tkinter, ensurepip, ...).

    Raises:
        BadInputError: if a package is not installed.
    """
    versions = {package: _distribution(package).version for package in packages}
    if stdlib:
        sizes = [f"{name} {path.stat().st_size}" for name, path in _stdlib_modules()]
        listing = hashlib.sha256("\n".join(sizes).encode()).hexdigest()[:16]
        versions["python"] = f"{platform.python_version()} {listing}"
    return versions | {"corpus": str(CORPUS_VERSION)}


def module_documentation(tree: ast.Module, name: str) -> str:
    """The docstrings of a module as one text: a line per class or function, then what it does.

    Private names and definitions without a docstring are left out; "" when nothing is left.
    """
    parts = []
    docstring = ast.get_docstring(tree)
    if docstring:
        parts.append(docstring)
    parts += _definitions(tree, "")
    return f"{name}\n\n" + "\n\n".join(parts) if parts else ""


def strip_docstrings(source: bytes) -> bytes:
    """Python source without its docstrings; a body that held nothing else becomes `pass`.

    Comments and all other text stay byte for byte.

    Raises:
        SyntaxError: if it is not Python.
    """
    lines = source.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    pieces, end = [], 0
    for node in _docstring_nodes(_parse(source)):
        # ast columns count UTF-8 bytes, which is why the source is cut as bytes.
        begin = starts[node.lineno - 1] + node.col_offset
        pieces += [source[end:begin], b"pass" if node.alone else b""]
        end = starts[node.end_lineno - 1] + node.end_col_offset
    return b"".join([*pieces, source[end:]])


class _Span:
    """Place of a docstring in its source."""

    def __init__(self, statement: ast.stmt, alone: bool) -> None:
        self.lineno, self.col_offset = statement.lineno, statement.col_offset
        self.end_lineno = statement.end_lineno or statement.lineno
        self.end_col_offset = statement.end_col_offset or statement.col_offset
        self.alone = alone


def _docstring_nodes(tree: ast.Module) -> list[_Span]:
    spans = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, *_DEFINITIONS)) and ast.get_docstring(node) is not None:
            alone = len(node.body) == 1 and not isinstance(node, ast.Module)
            spans.append(_Span(node.body[0], alone))
    return sorted(spans, key=lambda span: (span.lineno, span.col_offset))


def _definitions(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[str]:
    for item in node.body:
        if isinstance(item, _DEFINITIONS) and not item.name.startswith("_"):
            docstring = ast.get_docstring(item)
            name = prefix + item.name
            if docstring:
                yield f"{_signature(item, name)}\n\n{docstring}"
            if isinstance(item, ast.ClassDef):
                yield from _definitions(item, f"{name}.")
        elif isinstance(item, ast.Expr) and isinstance(item.value, ast.Call):
            yield from _documenting_call(item.value)


def _signature(item: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, name: str) -> str:
    if isinstance(item, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in item.bases)
        return f"class {name}({bases})" if bases else f"class {name}"
    return f"{name}({ast.unparse(item.args)})"


def _documenting_call(call: ast.Call) -> Iterator[str]:
    """Docstrings given to C functions by a call, as numpy and torch do; f-strings excepted."""
    function = call.func
    called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if called not in _DOCSTRING_CALLS:
        return
    for argument in call.args:
        for node in ast.walk(argument):
            if (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and "\n" in node.value
            ):
                yield inspect.cleandoc(node.value)


def _parse(source: bytes) -> ast.Module:
    with warnings.catch_warnings():  # other people's invalid escapes
        warnings.simplefilter("ignore")
        return ast.parse(source)


def _read_utf8(path: Path) -> bytes | None:
    """A source file; None when it is gone, or is not UTF-8 (a handful of old files)."""
    try:
        source = path.read_bytes()
        source.decode("utf-8")
    except (FileNotFoundError, UnicodeDecodeError):
        return None
    return source.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n")


def _text_candidate(key: str, title: str, source: str, licence: str, text: str) -> Candidate:
    document = Document(key, title, source, licence, text)
    return Candidate(key, lambda: document)


def _docs_candidate(package: str, name: str, path: Path, source: str, licence: str) -> Candidate:
    key = f"pydocs:{package}:{name}"

    def load() -> Document | None:
        content = _read_utf8(path)
        try:
            text = module_documentation(_parse(content), name) if content else ""
        except (SyntaxError, ValueError, RecursionError):
            return None  # templates and code for other Python versions are no documents
        return Document(key, name, source, licence, text) if text else None

    return Candidate(key, load)


def _code_candidate(name: str, path: Path, source: str) -> Candidate:
    key = f"pysource:stdlib:{name}"

    def load() -> Document | None:
        content = _read_utf8(path)
        try:
            text = strip_docstrings(content).decode("utf-8") if content else ""
        except (SyntaxError, ValueError, RecursionError):
            return None
        return Document(key, name, source, STDLIB_LICENCE, text) if text else None

    return Candidate(key, load)


def _topics(source: str) -> Iterator[Candidate]:
    """The topics of `help()`: the language reference, as a dict literal in pydoc_data.topics."""
    path = _stdlib_folder() / "pydoc_data" / "topics.py"
    if not path.is_file():
        return
    for node in _parse(path.read_bytes()).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for topic, text in sorted(ast.literal_eval(node.value).items()):
                yield _text_candidate(
                    f"pydocs:topic:{topic}", f"Python topic: {topic}", source, STDLIB_LICENCE, text
                )


def _stdlib_folder() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


@functools.cache
def _stdlib_modules() -> tuple[tuple[str, Path], ...]:
    """Name and path of every module of the standard library, tests and build data left out."""
    root = _stdlib_folder()
    found = []
    for top in sorted(sys.stdlib_module_names):
        package, single = root / top, root / f"{top}.py"
        paths = sorted(package.rglob("*.py")) if package.is_dir() else [single]
        for path in paths:
            inside = path.relative_to(root).as_posix()
            if _is_wanted(inside) and top != "pydoc_data" and path.is_file():
                found.append((_module_name(inside), path))
    return tuple(item for item in found if not item[0].startswith("_sysconfigdata"))


def _package_modules(distribution: importlib.metadata.Distribution) -> list[tuple[str, Path]]:
    """Name and path of every module that a wheel's RECORD lists."""
    root = Path(str(distribution.locate_file("")))
    rows = csv.reader((distribution.read_text("RECORD") or "").splitlines())
    listed = sorted(row[0] for row in rows if row)
    found = [(_module_name(inside), root / inside) for inside in listed if _is_wanted(inside)]
    if not found:
        raise BadInputError(
            f"Package {distribution.metadata['Name']} lists no Python files.",
            "It was installed without a RECORD, or as an editable package.",
            "Install it from a wheel or remove it from `ingest.sources[].packages`.",
        )
    return found


def _is_wanted(inside: str) -> bool:
    if not inside.endswith(".py") or inside.startswith(("..", "/")):
        return False
    parts = inside.lower().split("/")
    return not any(
        part in _SKIPPED_PARTS or part.startswith("test_") or part.endswith("_test.py")
        for part in parts
    )


def _module_name(inside: str) -> str:
    return inside.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _distribution(package: str) -> importlib.metadata.Distribution:
    try:
        return importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise BadInputError(
            f"Package {package} of the documentation corpus is not installed.",
            "`ingest.sources[].packages` names the packages whose docstrings are read.",
            f"Install it (`pip install {package}`) or remove it from the list.",
        ) from error


def _licence(distribution: importlib.metadata.Distribution) -> str:
    """The licence in a package's metadata; some put the whole text there, which says no name."""
    metadata = distribution.metadata
    if "License-Expression" in metadata:
        return metadata["License-Expression"]
    stated = metadata.get("License", "")  # type: ignore[attr-defined]
    if stated and "\n" not in stated and len(stated) < 80:
        return stated
    classes = [c for c in metadata.get_all("Classifier") or [] if c.startswith("License ::")]
    return "; ".join(c.split(" :: ")[-1] for c in classes) or "unknown"
