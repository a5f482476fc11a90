"""`lora-lightning evaluate`: the run's own scores again, and those on other data, class by class by name."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from lora_lightning.app.application import main as train
from lora_lightning.app.cli import main as command
from lora_lightning.data.picture_transform import evaluation_transform
from tests.acceptance.alone import NAMES, SHOWN, classifier

QUICK = ["debug=fast", "trainer.enable_progress_bar=false", "logger=none"]


def draw_photos(model: nn.Module, folder: Path) -> float:
    """Pictures of two of a model's three classes, as it tells them, every third in the folder of the other.

    Returns:
        Its accuracy.
    """
    transform, right, both = evaluation_transform(SHOWN), [], NAMES[1:]
    for number in range(60):
        colours = torch.randint(0, 256, (2, 1, 3), dtype=torch.uint8)
        picture = Image.fromarray(colours.repeat(12, 24, 1).numpy())
        with torch.no_grad():
            name = NAMES[int(model(transform(picture)[None]).argmax())]
        if name in both:
            put = name if number % 3 else both[1 - both.index(name)]
            (folder / put).mkdir(parents=True, exist_ok=True)
            picture.save(folder / put / f"{number}.png")
            right.append(put == name)
    assert len(list(folder.iterdir())) == 2
    return sum(right) / len(right)


def test_other_pictures_are_matched_by_the_names_of_their_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, model = classifier(tmp_path / "a", class_names=NAMES, target="class", temperature=2.0)
    photos = tmp_path / "photos"
    accuracy = draw_photos(model, photos)
    counts = {name: len(list((photos / name).glob("*"))) for name in NAMES}
    words = ["evaluate", f"adapter={folder}", "data=imagefolder", f"data.root={photos}", "data.num_workers=0"]
    command([*words, f"out={tmp_path / 'x.json'}", f"report={tmp_path / 'report'}"])
    page = capsys.readouterr().out
    assert f"{sum(counts.values())} test samples" in page and "accuracy %" in page
    assert re.search(rf"dog; or wolf +{counts[NAMES[1]]} ", page)
    found = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    assert found["scores"]["acc"] == pytest.approx(accuracy) and 0.3 < accuracy < 0.9
    assert {row["class"]: row["pictures"] for row in found["per_class"]} == counts
    assert found["intervals"]["acc"][0] <= found["scores"]["acc"] <= found["intervals"]["acc"][1]
    written = (tmp_path / "report" / "report.html").read_text()
    assert f"<h1>{folder} on" in written and "Scores on the test data" in written and "Classes" in written
    assert '<th class="number">before</th>' in written, "the model with its adapter off"


def test_classes_that_the_model_does_not_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, model = classifier(tmp_path / "a", class_names=["cat", "dogs; or wolf", "köttur"])
    photos = tmp_path / "photos"
    draw_photos(model, photos)
    with pytest.raises(SystemExit) as caught:
        command(["evaluate", f"adapter={folder}", "data=imagefolder", f"data.root={photos}"])
    message = capsys.readouterr().err
    assert caught.value.code == 2 and "Traceback" not in message
    assert "the data have 'dog; or wolf'" in message and "Did you mean 'dogs; or wolf'?" in message


def scores(words: list[str], out: Path) -> dict[str, float]:
    command(["evaluate", *words, f"out={out}", "overwrite=true"])
    return json.loads(out.read_text(encoding="utf-8"))["scores"]


def test_the_runs_own_test_data(run: Path, tmp_path: Path) -> None:
    """From a copy of the adapter's folder; with one option changed those of the source domain, on which
    the task reports anyway."""
    shutil.copytree(run / "adapter", tmp_path / "alone")
    found = scores([f"adapter={tmp_path / 'alone'}"], tmp_path / "x.json")
    other = scores([f"adapter={tmp_path / 'alone'}", "data.domain=source"], tmp_path / "x.json")
    assert other["acc"] == pytest.approx(found["source"]) and other["acc"] != found["acc"]


@pytest.mark.slow
def test_the_scores_of_a_whole_run_come_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train(["recipe=vit_digits", "compare=[]", "trainer.max_epochs=1", "logger=none", "hydra.run.dir=run"])
    (result,) = json.loads(Path("run/results.json").read_text())
    result["scores"].pop("source_off")  # merged, the adapter cannot be switched off
    for words in (["adapter=run"], ["ckpt=run/checkpoints/best.ckpt", "data.batch_size=64"]):
        found = scores(words, tmp_path / "x.json")
        assert {name: found[name] for name in result["scores"]} == pytest.approx(result["scores"], abs=2e-3)


@pytest.mark.slow
def test_objects_and_speech(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = scores(["recipe=fcos_shapes", "data.domain=source", "data.test_size=8"], tmp_path / "x.json")
    assert found["map"] > 0.5 and found["map/disc"] > 0.3
    found = scores(["recipe=accent_espeak", "data.accent=scottish"], tmp_path / "x.json")
    assert 0 < found["cer"] < found["wer"] < 1
    assert "us WER %" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], ["give recipe=NAME, or adapter=FOLDER of a run"]),
        (["adapter=alone", "data=digts"], ["data=digts: give one of", "Did you mean 'digits'"]),
        (["adapter=alone", "data.domin=x"], ["data.domin=x: there is no such option", "'data.domain'"]),
        (["adapter=alone", "data=imagefolder"], ["data.root=null: give"]),
        (["adapter=alone", "data=imagefolder", "data.root=nowhere"], ["nowhere"]),
        (["adapter=alone", "out=x.csv", "data.domain=x"], ["out=x.csv: give a file", "data.domain=x: give"]),
    ],
)  # fmt: skip
def test_mistakes(
    words: list[str], told: list[str], run: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run / "adapter", tmp_path / "alone")
    with pytest.raises(SystemExit) as caught:
        command(["evaluate", *words])
    message = capsys.readouterr().err
    assert caught.value.code == 2 and "Traceback" not in message
    assert all(text in message for text in told), message


def test_a_runs_own_pictures_are_found_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where they lie stands in the run's folder, not with the adapter, relative to where it was started."""
    folder, model = classifier(tmp_path / "run" / "adapter", class_names=NAMES, target="class")
    draw_photos(model, tmp_path / "photos")
    (tmp_path / "run" / ".hydra").mkdir()
    (tmp_path / "run" / ".hydra" / "hydra.yaml").write_text(f"hydra: {{runtime: {{cwd: {tmp_path}}}}}\n")
    data = "{_target_: lora_lightning.data.image_folder.ImageFolderDataModule, root: photos, num_workers: 0}"
    (tmp_path / "run" / "config.yaml").write_text(f"model: {{}}\ndata: {data}\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    command(["evaluate", f"adapter={folder}"])
    assert "accuracy %" in capsys.readouterr().out
    (folder / "base.safetensors").unlink()
    with pytest.raises(SystemExit):
        command(["evaluate", f"adapter={folder}"])
    assert "Its base was random: copy base.safetensors from its run's folder" in capsys.readouterr().err
