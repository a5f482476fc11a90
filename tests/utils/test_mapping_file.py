"""Small files of plain values: one mapping, or one error that names the file."""

import pytest

from lora_lightning.errors import AdapterFileError
from lora_lightning.utils.mapping_file import read_mapping, read_values

SAME = {"a": 1, "b": ["x", None, True]}


@pytest.mark.parametrize(
    ("name", "text"),
    [("x.json", '{"a": 1, "b": ["x", null, true]}'), ("x.yaml", "a: 1\nb: [x, null, true]\n")],
)
def test_both_formats_give_plain_values(name, text, tmp_path):
    path = tmp_path / name
    path.write_text(text)
    assert read_mapping(path, "Give another.") == SAME


FAULTS = [
    ("x.json", b'{"a": ', "cannot be read: Expecting value"),
    ("x.json", b'{"a": "\xff"}', "cannot be read: 'utf-8' codec"),
    ("x.json", b"[1, 2]", "is damaged: it holds no mapping"),
    ("x.json", b"[" * 100_000, "cannot be read"),
    ("x.yaml", b"a: [1", "cannot be read: while parsing"),
    (
        "x.yaml",
        b"a: !!python/object/apply:os.system [true]",
        "cannot be read: could not determine a constructor",
    ),
    ("x.yaml", b"just text", "is damaged: it holds no mapping"),
    ("gone.yaml", None, "cannot be read: No such file"),
]


@pytest.mark.parametrize(("name", "content", "told"), FAULTS)
def test_anything_else_is_one_message(name, content, told, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(AdapterFileError, match=rf"{name} {told}.*\. Give another\.$"):
        read_mapping(path, "Give another.")


def test_an_empty_file_holds_nothing_and_a_huge_one_is_not_read(tmp_path):
    path = tmp_path / "x.yaml"
    path.touch()
    assert read_mapping(path, "") == {}
    path.write_text("abcdef: 1")
    with pytest.raises(AdapterFileError, match="cannot be read: it is larger"):
        read_values(path, "", largest=8)
