"""The model card of a pushed run: which regions exist, what they were trained on, how to load them."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from routed_peft.checkpoint.layout import CONFIG, Layout
from routed_peft.files import read_json

TEMPLATE = Path(__file__).parents[1] / "templates" / "model_card.md.jinja"


def model_card(layout: Layout, repo: str, regions_repo: str | None, of_regions: bool) -> str:
    """Render the card of the base's repository, or of that of its regions.

    Args:
        layout: the run.
        repo: Hub id of the base.
        regions_repo: Hub id of its regions, or None where they are not published.
        of_regions: which of the two cards.
    """
    data = ModelCardData(
        library_name="peft" if of_regions or not layout.saved_base else "transformers",
        pipeline_tag="text-generation",
        tags=["gradient-routing"],
        base_model=repo if of_regions else _parent(layout),
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        repo=repo,
        regions_repo=regions_repo,
        of_regions=of_regions,
        saved_base=layout.saved_base,
        base=layout.data["base"]["id"],
        base_adapters=layout.base_adapters,
        regions=[{"name": name, "kind": _kind(layout, name), "labels": layout.labels(name)} for name in layout.regions],
        tokens=layout.data["tokens_per_route"] or {},
        versions=layout.data["versions"],
    )
    return str(card)


def _parent(layout: Layout) -> str | None:
    base = layout.data["base"]
    name = (base.get("trained_from") or {}).get("id") if layout.saved_base else base["id"]
    return name if name and not Path(name).is_absolute() else None


def _kind(layout: Layout, name: str) -> str:
    path = layout.root / name / CONFIG
    config = read_json(path) if path.is_file() else {}
    size = f"{config['size']} hidden units per MLP" if config.get("size") else f"rank {config.get('r', '?')}"
    return f"{config.get('peft_type', '?')}, {size}"
