"""`lora-lightning predict`: its files, a merged model beside the adapted one, and mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from faster_coco_eval import COCO
from PIL import Image
from safetensors.torch import save_file

import lora_lightning as ll
from lora_lightning.app.application import main as train
from lora_lightning.app.cli import main as command
from lora_lightning.data.detection import read_image
from lora_lightning.data.shapes import Shapes
from lora_lightning.models.detection import detector
from lora_lightning.tasks.average_precision import AveragePrecision
from tests.data.detection_sets import coco_content, picture, write_coco

MODEL = [
    "model.name=fcos_small",
    "model.pretrained=false",
    "model.checkpoint=base.safetensors",
    "model.min_size=64",
    "model.max_size=96",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a small detector on two classes of one's own, and a folder of images."""
    folder = tmp_path_factory.mktemp("predict")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for part, first in (("train", 0), ("val", 50)):
            write_coco(folder / part, folder / f"{part}.json", coco_content(6, first))
        torch.manual_seed(0)
        save_file(detector("fcos_small", 2).state_dict(), folder / "base.safetensors")
        paths = [f"data.{p}_images={p}" for p in ("train", "val")]
        paths += [f"data.{p}_annotations={p}.json" for p in ("train", "val")]
        words = ["data=coco_format", *paths, *MODEL, "data.num_workers=0", "trainer=cpu", "logger=none"]
        train(["recipe=fcos_coco", *words, "optim.lr=1e-2", "debug=fast", "hydra.run.dir=run"])
        for part in ("train", "val"):
            (folder / f"{part}.json").unlink()  # prediction needs no data
    images = folder / "images"
    (images / "more").mkdir(parents=True)
    picture(96, 64, 0).save(images / "a.jpg")
    picture(64, 96, 1).save(images / "more" / "b.png")
    picture(200, 120, 2).convert("L").save(images / "c.bmp")
    return folder


def read(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    return tuple(json.loads((folder / f"{n}.json").read_text()) for n in ("predictions", "images"))


def test_results_and_pictures(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    out = tmp_path / "out"
    command(["predict", "images=images", f"out={out}", "adapter=run/adapter", "score=0.01"])
    told = capsys.readouterr()
    assert told.out.startswith("3 images, ")
    results, images = read(out)
    assert [(i["id"], i["file_name"]) for i in images["images"]] == [
        (1, "a.jpg"),
        (2, "c.bmp"),
        (3, "more/b.png"),
    ]
    assert images["categories"] == [{"id": 3, "name": "car"}, {"id": 18, "name": "dog"}]
    assert {r["category_id"] for r in results} <= {3, 18}
    assert {r["image_id"] for r in results} == {1, 2, 3}
    truth = COCO(str(out / "images.json"))
    assert len(truth.loadRes(str(out / "predictions.json")).anns) == len(results)
    sizes = {
        p.relative_to(out / "pictures").as_posix(): Image.open(p).size
        for p in (out / "pictures").rglob("*.*")
    }
    assert sizes == {"a.jpg": (320, 213), "c.bmp": (320, 192), "more/b.png": (320, 480)}


def test_merged_predictions_are_the_adapted_models(trained, tmp_path, monkeypatch):
    """Against the model with its adapter unmerged, image by image; batches and checkpoints alike."""
    monkeypatch.chdir(trained)
    model = detector("fcos_small", 2, checkpoint="base.safetensors", min_size=64, max_size=96)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    ll.load_adapter(model, "run/adapter")
    model.eval()
    names = ["a.jpg", "c.bmp", "more/b.png"]
    with torch.no_grad():
        expected = [model([read_image(Path("images") / n).float() / 255])[0] for n in names]
        base = detector("fcos_small", 2, min_size=64, max_size=96).eval()
        base.load_state_dict(before)
        unadapted = base([read_image(Path("images") / "a.jpg").float() / 255])[0]
    words = ["predict", "images=images", "batch_size=1"]
    command([*words, f"out={tmp_path / 'a'}", "adapter=run/adapter"])
    command([*words, f"out={tmp_path / 'b'}", "ckpt=run/checkpoints/last.ckpt"])
    for out in ("a", "b"):
        results, _ = read(tmp_path / out)
        for number, one in enumerate(expected, 1):
            found = [r for r in results if r["image_id"] == number]
            boxes = torch.tensor([r["bbox"] for r in found])
            boxes[:, 2:] += boxes[:, :2]
            torch.testing.assert_close(boxes, one["boxes"], atol=1e-3, rtol=1e-5)
            torch.testing.assert_close(
                torch.tensor([r["score"] for r in found]), one["scores"], atol=1e-6, rtol=1e-5
            )
            assert [r["category_id"] for r in found] == [(3, 18)[label - 1] for label in one["labels"]]
    assert not torch.allclose(unadapted["scores"].max(), expected[0]["scores"].max(), atol=1e-3)


def test_a_recipe_without_an_adapter(trained, tmp_path, monkeypatch):
    """The base alone; images named by numbers keep them as ids."""
    monkeypatch.chdir(trained)
    picture(64, 64, 0).save(tmp_path / "000000000139.jpg")
    words = ["recipe=fcos_coco", *MODEL, "trainer=cpu"]
    command(["predict", *words, f"images={tmp_path}", f"out={tmp_path / 'out'}"])
    _, images = read(tmp_path / "out")
    assert images["images"][0]["id"] == 139
    assert len(images["categories"]) == 90


def test_an_embedded_recipe_draws_its_pictures(tmp_path, monkeypatch):
    """The shipped base finds the shapes of its own domain, where they are."""
    monkeypatch.chdir(tmp_path)
    command(["predict", "recipe=fcos_shapes", "data.domain=source", "data.test_size=8", "out=out"])
    results, images = read(tmp_path / "out")
    assert [i["file_name"] for i in images["images"]] == [f"{n:05d}.png" for n in range(8)]
    precision = AveragePrecision()
    scenes = Shapes("source", "test", 8, 128)
    for n in range(8):
        target = scenes[n][1]
        assert (tmp_path / "out" / "pictures" / f"{n:05d}.png").exists()
        found = [r for r in results if r["image_id"] == n]
        boxes = torch.tensor([r["bbox"] for r in found])
        boxes[:, 2:] += boxes[:, :2]
        scores = torch.tensor([r["score"] for r in found])
        labels = torch.tensor([r["category_id"] for r in found])
        precision.update([{"boxes": boxes, "scores": scores, "labels": labels}], [target])
    assert float(precision.compute()["map"]) > 0.5


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["images=nowhere", "out=a", "recipe=fcos_coco"], "images=nowhere: there is no such file or folder"),
        (["out=a", "recipe=fcos_coco"], "give images=FOLDER"),
        (["images=run/checkpoints", "out=a", "recipe=fcos_coco"], "holds no image"),
        (["images=images", "out=run", "recipe=fcos_coco"], "out=run is not empty"),
        (["images=images", "out=a"], "give recipe=NAME"),
        (["images=images", "out=a", "recipe=fcos_coc"], "Did you mean 'fcos_coco'"),
        (["images=images", "out=a", "recipe=my_voice"], "Use `lora-lightning transcribe`"),
        (["images=images", "out=a", "recipe=fcos_coco", "top=3"], "top=3: is an option of another kind"),
        (["images=images", "out=a", "adapter=images"], "images"),
        (["images=images", "out=a", "adapter=run/adapter", "ckpt=run/config.yaml"], "give one of the two"),
        (["images=images", "out=a", "recipe=fcos_coco", "score=2", "batch_size=0"], "score=2: give a number"),
        (["images=images", "out=a", "data.root=x"], "data.root=x: give recipe=NAME, or adapter=FOLDER"),
        (["images=broken", "out=a", "recipe=fcos_coco"], "x.png cannot be read as images"),
    ],
)  # fmt: skip
def test_mistakes(trained, monkeypatch, capsys, words, told):
    monkeypatch.chdir(trained)
    (trained / "broken").mkdir(exist_ok=True)
    (trained / "broken" / "x.png").write_text("no picture")
    with pytest.raises(SystemExit) as caught:
        command(["predict", *words])
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert told in message
    assert "Traceback" not in message
    assert not (trained / "a").exists()
