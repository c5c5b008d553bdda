from __future__ import annotations

import pytest
from report_parts import attacked_checkpoint, write

from routed_peft.report.reading import read_sources


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "does not exist"),
        ("{", "is not JSON"),
        ({"sizes": {}}, "is no summary of relearning"),
        ([1], "is no summary of relearning"),
        ({"kind": "relearning", "format": 0}, "has the format 0"),
    ],
)
def test_a_file_that_is_no_summary_is_refused(tmp_path, content, message):
    file = tmp_path / "summary.json"
    if content is not None:
        write(file, content)
    with pytest.raises(ValueError, match=message) as error:
        read_sources([file])
    assert str(file) in str(error.value)


def test_a_directory_stands_for_all_summaries_in_it(tmp_path):
    with pytest.raises(ValueError, match="at least one summary"):
        read_sources([])
    write(tmp_path / "other.json", {"a": 1})
    (tmp_path / "tsconfig.json").write_text("{ // no JSON")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(ValueError, match="holds no summary of relearning"):
        read_sources([tmp_path])
    files = [attacked_checkpoint(tmp_path, name) for name in ("rmu", "npo")]
    found = read_sources([tmp_path, files[0]])
    assert [source.name for source in found] == ["npo", "rmu"], "each once"
    assert found[1].run == {"command": "routed-peft relearn org/model"}
    write(tmp_path / "broken" / "summary.json", "{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_sources([tmp_path])
