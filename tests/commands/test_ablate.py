from __future__ import annotations

import json
import shutil

from cli_parts import call
from transformers import AutoModelForCausalLM


def test_ablate_writes_a_plain_checkpoint(run, tmp_path):
    result = call("ablate", run, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "forget, bio" in result.output and str(tmp_path / "out") in result.output
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not [name for name, _ in model.named_parameters() if "routed" in name]
    inspected = call("inspect", tmp_path / "out")
    assert inspected.exit_code == 0 and "plain checkpoint" in inspected.output


def test_ablate_keeps_a_region_on_request(run, tmp_path):
    result = call("ablate", run, tmp_path / "out", "--keep", "bio")
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "out/ablation.json").read_text())
    assert (record["regions_removed"], record["regions_kept"]) == (["forget"], ["bio"])


def test_ablating_a_model_that_was_trained_without_routing_is_remarked_on(run, tmp_path):
    own = shutil.copytree(run, tmp_path / "run")
    routing = json.loads((own / "routing.json").read_text())
    note = "forget belongs to"
    for kept, keep, said in ([], [], False), (["forget"], [], True), (["forget"], ["--keep", "forget"], False):
        (own / "routing.json").write_text(json.dumps({**routing, "kept_regions": kept}))
        result = call("ablate", own, tmp_path / f"{len(kept)}{len(keep)}", *keep)
        assert result.exit_code == 0, result.output
        assert (note in result.stderr) == said
