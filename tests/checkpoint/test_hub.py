"""Runs on the Hub: a process with a local server as its Hub loads, ablates, inspects and pushes them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoint_parts import logits, lora, without, wrapped
from families import tiny
from hub_server import Hub
from hub_worker import Worker, working
from peft import get_peft_model
from remote_code import with_own_code

from routed_peft import presets
from routed_peft.checkpoint import push_to_hub, save_routed

pytestmark = pytest.mark.slow  # a process of its own, and a server for it


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with working(tmp_path_factory.mktemp("home")) as worker:
        yield worker


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    save_routed(wrapped("mlp"), path, routes=presets.sgtm("forget"), train_base=True, tokens_per_route={"forget": 1234})
    for name in (
        "training_args.bin",
        "optimizer.pt",
        "tokenizer_config.json",
        "LICENSE",
        "notes.txt",
        "trainer_state.json",
    ):
        (path / name).write_text("{}")
    (path / "checkpoint-3").mkdir()
    (path / "checkpoint-3" / "model.safetensors").write_text("")
    return path


BASE_FILES = {
    ".gitattributes",
    "LICENSE",
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "routing.json",
    "tokenizer_config.json",
}


def test_the_base_and_its_regions_go_to_two_repositories(worker: Worker, run: Path) -> None:
    code = "result = push_to_hub(src, 'org/base', regions_repo='org/regions', token=token)"
    commits = worker(code, src=str(run), token=Hub.token)
    base, regions = worker.server.repos["org/base"], worker.server.repos["org/regions"]
    assert not base.private and regions.private
    assert set(base.head()) == BASE_FILES
    pieces = {
        f"{name}/{file}"
        for name in ("forget", "bio")
        for file in ("adapter_config.json", "adapter_model.safetensors", "region.json")
    }
    assert set(regions.head()) == {".gitattributes", "README.md"} | pieces
    assert commits == {"repo": base.branches["main"], "regions_repo": regions.branches["main"]}
    config = json.loads(regions.head()["forget/adapter_config.json"])
    assert config["base_model_name_or_path"] == "org/base" and config["revision"] == commits["repo"]
    assert str(run.parent) not in "".join(data.decode("latin1") for data in {**base.head(), **regions.head()}.values())

    card = base.head()["README.md"].decode()
    for text in (
        "gradient-routing",
        "| `forget` | ROUTED, 3 hidden units per MLP | forget, unlabeled |",
        "forget 1234",
    ):
        assert text in card, card
    assert 'load_routed("org/base", regions={"forget": "org/regions", "bio": "org/regions"})' in card
    assert 'AutoModelForCausalLM.from_pretrained("org/base")' in card
    assert "base_model: org/base" in regions.head()["README.md"].decode()

    model = wrapped("mlp")
    ablated = without(model, "forget", "bio")
    assert torch.equal(worker.logits("AutoModelForCausalLM.from_pretrained('org/base')"), ablated)
    assert torch.equal(worker.logits("load_routed('org/base')"), ablated)
    answer = worker.run("load_routed('org/base', {'forget': 'org/regions'})")
    assert answer["error"] == "RepositoryNotFoundError"
    both = "load_routed('org/base', {'forget': 'org/regions', 'bio': 'org/regions'}, token=token)"
    assert torch.equal(worker.logits(both, token=Hub.token), logits(model))
    stock = "PeftModel.from_pretrained(load_routed('org/base'), 'org/regions', 'bio', subfolder='bio', token=token)"
    assert torch.equal(worker.logits(stock, token=Hub.token), without(model, "forget"))
    answer = worker.run("load_routed('org/base', ['forget'])")
    assert answer["error"] == "ValueError" and "regions={'forget': 'org/regions'}" in answer["message"]


def test_only_safe_files_and_regions_asked_for_are_downloaded(worker: Worker, run: Path) -> None:
    worker.server.add("org/whole", {**files_of(run), "model.py": b"", "weights.pt": b""})
    worker.server.requests.clear()
    model = wrapped("mlp")
    assert torch.equal(worker.logits("load_routed('org/whole')"), without(model, "forget", "bio"))

    def downloaded() -> set[str]:
        prefix = "GET /org/whole/resolve/"
        return {r.removeprefix(prefix).split("/", 1)[1] for r in worker.server.requests if r.startswith(prefix)}

    assert not {name for name in downloaded() if "/" in name or name.endswith((".bin", ".pt", ".py"))}
    assert torch.equal(worker.logits("load_routed('org/whole', ['bio'])"), without(model, "forget"))
    assert {name.split("/")[0] for name in downloaded() if "/" in name} == {"bio"}


def test_revisions(worker: Worker, run: Path, tmp_path: Path) -> None:
    repo = worker.server.add("org/revised", files_of(run))
    repo.branches["old"] = repo.branches["main"]
    newer = wrapped("mlp", seed=4)
    repo.commit(files_of(save_routed(newer, tmp_path / "newer", train_base=True)))
    code = "load_routed('org/revised', ['forget', 'bio'], revision=revision)"
    assert torch.equal(worker.logits(code, revision=None), logits(newer))
    for revision in ("old", repo.branches["old"]):
        assert torch.equal(worker.logits(code, revision=revision), logits(wrapped("mlp")))
    assert worker.run(code, revision="missing")["error"] == "RevisionNotFoundError"


def test_errors_of_the_hub_are_passed_on(worker: Worker, run: Path) -> None:
    worker.server.add("org/gated", files_of(run), gated=True)
    for code in ("load_routed('org/gated')", "ablate('org/gated', 'out')", "inspect_checkpoint('org/gated')"):
        answer = worker.run(code)
        assert answer["error"] == "GatedRepoError" and "taken for the id of a repository" in answer["message"]
    assert torch.equal(
        worker.logits("load_routed('org/gated', token=token)", token=Hub.token),
        without(wrapped("mlp"), "forget", "bio"),
    )
    assert worker.run("load_routed('org/nothing')")["error"] == "RepositoryNotFoundError"
    answer = worker.run("push_to_hub(src, 'org/new', token='hf_wrong')", src=str(run))
    assert answer["error"] == "HfHubHTTPError" and "401" in answer["message"]


def test_a_damaged_download_is_noticed(worker: Worker, run: Path) -> None:
    files = files_of(run)
    weights = files["model.safetensors"]
    worker.server.add("org/damaged", {**files, "model.safetensors": weights[:-1] + bytes([weights[-1] ^ 1])})
    answer = worker.run("load_routed('org/damaged')")
    assert answer["error"] == "ValueError" and "tampered" in answer["message"]


def test_ablate_export_and_inspect_a_repository(worker: Worker, run: Path, tmp_path: Path) -> None:
    commit = worker.server.add("org/source", files_of(run)).branches["main"]
    about = worker("result = inspect_checkpoint('org/source')")
    assert about["revision"] == commit and about["problems"] == [] and about["kind"] == "trained base"
    assert [(entry["name"], entry["size"], entry["fingerprint_ok"]) for entry in about["regions"]] == [
        ("forget", 3, True),
        ("bio", 4, True),
    ]
    worker("ablate('org/source', out, revision='main')", out=str(tmp_path / "out"))
    record = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert record["source"] == "org/source" and record["revision"] == commit and record["max_logit_difference"] == 0
    assert (tmp_path / "out" / "LICENSE").is_file() and not (tmp_path / "out" / "notes.txt").exists()
    worker("export('org/source', out, keep=['bio'])", out=str(tmp_path / "kept"))
    kept = worker.logits("AutoModelForCausalLM.from_pretrained(out)", out=str(tmp_path / "kept"))
    torch.testing.assert_close(kept, without(wrapped("mlp"), "forget"), rtol=0, atol=1e-5)


def test_a_frozen_base_is_found_at_its_revision(worker: Worker, tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "base")
    repo = worker.server.add("org/pretrained", {**files_of(tmp_path / "base"), "tokenizer_config.json": b"{}"})
    code = """
torch.manual_seed(0)
model = get_peft_model(AutoModelForCausalLM.from_pretrained("org/pretrained"), lora(), "retain")
model.add_adapter("forget", lora())
model.base_model.set_adapter(["retain", "forget"])
save_routed(model.eval(), out, base_adapters=["retain"])
result = logits(model).tolist()
"""
    path = tmp_path / "run"
    expected = torch.tensor(worker(code, out=str(path)))
    first = repo.branches["main"]
    assert json.loads((path / "routing.json").read_text())["base"] | {"fingerprint": 0} == {
        "id": "org/pretrained",
        "revision": first,
        "fingerprint": 0,
    }
    tiny("llama", seed=3).save_pretrained(tmp_path / "other")
    repo.commit(files_of(tmp_path / "other"))  # the repository moves on; the run does not
    assert torch.equal(worker.logits("load_routed(src, ['forget'])", src=str(path)), expected)
    worker("ablate(src, out)", src=str(path), out=str(tmp_path / "out"))
    assert (tmp_path / "out" / "tokenizer_config.json").is_file()

    worker(
        "push_to_hub(src, 'org/adapted', regions_repo='org/adapted-regions', token=token)",
        src=str(path),
        token=Hub.token,
    )
    pushed = worker.server.repos["org/adapted"].head()
    assert {name.split("/")[0] for name in pushed} == {".gitattributes", "README.md", "routing.json", "retain"}
    config = json.loads(worker.server.repos["org/adapted-regions"].head()["forget/adapter_config.json"])
    assert config["base_model_name_or_path"] == "org/pretrained" and config["revision"] == first
    code = "load_routed('org/adapted', {'forget': 'org/adapted-regions'}, token=token)"
    assert torch.equal(worker.logits(code, token=Hub.token), expected)


def test_a_second_push_leaves_nothing_stale_and_other_branches_alone(worker: Worker, run: Path) -> None:
    stale = {"model-00001-of-00002.safetensors": b"", "model.safetensors.index.json": b"{}", "mine.md": b"mine"}
    repo = worker.server.add("org/pushed", stale)
    worker("push_to_hub(src, 'org/pushed', revision='next', token=token)", src=str(run), token=Hub.token)
    assert repo.head() == stale
    assert set(repo.head("next")) == (BASE_FILES - {".gitattributes"}) | {"mine.md"}
    assert "The regions are not published." in repo.head("next")["README.md"].decode()


def test_pushes_that_would_leak_are_refused(worker: Worker, run: Path, tmp_path: Path) -> None:
    worker.server.add("org/public", {})
    worker.server.add("org/leaky", {"forget/adapter_model.safetensors": b""})
    cases = [
        ("'org/a', regions_repo='org/public'", "is public"),
        ("'org/leaky'", "already holds 'forget/adapter_model"),
        ("'org/a', regions_repo='org/a'", "another repository"),
    ]
    for arguments, message in cases:
        answer = worker.run(f"push_to_hub(src, {arguments}, token=token)", src=str(run), token=Hub.token)
        assert answer["error"] == "ValueError" and message in answer["message"], answer
    assert worker.server.repos["org/public"].head() == {} and set(worker.server.repos["org/leaky"].head()) == {
        "forget/adapter_model.safetensors"
    }
    code = "push_to_hub(src, 'org/open', regions_repo='org/public', regions_private=False, token=token)"
    worker(code, src=str(run), token=Hub.token)
    assert "forget/region.json" in worker.server.repos["org/public"].head()


def test_a_local_frozen_base_cannot_be_pushed(tmp_path: Path) -> None:
    base = tiny("llama")
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(type(base).from_pretrained(tmp_path / "base"), lora(), "forget")
    with pytest.raises(ValueError, match="local directory"):
        push_to_hub(save_routed(model, tmp_path / "run"), "org/x")
    with pytest.raises(ValueError, match="is no directory"):
        push_to_hub(tmp_path / "nothing", "org/x")


@pytest.mark.slow
def test_regions_of_a_pushed_run_are_found_where_the_token_allows(worker: Worker, run: Path, tmp_path: Path) -> None:
    worker("push_to_hub(src, 'org/two', regions_repo='org/two-regions', token=token)", src=str(run), token=Hub.token)
    model = wrapped("mlp")
    assert torch.equal(
        worker.logits("load_routed('org/two', ['bio'], token=token)", token=Hub.token), without(model, "forget")
    )
    worker("export('org/two', out, keep=['bio'], token=token)", token=Hub.token, out=str(tmp_path / "kept"))
    kept = worker.logits("AutoModelForCausalLM.from_pretrained(out)", out=str(tmp_path / "kept"))
    torch.testing.assert_close(kept, without(model, "forget"), rtol=0, atol=1e-5)
    moved = "load_routed('org/two', ['bio'], regions_repo=repo)"
    assert torch.equal(worker.logits(moved, repo=str(run)), without(model, "forget"))
    assert torch.equal(worker.logits("load_routed('org/two')"), without(model, "forget", "bio"))
    worker("ablate('org/two', out)", out=str(tmp_path / "out"))
    plain = worker.logits("AutoModelForCausalLM.from_pretrained(out)", out=str(tmp_path / "out"))
    assert torch.equal(plain, without(model, "forget", "bio"))
    hidden = worker.run("export('org/two', out, keep=['bio'], token=False)", out=str(tmp_path / "no"))
    assert hidden["error"] == "ValueError" and "org/two-regions" in hidden["message"], hidden


@pytest.mark.slow
def test_only_files_of_the_run_are_pushed(worker: Worker, tmp_path: Path) -> None:
    path = save_routed(wrapped("mlp"), tmp_path / "run", train_base=True)
    for name in ("forget.model", "vocab.bin", "changing_dataset.npz", "mine.safetensors.txt"):
        (path / name).write_text("secret")
    worker("push_to_hub(src, 'org/strict', token=token)", src=str(path), token=Hub.token)
    assert set(worker.server.repos["org/strict"].head()) == BASE_FILES - {"LICENSE", "tokenizer_config.json"}
    (tmp_path / "secret").write_text("secret")
    (path / "LICENSE").symlink_to(tmp_path / "secret")
    answer = worker.run("push_to_hub(src, 'org/linked', token=token)", src=str(path), token=Hub.token)
    assert answer["error"] == "ValueError" and "leads out of it" in answer["message"]
    worker("ablate(src, out)", src=str(path), out=str(tmp_path / "out"))
    assert not {"LICENSE", "forget.model", "vocab.bin"} & {file.name for file in (tmp_path / "out").iterdir()}


@pytest.mark.slow
def test_code_of_a_model_is_downloaded_and_run_only_where_it_is_trusted(worker: Worker, tmp_path: Path) -> None:
    code = """
model = AutoModelForCausalLM.from_pretrained(src, trust_remote_code=True)
torch.manual_seed(0)
model = get_peft_model(model, lora(), "forget").eval()
save_routed(model, out, train_base=True)
result = logits(model).tolist()
"""
    src, out = with_own_code(tmp_path / "src"), tmp_path / "run"
    expected = torch.tensor(worker(code, src=str(src), out=str(out)))
    worker.server.add("org/own-code", files_of(out))
    worker.server.requests.clear()
    for trust in ("", ", trust_remote_code=False"):
        answer = worker.run(f"load_routed('org/own-code', ['forget']{trust})")
        assert answer["error"] == "ValueError" and "'org/own-code' brings code of its own" in answer["message"]
    assert not [request for request in worker.server.requests if request.endswith(".py")]
    trusted = "load_routed('org/own-code', ['forget'], trust_remote_code=True)"
    assert torch.equal(worker.logits(trusted), expected)
    worker("ablate('org/own-code', out, trust_remote_code=True)", out=str(tmp_path / "out"))
    assert (tmp_path / "out" / "modeling_strange.py").is_file()
    assert worker("result = inspect_checkpoint('org/own-code')")["problems"] == []
