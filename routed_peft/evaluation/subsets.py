"""Losses of one model on texts of several topics, under every subset of its regions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from os.path import commonprefix
from typing import Any, NamedTuple

from rich import box
from rich.table import Table
from torch import nn

from routed_peft.ablation import ablated
from routed_peft.checkpoint.subsets import parse_subsets
from routed_peft.evaluation.harness import region_names
from routed_peft.evaluation.measures.statistics import with_interval
from routed_peft.evaluation.text_loss import TextLoss


class TopicLoss(NamedTuple):
    """Loss in nats per token, with its 95 % interval over documents; None for a single document."""

    loss: float
    interval: tuple[float, float] | None


SubsetLosses = Mapping[str, Mapping[str, TopicLoss]]


def subset_losses(
    model: nn.Module, tokenizer: Any, *, topics: Mapping[str, Sequence[str]], subsets: Iterable[str] | None = None
) -> dict[str, dict[str, TopicLoss]]:
    """Measure the loss on every topic under every subset of a live model's regions.

    The others are `ablated` meanwhile, so nothing is loaded again. Base adapters stay on.

    Args:
        model: as `load_routed` returns it, with all regions that the subsets name.
        tokenizer: of the model.
        topics: name -> texts.
        subsets: as for `parse_subsets`, such as ``["none", "bio+cyber"]``; by default every subset.

    Returns:
        ``{subset: {topic: (loss, interval)}}``, ``none`` first.

    Raises:
        ValueError: on an unknown region, a subset that is there twice, every subset of more than six regions, no
            topics, and texts that `TextLoss` refuses.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from routed_peft.data import train_tokenizer
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=300, hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
    >>> topics = {"core": ["a cat", "a dog"]}
    >>> list(subset_losses(model, train_tokenizer(topics["core"], vocab_size=300), topics=topics)["none"])
    ['core']
    """
    regions = region_names(model)
    chosen = parse_subsets(regions, subsets)
    if not topics:
        raise ValueError("`topics` is empty: give texts by topic, such as {'bio': texts}")
    losses = {topic: TextLoss(model, tokenizer, texts) for topic, texts in topics.items()}
    found = {}
    for subset, names in chosen.items():
        off = [name for name in regions if name not in names]
        with ablated(model, *off) if off else nullcontext():
            found[subset] = {topic: TopicLoss(*with_interval(loss, model)) for topic, loss in losses.items()}
    return found


def subset_labels(losses: SubsetLosses) -> list[str]:
    """Return the subsets of ``losses`` as labels: ``all`` for all regions, and names without their common prefix.

    >>> subset_labels({"none": {}, "topic_bio": {}, "topic_cyber": {}, "topic_bio+topic_cyber": {}})
    ['none', 'bio', 'cyber', 'all']
    """
    members = [[] if subset == "none" else subset.split("+") for subset in losses]
    regions = {name for names in members for name in names}
    prefix = commonprefix(sorted(regions)) if len(regions) > 1 else ""
    cut = max(prefix.rfind("_"), prefix.rfind("-")) + 1
    full = len(regions) if len(regions) > 1 else 0
    return ["all" if full and len(names) == full else "+".join(n[cut:] for n in names) or "none" for names in members]


def subsets_table(losses: SubsetLosses, title: str | None = None) -> Table:
    """Return losses as a table for the terminal: subsets down, topics across; intervals where there are few topics.

    >>> subsets_table({"none": {"core": TopicLoss(4.0, (3.5, 4.5))}}).row_count
    1
    """
    table = Table(title=title, title_justify="left", box=box.SIMPLE, caption="loss in nats per token")
    table.add_column("regions on", overflow="fold")
    for topic in next(iter(losses.values())):
        table.add_column(topic, justify="right", overflow="fold")
    for label, row in zip(subset_labels(losses), losses.values(), strict=True):
        intervals = [one.interval if len(row) <= 5 else None for one in row.values()]
        below = ["\n{:.2f}–{:.2f}".format(*interval) if interval else "" for interval in intervals]
        table.add_row(
            label.replace("+", "+ "), *(f"{one.loss:.3f}{more}" for one, more in zip(row.values(), below, strict=True))
        )
    return table
