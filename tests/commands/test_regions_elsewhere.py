"""A run whose regions are in a place of their own: every command reads them there, and the ablated model without them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_parts import logits
from cli_parts import call
from evaluation_parts import write_jsonl
from huggingface_hub import constants
from transformers import AutoModelForCausalLM

from routed_peft import ablate, export, load_routed

PLACES = ("option", "named", "hub")


@pytest.fixture(params=PLACES)
def split(request: pytest.FixtureRequest, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The run without its regions, how to name their place, and that place."""
    if request.param == "hub":  # two repositories, both in the cache
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        folders = [tmp_path / "hub" / f"models--org--{name}" for name in ("run", "regions")]
        for folder, commit in zip(folders, ("a" * 40, "b" * 40), strict=True):
            (folder / "refs").mkdir(parents=True)
            (folder / "refs" / "main").write_text(commit)
        base, regions = folders[0] / "snapshots" / ("a" * 40), folders[1] / "snapshots" / ("b" * 40)
        src, named = "org/run", "org/regions"
    else:
        base, regions = tmp_path / "run", tmp_path / "regions"
        src, named = str(base), str(regions)
    shutil.copytree(run, base)
    for name in ("forget", "bio"):
        shutil.move(base / name, regions / name)
    if request.param != "option":
        data = json.loads((base / "routing.json").read_text())
        (base / "routing.json").write_text(json.dumps({**data, "regions_repo": named}))
    return src, ["--regions-repo", named] if request.param == "option" else [], regions


def keywords(options: list[str]) -> dict[str, Any]:
    return {"regions_repo": options[1]} if options else {}


def test_load_export_and_ablate(run: Path, split: Any, tmp_path: Path) -> None:
    src, options, regions = split
    assert torch.equal(logits(load_routed(src, ["bio"], **keywords(options))), logits(load_routed(run, ["bio"])))
    kept = [
        export(place, tmp_path / f"kept{i}", keep=["bio"], **more)
        for i, (place, more) in enumerate([(src, keywords(options)), (str(run), {})])
    ]
    result = call("ablate", src, tmp_path / "kept2", "--keep", "bio", *options)
    assert result.exit_code == 0, result.output
    whole = logits(AutoModelForCausalLM.from_pretrained(kept[1]))
    for place in (kept[0], tmp_path / "kept2"):
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(place)), whole)
    shutil.rmtree(regions)  # the ablated model needs none of them
    plain = AutoModelForCausalLM.from_pretrained(ablate(src, tmp_path / "out"))
    assert torch.equal(logits(plain), logits(load_routed(run)))
    assert call("ablate", src, tmp_path / "again").exit_code == 0
    missing = call("ablate", src, tmp_path / "lost", "--keep", "bio", *options)
    assert missing.exit_code == 1 and "'bio'" in missing.stderr and len(missing.stderr.strip().splitlines()) == 1


def test_evaluate(run: Path, split: Any, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    src, options, regions = split
    text = write_jsonl(tmp_path / "forget.jsonl", [{"text": "cell wall"}, {"text": "a gene"}])
    task = ["--tasks", "routed_forget_loss", "--forget-file", text]

    def scores(src: object, *more: object) -> dict[str, Any]:
        result = call("evaluate", src, *task, "--out", tmp_path / "out.json", *more)
        assert result.exit_code == 0, result.output
        return json.loads((tmp_path / "out.json").read_text())["results"]

    whole = scores(run)
    assert set(whole) == {"all regions", "ablated", "only forget", "only bio"}
    assert scores(src, *options) == whole
    asked = scores(src, "--regions", "bio", *options)
    assert asked["bio"] == whole["only bio"]
    shutil.rmtree(regions)
    alone = scores(src)
    assert list(alone.values()) == [whole["ablated"]]


@pytest.mark.slow
def test_relearn(run: Path, split: Any, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    src, options, _ = split
    text = [
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name} of cell wall {i}"} for i in range(4)])
        for name in "abc"
    ]
    files = ["--forget-train", text[0], "--forget-test", text[1], "--retain-test", text[2], "--seeds", 1, "--steps", "0,1",
             "--learning-rate", "1e-3", "--extensions", 0, "--length", 16, "--regions", "bio"]  # fmt: skip
    found = []
    for place, more in ((run, []), (src, options)):
        out = tmp_path / f"attacked{len(found)}"
        result = call("relearn", place, *files, "--out", out, *more)
        assert result.exit_code == 0, result.output
        found.append([json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()])
    losses = [[point.get("loss", point.get("forget_loss")) for point in points] for points in found]
    assert losses[0] == losses[1] and losses[0]


def test_lm_eval(run: Path, split: Any, loaded: Callable[..., Any]) -> None:
    src, options, _ = split
    for names in ("bio", "all", "none"):
        own = loaded(pretrained=src, regions=names, **keywords(options))
        assert torch.equal(logits(own), logits(loaded(pretrained=str(run), regions=names)))


@pytest.fixture
def loaded() -> Callable[..., Any]:
    """Return the model that lm-eval's `--model routed` measures."""
    pytest.importorskip("lm_eval")
    from routed_peft.lm_eval import RoutedLM

    return lambda **arguments: RoutedLM(**arguments, device="cpu").model
