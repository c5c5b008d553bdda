"""`OpenRun`: one fetch and one verification per run, however much is done with it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from checkpoint_parts import wrapped

from routed_peft.checkpoint import layout, open_run, save_routed
from routed_peft.checkpoint.export import export
from routed_peft.checkpoint.open_run import OpenRun


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return save_routed(wrapped("mlp"), tmp_path / "run", train_base=True)


def test_a_directory(run: Path) -> None:
    opened = OpenRun.from_source(run)
    assert (opened.layout.root, opened.commit, opened.hub) == (run, None, {})
    assert opened.adapter_folder("forget") == opened.configuration_folder("forget") == run / "forget"
    (run / "forget/adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="truncated or was tampered with"):
        opened.adapter_folder("forget")
    with pytest.raises(ValueError, match="lacks the folder 'gone' of the region of that name"):
        opened.adapter_folder("gone")


def test_an_export_opens_and_verifies_its_source_once(run: Path, tmp_path: Path, monkeypatch) -> None:
    fetched: list[Any] = []
    hashed: Counter[str] = Counter()
    fetch, sha256 = open_run.fetch, layout.sha256

    def counted_fetch(*args: Any, **kwargs: Any) -> Any:
        fetched.append(args)
        return fetch(*args, **kwargs)

    def counted_sha256(path: Path) -> str:
        hashed[path.relative_to(run).as_posix()] += 1
        return sha256(path)

    monkeypatch.setattr(open_run, "fetch", counted_fetch)
    monkeypatch.setattr(layout, "sha256", counted_sha256)
    export(run, tmp_path / "out", keep=["bio"])
    assert len(fetched) == 1 and hashed["model.safetensors"] == 1
