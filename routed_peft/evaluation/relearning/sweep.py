"""`relearn`: an attack at every learning rate and seed, shared by all processes and resumable."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from accelerate.utils import gather_object
from torch import nn
from tqdm import tqdm

from routed_peft.data.beginnings import document_tokens
from routed_peft.data.vocabulary import check_tokens, vocabulary
from routed_peft.deprecation import formerly_positional
from routed_peft.evaluation.measures.statistics import with_interval
from routed_peft.evaluation.relearning.attacked_model import AttackedModel
from routed_peft.evaluation.relearning.attacks import Attack
from routed_peft.evaluation.relearning.curves import (
    BOUNDS,
    Cell,
    Curve,
    Measure,
    Point,
    check_settings,
    next_rate,
    open_ends,
    run_curve,
)
from routed_peft.evaluation.relearning.data import AttackData, flat_facts, training_batches
from routed_peft.evaluation.source import processes
from routed_peft.evaluation.text_loss import TextLoss, context_length
from routed_peft.regions.fingerprint import fingerprint
from routed_peft.runs.records import RunDirectory

STEPS = (0, 1, 2, 5, 10, 20, 40, 80, 150, 300, 500)


@dataclass(frozen=True)
class RelearnOptions:
    """Further settings of `relearn`.

    Attributes:
        extensions: number of rates that may be added beyond either end of the grid.
        measure: scores the model instead of the texts. It must return at least the attack's target, lower being better for
            the attacker. With ``records``, ``names`` tell its curves from others.
        records: run directory for finished curves, a point per line. Curves found there are not run again.
        names: further entries of every point, such as ``{"arm": "routed"}``.
        on_curve: called with every curve, also with those found in ``records``.
        progress: show a bar.
    """

    extensions: int = 2
    measure: Measure | None = None
    records: RunDirectory | None = None
    names: Mapping[str, Any] | None = None
    on_curve: Callable[[Curve], None] = lambda curve: None
    progress: bool = False

    def __post_init__(self) -> None:
        if self.measure is not None and self.records is not None and not self.names:
            raise ValueError("`measure` with `records` needs `names` that tell its curves from others, such as "
                             "names={'measure': 'accuracy'}")  # fmt: skip


@formerly_positional("attack", "data")
def relearn(
    model: nn.Module,
    tokenizer: Any,
    *,
    attack: Attack | str,
    data: AttackData,
    learning_rates: Sequence[float] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    steps: Sequence[int] = STEPS,
    options: RelearnOptions | None = None,
) -> list[Curve]:
    """Attack a model with every learning rate and seed, and with more rates while the best lies at an end; return the curves.

    Under `accelerate launch` or torchrun all processes must call this; they share the grid, and each returns all curves.

    Args:
        model: a plain causal language model; changed in place and given back unchanged. Attacks compute in float32.
        attack: an `Attack`, or its name (`Attack.parse`).
        learning_rates: tried first; by default those of the attack's method.
        seeds: of the choice and order of documents, and of all random draws.
        steps: to measure at, ascending from 0.
        options: see `RelearnOptions`.

    Raises:
        ValueError: as `AttackedModel`, `AttackData` and `TextLoss` do; and on empty or unordered ``learning_rates``,
            ``seeds`` or ``steps``.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from routed_peft.data import train_tokenizer
    >>> tokenizer = train_tokenizer(["a cell", "a cat"], vocab_size=260)
    >>> sizes = dict(vocab_size=260, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    >>> data = AttackData(forget_train=["a cell"], forget_test=["the cell"], retain_test=["a cat"])
    >>> grid = {"learning_rates": [0.01], "seeds": [0], "steps": [0, 1, 5], "options": RelearnOptions(extensions=0)}
    >>> curves = relearn(LlamaForCausalLM(LlamaConfig(**sizes)), tokenizer, attack="forget", data=data, **grid)
    >>> curves[0].status, [point.step for point in curves[0].points]
    ('attack', [0, 1, 5])
    """
    attack, options = Attack.parse(attack) if isinstance(attack, str) else attack, options or RelearnOptions()
    rates = sorted(attack.learning_rates if learning_rates is None else learning_rates)
    check_settings(attack, data, rates=rates, seeds=seeds, steps=steps)
    if attack.method == "none":
        rates, seeds, steps, options = [0.0], [seeds[0]], [0], replace(options, extensions=0)
    attacked = AttackedModel(model)
    check_texts(model, tokenizer, data=data, attack=attack)
    sweep = _Sweep(attacked, tokenizer, attack=attack, data=data, steps=list(steps), options=options)
    try:
        return sweep.search(rates, seeds)
    finally:
        attacked.release()


def check_texts(model: nn.Module, tokenizer: Any, *, data: AttackData, attack: Attack) -> None:
    """Raise ValueError where a text of an attack has a token beyond the model's vocabulary."""
    for name, texts in data.relevant_to(attack).items():
        rows = [{"input_ids": ids} for ids in document_tokens(tokenizer, flat_facts(texts))]
        check_tokens(rows, name, vocabulary(model))


class _Sweep:
    """Curves of one attack: run now, or read from records of an earlier call."""

    def __init__(
        self,
        attacked: AttackedModel,
        tokenizer: Any,
        *,
        attack: Attack,
        data: AttackData,
        steps: list[int],
        options: RelearnOptions,
    ) -> None:
        self.attacked, self.tokenizer, self.attack, self.data = attacked, tokenizer, attack, data
        self.steps, self.options = steps, options
        own = (fingerprint(attacked.model), _text_settings(attacked.model, tokenizer))
        about = [asdict(attack), data.relevant_to(attack), steps, *own]
        digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:12]
        self.names = {**(options.names or {}), "digest": digest}
        self.start: dict[int, Mapping[str, float]] = {}
        self._losses: dict[int, dict[str, TextLoss]] = {}

    def search(self, rates: list[float], seeds: Sequence[int]) -> list[Curve]:
        """Run all rates with all seeds, and rates beyond an end while the best lies there."""
        curves: dict[Cell, Curve] = {}
        added = {-1: 0, 1: 0}
        wanted, state = rates, processes()
        hidden = not (self.options.progress and state.is_main_process)
        with tqdm(desc=self.attack.name, unit="step", disable=hidden, leave=False) as bar:
            while wanted:
                cells = [(rate, seed) for rate in wanted for seed in seeds]
                bar.total = (bar.total or 0) + len(cells) * self.steps[-1]
                for cell, curve in self.run(cells, lambda done: bar.update(done * state.num_processes)):
                    curves[cell] = curve
                    self.options.on_curve(curve)
                wanted = []
                for side in open_ends(curves, seeds, self.steps):
                    if added[side] < self.options.extensions:
                        added[side] += 1
                        wanted.append(next_rate(rates, side))
                rates = sorted([*rates, *wanted])
        return [curves[rate, seed] for rate in rates for seed in seeds]

    def run(self, cells: list[Cell], tick: Callable[[int], Any]) -> Iterator[tuple[Cell, Curve]]:
        """Yield the curve of each cell, one per process at a time; the main process writes them to the records."""
        state = processes()
        found = gather_object([self._recorded()] if state.is_main_process else [])[0]
        for cell in [cell for cell in cells if cell in found]:
            tick(self.steps[-1])
            yield cell, found[cell]
        left = [cell for cell in cells if cell not in found]
        for first in range(0, len(left), state.num_processes):
            with state.split_between_processes(left[first : first + state.num_processes]) as mine:
                done = [((rate, seed), self._curve(rate, seed, tick)) for rate, seed in mine]
            for cell, curve in gather_object(done):
                if self.options.records is not None and state.is_main_process:
                    for point in curve.records():
                        self.options.records.log(**self.names, **point)
                yield cell, curve

    def _curve(self, rate: float, seed: int, tick: Callable[[int], Any]) -> Curve:
        attack, model, measure = self.attack, self.attacked.model, self._measure(seed)
        start = self._start(seed)
        within = replace(attack, length=min(attack.length, context_length(model, self.tokenizer)))
        batches = training_batches(self.tokenizer, self.data.for_training(attack, seed), attack=within, seed=seed)
        with self.attacked.prepared_for(attack, seed) as parameters:
            curve = run_curve(
                model, parameters, batches=batches, learning_rate=rate, steps=self.steps, measure=measure, tick=tick
            )
            return Curve(attack.name, attack.target, rate, seed, start, tuple(curve))

    def _start(self, seed: int) -> Mapping[str, float]:
        """Score the original model: once, or for each seed where the seed chooses the scored texts."""
        key = seed if self.attack.data == "facts" else 0
        if key not in self.start:
            scores = self._measure(seed)(self.attacked.model).items()
            self.start[key] = {name: score for name, score in scores if not name.endswith(BOUNDS)}
        return self.start[key]

    def _measure(self, seed: int) -> Measure:
        if self.options.measure is not None:
            return self.options.measure
        key = seed if self.attack.data == "facts" else 0
        if key not in self._losses:
            texts = self.data.scored(self.attack, seed)
            self._losses[key] = {name: TextLoss(self.attacked.model, self.tokenizer, texts[name]) for name in texts}
        return partial(_scores, self._losses[key], self.attack.target)

    def _recorded(self) -> dict[Cell, Curve]:
        """Read the complete curves from the records, and remove the lines of incomplete ones."""
        records = self.options.records
        if records is None:
            return {}
        about = {**self.names, "attack": self.attack.name}

        def ours(point: Mapping[str, Any]) -> bool:
            return all(point.get(name) == value for name, value in about.items())

        cells: dict[Cell, list[Mapping[str, Any]]] = {}
        for point in filter(ours, records.points()):
            cells.setdefault((point["learning_rate"], point["seed"]), []).append(point)
        complete = {cell: points for cell, points in cells.items() if [p["step"] for p in points] == self.steps}
        if len(complete) < len(cells):
            records.keep(lambda p: not ours(p) or (p["learning_rate"], p["seed"]) in complete)
        named = {*about, "learning_rate", "seed", "step", "tokens"}
        scores = lambda point: {k: math.nan if v is None else v for k, v in point.items() if k not in named}
        read = {
            cell: tuple(Point(one["step"], one["tokens"], scores(one)) for one in points)
            for cell, points in complete.items()
        }
        own = self.attack.name, self.attack.target
        return {cell: Curve(*own, *cell, self._start(cell[1]), points) for cell, points in read.items()}


def _scores(losses: Mapping[str, TextLoss], target: str, model: nn.Module) -> dict[str, float]:
    """Return the losses, with a 95 % confidence interval over documents for the target's (`BOUNDS`)."""
    scores = {name: loss(model) for name, loss in losses.items() if name != target}
    scores[target], bounds = with_interval(losses[target], model)
    return scores if bounds is None else scores | {target + end: at for end, at in zip(BOUNDS, bounds, strict=True)}


def _text_settings(model: nn.Module, tokenizer: Any) -> list[Any]:
    """Return everything but weights that influences a loss on text: configuration and tokenizer."""
    config: Any = model.config
    volatile = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
    settings = {key: value for key, value in config.to_dict().items() if key not in volatile}
    fast = getattr(tokenizer, "backend_tokenizer", None)
    words = tokenizer.get_vocab() if fast is None else fast.to_str()
    return [settings, words, tokenizer.bos_token_id, tokenizer.eos_token_id]
