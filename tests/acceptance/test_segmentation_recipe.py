"""The recipe on own pictures with masks, from folders to masks of other pictures, by the command line."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from lora_lightning.app.application import main
from lora_lightning.app.cli import main as predict
from lora_lightning.app.predict_masks import Pictures, Writer
from lora_lightning.models.timm import timm_model
from tests.data.mask_files import NAMES, PALETTE, write_pairs
from tests.terminal import beside_progress

CPU = ["trainer=cpu", "trainer.precision=32-true", "logger=csv", "data.num_workers=0", "hydra.run.dir=run"]
TINY = ["data.image_size=24", "data.crop_size=24", "data.batch_size=2", "trainer.max_epochs=1"]
SIZE = {"embed_dim": 32, "depth": 4, "num_heads": 2}
LIGHT = [
    "model=timm_segmenter", "model.name=vit_tiny_patch16_224", "model.checkpoint=base.safetensors",
    "model.head_width=16", *(f"+model.{name}={value}" for name, value in SIZE.items()),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _somewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)


def test_from_two_folders_to_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    save_file(timm_model("vit_tiny_patch16_224", **SIZE).state_dict(), tmp_path / "base.safetensors")
    write_pairs(tmp_path / "photos", 10)
    (tmp_path / "photos" / "masks" / "009.png").unlink()
    names = f"data.class_names=[{','.join(NAMES)}]"
    words = ["recipe=segment_folder", "data.root=photos", names, *LIGHT, *CPU, *TINY]
    with pytest.raises(SystemExit) as caught:
        main(words)
    told = capsys.readouterr().err
    assert caught.value.code == 2 and "picture without a mask" in told and "images/009.png" in told
    main([*words, "data.strict=false"])
    out, err = capsys.readouterr()
    assert beside_progress(err) == "" and "picture without a mask" in out and "test mIoU" in out
    (result,) = json.loads((tmp_path / "run" / "results.json").read_text())
    assert 0 <= result["scores"]["miou"] <= 1 and set(result["intervals"]) == {"miou", "acc"}
    assert (tmp_path / "run" / "contact_sheet.png").exists() and (tmp_path / "run" / "report.html").exists()
    masks_of_others(tmp_path, capsys)


def masks_of_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The adapter alone, copied elsewhere, gives masks of other pictures; one that cannot be read is told."""
    (tmp_path / "run" / "adapter").rename(tmp_path / "alone")
    write_pairs(tmp_path / "new", 3, size=(40, 30))
    (tmp_path / "new" / "images" / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    words = ["predict", "images=new/images", "out=found", "adapter=alone"]
    predict(words)
    out, _ = capsys.readouterr()
    assert "3 pictures predicted, of 3 classes" in out and "1 cannot be read: cut.jpg" in out
    with Image.open("found/masks/001.png") as mask:
        assert mask.size == (40, 30) and mask.mode == "P" and mask.getpalette()[:9] == PALETTE
        assert set(np.unique(np.asarray(mask))) <= {0, 1, 2}
    with Image.open("found/overlays/001.png") as laid:
        assert laid.size == (40, 30)
    assert Path("found/classes.txt").read_text().split() == NAMES
    header, *rows = csv.reader(Path("found/pixels.csv").read_text().splitlines())
    assert header == ["path", *NAMES, "error"] and len(rows) == 4
    assert all(sum(map(float, row[1:4])) == pytest.approx(1, abs=1e-4) for row in rows if not row[4])
    names = f"data.class_names=[{NAMES[0]},{NAMES[2]},{NAMES[1]}]"  # numbered otherwise
    predict(["evaluate", "adapter=alone", "data.root=new", names, "out=scores.json"])
    scores = json.loads(Path("scores.json").read_text())
    assert scores["scores"].keys() >= {"miou", "acc"} and len(scores["per_class"]) == 3
    assert "mIoU" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        predict(words)
    assert "out=found is not empty" in capsys.readouterr().err
    predict([*words[:2], "out=flipped", *words[3:], "flips=true", "batch_size=2"])
    with pytest.raises(SystemExit):
        predict([*words[:2], "out=other", *words[3:], "score=0.4"])
    assert (
        "score=0.4: is an option of another kind of task: leave it out; this one has flips"
        in capsys.readouterr().err
    )


def test_classes_called_as_other_columns_are(tmp_path: Path) -> None:
    write_pairs(tmp_path / "new", 1)
    pictures = Pictures(tmp_path / "new" / "images", None)
    writer = Writer(tmp_path / "found", pictures, ["path", "error", "road", "road"], None)
    writer.add(0, np.zeros((24, 32), np.uint8))
    assert "1 picture predicted" in writer.close()[0]
    header, row = csv.reader(Path("found/pixels.csv").read_text().splitlines())
    assert header == [
        "path",
        "path (class 0)",
        "error (class 1)",
        "road (class 2)",
        "road (class 3)",
        "error",
    ]
    assert row == [*pictures.names, "1", "0", "0", "0", ""]


def test_everything_missing_in_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(
            [
                "recipe=segment_folder",
                "data.root=photos",
                "data.class_names=[a,b]",
                "trainer=cpu",
                "logger=none",
            ]
        )
    told = capsys.readouterr().err
    assert caught.value.code == 2 and "Traceback" not in told
    for words in ("data.root=", "photos", "there is no such folder", "deeplabv3_resnet50_coco-cd0a2569.pth"):
        assert words in told, told
