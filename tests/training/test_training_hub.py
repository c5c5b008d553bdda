"""A routed trainer's pushes, to a local server of the Hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import Hub
from hub_worker import Worker, working
from training_parts import trainer_of

from routed_peft.data import train_tokenizer

pytestmark = pytest.mark.slow  # a process of its own, and a server for it

TRAINED = """
from training_parts import train
from transformers import TrainerCallback
from routed_peft.data import train_tokenizer
begun = []
class Begun(TrainerCallback):
    def on_push_begin(self, *_, **__):
        begun.append(True)
options = {"max_steps": 2, "callbacks": [Begun()], "hub_token": "hf_tests"} | options
trainer = train(Path(out), train_tokenizer(["a"], vocab_size=258), **options)
"""


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with working(tmp_path_factory.mktemp("home")) as worker:
        yield worker


def assert_base_alone(files: dict[str, bytes]) -> None:
    assert {"model.safetensors", "config.json", "routing.json", "tokenizer.json", "README.md"} <= files.keys()
    barred = ("forget/", "checkpoint-", "last-checkpoint", "training_args", "optimizer", "rng_state", "trainer_state")
    assert not [name for name in files if name.startswith(barred)]


def test_a_trainer_pushes_its_base_and_its_regions(worker: Worker, tmp_path: Path) -> None:
    code = TRAINED + (
        "first = trainer.push_to_hub(); assert begun == [True];"
        "future = trainer.push_to_hub('Once more', blocking=False, revision='next', regions_repo='org/parts');"
        "trainer.save_model();"  # over the files of the push, which it must wait for
        "assert future.done() and len(begun) == 2;"
        "result = [first, future.result()]"
    )
    first, second = worker(code, out=str(tmp_path), options={"hub_model_id": "org/pushed"})
    repo, parts = worker.server.repos["org/pushed"], worker.server.repos["org/parts"]
    assert repo.messages == ["End of training", "Once more"] and parts.messages == ["Once more"]
    assert first == {"repo": repo.branches["main"]}
    assert second == {"repo": repo.branches["next"], "regions_repo": parts.branches["next"]}
    assert_base_alone(repo.head())
    assert_base_alone(repo.head("next"))
    assert parts.private and "forget/adapter_model.safetensors" in parts.head("next")


def test_checkpoints_are_pushed_as_they_are_saved(worker: Worker, tmp_path: Path) -> None:
    """Trainer makes the repository, named after the directory; the files are those of the checkpoint."""
    out = tmp_path / "my-run"
    code = TRAINED + "assert not Path(out, 'model.safetensors').exists(); trainer.save_model(); result = len(begun)"
    options = {"push_to_hub": True, "save_strategy": "steps", "save_steps": 1, "hub_private_repo": True}
    assert worker(code, out=str(out), options=options) == 3
    repo = worker.server.repos["me/my-run"]
    assert repo.private
    assert repo.messages == ["Training in progress, step 1", "Training in progress, step 2", "Model save"]
    for name, step in (("checkpoint-1", 1), ("checkpoint-2", 2), ("", 3)):
        files = list(repo.commits.values())[step]
        assert_base_alone(files)
        assert files["model.safetensors"] == (out / name / "model.safetensors").read_bytes()


def test_nothing_is_pushed_before_the_end_where_that_is_asked_for(worker: Worker, tmp_path: Path) -> None:
    options = {"push_to_hub": True, "save_strategy": "epoch", "max_steps": 6, "hub_model_id": "org/late"}
    code = TRAINED + "result = trainer.push_to_hub(commit_message=None)"
    worker(code, out=str(tmp_path / "a"), options={**options, "hub_strategy": "end"})
    assert worker.server.repos["org/late"].messages == ["Upload with routed_peft"]
    worker(TRAINED, out=str(tmp_path / "b"), options={**options, "hub_model_id": "org/epochs"})
    assert worker.server.repos["org/epochs"].messages == ["Training in progress, epoch 1"]


def test_what_a_push_cannot_do_is_refused(worker: Worker, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, train_tokenizer(["a"], vocab_size=258))
    with pytest.raises(ValueError, match=r"got \['tags'\], which it does not take"):
        trainer.push_to_hub(tags=["x"])
    with pytest.raises(ValueError, match="`hub_model_id` is not set"):
        trainer.push_to_hub()
    assert not list(tmp_path.iterdir())
    for strategy in ("checkpoint", "all_checkpoints"):
        options = {"push_to_hub": True, "hub_strategy": strategy, "hub_model_id": f"org/{strategy}"}
        answer = worker.run(TRAINED, out=str(tmp_path), options=options)
        assert answer["error"] == "ValueError" and f"`hub_strategy='{strategy}'` would push" in answer["message"], (
            answer
        )
    options = {"hub_model_id": "org/pushed", "hub_token": "hf_wrong"}
    future = "trainer.push_to_hub(blocking=False, token=token).result()"
    answer = worker.run(TRAINED + future, out=str(tmp_path), options=options, token="hf_other")
    assert answer["error"] == "HfHubHTTPError" and Hub.token not in answer["message"]
