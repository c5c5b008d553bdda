"""Imports go one way. Every module belongs to a layer, and may import from the layers named beside it only."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest
from places import ROOT

PACKAGE = ROOT / "routed_peft"

# layer -> the layers it may import. Regions and routing do not know each other: they meet in PEFT's adapter names.
MAY_IMPORT = {
    "files": set(),
    "mode": set(),
    "functional": set(),
    "routes": set(),
    "architectures": {"mode"},
    "corpora": set(),
    "tasks": {"corpora"},
    "presets": {"routes"},
    "ledger": set(),
    "coherence": {"mode"},
    "placebo": {"architectures"},
    "routing": {"functional", "routes", "architectures"},
    "regions": {"routes", "architectures", "subspaces"},
    "subspaces": {"architectures", "files", "mode"},
    "data": {"routes", "corpora"},
    "checkpoint": {"files", "routes", "regions"},
    "ablation": {"routes", "regions", "checkpoint"},
    "training": {
        "files",
        "mode",
        "functional",
        "routes",
        "presets",
        "ledger",
        "architectures",
        "routing",
        "regions",
        "data",
        "checkpoint",
        "ablation",
    },
}
MAY_IMPORT["monitoring"] = {*MAY_IMPORT["training"], "training", "subspaces"}
MAY_IMPORT["unlearning"] = {*MAY_IMPORT["training"], "training"}
MAY_IMPORT["trl"] = {"routes", "presets", "routing", "regions", "data", "checkpoint", "ablation", "training"}
MAY_IMPORT["evaluation"] = {*MAY_IMPORT, "tasks"} - {"evaluation"}
MAY_IMPORT["lm_eval"] = {*MAY_IMPORT}
MAY_IMPORT["demo"] = {*MAY_IMPORT}
MAY_IMPORT["experiment"] = {*MAY_IMPORT}
MAY_IMPORT["reward_hack"] = {*MAY_IMPORT}
MAY_IMPORT["style"] = {*MAY_IMPORT}
MAY_IMPORT["persona"] = {*MAY_IMPORT}
MAY_IMPORT["commands"] = {*MAY_IMPORT}
MAY_IMPORT["cli"] = {*MAY_IMPORT}

# The files of the layer "routing".
ROUTING = ("routing", "groups", "layers", "selfcheck", "state")
TORCH_ONLY = ("functional", "routes", "presets", "ledger")


def layer_of(module: str) -> str:
    name = module.split(".")[1]
    return "routing" if name in ROUTING else name


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative imports hide the layer"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.name != "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path):
    relative = path.relative_to(PACKAGE.parent).with_suffix("")
    own = layer_of(".".join(relative.parts))
    assert own in MAY_IMPORT, f"{path}: say in MAY_IMPORT what the new layer {own!r} may import"
    for name in imports(path):
        if name.startswith("routed_peft."):
            other = layer_of(name)
            assert other == own or other in MAY_IMPORT[own], f"{relative}: {own} may not import {name}"
        elif path.stem in TORCH_ONLY and path.parent == PACKAGE:
            stdlib = name.split(".")[0] in {"__future__", "collections", "dataclasses", "typing"}
            assert stdlib or name.split(".")[0] == "torch", (
                f"{relative} imports {name}: torch and the standard library only"
            )


def test_trl_is_imported_in_one_place_only():
    assert not [
        path for path in FILES if "trl" not in path.parts and any(n.split(".")[0] == "trl" for n in imports(path))
    ]


def test_every_package_is_in_the_wheel():
    listed = set(tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {".".join(file.parent.relative_to(PACKAGE.parent).parts) for file in PACKAGE.rglob("__init__.py")}
    assert listed - {"routed_peft.tasks", "routed_peft.corpora"} == found
