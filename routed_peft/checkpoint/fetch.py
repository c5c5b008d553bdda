"""Find a run on disk or on the Hub, and download its safe files: of the adapters, only those asked for."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from routed_peft.checkpoint.staging import COMPANIONS, recover

ROOT_FILES = ("*.safetensors", "*.json", "*.txt", "*.md", *COMPANIONS)
FOLDER_FILES = ("*.safetensors", "*.json", "*.md")
HUB_ARGUMENTS = ("token", "cache_dir", "force_download", "local_files_only")


def hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments among ``kwargs`` that concern the Hub, see `HUB_ARGUMENTS`."""
    return {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}


def fetch(
    source: str | Path, revision: str | None = None, patterns: Iterable[str] = ROOT_FILES, **arguments: Any
) -> tuple[Path, str | None]:
    """Return the directory with the files of ``source``, and their commit (None for a directory).

    An interrupted save into a directory is completed. Of the repository of a Hub id, files that match ``patterns`` are
    downloaded, except those in sub-folders (see `fetch_folder`) and those that would have to be unpickled. ValueError if
    ``source`` is neither, or ``revision`` is given with a directory; ``HfHubHTTPError`` if the Hub refuses.
    """
    local = Path(source).expanduser()
    if local.is_dir():
        if revision is not None:
            raise ValueError(f"`revision` needs a Hub id, got {revision!r} with the directory {str(source)!r}: leave "
                             "it out")  # fmt: skip
        recover(local)
        return local.resolve(), None
    if local.is_absolute() or str(source).startswith((".", "~")) or local.exists():
        raise ValueError(f"{str(source)!r} is no directory: give the directory of a run, or a Hub id")
    arguments |= {"allow_patterns": list(patterns), "ignore_patterns": ["*/*", ".*", "training_args.bin"]}
    try:
        folder = Path(snapshot_download(str(source), revision=revision, **arguments))
    except Exception as error:
        error.add_note(f"{str(source)!r} is no directory here, so it was taken for the id of a repository on the Hub.")
        raise
    return folder, folder.name


def fetch_folder(
    source: str | Path, folder: str, *, commit: str | None, patterns: Iterable[str] = FOLDER_FILES, **arguments: Any
) -> Path:
    """Return the sub-directory ``folder`` of the source of `fetch`; it is downloaded where ``commit`` is given."""
    if commit is None:
        return Path(source).expanduser().resolve() / folder
    wanted = [f"{folder}/{pattern}" for pattern in patterns]
    root = snapshot_download(str(source), revision=commit, allow_patterns=wanted, **arguments)
    return Path(root) / folder
