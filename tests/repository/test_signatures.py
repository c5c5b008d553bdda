"""Signatures of the library: few arguments, and most of them by name."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import ROOT

FILES = sorted(path for path in (ROOT / "routed_peft").rglob("*.py") if path.parent.name != "commands")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def functions(tree: ast.Module) -> Iterator[tuple[str | None, ast.FunctionDef]]:
    """Yield functions and methods, these with the name of their class; a closure has the arguments that its caller gives."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield None, node
        elif isinstance(node, ast.ClassDef):
            yield from ((node.name, child) for child in node.body if isinstance(child, ast.FunctionDef))


def subclasses(base: type) -> set[type]:
    return {base}.union(*(subclasses(child) for child in base.__subclasses__()))


def overrides_host(path: Path, owner: str, method: str) -> bool:
    """Return whether a class of another library prescribes the method's signature: a base of it, or of a mix-in's users."""
    importlib.import_module("routed_peft.trl")  # trainers, which are made of mix-ins
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    classes = subclasses(getattr(module, owner))
    bases = {
        base for user in classes for base in inspect.getmro(user)[:-1] if not base.__module__.startswith("routed_peft")
    }
    return any(method in vars(base) for base in bases)


def too_many(path: Path) -> Iterator[str]:
    for owner, function in functions(ast.parse(path.read_text(encoding="utf-8"))):
        positional = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)]
        if owner and positional[:1] in (["self"], ["cls"]):
            del positional[0]
        count = len(positional) + len(function.args.kwonlyargs)
        if (
            count <= 3
            or (count <= 8 and len(positional) <= 2)
            or (owner and overrides_host(path, owner, function.name))
        ):
            continue
        name = f"{owner}.{function.name}" if owner else function.name
        yield f"{name_of(path)}:{function.lineno} {name} takes {count} arguments, {len(positional)} of them by position"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_functions_take_few_arguments_and_most_by_name(path: Path):
    """At most eight; of more than three only the first two by position. Commands and methods of a host may take more."""
    if found := list(too_many(path)):
        pytest.fail("\n".join([*found, "hand over a dataclass, or put `*` after the second argument"]))
