"""The corpus made of Python's documentation: content, leaks, order, nothing executed."""

from __future__ import annotations

import ast
import importlib.metadata
import sys
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rldecoder.data.python_corpus import (
    is_code_module,
    module_documentation,
    pydocs_candidates,
    pysource_candidates,
    python_fingerprint,
    strip_docstrings,
)
from rldecoder.errors import BadInputError

MODULE = '''"""What the module does."""

raise SystemExit("never executed")

class Hat(object, metaclass=M):
    """A hat."""

    def wear(self, head, *, tightly=True):
        """Put it on.

        Like this:
            an_example()
        """

    def undocumented(self): ...

    def _private(self):
        """Not public."""

add_docstr(torch.abs, r"""
abs(x) -> Tensor

Absolute value.
""".format(**common))
other("""not a
docstring""")
'''


def test_documentation_of_a_module() -> None:
    text = module_documentation(ast.parse(MODULE), "hats")
    assert text == (
        "hats\n\nWhat the module does.\n\nclass Hat(object)\n\nA hat.\n\n"
        "Hat.wear(self, head, *, tightly=True)\n\nPut it on.\n\nLike this:\n    an_example()\n\n"
        "abs(x) -> Tensor\n\nAbsolute value."
    )
    assert module_documentation(ast.parse("def f(): ...\nx = 1"), "empty") == ""


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('"""doc"""\nx = 1\n', "\nx = 1\n"),
        ('def f():\n    """doc"""\n', "def f():\n    pass\n"),
        (
            'def f():\n    """doc\n    more"""\n    return "kept"\n',
            'def f():\n    \n    return "kept"\n',
        ),
        ('class A: "doc"\n', "class A: pass\n"),
        (
            'x = "\u00e9"; y = 2\ndef f(): "d\u00e9"; return 1\n',
            'x = "\u00e9"; y = 2\ndef f(): ; return 1\n',
        ),
        ("x = 1\n'not a docstring'\n", "x = 1\n'not a docstring'\n"),
    ],
)
def test_docstrings_are_cut_out_of_source(source: str, expected: str) -> None:
    assert strip_docstrings(source.encode()).decode() == expected


@settings(max_examples=8, deadline=None)
@given(st.sampled_from(sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-c]*.py"))))
def test_stripped_modules_keep_their_code(path: Path) -> None:
    """Oracle: the syntax tree without docstrings, against the tree of the stripped text."""

    def without_docstrings(tree: ast.Module) -> str:
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                if ast.get_docstring(node) is not None:
                    del node.body[0]
                if not node.body:
                    node.body = [ast.Pass()]
        return ast.dump(tree)

    source = path.read_bytes()
    stripped = ast.parse(strip_docstrings(source))
    assert without_docstrings(ast.parse(source)) == without_docstrings(stripped)
    assert all(
        ast.get_docstring(node) is None
        for node in ast.walk(stripped)
        if isinstance(node, ast.ClassDef | ast.FunctionDef)
    )


def test_documentation_and_code_share_no_module() -> None:
    docs = [c.key for c in pydocs_candidates(True, ())]
    code = [c.key for c in pysource_candidates()]
    assert len(docs) > 200
    assert len(code) > 30
    assert len(set(docs)) == len(docs)

    def tops(keys: list[str], kind: str) -> set[str]:
        return {k.split(":")[2].split(".")[0] for k in keys if k.startswith(kind)}

    assert not tops(docs, "pydocs:stdlib:") & tops(code, "pysource:")
    assert all(is_code_module(name) for name in tops(code, "pysource:"))
    assert not any(".test." in key or key.endswith(".test") for key in docs + code)
    assert docs == [c.key for c in pydocs_candidates(True, ())]


def test_nothing_is_imported_and_topics_are_there() -> None:
    before = set(sys.modules)
    by_key = {c.key: c for c in pydocs_candidates(True, ("datasketch",))}
    topic = by_key["pydocs:topic:if"].load()
    assert topic is not None
    assert 'The "if" statement' in topic.text
    assert (topic.licence, topic.source.split("==")[0]) == ("PSF-2.0", "python")
    readme = by_key["pydocs:datasketch:README"].load()
    assert readme is not None
    version = importlib.metadata.version("datasketch")
    assert (readme.licence, readme.source) == ("MIT", f"datasketch=={version}")
    module = by_key["pydocs:datasketch:datasketch.minhash"].load()
    assert module is not None
    assert "class MinHash" in module.text
    assert not {name for name in set(sys.modules) - before if name.startswith("datasketch")}


def test_missing_package_is_named() -> None:
    with pytest.raises(BadInputError, match="no-such-package"):
        python_fingerprint(False, ("no-such-package",))


def test_fingerprint_depends_on_what_is_read() -> None:
    one = python_fingerprint(True, ("numpy",))
    assert one["numpy"] == importlib.metadata.version("numpy")
    assert "python" in one
    assert "python" not in python_fingerprint(False, ("numpy",))
