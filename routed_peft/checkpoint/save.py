"""Save a routed model so that plain transformers loads it without its regions."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, Unpack

from peft import LoraConfig, PeftConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from routed_peft.adapters import routing_record
from routed_peft.checkpoint.frozen_base import find_base
from routed_peft.checkpoint.layout import CONFIG, REGION, ROUTING, VERSION, WEIGHTS, foreign_weights
from routed_peft.checkpoint.staging import atomic_directory, files_in, inside, recover, sha256
from routed_peft.checkpoint.tensors import (
    adapter_configs,
    adapter_state_dict,
    check_own_weights,
    inner_model,
    plain_state_dict,
)
from routed_peft.deprecation import formerly_positional
from routed_peft.files import check_writable, read_json, write_json
from routed_peft.regions.fingerprint import fingerprint
from routed_peft.routes import Routes, check_region_name, routes_to_dict
from routed_peft.runs.provenance import versions


class SaveDetails(TypedDict, total=False):
    """Further arguments of `save_routed`.

    Attributes:
        tokens_per_route: label -> tokens seen in training, for the record.
        extra: more plain data for ``routing.json``.
        base_revision: commit of a frozen base on the Hub; by default the one in the local cache with the same weights.
    """

    tokens_per_route: Mapping[str, int] | None
    extra: Mapping[str, Any] | None
    base_revision: str | None


@formerly_positional("routes", "tokenizer", "train_base", "base_adapters")
def save_routed(
    model: nn.Module,
    path: str | Path,
    *,
    routes: Routes | None = None,
    tokenizer: Any = None,
    train_base: bool | None = None,
    base_adapters: Iterable[str] | None = None,
    kept_regions: Iterable[str] | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
    **details: Unpack[SaveDetails],
) -> Path:
    """Save a run: the base in ``path`` itself, each region in a folder of its own.

    With a trained base, ``AutoModelForCausalLM.from_pretrained(path)`` gives the ablated model. With a frozen base,
    ``routing.json`` names its location; a base that is in no checkpoint as it is in memory is saved too. Weights are
    safetensors. A kill at any moment leaves the earlier save or the new one, see `routed_peft.checkpoint.staging`. Files of
    an earlier save at ``path`` are replaced; all others (``checkpoint-…``, trainer state) stay.

    Args:
        model: a `PeftModel`, or a transformers model with adapters, none of them merged.
        path: directory.
        routes: label -> `Route`; by default those of the last `GradientRouting` on the model, or of `load_routed`.
        tokenizer: saved beside the model, if given.
        train_base: whether the model's own weights were trained. Default as for ``routes``, otherwise False.
        base_adapters: names of adapters that stay with the base; all others are regions. Default as for ``routes``.
        kept_regions: names of regions that belong to the model, as in an arm trained without routing: evaluation and
            attacks load them unless told otherwise. By default those of the run that the model was loaded from.
        state_dict: the model's full state dict, if it was gathered elsewhere (FSDP).
        **details: see `SaveDetails`.

    Returns:
        The resolved path.

    Raises:
        ValueError: see `check_can_save`.
        OSError: writing failed; ``path`` is as it was.

    >>> import tempfile
    >>> from peft import LoraConfig, get_peft_model
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=1,
    ...                      num_attention_heads=1, num_key_value_heads=1, bos_token_id=0, eos_token_id=1)
    >>> model = get_peft_model(LlamaForCausalLM(config), LoraConfig(target_modules=["q_proj"]), "forget")
    >>> with tempfile.TemporaryDirectory() as run:
    ...     saved = save_routed(model, run, train_base=True)
    ...     sorted(file.name for file in saved.iterdir())
    ['config.json', 'forget', 'generation_config.json', 'model.safetensors', 'routing.json']
    """
    if unknown := sorted(set(details) - set(SaveDetails.__annotations__)):
        raise TypeError(f"save_routed() got an unexpected keyword argument {unknown[0]!r}")
    path = Path(path).expanduser().resolve()
    inner, configs = inner_model(model), adapter_configs(model)
    routed = routing_record(model)
    routes = routed.routes if routes is None else routes
    train_base = routed.train_base if train_base is None else bool(train_base)
    base_adapters = list(routed.base_adapters if base_adapters is None else base_adapters)
    regions = [name for name in configs if name not in base_adapters]
    if kept_regions is None:  # the model may have been loaded without some of them
        kept_regions = [name for name in routed.kept_regions if name in regions]
    kept_regions = list(kept_regions)
    check_can_save(model, path, base_adapters=base_adapters, kept_regions=kept_regions, tokenizer=tokenizer)
    plain, print_ = plain_state_dict(model, state_dict), fingerprint(model)
    original, _ = find_base(inner, plain, revision=details.get("base_revision"), content=print_["content"])
    named = {"id": inner.name_or_path or None, "revision": details.get("base_revision")}
    base = {"id": None, "revision": None, "trained_from": named} if train_base or original["id"] is None else original
    tokens = details.get("tokens_per_route")
    record: dict[str, Any] = {
        "format": "routed_peft",
        "format_version": VERSION,
        "train_base": train_base,
        "model_class": [type(inner).__module__, type(inner).__name__],
        "base": {**base, "fingerprint": print_},
        "regions": regions,
        "kept_regions": kept_regions,
        "base_adapters": base_adapters,
        "routes": None if routes is None else routes_to_dict(routes),
        **(routed.scope or {}),
        "tokens_per_route": None if tokens is None else dict(tokens),
        "versions": versions(),
        "extra": dict(details.get("extra") or {}),
    }
    with atomic_directory(path, partial(_previous_files, path, configs)) as aside:
        if base["id"] is None:
            _save_base(inner, plain, aside)
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)
        for name, config in configs.items():
            tensors = adapter_state_dict(model, name, state_dict)
            _save_adapter(aside / name, config, tensors=tensors, record=record, run=str(path))
        record["files"] = {name: sha256(aside / name) for name in files_in(aside)}
        write_json(aside / ROUTING, record)
    return path


def check_can_save(
    model: nn.Module,
    path: str | Path,
    *,
    base_adapters: Iterable[str] = (),
    kept_regions: Iterable[str] = (),
    tokenizer: Any = None,
) -> None:
    """Refuse whatever `save_routed` would refuse: call it before training, so that no finished run is lost.

    Configurations and tokenizer are written into a temporary directory for trial.

    Raises:
        ValueError: the model has no adapter or merged ones, a base adapter or kept region is unknown, a name cannot be
            a region's, a configuration is invalid, or ``path`` holds files of others that would be mistaken for the base.
        OSError: ``path`` cannot be written.
    """
    path, base_adapters = Path(path).expanduser().resolve(), list(base_adapters)
    inner, configs = inner_model(model), adapter_configs(model)
    if not configs:
        raise ValueError("`model` has no adapter, so no region: give it one (`get_peft_model(model, RoutedConfig(…), "
                         "adapter_name=…)`), or save it with its own `save_pretrained`")  # fmt: skip
    if unknown := [name for name in base_adapters if name not in configs]:
        raise ValueError(f"`base_adapters` names {unknown[0]!r}; the adapters of `model` are {list(configs)}")
    for name in configs:
        check_region_name(name)
    check_kept_regions(kept_regions, [name for name in configs if name not in base_adapters])
    check_own_weights(inner)
    recover(path)
    _previous_files(path, configs)
    check_writable(path)
    with tempfile.TemporaryDirectory() as trial:
        inner.config.save_pretrained(trial)
        if inner.can_generate() and inner.generation_config is not None:
            inner.generation_config.save_pretrained(trial)
        if tokenizer is not None:
            tokenizer.save_pretrained(trial)


def check_kept_regions(kept: Iterable[str], regions: Iterable[str]) -> list[str]:
    """Return ``kept`` as a list; ValueError unless all of its names are regions."""
    kept, regions = list(kept), list(regions)
    if unknown := [name for name in kept if name not in regions]:
        raise ValueError(f"`kept_regions` names {unknown[0]!r}; the regions are {regions}")
    return kept


def _previous_files(path: Path, folders: Iterable[str]) -> list[str]:
    """Return the files of an earlier save at ``path``; ValueError if foreign files would pass for ours."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"`path` {path} is a file: name a directory")
    data = read_json(path / ROUTING) if (path / ROUTING).is_file() else {}
    ours = [*data.get("files", {}), *data.get("other_files", []), *([ROUTING] if data else [])]
    for name in ours:
        inside(path, name)
    strangers = foreign_weights(path) - set(ours)
    strangers |= {f"{name}/" for name in folders if (path / name).exists() and f"{name}/{REGION}" not in ours}
    if strangers:
        raise ValueError(f"`path` {path} holds {sorted(strangers)}, which `save_routed` did not write and which would "
                         "hide, or be hidden by, what it writes: save elsewhere, or move them")  # fmt: skip
    return ours


def _save_base(inner: PreTrainedModel, plain: dict[str, Tensor], folder: Path) -> None:
    wrapped = getattr(inner, "_hf_peft_config_loaded", False)
    inner._hf_peft_config_loaded = False  # a model with `add_adapter` would save its adapter alone
    try:  # of the class, since an attached routing makes the instance's own refuse
        type(inner).save_pretrained(inner, folder, state_dict=plain)
    finally:
        inner._hf_peft_config_loaded = wrapped


def _save_adapter(
    folder: Path, config: PeftConfig, *, tensors: dict[str, Tensor], record: Mapping[str, Any], run: str
) -> None:
    folder.mkdir()
    base, name = record["base"], folder.name
    config = copy.deepcopy(config)
    config.inference_mode = True
    config.base_model_name_or_path, config.revision = base["id"] or run, base["revision"]
    if isinstance(config, LoraConfig) and isinstance(config.init_lora_weights, str):
        config.init_lora_weights = True  # done once; loading must not do it again, since some change the base
    if hasattr(config, "base_fingerprint"):
        config.base_fingerprint = base["fingerprint"]
    # without a task type PEFT finds the model's class by these names
    mapping = {"base_model_class": record["model_class"][1], "parent_library": record["model_class"][0]}
    config.save_pretrained(str(folder), auto_mapping_dict=None if config.task_type else mapping)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    about = {
        "format_version": VERSION,
        "name": name,
        "role": "base adapter" if name in record["base_adapters"] else "region",
        "base": {"id": base["id"] or run, "revision": base["revision"]},
        "base_fingerprint": base["fingerprint"],
        **{key: record[key] for key in ("routes", "tokens_per_route", "versions")},
        "files": {name: sha256(folder / name) for name in (CONFIG, WEIGHTS)},
    }
    write_json(folder / REGION, about)
