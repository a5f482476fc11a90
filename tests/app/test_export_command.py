"""`lora-lightning export`: of each kind of task, and what it refuses."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import wave
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file

import lora_lightning as ll
from lora_lightning.app.cli import main
from lora_lightning.app.export_tasks import kind_of, sound_of_text
from lora_lightning.app.loading_lines import loading_lines
from lora_lightning.app.trained import Trained
from lora_lightning.errors import UserError
from lora_lightning.exporting.detection import Detector
from lora_lightning.exporting.formats import FORMATS
from lora_lightning.files.locate import read_trained
from lora_lightning.models.detection import detector
from tests.acceptance.alone import NAMES, SHOWN, VIT, classifier


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        main(words)
    out, message = capsys.readouterr()
    assert caught.value.code == 2 and out == "" and "Traceback" not in message
    return message


def test_a_classifier_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, model = classifier(tmp_path / "a", class_names=NAMES, target="class", temperature=2.0)
    out = tmp_path / "out"
    main(["export", f"adapter={folder}", f"out={out}", "format=pt2", "bytes=true"])
    said = capsys.readouterr().out
    assert said.startswith(f"{out / 'model.pt2'}: ") and "takes x (batch, 3, 16, 16)" in said
    names = json.loads((out / "names.json").read_text())
    assert names == {"kind": "class", "names": NAMES, "temperature": 2.0}
    shown = json.loads((out / "preprocess.json").read_text())
    assert shown == {**SHOWN, "inside": True}
    card = (out / "README.md").read_text()
    assert "vit\\_tiny\\_patch16\\_224" in card and "apache-2.0" in card and "adapted by" in card
    pixels = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        wanted = model((pixels / 255 - 0.5) / 0.5)
        given = torch.export.load(out / "model.pt2").module()(pixels)[0]
    torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-4)


def test_plain_weights_and_the_cards_own_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, model = classifier(tmp_path / "a", class_names=NAMES, target="class")
    out = tmp_path / "out"
    main(["export", f"adapter={folder}", f"out={out}", "format=safetensors"])
    card = (out / "README.md").read_text()
    lines = card.partition("```python\n")[2].partition("```")[0]
    assert "timm.create_model('vit_tiny_patch16_224'" in lines
    monkeypatch.chdir(out)
    space: dict[str, Any] = {}
    exec(lines, space)
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(space["model"].eval()(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_base_and_its_adapter(tmp_path: Path) -> None:
    folder, model = classifier(tmp_path / "a", class_names=NAMES, target="class")
    out = tmp_path / "out"
    main(["export", f"adapter={folder}", f"out={out}", "format=onnx_adapters"])
    (file,) = out.glob("*.onnx_adapter")
    session, adapter = onnxruntime.InferenceSession(out / "base.onnx"), onnxruntime.LoraAdapter()
    adapter.Load(str(file))
    options = onnxruntime.RunOptions()
    options.add_active_adapter(adapter)
    x = torch.randn(2, 3, 16, 16)
    (given,) = session.run(None, {"x": x.numpy()}, options)
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(given), model(x), rtol=1e-4, atol=1e-4)


def test_several_adapters_of_one_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    day, model = classifier(tmp_path / "day" / "adapter", class_names=NAMES, target="class", temperature=2.0)
    night, other = tmp_path / "night_run", copy.deepcopy(model)
    for parameter in other.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.5)
    ll.save_adapter(other, night, origin=read_trained(day).origin())
    out = tmp_path / "out"
    words = ["export", f"adapters={day},night={night}", f"out={out}"]
    assert "adapters: is of format=onnx_adapters" in refused(words, capsys)
    assert "give one of them" in refused([*words, "format=onnx_adapters", f"adapter={day}"], capsys)
    double = ["export", f"adapters={day},day={night}", f"out={out}", "format=onnx_adapters"]
    assert "is the second 'day'; give it a name" in refused(double, capsys)
    main([*words, "format=onnx_adapters"])
    assert {"base.onnx", "day.onnx_adapter", "night.onnx_adapter"} < {path.name for path in out.iterdir()}
    card = (out / "README.md").read_text()
    assert "2 adapters on" in card and "adapter day" in card and "adapter night" in card
    assert json.loads((out / "names.json").read_text())["temperature"] == 2.0  # it is both's
    x = torch.rand(1, 3, 16, 16)
    session = onnxruntime.InferenceSession(out / "base.onnx")
    for name, adapted in {"day": model, "night": other.eval(), "day again": model}.items():
        adapter, options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
        adapter.Load(str(out / f"{name.split()[0]}.onnx_adapter"))
        options.add_active_adapter(adapter)
        (given,) = session.run(None, {"x": x.numpy()}, options)
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(given), adapted(x), rtol=1e-4, atol=1e-4)


def test_adapters_that_mean_other_classes_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cats, _ = classifier(tmp_path / "cats", class_names=NAMES, target="class")
    dogs, _ = classifier(tmp_path / "dogs", class_names=[*NAMES[:2], "eel"], target="class")
    words = ["export", f"adapters={cats},{dogs}", f"out={tmp_path / 'out'}", "format=onnx_adapters"]
    assert "dogs has other class_names than cats; export each of them alone" in refused(words, capsys)


def test_every_format_is_offered(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    assert "|".join(FORMATS) in "".join(capsys.readouterr().out.split())


def test_mistakes_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = classifier(tmp_path / "a", class_names=NAMES, target="class")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    given, out = f"adapter={folder}", f"out={tmp_path / 'out'}"
    wrong = {
        "Did you mean 'onnx'": [given, out, "format=onx"],
        "give out=FOLDER": [given],
        "is not empty": [given, f"out={tmp_path / 'full'}"],
        "give recipe=NAME, or adapter=FOLDER": [out],
        "none is given; give adapter=PATH": [out, "recipe=vit_digits", "format=onnx_adapters"],
        "axes=batch: give single with this task": [out, "recipe=fcos_shapes", "axes=batch"],
        "FasterRCNN looks again at as many regions": [out, "recipe=fasterrcnn_shapes"],
        "axes=stream: a recognizer with attention hears an utterance as a whole": [
            out, "recipe=accent_espeak", "axes=stream",
        ],
        "axes=time: give batch or size or single": [given, out, "axes=time"],
        "axes=size: give single with format=executorch": [given, out, "format=executorch", "axes=size"],
        "axes=size: VisionTransformer takes 16 x 16 pixels alone": [given, out, "axes=size"],
        "bytes=true: is of no use": [given, out, "format=safetensors", "bytes=true"],
    }  # fmt: skip
    for text, words in wrong.items():
        assert text in refused(["export", *words], capsys), text
    lacking = ["export", f"adapters={tmp_path / 'full'}", out, "format=onnx_adapters"]
    assert refused(lacking, capsys).count("adapter_config.json does not exist") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["seq2seq.Seq2SeqRecognizer", "transducer.TransducerRecognizer"])
def test_recognizers_of_a_loop_are_not_taken_for_ctc(name: str) -> None:
    task = {"_target_": f"lora_lightning.tasks.{name}"}
    with pytest.raises(UserError, match="writes one symbol after the other"):
        kind_of(Trained(None, {"task": task}, True, None))
    task = {"_target_": "lora_lightning.tasks.ctc.SpeechRecognizer"}
    assert kind_of(Trained(None, {"task": task}, True, None)) is sound_of_text


def test_lines_of_the_libraries() -> None:
    models = "lora_lightning.models."
    node = {
        "_target_": f"{models}torchvision.torchvision_model",
        "name": "torchvision/resnet18",
        "dropout": None,
    }
    assert "get_model('resnet18', weights=None, num_classes=3)" in loading_lines(node, {"num_classes": 3})
    node = {"_target_": f"{models}detection.detector", "name": "fcos_resnet50_fpn", "min_size": 64}
    assert "num_classes=4, min_size=64" in loading_lines(node, {"num_classes": 3})
    assert loading_lines({"_target_": f"{models}ctc.conformer_ctc"}, {}) == ""
    assert VIT.keys() <= {"img_size", "patch_size", "embed_dim", "depth", "num_heads"}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["vit_digits", "resnet_digits"])
def test_bases_of_recipes_in_onnx(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    main(["export", f"recipe={recipe}", f"out={out}", *(["axes=size"] if recipe == "resnet_digits" else [])])
    assert "onnx" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(out / "model.onnx")
    shown = json.loads((out / "preprocess.json").read_text())
    for count in (1, 4):
        (found,) = session.run(None, {"x": np.zeros((count, *shown["input_size"]), "float32")})
        assert found.shape == (count, 10)


@pytest.mark.slow
def test_a_compressed_base(tmp_path: Path) -> None:
    words = ["recipe=resnet_digits", "data.batch_size=16"]
    main(["compress", *words, "parameters=0.5", "batches=1", f"out={tmp_path / 'small'}"])
    for format in ("safetensors", "pt2"):
        out = tmp_path / format
        main(["export", f"adapter={tmp_path / 'small'}", f"out={out}", f"format={format}"])
        card = (out / "README.md").read_text()
        assert "layers are smaller ones" in card and "create_model" not in card
    small = load_file(tmp_path / "small" / "model.safetensors")
    given = load_file(tmp_path / "safetensors" / "model.safetensors")
    assert all(torch.equal(given[name], tensor) for name, tensor in small.items())


@pytest.mark.slow
def test_a_detector_in_onnx(tmp_path: Path) -> None:
    out = tmp_path / "out"
    main(["export", "recipe=fcos_shapes", f"out={out}"])
    facts = json.loads((out / "export.json").read_text())
    assert facts["outputs"] == ["boxes", "labels", "scores"] and facts["difference"] < 1e-4
    picture = np.load(out / "example.npz")["picture"]
    model = onnxruntime.InferenceSession(out / "model.onnx")
    boxes, labels, scores = model.run(None, {"picture": picture})
    assert len(boxes) == len(labels) == len(scores) > 0
    said = subprocess.run([sys.executable, out / "run.py"], capture_output=True, text=True, check=True).stdout
    assert re.match(r"\w+ 0\.\d{3}( \d+\.\d){4}\n", said)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["pt2", "onnx"])
@pytest.mark.parametrize("name", ["ssdlite", "rtdetr"])
def test_detectors_of_one_stage(name: str, format: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    if name == "ssdlite":
        network, side = detector("ssdlite320_mobilenet_v3_large", 3, score_thresh=0.01), 320
    else:
        pytest.importorskip("transformers")
        from tests.models.test_rtdetr import small

        network, side = small(), 64
    first, second = torch.rand(2, 1, 3, side, side)
    for module in network.modules():  # as they are made, all scores are one, and each runtime takes others
        if format == "onnx" and isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            torch.nn.init.kaiming_normal_(module.weight)
    if format == "onnx":
        part = network.backbone if name == "ssdlite" else network.model
        with torch.no_grad():
            for _ in range(30):  # the norms' statistics
                part.train()(torch.cat([first, second]))
    model = Detector(network).eval()
    given = {"format": format, "dynamic": False, "check": [second], "kind": "boxes", "names": NAMES}
    told = ll.export(model, first, tmp_path / "out", **given)
    assert told.outputs == ("boxes", "labels", "scores") and told.difference < 1e-5
    with torch.no_grad():
        assert len(model(second)["scores"]) > 5


@pytest.mark.slow
def test_a_recognizer_in_onnx(tmp_path: Path) -> None:
    out = tmp_path / "out"
    main(["export", "recipe=accent_espeak", f"out={out}"])
    session = onnxruntime.InferenceSession(out / "model.onnx")
    for seconds in (1, 3):
        waves = np.random.default_rng(0).normal(size=(2, 16000 * seconds)).astype("float32")
        logits, frames = session.run(None, {"waves": waves, "lengths": np.array([16000 * seconds, 9000])})
        assert logits.shape[:2] == (2, frames[0])
    with wave.open(str(tmp_path / "slow.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", None))
        file.writeframes(bytes(16000))
    run = [sys.executable, out / "run.py", tmp_path / "slow.wav"]
    said = subprocess.run(run, capture_output=True, text=True).stderr
    assert said.endswith("slow.wav: give one channel of 16 bits, 16000 samples a second\n")
