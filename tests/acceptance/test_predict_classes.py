"""`lora-lightning predict` with a classifier: from what travels with an adapter, weights and checkpoints."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

import lora_lightning as ll
from lora_lightning.app.application import main as train
from lora_lightning.app.cli import main as command
from lora_lightning.data.decoding import read_picture
from lora_lightning.data.picture_transform import evaluation_transform, preprocessing_of
from lora_lightning.models.timm import timm_model
from tests.acceptance.alone import NAME, NAMES, SHOWN, classifier

QUICK = ["debug=fast", "trainer.enable_progress_bar=false", "logger=none"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of several kinds, one of them cut, beside a file that is none."""
    folder = tmp_path_factory.mktemp("predict") / "images"
    (folder / "more").mkdir(parents=True)
    torch.manual_seed(3)
    for number, (name, mode) in enumerate([("a.jpg", "RGB"), ("b.PNG", "RGBA"), ("more/c.bmp", "L")]):
        pixels = torch.randint(0, 256, (20 + 9 * number, 30, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).convert(mode).save(folder / name)
    (folder / "cut.jpg").write_bytes((folder / "a.jpg").read_bytes()[:300])
    (folder / "notes.txt").write_text("none")
    return folder


def outputs(model: nn.Module, images: Path, name: str) -> torch.Tensor:
    with torch.no_grad():
        return model(evaluation_transform(SHOWN)(read_picture(images / name))[None])[0]


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_classes_of_a_folder_alone(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, model = classifier(tmp_path / "a", class_names=NAMES, target="class", temperature=2.0)
    out = tmp_path / "found.csv"
    words = ["predict", f"images={images}", f"adapter={folder}", "num_workers=0", "top=2"]
    command([*words, f"out={out}", "batch_size=2", f"sheet={tmp_path / 'sheet.png'}"])
    said = capsys.readouterr().out
    assert said.startswith("3 pictures predicted: ") and "1 cannot be read: cut.jpg" in said
    found = rows(out)
    assert list(found[0]) == ["path", "label", "probability", "label_2", "probability_2", "error"]
    assert [row["path"] for row in found] == ["a.jpg", "b.PNG", "cut.jpg", "more/c.bmp"]
    assert "cut.jpg cannot be read" in found[2]["error"] and found[2]["label"] == ""
    for row in (found[0], found[1], found[3]):
        best = (outputs(model, images, row["path"]) / 2).softmax(0).topk(2)
        assert [row["label"], row["label_2"]] == [NAMES[i] for i in best.indices]
        assert [float(row["probability"]), float(row["probability_2"])] == pytest.approx(
            best.values.tolist(), abs=1e-4
        )
    assert Image.open(tmp_path / "sheet.png").size == (16 + 4 * 216, 16 + 150 + 40 + 16)
    command([*words, f"out={tmp_path / 'found.json'}"])
    in_json = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert in_json[2].keys() == {"path", "error"} and in_json[1]["label"] == found[1]["label"]


def test_one_file_and_mirror_images(images: Path, tmp_path: Path) -> None:
    folder, model = classifier(tmp_path / "a", class_names=NAMES)
    shown = evaluation_transform(SHOWN)(read_picture(images / "a.jpg"))[None]
    with torch.no_grad():
        mean = (model(shown) + model(shown.flip(-1)))[0] / 2
    words = ["predict", f"images={images / 'a.jpg'}", f"adapter={folder}", "flips=true"]
    command([*words, f"out={tmp_path / 'x.json'}"])
    (row,) = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    assert row["path"] == "a.jpg"
    assert row["probability"] == pytest.approx(float(mean.softmax(0).max()), abs=1e-5)
    assert {row[f"label{n}"] for n in ("", "_2", "_3")} == set(NAMES)  # top is at most what there is


def test_pictures_are_shown_as_the_words_say(images: Path, tmp_path: Path) -> None:
    data = {"_target_": "lora_lightning.data.image_folder.ImageFolderDataModule", "crop_pct": None}
    folder, model = classifier(tmp_path / "a", data, class_names=NAMES)
    words = ["predict", f"images={images / 'a.jpg'}", f"adapter={folder}", "data.crop_pct=0.5"]
    command([*words, f"out={tmp_path / 'x.json'}"])
    (row,) = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    shown = evaluation_transform(preprocessing_of(model, crop_pct=0.5))(read_picture(images / "a.jpg"))
    with torch.no_grad():
        best = model(shown[None])[0].softmax(0).max()
    assert row["probability"] == pytest.approx(float(best), abs=1e-5)
    assert row["probability"] != pytest.approx(float(outputs(model, images, "a.jpg").softmax(0).max()))


def test_several_classes_at_once(images: Path, tmp_path: Path) -> None:
    folder, model = classifier(tmp_path / "a", class_names=NAMES, target="classes", temperature=0.5)
    words = ["predict", f"images={images}", f"adapter={folder}", f"out={tmp_path / 'x.json'}"]
    command([*words, "threshold=0.4", f"sheet={tmp_path / 's.jpg'}"])
    for row in json.loads((tmp_path / "x.json").read_text(encoding="utf-8")):
        if "error" in row:
            continue
        likely = (outputs(model, images, row["path"]) / 0.5).sigmoid()
        assert set(row["labels"]) == {n for n, p in zip(NAMES, likely, strict=True) if p >= 0.4}
        assert row["probabilities"] == sorted(row["probabilities"], reverse=True)
        assert row["probabilities"] == pytest.approx(likely[likely >= 0.4].sort(descending=True)[0].tolist())
    command([*words[:-1], f"out={tmp_path / 'x.csv'}", "threshold=0"])
    assert len(rows(tmp_path / "x.csv")[0]["labels"].split(";")) == 4  # one name has a semicolon


def test_numbers(images: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    from pyarrow import parquet

    folder, model = classifier(
        tmp_path / "a", num_classes=1, target="number", number_mean=20.0, number_std=4.0
    )
    command(["predict", f"images={images}", f"adapter={folder}", f"out={tmp_path / 'x.parquet'}"])
    found = parquet.read_table(tmp_path / "x.parquet").to_pylist()
    assert found[0]["value"] == pytest.approx(float(20 + 4 * outputs(model, images, "a.jpg")[0]), abs=1e-4)
    assert found[2]["value"] is None and "cannot be read" in found[2]["error"]


def test_an_adapter_copied_out_of_its_run_is_the_trained_model(
    run: Path, images: Path, tmp_path: Path
) -> None:
    shutil.copytree(run / "adapter", tmp_path / "alone")
    out = tmp_path / "x.csv"
    command(["predict", f"images={images}", f"adapter={tmp_path / 'alone'}", f"out={out}", "num_workers=0"])
    options = {"img_size": 16, "patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3}
    model = timm_model(NAME, num_classes=10, checkpoint="vit_digits", **options)
    ll.load_adapter(model, tmp_path / "alone")
    facts = travels(tmp_path / "alone")
    shown = evaluation_transform(facts)(read_picture(images / "a.jpg"))[None]
    best = (model.eval()(shown)[0] / facts["temperature"]).softmax(0).max()
    assert facts["temperature"] != 1 and facts["input_size"] == [3, 16, 16]
    assert float(rows(out)[0]["probability"]) == pytest.approx(float(best), abs=1e-4)


@pytest.mark.slow
def test_whatever_a_run_has_saved(
    run: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its adapter, its folder, weights and checkpoints: all alike, of every method."""
    monkeypatch.chdir(tmp_path)
    train(["recipe=vit_digits", *QUICK, "optim.lr=1e-2", "method=full", "compare=[]", "hydra.run.dir=full"])
    shutil.copytree(run / "adapter", tmp_path / "alone")
    shutil.copy(tmp_path / "full" / "model.safetensors", tmp_path / "alone.safetensors")
    command(["merge", "ckpt=alone", "out=merged.safetensors"])
    best = "checkpoints/best.ckpt"
    named = {
        "lora": ["adapter=alone", f"adapter={run}", f"ckpt={run / best}", "adapter=merged.safetensors"],
        "full": ["adapter=alone.safetensors", "adapter=full", f"ckpt=full/{best}"],
    }
    found: dict[str, list[list[str]]] = {"lora": [], "full": []}
    for kind, words in named.items():
        for number, word in enumerate(words):
            out = tmp_path / f"{kind}{number}.csv"
            command(["predict", f"images={images}", word, f"out={out}", "num_workers=0", "top=1"])
            found[kind].append([row["probability"] for row in rows(out) if row["probability"]])
    for texts in found.values():
        for other in texts[1:]:
            assert list(map(float, other)) == pytest.approx(list(map(float, texts[0])), abs=1e-4)
    assert found["lora"][0] != found["full"][0]


def travels(folder: Path) -> dict[str, Any]:
    """What travels with an adapter, as its file has it."""
    return json.loads((folder / "adapter_config.json").read_text())["origin"]["facts"]


def test_a_recipes_base_alone(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command(["predict", "recipe=vit_digits", f"images={images}", "out=x.csv", "num_workers=0"])
    assert rows(tmp_path / "x.csv")[0]["label"] in map(str, range(10))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["out=x.txt"], ["out=x.txt: give a file that ends in .csv or .json or .parquet"]),
        (["out=there.csv", "sheet=x.gif"], ["out=there.csv is there already", "sheet=x.gif: give a file"]),
        (["out=x.csv", "sheet=no/s.png"], ["sheet=no/s.png: there is no folder no"]),
        (["out=x.csv", "score=0.5"], ["score=0.5: is an option of another kind of task"]),
        (["out=x.csv", "threshold=0.5"], ["threshold=0.5: a picture has one prediction here"]),
        (["out=x.csv", "model.nme=x"], ["model.nme=x: there is no such option", "'model.name'"]),
        (["out=x.csv", "model.embed_dim=wide"], ["model.embed_dim=wide: give a whole number"]),
        (["out=x.csv", "trainer.precision=8", "top=0"], ["top=0: give a whole number of at least 1"]),
        (["out=x.csv", "model.embed_dim=48"], ["alone"]),
    ],
)  # fmt: skip
def test_mistakes(
    words: list[str], told: list[str], images: Path, run: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run / "adapter", tmp_path / "alone")
    (tmp_path / "there.csv").write_text("mine")
    with pytest.raises(SystemExit) as caught:
        command(["predict", f"images={images}", "adapter=alone", *words])
    message = capsys.readouterr().err
    assert caught.value.code == 2 and "Traceback" not in message
    assert all(text in message for text in told), message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["alone", "there.csv"]
    assert (tmp_path / "there.csv").read_text() == "mine"


def test_a_damaged_count_of_classes(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = classifier(tmp_path / "a", class_names=NAMES[:2])
    with pytest.raises(SystemExit):
        command(["predict", f"images={images}", f"adapter={folder}", f"out={tmp_path / 'x.csv'}"])
    assert "2 names for num_classes=3" in capsys.readouterr().err
