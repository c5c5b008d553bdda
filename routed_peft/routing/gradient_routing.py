"""`GradientRouting`: the one object between a table of routes and a model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NoReturn

import torch
from peft.tuners.tuners_utils import set_adapter
from torch import Tensor, nn

from routed_peft.adapters import adapter_names, tuner_layers
from routed_peft.architectures import find_mlps, mlp_layout
from routed_peft.routes import BASE, Routes, validate_routes
from routed_peft.routing.compatibility import check_member, check_model
from routed_peft.routing.groups import JOINT, Member, find_members
from routed_peft.routing.layers import Slot, routed_class, swap, swap_input, unswap
from routed_peft.routing.self_check import check_gradients
from routed_peft.routing.step_weights import GroupWeights, RouteCompiler, RoutingState, label_indices

Labels = Sequence[str] | Sequence[int] | Tensor


class GradientRouting:
    r"""Attach routes to a model: from now on labels decide which parameters a position's gradient reaches.

    For a position (or example) with label l, the gradient of every parameter of group g is multiplied by
    ``routes[l].weights[g]``, and regions in ``routes[l].ablated`` are absent from its forward pass (gradient routing,
    arXiv 2410.04332; parameter masking of SGTM, arXiv 2512.05648). Forward values are otherwise untouched.

    Weights act by position: a parameter's gradient that flows through the hidden state at position i takes the weight of
    position i, whichever later loss it came from.

    Args:
        model: a PeftModel, or a transformers model with adapters, whose adapters are regions.
        routes: label -> `Route`; its order gives the integer labels.
        train_base: train the model's own weights too (they are unfrozen), rather than adapters alone.
        base_adapters: adapters that belong to the base, a ``retain`` LoRA say.
        edges: ``"parameters"`` routes parameter gradients, exactly; ``"activations"`` scales the gradient that arrives at
            the input of every MLP's out-projection, as published for ERA. It lets other parameters learn from all data.
        layers: decoder layers whose base is routed; None for all. The base elsewhere learns from all data.
        joint: base modules that learn from all data: ``"embeddings"``, ``"norms"``, ``"head"`` or ends of module names.
        gather: leave positions of weight zero out of weight-gradient matmuls. Switch it off under ``torch.compile``.

    Raises:
        ValueError: on routes that do not fit the model, and on models that cannot be routed, naming the module.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from routed_peft import presets
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        ...                      num_attention_heads=2, num_key_value_heads=2)
        >>> model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=2, target_modules=["up_proj"]), "forget")
        >>> routing = GradientRouting(model, presets.sgtm("forget"), train_base=True)
        >>> ids = torch.arange(8).reshape(2, 4)
        >>> with routing(["forget", "forget"]):
        ...     model(input_ids=ids, labels=ids).loss.backward()
        >>> any(p.grad.any() for p in routing.parameters("base")), any(p.grad.any() for p in routing.parameters("forget"))
        (False, True)
        >>> routing.detach()
    """

    def __init__(
        self,
        model: nn.Module,
        routes: Routes,
        train_base: bool = False,
        base_adapters: Collection[str] = (),
        edges: Literal["parameters", "activations"] = "parameters",
        layers: Collection[int] | None = None,
        joint: Collection[str] = (),
        gather: bool = True,
    ) -> None:
        if edges not in ("parameters", "activations"):
            raise ValueError(f'`edges` is "parameters" or "activations", got {edges!r}')
        self.model, self.routes, self.edges = model, dict(routes), edges
        self.train_base, self.base_adapters = train_base, list(base_adapters)
        self._adapters = adapter_names(model)
        self.regions = [name for name in self._adapters if name not in base_adapters]
        check_model(model, self.regions, base_adapters, train_base)
        validate_routes(routes, self.regions, base=train_base or bool(base_adapters))
        members = find_members(model, self.base_adapters, joint, layers)
        self._state = RoutingState()
        self._swapped: list[nn.Module] = []
        self._requires_grad = {name: p.requires_grad for name, p in model.named_parameters()}
        self._active: list[str] = next((layer.active_adapters for _, layer in tuner_layers(model)), [])
        self._owners: dict[str, list[nn.Module]] = {}  # not the parameters, which FSDP replaces
        try:
            self._unfreeze(members)
            self._swap(members)
        except BaseException:
            self.detach()
            raise
        self.groups = [group for group in (BASE, JOINT, *self.regions) if self.parameters(group)]
        """The groups that have trained parameters: ``"base"`` and ``"joint"`` where there are any, then the regions."""
        dtype = next(model.parameters()).dtype
        self._compiler = RouteCompiler(
            self.routes, self.regions, gather, torch.float64 if dtype == torch.float64 else torch.float32
        )
        self._remember()

    # Attaching

    def _unfreeze(self, members: Sequence[Member]) -> None:
        names = [*self.base_adapters, *self.regions]
        if sorted(self._active) != sorted(names):
            set_adapter(self.model, names)
        for member in members:
            for name, p in member.module.named_parameters(recurse=False):
                if member.adapter or self.train_base:
                    p.requires_grad_(p.is_floating_point())
                elif p.requires_grad:
                    raise ValueError(
                        f"{member.name}.{name} is trainable, but belongs to no adapter and `train_base` is False: freeze it, "
                        "or train the whole base with `train_base=True`"
                    )

    def _swap(self, members: Sequence[Member]) -> None:
        owners: dict[nn.Parameter, str] = {}
        mlp_outputs = self._mlp_outputs() if self.edges == "activations" else []
        for member in members:
            parameters = [p for p in member.module.parameters(recurse=False) if p.requires_grad]
            for p in parameters:
                if owners.setdefault(p, member.group) != member.group:
                    raise ValueError(
                        f"{member.name!r} shares a weight with a module of the group {owners[p]!r} but is in "
                        f"{member.group!r} (tied embeddings?): put both or neither into `joint`"
                    )
            self._owners.setdefault(member.group, []).append(member.module)
            if not parameters or member.group == JOINT:
                continue
            check_member(member)
            slot = Slot(self._state, member.group, member.name, type(member.module), member.outlet)
            if self.edges == "parameters":
                cls = routed_class(member.module)
                if cls is None:
                    raise ValueError(
                        f"the trainable parameters of {member.name!r} ({type(member.module).__name__}) cannot be routed: "
                        "freeze them, or name the module in `joint` if all data may train it"
                    )
                swap(member.module, cls, slot)
            elif member.outlet or member.module in mlp_outputs:
                swap_input(member.module, slot)
            else:
                continue
            self._swapped.append(member.module)
        covered = set(owners)
        for name, p in self.model.named_parameters():
            if p.requires_grad and p not in covered:
                raise ValueError(
                    f"the trainable parameter {name!r} cannot be routed: it belongs to no supported module; freeze it"
                )

    def _mlp_outputs(self) -> list[nn.Module]:
        return [getattr(mlp, mlp_layout(mlp).down) for mlp in find_mlps(self.model).values()]

    def _remember(self) -> None:
        """Leave what saving needs on the model, where it outlives this object."""
        self.model._routed_train_base = self.train_base  # type: ignore[assignment]
        self.model._routed_routes = self.routes  # type: ignore[assignment]
        self.model._routed_base_adapters = self.base_adapters  # type: ignore[assignment]
        if self.train_base:
            self.model.save_pretrained = _refuse_to_save  # type: ignore[assignment]

    def detach(self) -> None:
        """Undo everything: classes, ``requires_grad`` and active adapters are as they were."""
        for module in self._swapped:
            unswap(module)
        self._swapped = []
        if self._active and sorted(self._active) != sorted([*self.base_adapters, *self.regions]):
            set_adapter(self.model, self._active)
        for name, p in self.model.named_parameters():
            p.requires_grad_(self._requires_grad.get(name, p.requires_grad))

    # Use

    @contextmanager
    def __call__(self, labels: Labels, weights: Mapping[str, Tensor] | None = None) -> Iterator[None]:
        """Route the forward and backward passes inside.

        Args:
            labels: one name per example; or integers into ``list(routes)``, ``(B,)`` or ``(B, T)`` aligned with the
                positions of the input (-100: padding).
            weights: optional multipliers by group, ``(B,)`` or ``(B, T)``, for rules that are not a table.

        Raises:
            ValueError: on an unknown label, wrong shapes, or an adapter added since attaching.
        """
        if not self._swapped:
            raise ValueError("this GradientRouting is detached: make a new one")
        if adapter_names(self.model) != self._adapters:
            raise ValueError(
                f"the adapters were {self._adapters} when routing was attached and are {adapter_names(self.model)} now: "
                "detach, and attach again with routes for all of them"
            )
        if self._state.groups is not None:
            raise ValueError("`with routing(...)` does not nest: leave the outer one first")
        indices = label_indices(labels, self.routes)
        effective = self._compiler.effective(indices, weights)
        device = next(self.model.parameters()).device
        self._state.groups = self._compiler.compile(indices, effective, device)
        try:
            yield
        finally:
            self._state.groups = None

    @contextmanager
    def off(self) -> Iterator[None]:
        """Train without routing inside: the explicit way out."""
        self._state.off += 1
        try:
            yield
        finally:
            self._state.off -= 1

    @contextmanager
    def ablated(self, rows: Mapping[str, Tensor]) -> Iterator[None]:
        """Run forward passes, without gradients, in which regions are absent from some examples: to sample, or to score.

        Args:
            rows: region -> bool ``(B,)``, true where the region is absent; a region left out is present everywhere.

        Raises:
            ValueError: inside ``with routing(...)``, and on a name that is no region.
        """
        if self._state.groups is not None:
            raise ValueError("`routing.ablated` does not go inside `with routing(...)`: leave that first")
        if unknown := sorted(set(rows) - set(self.regions)):
            raise ValueError(f"`rows` has {unknown}; the regions are {self.regions}")
        device = next(self.model.parameters()).device
        gates = {region: (~absent).to(device, self._compiler.dtype) for region, absent in rows.items() if absent.any()}
        self._state.groups = {group: GroupWeights(gate=gates.get(group)) for group in (BASE, *self.regions)}
        try:
            with torch.no_grad():
                yield
        finally:
            self._state.groups = None

    def parameters(self, group: str) -> list[nn.Parameter]:
        """Return the trained parameters of ``"base"``, a region or ``"joint"``; shared ones once."""
        owners = self._owners.get(group, [])
        return list(dict.fromkeys(p for m in owners for p in m.parameters(recurse=False) if p.requires_grad))

    def learning(self, labels: Labels, reached: Tensor, weights: Mapping[str, Tensor] | None = None) -> dict[str, int]:
        """Count, by group, the positions that teach it: effective weight not zero, and reached by a loss.

        Args:
            labels: as for ``routing(labels)``.
            reached: bool ``(B, T)``, true where a loss at this or a later position depends on the position.
            weights: as for ``routing(labels, weights)``.
        """
        reached = reached.cpu()
        effective = self._compiler.effective(label_indices(labels, self.routes), weights)
        counts = {
            group: int((reached & (m != 0 if m.dim() == 2 else (m != 0).unsqueeze(1))).sum())
            for group, m in effective.items()
        }
        return {group: int(reached.sum()) if group == JOINT else counts[group] for group in self.groups}

    def self_check(
        self, batch: Mapping[str, Any], loss: Callable[[nn.Module, Mapping[str, Any]], Tensor] | None = None
    ) -> dict[str, dict[str, bool]]:
        """Apply every label in turn to one real batch, through the real loss, and look where gradient arrives.

        Args:
            batch: keyword arguments of the model, without route columns. Call it while no gradients are held.
            loss: ``loss(model, batch)``; the model's own ``.loss`` by default.

        Returns:
            label -> group -> whether the group received gradient.

        Raises:
            ValueError: when a group of weight zero received gradient, or one that should learn received none.
        """
        size = next(len(v) for v in batch.values() if isinstance(v, Tensor))
        groups = {group: self.parameters(group) for group in self.groups if group != JOINT}
        if self.edges == "activations":
            groups = {BASE: self._upstream()}
        compute = loss or (lambda model, inputs: model(**inputs).loss)
        received = {}
        for label, route in self.routes.items():
            try:
                with self([label] * size):
                    received[label] = check_gradients(lambda: compute(self.model, batch), label, route, groups)
            finally:  # of joint and unlooked-at parameters too, or the first step would start from them
                for p in self.model.parameters():
                    p.grad = None
        return received

    def _upstream(self) -> list[nn.Parameter]:
        """Return the base parameters that activation edges protect: those of the MLPs but the out-projections."""
        outputs, base = {id(m) for m in self._swapped}, {id(p) for p in self.parameters(BASE)}
        return [
            p
            for mlp in find_mlps(self.model).values()
            if id(getattr(mlp, mlp_layout(mlp).down)) in outputs
            for m in mlp.modules()
            if id(m) not in outputs
            for p in m.parameters(recurse=False)
            if id(p) in base
        ]


def _refuse_to_save(*_: Any, **__: Any) -> NoReturn:
    raise ValueError(
        "`save_pretrained` writes adapters only and would lose the trained base weights without a word: call "
        "`routed_peft.save_routed(model, path)`, or `trainer.save_model()`"
    )
