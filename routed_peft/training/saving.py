"""Saving, resuming and publishing of a routed Trainer, in the layout of `routed_peft.checkpoint` with base weights."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from torch import Tensor, nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, SaveStrategy, get_last_checkpoint
from transformers.utils.hub import PushInProgress

from routed_peft.adapters import routing_record
from routed_peft.checkpoint import load_weights, push_to_hub, save_routed
from routed_peft.checkpoint.frozen_base import warn_if_changed
from routed_peft.checkpoint.layout import ROUTING
from routed_peft.checkpoint.save import check_can_save
from routed_peft.files import read_json
from routed_peft.routes import routes_differ, routes_from_dict
from routed_peft.routing.gradient_routing import GradientRouting
from routed_peft.runs.resuming import check_resumable, checkpoint_step
from routed_peft.training.arguments import RoutedTrainingArguments
from routed_peft.training.changing_dataset import ChangingDataset, read_state, write_state
from routed_peft.training.finite_weights import FiniteWeightsMixin


class SavingMixin(FiniteWeightsMixin):
    """Overrides of Trainer's saving: stock Trainer drops trained base weights and cannot resume several adapters."""

    routing: GradientRouting
    args: RoutedTrainingArguments
    model: nn.Module
    tokens_per_route: Counter[str]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            if checkpoint_step(folder) >= 0:  # written last by Trainer: without it, nothing resumes from a mixture
                (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
            save_routed(
                self.accelerator.unwrap_model(self.model, keep_torch_compile=False),
                folder,
                routes=self.routing.routes,
                tokenizer=self.processing_class,
                train_base=self.args.train_base,
                base_adapters=self.args.base_adapters,
                kept_regions=self.args.kept_regions,
                tokens_per_route=dict(self.tokens_per_route),
                state_dict=state_dict,
            )
            if isinstance(self.train_dataset, ChangingDataset):
                write_state(folder, self.train_dataset.state())

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the routed layout (`save_routed`); sharded models are gathered first."""
        if output_dir is None or Path(output_dir) == Path(str(self.args.output_dir)):
            self._finish_current_push()  # it reads these files
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        self._check_weights()
        state_dict = self.accelerator.get_state_dict(self.model)
        self._save(output_dir, state_dict)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer` does, after a check that the result can be saved (`check_can_save`).

        A checkpoint that lost part of its state is refused, see `check_resumable`, and so are routes that differ.
        """
        checkpoint = resume_from_checkpoint
        if checkpoint is True:
            checkpoint = get_last_checkpoint(str(self.args.output_dir))
        if checkpoint:  # before Trainer reads any of it
            index, processes = self.args.process_index, self.args.world_size
            check_resumable(checkpoint, process_index=index, processes=processes, fsdp=self.is_fsdp_enabled)
            self._check_same_routes(str(checkpoint))
        if self.args.should_save:
            self._check_can_save(checkpoint_step(checkpoint) if checkpoint else -1)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _check_can_save(self, step: int) -> None:
        """Refuse before the first step whatever would be refused when a checkpoint after ``step`` or the result is saved."""
        out, args = Path(str(self.args.output_dir)), self.args
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        check = partial(check_can_save, model, base_adapters=args.base_adapters, kept_regions=args.kept_regions)
        check(out, tokenizer=self.processing_class)
        if not args.train_base:
            warn_if_changed(model)
        later = [place for place in out.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if checkpoint_step(place) > step]
        for place in later if args.save_strategy != SaveStrategy.NO else ():
            check(place)

    def _check_same_routes(self, checkpoint: str) -> None:
        file = Path(checkpoint, ROUTING)
        saved = read_json(file) if file.is_file() else {}  # a missing one is refused when weights are read
        here: dict[str, Any] = {"train_base": self.args.train_base, "base_adapters": list(self.args.base_adapters)}
        here |= routing_record(self.model).scope or {}  # a run of an earlier version did not record it
        changed = [
            f"`{name}` was {saved[name]!r} and is {now!r}" for name, now in here.items() if saved.get(name, now) != now
        ]
        if saved.get("routes"):
            changed += routes_differ(routes_from_dict(saved["routes"]), self.routing.routes)
        if changed:
            raise ValueError(f"{checkpoint!r} cannot be resumed with other routes: {'; '.join(changed)}. Resume with those "
                             "of the run, or begin another from its weights (`load_routed(…, is_trainable=True)`)")  # fmt: skip

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, *args: Any, **kwargs: Any
    ) -> tuple[int, int]:
        begin: tuple[int, int] = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, *args, **kwargs
        )
        # Trainer would take one step more before it looks at `max_steps`
        return (num_train_epochs, 0) if self.state.global_step >= max_steps else begin

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_weights(self.model, resume_from_checkpoint)
        saved = read_json(Path(resume_from_checkpoint, ROUTING))
        self.tokens_per_route = Counter(saved["tokens_per_route"])
        if isinstance(self.train_dataset, ChangingDataset):
            former = saved["extra"]  # of an earlier version
            self.train_dataset.restore(former or read_state(Path(resume_from_checkpoint)))

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled:
            super()._load_best_model()
        else:
            load_weights(self.model, str(self.state.best_model_checkpoint))

    # The Hub

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        *,
        regions_repo: str | None = None,
        regions_private: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Save, and push the base, without regions, to ``hub_model_id`` (see `routed_peft.push_to_hub`).

        Args:
            commit_message: of the commits.
            blocking: whether to wait; if not, the next save into ``output_dir`` does.
            token: Hub token; ``args.hub_token`` by default.
            revision: branch; ``args.hub_revision`` by default.
            private: whether a new repository is private; ``args.hub_private_repo`` by default.
            regions_repo: Hub id for the regions, a repository of their own; None leaves them here.
            regions_private: whether ``regions_repo`` must be private.
            **kwargs: none; `Trainer`'s describe its model card, and routed runs have another.

        Returns ``{"repo": commit hash}`` and ``"regions_repo"`` likewise, a `concurrent.futures.Future` of these where not
        ``blocking``, or None in all processes but the first. ValueError where no repository is named, on ``kwargs``, and as
        `routed_peft.push_to_hub` does.
        """
        if kwargs:
            raise ValueError(f"`push_to_hub` of a routed trainer got {sorted(kwargs)}, which it does not take: the model "
                             "card is made from the run's records. Leave these out, or edit README.md on the Hub")  # fmt: skip
        if not self.args.hub_model_id and not self.args.push_to_hub:  # with the latter Trainer makes a repository
            raise ValueError("`hub_model_id` is not set: name the repository to push the base to")
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        push = partial(
            push_to_hub,
            str(self.args.output_dir),
            str(self.hub_model_id or self.args.hub_model_id),
            regions_repo=regions_repo,
            regions_private=regions_private,
            private=self.args.hub_private_repo if private is None else private,
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
            **({"commit_message": commit_message} if commit_message else {}),
        )
        if blocking:
            return push()
        future = HfApi().run_as_future(push)
        # Trainer waits for it at the end of training
        self.push_in_progress = PushInProgress([future])  # type: ignore[assignment, arg-type]
        return future

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push the base out of a checkpoint just saved, and wait: rotation could delete it under the upload."""
        if self.args.hub_strategy == HubStrategy.END or not self.is_world_process_zero():
            return
        self._finish_current_push()
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        by_epoch = self.args.save_strategy == SaveStrategy.EPOCH
        at = f"epoch {int(self.state.epoch or 0)}" if by_epoch else f"step {self.state.global_step}"
        push_to_hub(
            checkpoint_folder,
            str(self.hub_model_id),
            private=self.args.hub_private_repo,
            token=self.args.hub_token,
            revision=self.args.hub_revision,
            commit_message=f"Training in progress, {at}",
        )
