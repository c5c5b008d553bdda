"""Convert a region of ``kind="lora"`` to a stock LoRA, which PEFT loads without this library."""

from __future__ import annotations

from pathlib import Path

from peft import PeftConfig
from safetensors.torch import save_file

from routed_peft.checkpoint.layout import CONFIG, WEIGHTS
from routed_peft.checkpoint.staging import atomic_directory, check_free
from routed_peft.checkpoint.tensors import read_tensors
from routed_peft.regions import RoutedConfig
from routed_peft.regions.projections import project_off


def to_stock_lora(src: str | Path, out: str | Path) -> Path:
    """Write the region of ``kind="lora"`` in the adapter folder ``src`` as an adapter of PEFT's type LORA.

    The weights stay the same, unless the region is kept off a subspace: then ``lora_B`` is projected.

    Returns:
        ``out``, a directory that does not exist or is empty, resolved.

    Raises:
        ValueError: ``src``, such as ``run/retain``, holds no such region, or ``out`` is not free.

    >>> to_stock_lora("no-such-folder", "out")
    Traceback (most recent call last):
    ...
    ValueError: 'no-such-folder' is no adapter folder, since it has no adapter_config.json: give one such as run/retain
    """
    folder, target = Path(src).expanduser().resolve(), Path(out).expanduser().resolve()
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{str(src)!r} is no adapter folder, since it has no {CONFIG}: give one such as run/retain")
    check_free(target)
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, RoutedConfig):
        raise ValueError(f"{str(src)!r} holds an adapter of type {config.peft_type}, not one of RoutedConfig")
    stock, tensors = config.to_lora(), read_tensors(folder / WEIGHTS)
    for name in [name for name in tensors if name.endswith(".routed_U")]:
        u, b = tensors.pop(name), name.removesuffix("routed_U") + "lora_B.weight"
        tensors[b] = project_off(tensors[b].T, u).T.contiguous()
    with atomic_directory(target, fresh=True) as aside:
        stock.save_pretrained(str(aside))
        save_file(tensors, aside / WEIGHTS, metadata={"format": "pt"})
    return target
