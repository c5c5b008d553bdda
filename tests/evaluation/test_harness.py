import logging
import random
import sys
from pathlib import Path

import pytest
import torch
import yaml
from evaluation_parts import TEXTS, byte_tokenizer, log_likelihood, tiny_llama, token_loss, write_jsonl
from peft import LoraConfig, get_peft_model
from rich.console import Console

from routed_peft.evaluation import evaluate, evaluate_configurations, results_frame, results_table
from routed_peft.tasks import utils

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def files(tmp_path):
    """The metadata that names one file for either side."""
    return {
        "forget_file": write_jsonl(tmp_path / "forget.jsonl", [{"text": text} for text in TEXTS]),
        "retain_file": write_jsonl(tmp_path / "retain.jsonl", [{"text": text[::-1]} for text in TEXTS]),
    }


def two_regions(seed=0):
    """A tiny model with two LoRA regions that both change it."""
    model = get_peft_model(tiny_llama(seed), lora(), adapter_name="bio")
    model.add_adapter("cyber", lora())
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.base_model.set_adapter(["bio", "cyber"])
    return model.eval()


def lora():
    return LoraConfig(r=2, target_modules=["up_proj"], task_type="CAUSAL_LM")


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_loss_is_that_of_plain_torch(files, adds_bos, batch_size):
    tokenizer, model = byte_tokenizer(adds_bos), tiny_llama()
    scores = evaluate(model, tokenizer, tasks=["routed_loss"], metadata=files, batch_size=batch_size)
    for side, texts in (("forget", TEXTS), ("retain", [text[::-1] for text in TEXTS])):
        loss, _ = token_loss(model.eval(), tokenizer, texts)
        assert scores[f"routed_{side}_loss/token_ce"] == pytest.approx(loss, rel=1e-6)
    assert set(scores) == {f"routed_{s}_loss/{m}" for s in ("forget", "retain") for m in ("token_ce", "bits_per_byte")}


def test_a_text_longer_than_the_model_is_scored_whole(tmp_path, tokenizer):
    """Every token once, in windows of the model's length; the last one is filled up with context."""
    model, text = tiny_llama(max_length=16).eval(), 2 * TEXTS[2]
    file = write_jsonl(tmp_path / "t.jsonl", [{"text": text}])
    tokens = tokenizer.encode(text)
    assert len(tokens) > 32 and len(tokens) % 16
    padded, total = [tokenizer.bos_token_id, *tokens], 0.0
    for end in [*range(16, len(tokens), 16), len(tokens)]:
        window, scored = padded[end - 16 : end + 1], 16 if end % 16 == 0 else end % 16
        with torch.no_grad():
            log_p = model(torch.tensor([window[:-1]])).logits[0].log_softmax(-1)
        total -= log_p[torch.arange(16), torch.tensor(window[1:])][-scored:].double().sum().item()
    scores = evaluate(model, tokenizer, tasks=["routed_forget_loss"], metadata={"forget_file": file})
    assert scores["routed_forget_loss/token_ce"] == pytest.approx(total / len(tokens), rel=1e-6)


@torch.no_grad()
def continuation(model, tokenizer, context, choice):
    tokens, n_context = tokenizer.encode(f"{context} {choice}"), len(tokenizer.encode(context))
    log_p = model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
    picked = log_p[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:])]
    return picked[n_context - 1 :].sum().item()


def test_multiple_choice_is_that_of_plain_torch(tmp_path, tokenizer):
    model = tiny_llama(max_length=1024).eval()
    rows = utils.read_rows(utils.PACKAGED / "retain_mc.jsonl", "file")[:6]
    file = write_jsonl(tmp_path / "q.jsonl", rows)

    def accuracy(prompt, choices, normalized=False):
        hits = 0
        for row in rows:
            logs = [continuation(model, tokenizer, prompt(row), c) for c in choices(row)]
            logs = [log / len(c) for log, c in zip(logs, choices(row), strict=True)] if normalized else logs
            hits += logs.index(max(logs)) == row["answer"]
        return hits / len(rows)

    letters = "\n".join("ABCD"[i] + ". {" + str(i) + "}" for i in range(4))
    own = lambda row: row["choices"]
    cloze, blank = lambda row: row["question"] + "\nAnswer:", lambda row: "Answer:"
    expected = {
        "routed_retain_mc/acc": accuracy(
            lambda row: row["question"] + "\n" + letters.format(*row["choices"]) + "\nAnswer:", lambda row: "ABCD"
        ),
        "routed_retain_cloze/acc": accuracy(cloze, own),
        "routed_retain_cloze/acc_norm": accuracy(cloze, own, normalized=True),
        "routed_retain_cloze_control/acc": accuracy(blank, own),
        "routed_retain_cloze_control/acc_norm": accuracy(blank, own, normalized=True),
    }
    tasks = ["routed_retain_mc", "routed_retain_cloze", "routed_retain_cloze_control"]
    assert evaluate(model, tokenizer, tasks=tasks, metadata={"retain_mc_file": file}) == pytest.approx(expected)


def test_the_control_does_not_see_the_question(tmp_path, tokenizer):
    model = tiny_llama(max_length=1024)
    rows = utils.read_rows(utils.PACKAGED / "retain_mc.jsonl", "file")[:6]
    tasks = ["routed_retain_cloze", "routed_retain_cloze_control"]
    before = write_jsonl(tmp_path / "q.jsonl", rows)
    after = write_jsonl(tmp_path / "other.jsonl", [{**row, "question": row["question"][::-1]} for row in rows])
    one, other = (
        evaluate(model, tokenizer, tasks=tasks, metadata={"retain_mc_file": file}) for file in (before, after)
    )
    same = {key for key in one if one[key] == other[key]}
    assert {"routed_retain_cloze_control/acc", "routed_retain_cloze_control/acc_norm"} <= same != set(one)


def test_configurations_ablate_the_other_regions(files, tokenizer):
    model = two_regions()
    results = evaluate_configurations(model, tokenizer, tasks=["routed_forget_loss"], metadata=files)
    assert list(results) == ["all regions", "ablated", "only bio", "only cyber"]
    got = {name: scores["routed_forget_loss/token_ce"] for name, scores in results.items()}
    assert got["all regions"] == pytest.approx(token_loss(model, tokenizer, TEXTS)[0], rel=1e-6)
    with model.disable_adapter():
        assert got["ablated"] == pytest.approx(token_loss(model, tokenizer, TEXTS)[0], rel=1e-6)
    for name in ("bio", "cyber"):
        model.base_model.set_adapter([name])
        assert got[f"only {name}"] == pytest.approx(token_loss(model, tokenizer, TEXTS)[0], rel=1e-6)
    assert len(set(got.values())) == 4


def test_chosen_regions_and_base_adapters(files, tokenizer):
    model, task = two_regions(), ["routed_forget_loss"]
    configurations = {"as it is": None, "everything": "all", "bio": ["bio"]}
    results = evaluate_configurations(model, tokenizer, configurations=configurations, tasks=task, metadata=files)
    assert results["as it is"] == results["everything"] != results["bio"]
    assert evaluate(model, tokenizer, tasks=task, metadata=files, regions=["bio"]) == results["bio"]
    kept = evaluate_configurations(
        model, tokenizer, configurations=None, tasks=task, metadata=files, base_adapters=["bio"]
    )
    assert list(kept) == ["all regions", "ablated"]
    assert kept["ablated"] == results["bio"]


def test_a_plain_model(files, tokenizer):
    model = tiny_llama()
    results = evaluate_configurations(model, tokenizer, tasks=["routed_forget_loss"], metadata=files, limit=1)
    loss, _ = token_loss(model.eval(), tokenizer, TEXTS[:1])
    assert results["model"]["routed_forget_loss/token_ce"] == pytest.approx(loss, rel=1e-6)
    with pytest.raises(ValueError, match="`regions`.*bio"):
        evaluate(model, tokenizer, tasks=["routed_forget_loss"], metadata=files, regions=["bio"])


def test_nothing_of_the_caller_is_changed(files, tokenizer, capfd):
    model, task = two_regions().train(), ["routed_forget_loss", "routed_forget_mc"]
    model.base_model.model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3), random.seed(3)
    expected = torch.rand(1), random.random()
    torch.manual_seed(3), random.seed(3)
    evaluate_configurations(model, tokenizer, tasks=task, metadata=files, limit=2)
    assert (torch.rand(1), random.random()) == expected
    assert [module.training for module in model.modules()] == modes
    assert tokenizer.pad_token is None
    assert logging.getLogger("lm_eval").level != logging.ERROR
    assert model.active_adapters == ["bio", "cyber"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    assert capfd.readouterr() == ("", "")


def test_modes_survive_a_failure(tokenizer):
    model = tiny_llama().train()
    model.forward = lambda *args, **kwargs: 1 / 0
    with pytest.raises(ZeroDivisionError):
        evaluate(model, tokenizer, tasks=["routed_forget_mc"], limit=1)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("chosen", [["bio", "chem"], "bio"])
def test_unknown_regions_are_refused(files, tokenizer, chosen):
    with pytest.raises(ValueError, match=r"`regions` must be a list from \['bio', 'cyber'\]"):
        evaluate_configurations(
            two_regions(), tokenizer, configurations={"a": ["bio"], "b": chosen}, tasks=["routed_loss"], metadata=files
        )


def test_no_tasks_are_refused(tokenizer):
    with pytest.raises(ValueError, match="`tasks`"):
        evaluate(tiny_llama(), tokenizer, tasks=[])


def test_lm_evals_own_wmdp_reads_the_same_schema(tmp_path, tokenizer):
    """lm-eval's own task file on a local file in WMDP's schema scores as ours does."""
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    from routed_peft.evaluation.lm_eval_model import load_tasks

    file = write_jsonl(tmp_path / "q.jsonl", utils.read_rows(utils.PACKAGED / "forget_mc.jsonl", "file")[:16])
    config = {
        "include": str(Path(lm_eval.tasks.__file__).parent / "wmdp" / "wmdp_bio.yaml"),
        "task": "local_wmdp_bio",
        "description": "",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": file}, "cache_dir": str(tmp_path / "cache")},
    }
    (tmp_path / "local.yaml").write_text(yaml.safe_dump(config))
    (theirs,) = TaskManager(include_path=tmp_path, include_defaults=False).load("local_wmdp_bio")["tasks"].values()
    (ours,) = load_tasks(["routed_forget_mc"], {"forget_mc_file": file})["tasks"].values()
    for their_row, our_row in zip(theirs.test_docs(), ours.test_docs(), strict=True):
        assert theirs.doc_to_text(their_row) == ours.doc_to_text(our_row)
        assert theirs.doc_to_choice(their_row) == ours.doc_to_choice(our_row)
        assert theirs.doc_to_target(their_row) == ours.doc_to_target(our_row)


@pytest.mark.slow
def test_lm_evals_own_tasks_are_found_and_others_refused(tokenizer):
    """All of lm-eval's 14,000 task files are read here: the slow test."""
    with pytest.raises(ValueError, match=r"`tasks` .* got \['no_such_task'\]"):
        evaluate(tiny_llama(), tokenizer, tasks=["wmdp_bio", "mmlu", "routed_wmdp", "no_such_task"])


def test_tables():
    results = {"all regions": {"a_mc/acc": 0.5, "b_loss/token_ce": 2.0}, "ablated": {"a_mc/acc": 0.25}}
    assert results_frame(results).shape == (2, 2)
    console = Console(width=80)
    with console.capture() as capture:
        console.print(results_table(results, title="Accuracy"))
    for piece in ("a_mc", "token_ce", "all regions", "0.250", "–"):
        assert piece in capture.get()


def test_without_lm_eval_the_error_names_the_extra(monkeypatch):
    import routed_peft.evaluation.lm_eval_model

    monkeypatch.delitem(sys.modules, routed_peft.evaluation.lm_eval_model.__name__)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r'pip install "routed_peft\[eval\]"'):
        evaluate(tiny_llama(), None)


def test_the_oracle_itself():
    """A model that gives every token the same probability."""
    model, tokenizer = tiny_llama(), byte_tokenizer()
    torch.nn.init.zeros_(model.lm_head.weight)
    total, n_tokens = log_likelihood(model, tokenizer, TEXTS[0])
    assert -total / n_tokens == pytest.approx(torch.tensor(300.0).log().item(), rel=1e-6)
