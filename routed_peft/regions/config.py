"""`RoutedConfig`: the configuration of a region, as PEFT saves it in ``adapter_config.json``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, PeftConfig
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from routed_peft.architectures import MLP_TARGETS, WRITERS
from routed_peft.regions.peft_type import peft_type

INITS = ("zero", "model")
STRENGTHS = ("cut", "weights")


@dataclass(frozen=True)
class RegionKind:
    """A kind of region.

    Attributes:
        fields: those fields of `RoutedConfig` that belong to some kinds only and that this one has.
        targets: model type -> default `target_modules`; or a function of the model that returns names of modules.
        layer: a `RoutedLayer` class, called as ``layer(module, adapter_name, config=config, model=model)``, whose
            parameters begin with ``routed_``. None for the kinds that are built in.
        check: ``check(name, module)`` raises ValueError where a target cannot hold the region.
        check_together: ``check_together(model, targets)`` likewise, for all targets by name.
    """

    fields: tuple[str, ...]
    targets: Mapping[str, Sequence[str]] | Callable[[nn.Module], Sequence[str]]
    layer: Callable[..., nn.Module] | None = None
    check: Callable[[str, nn.Module], None] | None = None
    check_together: Callable[[nn.Module, Mapping[str, nn.Module]], None] | None = None


PARTS = {"size": "mlp", "heads": "heads", "r": "lora", "embeddings": "embeddings", "norms": "norms"}
"""Fields that each give a region a part, and the kind of a region that is this part alone."""

WHOLE = "whole"
"""Kind of a region of several parts."""

KINDS = {
    "mlp": RegionKind(("size", "init"), MLP_TARGETS),
    "lora": RegionKind(
        ("r", "lora_alpha", "subspace", "provenance"), TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    ),
    "subspace": RegionKind(("subspace", "provenance", "strength", "store_base_part"), WRITERS),
    WHOLE: RegionKind((*PARTS, "init", "lora_alpha"), {}),
}
"""Kinds of region by name; `register_region_kind` adds to them, the kinds of the other parts among them."""


def register_region_kind(name: str, kind: RegionKind) -> None:
    """Add a kind of region, which ``RoutedConfig(kind=name)`` then selects.

    Raises:
        ValueError: where the name is taken, or the kind has no layer.
    """
    if name in KINDS or kind.layer is None:
        raise ValueError(f"a kind of region needs a `layer` and a new name, got {name!r} beside {sorted(KINDS)}")
    KINDS[name] = kind


@dataclass
class RoutedConfig(PeftConfig):
    """Configuration of a region.

    A *whole* region has a part in every place where a base learns: give any of `size`, `heads`, `r`, `embeddings` and `norms`.
    With none of them it has hidden units, low-rank attention and rows of the token table, in a share of the base's size.

    Attributes:
        kind: by default what the other fields say. ``"whole"``: several parts. ``"mlp"``: `size` extra hidden units beside
            every targeted MLP. ``"heads"``: `heads` beside every attention. ``"lora"``: a low-rank update of every targeted
            linear layer, the same as plain `peft.LoraConfig`; unlike that, it mixes with the other kinds in one model.
            ``"embeddings"`` and ``"norms"``: rows of the token table, gains of the norms. ``"subspace"``: an update of the
            residual writers within a few directions of the residual stream; meanwhile the base cannot learn along these.
        size: hidden units per targeted MLP.
        heads: key-value heads beside every attention, each with as many query heads as the base's have.
        r: rank; 8 by default for kind ``"lora"``, as in `peft.LoraConfig`.
        lora_alpha: the update is multiplied by ``lora_alpha / r``; 8 by default, or `r` in a whole region.
        embeddings: rows of the input embedding and of the output head: ``"full"``, all; a number, all with an update of that
            rank; a list of token ids, those alone.
        norms: whether the region has gains of its own in every normalization layer.
        subspace: path of a file written by `routed_peft.subspaces.Subspace.save`. ``"subspace"``: the directions of the
            region. ``"lora"``: directions that it stays off at the residual writers, by a projection of its output, as a
            ``retain`` LoRA beside a region of kind ``"subspace"`` should. The path is needed once, because the region's own
            files hold the basis.
        strength: ``"subspace"`` only. ``"cut"`` (default): the gradient loses its component along the basis at the output of
            every residual writer and embedding, so no part of the base learns to move along it. ``"weights"``: only the
            writers' own weight gradients lose it. This is *weak*, because other layers learn it instead; it serves as a
            comparison.
        store_base_part: ``"subspace"`` only. Whether the file holds the base's component along the basis (as many numbers as
            the region has), to which `project_base` restores a trained base. None: yes, unless the base is quantized.
        provenance: source, shape (``k``, ``width``) and hash of the basis, written here when the region is made. A region
            has a basis exactly where this is set.
        target_modules: ends of module names, or one regular expression. By default those of the model's type: its MLPs, PEFT's
            own defaults for ``"lora"``, all residual writers for ``"subspace"``. ``"lora"`` also takes ``"all-linear"``. In a
            whole region they are the linear layers of `r`, by default all outside the MLPs that `size` widens.
        exclude_modules: ends of module names, or one regular expression, to leave out of `target_modules`; in a whole region
            of those of `r`.
        layers_to_transform: indices of the layers that the region is in; all by default.
        layers_pattern: name of the list of layers, where PEFT cannot find it for `layers_to_transform`.
        init: initialization of hidden units and heads. ``"zero"``: their output weights are zero, which preserves the
            model's function. ``"model"``: the model's own initialization. None becomes ``"zero"`` on a base loaded from a
            checkpoint and ``"model"`` on one made from scratch; the choice is written back here.
        base_fingerprint: `routed_peft.regions.fingerprint.fingerprint` of the base that the region was trained on, written
            when the region is saved. Attaching the region to any other base raises ValueError.

    Raises:
        ValueError: on an unknown `kind` or `init`, a number below one, a field that the kind does not have, or kind
            ``"subspace"`` without directions.

    Example:
        >>> RoutedConfig(size=64, task_type="CAUSAL_LM").peft_type.value
        'ROUTED'
        >>> RoutedConfig(kind="lora").r, RoutedConfig(size=64, r=16, embeddings="full").kind
        (8, 'whole')
        >>> RoutedConfig(kind="lora", size=64)
        Traceback (most recent call last):
        ...
        ValueError: `size` belongs to kind 'mlp', got `size` = 64 with kind 'lora'
    """

    kind: str | None = None
    size: int | None = None
    heads: int | None = None
    r: int | None = None
    lora_alpha: float | None = None
    embeddings: str | int | list[int] | None = None
    norms: bool | None = None
    subspace: str | None = None
    strength: str | None = None
    store_base_part: bool | None = None
    provenance: dict[str, Any] | None = None
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    init: str | None = None
    base_fingerprint: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type()
        self.norms = self.norms or None
        if self.kind is None:
            own = [PARTS[name] for name in self.given_parts()]
            self.kind = own[0] if len(own) == 1 else WHOLE
        if self.kind not in KINDS:
            raise ValueError(f"`kind` must be one of {', '.join(map(repr, KINDS))}, got {self.kind!r}")
        self._check_kind()
        self._check_targets()

    def given_parts(self) -> list[str]:
        """Return the fields among `PARTS` that are set."""
        return [name for name in PARTS if getattr(self, name) is not None]

    def part(self, name: str, **changes: Any) -> RoutedConfig:
        """Return the configuration of one part of a whole region: that of a region that is this part alone.

        >>> RoutedConfig(size=8, r=4).part("r", target_modules=["q_proj"]).kind
        'lora'
        """
        kind = KINDS[PARTS[name]]
        own = {field: getattr(self, field) for field in kind.fields if getattr(self, field) is not None}
        fields = {"embeddings": (), "r": ("layers_to_transform", "layers_pattern", "exclude_modules")}
        inside = {field: getattr(self, field) for field in fields.get(name, ("layers_to_transform", "layers_pattern"))}
        shared = {"task_type": self.task_type, "inference_mode": self.inference_mode}
        return RoutedConfig(**{"kind": PARTS[name], **inside, **shared, **own, **changes})

    def _check_kind(self) -> None:
        special = dict.fromkeys(name for kind in KINDS.values() for name in kind.fields)
        for name in special:
            if name not in KINDS[str(self.kind)].fields and getattr(self, name) is not None:
                kind = " or ".join(repr(other) for other in KINDS if name in KINDS[other].fields and other != WHOLE)
                raise ValueError(f"`{name}` belongs to kind {kind}, got `{name}` = {getattr(self, name)!r} with kind "
                                 f"{self.kind!r}")  # fmt: skip
        if self.kind == "lora":
            self.r = 8 if self.r is None else self.r
            self.lora_alpha = 8 if self.lora_alpha is None else self.lora_alpha
        if self.kind == "embeddings" and self.embeddings is None:
            self.embeddings = "full"
        if self.kind == "norms":
            self.norms = True if self.norms is None else self.norms
        self._check_parts()
        if self.kind == "subspace":
            self.strength = "cut" if self.strength is None else self.strength
            if self.strength not in STRENGTHS:
                raise ValueError(f"`strength` must be one of {', '.join(map(repr, STRENGTHS))}, got {self.strength!r}")
            if self.subspace is None and self.provenance is None:
                raise ValueError("a region of kind 'subspace' needs `subspace`, the path of a file of directions: make "
                                 "one with `routed_peft.subspaces` and `Subspace.save`")  # fmt: skip

    def _check_parts(self) -> None:
        for name, what in (("size", "hidden units"), ("heads", "key-value heads"), ("r", "ranks")):
            if getattr(self, name) is not None or self.kind == PARTS[name]:
                _check_count(name, getattr(self, name), what)
        if self.init is not None and self.init not in INITS:
            raise ValueError(f"`init` must be one of {', '.join(map(repr, INITS))} or None, got {self.init!r}")
        alpha, rows = self.lora_alpha, self.embeddings
        if alpha is not None and (isinstance(alpha, bool) or not isinstance(alpha, int | float)):
            raise ValueError(f"`lora_alpha` must be a number, got {alpha!r}")
        if self.norms not in (None, True):
            raise ValueError(f"`norms` is true or false, got {self.norms!r}")
        tokens = rows if isinstance(rows, list | tuple) else [rows] if isinstance(rows, int) else []
        if rows is not None and rows != "full" and not (
            tokens and all(type(token) is int and token >= 0 for token in tokens) and rows != 0
        ):  # fmt: skip
            raise ValueError(f'`embeddings` is "full", a rank, or a list of token ids, got {rows!r}')
        if isinstance(rows, list | tuple):
            self.embeddings = sorted(set(rows))

    def _check_targets(self) -> None:
        self.exclude_modules = self.exclude_modules or None
        for name in ("target_modules", "exclude_modules"):
            self._check_names(name)
        indices = [self.layers_to_transform] if isinstance(self.layers_to_transform, int) else self.layers_to_transform
        if indices is not None and not all(isinstance(i, int) and i >= 0 for i in indices):
            raise ValueError(f"`layers_to_transform` holds layer indices from 0 on, got {self.layers_to_transform!r}")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("`layers_to_transform` needs `target_modules` as a list of names, got a regular "
                             "expression")  # fmt: skip
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("`layers_pattern` works only together with `layers_to_transform`: give both")

    def _check_names(self, name: str) -> None:
        value = getattr(self, name)
        if value is None or (isinstance(value, str) and value):
            return
        if isinstance(value, str) or not value or not all(isinstance(item, str) and item for item in value):
            raise ValueError(f"`{name}` must be a list of module names or one regular expression, got {value!r}")
        setattr(self, name, sorted(value))  # a list, for JSON, in an order that does not depend on hashing

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, without the path of a subspace file once the region holds the basis."""
        data = super().to_dict()
        return data if self.provenance is None else {**data, "subspace": None}

    def to_lora(self) -> LoraConfig:
        """Return the stock configuration under which PEFT alone loads the files of this region, of kind ``"lora"``.

        For a region that stays off a subspace, `routed_peft.checkpoint.to_stock_lora` folds in the projection first.

        >>> RoutedConfig(kind="lora", r=4, target_modules=["q_proj"]).to_lora().peft_type.value
        'LORA'
        """
        if self.kind != "lora":
            raise ValueError(f"only a region of kind 'lora' can become a stock LoRA, got kind {self.kind!r}")
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
