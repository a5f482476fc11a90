"""Pictures listed in tables: columns, parts, weights; classes, several of them, or numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora_lightning.data.findings import DataError
from lora_lightning.data.image_folder import ImageFolderDataModule
from lora_lightning.data.pictures import PARTS
from lora_lightning.errors import ConfigError, MissingFileError
from tests.data.drawn import folders


@pytest.fixture(autouse=True)
def pictures(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return folders(tmp_path, {"pictures": 30})


def module(table: Path, **options) -> ImageFolderDataModule:
    data = ImageFolderDataModule(**{"table": str(table), "num_workers": 0, "image_size": 16, **options})
    data.setup()
    return data


def written(
    folder: Path, label, name: str = "table.csv", head: str = "path,label", row="pictures/{0}.png,{1}"
) -> Path:
    """A table of all 30 pictures; `label` of a number."""
    file = folder / name
    file.write_text(
        "\n".join([head, *(row.format(n, label(n)) for n in range(30))]) + "\n", encoding="utf-8-sig"
    )
    return file


def kind(n: int) -> str:
    return ("cat", "dog", "cow")[n % 3]


def labels(data: ImageFolderDataModule) -> dict[str, object]:
    return {
        Path(part.name(i)).stem: part.targets[i]
        for p in PARTS
        for part in [data.part(p)]
        for i in range(len(part))
    }


FORMS = {
    "comma": {},
    "semicolon": {"head": "path;label", "row": "pictures/{0}.png;{1}"},
    "tabs": {"name": "table.tsv", "head": "path\tlabel", "row": "pictures/{0}.png\t{1}"},
    "other names": {"head": "Image_ID,note,Category", "row": "pictures/{0},x,{1}"},
    "Windows": {"row": "pictures\\{0}.png, {1} "},
    "quoted": {"row": '"pictures/{0}.png","{1}"'},
}


@pytest.mark.parametrize("form", FORMS)
def test_tables_of_every_form(tmp_path, form):
    data = module(written(tmp_path, kind, **FORMS[form]))
    assert data.class_names == ["cat", "cow", "dog"]
    assert [len(data.part(p)) for p in PARTS] == [24, 3, 3]
    assert all(data.class_names[target] == kind(int(name)) for name, target in labels(data).items())


def test_parquet_and_a_folder_of_its_own(tmp_path):
    pandas = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pandas.table({"file_name": [f"{n}.png" for n in range(30)], "label": [n % 2 for n in range(30)]})
    parquet.write_table(table, tmp_path / "list.parquet")
    data = module(tmp_path / "list.parquet", root=str(tmp_path / "pictures"), target="class")
    assert data.class_names == ["0", "1"]
    assert len(data.train_set) == 22


def test_split_and_weight_are_columns(tmp_path):
    part = {0: "train", 1: "validation", 2: "test"}
    rows = [f"pictures/{n}.png,{('cat', 'dog')[n % 2]},{part[n // 10]},{n / 10}" for n in range(30)]
    (tmp_path / "t.csv").write_text("\n".join(["path,label,split,weight", *rows]))
    data = module(tmp_path / "t.csv", batch_size=5)
    assert [sorted(int(Path(data.part(p).name(i)).stem) for i in range(10)) for p in PARTS] == [
        list(range(10)), list(range(10, 20)), list(range(20, 30)),
    ]  # fmt: skip
    images, targets, weights = next(iter(data.train_dataloader()))
    assert len(weights) == 5 and set((weights * 10).round().int().tolist()) <= set(range(10))
    finished = data.finish(images, targets, True, weights)
    assert torch.equal(finished[2], weights)
    assert len(data.finish(images, targets, False, weights)) == 2


def test_a_group_is_a_column(tmp_path):
    rows = [f"pictures/{n}.png,{kind(n)},{n // 5}" for n in range(30)]
    (tmp_path / "t.csv").write_text("\n".join(["path,label,patient", *rows]))
    data = module(tmp_path / "t.csv", group="patient", val_share=0.2, test_share=0.2)
    found = [{int(Path(data.part(p).name(i)).stem) // 5 for i in range(len(data.part(p)))} for p in PARTS]
    assert [len(f) for f in found] == [4, 1, 1] and len(set.union(*found)) == 6


def test_several_classes_a_picture(tmp_path):
    def tags(n: int) -> str:
        return "|".join(t for t, every in (("a", 2), ("b", 3), ("c", 5)) if n % every == 0)

    data = module(written(tmp_path, tags), target="classes")
    assert data.provides == {"num_classes": 3, "class_names": ["a", "b", "c"], "target": "classes"}
    for name, target in labels(data).items():
        assert target.tolist() == [float(int(name) % every == 0) for every in (2, 3, 5)]
    for part in PARTS:
        assert (data.part(part).targets.sum(0) > 0).all()
    _, targets = next(iter(data.train_dataloader()))
    assert targets.shape == (24, 3) and targets.dtype == torch.float32


def test_a_row_for_each_class(tmp_path):
    rows = [f"pictures/{n}.png,{t}" for n in range(30) for t in ("x", "yz"[n % 2])]
    (tmp_path / "t.csv").write_text("\n".join(["path,label", *rows]))
    data = module(tmp_path / "t.csv", target="classes")
    assert all(
        target.tolist() == [1, n % 2 == 0, n % 2]
        for n, target in ((int(k), v) for k, v in labels(data).items())
    )
    with pytest.raises(DataError, match=r"picture that has two labels +30 "):
        module(tmp_path / "t.csv")


def test_numbers(tmp_path):
    data = module(written(tmp_path, lambda n: f"{n / 4:.2f}"), target="number")
    numbers = data.train_set.targets
    assert data.provides == {
        "target": "number", "num_classes": 1,
        "number_mean": pytest.approx(float(numbers.mean())),
        "number_std": pytest.approx(float(numbers.std(unbiased=False))),
    }  # fmt: skip
    assert all(target == int(name) / 4 for name, target in labels(data).items())
    for part in ("val", "test"):  # one of the least, one of the middling and one of the greatest in each
        assert [int(number / 2.5) for number in data.part(part).targets.sort().values] == [0, 1, 2]
    with pytest.raises(ConfigError, match="shots=2: numbers have no classes"):
        module(tmp_path / "table.csv", target="number", shots=2)


@pytest.mark.parametrize(
    ("label", "match"),
    [
        (lambda n: n % 2, "labels of table.csv are numbers .* data.target=class .* data.target=number"),
        (lambda n: n / 7, "are numbers"),
        (lambda n: ("a|b", "a")[n % 2], r"hold '\|' \(a\|b\).*data.target=classes"),
        (lambda n: ('"a,b"', "a", "b")[n % 3], "hold ','"),
    ],
)
def test_labels_that_may_be_meant_otherwise_are_asked_about(tmp_path, label, match):
    with pytest.raises(ConfigError, match=match):
        module(written(tmp_path, label))
    data = ImageFolderDataModule(table=str(tmp_path / "table.csv"), target="class", test_share=1)
    assert len(data.test_set) == 30 and data.target == "class"


def test_a_comma_within_names_is_one_class(tmp_path):
    data = module(written(tmp_path, lambda n: ('"tench, Tinca tinca"', "cock")[n % 2]))
    assert data.class_names == ["cock", "tench, Tinca tinca"]


def test_rows_that_cannot_be_used(tmp_path):
    rows = [f"pictures/{n}.png,{kind(n)},," for n in range(30)]
    rows += [
        "pictures/99.png,cat,,",
        ",cat,,",
        "pictures/0.png,,,",
        "pictures/1.png,dog,holdout,",
        "pictures/2.png,cow,,-1",
    ]
    (tmp_path / "t.csv").write_text("\n".join(["path,label,split,weight", *rows]))
    with pytest.raises(DataError) as error:
        module(tmp_path / "t.csv")
    for words in (
        "row whose file is missing", "t.csv, row 32: pictures/99.png", "row without a path", "t.csv, row 33",
        "row without a label", "row of an unknown split", "t.csv, row 35: holdout",
        "row whose weight is no number of at least 0",
    ):  # fmt: skip
        assert words in str(error.value)
    assert sum(len(module(tmp_path / "t.csv", strict=False).part(p)) for p in PARTS) == 30


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (None, MissingFileError, ["table=", "there is no such file", "Did you mean 'tables.csv'"]),
        ("path,label\n", DataError, ["has no rows"]),
        ("pth,label\nx,y\n", ConfigError, ["has no column path", "Did you mean 'pth'"]),
        (
            "path,colour\nx,y\n",
            ConfigError,
            ["has no column label", "Columns: path, colour", "data.label=COLUMN"],
        ),
        ("path,label\nx.jpg,y\n", DataError, ["no row has a file that is there", "data.root=FOLDER"]),
        (b"path,label\n\xff\xfe,y\n", DataError, ["is not UTF-8"]),
    ],
)
def test_tables_that_are_none(tmp_path, content, error, words):
    (tmp_path / "tables.csv").write_text("x")
    if content is not None:
        (tmp_path / "table.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(error) as caught:
        module(tmp_path / "table.csv")
    assert all(word in str(caught.value) for word in words), caught.value


def test_the_column_of_labels_can_be_named(tmp_path):
    table = written(tmp_path, kind, head="path,species")
    assert module(table, label="species").class_names == ["cat", "cow", "dog"]
    with pytest.raises(ConfigError, match=r"label=specie: .* Did you mean 'species'"):
        module(table, label="specie")


def test_cells_that_no_column_has_are_told_and_not_lost(tmp_path):
    """`cat,dog` without quotes would be a cat."""
    file = written(tmp_path, kind)
    lines = file.read_text(encoding="utf-8").splitlines()
    file.write_text("\n".join([*lines[:-1], f"{lines[-1]},dog"]) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"more cells than the header.*row 31: dog"):
        module(file)
    assert len(labels(module(file, strict=False))) == 29
    file.write_text("\n".join([*lines[:-1], f"{lines[-1]},"]) + "\n", encoding="utf-8")
    assert len(labels(module(file))) == 30
