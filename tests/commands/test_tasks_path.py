from __future__ import annotations

from pathlib import Path

from cli_parts import call


def test_the_directory_holds_the_tasks_and_nothing_else_is_printed():
    result = call("tasks-path")
    place = Path(result.output.removesuffix("\n"))
    assert result.exit_code == 0 and place.is_dir() and "\n" not in str(place)
    assert {"routed_mc.yaml", "routed_loss.yaml"} <= {path.name for path in place.glob("*.yaml")}
