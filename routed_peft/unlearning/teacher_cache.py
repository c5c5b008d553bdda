"""A frozen teacher's likeliest outputs on disk, so that it runs over the text only once."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from routed_peft.eval_mode import evaluating
from routed_peft.files import atomic_write, read_json, write_json
from routed_peft.regions.fingerprint import fingerprint
from routed_peft.unlearning.data import Rows, collate, input_ids, run_on
from routed_peft.unlearning.losses import at_least_float32, topk_log_probs

ABOUT = "teacher.json"
SHARD = 256
NAMES = ("values", "entries", "tail")


class TeacherCache:
    """The ``k`` likeliest next tokens of a teacher at every position of some rows, and the remaining probability.

    On disk ``teacher.json`` identifies teacher and rows, and ``outputs-00000.safetensors`` and so on hold 256 rows each:
    ``values`` ``(N, T - 1, k)`` in float32, ``entries`` ``(N, T - 1, k)`` in int32, ``tail`` ``(N, T - 1)`` in float32, of
    `topk_log_probs`. ``cache[i]`` returns those of row ``i``; ``folder`` was made by `make`.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.about: dict[str, Any] = read_json(self.folder / ABOUT)
        self.tokens: int = self.about["tokens"]
        """Tokens on which the teacher was run, in this call and earlier ones."""

    @classmethod
    @torch.no_grad()
    def make(cls, folder: str | Path, teacher: nn.Module, *, rows: Rows, k: int, batch_size: int = 16) -> TeacherCache:
        """Run ``teacher`` over ``rows`` and store its outputs; processes share the work.

        Args:
            folder: a new one, or that of an earlier call with the same teacher, rows and ``k``, which is continued.
            k: outputs to keep per position; at most the size of the vocabulary.

        Raises:
            ValueError: if ``k`` is out of range, or the folder holds outputs of another teacher or on other rows.
        """
        folder, state = Path(folder), PartialState()
        vocabulary = teacher.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
        if not 0 < k <= vocabulary:
            raise ValueError(f"`k` must be between 1 and {vocabulary}, the size of the vocabulary, got {k}")
        tokens = sum(len(ids) for ids in input_ids(rows))
        about = {
            "k": k, "rows": len(rows), "tokens": tokens, "rows_sha256": hash_rows(rows), "teacher": fingerprint(teacher)
        }  # fmt: skip
        if (folder / ABOUT).is_file():
            if (found := read_json(folder / ABOUT)) != about:
                odd = next(key for key in about.keys() | found.keys() if about.get(key) != found.get(key))
                raise ValueError(f"{folder} holds outputs with another `{odd}`: name another directory, or remove it")
        elif state.is_main_process:
            write_json(folder / ABOUT, about)
        missing = [i for i in range(-(-len(rows) // SHARD)) if not _path(folder, i).is_file()]
        state.wait_for_everyone()  # all know the missing files before anyone writes one
        mine = missing[state.process_index :: state.num_processes]
        quiet = not state.is_main_process or len(mine) < 2
        for i in tqdm(mine, desc="the teacher's outputs", unit="file", disable=quiet, leave=False):
            chosen = range(i * SHARD, min((i + 1) * SHARD, len(rows)))
            with evaluating(teacher):  # without dropout
                _store(_path(folder, i), teacher, rows=[rows[j] for j in chosen], k=k, batch_size=batch_size)
        state.wait_for_everyone()
        return cls(folder)

    def __len__(self) -> int:
        return int(self.about["rows"])

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        with safe_open(_path(self.folder, row // SHARD), framework="pt") as file:
            values, entries, tail = (file.get_slice(name)[row % SHARD] for name in NAMES)
        return values, entries.long(), tail


def _path(folder: Path, shard: int) -> Path:
    return folder / f"outputs-{shard:05d}.safetensors"


def _store(path: Path, teacher: nn.Module, *, rows: list[Any], k: int, batch_size: int) -> None:
    length = max(len(row["input_ids"]) for row in rows) - 1
    shape = (len(rows), length, k)
    stores = (torch.zeros(shape), torch.zeros(shape, dtype=torch.int32), torch.zeros(shape[:2]))
    device = next(teacher.parameters()).device
    for start in range(0, len(rows), batch_size):
        batch = {name: tensor.to(device) for name, tensor in collate(rows[start : start + batch_size]).items()}
        logits = run_on(teacher, batch).logits[:, :-1]
        found = topk_log_probs(at_least_float32(logits), k)
        for store, new in zip(stores, found, strict=True):
            store[start : start + batch_size, : logits.shape[1]] = new.to(store)
    with atomic_write(path) as aside:
        save_file(dict(zip(NAMES, stores, strict=True)), aside)


def hash_rows(rows: Rows) -> str:
    """Return the SHA-256 of the tokens of rows."""
    digest = hashlib.sha256()
    for ids in input_ids(rows):
        digest.update(np.array([len(ids), *ids], dtype=np.int64).tobytes())
    return digest.hexdigest()
