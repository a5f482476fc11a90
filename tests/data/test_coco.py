"""COCO and folders in its format: samples, the check of annotations, masks, what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lora_lightning.data.coco import CocoDataModule, CocoFormatDataModule
from lora_lightning.data.findings import DataError
from lora_lightning.errors import ConfigError, MissingFileError
from tests.data.detection_sets import coco_content, picture, write_coco, write_coco_2017


def module(folder: Path, content: dict[str, Any] | None = None, **options: Any) -> CocoFormatDataModule:
    """Training data as given, whole validation data."""
    write_coco(folder / "train", folder / "train.json", content or coco_content())
    write_coco(folder / "val", folder / "val.json", coco_content(3, first=50))
    paths = {f"{p}_images": str(folder / p) for p in ("train", "val")}
    paths |= {f"{p}_annotations": str(folder / f"{p}.json") for p in ("train", "val")}
    return CocoFormatDataModule(**paths, **{"num_workers": 0, "augment": "none", **options})


def test_labels_follow_the_category_ids(tmp_path):
    data = module(tmp_path)
    assert data.provides == {"num_classes": 2, "class_names": ["car", "dog"], "category_ids": [3, 18]}
    sample = data.samples("train")[0]
    np.testing.assert_array_equal(sample.boxes, [[10, 10, 40, 40], [0, 0, 4, 64], [50, 20, 64, 40]])
    assert sample.labels.tolist() == [2, 1, 1]
    assert sample.crowd.tolist() == [False, True, False]
    assert sample.area.tolist() == [450, 128, 140]
    assert sample.image_id == 100


def test_category_ids_kept_as_labels(tmp_path):
    data = module(tmp_path, keep_category_ids=True)
    names = data.provides["class_names"]
    assert data.provides["num_classes"] == len(names) == 18
    assert (names[3 - 1], names[18 - 1], names[0]) == ("car", "dog", "N/A")
    assert data.samples("train")[0].labels.tolist() == [18, 3, 3]


def test_crowd_is_left_out_of_training_and_kept_for_the_score(tmp_path):
    data = module(tmp_path, batch_size=6)
    _, targets = next(iter(data.train_dataloader()))
    assert not any(t["iscrowd"].any() for t in targets)
    assert sorted(len(t["labels"]) for t in targets) == [0, 0, 1, 1, 1, 2]
    _, targets = next(iter(data.val_dataloader()))
    assert targets[0]["iscrowd"].tolist() == [0, 1, 0]


def test_batches_are_of_the_convention(tmp_path):
    data = module(tmp_path)
    images, targets = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
    assert [tuple(i.shape) for i in images] == [(3, 64, 96), (3, 96, 64)]
    assert images[0].dtype == torch.float32
    assert 0.9 < float(images[0].max()) <= 1
    kinds = {name: value.dtype for name, value in targets[0].items()}
    assert kinds == {
        "boxes": torch.float32, "labels": torch.int64, "iscrowd": torch.int64,
        "area": torch.float32, "image_id": torch.int64,
    }  # fmt: skip


def test_an_empty_image_has_empty_targets(tmp_path):
    target = module(tmp_path, masks=True).val_dataloader().dataset[2][1]
    assert target["boxes"].shape == (0, 4)
    assert target["labels"].shape == (0,)
    assert target["masks"].shape == (0, 96, 64)


def test_polygons_and_run_lengths_become_masks(tmp_path):
    data = module(tmp_path, masks=True)
    masks = data.val_dataloader().dataset[0][1]["masks"]
    assert masks.shape == (3, 64, 96)
    assert masks[0, 10:40, 10:40].all()
    assert int(masks[0].sum()) == 900
    assert masks[1, :, :4].all()
    assert int(masks[1].sum()) == 4 * 64


@pytest.mark.parametrize(
    ("mode", "suffix"), [("RGBA", "png"), ("P", "png"), ("L", "jpg"), ("RGB", "bmp"), ("I;16", "png")]
)
def test_image_files_of_every_kind(tmp_path, mode, suffix):
    """Annotations without width and height, too."""
    content = coco_content(1)
    data = module(tmp_path, content)
    name = f"picture.{suffix}"
    Image.new(mode, (96, 64), 0).save(tmp_path / "train" / name)
    content["images"] = [{"id": 100, "file_name": name}]
    (tmp_path / "train.json").write_text(json.dumps(content))
    image, _ = data.train_dataloader().dataset[(0, 0)]
    assert image.shape == (3, 64, 96)
    assert image.dtype == torch.uint8


BAD: list[tuple[str, dict[str, Any]]] = [
    ("a box outside of its image", {"bbox": [200, 10, 20, 20]}),
    ("a box over the edge of its image", {"bbox": [80, 10, 40, 20]}),
    ("a box of negative size", {"bbox": [10, 10, -5, 20]}),
    ("a bbox that is not four numbers", {"bbox": [10, 10, 5]}),
    ("a bbox that is not four numbers", {"bbox": [10, 10, 5, float("nan")]}),
    ("a bbox that is not four numbers", {"bbox": [10, 10, 5, 10**400]}),  # which no float holds
    ("an unknown category", {"category_id": 99}),
    ("an annotation of an unknown image", {"image_id": 7}),
    ("an annotation id given twice", {"id": 1001}),
]


@pytest.mark.parametrize(("what", "change"), BAD)
def test_a_bad_annotation_is_an_error_or_is_counted(tmp_path, what, change):
    content = coco_content()
    content["annotations"][0] |= change
    with pytest.raises(DataError) as error:
        module(tmp_path, content).prepare_data()
    number = change.get("id", 1000)
    assert what in str(error.value)
    assert f"train.json: annotation {number}" in str(error.value)
    assert "data.strict=false" in str(error.value)
    lenient = module(tmp_path, content, strict=False)
    lenient.prepare_data()
    assert what in lenient.findings
    kept = sum(len(s.labels) for s in lenient.samples("train"))
    clipped = what == "a box over the edge of its image"
    assert kept == len(content["annotations"]) - (not clipped)
    if clipped:
        assert lenient.samples("train")[0].boxes[0].tolist() == [80, 10, 96, 30]


def test_everything_bad_is_in_one_table(tmp_path):
    content = coco_content(9)
    for entry, (_, change) in zip(content["annotations"], BAD, strict=False):
        entry |= change
    content["images"][6]["width"] = 1
    content["images"].append(dict(content["images"][1]))
    content["images"].append({"id": 5, "file_name": "gone.jpg", "width": 8, "height": 8})
    content["images"].append({"id": 6, "file_name": "train.json"})
    content["categories"] = [*content["categories"], {"id": 3, "name": "car"}, {"name": "cat"}]
    write_coco(tmp_path / "train", tmp_path / "train.json", coco_content(9))
    data = module(tmp_path)
    (tmp_path / "train" / "train.json").write_text("no picture")
    (tmp_path / "train.json").write_text(json.dumps(content))
    with pytest.raises(DataError) as error:
        data.prepare_data()
    message = str(error.value)
    for what in {b[0] for b in BAD} | {
        "an image file that is missing",
        "a file that is no image",
        "an image of another size than annotated",
        "an image id given twice",
        "a category id given twice",
        "a category without an id of at least 0 and a name",
    }:
        assert what in message, what
    assert message.count("train.json: annotation") >= 6


def test_boxes_of_no_size_are_dropped_with_a_count(tmp_path):
    content = coco_content()
    content["annotations"][0]["bbox"] = [10, 10, 0, 20]
    content["annotations"][3]["bbox"] = [63, 10, 30, 0]
    data = module(tmp_path, content)  # strict
    data.prepare_data()
    assert "a box of no size" in data.findings
    assert " 2 " in data.findings
    assert sum(len(s.labels) for s in data.samples("train")) == len(content["annotations"]) - 2


def test_rounding_at_the_edge_is_no_finding(tmp_path):
    content = coco_content()
    content["annotations"][0]["bbox"] = [-0.4, -0.2, 97, 64.6]
    data = module(tmp_path, content)
    data.prepare_data()
    assert data.findings == ""
    assert data.samples("train")[0].boxes[0].tolist() == pytest.approx([0, 0, 96, 64])


@pytest.mark.parametrize(
    "segmentation", [[], [[1, 2, 3, 4]], [["a"] * 6], {"size": [1, 1], "counts": [1]}, None]
)
def test_segmentations_that_cannot_be_drawn(tmp_path, segmentation):
    content = coco_content()
    content["annotations"][0]["segmentation"] = segmentation
    with pytest.raises(DataError, match="a segmentation that cannot be drawn"):
        module(tmp_path, content, masks=True).prepare_data()
    module(tmp_path, content).prepare_data()  # boxes alone need none


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "is not JSON"),
        ("[]", "it is a list"),
        ('[{"image_id": 1, "score": 0.5}]', "output of a detector"),
        ('{"shapes": []}', "LabelMe"),
        ('{"images": [], "annotations": []}', "no list categories"),
        ('"text"', "it is a str"),
        ('{"images": [], "annotations": [], "categories": []}', "no box is left"),
    ],
)
def test_files_of_another_format(tmp_path, text, match):
    data = module(tmp_path, strict=False)
    (tmp_path / "train.json").write_text(text)
    with pytest.raises(DataError, match=match):
        data.prepare_data()


def test_nothing_left_to_train_on(tmp_path):
    content = coco_content()
    for entry in content["annotations"]:
        entry["category_id"] = 77
    with pytest.raises(DataError, match="no box is left"):
        module(tmp_path, content, strict=False).prepare_data()


def test_missing_folders_and_files_in_one_message(tmp_path):
    data = module(tmp_path)
    data.files["train"] = (tmp_path / "nowhere", tmp_path / "trian.json")
    with pytest.raises(MissingFileError) as error:
        data.prepare_data()
    assert "nowhere: there is no such folder" in str(error.value)
    assert "trian.json: there is no such file. Did you mean 'train.json'" in str(error.value)


def test_coco_itself(tmp_path):
    """Its classes are known without its files, by their ids or without gaps."""
    data = CocoDataModule(str(tmp_path), num_workers=0)
    assert data.provides["num_classes"] == 90
    write_coco_2017(tmp_path)
    data.prepare_data()
    assert data.provides["class_names"][17] == "dog"
    assert data.samples("train")[0].labels.tolist() == [18, 3, 3]
    dense = CocoDataModule(str(tmp_path), keep_category_ids=False)
    names = dense.provides["class_names"]
    assert len(names) == dense.provides["num_classes"] == 80
    assert [names[n - 1] for n in dense.samples("train")[0].labels] == ["dog", "car", "car"]
    assert len(data.samples("train")) == 6
    assert data.samples("test") is data.samples("val")


def test_coco_with_other_categories(tmp_path):
    write_coco_2017(tmp_path)
    file = tmp_path / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    content["categories"][0]["name"] = "wolf"
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match="a category that COCO does not have") as error:
        CocoDataModule(str(tmp_path)).prepare_data()
    assert "18 'wolf': give data=coco_format" in str(error.value)


def test_coco_missing_says_what_to_fetch_and_where_to_put_it(tmp_path):
    write_coco_2017(tmp_path)
    (tmp_path / "annotations" / "instances_val2017.json").unlink()
    with pytest.raises(MissingFileError) as error:
        CocoDataModule(str(tmp_path)).prepare_data()
    message = str(error.value)
    assert "files:      annotations/instances_val2017.json\n" in message
    for words in (str(tmp_path), "data.root=", "train2017.zip", "annotations_trainval2017.zip"):
        assert words in message


def test_test_images_come_with_their_annotations():
    plain = ("a", "a.json", "b", "b.json")
    assert set(CocoFormatDataModule(*plain).files) == {"train", "val"}
    images, notes = CocoFormatDataModule(*plain, "c", "c.json").files["test"]
    assert (images.name, notes.name) == ("c", "c.json")
    for given, lacking in (("test_images", "test_annotations"), ("test_annotations", "test_images")):
        with pytest.raises(ConfigError) as error:
            CocoFormatDataModule(*plain, **{given: "c"})
        told = f"{lacking}=null: give both of test_images and test_annotations, or neither."
        assert error.value.problems == [told]


def test_every_bad_option_in_one_error():
    with pytest.raises(ConfigError) as error:
        CocoFormatDataModule("", "a.json", "b", "b.json", "c", None, 2, "yes", 0, -1, -1, "flop", 1)
    assert len(error.value.problems) == 9
    assert "Did you mean 'flip'" in str(error.value)


def test_a_file_that_changes_after_the_check(tmp_path):
    data = module(tmp_path)
    data.prepare_data()
    picture(10, 10, 0).save(tmp_path / "train" / "0.jpg")
    with pytest.raises(DataError, match="is 10 x 10 pixels now, not 96 x 64"):
        data.train_dataloader().dataset[(0, 0)]
    (tmp_path / "train" / "1.jpg").write_bytes(b"\xff\xd8 cut")
    with pytest.raises(DataError, match="cannot be read as an image"):
        data.train_dataloader().dataset[(0, 1)]
