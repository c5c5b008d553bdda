"""Subsets of a run's regions: their names, and one plain checkpoint for each."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from fnmatch import fnmatch
from itertools import combinations
from pathlib import Path
from typing import Any

from routed_peft.checkpoint.export import export, source_manifests
from routed_peft.checkpoint.fetch import hub_arguments
from routed_peft.checkpoint.layout import verify_files
from routed_peft.checkpoint.open_run import OpenRun
from routed_peft.checkpoint.staging import COMPANIONS, recover
from routed_peft.files import atomic_write, in_use, read_json
from routed_peft.runs.records import ABLATION

_MOST = 6
_SHARED = (*COMPANIONS, "generation_config.json")


def parse_subsets(regions: Sequence[str], subsets: Iterable[str] | None = None) -> dict[str, list[str]]:
    """Return subsets of ``regions`` by their names: ``none``, then the smaller ones before the larger.

    Args:
        regions: all regions of a run.
        subsets: names of regions joined by ``+``, ``none``, and ``all`` for all regions at once. None, or ``all`` by
            itself, is every subset.

    Raises:
        ValueError: on an unknown region, a subset that is there twice, and every subset of more than six regions.

    >>> parse_subsets(["bio", "cyber"])
    {'none': [], 'bio': ['bio'], 'cyber': ['cyber'], 'bio+cyber': ['bio', 'cyber']}
    >>> parse_subsets(["bio", "cyber"], ["cyber+bio", "none"])
    {'none': [], 'bio+cyber': ['bio', 'cyber']}
    """
    asked = ["all"] if subsets is None else list(subsets)
    if not asked:
        raise ValueError("`subsets` is empty: name some, such as none, bio and bio+cyber, or all")
    if asked == ["all"]:
        if len(regions) > _MOST:
            raise ValueError(f"`subsets` is all, and {len(regions)} regions have {2 ** len(regions)} subsets: name those "
                             "that you need, such as none, bio and bio+cyber")  # fmt: skip
        chosen = [list(names) for size in range(len(regions) + 1) for names in combinations(regions, size)]
    else:
        chosen = [_members(entry, regions) for entry in asked]
    found = {"+".join(names) or "none": names for names in sorted(chosen, key=len)}
    if len(found) < len(chosen):
        raise ValueError(f"`subsets` has a subset twice, got {asked}: name each once")
    return found


def _members(entry: str, regions: Sequence[str]) -> list[str]:
    """Return the regions of one subset, in the order of the run."""
    names = {"none": [], "all": list(regions)}.get(entry, entry.split("+"))
    if unknown := [name for name in names if name not in regions]:
        raise ValueError(f"`subsets` has the region {unknown[0]!r} in {entry!r}: the regions are {', '.join(regions)}")
    return [name for name in regions if name in names]


def export_subsets(
    src: str | Path,
    out: str | Path,
    *,
    subsets: Iterable[str] | None = None,
    revision: str | None = None,
    regions_repo: str | Path | None = None,
    **from_pretrained_kwargs: Any,
) -> dict[str, Path]:
    """Write one plain checkpoint for each subset of a run's regions, and return their directories by name.

    They are ``out/none``, ``out/bio``, ``out/bio+cyber`` and so on, each verified as by `export`. Files of tokenizer,
    license and generation are hard links, where the file system has these. A checkpoint that is there, unchanged and of
    the same run, is kept, so that the same call goes on after it was killed.

    Args:
        src: directory or Hub id of a run that `save_routed` wrote.
        out: directory that is not inside ``src``.
        subsets: as for `parse_subsets`; by default every subset.
        revision: as for `export`, like the other arguments that are not named here.

    Raises:
        ValueError: on an unknown subset, a place that something else has taken, and as `export` does.

    >>> export_subsets("./no-such-run", "out")
    Traceback (most recent call last):
    ...
    ValueError: './no-such-run' is no directory: give the directory of a run, or a Hub id
    """
    where: dict[str, Any] = {"revision": revision, "regions_repo": regions_repo}
    run = OpenRun.from_source(src, **where, **hub_arguments(from_pretrained_kwargs))
    chosen = parse_subsets(run.layout.regions, subsets)
    folders = {name: Path(out).expanduser().resolve() / name for name in chosen}
    there = {name for name, keep in chosen.items() if _is_there(folders[name], run, keep)}
    for name, folder in folders.items():  # before the first is written
        if name not in there and in_use(folder):
            raise ValueError(f"`out` has {folder}, which is no unchanged export of {name!r} from this run: name another "
                             "directory, or remove it yourself")  # fmt: skip
    for name, keep in chosen.items():
        if name not in there:
            export(src, folders[name], keep=keep, **where, **from_pretrained_kwargs)
    first, *others = folders.values()
    for folder in others:
        _share(first, folder)
    return folders


def _is_there(folder: Path, run: OpenRun, keep: list[str]) -> bool:
    """Return whether ``folder`` holds the unchanged export of a run with the regions ``keep``."""
    if not folder.is_dir():
        return False
    recover(folder)
    try:
        record = read_json(folder / ABLATION)
        verify_files(folder, record["sha256"], str(folder))
    except (OSError, ValueError, KeyError):
        return False
    same = record.get("source_manifests") == source_manifests(run, keep) and record.get("scale") == 1.0
    return same and sorted(record["regions_kept"]) == sorted(keep)


def _share(first: Path, folder: Path) -> None:
    """Replace files of ``folder`` that are the same in ``first`` by hard links, where these can be made."""
    one, other = (read_json(place / ABLATION)["sha256"] for place in (first, folder))
    for name in one.keys() & other.keys():
        alike = one[name] == other[name] and any(fnmatch(name, pattern) for pattern in _SHARED)
        if alike and not (first / name).samefile(folder / name):
            with suppress(OSError), atomic_write(folder / name) as aside:
                os.link(first / name, aside)
