"""Reading YAML that people wrote: what is ambiguous, doubled, deep or huge is refused.

Plain words are read as people mean them (YAML 1.2): only `true` and `false` are booleans, `1e-3` is
a number, and `yes`, `0123`, `1:00:00` and `2024-01-01` are the texts that they look like, which a
setting that takes a number then refuses. Errors say where and what kind of fault it is; the text
itself is never repeated, for the file may be one with keys and passwords.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from rldecoder.config.problems import shown_key
from rldecoder.errors import BadInputError

MAX_BYTES = 256 << 10
"""The longest config in this project has 4 kB."""
MAX_DEPTH = 40
"""Sections within sections."""
MAX_VALUES = 20_000
"""Keys and values of a file, those that aliases repeat included."""

_DIGITS = "[0-9]+(?:_[0-9]+)*"
_NULL = re.compile(r"(?:~|null|Null|NULL|)\Z")
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z")
_INT = re.compile(r"(?:[-+]?(?:0|[1-9][0-9]*(?:_[0-9]+)*)|0x[0-9a-fA-F]+|0o[0-7]+)\Z")
_FLOAT = re.compile(
    rf"[-+]?(?:(?:{_DIGITS})?\.[0-9]+|{_DIGITS}\.)(?:[eE][-+]?[0-9]+)?\Z"
    rf"|[-+]?{_DIGITS}[eE][-+]?[0-9]+\Z"
    r"|[-+]?\.(?:inf|Inf|INF)\Z|\.(?:nan|NaN|NAN)\Z"
)
_TAG = "tag:yaml.org,2002:"
# A message of PyYAML up to where it quotes the text; names of its tokens and single signs may stay.
_UNQUOTED = re.compile(r"""(?:[^'"]|'<[a-z ]+>'|'.'|"."|"'")*""")


class YamlFaultError(Exception):
    """A text is not YAML that can be used.

    Args:
        what: the kind of fault, in words that repeat none of the text but a doubled key.
    """

    def __init__(self, what: str, mark: yaml.Mark | None = None) -> None:
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        super().__init__(place + what)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text: mappings with text keys, lists, texts, numbers, booleans, null.

    Raises:
        YamlFaultError: it is not YAML, writes a key twice, or is too large or deep to be settings.
    """
    if len(text) > MAX_BYTES:
        raise YamlFaultError(f"it is longer than {MAX_BYTES >> 10} KiB")
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlFaultError(f"line {line}: it has a control character") from None
    except yaml.MarkedYAMLError as error:
        # Its own text quotes the lines around the fault.
        problem = error.problem or error.context or "it is not YAML"
        unquoted = _UNQUOTED.match(problem)
        assert unquoted is not None  # it matches nothing, too
        if unquoted.end() < len(problem):
            problem = f"{unquoted[0].rstrip()} that stands there"
        raise YamlFaultError(problem, error.problem_mark or error.context_mark) from None


def read_yaml(path: Path, *, what: str) -> Any:
    """Read a YAML file.

    Args:
        what: what it is, for errors: `config`, `model spec`.

    Raises:
        BadInputError: it cannot be read, is not UTF-8, or not YAML that can be used.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise BadInputError(
            f"The {what} {path} cannot be read.",
            str(error),
            "Give the path of a YAML file, such as configs/quickstart.yaml.",
        ) from None
    try:
        return parse_yaml(_decode(data))
    except YamlFaultError as error:
        raise BadInputError(
            f"The {what} {path} is not valid YAML.",
            f"{error}.",
            "Mend that place, or give another file.",
        ) from None


def _decode(data: bytes) -> str:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise YamlFaultError("it is UTF-16; save it as UTF-8")
    if len(data) > MAX_BYTES:
        raise YamlFaultError(f"it is longer than {MAX_BYTES >> 10} KiB")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise YamlFaultError(f"line {line}: it is not UTF-8; save it as UTF-8") from None


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with bounds, the scalars of YAML 1.2, and no key twice."""

    # Filled below: a table of one's own, or the base class's would change.
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._values = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Counts on the way down: the text is read no further than it can be used."""
        mark = self.peek_event().start_mark
        self._depth += 1
        self._values += 1
        if self._depth > MAX_DEPTH:
            raise YamlFaultError(f"it is nested deeper than {MAX_DEPTH}", mark)
        if self._values > MAX_VALUES:
            raise YamlFaultError(f"it has more than {MAX_VALUES:,} values", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def get_single_data(self) -> Any:
        """The document's value, if its aliases repeat no more than is reasonable."""
        node = self.get_single_node()
        if node is None:
            return None
        _check_size(node, {})
        return self.construct_document(node)


def _check_size(node: yaml.Node, known: dict[int, int | None]) -> int:
    """Values under a node, counted anew at each alias: what a bomb would unfold to.

    Before anything is constructed, for merging (`<<`) changes the nodes.
    """
    if id(node) in known:
        size = known[id(node)]
        if size is None:
            raise YamlFaultError("an alias stands within its own anchor", node.start_mark)
        return size
    known[id(node)] = None
    size = 1
    if isinstance(node, yaml.MappingNode):
        _check_keys(node)
        size += sum(
            _check_size(key, known) + _check_size(value, known) for key, value in node.value
        )
    elif isinstance(node, yaml.SequenceNode):
        size += sum(_check_size(item, known) for item in node.value)
    if size > MAX_VALUES:
        raise YamlFaultError(
            f"its aliases unfold to more than {MAX_VALUES:,} values", node.start_mark
        )
    known[id(node)] = size
    return size


def _check_keys(node: yaml.MappingNode) -> None:
    """Keys are texts, each there once."""
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag not in (_TAG + "str", _TAG + "merge"):
            raise YamlFaultError("a key must be a text (write it in quotes)", key.start_mark)
        line = key.start_mark.line + 1
        if key.value in lines:
            raise YamlFaultError(
                f"the key {shown_key(key.value)} is there twice, "
                f"in line {lines[key.value]} and in line {line}; keep one",
                key.start_mark,
            )
        lines[key.value] = line


def _boolean(loader: _Loader, node: yaml.ScalarNode) -> bool:
    text = str(loader.construct_scalar(node))
    if not _BOOL.match(text):
        raise YamlFaultError("this is neither true nor false", node.start_mark)
    return text.lower() == "true"


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    if not _INT.match(text):
        raise YamlFaultError("this is not an integer", node.start_mark)
    try:
        return int(text, 0)
    except ValueError:  # thousands of digits
        raise YamlFaultError("this number is too long", node.start_mark) from None


def _number(loader: _Loader, node: yaml.ScalarNode) -> float:
    text = str(loader.construct_scalar(node))
    if not (_FLOAT.match(text) or _INT.match(text)):
        raise YamlFaultError("this is not a number", node.start_mark)
    # `.inf` and `.nan` are read as what they are; settings refuse them by name.
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


for _kind, _pattern, _first in (
    ("bool", _BOOL, list("tTfF")),
    ("int", _INT, list("-+0123456789")),
    ("float", _FLOAT, list("-+0123456789.")),
    ("null", _NULL, ["~", "n", "N", ""]),
    ("merge", re.compile(r"<<\Z"), ["<"]),
):
    _Loader.add_implicit_resolver(_TAG + _kind, _pattern, _first)
_Loader.yaml_constructors = {
    name: constructor
    for name, constructor in yaml.SafeLoader.yaml_constructors.items()
    if name in (None, *(_TAG + kind for kind in ("null", "str", "seq", "map")))
}
_Loader.add_constructor(f"{_TAG}bool", _boolean)
_Loader.add_constructor(f"{_TAG}int", _integer)
_Loader.add_constructor(f"{_TAG}float", _number)
