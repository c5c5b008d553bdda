"""``python -m routed_peft.lm_eval …``: lm-eval's command line, with regions.

It adds three things: the PEFT type ``ROUTED`` (for ``--model hf --model_args pretrained=BASE,peft=ADAPTER``), the tasks of
`routed_peft.tasks`, and a model ``routed``, a run with some of its regions::

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
from routed_peft.evaluation.source import held_out_pair, load_source, open_source, parse_regions, tokenizer_place
from routed_peft.tasks import path
from routed_peft.tasks.utils import METADATA

import lm_eval.tasks  # isort: skip
from lm_eval._cli import HarnessCLI  # isort: skip
from lm_eval.api.registry import register_model  # isort: skip
from lm_eval.config.evaluate_config import EvaluatorConfig  # isort: skip
from lm_eval.models.utils_hf import get_dtype  # isort: skip
from lm_eval.utils import setup_logging  # isort: skip


MODEL_ARGUMENTS = set(
    "backend truncation logits_cache max_length device softmax_dtype mixed_precision_dtype batch_size max_batch_size "
    "add_bos_token prefix_token_id think_end_token enable_thinking chat_template_args".split()
)
"""Arguments of lm-eval's Hugging Face model that apply to a model which is loaded already."""

ACCEPTED = MODEL_ARGUMENTS | METADATA | {"regions", "dtype"}


def check_arguments(given: Iterable[str]) -> None:
    """Raise ValueError on a model argument that ``routed`` would ignore.

    >>> check_arguments(["region"])
    Traceback (most recent call last):
    ...
    ValueError: the model `routed` has no argument 'region': did you mean 'regions'?
    """
    for name in given:
        if name not in ACCEPTED:
            near = get_close_matches(name, ACCEPTED, n=1)
            advice = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(sorted(ACCEPTED))}"
            raise ValueError(f"the model `routed` has no argument {name!r}: {advice}")


@register_model("routed")
class RoutedLM(TextLM):
    """lm-eval's Hugging Face model, loaded by `load_routed`. Arguments mean the same as for ``--model hf``."""

    def __init__(
        self,
        pretrained: str,
        regions: str | None = "all",
        revision: str | None = None,
        regions_repo: str | None = None,
        dtype: Any = "auto",
        tokenizer: Any = None,
        trust_remote_code: bool | None = None,
        **kwargs: Any,
    ) -> None:
        check_arguments(kwargs)
        self._loaded, tokenizer = load_source(
            pretrained,
            parse_regions(regions),
            revision=revision,
            regions_repo=regions_repo,
            tokenizer=tokenizer,
            dtype=get_dtype(dtype),
            **({} if trust_remote_code is None else {"trust_remote_code": trust_remote_code}),
        )
        kwargs = {name: value for name, value in kwargs.items() if name in MODEL_ARGUMENTS}  # tasks read the others
        super().__init__(pretrained, revision=revision or "main", dtype=dtype, tokenizer=tokenizer, **kwargs)

    def _get_config(self, *args: Any, **kwargs: Any) -> None:
        self._config = self._loaded.config

    def _create_model(self, *args: Any, **kwargs: Any) -> None:
        self._model = self._loaded.to(self.device)


def add_packaged_tasks(args: argparse.Namespace) -> argparse.Namespace:
    """Add this package's tasks to parsed arguments, and for the model ``routed`` the metadata that its losses need."""
    if getattr(args, "command", None) not in ("run", "ls", "validate"):
        return args
    given = {key: value for key, value in vars(args).items() if value is not None}
    if given.get("config"):
        given = EvaluatorConfig.load_yaml_config(given["config"]) | given
    include_path = given.get("include_path")
    args.include_path = path() if include_path is None else [path(), include_path]
    if given.get("model") == "routed":
        model_args = given.get("model_args", {})
        known: dict[str, Any] = {"special_tokens": False}
        src, metadata = model_args.get("pretrained"), given.get("metadata", {})
        if src:
            known["pair"] = held_out_pair(src, {**model_args, **metadata})[0]
        if src and not model_args.get("tokenizer"):
            revision = model_args.get("revision")
            known["tokenizer"], known["revision"] = tokenizer_place(src, open_source(src, revision), revision)
        args.metadata = known | metadata
    return args


@contextlib.contextmanager
def packaged_tasks_only(args: argparse.Namespace) -> Iterator[None]:
    """Skip lm-eval's 14,000 task files, which take 15 seconds to read, if only packaged tasks are asked for."""
    packaged = {file.stem for file in Path(path()).glob("*.yaml")} - {"routed_wmdp"}
    tasks = getattr(args, "tasks", None)
    before = lm_eval.tasks.TaskManager
    if isinstance(tasks, list) and set(tasks) <= packaged:
        lm_eval.tasks.TaskManager = partial(before, include_defaults=False)
    try:
        yield
    finally:
        lm_eval.tasks.TaskManager = before


def main() -> None:
    """Run lm-eval's command line."""
    setup_logging()
    command = HarnessCLI()
    args = add_packaged_tasks(command.parse_args())
    with packaged_tasks_only(args):
        command.execute(args)


if __name__ == "__main__":
    main()
