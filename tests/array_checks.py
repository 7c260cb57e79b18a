"""Holds four packages to the shapes and types of arrays that their public signatures name.

jaxtyping's own import hook wraps every function of a module, and inner ones each time that they
are defined, and checks every call: the tests would take half as long again. This one wraps the
public functions that name arrays, and checks their first calls in each test; the later steps of a
training loop have the same shapes.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import FunctionType, ModuleType
from typing import Any

from beartype import BeartypeConf, beartype
from jaxtyping import jaxtyped

PACKAGES = ("rldecoder.sae.", "rldecoder.decoder.", "rldecoder.rl.", "rldecoder.explain.")
CALLS_A_TEST = 4
"""How many calls of each function are checked in each test."""

NAMES_ARRAY = re.compile(r"\b(Bool|Float|Int|Shaped)\[")
"""Annotations are strings: all these modules have them postponed."""

calls: Counter[str] = Counter()
"""Of each function since the test began."""


class ArrayChecks(MetaPathFinder):
    """Finds the packages' modules where Python does, and wraps their functions once loaded."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name.startswith(PACKAGES) else None
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                check_arrays(module)

            spec.loader.exec_module = exec_module
        return spec


def install() -> None:
    """From now on; modules that are loaded already stay as they are."""
    sys.meta_path.insert(0, ArrayChecks())


def check_arrays(module: ModuleType) -> None:
    """Wrap the public functions and methods of a module that name arrays."""
    for owner, name, value in public_functions(module):
        if isinstance(value, FunctionType):
            setattr(owner, name, checked(value))
        elif isinstance(value, classmethod | staticmethod):
            setattr(owner, name, type(value)(checked(value.__func__)))
        elif isinstance(value, property) and value.fget is not None:
            setattr(owner, name, property(checked(value.fget), value.fset, value.fdel))
        elif isinstance(value, functools.cached_property):
            value.func = checked(value.func)


def public_functions(module: ModuleType) -> Iterator[tuple[Any, str, Any]]:
    """What each one lies in, its name there, and itself as the class holds it."""
    for name, value in list(vars(module).items()):
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if not isinstance(value, type):
            yield module, name, value
            continue
        for method, found in list(vars(value).items()):
            if not method.startswith("_") or method in ("__init__", "__call__"):
                yield value, method, found


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, its first calls in a test held to the arrays that it names."""
    written = inspect.unwrap(function)
    if not any(NAMES_ARRAY.search(str(hint)) for hint in written.__annotations__.values()):
        return function
    name = f"{written.__module__}.{written.__qualname__}"

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        if calls[name] > CALLS_A_TEST:
            return function(*args, **kwargs)
        return judge()(*args, **kwargs)

    @functools.cache
    def judge() -> Callable[..., Any]:
        # At the first call: all names are known by then, and most functions never get one.
        return with_judgement(function, written)

    return call


def with_judgement(function: Callable[..., Any], written: Callable[..., Any]) -> Callable[..., Any]:
    """The function by jaxtyping and beartype; what is no array may be anything, as fakes are."""

    def meant(hint: Any) -> Any:
        named = isinstance(hint, str) and NAMES_ARRAY.search(hint)
        return eval(hint, vars(sys.modules[written.__module__])) if named else Any

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    signature = inspect.signature(written)
    call.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[
            parameter.replace(annotation=meant(parameter.annotation))
            for parameter in signature.parameters.values()
        ],
        return_annotation=meant(signature.return_annotation),
    )
    return jaxtyped(call, typechecker=beartype(conf=BeartypeConf(is_pep484_tower=True)))
