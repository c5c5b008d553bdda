"""`ablated`, `ablate` and `export`."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_parts import FAMILIES, logits, lora, without, wrapped
from families import tiny, tokens
from peft import IA3Config, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from routed_peft.ablation import ablated
from routed_peft.checkpoint import export as exporting
from routed_peft.checkpoint import inspect_checkpoint, load_routed, save_routed
from routed_peft.checkpoint.export import ablate, export


@pytest.mark.parametrize("kind", ["mlp", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_ablated_equals_the_model_without_the_region(kind: str, family: str) -> None:
    model = wrapped(kind, family)
    whole = logits(model)
    for names in (("forget",), ("bio",), ("forget", "bio")):
        reference = without(model, *names)
        assert not torch.equal(reference, whole)
        with ablated(model, *names):
            assert torch.equal(logits(model), reference)
        assert torch.equal(logits(model), whole)


@pytest.mark.parametrize("kind", ["mlp", "lora"])
def test_blocks_nest_and_scales_multiply(kind: str) -> None:
    model = wrapped(kind)
    with ablated(model, "forget", scale=0.25):
        quarter = logits(model)
    with ablated(model, "forget", scale=0.5), ablated(model, "forget", scale=0.5):
        assert torch.equal(logits(model), quarter)
    with ablated(model, "forget"):
        with ablated(model, "forget", scale=2.0), ablated(model, "bio"):
            assert torch.equal(logits(model), without(model, "forget", "bio"))
        assert torch.equal(logits(model), without(model, "forget"))
    with ablated(model, "forget", scale=1.0):
        assert torch.equal(logits(model), logits(model))


def test_a_region_of_nan_does_not_leak() -> None:
    model = wrapped("mlp")
    reference = without(model, "forget")
    for name, parameter in model.named_parameters():
        if ".forget." in name:
            parameter.data.fill_(float("nan"))
    assert logits(model).isnan().any()
    with ablated(model, "forget"):
        assert torch.equal(logits(model), reference)


def test_hooks_go_even_when_the_block_raises() -> None:
    model = wrapped("lora")
    whole, trainable = logits(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(KeyError), ablated(model, "forget"):
        raise KeyError
    assert torch.equal(logits(model), whole)
    assert trainable == [p.requires_grad for p in model.parameters()]
    assert not any(module._forward_hooks for module in model.modules())


def test_in_training_the_ablated_region_gets_no_gradient() -> None:
    model = wrapped("mlp").train()
    with ablated(model, "forget"):
        model(tokens(), labels=tokens()).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert any(".bio." in name for name in gradients) and not any(".forget." in name for name in gradients)


def test_transformers_models_with_add_adapter_and_containers() -> None:
    model = tiny("llama")
    reference = logits(model)
    model.add_adapter(lora(), "forget")
    assert not torch.equal(logits(model), reference)
    with ablated(nn.ModuleList([model]), "forget"):
        assert torch.equal(logits(model), reference)


def test_compiled_models_are_ablated_too() -> None:
    model = wrapped("lora")
    reference, compiled = without(model, "forget"), torch.compile(model, backend="eager")
    whole = logits(compiled)
    with ablated(model, "forget"):
        assert torch.equal(logits(compiled), reference)
    assert torch.equal(logits(compiled), whole)


@pytest.mark.parametrize(
    ("names", "scale", "message"),
    [(("forgt",), 0.0, r"\['bio', 'forget'\].*forgt"), ((), 0.0, "`regions`"), (("bio",), float("nan"), "`scale`")],
)
def test_bad_arguments(names: tuple[str, ...], scale: float, message: str) -> None:
    with pytest.raises(ValueError, match=message), ablated(wrapped("lora"), *names, scale=scale):
        pass


@pytest.mark.parametrize(
    "other",
    [
        lora(target_modules=["embed_tokens"]),
        lora(use_dora=True),
        lora(target_modules=["q_proj"], target_parameters=["lm_head.weight"], lora_dropout=0.0),
        IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
    ],
    ids=["embedding", "dora", "parameter", "ia3"],
)
def test_adapters_that_cannot_be_ablated_are_refused(other: Any) -> None:
    model = get_peft_model(tiny("llama"), other, "forget")
    with pytest.raises(ValueError, match=r"cannot be ablated|of another PEFT type"), ablated(model, "forget"):
        pass
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("kind", ["mlp", "lora"])
def test_a_merged_region_is_refused(kind: str) -> None:
    model = wrapped(kind)
    model.merge_adapter(["forget"])
    with pytest.raises(ValueError, match="merged"), ablated(model, "forget"):
        pass
    with ablated(model, "bio"):
        pass


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
