from __future__ import annotations

import json
import shutil

import pytest
import torch
from cli_parts import call
from evaluation_parts import byte_tokenizer, tiny_llama, write_jsonl
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from routed_peft.cli import app


def test_evaluate_measures_every_set_of_regions(run, tmp_path):
    torch.manual_seed(0)
    forget = write_jsonl(tmp_path / "forget.jsonl", [{"text": "cell wall"}, {"text": "a gene"}])
    retain = write_jsonl(tmp_path / "retain.jsonl", [{"text": "a cat"}])
    out = tmp_path / "results/out.json"
    files = ["--forget-file", forget, "--retain-file", retain, "--out", out, "--batch-size", 2]
    result = call("evaluate", run, "--tasks", "routed_forget_loss,routed_retain_loss", "--regions", "bio", *files)
    assert result.exit_code == 0, result.output
    for word in ("routed_forget_loss", "all regions", "ablated", "bio", str(out)):
        assert word in result.output
    report = json.loads(out.read_text())
    assert list(report["results"]) == ["all regions", "ablated", "bio"]
    scores = [report["results"][name]["routed_forget_loss/token_ce"] for name in report["results"]]
    assert len(set(scores)) == 3, "three different models were measured"
    assert report["metadata"]["forget_file"] == forget


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"pair": "spanish", "arm": "none"}, "forget and retain losses: held-out text of the pair spanish"),
        ({"pair": "spanish", "train_file": "my.jsonl"}, "pair biology, which this model may not have been trained on"),
    ],
)
def test_losses_are_those_of_the_pair_that_a_run_was_trained_on(run, tmp_path, recipe, said):
    own = shutil.copytree(run, tmp_path / "run")
    (own / "run.json").write_text(json.dumps({"config": {"recipe": recipe}}))
    more = ["--tasks", "routed_forget_loss", "--limit", 2, "--out", tmp_path / "out.json"]
    result = call("evaluate", own, *more)
    assert result.exit_code == 0, result.output
    assert said in " ".join(result.output.split())
    assert json.loads((tmp_path / "out.json").read_text())["metadata"]["pair"] == said.split("pair ")[1].split(",")[0]
    assert call("ablate", own, tmp_path / "ablated").exit_code == 0
    told = call("evaluate", tmp_path / "ablated", *more).output
    assert said in " ".join(told.split()), "an ablated model knows its run"


def test_a_lora_that_names_its_base_is_measured_as_it_always_was(tmp_path):
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), LoraConfig(target_modules=["q_proj"])
    )
    model.save_pretrained(tmp_path / "lora")
    byte_tokenizer().save_pretrained(tmp_path / "lora")
    text = write_jsonl(tmp_path / "forget.jsonl", [{"text": "cell wall"}])
    result = call("evaluate", tmp_path / "lora", "--tasks", "routed_forget_loss", "--forget-file", text)
    assert result.exit_code == 0, result.output


def test_metadata_that_no_task_reads_is_a_mistake_and_the_place_for_results_is_tried_first(run, tmp_path):
    result = CliRunner().invoke(app, ["evaluate", str(run), "--metadata", "pari=spanish"])
    assert result.exit_code == 1 and "has 'pari', which no task reads" in result.stderr
    result = CliRunner().invoke(app, ["evaluate", str(run), "--out", str(tmp_path)])
    assert result.exit_code == 1 and "is a directory: name a file in it" in result.stderr


def test_a_limit_in_the_metadata_is_a_number_of_rows(run, tmp_path):
    forget = write_jsonl(tmp_path / "forget.jsonl", [{"text": "cell wall"}, {"text": "a gene"}])
    losses = []
    for more in ([], ["--metadata", "limit=1"], ["--limit", 1]):
        out = tmp_path / "out.json"
        command = ["evaluate", run, "--tasks", "routed_forget_loss", "--forget-file", forget, "--out", out, *more]
        result = call(*command)
        assert result.exit_code == 0, result.output
        losses.append(json.loads(out.read_text())["results"]["ablated"]["routed_forget_loss/token_ce"])
    assert losses[0] != losses[1] == losses[2]
