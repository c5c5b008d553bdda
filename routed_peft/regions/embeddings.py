r"""``kind="embeddings"``: rows of the token table that belong to a region, in the input embedding and in the output head.

A region adds :math:`\Delta` to the table :math:`E`, either full, of low rank, or for some tokens only. Where the model ties
its two tables, a full update serves both, so that the merged model stays tied; one of low rank has factors for each, and the
merged model is untied.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from transformers import PreTrainedModel

from routed_peft.architectures import is_plain
from routed_peft.regions.config import RegionKind, RoutedConfig, register_region_kind
from routed_peft.regions.layer import RoutedLayer


class RoutedTable(nn.Module, RoutedLayer):
    r"""An input embedding or an output head, and the rows that regions add to its table.

    .. math:: y = E_x + \sum_r \Delta^r_x \quad\text{(input)}, \qquad y = E h + \sum_r \Delta^r h \quad\text{(head)}

    summed over the active regions ``r``, with :math:`\Delta = B A` where a rank was asked for. The sum starts at zero.

    Args:
        base_layer: an ``nn.Embedding`` that looks rows up (and may scale them), or an ``nn.Linear`` head.
        adapter_name: name of the first region.
        config: its configuration; `embeddings` is ``"full"``, a rank, or token ids.
        model: the model that the layer belongs to.
    """

    adapter_layer_names: tuple[str, ...] = ("routed_factor", "routed_rows")
    other_param_names: tuple[str, ...] = ()
    region_outlets: ClassVar[tuple[str, ...]] = ("routed_rows",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, *, config: RoutedConfig, model: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.is_input = isinstance(base_layer, nn.Embedding)
        self.routed_factor, self.routed_rows = nn.ModuleDict(), nn.ModuleDict()
        self.tokens: dict[str, Tensor] = {}
        self._placed: dict[str, Tensor] = {}
        self.merged_adapters: list[str] = []
        self._unmerged: Tensor | None = None
        self._tied: nn.Parameter | None = None  # the table that both ends shared before `untie`
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, model=model)
        self.train(base_layer.training)

    def update_layer(self, adapter_name: str, config: RoutedConfig, *, model: nn.Module) -> None:
        """Add the region ``adapter_name``, on the device of the table; its contribution starts at zero."""
        assert adapter_name not in self.routed_rows
        size, width = self.weight.shape
        asked = config.embeddings
        if isinstance(asked, int):
            factor = nn.Embedding(size, asked) if self.is_input else nn.Linear(width, asked, bias=False)
            rows = nn.Linear(asked, width if self.is_input else size, bias=False)
            nn.init.zeros_(
                factor.weight if self.is_input else rows.weight
            )  # one factor, so that the other learns at once
            self.routed_factor[adapter_name], self.routed_rows[adapter_name] = factor, rows
        else:
            count = size if isinstance(asked, str) else len(asked or ())
            table: nn.Module = nn.Embedding(count, width) if self.is_input else nn.Linear(width, count, bias=False)
            nn.init.zeros_(table.weight)  # type: ignore[arg-type]
            self.routed_rows[adapter_name] = table
            if not isinstance(asked, str):
                self.tokens[adapter_name] = torch.tensor(asked)
                self._placed.pop(adapter_name, None)  # of a region of this name that was deleted
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output plus the contributions of the active regions; ``x`` is ``(B, T)`` or ``(B, T, H)``."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        result: Tensor = self.base_layer(x, *args, **kwargs)
        for name in [] if self.disable_adapters else self.active_adapters:
            if name in self.routed_rows and name not in self.merged_adapters:
                result = self._looked_up(result, name, x) if self.is_input else self._scored(result, name, x)
        return result

    def _looked_up(self, result: Tensor, name: str, ids: Tensor) -> Tensor:
        if name not in self.tokens:
            rows = self.routed_factor[name](ids) if name in self.routed_factor else ids
            update = self.routed_rows[name](rows)
        else:
            place = self._places(name, ids.device)[ids]
            update = self.routed_rows[name](place.clamp(min=0)) * (place >= 0).unsqueeze(-1)
        return result + (update * self._scale()).to(result.dtype)

    def _places(self, name: str, device: torch.device) -> Tensor:
        """Return ``(V,)``: the row of each token among a region's, or -1; made once for a device."""
        places = self._placed.get(name)
        if places is None or places.device != device:
            tokens = self.tokens[name].to(device)
            places = torch.full((len(self.weight),), -1, device=device)
            places[tokens] = torch.arange(len(tokens), device=device)
            self._placed[name] = places
        return places

    def _scored(self, result: Tensor, name: str, hidden: Tensor) -> Tensor:
        hidden = self._cast_input_dtype(hidden, self._linear("routed_rows", name).weight.dtype)
        if name in self.routed_factor:
            hidden = self.routed_factor[name](hidden)
        update = self.routed_rows[name](hidden).to(result.dtype)
        tokens = self.tokens.get(name)
        return result + update if tokens is None else result.index_add(-1, tokens.to(result.device), update)

    def _scale(self) -> Any:
        return getattr(self.base_layer, "embed_scale", 1.0)  # Gemma's embeddings multiply what they look up

    def check_mergeable(self) -> None:
        """Raise ValueError where the table is quantized."""
        if not is_plain(self.weight):
            raise ValueError(f"rows of regions cannot be merged into {type(self.base_layer).__name__}, whose weights "
                             "are quantized or wrapped. Load the base unquantized (float32 or bfloat16), or keep the "
                             "region as an adapter.")  # fmt: skip

    @torch.no_grad()
    def get_delta_weight(self, name: str) -> Tensor:
        """Return the update ``(V, H)`` of the table by the region ``name``."""
        rows = self._linear("routed_rows", name).weight
        if name in self.routed_factor:
            factor = self._linear("routed_factor", name).weight
            return factor @ rows.T if self.is_input else rows @ factor
        if (tokens := self.tokens.get(name)) is not None:
            return torch.zeros_like(self.weight, dtype=rows.dtype).index_add(0, tokens.to(rows.device), rows)
        return rows.detach()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the rows of regions to the table; a shared table gets those of its input alone.

        Args:
            safe_merge: raise ValueError on rows that are not finite.
            adapter_names: which regions; the active ones by default.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.routed_rows:
                continue
            self.check_mergeable()
            if not (self.shares_table and isinstance(self.routed_rows[name], SharedRows)):
                update = self.get_delta_weight(name)
                if safe_merge and not update.isfinite().all():
                    raise ValueError(f"the weights of the region {name!r} are not all finite: it was not merged")
                if self._unmerged is None:
                    self._unmerged = self.weight.data.clone()  # subtracting the update would leave rounding errors
                self.weight.data += update
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Remove the rows of all merged regions; the table is restored bit for bit, and tied again."""
        if self._tied is not None:
            self.base_layer.weight, self._tied = self._tied, None
        elif self._unmerged is not None:
            self.weight.data.copy_(self._unmerged)
        self._unmerged = None
        self.merged_adapters.clear()

    @property
    def shares_table(self) -> bool:
        """Whether this head's table is that of the input, as at the time of attaching."""
        shared: nn.Module | None = self.__dict__.get("_input")
        return shared is not None and shared.weight is self.weight

    def share(self, table: RoutedTable, name: str) -> None:
        """Let this head use the rows of the region ``name`` in the input ``table``."""
        self.__dict__["_input"] = table  # not as a submodule
        self.routed_rows[name] = SharedRows(cast(nn.Parameter, table._linear("routed_rows", name).weight))

    def untie(self) -> None:
        """Give this head a copy of the table, until `unmerge`."""
        if self._tied is None:
            self._tied = self.base_layer.weight  # type: ignore[assignment]
            self.base_layer.weight = nn.Parameter(self.weight.data.clone(), self.weight.requires_grad)

    def __repr__(self) -> str:
        return "routed." + super().__repr__()


class SharedRows(nn.Linear):
    """Rows of a tied head: the input's own parameter, which the state dict holds once, at the input."""

    def __init__(self, weight: nn.Parameter) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.register_parameter("bias", None)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Save nothing."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Load nothing."""


def table_names(model: nn.Module) -> list[str]:
    """Return the names of a model's input embedding and output head; empty for other modules than transformers models."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()] if isinstance(model, PreTrainedModel) else []
    return [name for name, module in model.named_modules() if any(module is end for end in ends)]


def check_table(name: str, module: nn.Module) -> None:
    """Raise ValueError where ``module`` is no embedding or head whose table a region's rows could be added to."""
    if isinstance(module, nn.Linear):
        return
    if not isinstance(module, nn.Embedding) or module.max_norm is not None:
        raise ValueError(f"`embeddings` needs an nn.Embedding without `max_norm` and an nn.Linear head, got {name!r}, "
                         f"a {type(module).__name__}: leave `embeddings` out")  # fmt: skip
    ids = torch.arange(min(2, module.num_embeddings), device=module.weight.device)
    looked_up = module.weight[ids] * getattr(module, "embed_scale", 1.0)
    if not torch.equal(module(ids.unsqueeze(0))[0], looked_up.to(module.weight.dtype)):
        raise ValueError(f"{name!r} ({type(module).__name__}) does more than look up rows, so rows of a region cannot "
                         "be merged into it: leave `embeddings` out")  # fmt: skip


def share_tables(model: nn.Module, region: str) -> None:
    """Let both ends of a model with tied tables share the rows of ``region``, unless these are of low rank."""
    ends = [module for module in model.modules() if isinstance(module, RoutedTable) and region in module.routed_rows]
    for table in (end for end in ends if end.is_input):
        for head in (end for end in ends if not end.is_input and end.weight is table.weight):
            if region not in head.routed_factor:
                head.share(table, region)


def untie_tables(model: nn.Module, regions: list[str]) -> bool:
    """Untie the tables of ``model`` where a region to be merged has different updates for them; return whether any was.

    It comes before the first region is merged.
    """
    ends = [module for module in model.modules() if isinstance(module, RoutedTable)]
    inputs = [end.weight for end in ends if end.is_input]
    apart = [
        end
        for end in ends
        if not end.is_input
        and any(end.weight is weight for weight in inputs)
        and any(name in end.routed_rows and not isinstance(end.routed_rows[name], SharedRows) for name in regions)
    ]
    for end in apart:
        end.untie()
    return bool(apart)


register_region_kind("embeddings", RegionKind(("embeddings",), table_names, layer=RoutedTable, check=check_table))
