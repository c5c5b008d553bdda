"""`RoutedConfig`: what a region is made of, as PEFT saves it in ``adapter_config.json``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig

from routed_peft.regions.registration import peft_type

KINDS = ("mlp",)
"""The kinds of region that there are."""

INITS = ("zero", "model")
"""The ways to initialise a region."""


@dataclass
class RoutedConfig(PeftConfig):
    """Configuration of a region.

    Attributes:
        kind: ``"mlp"``: `size` extra hidden units beside every targeted MLP.
        size: hidden units per targeted MLP.
        target_modules: names of MLPs (a suffix each), or one regular expression; by default those of the model's type.
        exclude_modules: names, or one regular expression, that `target_modules` leaves out.
        layers_to_transform: indices of the layers that get units; all by default.
        layers_pattern: name of the list of layers, where `layers_to_transform` cannot find it.
        init: ``"zero"``: the units' output weights are zero, so the model's function is preserved. ``"model"``: the
            model's own initialisation. None becomes ``"zero"`` on a base loaded from a checkpoint and ``"model"`` on
            one made from scratch; what was chosen is written back here.
        base_fingerprint: `routed_peft.regions.fingerprint.fingerprint` of the base that the region was trained on,
            written when saving; attaching the region to any other base raises.

    Raises:
        ValueError: on an unknown `kind` or `init`, or a `size` below one.

    Example:
        >>> RoutedConfig(size=64, task_type="CAUSAL_LM").peft_type.value
        'ROUTED'
        >>> RoutedConfig(kind="attention", size=64)
        Traceback (most recent call last):
        ...
        ValueError: `kind` must be one of 'mlp', got 'attention'
    """

    kind: str = field(default="mlp", metadata={"help": "What the region is made of: 'mlp' (extra hidden units)."})
    size: int | None = field(default=None, metadata={"help": "Extra hidden units beside every targeted MLP. Required."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names of the MLPs (suffixes), or one regular expression. Default: all MLPs."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names, or one regular expression, that `target_modules` leaves out."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers that get units. Default: all."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of layers, for `layers_to_transform`."}
    )
    init: str | None = field(
        default=None, metadata={"help": "'zero', 'model', or null to choose by whether the base was pretrained."}
    )
    base_fingerprint: dict[str, Any] | None = field(
        default=None, metadata={"help": "Fingerprint of the base that the region was trained on; enforced on loading."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type()
        if self.kind not in KINDS:
            raise ValueError(f"`kind` must be one of {', '.join(map(repr, KINDS))}, got {self.kind!r}")
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise ValueError(f"`size` must be a whole number of hidden units, at least 1, got {self.size!r}")
        if self.init is not None and self.init not in INITS:
            raise ValueError(f"`init` must be one of {', '.join(map(repr, INITS))} or None, got {self.init!r}")
        self.exclude_modules = self.exclude_modules or None
        for name in ("target_modules", "exclude_modules"):
            self._check_names(name)
        indices = [self.layers_to_transform] if isinstance(self.layers_to_transform, int) else self.layers_to_transform
        if indices is not None and not all(isinstance(i, int) and i >= 0 for i in indices):
            raise ValueError(f"`layers_to_transform` holds layer indices from 0 on, got {self.layers_to_transform!r}")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                "`layers_to_transform` needs `target_modules` as a list of names, got a regular expression"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("`layers_pattern` is of use only together with `layers_to_transform`, got it alone")

    def _check_names(self, name: str) -> None:
        value = getattr(self, name)
        if value is None or isinstance(value, str) and value:
            return
        if isinstance(value, str) or not value or not all(isinstance(item, str) and item for item in value):
            raise ValueError(f"`{name}` must be a list of module names or one regular expression, got {value!r}")
        setattr(self, name, sorted(value))  # a list, for JSON, in an order that does not depend on hashing
