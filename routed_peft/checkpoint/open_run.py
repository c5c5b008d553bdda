"""A saved run, opened once: its layout, the commit it comes from, and how to reach the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from routed_peft.checkpoint.fetch import fetch, fetch_folder
from routed_peft.checkpoint.layout import Layout


@dataclass(frozen=True)
class OpenRun:
    """A run whose own files are on this machine; its adapters are downloaded when they are asked for."""

    layout: Layout
    commit: str | None = None  # of the repository; None for a directory
    hub: Mapping[str, Any] = field(default_factory=dict)  # arguments for further downloads, see `hub_arguments`

    @classmethod
    def from_source(cls, src: str | Path, revision: str | None = None, **hub: Any) -> OpenRun:
        """Open the run in a directory or a repository of the Hub.

        Raises:
            ValueError: ``src`` is not a run that `save_routed` wrote.
            huggingface_hub.errors.HfHubHTTPError: the repository is missing or gated, or there is no network.

        >>> OpenRun.from_source("./no-such-run")
        Traceback (most recent call last):
        ...
        ValueError: './no-such-run' is no directory: give the directory of a run, or a Hub id
        """
        root, commit = fetch(src, revision, **hub)
        return cls(Layout.read(root, str(src)), commit, hub)

    def adapter_folder(self, name: str) -> Path:
        """Return the folder of a region or base adapter, downloaded and verified.

        Raises:
            ValueError: a file is missing or is not the one that was written.
        """
        if self.commit is not None:
            fetch_folder(self.layout.source, name, commit=self.commit, **self.hub)
        return self.layout.adapter_folder(name)

    def configuration_folder(self, name: str) -> Path:
        """Return the folder of an adapter, which may be missing; from the Hub, only its JSON files are downloaded."""
        if self.commit is None:
            return self.layout.root / name
        return fetch_folder(self.layout.source, name, commit=self.commit, patterns=["*.json"], **self.hub)
