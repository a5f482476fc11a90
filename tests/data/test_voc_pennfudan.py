"""Pascal VOC's XML and Penn-Fudan's masks: samples, checks, what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lora_lightning.data.findings import DataError
from lora_lightning.data.pennfudan import PennFudanDataModule
from lora_lightning.data.voc import VOCDataModule
from lora_lightning.errors import ConfigError, MissingFileError
from tests.data.detection_sets import picture, write_pennfudan, write_voc

GOOD = [("dog", (1, 1, 30, 20), 0), ("person", (11, 6, 96, 64), 1)]


def voc(root: Path, objects: list[tuple[Any, ...]] = GOOD, **options: Any) -> VOCDataModule:
    write_voc(root, "2007", {"train": {"000001": objects, "000002": GOOD}, "val": {"000003": []}})
    lists = {"train": ["2007_train"], "val": ["2007_val"], "test": None}
    return VOCDataModule(str(root), **lists, num_workers=0, **options)


def test_voc_boxes_begin_at_zero_and_difficult_ones_are_ignored(tmp_path):
    data = voc(tmp_path, augment="none")
    sample = data.samples("train")[0]
    assert sample.boxes.tolist() == [[0, 0, 30, 20], [10, 5, 96, 64]]
    assert sample.labels.tolist() == [12, 15]
    assert sample.crowd.tolist() == [False, True]
    assert sample.area.tolist() == [600, 86 * 59]
    assert data.provides["num_classes"] == 20
    assert data.provides["class_names"][11] == "dog"
    _, targets = next(iter(data.train_dataloader()))
    assert [t["labels"].tolist() for t in targets] == [[12], [12]]
    assert data.val_dataloader().dataset[0][1]["boxes"].shape == (0, 4)


def test_voc_image_ids_do_not_repeat(tmp_path):
    write_voc(tmp_path, "2012", {"train": {"000001": GOOD}})
    data = voc(tmp_path)
    data.lists["train"].append("2012_train")
    ids = [s.image_id for part in ("train", "val") for s in data.samples(part)]
    assert ids == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("what", "objects"),
    [
        ("an unknown category", [("dgo", (1, 1, 9, 9), 0)]),
        ("a box of negative size", [("dog", (20, 1, 9, 9), 0)]),
        ("a box outside of its image", [("dog", (120, 1, 130, 9), 0)]),
        ("a box over the edge of its image", [("dog", (20, 1, 130, 9), 0)]),
        ("a bndbox without four numbers", [("dog", ("x", 1, 9, 9), 0)]),
        ("a bndbox without four numbers", [("dog", ("", 1, 9, 9), 0)]),
    ],
)
def test_voc_checks(tmp_path, what, objects):
    with pytest.raises(DataError, match=what) as error:
        voc(tmp_path, objects).prepare_data()
    assert "000001.xml: object 1" in str(error.value)
    lenient = voc(tmp_path, objects, strict=False)
    lenient.prepare_data()
    assert len(lenient.samples("train")[0].labels) == (what == "a box over the edge of its image")


def test_voc_files_that_are_missing_or_broken(tmp_path):
    data = voc(tmp_path)
    folder = tmp_path / "VOCdevkit" / "VOC2007"
    (folder / "JPEGImages" / "000001.jpg").unlink()
    (folder / "Annotations" / "000002.xml").write_text("<annotation>")
    (folder / "Annotations" / "000003.xml").unlink()
    with pytest.raises(DataError) as error:
        data.prepare_data()
    for what in ("image file that is missing", "annotation file that is no XML", "file that is missing"):
        assert what in str(error.value)


def test_voc_missing_says_what_to_fetch(tmp_path):
    with pytest.raises(MissingFileError) as error:
        VOCDataModule(str(tmp_path / "VOCdevkit")).prepare_data()
    message = str(error.value)
    assert "VOCdevkit/VOC2007/ImageSets/Main/train.txt" in message
    assert f"near miss:  data.root={tmp_path} " in message
    assert "VOCtrainval_06-Nov-2007.tar" in message


def test_voc_options():
    with pytest.raises(ConfigError) as error:
        VOCDataModule("", "2007_train", [], ["2007"], [])
    assert len(error.value.problems) == 5


def test_pennfudan_boxes_enclose_the_masks(tmp_path):
    data = PennFudanDataModule(
        str(write_pennfudan(tmp_path)), val_size=2, test_size=2, num_workers=0, augment="none"
    )
    data.prepare_data()
    assert data.provides == {"num_classes": 1, "class_names": ["person"]}
    parts = {part: data.samples(part) for part in ("train", "val", "test")}
    assert {p: len(s) for p, s in parts.items()} == {"train": 4, "val": 2, "test": 2}
    by_id = {s.image_id: s for samples in parts.values() for s in samples}
    assert sorted(by_id) == list(range(8))
    assert by_id[0].boxes.shape == (0, 4)
    assert by_id[5].boxes.tolist() == [[5, 10, 25, 50], [40, 20, 60, 40]]
    assert by_id[5].area.tolist() == [800, 400]
    masks = by_id[5].masks()
    assert masks.shape == (2, 60, 80)
    assert masks[0, 10:50, 5:25].all()
    assert masks.sum((1, 2)).tolist() == [800, 400]
    assert by_id[0].masks().shape == (0, 60, 80)


def test_pennfudan_checks(tmp_path):
    masks = write_pennfudan(tmp_path) / "PennFudanPed" / "PedMasks"
    (masks / "FudanPed00003_mask.png").unlink()
    picture(8, 8, 0).save(masks / "FudanPed00004_mask.png")
    with pytest.raises(DataError) as error:
        PennFudanDataModule(str(tmp_path), val_size=2, test_size=2).prepare_data()
    assert "a mask that is missing" in str(error.value)
    assert "FudanPed00004_mask.png is 8 x 8, FudanPed00004.png 80 x 60" in str(error.value)


def test_pennfudan_missing_and_sizes(tmp_path):
    with pytest.raises(MissingFileError, match=r"PennFudanPed\.zip"):
        PennFudanDataModule(str(tmp_path)).prepare_data()
    with pytest.raises(ConfigError, match="there are 8 images"):
        PennFudanDataModule(str(write_pennfudan(tmp_path))).prepare_data()
