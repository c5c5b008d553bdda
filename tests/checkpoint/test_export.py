"""`ablate` and `export`: plain checkpoints of runs."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_parts import FAMILIES, frozen, logits, lora, without, wrapped
from families import tiny
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from routed_peft.ablation import ablated
from routed_peft.checkpoint import export as exporting
from routed_peft.checkpoint import inspect_checkpoint, load_routed, save_routed
from routed_peft.checkpoint.export import ablate, export


@pytest.mark.parametrize("kind", ["mlp", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_ablate_is_exact_and_leaves_no_number_of_a_region(kind: str, family: str, tmp_path: Path) -> None:
    model = wrapped(kind, family)
    save_routed(model, tmp_path / "run", train_base=True)
    out = ablate(tmp_path / "run", tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(logits(plain), without(model, "forget", "bio"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]
    content = b"".join(path.read_bytes() for path in out.iterdir())
    for name, parameter in model.named_parameters():
        if ".forget." in name or ".bio." in name:
            assert parameter.detach().numpy().tobytes()[:16] not in content, name
    record = json.loads((out / "ablation.json").read_text())
    assert record["max_logit_difference"] == 0.0 and record["regions_removed"] == ["forget", "bio"]
    assert record["fingerprint"] == record["source_base_fingerprint"]
    assert set(record["sha256"]) == {path.name for path in out.iterdir()} - {"ablation.json"}


@pytest.mark.parametrize("kind", ["mlp", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_export_merges_the_regions_kept(kind: str, family: str, tmp_path: Path) -> None:
    model = wrapped(kind, family)
    save_routed(model, tmp_path / "run", train_base=True)
    out = export(tmp_path / "run", tmp_path / "out", keep=["bio"])
    plain = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(logits(plain), without(model, "forget"), rtol=0, atol=1e-5)
    widths = [model.config.get_text_config().to_dict().get(key) for key in ("intermediate_size", "n_inner")]
    assert (widths != [plain.config.to_dict().get(key) for key in ("intermediate_size", "n_inner")]) == (kind == "mlp")
    forget = model.state_dict()[next(name for name in model.state_dict() if ".forget." in name)]
    assert forget.numpy().tobytes()[:16] not in b"".join(path.read_bytes() for path in out.iterdir())


@pytest.mark.parametrize("kind", ["mlp", "lora"])
def test_export_of_a_part_of_a_region(kind: str, tmp_path: Path) -> None:
    model = wrapped(kind)
    save_routed(model, tmp_path / "run", train_base=True)
    out = export(tmp_path / "run", tmp_path / "out", keep=["bio"], scale=0.3)
    with ablated(model, "bio", scale=0.3):
        expected = without(model, "forget")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(out)), expected, rtol=0, atol=1e-5)
    assert (expected - without(model, "forget")).abs().max() > 1e-3
    assert json.loads((out / "ablation.json").read_text())["scale"] == 0.3
    with pytest.raises(ValueError, match="`scale` is 0.3, but no region is kept that it could scale"):
        export(tmp_path / "run", tmp_path / "no", scale=0.3)


def test_inspection_of_an_export_finds_what_was_altered_and_what_is_gone(tmp_path: Path) -> None:
    save_routed(wrapped("mlp"), tmp_path / "run", train_base=True)
    out = ablate(tmp_path / "run", tmp_path / "out")
    assert inspect_checkpoint(out)["problems"] == []
    weights = out / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert "model.safetensors in" in inspect_checkpoint(out)["problems"][0]
    weights.unlink()
    assert "lacks the file model.safetensors" in inspect_checkpoint(out)["problems"][0]


def test_base_adapters_are_merged_over_a_frozen_base(tmp_path: Path) -> None:
    base = tiny("llama")
    base.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "LICENSE").write_text("free")
    (tmp_path / "base" / "tokenizer_config.json").write_text("{}")
    (tmp_path / "base" / "training_args.bin").write_bytes(b"pickle")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, lora(), "retain")
    model.add_adapter("forget", lora())
    model.base_model.set_adapter(["retain", "forget"])
    save_routed(model.eval(), tmp_path / "run", base_adapters=["retain"])
    out = ablate(tmp_path / "run", tmp_path / "out")
    difference = (logits(AutoModelForCausalLM.from_pretrained(out)) - without(model, "forget")).abs().max()
    record = json.loads((out / "ablation.json").read_text())
    assert difference <= 1e-5 and record["base_adapters_merged"] == ["retain"]
    assert record["fingerprint"] != record["source_base_fingerprint"]
    companions = {"LICENSE", "tokenizer_config.json"}
    weights = {"config.json", "generation_config.json", "model.safetensors", "ablation.json"}
    assert {path.name for path in out.iterdir()} == companions | weights


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.filterwarnings("ignore:the base is quantized, in float16")
def test_the_dtype_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    model = wrapped("mlp", names=("forget",), dtype=dtype)
    save_routed(model, tmp_path / "run", train_base=True)
    for name, keep in (("ablated", []), ("kept", ["forget"])):
        out = export(tmp_path / "run", tmp_path / name, keep=keep)
        assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {dtype}
        assert json.loads((out / "ablation.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return save_routed(wrapped("mlp", names=("forget",)), tmp_path / "run", train_base=True)


def test_where_out_may_be(run: Path, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("keep me")
    for out, message in (
        (run, "source itself"),
        (run / "out", "inside the source"),
        (full, "not an empty"),
        (full / "mine.txt", "not an empty"),
    ):
        with pytest.raises(ValueError, match=message):
            ablate(run, out)
    assert (full / "mine.txt").read_text() == "keep me" and not (run / "out").exists()
    (tmp_path / "empty").mkdir()
    assert (ablate(run, tmp_path / "empty") / "model.safetensors").is_file()
    assert (ablate(run, tmp_path / "deep" / "er") / "model.safetensors").is_file()


def test_unknown_regions_to_keep(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`keep` names 'forgt'; .*\['forget'\]"):
        export(run, tmp_path / "out", keep=["forgt"])
    with pytest.raises(ValueError, match="`keep` is a list"):
        export(run, tmp_path / "out", keep="forget")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    monkeypatch.setattr(exporting, "write_json", full)
    with pytest.raises(OSError, match="No space left"):
        ablate(run, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_an_export_that_is_not_the_source_is_never_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = type(tiny("llama")).save_pretrained

    def wrong(self: Any, *args: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            self.lm_head.weight[5] += 1e-3
        save(self, *args, **kwargs)

    monkeypatch.setattr(type(tiny("llama")), "save_pretrained", wrong)
    with pytest.raises(RuntimeError, match="logits differ"):
        ablate(run, tmp_path / "out")
    monkeypatch.undo()

    def leaking(self: Any, folder: Path, **kwargs: Any) -> None:
        save(self, folder, state_dict={**self.state_dict(), "lm_head.lora_B.weight": torch.ones(1)})

    monkeypatch.setattr(type(tiny("llama")), "save_pretrained", leaking)
    monkeypatch.setattr(exporting, "_adapter_attributes", lambda model: {"lora_B"})
    with pytest.raises(RuntimeError, match="may belong to a region"):
        ablate(run, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_result_can_be_a_source_of_nothing(run: Path, tmp_path: Path) -> None:
    out = ablate(run, tmp_path / "out")
    with pytest.raises(ValueError, match="no routing.json"):
        load_routed(out)


@pytest.mark.parametrize(
    ("difference", "merges", "refused"), [(0, False, False), (1e-7, False, True), (1e-7, True, False)]
)
def test_what_merges_nothing_must_be_equal_to_the_bit(difference, merges, refused, tmp_path, monkeypatch) -> None:
    """A difference of 1e-7 passes for rounding where a base adapter was merged, and nowhere else."""
    if merges:
        frozen(tmp_path)
    else:
        save_routed(wrapped("mlp"), tmp_path / "run", train_base=True)
    whole = exporting._verified

    def differing(folder, batch, *, expected, **more):
        return whole(folder, batch, expected=expected.double() + difference, **more)

    monkeypatch.setattr(exporting, "_verified", differing)
    if refused:
        with pytest.raises(RuntimeError, match=r"differ by 1e-07 .* allowed is 0: nothing was written"):
            ablate(tmp_path / "run", tmp_path / "out")
        assert not (tmp_path / "out").exists()
    else:
        record = json.loads((ablate(tmp_path / "run", tmp_path / "out") / "ablation.json").read_text())
        assert (record["allowed_logit_difference"] > 0) == merges


def test_a_region_that_is_merged_may_differ_by_rounding_and_by_no_more(tmp_path, monkeypatch) -> None:
    save_routed(wrapped("lora"), tmp_path / "run", train_base=True)
    whole = exporting._expected_logits
    for name, factor in (("near", 1e-7), ("far", 1e-3)):
        monkeypatch.setattr(
            exporting, "_expected_logits", lambda *a, factor=factor, **k: (x := whole(*a, **k)) + factor * x.abs().max()
        )
        if name == "far":
            with pytest.raises(RuntimeError, match="nothing was written"):
                export(tmp_path / "run", tmp_path / name, keep=["bio"])
        else:
            export(tmp_path / "run", tmp_path / name, keep=["bio"])
