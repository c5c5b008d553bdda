from __future__ import annotations

import io
import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import torch
from evaluation_parts import byte_tokenizer, tiny_llama, write_jsonl
from peft import LoraConfig, get_peft_model
from places import ROOT
from relearning_parts import DATA, FORGET, model, tokenizer
from rich.console import Console
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)
from two_processes import in_two_processes
from typer.testing import CliRunner

from routed_peft import RoutedConfig, presets, save_routed
from routed_peft.checkpoint.export import ablate
from routed_peft.cli import app
from routed_peft.evaluation.measures import relearning_area
from routed_peft.evaluation.relearning import (
    Attack,
    SourceOptions,
    TextLoss,
    read_facts,
    read_summary,
    relearn,
    relearn_source,
)
from routed_peft.evaluation.relearning.attacked_model import AttackedModel
from routed_peft.evaluation.relearning.run import _reference_losses
from routed_peft.evaluation.relearning.summary import summary_tables
from routed_peft.evaluation.source import open_plain

QUICK = {"learning_rates": [1e-3, 1e-2], "seeds": [0, 1], "steps": [0, 1, 4], "extensions": 0}
GRID = ("learning_rates", "seeds", "steps")


def attack_source(src, data, out, attacks=("forget",), **settings):
    grid = {name: settings.pop(name) for name in GRID if name in settings}
    return relearn_source(src, data, out=out, attacks=attacks, **grid, options=SourceOptions(**settings))


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    """A routed run, its ablated export, the model that was never unlearned, and the attacker's files."""
    folder = tmp_path_factory.mktemp("relearn")
    knowing = model()
    optimizer = torch.optim.AdamW(knowing.parameters(), lr=1e-2)
    rows = [torch.tensor([[0, *tokenizer().encode(text), 1]]) for text in FORGET]
    for _ in range(20):
        optimizer.zero_grad()
        sum(knowing(row, labels=row).loss for row in rows).backward()
        optimizer.step()
    knowing.save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    routed = get_peft_model(model(seed=1), RoutedConfig(size=4, init="model"), adapter_name="forget")
    save_routed(routed, folder / "run", routes=presets.sgtm("forget"), tokenizer=tokenizer(), train_base=True)
    ablate(folder / "run", folder / "ablated")
    for name in ("forget_train", "forget_test", "retain_train", "retain_test", "facts"):
        write_jsonl(folder / f"{name}.jsonl", [{"text": text} for text in getattr(DATA, name)])
    return folder


@pytest.fixture(scope="module")
def attacked(places) -> dict:
    return attack_source(
        places / "run", DATA, places / "attacked", ["forget", "facts", "int8"], reference=places / "base", **QUICK
    )


@pytest.mark.slow
def test_the_summary_says_what_was_attacked_and_how_it_went(places, attacked):
    assert read_summary(places / "attacked") == json.loads(json.dumps(attacked))
    result = attacked["attacks"]["forget"]
    assert result["verdict"] == "attack" and result["attack"]["method"] == "full"
    assert [entry["step"] for entry in result["envelope"]] == [0, 1, 4]
    finals = {
        rate: [c["points"][-1]["forget"] for c in result["curves"] if c["learning_rate"] == rate]
        for rate in (1e-3, 1e-2)
    }
    last = result["envelope"][-1]
    best = min(finals, key=lambda rate: sum(finals[rate]))
    assert last["learning_rate"] == best and not result["interior"]
    assert (last["min"], last["max"]) == (min(finals[best]), max(finals[best]))
    assert last["mean"] == pytest.approx(sum(finals[best]) / 2)
    assert attacked["start"]["forget"] == result["envelope"][0]["mean"]
    recovery = result["recovery"]
    assert (
        recovery["steps"] == {"at": 4, "relation": ">", "censored": True}
        and recovery["tokens"]["at"] == last["tokens"] > 0
    )
    base, _ = open_plain(places / "base")
    known = TextLoss(base, tokenizer(), DATA.forget_test)(base)
    assert attacked["reference"]["forget"] == pytest.approx(known)
    assert recovery["share"] == pytest.approx(
        (attacked["start"]["forget"] - last["mean"]) / (attacked["start"]["forget"] - known)
    )
    assert attacked["attacks"]["facts"]["target"] == "facts" and "share" in attacked["attacks"]["facts"]["recovery"]
    rounded = attacked["attacks"]["int8"]
    assert len(rounded["curves"]) == 1 and rounded["recovery"]["steps"] is None and "share" in rounded["recovery"]
    about = json.loads((places / "attacked/run.json").read_text())
    assert about["config"]["steps"] == [0, 1, 4] and attacked["versions"]["torch"]


@pytest.mark.slow
def test_a_repeated_command_runs_nothing_and_another_attack_is_added(places, attacked, monkeypatch):
    ran = []
    whole = AttackedModel.prepared_for
    monkeypatch.setattr(
        AttackedModel, "prepared_for", lambda self, *what: ran.append(what[0].name) or whole(self, *what)
    )
    again = attack_source(
        places / "run", DATA, places / "attacked", ["forget", "bias"], reference=places / "base", **QUICK
    )
    assert again["attacks"]["forget"] == attacked["attacks"]["forget"]
    assert set(ran) == {"bias"}


@pytest.mark.slow
def test_another_attack_needs_no_other_again_and_another_reading_does(places, tmp_path, monkeypatch):
    ran = []
    whole = AttackedModel.prepared_for
    monkeypatch.setattr(
        AttackedModel, "prepared_for", lambda self, *what: ran.append(what[0].name) or whole(self, *what)
    )
    source = shutil.copytree(places / "ablated", tmp_path / "model")
    few = QUICK | {"learning_rates": [1e-3], "seeds": [0], "steps": [0, 1]}
    less = replace(DATA, retain_train=(), unrelated_train=())
    attack_source(source, less, tmp_path / "out", ["forget"], **few)
    attack_source(source, DATA, tmp_path / "out", ["forget", "mixed"], **few)
    assert ran == ["forget", "mixed"]
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    summary = attack_source(source, DATA, tmp_path / "out", ["forget"], **few)
    assert ran == ["forget", "mixed", "forget"]
    first = summary["attacks"]["forget"]["envelope"][0]["mean"]
    assert first == pytest.approx(summary["start"]["forget"], abs=1e-5)


@pytest.mark.slow
def test_losses_before_have_an_interval_over_documents(attacked):
    for side, (low, high) in attacked["start_intervals"].items():
        assert low < attacked["start"][side] < high
    assert set(attacked["start_intervals"]) == {"forget", "retain"}


@pytest.mark.slow
def test_losses_after_an_attack_have_one_too(places, attacked):
    own = attacked["attacks"]["forget"]
    assert own["envelope"][0]["documents"] == pytest.approx(attacked["start_intervals"]["forget"])
    for entry in own["envelope"]:
        at = [
            next(p for p in c["points"] if p["step"] == entry["at"])
            for c in own["curves"]
            if c["learning_rate"] == entry["learning_rate"]
        ]
        low, high = entry["documents"]
        assert low == pytest.approx(fmean(point["forget_low"] for point in at)) and low < entry["mean"] < high
        assert high == pytest.approx(fmean(point["forget_high"] for point in at))
    assert "forget_low" not in own["start"]
    table = Console(file=io.StringIO(), width=200)
    table.print(*summary_tables(read_summary(places / "attacked")))
    assert f"{low:.2f}–{high:.2f}" in table.file.getvalue()


@pytest.mark.slow
def test_an_oracle_that_was_attacked_alike_gives_the_area(places, attacked, tmp_path):
    about = {"reference": places / "base", **QUICK}
    summary = attack_source(places / "run", DATA, tmp_path / "out", ["forget"], oracle=places / "attacked", **about)
    own, reference = summary["attacks"]["forget"], summary["reference"]["forget"]
    losses = [point["mean"] for point in own["envelope"]]
    assert (
        own["area"]
        == pytest.approx(relearning_area([0, 1, 4], losses, base=reference, oracle=losses))
        == pytest.approx(1.0)
    )
    assert "area" not in attacked["attacks"]["forget"]
    table = Console(file=io.StringIO(), width=200)
    table.print(*summary_tables(summary))
    assert "area" in table.file.getvalue() and "1.00" in table.file.getvalue()
    wrong = [
        ({"attacks": ["lora"]}, "lacks the attack 'lora'"),
        (
            {"attacks": ["forget"], "steps": [0, 1]},
            "was attacked with other settings, in steps of 'forget'",
        ),
        ({"attacks": ["forget"], "seeds": [0]}, "in seeds of 'forget'"),
        ({"attacks": ["forget"], "data": replace(DATA, forget_test=FORGET[5:])}, "in texts of 'forget'"),
        ({"attacks": ["forget"], "reference": None}, "`oracle` needs a `reference`"),
    ]
    for change, message in wrong:
        with pytest.raises(ValueError, match=message):
            options = {"data": DATA, "oracle": places / "attacked", **about} | change
            attack_source(places / "run", out=tmp_path / "no", **options)
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
def test_an_oracle_of_which_nothing_came_back_holds_out_all_the_way(places, tmp_path):
    """Rounding trains nothing, so that it has no area; retain text brings back nothing of what never was there."""
    about = QUICK | {"learning_rates": [1e-6], "seeds": [0], "extensions": 0}
    wanted = ["int8", "retain", "forget"]
    filtered = attack_source(places / "ablated", DATA, tmp_path / "oracle", wanted, **about)
    assert filtered["attacks"]["retain"]["verdict"] == "no attack"
    about |= {"learning_rates": [1e-3], "reference": places / "base", "oracle": tmp_path / "oracle"}
    found = attack_source(places / "run", DATA, tmp_path / "out", wanted, **about)["attacks"]
    assert "area" not in found["int8"] and 0 < found["forget"]["area"] < 1


def test_a_changed_command_that_is_interrupted_leaves_no_summary_of_the_former(places, tmp_path, monkeypatch):
    few = QUICK | {"learning_rates": [1e-3], "seeds": [0], "steps": [0, 1]}
    attack_source(places / "ablated", DATA, tmp_path / "out", ["forget"], **few)

    def killed(*what):
        raise KeyboardInterrupt

    monkeypatch.setattr(AttackedModel, "prepared_for", killed)
    with pytest.raises(KeyboardInterrupt):
        attack_source(places / "ablated", DATA, tmp_path / "out", ["forget"], **(few | {"steps": [0, 2]}))
    with pytest.raises(ValueError, match="was `routed-peft relearn` interrupted"):
        read_summary(tmp_path / "out")


def test_a_model_of_a_short_context_is_attacked_within_it(places, tmp_path):
    config = GPT2Config(vocab_size=300, n_positions=8, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer().save_pretrained(tmp_path / "gpt2")
    few = QUICK | {"learning_rates": [1e-2], "seeds": [0], "steps": [0, 1]}
    assert attack_source(tmp_path / "gpt2", DATA, tmp_path / "out", ["forget"], **few)["attacks"]["forget"]["verdict"]


@pytest.mark.slow
def test_run_export_and_regions_are_attacked_alike(places, attacked):
    start = {}
    for name, source, regions in (("ablated", "ablated", ()), ("on", "run", ["forget"])):
        summary = attack_source(places / source, DATA, places / f"out-{name}", ["lora"], regions=regions, **QUICK)
        assert summary["attacks"]["lora"]["verdict"] == "attack"
        start[name] = summary["start"]
    assert start["ablated"] == attacked["start"] != start["on"]


@pytest.mark.slow
def test_two_processes_share_the_grid_and_one_writes(places, tmp_path):
    arguments = [
        "relearn", places / "run", *files(places), "--learning-rate", "1e-3,1e-2", "--seeds", 2, "--steps", "0,1,3",
        "--extensions", 1, "--out",
    ]  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the two processes: sums over several are rounded otherwise
    assert call(*arguments, tmp_path / "one").exit_code == 0
    torch.set_num_threads(threads)
    printed = in_two_processes("-m", "routed_peft.cli", *map(str, arguments), tmp_path / "two")
    assert printed.count("written to") == 1
    one, two = (read_summary(tmp_path / name) for name in ("one", "two"))
    assert two["attacks"] == one["attacks"] and len(one["attacks"]["forget"]["curves"]) == 6
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "two")]
    assert sorted(lines[0]) == sorted(lines[1]) and len(lines[0]) == 6 * 3
    assert json.loads((tmp_path / "two/run.json").read_text())["hardware"]["processes"] == 2


def files(places: Path) -> list[object]:
    names = ("forget_train", "forget_test", "retain_test")
    return [part for name in names for part in (f"--{name.replace('_', '-')}", places / f"{name}.jsonl")]


def call(*arguments: object):
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, [str(argument) for argument in arguments])


def test_the_command_reads_any_kind_of_file(places, tmp_path):
    given = []
    for name in ("forget_train", "forget_test", "retain_test"):
        rows = [json.loads(line) for line in (places / f"{name}.jsonl").read_text().splitlines()]
        words = [{"a": row["text"].split(" ", 1)[0], "b": row["text"].split(" ", 1)[1]} for row in rows]
        (tmp_path / f"{name}.json").write_text("\ufeff" + json.dumps(words), encoding="utf-8")
        given += [f"--{name.replace('_', '-')}", tmp_path / f"{name}.json"]
    more = ["--learning-rate", "1e-3", "--seeds", 1, "--steps", 1, "--extensions", 0, "--reference-loss", 2.0]
    result = call("relearn", places / "ablated", *given, "--text-template", "{a} {b}", *more, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    same = call("relearn", places / "ablated", *files(places), *more, "--out", tmp_path / "same")
    assert (
        same.exit_code == 0 and read_summary(tmp_path / "same")["attacks"] == read_summary(tmp_path / "out")["attacks"]
    )


@pytest.mark.slow
def test_the_command_shows_every_attack(places, tmp_path):
    known = read_summary(places / "attacked")["reference"]["forget"] if (places / "attacked").exists() else 2.0
    result = call(
        "relearn", places / "ablated", *files(places), "--retain-train", places / "retain_train.jsonl", "--attack", "mixed",
        "--attack", "int4", "--attack", "forget", "--learning-rate", "1e-30", "--seeds", 1, "--steps", 3, "--extensions", 0,
        "--reference-loss", known, "--out", tmp_path / "out", "--limit", 2,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = [
        line
        for line in result.output.splitlines()
        if line.split()[:1] and line.split()[0] in ("mixed", "int4", "forget")
    ]
    rows = {
        line.split()[0]: " ".join(other for other in found if other.split()[0] == line.split()[0]) for line in found
    }
    assert {"mixed", "int4", "forget"} <= set(rows)
    assert "no attack" in rows["forget"] and "> 3" not in rows["forget"], (
        "what does not attack tells nothing of recovery"
    )
    assert f"written to {tmp_path / 'out'}" in result.output.replace("\n", "")
    summary = read_summary(tmp_path / "out" / "summary.json")
    assert summary["steps"] == [0, 1, 2, 3] and summary["attacks"]["forget"]["verdict"] == "no attack"


@pytest.mark.slow
def test_the_commands_of_the_docs_run(places, tmp_path):
    page = (ROOT / "docs/relearning.md").read_text(encoding="utf-8")
    commands = [line.split(" relearn ")[1] for line in page.splitlines() if " relearn demo-out" in line]
    assert len(commands) == 3
    found = {
        "routed/run": "run",
        "routed/ablated": "ablated",
        "perfect_filter/plain": "ablated",
        "no_routing/plain": "base",
    }
    found |= {"data/attacker.jsonl": "forget_train.jsonl", "data/forget_test.jsonl": "forget_test.jsonl"}
    found |= {"data/retain_test.jsonl": "retain_test.jsonl", "attacked": str(tmp_path)}
    for number, command in enumerate(commands):
        for name, place in found.items():
            command = command.replace(f"demo-out/{name}", str(places / place))
        out = ["--out", tmp_path / str(number), "--steps", 1, "--seeds", 1, "--extensions", 0]
        result = call("relearn", *shlex.split(command), *out)
        assert result.exit_code == 0, result.output
        assert read_summary(tmp_path / str(number))["attacks"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--forget-test", "{forget_train}"], "4 texts of `forget_test` are also in `forget_train`"),
        (["--retain-test", "{empty}"], "`retain_test` must hold one JSON object a line and at least one"),
        (["--retain-test", "{blank}"], "`retain_test` must hold a non-empty `text`"),
        (["--reference-loss", "9.5"], "there is nothing to recover"),
        (["--reference-loss", "nan"], "`reference` is a loss in nats per token, above 0, got nan"),
        (["--retain-test", "{folder}"], "which is a directory"),
        (["--retain-test", "{binary}"], "`retain_test` must be JSONL in UTF-8"),
        (["--attack", "facts", "--facts", "{unknown}", "--reference", "{base}"], "the reference's facts loss"),
        (["--reference", "{ablated}"], "there is nothing to recover"),
        (["--reference", "{run}", "--reference-loss", "1"], "give one of them"),
        (["--reference", "{other}"], "the tokenizer of `reference`"),
        (["--attack", "mixed"], "`retain_train`, which has 0"),
        (["--attack", "forget", "--attack", "forget"], "`attacks` must be different"),
        (["--attack", "everything"], "is no part of an attack"),
        (["--learning-rate", "1e-3;1e-2"], "`--learning-rate` takes numbers"),
        (["--learning-rate", "0"], "`learning_rates` must be different positive numbers"),
        (["--steps", "5,10"], "`steps` must ascend from 0"),
        (["--regions", "bio"], "bio"),
    ],
)
def test_a_users_mistake_is_one_line_and_writes_nothing(places, tmp_path, arguments, message):
    (tmp_path / "empty.jsonl").write_text("")
    write_jsonl(tmp_path / "blank.jsonl", [{"text": " "}])
    tiny_llama(vocab_size=320).save_pretrained(tmp_path / "other")
    byte_tokenizer(vocab_size=290).save_pretrained(tmp_path / "other")
    names = {
        "forget_train": places / "forget_train.jsonl",
        "run": places / "run",
        "ablated": places / "ablated",
        "other": tmp_path / "other",
    }
    (tmp_path / "binary").write_bytes(b"PAR1\xa0")
    write_jsonl(tmp_path / "unknown.jsonl", [{"text": f"{i}{i}{i}"} for i in range(4)])
    names |= {"folder": tmp_path, "binary": tmp_path / "binary", "base": places / "base"}
    names |= {"unknown": tmp_path / "unknown.jsonl"}
    names |= {name: tmp_path / f"{name}.jsonl" for name in ("empty", "blank")}
    filled = [argument.format(**names) for argument in arguments]
    result = call("relearn", places / "run", *files(places), "--out", tmp_path / "out", *filled)
    assert result.exit_code == 1, result.output
    assert message in result.stderr and result.stderr.count("routed-peft:") == 1
    assert not (tmp_path / "out" / "summary.json").exists() and not (tmp_path / "out" / "metrics.jsonl").exists()


def test_checkpoints_that_are_no_causal_language_models_are_refused(places, tmp_path):
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 300,
    }
    bert = BertForMaskedLM(BertConfig(**sizes))
    bert.save_pretrained(tmp_path / "bert")
    t5 = T5ForConditionalGeneration(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=300))
    t5.save_pretrained(tmp_path / "t5")
    for name, kind in (("bert", "BertForMaskedLM"), ("t5", "T5ForConditionalGeneration")):
        with pytest.raises(ValueError, match=f"is a {kind}, not a causal language model"):
            attack_source(tmp_path / name, DATA, tmp_path / "out")
    classifier = LlamaForSequenceClassification(tiny_llama().config)
    for wrong in (bert, t5, classifier, torch.nn.Linear(1, 1)):
        with pytest.raises(ValueError, match="`model` must be a causal language model"):
            relearn(wrong, tokenizer(), attack="forget", data=DATA)
    causal = model()
    with torch.no_grad():
        causal.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="are not finite: its weights are damaged"):
        relearn(causal, tokenizer(), attack="forget", data=DATA)
    BertLMHeadModel(BertConfig(**sizes)).save_pretrained(tmp_path / "bidirectional")
    tokenizer().save_pretrained(tmp_path / "bidirectional")
    with pytest.raises(ValueError, match="must be a causal language model, which BertLMHeadModel is not"):
        open_plain(tmp_path / "bidirectional")
    get_peft_model(model(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="is an adapter without its model: give its run, or merge it first"):
        open_plain(tmp_path / "adapter")
    with pytest.raises(ValueError, match="has adapters"):
        relearn(get_peft_model(model(), RoutedConfig(size=2), "forget"), tokenizer(), attack="forget", data=DATA)


@pytest.mark.slow
def test_a_directory_with_other_records_is_left_alone(places, attacked):
    before = (places / "attacked/run.json").read_text()
    with pytest.raises(ValueError, match="holds other records"):
        attack_source(places / "base", DATA, places / "attacked", **QUICK)
    assert (places / "attacked/run.json").read_text() == before


@pytest.mark.slow
def test_a_summary_of_another_version_is_refused(places, attacked, tmp_path):
    summary = json.loads((places / "attacked/summary.json").read_text())
    (tmp_path / "summary.json").write_text(json.dumps(summary | {"format": 2}))
    with pytest.raises(ValueError, match="has the format 2, this version of routed_peft reads 1"):
        read_summary(tmp_path)
    (tmp_path / "summary.json").write_text(json.dumps(summary | {"attacks": {"forget": {"verdict": "attack"}}}))
    with pytest.raises(ValueError, match=r"the attack 'forget' of .* lacks envelope, curves"):
        read_summary(tmp_path)
    (tmp_path / "summary.json").write_text(json.dumps({"verdict": "of a demo"}))
    with pytest.raises(ValueError, match="is no summary of relearning"):
        read_summary(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        read_summary(tmp_path / "none.json")


def test_a_run_as_reference_keeps_its_regions(places):
    """The model from which nothing was removed is the whole run, not the ablated one."""
    found = _reference_losses(
        SourceOptions(reference=places / "run"),
        model(),
        tokenizer=tokenizer(),
        data=DATA,
        attacks=[Attack.parse("forget")],
        seeds=[0],
    )
    whole, ablated = (open_plain(places / "run", regions)[0] for regions in ("all", ()))
    losses = [TextLoss(model, tokenizer(), DATA.forget_test)(model) for model in (whole, ablated)]
    assert found["forget"] == pytest.approx(losses[0]) and abs(losses[0] - losses[1]) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("kept", "regions"), [([], []), (["forget"], "all")])
def test_units_of_an_arm_without_routing_belong_to_it(places, tmp_path, kept, regions):
    """What they learned is no less the model's own than the rest, so that without them another model would be attacked."""
    run = shutil.copytree(places / "run", tmp_path / "run")
    routing = json.loads((run / "routing.json").read_text())
    (run / "routing.json").write_text(json.dumps({**routing, "kept_regions": kept}))
    summary = attack_source(run, DATA, tmp_path / "out", ["bias"], seeds=[0], steps=[0, 1])
    assert list(summary["regions"]) == list(regions)
    left, _ = open_plain(places / "run", regions)
    assert summary["start"]["forget"] == pytest.approx(TextLoss(left, tokenizer(), DATA.forget_test)(left))


def test_a_reference_of_another_architecture_is_refused(places, tmp_path):
    config = GPT2Config(vocab_size=model().config.vocab_size, n_positions=64, n_embd=8, n_layer=1, n_head=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="is a gpt2 model and the source a llama one"):
        attack_source(places / "run", DATA, tmp_path / "out", reference=tmp_path / "gpt2", **QUICK)


@pytest.mark.slow
def test_the_reference_of_facts_is_taken_on_the_scored_halves(places, attacked):
    base, _ = open_plain(places / "base")
    halves = [TextLoss(base, tokenizer(), DATA.halves(seed)[1])(base) for seed in (0, 1)]
    assert attacked["attacks"]["facts"]["reference"] == pytest.approx(sum(halves) / 2)


def test_facts_are_read_with_what_tells_them(tmp_path):
    rows = [
        {"text": "3 × 4", "fact": 1},
        {"text": "a"},
        {"text": "4 × 3", "fact": 1},
        {"text": "b", "fact": "1"},
        {"text": "c"},
    ]
    write_jsonl(tmp_path / "facts.jsonl", rows)
    assert read_facts(tmp_path / "facts.jsonl") == [("3 × 4", "4 × 3"), ("a",), ("b",), ("c",)]
    with pytest.raises(ValueError, match="`facts` must hold a non-empty `text` in every row, got None in row 1"):
        read_facts(write_jsonl(tmp_path / "other.jsonl", [{"fact": 1}]))
