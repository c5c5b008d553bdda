"""One of two processes: a base sharded by FSDP2 is put back along a subspace as an unsharded one is."""

import os
import sys
import warnings
from pathlib import Path

import torch
from families import tiny
from subspace_parts import X, subspace_file, subspace_layers, with_subspace
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard

from routed_peft.regions import project_base
from routed_peft.regions.linear import LowRankLinear
from routed_peft.subspaces import leak

warnings.simplefilter("ignore")


def train(model: nn.Module) -> nn.Module:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=X, labels=X).loss.backward()
        optimizer.step()
        assert project_base(model) == len(subspace_layers(model))
    return model


def main(folder: Path) -> None:
    distributed.init_process_group("gloo")
    path = str(folder / f"rank{os.environ['RANK']}")
    path = subspace_file(Path(path))

    def fresh() -> nn.Module:
        model = with_subspace(tiny("llama"), path).train()
        for p in model.parameters():
            p.requires_grad_(True)
        return model

    start, plain, sharded = fresh(), train(fresh()), fresh()
    for layer in sharded.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(sharded)
    train(sharded)
    expected = dict(plain.named_parameters())
    for name, p in sharded.named_parameters():
        torch.testing.assert_close(p.full_tensor(), expected[name], rtol=0, atol=1e-5, msg=name)
    before = dict(start.named_parameters())
    for name, module in plain.named_modules():
        if isinstance(module, LowRankLinear):
            key = f"{name}.base_layer.weight"
            weight = dict(sharded.named_parameters())[key].full_tensor()
            assert leak(weight, before[key], module.routed_U["persona"]) < 1e-10
    if not distributed.get_rank():
        (folder / "done").touch()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
