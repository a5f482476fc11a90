"""StreamDataModule on tar, Parquet and litdata's shards that the tests write."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lora_lightning.data.findings import DataError
from lora_lightning.data.stream import StreamDataModule
from lora_lightning.errors import ConfigError, MissingFileError
from lora_lightning.trainer import loader as loaders
from tests.data.shards import CLASSES, number_of, write_litdata, write_parquet, write_tars
from tests.data.shards import picture as make_picture

COUNTS = [5, 9, 3, 7, 6]  # 30 pictures
PLAIN = {"crop_scale": None, "hflip": 0.0}


def stream(source: object, tmp_path: Path, **options: object) -> StreamDataModule:
    defaults = {
        "val_share": 0.2,
        "batch_size": 4,
        "num_workers": 0,
        "image_size": 8,
        "augment": PLAIN,
        "window": 2,
    }
    data = StreamDataModule(source, index=str(tmp_path / "index"), **{**defaults, **options})
    data.prepare_data()
    return data


@pytest.fixture(params=["tar", "parquet", "plain", "litdata"])
def source(request, tmp_path) -> tuple[str, dict]:
    """The same thirty pictures in each kind of shards, and the options that it takes."""
    if request.param == "tar":
        return write_tars(tmp_path / "s", COUNTS), {}
    if request.param == "litdata":
        items = [{"image": make_picture(n), "label": n % CLASSES} for n in range(30)]
        return str(write_litdata(tmp_path / "s", items, 7)), {"class_names": CLASSES}
    plain = request.param == "plain"
    for i, first in enumerate((0, 10, 20)):
        write_parquet(
            tmp_path / "s" / f"{i}.parquet", range(first, first + 10), 4, named=not plain, plain=plain
        )
    return str(tmp_path / "s" / "*.parquet"), {}


def numbers(data: StreamDataModule, part: str) -> list[int]:
    pictures = data.part(part)
    for i in range(len(pictures)):
        picture, label = pictures[i]
        assert int(label) == number_of(picture) % CLASSES
    return [number_of(pictures[i][0]) for i in range(len(pictures))]


def test_every_kind_gives_its_pictures_with_their_labels(source, tmp_path):
    data = stream(source[0], tmp_path, **source[1])
    train, val = numbers(data, "train"), numbers(data, "val")
    assert sorted(train + val) == list(range(30))
    assert 0 < len(val) <= 9
    assert numbers(data, "test") == val
    assert data.provides["num_classes"] == CLASSES
    assert data.train_set.targets.tolist() == [n % CLASSES for n in train]
    name, picture = data.show("val", 0)
    assert number_of(picture) == val[0] and name


def test_every_picture_once_an_epoch_over_processes_and_resumed(source, tmp_path, monkeypatch):
    """Two processes, each of which stops in the middle of its epoch and goes on."""
    data = stream(source[0], tmp_path, batch_size=1, **source[1])
    everything = sorted(numbers(data, "train"))
    seen: list[int] = []
    for rank in range(2):
        monkeypatch.setattr(loaders, "processes", lambda rank=rank: (rank, 2))
        whole = [number_of(x) for images, _ in data.train_dataloader() for x in images]
        again = data.train_dataloader()
        again.load_state_dict({"batch": 5})
        assert [number_of(x) for images, _ in again for x in images] == whole[5:]
        seen += whole
    assert len(whole) == -(-len(everything) // 2)
    # Where two do not divide them, the last process takes one from the front.
    assert sorted((Counter(seen) - Counter(everything)).values()) == [1] * (len(everything) % 2)
    assert set(seen) == set(everything)


def test_workers_change_nothing_and_share_the_reading(tmp_path):
    pattern = write_tars(tmp_path / "s", COUNTS)
    orders = []
    for workers in (0, 2):
        loader = stream(pattern, tmp_path, num_workers=workers).train_dataloader()
        loader.sampler.set_epoch(1)
        if workers:
            loader.load_state_dict({"batch": 2})
        orders.append([number_of(x) for images, _ in loader for x in images])
    assert orders[0][8:] == orders[1]


def test_open_files_are_bounded(tmp_path):
    data = stream(write_tars(tmp_path / "s", [2] * 20), tmp_path, window=3)
    batches = [labels for _, labels in data.train_dataloader()]
    assert sum(map(len, batches)) == 32
    shards = data.part("train").shards
    assert len(shards.files) <= 4
    assert shards._arrays.cache_info().currsize <= 4


def test_row_groups_held_are_bounded(tmp_path, capsys):
    file = write_parquet(tmp_path / "a.parquet", range(200), 5)
    data = stream(str(file), tmp_path, window=3)
    assert sum(1 for _ in data.train_dataloader()) == 40
    assert len(data.part("train").shards._held) <= 4
    small = stream(str(file), tmp_path, window=8, memory=1e-6)
    assert small._window() < 8
    assert "data.window=8: more would not fit data.memory=1e-06 GB" in capsys.readouterr().out


def test_parts_by_pattern(tmp_path):
    train, val, test = (write_tars(tmp_path / stem, [4, 4], stem=stem) for stem in ("train", "val", "test"))
    data = stream(train, tmp_path, val_source=val, test_source=test)
    assert [len(data.part(p)) for p in ("train", "val", "test")] == [8, 8, 8]


def test_one_shard_cannot_be_divided(tmp_path):
    with pytest.raises(ConfigError, match=r"val_share=0.2: there is one shard alone.*give val_source"):
        stream(write_tars(tmp_path / "s", [9]), tmp_path).setup()


def test_names_of_classes(tmp_path):
    hugging = stream(str(write_parquet(tmp_path / "a.parquet", range(30), 5)), tmp_path)
    assert hugging.provides["class_names"] == ["cat", "dog", "hen"]
    words = ("hen", "ant", "cat")
    pattern = write_tars(
        tmp_path / "s", COUNTS, lambda n: {"png": make_picture(n), "txt": words[n % 3].encode()}
    )
    told = stream(pattern, tmp_path)
    assert told.provides["class_names"] == ["ant", "cat", "hen"]
    picture, label = told.train_set[0]
    assert told.class_names[label] == words[number_of(picture) % 3]
    names = tmp_path / "names.txt"
    names.write_text("hen\nant\ncat\ndog\n")
    assert stream(pattern, tmp_path, class_names=str(names)).class_names == ["hen", "ant", "cat", "dog"]
    names.write_text('["hen", "ants"]')
    with pytest.raises(
        DataError, match=r"ant, cat is none of the 2 classes \(hen, ants\).*Did you mean 'ants'"
    ):
        stream(pattern, tmp_path, class_names=str(names)).setup()
    with pytest.raises(MissingFileError, match=r"no.txt: cannot be read"):
        stream(pattern, tmp_path, class_names="no.txt")
    with pytest.raises(DataError, match="the label 2 is none of the 2 classes"):
        stream(write_tars(tmp_path / "n", COUNTS), tmp_path, class_names=2).setup()
    lit = write_litdata(tmp_path / "l", [(make_picture(n), n % 3) for n in range(9)], 3)
    with pytest.raises(ConfigError, match="class_names=null: the shards do not say"):
        stream(str(lit), tmp_path)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("kind", ["tar", "parquet", "litdata"])
def test_numbers_among_words_are_names(kind, named, tmp_path):
    """Labels 1, 2, 3 beside a word are not the places of other classes."""
    words = ("1", "2", "3", "none")
    file = str(tmp_path / "s")
    if kind == "tar":  # of whose shards some hold numbers alone
        kinds = [0, 1, 2, 0, 1, 2, 3, 3, 3]
        file = write_tars(
            tmp_path / "s", [3, 3, 3], lambda n: {"png": make_picture(n), "cls": words[kinds[n]].encode()}
        )
    else:
        kinds = [n % 4 for n in range(9)]
        pictures, labels = [make_picture(n) for n in range(9)], [words[k] for k in kinds]
        if kind == "parquet":
            pq.write_table(
                pa.table({"image": pictures, "label": labels}), f"{file}.parquet", row_group_size=3
            )
            file += ".parquet"
        else:
            write_litdata(tmp_path / "s", list(zip(pictures, labels)), 3)
    names = tmp_path / "names.txt"
    names.write_text("\n".join(words))
    known = named or kind == "litdata"
    data = stream(file, tmp_path, **({"class_names": str(names)} if known else {}))
    for part in ("train", "val"):
        pictures = data.part(part)
        found = [(number_of(p), data.class_names[t]) for p, t in (pictures[i] for i in range(len(pictures)))]
        assert found == [(n, words[kinds[n]]) for n, _ in found]
        assert [data.class_names[t] for t in pictures.targets] == [label for _, label in found]


def test_a_shard_without_pictures_is_not_all_of_a_part(tmp_path):
    lonely = write_tars(tmp_path / "s", [4, 0, 0, 0, 4])
    for seed in range(4):
        data = stream(lonely, tmp_path, seed=seed)
        assert [len(data.part(part)) for part in ("train", "val")] == [4, 4]


@pytest.mark.parametrize(
    ("label", "words"),
    [
        (
            lambda n: {"txt": f"a photo {n}".encode()},
            "150 labels, such as 'a photo 0': captions are no classes",
        ),
        (lambda n: {"cls": str(7 * n**2).encode()}, "150 labels are found, and the greatest is 155,407"),
    ],
)
def test_labels_that_are_no_classes(label, words, tmp_path):
    pattern = write_tars(tmp_path / "s", [150, 150], lambda n: {"png": make_picture(0), **label(n % 150)})
    with pytest.raises(ConfigError, match=words):
        stream(pattern, tmp_path)


def test_a_damaged_picture_ends_no_run(tmp_path, capsys):
    """Damage that only decoding shows: in Parquet nothing is looked at before."""
    pictures = [make_picture(n) if n != 4 else make_picture(4)[:40] for n in range(12)]
    table = pa.table({"image": pictures, "label": [n % 3 for n in range(12)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=6)
    file = str(tmp_path / "a.parquet")
    data = stream(file, tmp_path, val_source=file)
    with pytest.raises(
        DataError, match=r"a.parquet: row group 0: picture 4: a file of 40 bytes cannot be read"
    ):
        data.train_set[4]
    shown = [
        (number_of(x), int(y)) for images, labels in data.val_dataloader() for x, y in zip(images, labels)
    ]
    assert shown == [(n, n % 3) for n in (0, 1, 2, 3, 5, *range(5, 12))]
    assert "picture 4: a file of 40 bytes cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shots": 3}, "shots=3: needs the whole set"),
        ({"imbalance": "balanced_sampler"}, "imbalance=balanced_sampler: needs"),
        ({"window": 0, "val_share": 1.0, "memory": 0, "class_names": 1}, "4 problems"),
        ({"source": []}, "give a path, a pattern"),
    ],
)
def test_options_that_cannot_be(tmp_path, options, words):
    with pytest.raises(ConfigError) as error:
        StreamDataModule(**{"source": "a.tar", **options})
    assert words in str(error.value)


def test_class_weights_of_a_stream(tmp_path):
    data = stream(write_tars(tmp_path / "s", COUNTS), tmp_path, imbalance="class_weights")
    counts = torch.bincount(data.train_set.targets).double()
    assert data.provides["class_weights"] == pytest.approx((counts.sum() / (3 * counts)).tolist())
