from __future__ import annotations

import doctest
import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from places import ROOT

PAGES = ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "evals/README.md"]
PAGES += sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md"))
PACKAGES = (
    "",
    ".training",
    ".data",
    ".checkpoint",
    ".trl",
    ".evaluation",
    ".evaluation.relearning",
    ".evaluation.measures",
)
PACKAGES += (".monitoring", ".unlearning", ".subspaces")
LINK = re.compile(r"\]\((?!\w+:)(?P<path>[^)#\s]*)(?:#(?P<anchor>[^)\s]+))?\)")
ASSET = re.compile(
    r"""<(?:script|img|iframe|source)[^>]+src=["']?(?:https?:)?//|<link[^>]+href=["']?(?:https?:)?//|@import|url\(["']?https?:"""
)

NAME = re.compile(r"`(routed_peft(?:\.\w+)+)")
PATH = re.compile(r"`((?:routed_peft|tests|recipes|docs|evals|benchmarks|results)/[\w./*-]*)")
HISTORY = {"CHANGELOG.md", "docs/log.md"}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built strictly: broken links, anchors and references of the API are errors."""
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_the_site_needs_nothing_from_elsewhere(site):
    pages = [*site.rglob("*.html"), *site.rglob("*.css")]
    assert len(pages) > 25
    for page in pages:
        assert not ASSET.search(page.read_text(encoding="utf-8")), page


@pytest.mark.slow
def test_the_reference_has_every_public_function_and_class(site):
    documented = {
        name for page in (site / "reference").rglob("*.html") for name in re.findall(r'id="([\w.]+)"', page.read_text())
    }
    last = {name.rpartition(".")[2] for name in documented if name.startswith("routed_peft.")}
    for package in PACKAGES:
        module = importlib.import_module(f"routed_peft{package}")
        public = {
            name for name in module.__all__ if inspect.isroutine(it := getattr(module, name)) or inspect.isclass(it)
        }
        assert public <= last, (package, public - last)


@pytest.mark.slow
def test_the_reference_has_every_command_and_field(site):
    from routed_peft.commands import COMMANDS
    from routed_peft.training import RoutedArguments

    page = (site / "reference" / "command-line" / "index.html").read_text()
    assert all(f'id="routed-peft-{command.__name__.replace("_", "-")}"' in page for command in COMMANDS)
    page = (site / "reference" / "yaml-fields" / "index.html").read_text()
    assert all(f"<code>{name}</code>" in page for name in RoutedArguments.__annotations__)
    assert "<!-- fields" not in page and "<!-- commands" not in page


@pytest.mark.parametrize("name", ["hooks", "docstrings"])
def test_examples_of_the_hooks(name, monkeypatch):
    pytest.importorskip("mkdocs")
    monkeypatch.syspath_prepend(ROOT / "docs")
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted and not found.failed


@cache
def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page, and those written out."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    heads = re.findall(r"^#+ (.+?)#*$", text, flags=re.MULTILINE)
    plain = (re.sub(r"\]\([^)]*\)|[^\w\- ]", "", head.strip().lower()) for head in heads)
    return {head.replace(" ", "-") for head in plain} | set(re.findall(r'<a id="([^"]+)"', text))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    file = ROOT / page
    for link in LINK.finditer(file.read_text(encoding="utf-8")):
        target = (file.parent / link["path"]).resolve() if link["path"] else file
        assert target.exists(), link[0]
        assert not link["anchor"] or link["anchor"] in anchors(target), link[0]


@pytest.mark.parametrize("page", [page for page in PAGES if page not in HISTORY])
def test_files_and_names_that_pages_speak_of_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for path in PATH.findall(text):
        assert any(ROOT.glob(path.rstrip("/"))), path
    for name in NAME.findall(text):
        pkgutil.resolve_name(name)
