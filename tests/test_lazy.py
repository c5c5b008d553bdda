"""Imports on first use: nothing heavy before a name is taken, and everything that the face promises after."""

from __future__ import annotations

import subprocess
import sys

import pytest

import routed_peft
from routed_peft import checkpoint, lazy

HEAVY = ("torch", "transformers", "peft", "datasets", "accelerate", "matplotlib", "pandas")
LOADED = f"import sys; print(*(name for name in {HEAVY} if name in sys.modules))"


def python(code: str) -> list[str]:
    """Run code in a process of its own, and return the words of the last line that it prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1].split()


def test_importing_the_package_imports_nothing_heavy():
    assert python(f"import routed_peft, routed_peft.checkpoint; dir(routed_peft); {LOADED}") == []


@pytest.mark.parametrize("package", [routed_peft, checkpoint])
def test_every_public_name_is_found_where_it_lives(package):
    assert dir(package) == package.__all__ == sorted(package.__all__)
    for name in package.__all__:
        value = getattr(package, name)
        assert getattr(value, "__module__", value.__name__).startswith("routed_peft.")
        assert vars(package)[name] is value, "looked up once"


def test_names_that_do_not_exist_are_refused():
    with pytest.raises(AttributeError, match="module 'routed_peft' has no attribute 'RoutedTrainr'"):
        routed_peft.RoutedTrainr  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'rout'"):
        exec("from routed_peft import rout")
    assert not hasattr(routed_peft, "__wrapped__")


@pytest.mark.slow
@pytest.mark.parametrize("code", ["from routed_peft import Route", "import routed_peft.regions"])
def test_taking_a_name_or_the_regions_registers_the_peft_type(code):
    assert python(f"{code}; from peft import PeftType; print(PeftType('ROUTED').value)") == ["ROUTED"]


def test_a_submodule_is_an_attribute():
    assert python("import routed_peft; print(routed_peft.routes.Route.__name__)") == ["Route"]


def test_a_module_that_registers_comes_before_the_first_name():
    code = "get, _ = lazy.lazy_names('json', {'JSONDecodeError': 'json.decoder'}, before='this')"
    assert python(f"from routed_peft import lazy; {code}; get('JSONDecodeError')")[-1] == "those!", (
        "the zen was printed"
    )
    get, names = lazy.lazy_names("json", {"JSONDecodeError": "json.decoder", "tool": "json.tool"})
    assert names() == ["JSONDecodeError", "tool"] and get("tool").__name__ == "json.tool"
