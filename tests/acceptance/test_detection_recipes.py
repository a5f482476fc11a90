"""The recipes on data sets that cannot be shipped: run as they are on small files of the same format, with
weights of the same names where torch's cache or the user has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import get_model_weights

from lora_lightning.app.application import main
from lora_lightning.app.cli import main as predict
from lora_lightning.models.detection import detector
from lora_lightning.models.rtdetr import rtdetr
from tests.data.detection_sets import coco_content, write_coco, write_coco_2017, write_pennfudan, write_voc
from tests.models.test_rtdetr import SMALL
from tests.terminal import beside_progress

# float32: torch 2.12's convolutions in bfloat16 give NaN as weight gradient for maps of 1 x 2 on some CPUs.
CPU = ["trainer=cpu", "trainer.precision=32-true"]
FAST = ["debug=fast", "logger=csv", *CPU, "data.num_workers=0", "hydra.run.dir=run"]
TINY = ["model.min_size=64", "model.max_size=96"]


@pytest.fixture(autouse=True)
def _somewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)


def write_weights(name: str, folder: Path) -> None:
    """A file of random weights where torch would keep torchvision's, of COCO's 90 category numbers.

    Each residual branch begins at zero: frozen norms that normalize nothing would let them explode.
    """
    file = folder / "torch" / "hub" / "checkpoints" / get_model_weights(name).DEFAULT.url.rpartition("/")[2]
    file.parent.mkdir(parents=True)
    state = detector(name, 90).state_dict()
    for key in state:
        if key.endswith("bn3.weight"):
            state[key].zero_()
    torch.save(state, file)


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run" / "results.json").read_text())[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "model"),
    [
        ("fasterrcnn_coco", "fasterrcnn_resnet50_fpn"),
        ("retinanet_coco", "retinanet_resnet50_fpn"),
        ("fcos_coco", "fcos_resnet50_fpn"),
    ],
)
def test_coco(recipe: str, model: str, tmp_path: Path) -> None:
    """COCO's own 90 category numbers: the head of the weights is kept and trained on."""
    write_weights(model, tmp_path)
    write_coco_2017(tmp_path / "coco")
    main([f"recipe={recipe}", "data.root=coco", "data.batch_size=2", *FAST, *TINY])
    assert results(tmp_path)["scores"]["map"] >= 0
    assert results(tmp_path)["trained"] < 0.3 * results(tmp_path)["total"]
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").exists()


@pytest.mark.slow
def test_voc(tmp_path: Path) -> None:
    write_weights("ssd300_vgg16", tmp_path)
    objects = [("dog", (1, 1, 60, 50), 0), ("person", (40, 6, 96, 64), 1)]
    images = {f"{n:06d}": objects for n in range(4)}
    write_voc(tmp_path, "2007", {"train": images, "val": images, "test": images})
    write_voc(tmp_path, "2012", {"train": images})
    main(["recipe=ssd_voc", "data.root=.", "data.batch_size=2", *FAST])
    assert results(tmp_path)["scores"]["map"] >= 0


def test_own_classes_in_cocos_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two classes of one's own on weights for 90, with bad annotations that are counted."""
    save_file(detector("fasterrcnn_small", 90).state_dict(), tmp_path / "base.safetensors")
    content = coco_content()
    content["annotations"][0]["bbox"] = [10, 10, -5, 5]
    content["annotations"][1]["category_id"] = 77
    write_coco(tmp_path / "train", tmp_path / "train.json", content)
    write_coco(tmp_path / "val", tmp_path / "val.json", coco_content(3, first=6))
    paths = [f"data.{p}_images={p}" for p in ("train", "val")]
    paths += [f"data.{p}_annotations={p}.json" for p in ("train", "val")]
    model = ["model.name=fasterrcnn_small", "model.pretrained=false", "model.checkpoint=base.safetensors"]
    words = ["recipe=fasterrcnn_coco", "data=coco_format", *paths, *model, "data.batch_size=2", *FAST, *TINY]
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert "a box of negative size" in told
    assert "an unknown category" in told
    assert "data.strict=false" in told
    main([*words, "data.strict=false", "data.augment=multiscale"])
    out, err = capsys.readouterr()
    assert beside_progress(err) == ""
    assert "a box of negative size" in out
    assert "test mAP" in out
    trained = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert "lora_lightning" in json.dumps(trained)


def test_rtdetr_on_own_classes_and_what_it_finds(tmp_path: Path) -> None:
    """From a folder of weights for other classes to boxes on pictures: the fresh layers come back."""
    small = rtdetr(80, pretrained=False, image_size=64, **SMALL)
    small.model.save_pretrained(tmp_path / "weights")
    write_coco(tmp_path / "train", tmp_path / "train.json", coco_content())
    write_coco(tmp_path / "val", tmp_path / "val.json", coco_content(3, first=6))
    paths = [f"data.{p}_images={p}" for p in ("train", "val")]
    paths += [f"data.{p}_annotations={p}.json" for p in ("train", "val")]
    model = ["model.checkpoint=weights", "model.image_size=64"]
    main(["recipe=rtdetr_coco", "data=coco_format", *paths, *model, "data.batch_size=2", *FAST])
    assert results(tmp_path)["scores"]["map"] >= 0
    predict(["predict", "images=val", "out=found", "adapter=run/adapter"])
    found = json.loads((tmp_path / "found" / "predictions.json").read_text())
    assert len(found) == 60 and {r["category_id"] for r in found} <= {3, 18}


@pytest.mark.slow
def test_pennfudan(tmp_path: Path) -> None:
    write_weights("maskrcnn_resnet50_fpn", tmp_path)
    write_pennfudan(tmp_path)
    words = ["data.root=.", "data.val_size=2", "data.test_size=2"]
    main(["recipe=maskrcnn_pennfudan", *words, *FAST, *TINY])
    assert results(tmp_path)["scores"]["mask_map"] >= 0


def test_everything_missing_in_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["recipe=maskrcnn_pennfudan", "logger=none", "trainer=cpu"])
    told = capsys.readouterr().err
    assert caught.value.code == 2
    for words in ("PennFudanPed.zip", "data.root=", "maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth", "curl -LO"):
        assert words in told
    assert told.count("is not on this machine") == 1
    assert "Traceback" not in told
