"""A process whose Hub is a local server; it runs a user's code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hub_server import Hub, hub

_WORKER = """
import json, os, sys, warnings
answers = os.fdopen(os.dup(1), "w", buffering=1)
sys.stdout = sys.stderr
from pathlib import Path
import torch
torch.set_num_threads(1)
from checkpoint_parts import logits, lora
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from routed_peft.checkpoint.export import ablate, export
from routed_peft.checkpoint import inspect_checkpoint, load_routed, push_to_hub, save_routed
warnings.simplefilter("error")
warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing", FutureWarning)
warnings.filterwarnings("ignore", "Use 'content=", DeprecationWarning)  # huggingface_hub's uploads
warnings.filterwarnings("ignore", "Cannot enable progress bars")  # Trainer turns them off and on around its pushes
scope = dict(globals())
for line in sys.stdin:
    result = None
    names = {**scope, **json.loads(line)}
    try:
        exec(names["code"], names)
        answer = {"result": names.get("result")}
    except Exception as error:
        answer = {"error": type(error).__name__, "message": "\\n".join([str(error), *getattr(error, "__notes__", [])])}
    answers.write(json.dumps(answer) + "\\n")
answers.close()
"""


class Worker:
    """A process that runs code with a local server as its Hub."""

    def __init__(self, server: Hub, home: Path) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE"))}
        here = str(Path(__file__).parent)
        environment = {
            **kept,
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "PYTHONPATH": os.pathsep.join([here, str(Path(here).parent)]),
        }
        self.server = server
        self.log = (home / "log").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-c", _WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env=environment,
            text=True,
        )

    def run(self, code: str, **names: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"code": code, **names}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def __call__(self, code: str, **names: Any) -> Any:
        """Run ``code`` and return its variable ``result``."""
        answer = self.run(code, **names)
        assert "error" not in answer, answer
        return answer["result"]

    def logits(self, model: str, **names: Any) -> torch.Tensor:
        return torch.tensor(self(f"result = logits({model}).tolist()", **names))


@contextmanager
def working(home: Path) -> Iterator[Worker]:
    """Serve, with a worker in ``home``, until the block ends."""
    with hub() as server:
        worker = Worker(server, home)
        try:
            yield worker
        finally:
            worker.process.communicate()
            worker.log.close()
