"""Hooks of mkdocs: pages from outside docs/, and reference pages made from the code."""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
import sys
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "evals/README.md": "tasks.md",
    "evals/corpora/NOTICE.md": "notice.md",
}
"""Files of the repository -> pages of the site."""
LINK = re.compile(r"\]\((?!\w+:|#)(?P<path>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
PICTURE = re.compile(r'<picture>.*?alt="(?P<alt>[^"]*)" src="docs/(?P<file>[^"]+)-light\.svg".*?</picture>', re.DOTALL)
MARK = re.compile(r"<!-- (?P<kind>fields|commands) (?P<name>[\w.:]+) -->")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside docs/."""
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at pages of the site, and put generated reference in place of its marks."""
    uri = page.file.src_uri
    source = next((file for file, name in OUTSIDE.items() if name == uri), f"docs/{uri}")
    markdown = PICTURE.sub(two_images, markdown)
    markdown = LINK.sub(lambda link: f"]({page_of(source, link['path'], uri)}{link['anchor'] or ''})", markdown)
    return MARK.sub(lambda mark: MAKERS[mark["kind"]](mark["name"]), markdown)


def two_images(picture: re.Match[str]) -> str:
    """Return an image for light pages and one for dark pages, which follow the site's own switch."""
    return "\n".join(f"![{picture['alt']}]({picture['file']}-{name}.svg#only-{name})" for name in ("light", "dark"))


def page_of(source: str, target: str, uri: str) -> str:
    """Return the link from page ``uri`` to what ``target`` is in the file ``source`` of the repository.

    >>> page_of("README.md", "docs/rl.md", "index.md"), page_of("docs/rl.md", "../README.md", "rl.md")
    ('rl.md', 'index.md')
    """
    path = os.path.normpath(PurePosixPath(source).parent / target)
    page = OUTSIDE.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
    if page is None:
        return target  # mkdocs reports it
    return os.path.relpath(page, PurePosixPath(uri).parent)


def fields(name: str) -> str:
    """Return a table of the fields that a dataclass, ``module:Class``, has of its own."""
    sys.path.insert(0, str(ROOT / "recipes"))
    try:
        module, _, attribute = name.partition(":")
        cls = getattr(importlib.import_module(module), attribute)
    finally:
        sys.path.remove(str(ROOT / "recipes"))
    lines = ["| field | type | default | |", "|---|---|---|---|"]
    for field in dataclasses.fields(cls):
        if field.name in cls.__annotations__:
            choices = ", ".join(f"`{choice}`" for choice in field.metadata.get("choices", ()))
            words = " ".join([field.metadata.get("help", ""), f"One of {choices}." if choices else ""]).strip()
            kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
            cells = (f"`{field.name}`", f"`{kind}`", f"`{default(field)}`", words)
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def default(field: dataclasses.Field[Any]) -> str:
    """Return a field's default as YAML has it."""
    value: Any = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if value is dataclasses.MISSING:
        return "required"
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else f"{value}"


def commands(name: str) -> str:
    """Return the help of a typer application, ``module:attribute``, and of all of its commands."""
    import typer
    from typer.cli import get_docs_for_click
    from typer.main import get_command

    module, _, attribute = name.partition(":")
    group = get_command(getattr(importlib.import_module(module), attribute))
    context = typer.Context(group, info_name="routed-peft")
    text: str = get_docs_for_click(obj=group, ctx=context, name="routed-peft")
    return text.replace("# `routed-peft`", "## `routed-peft`", 1).replace("$ routed-peft", "routed-peft")


MAKERS = {"fields": fields, "commands": commands}
