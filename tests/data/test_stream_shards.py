"""Shards one by one: found by pattern, indexed, checked; what is wrong is told with what there is."""

from __future__ import annotations

import gzip
import json
import os
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from litdata.streaming.writer import BinaryWriter

from lora_lightning.data import stream_tar
from lora_lightning.data.findings import DataError, Findings
from lora_lightning.data.stream_litdata import LitdataShards
from lora_lightning.data.stream_parquet import ParquetShards
from lora_lightning.data.stream_sources import OpenFiles, expand_braces, find_shards
from lora_lightning.data.stream_tar import TarShards
from lora_lightning.errors import ConfigError, MissingFileError
from lora_lightning.utils.libraries import LibraryError
from tests.data.shards import members, write_litdata, write_parquet, write_tar, write_tars
from tests.data.shards import picture as make_picture


def tars(names: list[str], tmp_path: Path, strict: bool = True) -> TarShards:
    findings = Findings("The shards")
    shards = TarShards(names, tmp_path / "index", "label", 4, findings)
    findings.settle(strict)
    return shards


def test_braces():
    assert expand_braces("source", "a-{08..10}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert expand_braces("source", "{b,a}/{0..1}.tar") == ["b/0.tar", "b/1.tar", "a/0.tar", "a/1.tar"]
    for bad, words in (
        ("a-{0..9.tar", "braces that do not close"),
        ("a-{9..0}.tar", "counts 0 shards"),
        ("a-{0..9999999}.tar", "counts 10,000,000 shards; give 1 to 100,000"),
        ("a-{0-9}.tar", "is no range and no choice"),
    ):
        with pytest.raises(ConfigError) as error:
            expand_braces("data.source", bad)
        assert f"data.source={bad}: " in str(error.value) and words in str(error.value)


def test_patterns_find_what_is_there(tmp_path):
    pattern = write_tars(tmp_path / "s", [1, 1, 1])
    files = [str(tmp_path / "s" / f"train-00{i}.tar") for i in range(3)]
    for source in (
        pattern,
        str(tmp_path / "s" / "*.tar"),
        str(tmp_path / "s"),
        files,
        f"file://{tmp_path}/s/*.tar",
    ):
        kind, names = find_shards("data.source", source)
        assert kind == "tar"
        assert [n.removeprefix("file://") for n in names] == files
    assert find_shards("s", str(write_litdata(tmp_path / "l", [(b"a", 1)], 1))) == (
        "litdata",
        [str(tmp_path / "l")],
    )


def test_an_address_is_read_as_a_file_is(tmp_path):
    import fsspec

    file = write_tar(tmp_path / "a.tar", {str(n): members(n) for n in range(3)})
    fsspec.filesystem("memory").pipe("/shards/a.tar", file.read_bytes())
    kind, names = find_shards("data.source", "memory://shards/*.tar")
    shards = tars(names, tmp_path)
    assert (kind, shards.counts, shards.read(0, 2)) == ("tar", [3], (make_picture(2), 2))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            "s/train-{000..004}.tar",
            ("2 of 5 files are not there", "train-003.tar", "near miss", "train-000.tar"),
        ),
        ("s/trian-000.tar", ("it is not there", "Did you mean 'train-000.tar'")),
        ("nowhere/deep/*.tar", ("there is no folder", "is the last one that there is")),
        ("s", ()),
    ],
)
def test_files_that_are_not_there(tmp_path, source, words):
    write_tars(tmp_path / "s", [1, 1, 1])
    if not words:
        return
    with pytest.raises(MissingFileError) as error:
        find_shards("data.source", str(tmp_path / source))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_files_of_no_known_kind(tmp_path):
    for name in ("a.zip", "a.tar.gz", "a.tar", "a.parquet"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for source, words in (
        ("a.zip", "is of no known kind; give .tar"),
        ("a.tar.gz", "a packed archive cannot be read from its middle; unpack it"),
        ("a.{tar,parquet}", "names shards of several kinds, tar: "),
        ("empty", "the folder holds no shards"),
    ):
        with pytest.raises(ConfigError) as error:
            find_shards("data.source", str(tmp_path / source))
        assert words in str(error.value)
    with pytest.raises(ConfigError, match=r"s4:// is no address that fsspec knows. Did you mean 's3'"):
        find_shards("data.source", "s4://bucket/a.tar")


@pytest.mark.parametrize(
    ("said", "packages"),
    [
        ("Install s3fs to access S3", "s3fs"),
        ("Install the requests package to use the github FS", "requests"),
        ('HTTPFileSystem requires "requests" and "aiohttp" to be installed', "requests aiohttp"),
    ],
)
def test_an_address_whose_package_is_missing(said, packages, monkeypatch):
    import fsspec

    def missing(name: str) -> None:
        raise ImportError(said)

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(LibraryError, match=rf"data.source=s3://b/a.tar: {said}: pip install {packages}$"):
        find_shards("data.source", "s3://b/a.tar")


def test_labels_in_each_kind_of_member(tmp_path):
    png = make_picture(1)
    file = write_tar(
        tmp_path / "a.tar",
        {
            "x/1": {"png": png, "cls": b"2\n"},
            "y/1": {"PNG": png, "json": b'{"label": 1}', "txt": b"a caption"},
            "y/2.jpg": {"cls": b"3", "png": png},  # `2` is the key, `jpg.png` what follows
            "._y": {"png": b"junk"},
        },
    )
    shards = tars([str(file)], tmp_path)
    assert [shards.read(0, i) for i in range(3)] == [(png, 2), (png, 1), (png, 3)]


def test_what_cannot_be_used_is_told_or_left_out(tmp_path):
    png = make_picture(1)
    whole = write_tar(tmp_path / "a.tar", {str(n): members(n) for n in range(4)})
    cut = tmp_path / "b.tar"
    cut.write_bytes(whole.read_bytes()[:3500])  # within the second sample's label
    bad = write_tar(
        tmp_path / "c.tar",
        {
            "1": members(1),
            "2": {"png": png[:-30], "cls": b"1"},
            "3": {"png": b"", "cls": b"1"},
            "4": {"jpg": b"text", "cls": b"1"},
            "5": {"png": png},
            "6": {"cls": b"1"},
            "7": {"png": png, "json": b"{"},
        },
    )
    names = [str(f) for f in (whole, cut, bad)]
    with pytest.raises(DataError) as error:
        tars(names, tmp_path)
    for words in (
        "a shard that is cut short", str(cut), "its whole samples are kept",
        "a truncated picture", f"{bad}: 2", "an empty file", "a file that is no picture",
        "a picture without a label", "a sample without a picture",
    ):  # fmt: skip
        assert words in str(error.value)
    assert tars(names, tmp_path, strict=False).counts == [4, 1, 1]


@pytest.mark.parametrize("size", [100, 700, 1024, 5120])
def test_a_shard_cut_anywhere(tmp_path, size):
    """In a header, in a picture, between two members, and where only the end mark lacks."""
    whole = write_tar(tmp_path / "a.tar", {str(n): members(n) for n in range(3)}).read_bytes()
    file = tmp_path / "b.tar"
    file.write_bytes(whole[:size])
    with pytest.raises(DataError, match="a shard that is cut short"):
        tars([str(file)], tmp_path)


def test_the_index_is_made_once_and_again_when_the_shard_changes(tmp_path, monkeypatch):
    file = write_tar(tmp_path / "a.tar", {"1": members(1)})
    made = []
    make = stream_tar.make_index
    monkeypatch.setattr(stream_tar, "make_index", lambda *args: made.append(1) or make(*args))
    assert [tars([str(file)], tmp_path).counts for _ in range(2)] == [[1], [1]]
    assert len(made) == 1
    write_tar(file, {str(n): members(n) for n in range(9)})
    assert tars([str(file)], tmp_path).counts == [9]
    assert len(made) == 2


def test_indexing_reads_little_of_the_pictures(tmp_path):
    """Headers, labels and the ends of pictures: a tenth of a shard of pictures of 60 kB."""
    big = make_picture(1)[:-12] + bytes(60_000) + make_picture(1)[-12:]
    file = write_tar(tmp_path / "a.tar", {str(n): {"png": big, "cls": b"0"} for n in range(20)})
    read = [0]

    class Counted:
        def __init__(self, opened):
            self.opened = opened

        def read(self, size=-1):
            data = self.opened.read(size)
            read[0] += len(data)
            return data

        def __getattr__(self, name):
            return getattr(self.opened, name)

    with open(file, "rb", buffering=0) as opened:
        index = stream_tar.make_index(Counted(opened), file.stat().st_size, "a.tar", "label")
    assert len(index.offsets) == 20
    assert read[0] < file.stat().st_size / 10


def test_parquet_columns(tmp_path):
    file = str(write_parquet(tmp_path / "a.parquet", range(4), 2))
    for image, label, words in (
        ("img", "label", "data.image=img: .* has no such column. Did you mean 'image'"),
        ("image", "fine_label", "data.label=fine_label: .* Did you mean 'label'"),
        ("label", "label", "data.image=label: the column of .* is of int64; give one that holds pictures"),
    ):
        with pytest.raises(DataError, match=words):
            ParquetShards([file], image, label, 2, 1000, Findings("x"))


def test_a_parquet_file_cut_short(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", range(4), 2)
    file.write_bytes(file.read_bytes()[:-20])
    findings = Findings("x")
    assert ParquetShards([str(file)], "image", "label", 2, 1000, findings).counts == []
    assert findings.count("a file that cannot be read as Parquet") == 1


def test_parquet_without_names_tells_its_labels(tmp_path):
    pq.write_table(pa.table({"image": [b"x"] * 3, "label": ["b", "a", None]}), tmp_path / "a.parquet")
    shards = ParquetShards([str(tmp_path / "a.parquet")], "image", "label", 2, 1000, Findings("x"))
    assert (shards.labels, shards.class_names, shards.labels_of(0)) == ({"a", "b"}, None, ["b", "a", None])


def test_litdata_runs_nothing_that_a_file_says(tmp_path):
    """Items of a kind that litdata pickles are refused before one is read."""

    class Attack:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    writer = BinaryWriter(str(tmp_path / "l"), chunk_size=2)
    writer[0] = {"image": b"x", "label": Attack()}
    writer.done()
    writer.merge()
    with pytest.raises(DataError, match="its items hold pickle, which is not read"):
        LitdataShards([str(tmp_path / "l")], "image", "label", Findings("x"))
    index = tmp_path / "l" / "index.json"
    content = json.loads(index.read_text())
    content["config"]["data_format"] = ["bytes", "int"]
    spec = json.loads(content["config"]["data_spec"])
    spec[1]["type"] = "collections.defaultdict"
    content["config"]["data_spec"] = json.dumps(spec)
    index.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"its items hold collections.defaultdict"):
        LitdataShards([str(tmp_path / "l")], "image", "label", Findings("x"))
    index.write_text("{")
    with pytest.raises(DataError, match="is not an index of litdata's"):
        LitdataShards([str(tmp_path / "l")], "image", "label", Findings("x"))
    assert not (tmp_path / "ran").exists()


def test_litdata_chunks_and_keys(tmp_path):
    folder = write_litdata(tmp_path / "l", [{"image": make_picture(n), "label": n} for n in range(9)], 3)
    (folder / "chunk-0-1.bin").write_bytes((folder / "chunk-0-1.bin").read_bytes()[:-10])
    (folder / "chunk-0-2.bin").unlink()
    findings = Findings("x")
    shards = LitdataShards([str(folder)], "image", "label", findings)
    assert shards.counts == [3]
    assert findings.count("a chunk that is cut short") == findings.count("a chunk that is not there") == 1
    assert shards.read(0, 2) == (make_picture(2), 2)
    with pytest.raises(
        DataError, match=r"data.image=img: the items of .* have no such part. Did you mean 'image'"
    ):
        LitdataShards([str(folder)], "img", "label", Findings("x"))


def test_open_files_close_the_one_unused_longest(tmp_path):
    for i in range(4):
        (tmp_path / str(i)).write_bytes(b"0123456789")
    files = OpenFiles(2)
    assert [files.read(str(tmp_path / str(i)), i, 2) for i in (0, 1, 0, 2)] == [b"01", b"12", b"01", b"23"]
    assert len(files) == 2


def test_a_packed_tar_under_a_plain_name(tmp_path):
    file = tmp_path / "a.tar"
    file.write_bytes(
        gzip.compress(write_tar(tmp_path / "b.tar", {"1": {"png": os.urandom(2000)}}).read_bytes())
    )
    with pytest.raises(DataError, match="a shard that is no tar"):
        tars([str(file)], tmp_path)


@pytest.mark.parametrize("package", ["pyarrow", "litdata"])
def test_a_missing_package_is_told_with_the_command(package, tmp_path, monkeypatch):
    file = write_parquet(tmp_path / "a.parquet", range(4), 2)
    folder = write_litdata(tmp_path / "l", [(b"a", 1)], 1)
    open_shards = {
        "pyarrow": lambda: ParquetShards([str(file)], "image", "label", 2, 1000, Findings("x")),
        "litdata": lambda: LitdataShards([str(folder)], "image", "label", Findings("x")),
    }
    monkeypatch.setattr("lora_lightning.utils.libraries.find_spec", lambda name: None)
    for name in [n for n in sys.modules if n.partition(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(LibraryError, match=rf"{package} is not installed: pip install '.*\[stream\]'"):
        open_shards[package]()
