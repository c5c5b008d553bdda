"""`RegionMonitor`: a live account of what a run's regions learn, and from which environment; it can halt the run."""

from __future__ import annotations

import logging
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from routed_peft.data.columns import ROUTE_ENVIRONMENT
from routed_peft.monitoring.alarms import HALT, OK, WARN, Alarms
from routed_peft.monitoring.config import MonitorConfig
from routed_peft.monitoring.environments import environments_of, rows_by_environment
from routed_peft.monitoring.factors import find_factors
from routed_peft.monitoring.gradients import EnvironmentGradients
from routed_peft.monitoring.growth import Growth, GrowthMeter
from routed_peft.monitoring.incidents import INCIDENT, describe
from routed_peft.monitoring.observation import Ledger, RegionReport
from routed_peft.monitoring.probe import Probe, model_inputs
from routed_peft.monitoring.reward_gap import Reward, reward_gaps
from routed_peft.monitoring.subspace_energy import EnergyShare, weight_drift

logger = logging.getLogger(__name__)

_LEAST_CAPTURED = 0.9
_CODES = {OK: 0, WARN: 1, HALT: 2}


class RegionMonitor(TrainerCallback, ExportableState):
    """Watches the regions of a routed trainer: how they grow, what they do, and which environment feeds them.

    Making one adds it to the trainer. On every ``config.every``-th step it logs, under ``monitor/REGION/…``:

    - ``size`` (Frobenius norm of what the region adds to the weights), ``growth`` of the step, and its parts:
      ``contribution/ENVIRONMENT``, signed, and ``rest`` (momentum and decay), which add up to it (`Growth`);
    - ``functional_size/ENVIRONMENT``, ``kl/ENVIRONMENT`` (`Effect`) and, given a ``reward``, ``reward_gap/ENVIRONMENT``;
    - for a region with a subspace, ``energy/ENVIRONMENT`` beside ``energy_random/…`` (`EnergyShare`), and ``weight_drift``;

    and ``monitor/status``: 0 ok, 1 warn, 2 halt. An alarm (`Alarms`) saves a checkpoint and has every step observed; one that
    lasts halts the run and writes ``incident.json`` into ``output_dir``. Its state is in every checkpoint, and comes back when
    training resumes.

    Rows say where they come from in the column ``route_environment``; a trainer's batches carry it as names or as integers
    into ``environments``. In GRPO it is the column named by ``environment_column``.

    Args:
        trainer: a `RoutedTrainer`, or another trainer on `RoutingMixin`.
        config: `MonitorConfig`.
        environments: their names; by default those in the training dataset.
        reward: ``reward(model, environment)``, a mean over some rollouts. It is called with the region on and ablated, under
            the same random numbers, without gradients; the difference is the reward gap.

    Raises:
        ValueError: where the environments are not known, or a region cannot be read; while training, on a batch that names
            none or an unknown one, and where a part of a region's gradient escapes it.

    Attributes:
        status: "ok", "warn" or "halt".
        reports: the last observation, by region.
    """

    def __init__(
        self,
        trainer: Any,
        config: MonitorConfig | None = None,
        environments: Sequence[str] | None = None,
        reward: Reward | None = None,
    ) -> None:
        if trainer.args.restore_callback_states_from_checkpoint:
            raise ValueError(
                "`restore_callback_states_from_checkpoint` would replace the monitor, which restores itself"
            )
        self.trainer, self.config, self.reward = trainer, config or MonitorConfig(), reward
        self.column = getattr(trainer.args, "environment_column", ROUTE_ENVIRONMENT)
        self.environments = list(environments or environments_of(trainer.train_dataset, self.column))
        if unknown := [name for name in self.config.exempt if name not in self.environments]:
            raise ValueError(f"`exempt` has {unknown}, and the environments are {self.environments}")
        self.factors = {region: find_factors(trainer.model, region) for region in trainer.routing.regions}
        layers = [f for factors in self.factors.values() for f in factors]
        self.gradients = EnvironmentGradients(module for f in layers for module in f.modules)
        self.meter = GrowthMeter(
            self.factors, self.gradients, self.environments, self._reduce, trainer.accelerator.num_processes
        )
        self.energies = {
            region: EnergyShare(factors, region, self.environments, self.config.random_subspaces)
            for region, factors in self.factors.items()
        }
        self._stack = ExitStack()
        self._reset()
        trainer.observer = self
        trainer.add_callback(self)

    def _reset(self) -> None:
        self._stack.close()  # what an interrupted run left open
        self._observing = False
        self.alarms, self.ledger, self.status = Alarms(self.config), Ledger(), OK
        self.reports: dict[str, RegionReport] = {}
        self._samples: dict[str, deque[dict[str, Any]]] = {}
        self._growth: dict[str, Growth] = {}

    def _reduce(self, tensor: Tensor) -> Tensor:
        accelerator = self.trainer.accelerator
        total: Tensor = accelerator.reduce(tensor, "sum") if accelerator.num_processes > 1 else tensor
        return total

    # Checkpoints

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps; `Trainer` writes it into ``trainer_state.json``."""
        kept = {"status": self.status, "alarms": self.alarms.state(), "ledger": self.ledger.state()}
        return {"args": {}, "attributes": kept}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back to what `state` returned."""
        kept = state["attributes"]
        self.status = kept["status"]
        self.alarms.restore(kept["alarms"])
        self.ledger.restore(kept["ledger"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin anew, or where the checkpoint left off."""
        if Path(str(args.output_dir), INCIDENT).exists():
            raise ValueError(
                f"{args.output_dir} holds {INCIDENT}: the run was halted. Go back with `routed_peft.monitoring.rollback`, use "
                "`run_with_rollback`, or move the file away"
            )
        self._reset()
        callbacks: Any = state.stateful_callbacks or {}
        saved = callbacks.get(type(self).__name__)
        if state.global_step and saved:
            self.restore(saved[0] if isinstance(saved, list) else saved)

    # A step

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Get ready to observe the step if its turn has come."""
        step, looking_closer = state.global_step + 1, self.status != OK and self.config.action != "log"
        self._observing = step % self.config.every == 0 or looking_closer
        if not self._observing:
            return
        batches = min(args.gradient_accumulation_steps, self.config.probe_rows)
        self.probe = Probe(self.config.probe_rows // batches, batches, turn=step)
        self._stack.enter_context(_eager())
        watchers: list[EnvironmentGradients | EnergyShare] = [self.gradients, *self.energies.values()]
        for watcher in watchers:
            watcher.start()
            self._stack.callback(watcher.stop)

    def observe(self, inputs: Mapping[str, Any], environments: Any) -> None:
        """Look at a batch that is about to be trained on; the trainer calls it.

        Args:
            inputs: the batch.
            environments: of each row: a name, or an integer into `environments`.
        """
        first = inputs["prompt_ids" if "prompt_ids" in inputs else "input_ids"]
        rows = rows_by_environment(environments, self.environments, len(first), self.column)
        if not self._observing:
            return
        self.gradients.batch(rows, len(first))
        for energy in self.energies.values():
            energy.batch(rows)
        self.probe.keep(inputs, self.trainer._has_loss(inputs), rows, self.environments)
        self._sample(inputs, rows)

    def _sample(self, inputs: Mapping[str, Any], rows: Mapping[str, Tensor]) -> None:
        tokens = model_inputs(inputs)
        mask = tokens.get("attention_mask", torch.ones_like(tokens["input_ids"])) != 0
        step = self.trainer.state.global_step + 1
        for name, index in rows.items():
            kept = self._samples.setdefault(name, deque(maxlen=self.config.samples))
            for row in index[: self.config.samples].tolist():
                kept.append({"environment": name, "step": step, "input_ids": tokens["input_ids"][row][mask[row]]})

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remember the regions as they are before the step."""
        if not self._observing:
            return
        self._stack.close()
        if not self.probe.kept:
            raise ValueError(
                "the monitor saw no batch of this step: does the trainer call `RoutingMixin.training_step`, which shows them?"
            )
        self.meter.before()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure how the regions have grown."""
        if not self._observing:
            return
        self._growth = self.meter.after(self.trainer.optimizer)
        self.gradients.clear()
        for region, growth in self._growth.items():
            if growth.captured < _LEAST_CAPTURED:
                raise ValueError(
                    f"the gradients that the monitor saw are not those that train the region {region!r} (cosine "
                    f"{growth.captured:.2f}): is a part of the loss computed outside the model, or a hook changing gradients?"
                )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure what the regions do, log everything, and act on alarms."""
        if not self._observing:
            return
        self._observing = False
        step, before = state.global_step, self.status
        self.reports = self._reports(step)
        for region, report in self.reports.items():
            self.ledger.add(step, region, report.contributions)
            watched = report.watched(self.config.exempt)
            self.alarms.observe(step, {f"{region}/{name}": value for name, value in watched.items()})
        if self.reward is None or any("/reward_gap" in name for name in self.alarms.series):
            self.ledger.forget(self.alarms.clean_step)  # before the first gap is known, trouble may date from the start
        self.status = self.alarms.status
        self._log()
        if self.config.action == "log" or self.status == OK:
            return
        if before == OK:
            control.should_save = True
            logger.warning("step %d: %s; every step is observed from here on", step, self._alarms_in_words())
        if self.status == HALT and self.config.action == "halt":
            self._halt(args, state, control)

    # Measuring

    def _reports(self, step: int) -> dict[str, RegionReport]:
        trainer, names = self.trainer, self.environments
        with trainer.compute_loss_context_manager(), _eager():
            effects = self.probe.measure(trainer.model, self.factors, len(names), self._reduce)
        gaps = self._reward_gaps(step)
        return {
            region: RegionReport(
                [f.name for f in factors],
                names,
                self._growth[region],
                effects[region],
                {"reward_gap": gaps.get(region, {}), **self.energies[region].shares(self._reduce, trainer.args.device)},
                weight_drift(trainer.model, region),
            )
            for region, factors in self.factors.items()
        }

    def _reward_gaps(self, step: int) -> dict[str, dict[str, float]]:
        if self.reward is None or (step % self.config.reward_every and self.status == OK):
            return {}
        mean = lambda tensor: self._reduce(tensor.to(self.trainer.args.device)) / self.meter.processes
        return reward_gaps(self.reward, self.trainer.model, self.factors, self.environments, mean, seed=step)

    def _log(self) -> None:
        logs: dict[str, float] = {"monitor/status": _CODES[self.status]}
        for region, report in self.reports.items():
            logs |= {f"monitor/{region}/{name}": v for name, v in report.flat(self.config.by_layer).items()}
        logs |= {
            f"monitor/{name}/cusum": s.cusum.level for name, s in self.alarms.series.items() if s.cusum is not None
        }
        Trainer.log(self.trainer, logs)  # not TRL's override, which would empty its running means into this line

    # Acting

    def _alarms_in_words(self) -> str:
        return ", ".join(f"{name} = {series.value:.4g}" for name, series in self.alarms.raised.items())

    def _halt(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        control.should_save = True
        control.should_training_stop = True
        samples = {name: [self._readable(row) for row in rows] for name, rows in self._samples.items()}
        gone = [name for name in self.ledger.total(self.factors) if name not in self.environments]
        blame, exempt = self.config.blame, [*self.config.exempt, *gone]
        incident = describe(state.global_step, self.alarms, self.ledger, samples, blame, exempt)
        if state.is_world_process_zero:
            path = incident.write(str(args.output_dir))
            logger.warning(
                "halted at step %d: %s. It began after step %d, and %s contributed most; see %s",
                incident.step,
                self._alarms_in_words(),
                incident.onset_step,
                incident.named or "no environment",
                path,
            )

    def _readable(self, row: Mapping[str, Any]) -> dict[str, Any]:
        tokenizer, ids = self.trainer.processing_class, row["input_ids"].tolist()
        text = tokenizer.decode(ids) if hasattr(tokenizer, "decode") else None
        return {**row, "input_ids": ids, "text": text}


def _eager() -> AbstractContextManager[Any]:
    """Run compiled parts of a model eagerly: compiled code does not look for new hooks."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
