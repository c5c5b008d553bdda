"""Imports go one way. Every module belongs to a room, and may import from the rooms that are named beside it only.

All imports count: those under ``TYPE_CHECKING`` and inside functions too.
"""

from __future__ import annotations

import ast
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from places import ROOT

# Room -> the rooms that it may import, from the ground up. Regions and routing meet in names of PEFT's adapters only.
ROOMS = {
    "lazy": "",
    "deprecation": "",
    "files": "",
    "mistakes": "",
    "eval_mode": "",
    "functional": "",
    "routes": "",
    "corpora": "",
    "tasks": "corpora data",
    "presets": "routes",
    "losses": "routes",
    "adapters": "routes",
    "runs": "files",
    "architectures": "eval_mode",
    "subspaces": "architectures eval_mode files",
    "routing": "adapters architectures functional routes",
    "regions": "adapters architectures routes subspaces",
    "ablation": "adapters",
    "checkpoint": "ablation adapters files regions routes runs",
    "data": "corpora routes",
    "training": "ablation adapters architectures checkpoint data eval_mode files losses presets regions routes routing runs",
    "trl": "ablation adapters data routes routing training",
    "monitoring": "ablation adapters data eval_mode files functional regions routing subspaces",
    "unlearning": "architectures checkpoint data eval_mode files losses regions routes runs training",
    "evaluation": (
        "ablation adapters architectures checkpoint data eval_mode files losses regions routes runs tasks unlearning"
    ),
    "report": "evaluation files runs",
    "lm_eval": "evaluation regions tasks",
    "demo": "checkpoint corpora data evaluation files presets regions report routes runs training",
    "commands": "checkpoint data demo evaluation files losses regions report runs tasks training unlearning",
    "cli": "commands",
    "face": "ablation checkpoint presets regions routes routing training",
}
MAY_IMPORT = {room: set(others.split()) for room, others in ROOMS.items()}
GROUND = {"lazy", "deprecation", "mistakes"}  # open to every room
LIBRARY = set(MAY_IMPORT) - {"cli", "commands", "face", "lm_eval"}

# Experiments use the library and what they share. None of them imports another.
SHARED = {"common", "report", "tables"}
MAY_IMPORT["experiments"] = set()
MAY_IMPORT["experiments.common"] = LIBRARY
MAY_IMPORT["experiments.report"] = {*LIBRARY, "experiments.common"}
MAY_IMPORT["experiments.tables"] = {*LIBRARY, "experiments.common", "experiments.report", "experiments.removal"}
EXPERIMENTS = {path.parent.name for path in (ROOT / "recipes/experiments").glob("*/__init__.py")} - SHARED
for experiment in EXPERIMENTS:
    MAY_IMPORT[f"experiments.{experiment}"] = {*LIBRARY, "experiments.common", "experiments.report"}
MAY_IMPORT["recipes"] = {*LIBRARY, "face", *(f"experiments.{name}" for name in EXPERIMENTS | SHARED)}

PURE = ("routed_peft.functional", "routed_peft.routes", "routed_peft.presets", "routed_peft.mistakes")

FOLDERS = {
    "routed_peft": "routed_peft",
    "evals": "routed_peft.tasks",
    "evals/corpora": "routed_peft.corpora",
    "recipes": "recipes",
    "recipes/experiments": "experiments",
}


def module_name(path: Path) -> str:
    """Return the name under which a file is imported.

    >>> module_name(ROOT / "evals/corpora/__init__.py"), module_name(ROOT / "recipes/experiments/common/cells.py")
    ('routed_peft.corpora', 'experiments.common.cells')
    """
    relative = path.relative_to(ROOT).with_suffix("").as_posix()
    folder = max((folder for folder in FOLDERS if relative.startswith(f"{folder}/")), key=len)
    return (FOLDERS[folder] + relative.removeprefix(folder).replace("/", ".")).removesuffix(".__init__")


MODULES = {
    module_name(path): path for folder in ("routed_peft", "evals", "recipes") for path in (ROOT / folder).rglob("*.py")
}


def room_of(module: str) -> str:
    first, *rest = module.split(".")
    if first == "routed_peft":
        return rest[0] if rest else "face"
    return ".".join([first, *rest[:1]]) if first == "experiments" else "recipes"


@cache
def imports(path: Path) -> frozenset[str]:
    """Return the dotted names that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative imports hide the room"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def imported_modules(module: str) -> set[str]:
    """Return those of our modules that a module imports: of ``package.name`` the package, where the name is no module."""
    known = {name if name in MODULES else name.rpartition(".")[0] for name in imports(MODULES[module])}
    assert not [name for name in known if name.split(".")[0] in ("routed_peft", "experiments") and name not in MODULES]
    return {name for name in known if name in MODULES}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_one_way(module: str):
    own = room_of(module)
    assert own in MAY_IMPORT, f"say in MAY_IMPORT what the new room {own!r} may import"
    for other in imported_modules(module):
        assert room_of(other) in {own, *GROUND, *MAY_IMPORT[own]}, f"{module}: {own} may not import {other}"


def test_rooms_form_no_circle():
    TopologicalSorter({room: others - {room} for room, others in MAY_IMPORT.items()}).prepare()


def test_modules_form_no_circle():
    graph = {module: imported_modules(module) - {module} for module in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other: {' <- '.join(error.args[1])}")


def test_recipes_do_not_import_each_other():
    scripts = {name.removeprefix("recipes.") for name in MODULES if name.startswith("recipes.")}
    for name in scripts:
        assert not scripts & {other.split(".")[0] for other in imports(MODULES[f"recipes.{name}"])}, name


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_need_torch_and_the_standard_library_only(module: str):
    allowed = {"torch", *sys.stdlib_module_names}
    foreign = {name for name in imports(MODULES[module]) if name.split(".")[0] not in allowed}
    assert not [name for name in foreign if name not in PURE and name.rpartition(".")[0] not in PURE]


@pytest.mark.parametrize(("library", "rooms"), [("trl", {"trl"}), ("lm_eval", {"lm_eval", "evaluation"})])
def test_an_optional_library_is_imported_in_one_place(library: str, rooms: set[str]):
    for module, path in MODULES.items():
        if module.startswith("routed_peft.") and room_of(module) not in rooms:
            assert library not in {name.split(".")[0] for name in imports(path)}, module
