"""An attack at every learning rate and seed, over as many processes as there are, continued where it stopped."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from accelerate.utils import gather_object
from torch import nn
from tqdm import tqdm

from routed_peft.evaluation.measures import worst_case
from routed_peft.evaluation.measures.statistics import with_interval
from routed_peft.evaluation.processes import processes
from routed_peft.evaluation.relearning.attacked_model import Victim
from routed_peft.evaluation.relearning.attacks import Attack
from routed_peft.evaluation.relearning.curves import BOUNDS, Curve, Measure, Point, log_spaced, run_curve
from routed_peft.evaluation.relearning.data import AttackData, training_batches
from routed_peft.evaluation.text_loss import TextLoss, context_length
from routed_peft.regions.fingerprint import fingerprint
from routed_peft.runs.records import RunDirectory

STEPS = (0, 1, 2, 5, 10, 20, 40, 80, 150, 300, 500)
Cell = tuple[float, int]


def relearn(
    model: nn.Module,
    tokenizer: Any,
    attack: Attack | str,
    data: AttackData,
    learning_rates: Sequence[float] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    steps: Sequence[int] = STEPS,
    measure: Measure | None = None,
    extensions: int = 2,
    records: RunDirectory | None = None,
    names: Mapping[str, Any] | None = None,
    on_curve: Callable[[Curve], None] | None = None,
    progress: bool = False,
) -> list[Curve]:
    """Attack a model: try every learning rate with every seed, and more rates while the best lies at an edge.

    The model's weights are kept aside on the CPU and put back between runs and at the end. Under `accelerate launch` or
    torchrun all processes must call this; they share the (learning rate, seed) cells, and each returns all curves.

    Args:
        model: a plain causal language model; changed in place and given back as it came. Attacks compute in float32.
        tokenizer: of the model.
        attack: what the attacker does, or the name of it (`Attack.parse`).
        data: what they train on and what is scored.
        learning_rates: to begin with; by default those of the attack's method.
        seeds: of the order of the data, of which documents there are, and of what is drawn.
        steps: ascending from 0; when to measure.
        measure: scores the model instead of `data`; needs at least the attack's target, lower being better for the attacker.
            With ``records``, ``names`` tell it from others.
        extensions: how many rates may be added beyond either end of the grid.
        records: where finished curves are written to, a point each line, and from where they are not run again.
        names: what every point says of itself besides, such as ``{"arm": "routed"}``.
        on_curve: called with every curve, also those that were found in ``records``.
        progress: show a bar.

    Returns:
        The curves, rates ascending, seeds in order.

    Raises:
        ValueError: what `Victim`, `AttackData` and `TextLoss` raise, on empty or unordered ``learning_rates``, ``seeds``
            or ``steps``, and on a ``measure`` with ``records`` and without ``names``.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from routed_peft.data import train_tokenizer
        >>> tokenizer = train_tokenizer(["a cell", "a cat"], vocab_size=260)
        >>> sizes = dict(vocab_size=260, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes))
        >>> data = AttackData(forget_train=["a cell"], forget_test=["the cell"], retain_test=["a cat"])
        >>> curves = relearn(model, tokenizer, "forget", data, [0.01], seeds=[0], steps=[0, 1, 5], extensions=0)
        >>> curves[0].status, [point.step for point in curves[0].points]
        ('attack', [0, 1, 5])
    """
    attack = Attack.parse(attack) if isinstance(attack, str) else attack
    rates = sorted(attack.learning_rates if learning_rates is None else learning_rates)
    check_settings(attack, data, rates, seeds, steps)
    if measure is not None and records is not None and not names:
        raise ValueError(
            "`names` must say what `measure` measures, so that `records` of something else are not taken for it"
        )
    if attack.method == "none":
        rates, seeds, steps, extensions = [0.0], [seeds[0]], [0], 0
    victim = Victim(model)
    sweep = _Sweep(victim, tokenizer, attack, data, list(steps), measure, records, dict(names or {}))
    bar = tqdm(desc=attack.name, unit="step", disable=not (progress and processes().is_main_process), leave=False)
    try:
        curves: dict[Cell, Curve] = {}
        added = {-1: 0, 1: 0}
        wanted = rates
        while wanted:
            cells = [(rate, seed) for rate in wanted for seed in seeds]
            bar.total = (bar.total or 0) + len(cells) * steps[-1]
            for cell, curve in sweep.run(cells, lambda done: bar.update(done * processes().num_processes)):
                curves[cell] = curve
                if on_curve is not None:
                    on_curve(curve)
            wanted = []
            for side in _edges(curves, seeds, steps):
                if added[side] < extensions:
                    added[side] += 1
                    wanted.append(_beyond(rates, side))
            rates = sorted([*rates, *wanted])
        return [curves[rate, seed] for rate in rates for seed in seeds]
    finally:
        bar.close()
        victim.release()


class _Sweep:
    """Runs cells of one attack's grid, or finds that they were run before."""

    def __init__(
        self,
        victim: Victim,
        tokenizer: Any,
        attack: Attack,
        data: AttackData,
        steps: list[int],
        measure: Measure | None,
        records: RunDirectory | None,
        names: dict[str, Any],
    ) -> None:
        self.victim, self.tokenizer, self.attack, self.data, self.steps = victim, tokenizer, attack, data, steps
        self.measure, self.records = measure, records
        about = [
            asdict(attack),
            data.relevant_to(attack),
            steps,
            fingerprint(victim.model),
            _reading(victim.model, tokenizer),
        ]
        digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:12]
        self.names = {**names, "digest": digest}
        self.start: dict[int, Mapping[str, float]] = {}
        self._losses: dict[int, dict[str, TextLoss]] = {}

    def run(self, cells: list[Cell], tick: Callable[[int], Any]) -> Iterator[tuple[Cell, Curve]]:
        """Yield the curve of each cell, as many at a time as there are processes; the main one writes them down."""
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
                if self.records is not None and state.is_main_process:
                    for point in curve.records():
                        self.records.log(**self.names, **point)
                yield cell, curve

    def _curve(self, rate: float, seed: int, tick: Callable[[int], Any]) -> Curve:
        attack, model, score = self.attack, self.victim.model, self._score(seed)
        start = self._start(seed)
        within = replace(attack, length=min(attack.length, context_length(model, self.tokenizer)))
        batches = training_batches(self.tokenizer, self.data.for_training(attack, seed), within, seed)
        with self.victim.under(attack, seed) as parameters:
            points = tuple(run_curve(model, attack, parameters, batches, rate, self.steps, score, tick))
        return Curve(attack.name, attack.target, rate, seed, start, points)

    def _start(self, seed: int) -> Mapping[str, float]:
        """Score the model before anything is done to it: once, or for each seed where that decides what is scored."""
        key = seed if self.attack.data == "facts" else 0
        if key not in self.start:
            scores = self._score(seed)(self.victim.model)
            self.start[key] = {name: score for name, score in scores.items() if not name.endswith(BOUNDS)}
        return self.start[key]

    def _score(self, seed: int) -> Measure:
        if self.measure is not None:
            return self.measure
        key = seed if self.attack.data == "facts" else 0
        if key not in self._losses:
            texts = self.data.scored(self.attack, seed)
            self._losses[key] = {name: TextLoss(self.victim.model, self.tokenizer, texts[name]) for name in texts}
        return partial(_scores, self._losses[key], self.attack.target)

    def _recorded(self) -> dict[Cell, Curve]:
        """Read the curves that are complete; the lines of others are left out of the records."""
        if self.records is None:
            return {}
        about = {**self.names, "attack": self.attack.name}

        def ours(point: Mapping[str, Any]) -> bool:
            return all(point.get(name) == value for name, value in about.items())

        cells: dict[Cell, list[Mapping[str, Any]]] = {}
        for point in filter(ours, self.records.points()):
            cells.setdefault((point["learning_rate"], point["seed"]), []).append(point)
        whole = {cell: points for cell, points in cells.items() if [p["step"] for p in points] == self.steps}
        if len(whole) < len(cells):
            self.records.keep(lambda p: not ours(p) or (p["learning_rate"], p["seed"]) in whole)
        return {cell: self._read(cell, points, {*about, "learning_rate", "seed"}) for cell, points in whole.items()}

    def _read(self, cell: Cell, points: Sequence[Mapping[str, Any]], about: set[str]) -> Curve:
        known = about | {"step", "tokens"}
        scores = [{k: math.nan if v is None else v for k, v in point.items() if k not in known} for point in points]
        read = (Point(point["step"], point["tokens"], score) for point, score in zip(points, scores, strict=True))
        return Curve(self.attack.name, self.attack.target, *cell, self._start(cell[1]), tuple(read))


def _scores(losses: Mapping[str, TextLoss], target: str, model: nn.Module) -> dict[str, float]:
    """Return the losses, and between which the target's would lie in 95 of 100 draws of documents (`BOUNDS`)."""
    scores = {name: loss(model) for name, loss in losses.items() if name != target}
    scores[target], bounds = with_interval(losses[target], model)
    return scores if bounds is None else scores | {target + end: at for end, at in zip(BOUNDS, bounds, strict=True)}


def _reading(model: nn.Module, tokenizer: Any) -> list[Any]:
    """Return what decides, beside the weights, how a model reads a text: its configuration and the tokenizer."""
    config: Any = model.config
    volatile = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
    settings = {key: value for key, value in config.to_dict().items() if key not in volatile}
    fast = getattr(tokenizer, "backend_tokenizer", None)
    words = tokenizer.get_vocab() if fast is None else fast.to_str()
    return [settings, words, tokenizer.bos_token_id, tokenizer.eos_token_id]


def _edges(curves: Mapping[Cell, Curve], seeds: Sequence[int], steps: Sequence[int]) -> list[int]:
    """Return the ends of the grid (-1, 1) at which the best rate lies, at one step of the attack or another.

    Where no rate helps the attacker at all, all may be too large: that is the lower end.
    """
    rates = sorted({rate for rate, _ in curves})
    target = next(iter(curves.values())).target
    losses = {rate: [curves[rate, seed].losses(target) for seed in seeds] for rate in rates}
    best = {entry.learning_rate for entry in worst_case(steps, losses) if entry.at > 0}
    if not best:
        return [-1]
    return [side for side, rate in ((-1, rates[0]), (1, rates[-1])) if rate in best]


def _beyond(rates: Sequence[float], side: int) -> float:
    """Return the next rate beyond the grid, as far from its end as that is from its neighbour; threefold where it has none.

    >>> _beyond([1e-3, 2e-3], 1), _beyond([3e-3], -1)
    (0.004, 0.001)
    """
    edge, inner = (rates[-1], rates[-2:][0]) if side > 0 else (rates[0], rates[:2][-1])
    return float(f"{edge * (edge / inner if edge != inner else 3.0**side):.4g}")


def check_settings(
    attack: Attack, data: AttackData, rates: Sequence[float], seeds: Sequence[int], steps: Sequence[int]
) -> None:
    """Raise ValueError where an attack cannot be run, before anything is."""
    trains = attack.method != "none"  # what trains nothing has the rate 0
    check_grid(rates, seeds, steps, trains=trains)
    if trains:
        for seed in seeds:
            data.for_training(attack, seed)


def check_grid(
    rates: Sequence[float],
    seeds: Sequence[int],
    steps: Sequence[int],
    names: Sequence[str] = ("learning_rates", "steps"),
    trains: bool = True,
) -> None:
    """Raise ValueError unless rates are positive and different, seeds different, and steps ascend from 0.

    Args:
        rates: of learning.
        seeds: of the attack.
        steps: at which it is measured.
        names: of the arguments that rates and steps came by.
        trains: whether anything is trained; else a rate may be 0.
    """
    if not rates or len(set(rates)) < len(rates) or trains and not all(0 < rate < math.inf for rate in rates):
        raise ValueError(f"`{names[0]}` must be different positive numbers, at least one, got {list(rates)}")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"`seeds` must be different whole numbers, at least one, got {list(seeds)}")
    if list(steps) != sorted(set(steps)) or not steps or steps[0] != 0:
        raise ValueError(f"`{names[1]}` must ascend from 0, got {list(steps)}; for example {log_spaced(100)}")
