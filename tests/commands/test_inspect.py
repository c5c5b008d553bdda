from __future__ import annotations

import json

from cli_parts import call


def test_inspect_shows_regions_and_routes(run):
    result = call("inspect", run)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert any("trained base" in line for line in lines)
    assert any("forget 12,000" in line for line in lines)
    bio = next(line for line in lines if "│ bio " in line and "ROUTED" in line)
    assert [cell.strip() for cell in bio.strip("│").split("│")][3:5] == ["size 4", "384"]  # 2 layers x 3 x 4 x 16
    assert any("base 0.5" in line for line in lines) and any("all 1" in line for line in lines)


def test_inspect_as_json_and_of_a_single_region(run):
    assert [entry["name"] for entry in json.loads(call("inspect", run, "--json").stdout)["regions"]] == [
        "forget",
        "bio",
    ]
    result = call("inspect", run / "bio")
    assert result.exit_code == 0 and "ROUTED" in result.output and "384" in result.output


def test_inspect_fails_where_a_file_is_missing(run, tmp_path):
    damaged = tmp_path / "run"
    for file in run.rglob("*"):
        if file.is_file() and file.relative_to(run).as_posix() != "bio/adapter_model.safetensors":
            copy = damaged / file.relative_to(run)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    result = call("inspect", damaged)
    assert result.exit_code == 1
    assert "problem:" in result.stderr and "bio" in result.stderr
