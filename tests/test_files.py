"""Files that are written whole, and JSON that is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from routed_peft.files import atomic_write, in_use, read_json, write_bytes, write_json


def test_an_interrupted_write_leaves_the_previous_file(tmp_path: Path) -> None:
    file = tmp_path / "deep/er/numbers.json"
    write_json(file, {"a": 1})
    assert file.read_text() == '{\n  "a": 1\n}\n'
    with pytest.raises(KeyboardInterrupt), atomic_write(file) as aside:
        aside.write_text("[")
        raise KeyboardInterrupt
    assert read_json(file) == {"a": 1} and list(file.parent.iterdir()) == [file]
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(file, {"a": float("nan")}, allow_nan=False)
    write_json(file, {"a": tmp_path}, indent=None, default=str)
    assert read_json(file) == {"a": str(tmp_path)} and len(file.read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "message"), [(b"{", "is not readable JSON"), (b"\xff", "is not readable JSON"), (b"[]", "holds a list")]
)
def test_other_content_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    write_bytes(tmp_path / "file.json", content)
    with pytest.raises(ValueError, match=f"file.json {message}"):
        read_json(tmp_path / "file.json")


def test_what_is_in_use(tmp_path: Path) -> None:
    assert not in_use(tmp_path) and not in_use(tmp_path / "missing")
    (tmp_path / "file").touch()
    assert in_use(tmp_path) and in_use(tmp_path / "file")
