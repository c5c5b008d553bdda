"""Push a run to the Hub: the base to one repository and its regions to another, since access is per repository."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from routed_peft.checkpoint.layout import CONFIG, REGION, ROUTING, WEIGHTS, Layout
from routed_peft.checkpoint.model_card import model_card
from routed_peft.checkpoint.open_run import OpenRun
from routed_peft.checkpoint.staging import COMPANIONS, files_in, inside, sha256
from routed_peft.deprecation import formerly_positional
from routed_peft.files import read_json

Files = dict[str, Path | str]
"""Path in a repository -> local file or content."""

_PLAIN = ("config.json", "generation_config.json", "model.safetensors.index.json")


@formerly_positional("regions_repo", "private", "token", "revision")
def push_to_hub(
    src: str | Path,
    repo: str,
    *,
    regions_repo: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    regions_private: bool = True,
    commit_message: str = "Upload with routed_peft",
) -> dict[str, str]:
    """Push a saved run: the base, its adapters and tokenizer to ``repo``, the regions only to ``regions_repo``.

    Regions, ``training_args.bin``, optimizer states and ``checkpoint-…`` never reach ``repo``. The regions'
    configurations point to ``repo`` and the pushed commit. Each repository gets a model card with the regions, the
    labels that trained them, and how to load them.

    Args:
        src: directory that `save_routed` wrote.
        repo: Hub id for the base; made if it does not exist.
        regions_repo: Hub id for the regions; None leaves them here.
        private: whether a new ``repo`` is private; None for the organization's default.
        token: Hub token; by default that of the login.
        revision: branch to push to; made if it does not exist.
        regions_private: whether ``regions_repo`` must be private. False makes a new one public.
        commit_message: of the commits.

    Returns:
        ``{"repo": commit hash}``, and ``"regions_repo"`` likewise.

    Raises:
        ValueError: both ids are the same, ``repo`` already holds a region, ``regions_repo`` is public against
            ``regions_private``, the frozen base is a local directory, or files of the run are missing or damaged.
        huggingface_hub.errors.HfHubHTTPError: the Hub refused a request.

    >>> push_to_hub("run", "org/model", regions_repo="org/model")
    Traceback (most recent call last):
    ...
    ValueError: `regions_repo` must be another repository than `repo` ('org/model'): access is per repository
    """
    if regions_repo == repo:
        raise ValueError(f"`regions_repo` must be another repository than `repo` ({repo!r}): access is per repository")
    layout = _verified_layout(Path(src).expanduser(), regions=regions_repo is not None)
    api = HfApi(token=token)
    repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
    if regions_repo is not None:
        regions_repo = api.create_repo(regions_repo, private=regions_private, exist_ok=True).repo_id
        if regions_private and not api.repo_info(regions_repo).private:
            raise ValueError(f"`regions_repo` {regions_repo!r} exists and is public: make it private, name another, or "
                             "say `regions_private=False`. Nothing was pushed.")  # fmt: skip
    commit = partial(_commit, api, revision=revision, message=commit_message)
    commits = {"repo": commit(repo, files=_base_files(layout, repo, regions_repo), barred=layout.regions)}
    if regions_repo is not None:
        at = (repo, commits["repo"]) if layout.saved_base else None
        files = _region_files(layout, layout.regions, at)
        files["README.md"] = model_card(layout, repo, regions_repo=regions_repo, of_regions=True)
        commits["regions_repo"] = commit(regions_repo, files=files)
    return commits


def _verified_layout(src: Path, *, regions: bool) -> Layout:
    """Return the layout of the run in the directory ``src``, its base and adapters verified, ``regions`` included or not."""
    if not src.is_dir():
        raise ValueError(f"{str(src)!r} is no directory: give one that `save_routed` wrote")
    layout = OpenRun.from_source(src).layout
    layout.verify_base()
    if not layout.saved_base and Path(layout.data["base"]["id"]).is_absolute():
        raise ValueError(f"the base of {layout.source!r} is the local directory {layout.data['base']['id']}, which nobody "
                         "else can load: push it to the Hub and train from there, or save with `train_base=True`")  # fmt: skip
    for name in (*layout.base_adapters, *(layout.regions if regions else ())):
        layout.adapter_folder(name)
    return layout


def _base_files(layout: Layout, repo: str, regions_repo: str | None) -> Files:
    """Return the files for ``repo``."""
    listed = {name: hash_ for name, hash_ in layout.data["files"].items() if "/" not in name}
    patterns = (*_PLAIN, *COMPANIONS)
    own = [name for name in files_in(layout.root) if name in listed or _matches(name, patterns)]
    files: Files = {name: inside(layout.root, name) for name in own}
    files |= _region_files(layout, layout.base_adapters, (repo, None) if layout.saved_base else None)
    record = {**layout.data, "regions_repo": regions_repo, "other_files": []}
    record["files"] = {name: listed.get(name) or _hash(content) for name, content in files.items()}
    source = (layout.data["base"].get("trained_from") or {}).get("id")
    if layout.saved_base and source is not None and Path(source).is_absolute():  # a path says nothing to others
        record["base"] = {**layout.data["base"], "trained_from": None}
    files[ROUTING] = json.dumps(record, indent=2) + "\n"
    files["README.md"] = model_card(layout, repo, regions_repo=regions_repo, of_regions=False)
    return files


def _hash(content: Path | str) -> str:
    return sha256(content) if isinstance(content, Path) else hashlib.sha256(content.encode()).hexdigest()


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(name.count("/") == pattern.count("/") and fnmatch(name, pattern) for pattern in patterns)


def _region_files(layout: Layout, names: Iterable[str], base: tuple[str, str | None] | None) -> Files:
    """Return the files of adapters; their configurations name ``base`` (id, revision) if it is given."""
    files: Files = {}
    for name in names:
        folder = layout.root / name
        config, about = read_json(folder / CONFIG), read_json(folder / REGION)
        if base is not None:
            config["base_model_name_or_path"], config["revision"] = base
            about["base"] = {"id": base[0], "revision": base[1]}
        text = json.dumps(config, indent=2) + "\n"
        about["files"] |= {CONFIG: _hash(text)}
        contents: Files = {CONFIG: text, REGION: json.dumps(about, indent=2) + "\n", WEIGHTS: folder / WEIGHTS}
        files |= {f"{name}/{file}": content for file, content in contents.items()}
    return files


def _commit(
    api: HfApi, repo: str, *, files: Files, revision: str | None, message: str, barred: Iterable[str] = ()
) -> str:
    """Commit ``files``, delete those that they replace, and return the commit; ValueError if a folder there is ``barred``."""
    if revision is not None:
        api.create_branch(repo, branch=revision, exist_ok=True)
    there = api.list_repo_files(repo, revision=revision)
    if leaked := [name for name in there if name.split("/")[0] in set(barred) and "/" in name]:
        raise ValueError(f"`repo` {repo!r} already holds {leaked[0]!r}, of a region: whoever can read the base can "
                         "read that. Delete it there (its history keeps it), or name another repository. Nothing was "
                         "pushed.")  # fmt: skip
    stale = [n for n in there if _matches(n, ("*.safetensors", "*.index.json", CONFIG)) and n not in files]
    contents = {name: text.encode() if isinstance(text, str) else text for name, text in files.items()}
    operations: list[Any] = [CommitOperationDelete(path_in_repo=name) for name in stale]
    operations += [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in contents.items()]
    return api.create_commit(repo, operations, commit_message=message, revision=revision).oid
