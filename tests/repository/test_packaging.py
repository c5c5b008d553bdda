"""Content and metadata of the wheel."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser

import pytest
import yaml
from places import ROOT

import routed_peft

SOURCES = {"routed_peft": ROOT / "routed_peft", "routed_peft/tasks": ROOT / "evals"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """A wheel built from a copy of the sources, for setuptools leaves files beside them."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("routed_peft", "evals", "recipes"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", copy, copy]
    subprocess.run(command, check=True, capture_output=True)
    return zipfile.ZipFile(next(copy.glob("*.whl")))


def metadata(wheel: zipfile.ZipFile):
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return Parser().parsestr(wheel.read(name).decode())


@pytest.mark.slow
def test_every_package_is_in_the_wheel_with_its_data_and_nothing_else_is(wheel):
    expected = set()
    for package, folder in SOURCES.items():
        for path in folder.rglob("*"):
            relative = path.relative_to(folder).as_posix()
            if path.is_file() and "__pycache__" not in path.parts and not relative.endswith("README.md"):
                expected.add(f"{package}/{relative}".replace("tasks/corpora/", "corpora/"))
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == expected


@pytest.mark.slow
def test_the_version_has_one_source(wheel):
    assert metadata(wheel)["Version"] == routed_peft.__version__
    assert "version" in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dynamic"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == routed_peft.__version__


@pytest.mark.slow
def test_reports_classifiers_and_measuring_are_optional(wheel):
    required = {
        line.split(";")[0].split(">")[0] for line in metadata(wheel).get_all("Requires-Dist") if "extra" not in line
    }
    assert not required & {"jinja2", "matplotlib", "pandas", "scikit-learn", "lm_eval", "trl", "mkdocs-material"}
    assert required >= {"torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "typer"}
