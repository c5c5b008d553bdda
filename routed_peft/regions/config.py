"""`RoutedConfig`: what a region is made of, as PEFT saves it in ``adapter_config.json``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig, PeftConfig

from routed_peft.regions.peft_type import peft_type

KINDS = ("mlp", "lora", "subspace")
"""The kinds of region that there are."""

INITS = ("zero", "model")
"""The ways to initialize hidden units."""

STRENGTHS = ("cut", "weights")
"""What keeps the base from learning along a subspace: the credit cut, or the weak projection of weight gradients alone."""

_OF_KIND = {
    "size": ("mlp",),
    "init": ("mlp",),
    "r": ("lora",),
    "lora_alpha": ("lora",),
    "subspace": ("lora", "subspace"),
    "provenance": ("lora", "subspace"),
    "strength": ("subspace",),
    "store_base_part": ("subspace",),
}
"""Fields that mean something to some kinds only."""


@dataclass
class RoutedConfig(PeftConfig):
    """Configuration of a region.

    Attributes:
        kind: ``"mlp"``: `size` extra hidden units beside every targeted MLP. ``"lora"``: a low-rank update of every
            targeted linear layer, that of `peft.LoraConfig` in its plainest form, which mixes with the other kinds in one
            model (PEFT itself refuses to mix types). ``"subspace"``: an update of the residual writers that stays within a few
            directions of the residual stream, which the base itself cannot learn along meanwhile.
        size: hidden units per targeted MLP (``"mlp"``).
        r: rank (``"lora"``); 8 by default, as in `peft.LoraConfig`.
        lora_alpha: the update is multiplied by ``lora_alpha / r`` (``"lora"``); 8 by default.
        subspace: path of a file that `routed_peft.subspaces.Subspace.save` wrote. ``"subspace"``: the directions that the
            region is made of. ``"lora"``: directions that it stays off at the residual writers, its output projected there, as
            befits a ``retain`` LoRA beside a region of kind ``"subspace"``. Needed once: the region's files hold the basis.
        strength: ``"subspace"`` only. ``"cut"`` (default): the backward signal loses its part along the basis at the output
            of every residual writer and embedding, so nothing in the base gets credit for moving along it. ``"weights"``: only
            the writers' own weight gradients lose it. This is *weak*: other layers learn what the writers do not; it is there
            to be compared with.
        store_base_part: ``"subspace"`` only. Whether the file holds the base's own part along the basis (as many numbers as the
            region has), to which `project_base` puts a trained base back. None: yes, unless the base is quantized.
        provenance: where the basis comes from, its shape and hash, written here when the region is made.
        target_modules: names of modules (a suffix each), or one regular expression; by default those of the model's type:
            its MLPs, what PEFT takes by default for ``"lora"``, all residual writers for ``"subspace"``. ``"all-linear"`` is
            understood for ``"lora"``.
        exclude_modules: names, or one regular expression, that `target_modules` leaves out.
        layers_to_transform: indices of the layers that the region is in; all by default.
        layers_pattern: name of the list of layers, where `layers_to_transform` cannot find it.
        init: of hidden units (``"mlp"``). ``"zero"``: the units' output weights are zero, so the model's function is
            preserved. ``"model"``: the model's own initialization. None becomes ``"zero"`` on a base loaded from a
            checkpoint and ``"model"`` on one made from scratch; what was chosen is written back here.
        base_fingerprint: `routed_peft.regions.fingerprint.fingerprint` of the base that the region was trained on,
            written when saving; attaching the region to any other base raises.

    Raises:
        ValueError: on an unknown `kind` or `init`, a `size` or `r` below one, a field that the kind does not have, or a
            region of kind ``"subspace"`` without one.

    Example:
        >>> RoutedConfig(size=64, task_type="CAUSAL_LM").peft_type.value
        'ROUTED'
        >>> RoutedConfig(kind="lora").r
        8
        >>> RoutedConfig(kind="lora", size=64)
        Traceback (most recent call last):
        ...
        ValueError: `size` belongs to kind 'mlp', got `size` = 64 with kind 'lora'
    """

    kind: str = field(
        default="mlp",
        metadata={"help": "What the region is made of: 'mlp' (extra hidden units), 'lora' or 'subspace'."},
    )
    size: int | None = field(default=None, metadata={"help": "mlp: extra hidden units beside every targeted MLP."})
    r: int | None = field(default=None, metadata={"help": "lora: the rank. Default: 8."})
    lora_alpha: float | None = field(
        default=None, metadata={"help": "lora: the update is multiplied by lora_alpha / r. Default: 8."}
    )
    subspace: str | None = field(
        default=None, metadata={"help": "subspace: file of the directions; lora: file of directions to stay off."}
    )
    strength: str | None = field(
        default=None, metadata={"help": "subspace: 'cut' (default), or 'weights', which is weak and for comparison."}
    )
    store_base_part: bool | None = field(
        default=None, metadata={"help": "subspace: keep the base's part along the basis. Default: unless quantized."}
    )
    provenance: dict[str, Any] | None = field(
        default=None, metadata={"help": "Where the basis comes from; written when the region is made."}
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Names of modules (suffixes), or one regular expression. Default: by the model's type."},
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names, or one regular expression, that `target_modules` leaves out."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers that the region is in. Default: all."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of layers, for `layers_to_transform`."}
    )
    init: str | None = field(
        default=None, metadata={"help": "mlp: 'zero', 'model', or null to choose by whether the base was pretrained."}
    )
    base_fingerprint: dict[str, Any] | None = field(
        default=None, metadata={"help": "Fingerprint of the base that the region was trained on; enforced on loading."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type()
        if self.kind not in KINDS:
            raise ValueError(f"`kind` must be one of {', '.join(map(repr, KINDS))}, got {self.kind!r}")
        self._check_kind()
        self._check_targets()

    def _check_kind(self) -> None:
        for name, kinds in _OF_KIND.items():
            if self.kind not in kinds and getattr(self, name) is not None:
                kind = " or ".join(map(repr, kinds))
                raise ValueError(
                    f"`{name}` belongs to kind {kind}, got `{name}` = {getattr(self, name)!r} with kind {self.kind!r}"
                )
        if self.kind == "mlp":
            _check_count("size", self.size, "hidden units")
            if self.init is not None and self.init not in INITS:
                raise ValueError(f"`init` must be one of {', '.join(map(repr, INITS))} or None, got {self.init!r}")
        if self.kind == "lora":
            self.r = 8 if self.r is None else self.r
            self.lora_alpha = 8 if self.lora_alpha is None else self.lora_alpha
            _check_count("r", self.r, "ranks")
            if isinstance(self.lora_alpha, bool) or not isinstance(self.lora_alpha, int | float):
                raise ValueError(f"`lora_alpha` must be a number, got {self.lora_alpha!r}")
        if self.kind == "subspace":
            self.strength = "cut" if self.strength is None else self.strength
            if self.strength not in STRENGTHS:
                raise ValueError(f"`strength` must be one of {', '.join(map(repr, STRENGTHS))}, got {self.strength!r}")
            if self.subspace is None and self.provenance is None:
                raise ValueError(
                    "a region of kind 'subspace' needs `subspace`, the path of a file of directions: make one with "
                    "`routed_peft.subspaces` and `Subspace.save`"
                )

    def _check_targets(self) -> None:
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

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, without the path of a subspace file once its basis is part of the region."""
        data = super().to_dict()
        return data if self.provenance is None else {**data, "subspace": None}

    def to_lora(self) -> LoraConfig:
        """Return the stock configuration under which PEFT alone loads this region's files, ``kind="lora"`` only.

        One that stays off a subspace has its projection folded in by `routed_peft.checkpoint.to_stock_lora` first.

        >>> RoutedConfig(kind="lora", r=4, target_modules=["q_proj"]).to_lora().peft_type.value
        'LORA'
        """
        if self.kind != "lora":
            raise ValueError(f"only a region of kind 'lora' is a LoRA, got kind {self.kind!r}")
        assert self.r is not None and self.lora_alpha is not None
        return LoraConfig(
            r=self.r,
            lora_alpha=self.lora_alpha,  # type: ignore[arg-type]  # PEFT, too, divides it by r, whatever its type
            target_modules=self.target_modules,
            exclude_modules=self.exclude_modules,
            layers_to_transform=self.layers_to_transform,
            layers_pattern=self.layers_pattern,
            task_type=self.task_type,
            base_model_name_or_path=self.base_model_name_or_path,
            revision=self.revision,
            inference_mode=self.inference_mode,
        )


def _check_count(name: str, value: Any, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` must be a whole number of {what}, at least 1, got {value!r}")
