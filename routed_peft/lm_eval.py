"""``python -m routed_peft.lm_eval …``: lm-eval's command line, with regions.

It is lm-eval's own, plus: the PEFT type ``ROUTED`` (for ``--model hf --model_args pretrained=BASE,peft=ADAPTER``), the
tasks of `routed_peft.tasks`, and a model ``routed`` that loads a run with some of its regions::

    python -m routed_peft.lm_eval --model routed --model_args pretrained=RUN,regions=none --tasks routed_loss

``regions`` is ``all`` (the default), ``none``, or names joined by ``+``. Exported checkpoints need none of this.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import routed_peft.regions  # noqa: F401  (registers the PEFT type)
from routed_peft.evaluation.lm_eval_model import TextLM
from routed_peft.evaluation.source import held_out_pair, load_source, parse_regions, read_layout, tokenizer_place
from routed_peft.tasks import path
from routed_peft.tasks.utils import METADATA

import lm_eval.tasks  # isort: skip
from lm_eval._cli import HarnessCLI  # isort: skip
from lm_eval.api.registry import register_model  # isort: skip
from lm_eval.config.evaluate_config import EvaluatorConfig  # isort: skip
from lm_eval.models.utils_hf import get_dtype  # isort: skip
from lm_eval.utils import setup_logging  # isort: skip


OF_MODEL = {
    "backend",
    "truncation",
    "logits_cache",
    "max_length",
    "device",
    "softmax_dtype",
    "mixed_precision_dtype",
    "batch_size",
    "max_batch_size",
    "add_bos_token",
    "prefix_token_id",
    "think_end_token",
    "enable_thinking",
    "chat_template_args",
}
"""Those of lm-eval's own arguments that reach a model which is loaded already."""

HEEDED = OF_MODEL | METADATA | {"regions", "dtype"}


def check_arguments(given: Iterable[str]) -> None:
    """Raise ValueError on a model argument that ``routed`` would not heed.

    >>> check_arguments(["region"])
    Traceback (most recent call last):
    ...
    ValueError: the model `routed` has no argument 'region': did you mean 'regions'?
    """
    for name in given:
        if name not in HEEDED:
            near = get_close_matches(name, HEEDED, n=1)
            raise ValueError(
                f"the model `routed` has no argument {name!r}: "
                + (f"did you mean {near[0]!r}?" if near else f"it has {', '.join(sorted(HEEDED))}")
            )


@register_model("routed")
class RoutedLM(TextLM):
    """lm-eval's Hugging Face model, loaded by `load_routed`; ``revision``, ``dtype`` and others mean the same.

    Raises:
        ValueError: on an argument that would not be heeded.
    """

    def __init__(
        self,
        pretrained: str,
        regions: str | None = "all",
        revision: str | None = None,
        dtype: Any = "auto",
        tokenizer: Any = None,
        trust_remote_code: bool | None = None,
        **kwargs: Any,
    ) -> None:
        check_arguments(kwargs)
        self._loaded, tokenizer = load_source(
            pretrained,
            parse_regions(regions),
            revision,
            tokenizer,
            dtype=get_dtype(dtype),
            **({} if trust_remote_code is None else {"trust_remote_code": trust_remote_code}),
        )
        kwargs = {name: value for name, value in kwargs.items() if name in OF_MODEL}  # tasks read the others
        super().__init__(pretrained, revision=revision or "main", dtype=dtype, tokenizer=tokenizer, **kwargs)

    def _get_config(self, *args: Any, **kwargs: Any) -> None:
        self._config = self._loaded.config

    def _create_model(self, *args: Any, **kwargs: Any) -> None:
        self._model = self._loaded.to(self.device)


def with_our_tasks(args: argparse.Namespace) -> argparse.Namespace:
    """Add our tasks to parsed arguments, and for the model ``routed`` what a loss per token needs to know of it."""
    if getattr(args, "command", None) not in ("run", "ls", "validate"):
        return args
    given = {key: value for key, value in vars(args).items() if value is not None}
    if given.get("config"):
        given = EvaluatorConfig.load_yaml_config(given["config"]) | given
    theirs = given.get("include_path")
    args.include_path = path() if theirs is None else [path(), theirs]
    if given.get("model") == "routed":
        model_args = given.get("model_args", {})
        known: dict[str, Any] = {"special_tokens": False}
        src, told = model_args.get("pretrained"), given.get("metadata", {})
        if src:
            known["pair"] = held_out_pair(src, {**model_args, **told})[0]
        if src and not model_args.get("tokenizer"):
            revision = model_args.get("revision")
            known["tokenizer"], known["revision"] = tokenizer_place(src, read_layout(src, revision), revision)
        args.metadata = known | told
    return args


@contextlib.contextmanager
def only_our_tasks(args: argparse.Namespace) -> Iterator[None]:
    """Where no other task is asked for, spare the user the 15 seconds in which lm-eval reads its own 14,000 files."""
    ours = {file.stem for file in Path(path()).glob("*.yaml")} - {"routed_wmdp"}
    tasks = getattr(args, "tasks", None)
    before = lm_eval.tasks.TaskManager
    if isinstance(tasks, list) and set(tasks) <= ours:
        lm_eval.tasks.TaskManager = partial(before, include_defaults=False)
    try:
        yield
    finally:
        lm_eval.tasks.TaskManager = before


def main() -> None:
    """Run lm-eval's command line."""
    setup_logging()
    command = HarnessCLI()
    args = with_our_tasks(command.parse_args())
    with only_our_tasks(args):
        command.execute(args)


if __name__ == "__main__":
    main()
