"""A saved run, opened once: its layout, the commit it comes from, and how to reach the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from routed_peft.checkpoint.fetch import fetch, fetch_folder
from routed_peft.checkpoint.layout import CONFIG, Layout, verify_adapter
from routed_peft.routes import check_region_name


@dataclass(frozen=True)
class OpenRun:
    """A run whose own files are on this machine; its adapters are downloaded when they are asked for."""

    layout: Layout
    commit: str | None = None  # of the repository; None for a directory
    hub: Mapping[str, Any] = field(default_factory=dict)  # arguments for further downloads, see `hub_arguments`
    regions_repo: str | Path | None = None  # place of regions that are elsewhere, instead of the one that the run names

    @classmethod
    def from_source(
        cls, src: str | Path, revision: str | None = None, *, regions_repo: str | Path | None = None, **hub: Any
    ) -> OpenRun:
        """Open the run in a directory or a repository of the Hub; errors as in `load_routed`."""
        root, commit = fetch(src, revision, **hub)
        return cls(Layout.read(root, str(src)), commit, hub, regions_repo)

    def adapter_folder(self, name: str) -> Path:
        """Return the folder of a region or base adapter, downloaded (a region perhaps from its own repository) and verified.

        ValueError if a file is missing or is not the one that was written, or a region cannot be read where it is stored.
        """
        folder, problem = self._find(name)
        if folder is None:
            raise ValueError(problem)
        return folder

    def regions_here(self) -> list[str]:
        """Return the regions that are stored with the run, or can be read from their repository."""
        return [name for name in self.layout.regions if self._find(name)[0] is not None]

    def _find(self, name: str) -> tuple[Path | None, str]:
        """Return the verified folder of an adapter, or None and the reason why it cannot be read."""
        if self.commit is not None:
            fetch_folder(self.layout.source, name, commit=self.commit, **self.hub)
        if name not in self.layout.regions or (self.layout.root / name).is_dir():
            return self.layout.adapter_folder(name), ""
        place, problem = self.regions_repo or self.layout.data.get("regions_repo"), self.layout.missing(name)
        if not place:
            return None, problem
        try:
            if not Path(place).expanduser().is_dir() and not self.hub.get("local_files_only"):
                with suppress(*[OSError] * constants.HF_HUB_OFFLINE):  # a cached copy says nothing about the token
                    HfApi(token=self.hub.get("token")).repo_info(str(place))
            return find_region(name, place, **self.hub), ""
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
            return None, f"{problem} ({type(error).__name__} at {place}: is it there, and may the token read it?)"

    def configuration_folder(self, name: str) -> Path:
        """Return the folder of an adapter, which may be missing; from the Hub, only its JSON files are downloaded."""
        if self.commit is None:
            return self.layout.root / name
        return fetch_folder(self.layout.source, name, commit=self.commit, patterns=["*.json"], **self.hub)


def find_region(name: str, place: str | Path, **hub: Any) -> Path:
    """Return the verified folder of a region that is stored by itself; errors as in `load_routed`."""
    check_region_name(name)
    root, commit = fetch(place, **hub)
    folder = root if (root / CONFIG).is_file() else fetch_folder(place, name, commit=commit, **hub)
    if not folder.is_dir():
        raise ValueError(f"{str(place)!r} is no region, and has no folder {name!r} that could be one")
    verify_adapter(folder, str(place))
    return folder
