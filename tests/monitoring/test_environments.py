from __future__ import annotations

import pytest
import torch
from datasets import ClassLabel, Dataset, IterableDataset
from monitor_parts import monitored, rows, trainer_of

from routed_peft.monitoring import (
    RegionMonitor,
)
from routed_peft.monitoring.environments import list_environments, rows_by_environment


@pytest.mark.slow
def test_environments_in_other_forms(tmp_path):
    data = rows(16)
    named = data.cast_column("route_environment", ClassLabel(names=["pattern", "noise"]))
    assert list_environments(named) == ["pattern", "noise"]
    assert list_environments(Dataset.from_dict({"route_environment": [0, 10, 2]}))[-1] == "10"
    results = []
    for dataset in (data, named):
        trainer, monitor = monitored(tmp_path, dataset=dataset, max_steps=2)
        trainer.train()
        results.append(monitor.contributions.total(["forget"]))
    assert results[0] == results[1]
    found = rows_by_environment(torch.tensor([1, 0, 1]), ["a", "b", "c"], size=3)
    assert {name: index.tolist() for name, index in found.items()} == {"a": [1], "b": [0, 2]}


@pytest.mark.slow
def test_bad_environments(tmp_path):
    trainer = trainer_of(tmp_path)
    RegionMonitor(trainer, environments=["noise", "patern"])
    with pytest.raises(
        ValueError, match=r"unknown environment 'pattern', got \['noise', 'patern'\]: did you mean 'patern'\?"
    ):
        trainer.train()
    with pytest.raises(ValueError, match=r"has the index 3, and there are 2 environments: \['a', 'b'\]"):
        rows_by_environment(torch.tensor([0, 3]), ["a", "b"], size=2)
    with pytest.raises(ValueError, match="`route_environment` is null in row 1"):
        list_environments(Dataset.from_dict({"route_environment": ["a", None]}))
    with pytest.raises(ValueError, match="names 3 rows, and the batch has 2"):
        rows_by_environment(["a"] * 3, ["a"], size=2)
    bare = rows().remove_columns("route_environment")
    with pytest.raises(ValueError, match="no column `route_environment`"):
        RegionMonitor(trainer_of(tmp_path, dataset=bare))
    with pytest.raises(ValueError, match="list their names"):
        RegionMonitor(trainer_of(tmp_path, dataset=IterableDataset.from_generator(lambda: iter(rows().to_list()))))
    trainer = trainer_of(tmp_path, dataset=bare)
    RegionMonitor(trainer, environments=["a"])
    with pytest.raises(ValueError, match="a training batch came without `route_environment`"):
        trainer.train()
    missing = Dataset.from_list(
        [{**row, "route_environment": None if i == 3 else "a"} for i, row in enumerate(rows(8))]
    )
    with pytest.raises(ValueError, match="missing or null in others"):
        trainer_of(tmp_path, dataset=missing).train()
