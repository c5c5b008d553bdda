"""lm-eval on a live model: its model class, loading of tasks, and runs without side effects. Importing this needs lm-eval."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

from torch import nn
from tqdm import tqdm

try:
    from lm_eval import evaluator
    from lm_eval.api import model as model_module
    from lm_eval.api import task as task_module
    from lm_eval.defaults import DEFAULT_OTHER_SEED
    from lm_eval.models import huggingface
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise ImportError('evaluation needs lm-eval, which is not installed: pip install "routed_peft[eval]"') from error

from routed_peft.data.beginnings import document_tokens
from routed_peft.data.vocabulary import check_tokens, vocabulary
from routed_peft.eval_mode import evaluating
from routed_peft.evaluation.text_loss import first_token
from routed_peft.runs.silence import silenced_logger
from routed_peft.tasks import path


class TextLM(huggingface.HFLM):
    """lm-eval's Hugging Face model, with the loss of a text alone.

    A text begins once, as in `TextLoss`. Where the tokenizer adds a begin-of-sequence token too (Llama, Gemma), lm-eval scores
    the second one, whose loss has nothing to do with the text.
    """

    _rolling = False

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no other context."""
        custom = self.custom_prefix_token_id
        return first_token(self.tokenizer) if custom is None else int(custom)

    def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
        """Return the tokens of a string; of a whole text, without its beginning."""
        rolling = self._rolling
        tokens = (
            document_tokens(self.tokenizer, [string])[0] if rolling else super().tok_encode(string, *args, **kwargs)
        )
        check_tokens([{"input_ids": tokens}], "tasks", vocabulary(self.model))
        return list(tokens)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text, in windows of the model's length, special tokens left out."""
        self._rolling = True
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        finally:
            self._rolling = False


def measurement(
    model: nn.Module,
    tokenizer: Any,
    *,
    tasks: Sequence[str],
    metadata: Mapping[str, Any] | None,
    limit: int | None,
    batch_size: int,
) -> Callable[[], dict[str, float]]:
    """Build tasks and data once, and return a function that measures the model in its present state."""
    tokenizer = copy.deepcopy(tokenizer)  # lm-eval gives it a pad token
    with isolated_lm_eval():
        loaded = load_tasks(tasks, {"tokenizer": tokenizer, "special_tokens": False, **(metadata or {})})

    def measure() -> dict[str, float]:
        with isolated_lm_eval(), evaluating(model):
            lm = TextLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
            results = evaluator.evaluate(lm=lm, task_dict=loaded, limit=limit, bootstrap_iters=0, log_samples=False)
        assert results is not None, "only rank 0 holds results, and there is no other rank here"
        return flatten_results(results["results"])

    return measure


def load_tasks(tasks: Sequence[str], metadata: dict[str, Any]) -> Any:
    """Load tasks as lm-eval's ``simple_evaluate`` does, which would also seed all generators and call ``pip`` each time."""
    tasks = [tasks] if isinstance(tasks, str) else list(tasks)
    own = TaskManager(include_path=path(), include_defaults=False, metadata=metadata)
    outside = [name for name in tasks if name not in own.all_tasks or name == "routed_wmdp"]
    manager = TaskManager(include_path=path(), metadata=metadata) if outside else own  # the former reads 10,000 files
    if not tasks or (unknown := [name for name in outside if name not in manager.all_tasks]):
        got = unknown if tasks else []
        raise ValueError(f"`tasks` must name tasks of lm-eval or of {own.all_tasks}, got {got}; correct the names")
    loaded = manager.load(tasks)
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    return loaded


def flatten_results(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Flatten lm-eval's results, leaving out names and standard errors.

    >>> flatten_results({"mmlu": {"alias": "mmlu", "acc,none": 0.5, "acc_stderr,none": "N/A", "em,strict": 0.25}})
    {'mmlu/acc': 0.5, 'mmlu/em,strict': 0.25}
    """
    return {
        f"{task}/{key.removesuffix(',none')}": float(value)
        for task, metrics in results.items()
        for key, value in metrics.items()
        if "," in key and not key.split(",")[0].endswith("_stderr")
    }


@contextlib.contextmanager
def isolated_lm_eval() -> Iterator[None]:
    """Hide lm-eval's progress bars and its log below errors, and undo its draws from Python's random generator."""
    drawn = random.getstate()
    with contextlib.ExitStack() as stack:
        stack.callback(random.setstate, drawn)
        for module in (model_module, task_module, huggingface):  # not all of their bars have a switch
            stack.enter_context(mock.patch.object(module, "tqdm", _hidden_bar))
        stack.enter_context(silenced_logger("lm_eval"))
        yield


def _hidden_bar(*args: Any, **kwargs: Any) -> Any:
    return tqdm(*args, **{**kwargs, "disable": True})
