"""State of a model's adapters under routing: those that stay frozen, and changes since attaching, which are refused.

PEFT's own verbs (``set_adapter``, ``disable_adapter_layers``, ``merge_adapter`` …) work on an attached model too. Each would
quietly end the training of a region, so the state that they change is looked at in every step.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from routed_peft.adapters import adapter_names, find_outlets, routing_record, tuner_layers
from routed_peft.routing.groups import JOINT, Member


def active_adapters(model: nn.Module) -> list[str]:
    """Return the adapters that are switched on in some PEFT layer of ``model``."""
    return list(dict.fromkeys(name for _, layer in tuner_layers(model) for name in layer.active_adapters))


def frozen_adapters(model: nn.Module, members: Sequence[Member]) -> list[str]:
    """Return the adapters that are not to be trained.

    These were loaded with ``is_trainable=False``, or are switched on and have no parameter that requires a gradient. (An
    adapter that was added beside another has none either, because PEFT switches on the first alone; it is to be trained.)

    Raises:
        ValueError: on a frozen adapter that is switched off, and on one that was trained before, unless by a routing of this
            model, which leaves adapters as it found them.
    """
    configs: Any = getattr(model, "peft_config", {})
    active, routed = active_adapters(model), routing_record(model).scope is not None
    learning = {m.adapter for m in members for p in m.module.parameters(recurse=False) if p.requires_grad}
    frozen = []
    for name in adapter_names(model):
        if configs[name].inference_mode and name not in active:
            raise ValueError(f"the adapter {name!r} is loaded for inference and switched off, but routing runs with "
                             f"all adapters of a model: remove it (`model.delete_adapter({name!r})`), switch it on "
                             f"beside {active} (`set_adapter`), or load it with `is_trainable=True`")  # fmt: skip
        if name not in active and not routed and _was_trained(model, name, configs[name]):
            raise ValueError(f"the adapter {name!r} was trained before and is switched off, but routing runs with all "
                             "adapters of a model, and would train it: switch it on "
                             f"(`model.base_model.set_adapter({[*active, name]})`), or remove it "
                             f"(`model.delete_adapter({name!r})`)")  # fmt: skip
        if configs[name].inference_mode or (name in active and name not in learning):
            frozen.append(name)
    return frozen


def _was_trained(model: nn.Module, adapter: str, config: Any) -> bool:
    """Return whether an adapter comes from a saved run, or is no longer what its initialization made of it, if that is known.

    PEFT says nothing of this: an adapter that was just added beside another is switched off, too.
    """
    if getattr(config, "base_fingerprint", None) is not None:  # which saving writes
        return True
    starts_at_zero = getattr(config, "init_lora_weights", None) in (True, "gaussian")
    return starts_at_zero and any(p.any() for m in find_outlets(model, [adapter]) for p in m.parameters())


@dataclass(frozen=True, slots=True)
class AdapterState:
    """Adapters and trained parameters of a model at the time of attaching.

    ``layers`` are (name, PEFT layer, module that holds it, attribute by which it does). For every parameter whose gradient
    is routed, or would have to be, ``trained`` has (module's name, module, parameter's name, whether it is trained, whether
    it is an adapter's).
    """

    names: list[str]
    layers: list[tuple[str, Any, nn.Module, str]]
    trained: list[tuple[str, nn.Module, str, bool, bool]]

    @classmethod
    def from_model(cls, model: nn.Module, members: Sequence[Member]) -> AdapterState:
        """Read the state of ``model``, whose routing has just been attached."""
        modules = dict(model.named_modules())
        places = [(name, layer, *name.rpartition(".")[::2]) for name, layer in tuner_layers(model)]
        return cls(
            adapter_names(model),
            [(name, layer, modules[parent], attribute) for name, layer, parent, attribute in places],
            [
                (m.name, m.module, name, p.requires_grad, m.adapter is not None)
                for m in members
                if m.group != JOINT
                for name, p in m.module.named_parameters(recurse=False)
            ],
        )

    def check(self, model: nn.Module) -> None:
        """Raise ValueError where adapters of ``model`` were added, switched, merged, removed or frozen since attaching.

        Parameters of adapters that were frozen then are frozen again.
        """
        if adapter_names(model) != self.names:
            raise ValueError(f"the adapters were {self.names} when routing was attached and are {adapter_names(model)} "
                             "now: detach, and attach again with routes for all of them")  # fmt: skip
        expected = set(self.names)
        for name, layer, parent, attribute in self.layers:
            # merging tools put the plain layer back; wrappers of FSDP or checkpointing are other modules
            if parent._modules.get(attribute) is layer.base_layer:
                raise ValueError(f"the adapters are gone from {name!r} (`unload`, `merge_and_unload`), but the routing "
                                 "is attached: train the model first, and save or ablate it afterwards (`save_routed`, "
                                 "`ablate`)")  # fmt: skip
            if layer.merged_adapters or layer.disable_adapters or expected != set(layer.active_adapters):
                _refuse(name, layer, expected)
        for module_name, module, name, trained, in_adapter in self.trained:
            p = module._parameters.get(name)
            if p is not None and p.requires_grad and in_adapter and not trained:
                p.requires_grad_(False)  # PEFT unfreezes whatever it switches on, as at the end of `disable_adapter`
            elif p is not None and p.requires_grad != trained and (in_adapter or p.requires_grad):
                verb = "requires no gradient any more" if trained else "requires a gradient now"
                raise ValueError(f"{module_name}.{name} {verb}, unlike when routing was attached (`set_adapter`, "
                                 "`requires_grad_`): restore it, or detach and attach again, with a new optimizer")  # fmt: skip


def _refuse(name: str, layer: BaseTunerLayer, expected: Collection[str]) -> None:
    if layer.merged_adapters:
        raise ValueError(f"the adapters {list(layer.merged_adapters)} are merged into {name!r} (`merge_adapter`), "
                         "where neither can be routed: call `unmerge_adapter()` before the next step")  # fmt: skip
    if layer.disable_adapters:
        raise ValueError(f"the adapters of {name!r} are switched off (`disable_adapter`, `disable_adapter_layers`), so "
                         "no region could learn: call `enable_adapter_layers()` before the next step. Use "
                         "`routed_peft.ablated(model, region)` to run a model without a region")  # fmt: skip
    raise ValueError(f"the adapters {sorted(layer.active_adapters)} of {name!r} are active (`set_adapter`), of "
                     f"{sorted(expected)} when routing was attached: call "
                     f"`model.base_model.set_adapter({sorted(expected)})` before the next step. Use "
                     "`routed_peft.ablated(model, region)` to run a model without a region")  # fmt: skip
