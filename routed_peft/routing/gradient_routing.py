"""`GradientRouting`: the object that attaches a table of routes to a model."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NoReturn

import torch
from peft.tuners.tuners_utils import set_adapter
from torch import Tensor, nn

from routed_peft.adapters import adapter_names, guard_saving, routing_record, set_routing_record, tuner_layers
from routed_peft.architectures import find_mlps, output_projection
from routed_peft.deprecation import warn_renamed
from routed_peft.functional import PositionWeights
from routed_peft.routes import BASE, Routes, validate_routes
from routed_peft.routing.adapter_state import AdapterState, active_adapters, frozen_adapters
from routed_peft.routing.compatibility import check_auxiliary_loss, check_covered, check_member, check_model
from routed_peft.routing.groups import JOINT, Member, find_members
from routed_peft.routing.layers import Attachment, routed_class, routed_input_class, swap, unswap
from routed_peft.routing.self_check import SelfChecking
from routed_peft.routing.step_weights import GroupWeights, RouteTable, RoutingState, label_indices

Labels = Sequence[str] | Sequence[int] | Tensor


class GradientRouting(SelfChecking):
    r"""Attach routes to a model, so that labels decide which parameters the gradient of each position reaches.

    For a position (or example) with label l, the gradient of every parameter of group g is multiplied by
    ``routes[l].weights[g]``, and regions in ``routes[l].ablated`` are absent from its forward pass (gradient routing,
    arXiv 2410.04332; parameter masking of SGTM, arXiv 2512.05648). Forward values are otherwise unchanged.

    Weights act by position: a gradient that flows through the hidden state at position i takes the weight of position i,
    whichever later loss it comes from.

    Args:
        model: a PeftModel, or a transformers model with adapters, whose adapters are regions.
        routes: label -> `Route`; its order gives the integer labels.
        train_base: unfreeze and train the model's own weights too, rather than adapters alone. None: as in the run that
            the model was loaded from (``load_routed(…, is_trainable=True)``), otherwise False.
        base_adapters: adapters that belong to the base, such as a ``retain`` LoRA. None: those of the run that the model
            was loaded from, or of the routing before on this model. Adapters loaded with ``is_trainable=False`` stay frozen.
        edges: ``"parameters"`` routes parameter gradients exactly. ``"activations"`` scales the gradient at the input of
            every MLP's output projection, as published for ERA; other parameters then learn from all data.
        layers: decoder layers whose base is routed; None for all. The base elsewhere learns from all data.
        joint: base modules that learn from all data: ``"embeddings"``, ``"norms"``, ``"head"`` or ends of module names.
        gather: leave positions of weight zero out of weight-gradient matmuls. Switch it off under ``torch.compile``.

    Attributes:
        regions: names of the model's regions.
        groups: groups that have trained parameters: ``"base"`` and ``"joint"`` where there are any, then the regions.

    Raises:
        ValueError: on routes that do not fit the model, and on models that cannot be routed, naming the module.

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
        *,
        train_base: bool | None = None,
        base_adapters: Collection[str] | None = None,
        edges: Literal["parameters", "activations"] = "parameters",
        layers: Collection[int] | None = None,
        joint: Collection[str] = (),
        gather: bool = True,
    ) -> None:
        if edges not in ("parameters", "activations"):
            raise ValueError(f'`edges` is "parameters" or "activations", got {edges!r}')
        self.model, self.routes, self.edges = model, dict(routes), edges
        record, adapters = routing_record(model), adapter_names(model)
        if base_adapters is None:
            base_adapters = [name for name in record.base_adapters if name in adapters]
        self.train_base = record.continues_base if train_base is None else train_base
        self.base_adapters = list(base_adapters)
        self.regions = [name for name in adapters if name not in self.base_adapters]
        check_model(model, self.regions, base_adapters=self.base_adapters, train_base=self.train_base)
        members = find_members(model, self.base_adapters, joint=joint, layers=layers)
        self._frozen = frozen_adapters(model, members)
        trained_base = self.train_base or any(name not in self._frozen for name in self.base_adapters)
        frozen = [name for name in self.regions if name in self._frozen]
        validate_routes(routes, self.regions, base=trained_base, frozen=frozen)
        self._state = RoutingState()
        self._swapped: list[nn.Module] = []
        self._requires_grad = {name: p.requires_grad for name, p in model.named_parameters()}
        self._active = active_adapters(model)
        self._owners: dict[str, list[nn.Module]] = {}  # rather than the parameters, which FSDP replaces
        self._hook = model.register_forward_pre_hook(partial(_check_call, self._state), with_kwargs=True)
        try:
            self._unfreeze(members)
            self._swap(members)
        except BaseException:
            self.detach()
            raise
        self._adapter_state = AdapterState.from_model(model, members)
        self.groups = [group for group in (BASE, JOINT, *self.regions) if self.parameters(group)]
        dtype = torch.float64 if next(model.parameters()).dtype == torch.float64 else torch.float32
        self._table = RouteTable(self.routes, self.regions, gather=gather, dtype=dtype)
        # groups that have yet to show that weights of 0 block their gradient; in one process, where no other adds to it
        alone = not torch.distributed.is_available() or not torch.distributed.is_initialized()
        self._unproven = {*self.groups} - {JOINT} if alone and edges == "parameters" else set()
        layers = None if layers is None else sorted(layers)
        self._leave_record({"edges": edges, "route_layers": layers, "joint": sorted(joint)})

    # Attaching

    def _unfreeze(self, members: Sequence[Member]) -> None:
        names = [*self.base_adapters, *self.regions]
        if any(set(layer.active_adapters) != set(names) for _, layer in tuner_layers(self.model)):
            set_adapter(self.model, names)
        for member in members:
            for name, p in member.module.named_parameters(recurse=False):
                if member.adapter in self._frozen:
                    p.requires_grad_(False)
                elif member.adapter in self._active:
                    p.requires_grad_(self._requires_grad.get(f"{member.name}.{name}", p.requires_grad))
                elif member.adapter is None and self.train_base:
                    p.requires_grad_(p.is_floating_point())
                elif member.adapter is None and p.requires_grad:
                    raise ValueError(f"{member.name}.{name} is trainable, but it belongs to no adapter and `train_base` is "
                                     "False: freeze it, or train the whole base with `train_base=True`")  # fmt: skip

    def _swap(self, members: Sequence[Member]) -> None:
        groups: dict[nn.Parameter, str] = {}
        mlps = find_mlps(self.model).values() if self.edges == "activations" else ()
        outputs = {output_projection(mlp) for mlp in mlps}
        for member in members:
            parameters = [p for p in member.module.parameters(recurse=False) if p.requires_grad]
            for p in parameters:
                if groups.setdefault(p, member.group) != member.group:
                    raise ValueError(f"{member.name!r} shares a weight with a module of the group {groups[p]!r} but is "
                                     f"in {member.group!r} (tied embeddings?): put both or neither into `joint`")  # fmt: skip
            self._owners.setdefault(member.group, []).append(member.module)
            if member.outlet or (parameters and member.group != JOINT):
                check_member(member)
                # an outlet in any case, frozen or not, since a route may ablate its region
                if self.edges == "parameters" or member.outlet or member.module in outputs:
                    self._swap_member(member)
        check_covered(self.model, groups)

    def _swap_member(self, member: Member) -> None:
        module = member.module
        cls = routed_class(module) if self.edges == "parameters" else routed_input_class(module)
        if cls is None:
            raise ValueError(f"the trainable parameters of {member.name!r} ({type(module).__name__}) cannot be routed: "
                             "freeze them, or name the module in `joint` if all data may train it")  # fmt: skip
        swap(module, cls, Attachment(self._state, member.group, member.name, type(module), member.outlet))
        self._swapped.append(module)

    def _leave_record(self, scope: Mapping[str, Any]) -> None:
        """Leave the record that saving needs on the model, where it outlives this object."""
        former, adapters = routing_record(self.model), tuple(self.base_adapters)
        record = replace(former, routes=self.routes, train_base=self.train_base, base_adapters=adapters, scope=scope)
        set_routing_record(self.model, record)
        guard_saving(self.model)
        if self.train_base:
            self.model.save_pretrained = self.model.push_to_hub = _refuse_to_save  # type: ignore[assignment]

    def detach(self) -> None:
        """Restore the classes of modules, ``requires_grad`` and the active adapters to their state before attaching.

        Two things stay on the model, because it is saved after training. ``model._routed`` (a
        `routed_peft.adapters.RoutingRecord`) tells `save_routed` how the model was trained. With ``train_base`` the model's
        own ``save_pretrained`` goes on raising, because it would write adapters only and lose the trained base; that of the
        transformers model inside raises as long as it holds regions, because it would write these, too.
        """
        self._hook.remove()
        for module in self._swapped:
            unswap(module)
        self._swapped = []
        if self._active and set(self._active) != {*self.base_adapters, *self.regions}:
            set_adapter(self.model, self._active)
        for name, p in self.model.named_parameters():
            p.requires_grad_(self._requires_grad.get(name, p.requires_grad))

    # Use

    @contextmanager
    def __call__(self, labels: Labels, weights: Mapping[str, Tensor] | None = None) -> Iterator[None]:
        """Route the forward and backward passes within the block.

        Args:
            labels: one name per example; or integers into ``list(routes)``, ``(B,)`` or ``(B, T)`` aligned with the
                positions of the input (-100: padding).
            weights: by group, factors ``(B,)`` or ``(B, T)`` on the routes' weights, such as token frequencies.

        Raises:
            ValueError: on an unknown label, wrong shapes, and adapters that were added, merged, switched or frozen since
                attaching; and at the end of the first block that gives a group no weight, if it has gradient all the same.
        """
        if not self._swapped:
            raise ValueError("this GradientRouting is detached: make a new one")
        self.check_adapters()
        if self._state.groups is not None:
            raise ValueError("`with routing(...)` cannot be nested: leave the outer block first")
        indices = label_indices(labels, self.routes)
        effective = self._table.effective_weights(indices, weights)
        device = next(self.model.parameters()).device
        with self._state.holding(self._table.prepare(indices, effective, device)), self._proving(effective):
            yield

    def check_adapters(self) -> None:
        """Raise ValueError on adapters that PEFT's verbs changed since attaching, and on a load-balancing loss switched on.

        Every ``with routing(...)`` begins with it; call it before a step of the optimizer, too, where others could come
        between (`RoutedTrainer` does).
        """
        self._adapter_state.check(self.model)
        check_auxiliary_loss(self.model)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Train without routing within the block: the explicit way out."""
        self._state.off += 1
        try:
            yield
        finally:
            self._state.off -= 1

    @contextmanager
    def ablated(self, rows: Mapping[str, Tensor]) -> Iterator[None]:
        """Run forward passes without gradients in which regions are absent from some examples, for sampling or scoring.

        Args:
            rows: region -> bool ``(B,)``, true where the region is absent; a region left out is present everywhere.

        Raises:
            ValueError: inside ``with routing(...)``, and on a name that is no region.
        """
        if self._state.groups is not None:
            raise ValueError("`routing.ablated` cannot be used within `with routing(...)`: leave that block first")
        with self._holding_rows({name: ~absent for name, absent in rows.items()}, None), torch.no_grad():
            yield

    @contextmanager
    def subset(self, present: Mapping[str, Tensor], weights: Mapping[str, Tensor] | None = None) -> Iterator[None]:
        """Run passes in which every example has regions, and gradient weights, of its own; routes play no part.

        Args:
            present: region -> bool ``(B,)``, true where it takes part; a region left out takes part everywhere.
            weights: group -> gradient weights ``(B,)``; a group left out learns nothing.

        Raises:
            ValueError: inside ``with routing(...)``, and on a name that is no region or group.

        Example: ``with routing.subset({"bio": on}, {"bio": on.float()}): loss(model(**batch)).backward()``
        """
        if self._state.groups is not None:
            raise ValueError("`routing.subset` cannot be used within `with routing(...)`: leave that block first")
        self.check_adapters()
        with self._holding_rows(present, weights or {}):
            yield

    @contextmanager
    def _holding_rows(self, present: Mapping[str, Tensor], weights: Mapping[str, Tensor] | None) -> Iterator[None]:
        if unknown := sorted(set(present) - set(self.regions)):
            raise ValueError(f"`rows` has {unknown}; the regions are {self.regions}")
        names = (BASE, *self.regions)
        if unknown := sorted(set(weights or ()) - set(names)):
            raise ValueError(f"`weights` has {unknown}; the groups are {list(names)}")
        device, dtype = next(self.model.parameters()).device, self._table.dtype
        gates = {name: here.to(device, dtype) for name, here in present.items() if not here.all()}
        groups = {name: GroupWeights(gate=gates.get(name)) for name in names}
        if weights is not None:
            size = len(next(iter((*present.values(), *weights.values()))))
            for name in names:
                m = weights.get(name, torch.zeros(size)).to(dtype)
                groups[name].weights = PositionWeights.from_weights(m.cpu(), self._table.gather).to(device)
        with self._state.holding(groups):
            yield

    def parameters(self, group: str) -> list[nn.Parameter]:
        """Return the trained parameters of ``"base"``, a region or ``"joint"``; shared ones once."""
        owners = self._owners.get(group, [])
        return list(dict.fromkeys(p for m in owners for p in m.parameters(recurse=False) if p.requires_grad))

    def count_learning_positions(
        self, labels: Labels, reached: Tensor, weights: Mapping[str, Tensor] | None = None
    ) -> dict[str, int]:
        """Count by group the positions that teach it: those reached by a loss with an effective weight other than zero.

        Args:
            labels: as for ``routing(labels)``.
            reached: bool ``(B, T)``, true where a loss at this or a later position depends on the position.
            weights: as for ``routing(labels, weights)``.
        """
        reached = reached.cpu()
        effective = self._table.effective_weights(label_indices(labels, self.routes), weights)
        taught = {group: m != 0 if m.dim() == 2 else (m != 0).unsqueeze(1) for group, m in effective.items()}
        counts = {group: int((reached & mask).sum()) for group, mask in taught.items()}
        return {group: int(reached.sum()) if group == JOINT else counts[group] for group in self.groups}

    def learning(self, labels: Labels, reached: Tensor, weights: Mapping[str, Tensor] | None = None) -> dict[str, int]:
        """Return `count_learning_positions` of the same arguments: the old name, deprecated."""
        warn_renamed("GradientRouting.learning", "GradientRouting.count_learning_positions")
        return self.count_learning_positions(labels, reached, weights)


def _check_call(state: RoutingState, model: nn.Module, *inputs: Any) -> None:
    """Refuse, before a forward pass under routes, a load-balancing loss that its caller asks for."""
    if state.groups is not None and torch.is_grad_enabled() and inputs[1].get("output_router_logits"):
        check_auxiliary_loss(model, asked=True)


def _refuse_to_save(*_: Any, **__: Any) -> NoReturn:
    raise ValueError("`save_pretrained` writes adapters only and would silently lose the trained base weights: call "
                     "`routed_peft.save_routed(model, path)`, or `trainer.save_model()`")  # fmt: skip
