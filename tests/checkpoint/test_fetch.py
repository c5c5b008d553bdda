"""Where the files of a run come from: a directory, or a repository on the Hub."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

import pytest

from routed_peft.checkpoint import fetch as fetching
from routed_peft.checkpoint.fetch import FOLDER_FILES, ROOT_FILES, fetch, fetch_folder, hub_arguments


@pytest.fixture
def downloads(tmp_path, monkeypatch) -> list[dict]:
    """Calls of `snapshot_download`, which gives a folder named like a commit."""
    calls: list[dict] = []

    def download(repository, **arguments):
        calls.append({"repository": repository, **arguments})
        return str(tmp_path / "snapshots" / "c0ffee")

    monkeypatch.setattr(fetching, "snapshot_download", download)
    return calls


def test_a_directory_is_taken_as_it_is(tmp_path, downloads, monkeypatch):
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)
    assert fetch("run") == fetch(Path("run")) == fetch(tmp_path / "run") == ((tmp_path / "run").resolve(), None)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fetch("~/run")[0] == tmp_path / "run"
    assert fetch_folder("run", "forget", commit=None) == tmp_path / "run" / "forget"
    assert downloads == []
    with pytest.raises(ValueError, match="`revision` needs a Hub id, got 'v1' with the directory 'run'"):
        fetch("run", "v1")


@pytest.mark.parametrize("source", ["./run", "~/run", "../run", "/run/of/mine", "file"])
def test_a_path_without_a_directory_is_not_looked_for_on_the_hub(tmp_path, downloads, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is no directory: give the directory of a run, or a Hub id"):
        fetch(source)
    assert downloads == []


def test_a_repository_is_downloaded_at_its_revision_without_subfolders_and_pickles(tmp_path, downloads):
    assert fetch("org/model", "v1", token="secret") == (tmp_path / "snapshots" / "c0ffee", "c0ffee")
    (call,) = downloads
    assert (call["repository"], call["revision"], call["token"]) == ("org/model", "v1", "secret")
    taken = lambda name: (
        any(fnmatch(name, p) for p in call["allow_patterns"])
        and not any(fnmatch(name, p) for p in call["ignore_patterns"])
    )
    assert all(
        map(taken, ["model.safetensors", "routing.json", "README.md", "tokenizer.model", "LICENSE", "merges.txt"])
    )
    strange = [
        "forget/adapter_model.safetensors",
        "training_args.bin",
        "pytorch_model.bin",
        "code.py",
        ".env.json",
        "x.pt",
    ]
    assert not any(map(taken, strange))


def test_of_the_regions_only_the_one_asked_for_is_downloaded_at_the_commit_of_the_run(tmp_path, downloads):
    found = fetch_folder("org/model", "forget", commit="c0ffee", cache_dir="here")
    assert found == tmp_path / "snapshots" / "c0ffee" / "forget"
    (call,) = downloads
    assert (call["revision"], call["cache_dir"]) == ("c0ffee", "here")
    assert call["allow_patterns"] == [f"forget/{pattern}" for pattern in FOLDER_FILES]


def test_nothing_that_would_be_unpickled_is_ever_asked_for():
    for pattern in (*ROOT_FILES, *FOLDER_FILES):
        assert not any(
            fnmatch(name, pattern) for name in ("a.bin", "a.pt", "a.pth", "a.pkl", "a.ckpt", "a.py", "a.msgpack")
        )


def test_an_error_of_the_hub_says_that_there_was_no_directory(monkeypatch):
    def download(repository, **arguments):
        raise OSError("not found")

    monkeypatch.setattr(fetching, "snapshot_download", download)
    with pytest.raises(OSError, match="not found") as caught:
        fetch("org/missing")
    assert caught.value.__notes__ == [
        "'org/missing' is no directory here, so it was taken for the id of a repository on the Hub."
    ]


def test_arguments_of_the_hub_are_picked_out():
    given = {"token": None, "cache_dir": "here", "dtype": "auto", "local_files_only": True}
    assert hub_arguments(given) == {"token": None, "cache_dir": "here", "local_files_only": True}
    assert given["dtype"] == "auto"
