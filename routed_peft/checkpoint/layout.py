"""Layout of a saved run: its files, and checks that they are the ones that were written."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from routed_peft.checkpoint.staging import LAST, inside, leftovers, sha256
from routed_peft.files import read_json
from routed_peft.routes import Route, check_region_name, routes_from_dict

ROUTING = LAST
REGION = "region.json"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
VERSION = 1
_SHAPE = {
    "format_version": int,
    "base": {"id": str | None, "revision": str | None, "fingerprint": dict, "trained_from?": dict},
    "regions": [str],
    "base_adapters": [str],
    "routes?": {str: dict},
    "edges?": str,
    "route_layers?": [int],
    "joint?": [str],
    "files": {str: str},
    "other_files?": [str],
    "kept_regions?": [str],
    "tokens_per_route?": {str: int | float},
    "versions?": dict,
    "regions_repo?": str,
    "extra?": dict,
}
_KEYS = {"train_base", "base", "regions", "base_adapters", "routes", "files"}


@dataclass(frozen=True)
class Layout:
    """Contents of a run's directory ``root``, according to the ``data`` in its ``routing.json``."""

    root: Path
    data: Mapping[str, Any]
    source: str  # the path or Hub id that the user gave, for messages

    @classmethod
    def read(cls, root: Path, source: str) -> Layout:
        """Read ``root/routing.json``; ValueError if it is missing, was not written by `save_routed`, or names bad paths."""
        path = root / ROUTING
        if not path.is_file():
            hint = "".join(f" {sentence}" for sentence in describe_leftovers(root))
            raise ValueError(f"{source!r} has no {ROUTING}, so it is no run saved by `save_routed` (or a piece of it "
                             f"is missing; found {sorted(p.name for p in root.iterdir())[:12]}). A plain checkpoint "
                             f"loads with `AutoModelForCausalLM.from_pretrained`.{hint}")  # fmt: skip
        data = read_json(path)
        if data.get("format") != "routed_peft" or _KEYS - set(data):
            raise ValueError(f"{path} lacks {sorted(_KEYS - set(data)) or 'its format'}: restore it from a copy of the "
                             "run")  # fmt: skip
        read_json(path, _SHAPE)
        if data["format_version"] > VERSION:
            raise ValueError(f"{path} has format version {data['format_version']}, this routed_peft reads up to "
                             f"{VERSION}: upgrade it")  # fmt: skip
        for name in (*data["regions"], *data["base_adapters"]):
            check_region_name(name)
        for name in (*data["files"], *data.get("other_files", ())):
            inside(root, name)
        return cls(root, data, source)

    @property
    def regions(self) -> list[str]:
        """Names of the regions that the run had."""
        return list(self.data["regions"])

    @property
    def base_adapters(self) -> list[str]:
        """Names of the adapters that stay with the base."""
        return list(self.data["base_adapters"])

    @property
    def kept_regions(self) -> list[str]:
        """Names of the regions that belong to the model, as in an arm trained without routing.

        A run saved before this was recorded keeps all if its routes block nothing, in an ``arm`` other than "routed".
        """
        kept, file = self.data.get("kept_regions"), self.root / "run.json"
        if kept is not None or not file.is_file():
            return list(kept or ())
        routes = routes_from_dict(self.data["routes"] or {})
        if not routes or any(route != Route() for route in routes.values()):
            return []
        config = read_json(file).get("config", {})
        return self.regions if config.get("recipe", config).get("arm", "routed") != "routed" else []

    @property
    def saved_base(self) -> bool:
        """Whether `root` itself holds the base, as a plain checkpoint."""
        return self.data["base"]["id"] is None

    def check_regions(self, names: Iterable[str], argument: str = "regions") -> list[str]:
        """Return ``names`` as a list without repetitions; ValueError for a name that is not a region of this run."""
        if isinstance(names, str):
            raise ValueError(f"`{argument}` is a list of region names, got the string {names!r}: write [{names!r}]")
        names = list(dict.fromkeys(names))
        for name in names:
            if name not in self.regions:
                raise ValueError(f"`{argument}` names {name!r}; the regions of {self.source!r} are {self.regions}")
        return names

    def verify_base(self) -> None:
        """Raise ValueError unless the files directly in `root` are exactly those that were written.

        A run of an earlier version lists its weights only: the hashes of its other files are not known, and not compared.
        """
        expected = {name: hash_ for name, hash_ in self.data["files"].items() if self._owner(name) is None}
        verify_files(self.root, expected, self.source)
        if self.saved_base:
            verify_weights(self.root, expected, self.source)

    def _owner(self, name: str) -> str | None:
        """Return the adapter in whose folder a file is."""
        first = name.split("/")[0]
        return first if "/" in name and first in (*self.regions, *self.base_adapters) else None

    def verify_listed(self, name: str, folder: Path, *, only: str = "") -> None:
        """Raise ValueError unless the files of an adapter are those listed here; those whose names end with ``only``."""
        listed = {key.split("/", 1)[1]: value for key, value in self.data["files"].items() if self._owner(key) == name}
        verify_files(folder, {k: v for k, v in listed.items() if k.endswith(only)}, f"{self.source}/{name}")

    def adapter_folder(self, name: str) -> Path:
        """Return the verified folder of a region or base adapter of this run."""
        folder = self.root / name
        if not folder.is_dir():
            raise ValueError(self.missing(name))
        about = verify_adapter(inside(self.root, name), f"{self.source}/{name}")
        if about["base_fingerprint"] != self.data["base"]["fingerprint"]:
            raise ValueError(f"{name!r} in {self.source!r} belongs to another base model than the one of this run: "
                             "restore its folder from a copy of the run")  # fmt: skip
        self.verify_listed(name, folder)
        return folder

    def missing(self, name: str) -> str:
        """Return the message for an adapter whose folder is not here."""
        place = self.data.get("regions_repo") or "<id or path>"
        role = "base adapter" if name in self.base_adapters else "region"
        return (
            f"{self.source!r} lacks the folder {name!r} of the {role} of that name. Copy it there; or, where "
            f"regions have a repository or directory of their own, load with regions={{{name!r}: {place!r}}} or `regions_repo`"
        )

    def labels(self, region: str) -> list[str]:
        """Return the labels whose route trains ``region``."""
        routes = routes_from_dict(self.data["routes"] or {})
        return [label for label, route in routes.items() if route.weight(region)]


def verify_adapter(folder: Path, source: str) -> dict[str, Any]:
    """Check an adapter folder against its own ``region.json``, and return the content of that file."""
    for name in (REGION, CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            unchecked = (
                ", so nothing says which base it belongs to. `PeftModel.from_pretrained` loads an adapter unchecked"
            )
            more = unchecked if name == REGION else ": save the run again or restore it from a copy"
            raise ValueError(f"{source!r} lacks {name}{more}")
    data = read_json(folder / REGION, {"files": {str: str}, "base_fingerprint": dict})
    verify_files(folder, data["files"], source)
    return data


def verify_files(root: Path, expected: Mapping[str, str], source: str) -> None:
    """Raise ValueError if a file under ``root`` is missing, or its SHA-256 differs from that in ``expected``."""
    for name, hash_ in expected.items():
        path = inside(root, name)
        if not path.is_file():
            raise ValueError(f"{source!r} lacks the file {name}: download it again, or restore it from a copy")
        if (got := sha256(path)) != hash_:
            raise ValueError(f"{name} in {source!r} is truncated or was tampered with: its SHA-256 is {got[:16]}…, "
                             f"{hash_[:16]}… was written. Download it again, or restore it from a copy.")  # fmt: skip


def verify_weights(root: Path, expected: Container[str], source: str) -> None:
    """Raise ValueError if transformers would load weights from ``root`` that are not ``expected``."""
    strangers = {name for name in foreign_weights(root) if name not in expected}
    for index in root.glob("*.index.json"):
        entries = set(map(str, read_json(index).get("weight_map", {}).values()))
        strangers |= {name for name in entries if name not in expected or "/" in name}
    if strangers:
        raise ValueError(f"{source!r} holds {sorted(strangers)}, which `save_routed` did not write and transformers "
                         "would load: move them elsewhere, and restore an index (*.index.json) that names them from a "
                         "copy")  # fmt: skip


def describe_leftovers(root: Path) -> list[str]:
    """Return sentences about the hidden directories that interrupted saves into ``root`` left."""
    return [
        f"An interrupted save left {left}, which may hold a copy of a region, unless a process is saving now: the next save "
        "removes it, or remove it yourself."
        for left in leftovers(root)
    ]


def foreign_weights(root: Path) -> set[str]:
    """Return the names of files directly in ``root`` that transformers could load as weights or as an adapter."""
    patterns = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin", CONFIG)
    return {path.name for pattern in patterns for path in root.glob(pattern)}
