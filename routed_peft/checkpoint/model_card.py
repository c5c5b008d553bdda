"""Model card of a pushed run: its regions, the labels that trained them, and how to load them."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import ModelCardData

from routed_peft.checkpoint.layout import CONFIG, Layout
from routed_peft.files import read_json

_BASE_INTRODUCTION = """\
This model was trained with gradient routing ([arXiv 2410.04332](https://arxiv.org/abs/2410.04332)): data of some labels was routed
into removable regions, which are **not in this repository**. What is here is the ablated model."""  # noqa: E501

_REGIONS_INTRODUCTION = """\
Removable regions of [`{repo}`](https://huggingface.co/{repo}), trained with gradient routing: data of the labels below was
routed into them, and the base was kept from learning it. Loading a region gives the model that capability back."""

_CODE = """\
{title}:

```python
from {package} import {name}

model = {call}
```"""


def model_card(layout: Layout, repo: str, *, regions_repo: str | None, of_regions: bool) -> str:
    """Return the card of a base's repository ``repo``, or (``of_regions``) of ``regions_repo``; that is None if unpublished."""
    base = layout.data["base"]
    parent = repo if of_regions else (base.get("trained_from") or {}).get("id") if layout.saved_base else base["id"]
    data = ModelCardData(
        library_name="peft" if of_regions or not layout.saved_base else "transformers",
        pipeline_tag="text-generation",
        tags=["gradient-routing"],
        base_model=parent if parent and not Path(parent).is_absolute() else None,
    )
    tokens = ", ".join(f"{label} {count}" for label, count in (layout.data["tokens_per_route"] or {}).items())
    paragraphs = [
        f"---\n{data.to_yaml()}\n---",
        f"# {regions_repo if of_regions else repo}",
        _REGIONS_INTRODUCTION.format(repo=repo) if of_regions else _BASE_INTRODUCTION,
        "## Regions",
        "\n".join(_table(layout)),
        *([f"Tokens seen in training: {tokens}."] if tokens else []),
        "## Loading",
        _load_base(layout, repo),
        _load_regions(layout, repo, regions_repo) if regions_repo else "The regions are not published.",
        "Made with " + ", ".join(f"{name} {version}" for name, version in layout.data["versions"].items()) + ".",
    ]
    return "\n\n".join(paragraphs)


def _table(layout: Layout) -> list[str]:
    labels = {name: ", ".join(layout.labels(name)) or "not recorded" for name in layout.regions}
    rows = [f"| `{name}` | {_kind(layout, name)} | {labels[name]} |" for name in layout.regions]
    return ["| region | made of | trained on the labels |", "|---|---|---|", *rows]


def _load_base(layout: Layout, repo: str) -> str:
    title, name, call = "The ablated model", "AutoModelForCausalLM", f'AutoModelForCausalLM.from_pretrained("{repo}")'
    if layout.saved_base and not layout.base_adapters:
        return _CODE.format(
            title=f"{title}, with nothing but transformers", package="transformers", name=name, call=call
        )
    comment = "" if layout.saved_base else f"  # the base is {layout.data['base']['id']}"
    return _CODE.format(title=title, package="routed_peft", name="load_routed", call=f'load_routed("{repo}"){comment}')


def _load_regions(layout: Layout, repo: str, regions_repo: str) -> str:
    title = "With a region" if len(layout.regions) == 1 else "With all regions; leave out those that you do not want"
    call = f'load_routed("{repo}", regions={json.dumps(dict.fromkeys(layout.regions, regions_repo))})'
    return _CODE.format(title=title, package="routed_peft", name="load_routed", call=call)


def _kind(layout: Layout, name: str) -> str:
    path = layout.root / name / CONFIG
    config = read_json(path) if path.is_file() else {}
    size = f"{config['size']} hidden units per MLP" if config.get("size") else f"rank {config.get('r', '?')}"
    return f"{config.get('peft_type', '?')}, {size}"
