from __future__ import annotations

import re
import subprocess
import sys

import pytest
from places import ROOT


@pytest.mark.slow
def test_the_examples_run():
    """In a process of their own, for they register names."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))
    check = """
from datasets import Dataset
from routed_peft.architectures import WRITERS, supported_layouts
from routed_peft.evaluation.relearning import Attack
from routed_peft.unlearning import UnlearningArguments

assert reversed_forget()["forget"].weight("base") == -0.1
assert labels_from_length(Dataset.from_dict({"text": ["a" * 201, "b"]}))["route_label"][:] == ["forget", "retain"]
assert Attack.parse("norms+few-shot-16").method == "norms" and Attack.parse("forget-unrelated").data == "forget-unrelated"
assert UnlearningArguments("out", method="flatten", report_to="none").uses_retain
assert "my_llama" in WRITERS and "my_llama" in supported_layouts()
"""
    subprocess.run([sys.executable, "-c", code + check], check=True)


def test_it_stays_short():
    assert len((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()) < 150


def test_a_release_has_one_version():
    """As the workflow `release` asks of a tag."""
    from routed_peft import __version__

    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
