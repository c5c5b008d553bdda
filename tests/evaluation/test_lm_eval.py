import json
import shutil
import subprocess
import sys

import pytest
import torch
from evaluation_parts import TEXTS, byte_tokenizer, tiny_llama, token_loss, write_jsonl
from peft import LoraConfig, get_peft_model

from routed_peft.checkpoint import load_routed, save_routed
from routed_peft.evaluation import evaluate_source
from routed_peft.regions import RoutedConfig

pytest.importorskip("lm_eval")
LOSS = "routed_forget_loss"


def add_regions(model, config, names=("bio", "cyber")):
    """Give `model` regions of `config` that change what it says."""
    model = get_peft_model(model, config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if any(f".{region}." in name for region in names):
            torch.nn.init.normal_(parameter, std=0.4)
    model.base_model.set_adapter(list(names))
    return model.eval()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A saved run of each kind with the regions bio and cyber, and the loss of each subset."""
    folder, tokenizer, made = tmp_path_factory.mktemp("runs"), byte_tokenizer(adds_bos=True), {}
    configs = {
        "routed": RoutedConfig(kind="mlp", size=4, task_type="CAUSAL_LM"),
        "lora": LoraConfig(r=2, target_modules=["up_proj"], task_type="CAUSAL_LM"),
    }
    for kind, config in configs.items():
        run = save_routed(add_regions(tiny_llama(), config), folder / kind, tokenizer=tokenizer, train_base=True)
        losses = {}
        for names in ([], ["bio"], ["bio", "cyber"]):
            losses["+".join(names) or "none"] = token_loss(load_routed(run, names).eval(), tokenizer, TEXTS)[0]
        assert len({round(loss, 3) for loss in losses.values()}) == 3
        made[kind] = (str(run), losses)
    return made


@pytest.fixture
def file(tmp_path):
    return write_jsonl(tmp_path / "forget.jsonl", [{"text": text} for text in TEXTS])


def run_here(monkeypatch, arguments):
    """The command line in this process."""
    from routed_peft.lm_eval import main

    monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments])
    main()


def command(folder, file, model, model_args, *more):
    metadata = json.dumps({"forget_file": file, **(more[0] if more else {})})
    start = ["--model", model, "--model_args", model_args, "--tasks", LOSS, "--metadata", metadata]
    return [*start, "--device", "cpu", "--batch_size", "2", "--output_path", str(folder / "out")]


def loss_written(folder):
    (results,) = (folder / "out").rglob("results_*.json")
    return json.loads(results.read_text())["results"][LOSS]["token_ce,none"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "regions"), [("routed", "none"), ("routed", "bio+cyber"), ("lora", "bio"), ("lora", None)]
)
def test_model_routed_loads_the_regions_named(monkeypatch, tmp_path, file, runs, kind, regions):
    run, losses = runs[kind]
    chosen = "" if regions is None else f",regions={regions}"
    run_here(monkeypatch, command(tmp_path, file, "routed", f"pretrained={run}{chosen},dtype=float32"))
    expected = losses[regions or "bio+cyber"]
    assert loss_written(tmp_path) == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["routed", "lora"])
def test_model_hf_takes_either_adapter(monkeypatch, tmp_path, file, runs, kind):
    run, losses = runs[kind]
    arguments = f"pretrained={run},peft={run}/bio,dtype=float32,add_bos_token=False"
    run_here(monkeypatch, command(tmp_path, file, "hf", arguments))
    assert loss_written(tmp_path) == pytest.approx(losses["bio"], rel=1e-6)


@pytest.mark.slow
def test_the_module_is_a_command(tmp_path, file, runs):
    run, losses = runs["routed"]
    arguments = command(tmp_path, file, "routed", f"pretrained={run},regions=bio,dtype=float32")
    done = subprocess.run(
        [sys.executable, "-m", "routed_peft.lm_eval", *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert LOSS in done.stdout
    assert loss_written(tmp_path) == pytest.approx(losses["bio"], rel=1e-6)


@pytest.mark.parametrize("wrong", ["region=none", "peft=x", "load_in_8bit=True"])
def test_arguments_that_would_not_be_heeded_are_refused(monkeypatch, tmp_path, file, runs, wrong):
    """A misspelt `regions` would otherwise measure all of them."""
    with pytest.raises(ValueError, match=f"the model `routed` has no argument '{wrong.split('=')[0]}'"):
        run_here(monkeypatch, command(tmp_path, file, "routed", f"pretrained={runs['lora'][0]},{wrong}"))


def test_losses_are_on_the_pair_of_the_run(runs, tmp_path):
    import argparse

    from routed_peft.lm_eval import add_packaged_tasks

    run = shutil.copytree(runs["routed"][0], tmp_path / "run")
    (run / "run.json").write_text(json.dumps({"config": {"recipe": {"pair": "spanish"}}}))
    for more, metadata, pair in [
        ({}, {}, "spanish"),
        ({"pair": "entangled"}, {}, "entangled"),
        ({}, {"pair": "biology"}, "biology"),
    ]:
        told = {"model": "routed", "model_args": {"pretrained": str(run), **more}, "metadata": metadata}
        args = add_packaged_tasks(argparse.Namespace(command="run", include_path=None, config=None, **told))
        assert args.metadata["pair"] == pair


def test_dtype_is_passed_on(runs):
    from routed_peft.lm_eval import RoutedLM

    lm = RoutedLM(runs["lora"][0], regions="none", dtype="float64", device="cpu")
    assert lm.model.dtype == torch.float64
    assert lm.tokenizer.bos_token == "<s>"


def test_the_users_own_tasks_stay_beside_ours(tmp_path):
    import argparse

    from routed_peft.lm_eval import add_packaged_tasks
    from routed_peft.tasks import path

    config = tmp_path / "config.yaml"
    config.write_text(f"include_path: {tmp_path}\nmodel: hf\n")
    plain = argparse.Namespace(command="run", include_path=None, config=None, model="hf", metadata=None)
    both = argparse.Namespace(command="run", include_path="mine", config=None, model="hf", metadata=None)
    read = argparse.Namespace(command="run", include_path=None, config=str(config), model=None, metadata=None)
    assert add_packaged_tasks(plain).include_path == path()
    assert add_packaged_tasks(both).include_path == [path(), "mine"]
    assert add_packaged_tasks(read).include_path == [path(), str(tmp_path)]
    assert plain.metadata is None


def test_evaluate_source(tmp_path, file, runs):
    run, losses = runs["routed"]
    output = tmp_path / "new" / "results.json"
    results = evaluate_source(run, [LOSS], metadata={"forget_file": file}, output=output, dtype=torch.float32)
    got = {name: scores[f"{LOSS}/token_ce"] for name, scores in results.items()}
    assert list(got) == ["all regions", "ablated", "only bio", "only cyber"]
    for name, subset in (("all regions", "bio+cyber"), ("ablated", "none"), ("only bio", "bio")):
        assert got[name] == pytest.approx(losses[subset], rel=1e-6)
    written = json.loads(output.read_text())
    assert written["results"] == results and written["configurations"]["ablated"] == []
    assert [p.name for p in output.parent.iterdir()] == ["results.json"]


def test_evaluate_source_with_a_subset(file, runs):
    run, losses = runs["lora"]
    results = evaluate_source(run, [LOSS], regions=["bio"], metadata={"forget_file": file})
    assert list(results) == ["all regions", "ablated", "bio"]
    assert results["bio"][f"{LOSS}/token_ce"] == pytest.approx(losses["bio"], rel=1e-6)
    named = evaluate_source(run, [LOSS], regions={"with biology": ["bio"]}, metadata={"forget_file": file})
    assert named["with biology"] == results["bio"]
    with pytest.raises(ValueError, match=r"`regions` names \['chem'\]; .*\['bio', 'cyber'\]"):
        evaluate_source(run, [LOSS], regions=["chem"])


def test_base_adapters_are_never_ablated(tmp_path, file):
    tokenizer = byte_tokenizer()
    config = LoraConfig(r=2, target_modules=["up_proj"], task_type="CAUSAL_LM")
    model = add_regions(tiny_llama(), config, ("keep", "forget"))
    run = save_routed(model, tmp_path / "run", tokenizer=tokenizer, base_adapters=["keep"])
    results = evaluate_source(run, [LOSS], metadata={"forget_file": file})
    assert list(results) == ["all regions", "ablated"]
    expected, _ = token_loss(load_routed(run, []).eval(), tokenizer, TEXTS)
    assert results["ablated"][f"{LOSS}/token_ce"] == pytest.approx(expected, rel=1e-6)


def test_a_frozen_base_lends_its_tokenizer(tmp_path, file):
    from transformers import AutoModelForCausalLM

    tiny_llama().save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["up_proj"], task_type="CAUSAL_LM")
    run = save_routed(add_regions(base, config), tmp_path / "run")
    assert not (run / "tokenizer_config.json").exists()
    results = evaluate_source(run, [LOSS], metadata={"forget_file": file})
    expected, _ = token_loss(tiny_llama().eval(), byte_tokenizer(), TEXTS)
    assert results["ablated"][f"{LOSS}/token_ce"] == pytest.approx(expected, rel=1e-6)


def test_a_plain_checkpoint(tmp_path, file):
    tokenizer = byte_tokenizer()
    tiny_llama().save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    results = evaluate_source(tmp_path / "plain", [LOSS], metadata={"forget_file": file})
    expected, _ = token_loss(tiny_llama().eval(), tokenizer, TEXTS)
    assert results["model"][f"{LOSS}/token_ce"] == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="`regions`"):
        evaluate_source(tmp_path / "plain", [LOSS], regions=["bio"])
