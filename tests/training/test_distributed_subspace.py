"""A subspace region whose base is sharded over two processes."""

import os
import subprocess
import sys

from places import PARTS


def test_sharded_weights_are_put_back_too(tmp_path):
    worker = PARTS / "subspace_worker.py"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(worker)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, str(tmp_path)], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "done").exists()
