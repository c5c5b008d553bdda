"""A subspace region whose base is sharded over two processes."""

from places import PARTS
from two_processes import in_two_processes


def test_sharded_weights_are_put_back_too(tmp_path):
    in_two_processes(PARTS / "subspace_worker.py", tmp_path)
    assert (tmp_path / "done").exists()
