"""`RegionMonitor`: measures how regions grow in training and which environment causes it; it can halt the run."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from routed_peft.data.columns import ROUTE_ENVIRONMENT
from routed_peft.monitoring.alarms import HALT, OK, WARN, Alarms, MonitorConfig
from routed_peft.monitoring.environments import list_environments, rows_by_environment
from routed_peft.monitoring.factors import find_factors
from routed_peft.monitoring.gradients import EnergyShare, EnvironmentGradients, weight_drift
from routed_peft.monitoring.growth import Growth, GrowthMeter
from routed_peft.monitoring.observation import INCIDENT, ContributionLog, Incident, RegionReport, RowSamples, rank_blame
from routed_peft.monitoring.probe import Probe, Reward, reward_gaps

logger = logging.getLogger(__name__)


class RegionMonitor(TrainerCallback, ExportableState):
    """A monitor of a routed trainer's regions: their growth, their effect, and the contribution of each environment.

    The constructor adds it to the trainer. On every ``config.every``-th step it logs, under ``monitor/REGION/…``:

    - ``size`` (Frobenius norm of the region's weight update), ``growth`` in the step, and its parts:
      ``contribution/ENVIRONMENT``, signed, and ``rest`` (momentum and decay), which add up to it (`Growth`);
    - ``functional_size/ENVIRONMENT``, ``kl/ENVIRONMENT`` (`Effect`) and, given a ``reward``, ``reward_gap/ENVIRONMENT``;
    - for a region with a subspace, ``energy/ENVIRONMENT`` beside ``energy_random/…`` (`EnergyShare`), and ``weight_drift``;

    and ``monitor/status``: 0 ok, 1 warn, 2 halt. An alarm (`Alarms`) saves a checkpoint, and every step is observed from
    then on. A lasting alarm halts the run and writes ``incident.json`` into ``output_dir``. The monitor's state is saved with
    every checkpoint, and restored when training resumes.

    The column ``route_environment`` holds the environment of each row, as a name or as an integer into ``environments``. In
    GRPO it is the column ``environment_column``.

    Args:
        trainer: a `RoutedTrainer`, or another trainer on `RoutingMixin`.
        environments: their names; by default those in the training dataset.
        reward: ``reward(model, environment)``, a mean over some rollouts. The reward gap is the difference between its value
            with the region on and with the region ablated, under the same random numbers and without gradients.

    Raises:
        ValueError: if the environments are not known, or a region cannot be read; while training, on a batch with an unknown
            environment or none, and if the monitor misses a part of a region's gradient.

    Attributes:
        status: "ok", "warn" or "halt".
        reports: the last observation, by region.
    """

    def __init__(
        self,
        trainer: Any,
        config: MonitorConfig | None = None,
        *,
        environments: Sequence[str] | None = None,
        reward: Reward | None = None,
    ) -> None:
        if trainer.args.restore_callback_states_from_checkpoint:
            raise ValueError("`restore_callback_states_from_checkpoint` would replace the monitor, which restores "
                             "itself: set it to False")  # fmt: skip
        self.trainer, self.config, self.reward = trainer, config or MonitorConfig(), reward
        self.column = getattr(trainer.args, "environment_column", ROUTE_ENVIRONMENT)
        self.environments = list(environments or list_environments(trainer.train_dataset, self.column))
        if unknown := [name for name in self.config.exempt if name not in self.environments]:
            raise ValueError(f"`exempt` has {unknown}, and the environments are {self.environments}")
        self._watch()
        self._stack = ExitStack()
        self._reset()
        trainer.observer = self
        trainer.add_callback(self)

    def _watch(self) -> None:
        """Find the regions of the trainer's model, of which `model_init` makes a new one for every run."""
        trainer = self.trainer
        self._model = trainer.model
        self.factors = {region: find_factors(self._model, region) for region in trainer.routing.regions}
        layers = (f for factors in self.factors.values() for f in factors)
        self.gradients = EnvironmentGradients(module for f in layers for module in f.modules)
        processes = trainer.accelerator.num_processes
        self.meter = GrowthMeter(self.factors, self.gradients, self.environments, self._reduce, processes)
        self.energies = {
            region: EnergyShare(factors, region, environments=self.environments, draws=self.config.random_subspaces)
            for region, factors in self.factors.items()
        }

    def _reset(self) -> None:
        self._stack.close()  # hooks of an interrupted run
        self._observing = False
        self.alarms, self.contributions, self.status = Alarms(self.config), ContributionLog(), OK
        self.reports: dict[str, RegionReport] = {}
        self._samples = RowSamples(self.config.samples)
        self._growth: dict[str, Growth] = {}

    def _reduce(self, tensor: Tensor) -> Tensor:
        accelerator = self.trainer.accelerator
        return accelerator.reduce(tensor, "sum") if accelerator.num_processes > 1 else tensor

    # Checkpoints

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint; `Trainer` writes it into ``trainer_state.json``."""
        kept = {"status": self.status, "alarms": self.alarms.state(), "ledger": self.contributions.state()}
        return {"args": {}, "attributes": kept}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore a state from `state`."""
        self.status = (kept := state["attributes"])["status"]
        self.alarms.restore(kept["alarms"])
        self.contributions.restore(kept["ledger"])

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Start afresh, or from the state in the checkpoint."""
        if Path(str(args.output_dir), INCIDENT).exists():
            raise ValueError(f"{args.output_dir} holds {INCIDENT}: the run was halted. Go back with "
                             "`routed_peft.monitoring.rollback`, use `run_with_rollback`, or move the file away")  # fmt: skip
        self._reset()
        if self.trainer.model is not self._model:
            self._watch()
        callbacks: Any = state.stateful_callbacks or {}
        saved = callbacks.get(type(self).__name__)
        if state.global_step and saved:
            self.restore(saved[0] if isinstance(saved, list) else saved)

    # A step

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Prepare to observe the step, if it is its turn."""
        step, alarmed = state.global_step + 1, self.status != OK and self.config.action != "log"
        self._observing = step % self.config.every == 0 or alarmed
        if not self._observing:
            return
        batches = min(args.gradient_accumulation_steps, self.config.probe_rows)
        self.probe = Probe(self.config.probe_rows // batches, batches, turn=step)
        self._stack.enter_context(_eager())
        for recorder in (self.gradients, *self.energies.values()):
            recorder.start()
            self._stack.callback(recorder.stop)

    def observe(self, inputs: Mapping[str, Any], environments: Any) -> None:
        """Take a batch that is about to be trained on, and each row's environment, as a name or an index."""
        first = inputs["prompt_ids" if "prompt_ids" in inputs else "input_ids"]
        rows = rows_by_environment(environments, self.environments, size=len(first), column=self.column)
        if not self._observing:
            return
        for recorder in (self.gradients, *self.energies.values()):
            recorder.expect_batch(rows, len(first))
        self.probe.keep(inputs, self.trainer._has_loss(inputs), rows=rows, environments=self.environments)
        self._samples.keep(inputs, rows, self.trainer.state.global_step + 1)

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Copy the regions' factors before the step."""
        if not self._observing:
            return
        self._stack.close()
        if not self.probe.kept:
            raise ValueError("the monitor saw no batch of this step: call `RoutingMixin.training_step` in the trainer's "
                             "own `training_step`")  # fmt: skip
        self.meter.before()

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure the growth of the regions."""
        if not self._observing:
            return
        self._growth = self.meter.after(self.trainer.optimizer)
        self.gradients.clear()
        for region, growth in self._growth.items():
            if growth.captured < 0.9:
                raise ValueError(f"the gradients that the monitor saw are not those that train the region {region!r} (cosine "
                                 f"{growth.captured:.2f}): compute all of the loss through the model's forward pass, without "
                                 "hooks that change gradients")  # fmt: skip

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure the effect of the regions, log all numbers, and act on alarms."""
        if not self._observing:
            return
        self._observing = False
        step, before = state.global_step, self.status
        self.reports = self._reports(step)
        for region, report in self.reports.items():
            self.contributions.add(step, region, report.contributions)
            watched = report.alarm_metrics(self.config.exempt)
            self.alarms.observe(step, {f"{region}/{name}": value for name, value in watched.items()})
        # before the first gap is known, trouble may date from the start
        if self.reward is None or any("/reward_gap" in name for name in self.alarms.series):
            self.contributions.forget_until(self.alarms.clean_step)
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
        model, names, device = self.trainer.model, self.environments, self.trainer.args.device
        with self.trainer.compute_loss_context_manager(), _eager():
            effects = self.probe.measure(model, self.factors, environments=len(names), reduce=self._reduce)
        gaps: dict[str, dict[str, float]] = {}
        if self.reward is not None and (step % self.config.reward_every == 0 or self.status != OK):
            mean = lambda tensor: self._reduce(tensor.to(device)) / self.meter.processes
            gaps = reward_gaps(self.reward, model, regions=self.factors, environments=names, reduce=mean, seed=step)
        reports = {}
        for region, factors in self.factors.items():
            layers, drift = [f.name for f in factors], weight_drift(model, region)
            extra = {"reward_gap": gaps.get(region, {}), **self.energies[region].shares(self._reduce, device)}
            reports[region] = RegionReport(layers, names, self._growth[region], effects[region], extra, drift)
        return reports

    def _log(self) -> None:
        logs: dict[str, float] = {"monitor/status": (OK, WARN, HALT).index(self.status)}
        for region, report in self.reports.items():
            logs |= {f"monitor/{region}/{name}": v for name, v in report.flatten(self.config.by_layer).items()}
        logs |= {f"monitor/{name}/cusum": s.cusum.level for name, s in self.alarms.series.items() if s.cusum}
        Trainer.log(self.trainer, logs)  # not TRL's override, which would empty its running means into this line

    # Acting

    def _alarms_in_words(self) -> str:
        return ", ".join(f"{name} = {series.value:.4g}" for name, series in self.alarms.raised.items())

    def _halt(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        control.should_save = control.should_training_stop = True
        if not state.is_world_process_zero:
            return
        log, onset, raised = self.contributions, self.alarms.onset_step, self.alarms.raised
        regions = sorted({name.partition("/")[0] for name in raised})
        since, total = log.since(onset, regions), log.total(regions)
        exempt = {*self.config.exempt, *(log.total(self.factors).keys() - set(self.environments))}
        table, named = rank_blame(since, total, blame=self.config.blame, exempt=exempt)
        numbers = {
            name: {"value": s.value, "limit": s.limit, "cusum": s.cusum and s.cusum.level, "clean_step": s.clean_step}
            for name, s in raised.items()
        }
        samples = self._samples.decode(self.trainer.processing_class)
        rows = [row for name in named for row in samples.get(name, ())]
        incident = Incident(state.global_step, onset, numbers, table, named, rows)
        path, words, named = incident.write(str(args.output_dir)), self._alarms_in_words(), incident.named
        message = "halted at step %d: %s. It began after step %d, and %s contributed most; see %s"
        logger.warning(message, incident.step, words, incident.onset_step, named or "no environment", path)


def _eager() -> AbstractContextManager[Any]:
    """Run compiled parts of a model eagerly: compiled code ignores new hooks."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
