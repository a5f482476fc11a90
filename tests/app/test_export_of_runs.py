"""Exported files that the run's own data calibrate and test: by the command, and as the end of a run."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from lora_lightning.app.cli import main
from lora_lightning.app.export_scores import FromFile
from lora_lightning.errors import UserError
from lora_lightning.exporting.subject import to_bytes
from tests.acceptance.alone import NAMES, SHOWN, classifier

QUICK = [
    "compare=[]", "trainer.max_epochs=1", "+trainer.limit_train_batches=2", "trainer.limit_val_batches=1",
    "+trainer.limit_test_batches=2", "data.batch_size=16", "callbacks.preemption=null", "hydra.run.dir=run",
]  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_file_in_the_place_of_a_network():
    given = {}

    def run(arrays):
        given.update(arrays)
        return [arrays["waves"][:, ::2], arrays["lengths"] // 2]

    waves, lengths = torch.randn(2, 6), torch.tensor([6, 4])
    logits, frames = FromFile(run, ["waves", "lengths"])(waves, lengths)
    assert torch.equal(logits, waves[:, ::2]) and frames.tolist() == [3, 2]
    pixels = torch.randint(256, (1, 3, 4, 4), dtype=torch.uint8)
    pictures = (pixels / 255 - 0.5) / 0.5
    (found,) = FromFile(lambda arrays: [arrays["x"]], ["x"], SHOWN)(pictures)
    assert torch.equal(found, pixels[0]) and torch.equal(to_bytes(pictures, SHOWN), pixels)

    def refuses(arrays):
        raise RuntimeError("INVALID_ARGUMENT: Got: 6 Expected: 8")

    with pytest.raises(UserError, match=r"does not take x \(2, 6\) of the test data: .*axes=size"):
        FromFile(refuses, ["x"])(waves)


def test_mistakes_are_one_message(here, capsys):
    folder, _ = classifier(here / "a", class_names=NAMES, target="class")
    given = ["export", f"adapter={folder}", "out=out"]
    wrong = {
        "quantize=dynamic: is of format=onnx, aoti, executorch, and this is pt2": [
            *given, "format=pt2", "quantize=dynamic",
        ],
        "evaluate=true: is of format=onnx, pt2, aoti, executorch, and this is safe": [
            *given, "format=safetensors", "evaluate=true",
        ],
        "evaluate=true: gives the file the run's utterances": [
            "export", "recipe=edge_accent", "out=out", "axes=single", "evaluate=true",
        ],
        "quantize=statik: give": [*given, "quantize=statik"],
        "quantize=static and evaluate=true: needs the data of the run: ": [
            *given, "quantize=static", "evaluate=true",
        ],
        "export.quantize=static: give export.format=onnx or executorch": [
            "train", *QUICK, "export.quantize=static",
        ],
        "export.format=pt2: give": ["train", *QUICK, "export.format=pt2"],
        "export: method=none trains nothing": ["train", *QUICK, "method=none", "export.format=onnx"],
        "export: task ObjectDetector is of no kind": [
            "train", "recipe=fcos_shapes", *QUICK, "export.format=onnx",
        ],
        "export.format=executorch: takes sound of one length": [
            "train", "recipe=edge_accent", *QUICK, "export.format=executorch",
        ],
        "export: is for one process": ["train", *QUICK, "trainer.devices=2", "export.format=onnx"],
    }  # fmt: skip
    for text, words in wrong.items():
        with pytest.raises(SystemExit) as ended:
            main(words)
        message = capsys.readouterr().err
        assert ended.value.code == 2 and text in message and "Traceback" not in message, (text, message)
    assert not Path("out").exists() and not Path("run").exists()


@pytest.mark.slow
def test_a_run_ends_in_an_int8_file_that_is_tested(here, capsys):
    main(["train", "recipe=edge_digits", *QUICK])
    assert "exported, int8 static" in capsys.readouterr().out
    results = {one["method"]: one for one in json.loads(Path("run/results.json").read_text())}
    told = json.loads(Path("run/exported/export.json").read_text())
    row = results["exported"]
    assert row["scores"]["acc"] == told["scores"]["acc"] and told["quantize"] == "static"
    assert abs(row["scores"]["acc"] - results["full"]["scores"]["acc"]) < 0.1
    assert row["checkpoint_bytes"] == told["bytes"] < 300_000  # 118,000 parameters
    assert "exported, int8 static" in Path("run/report.html").read_text()
    assert "| this file |" in Path("run/exported/README.md").read_text()
    session = onnxruntime.InferenceSession("run/exported/model.onnx")
    assert session.run(None, {"x": np.zeros((3, 3, 16, 16), "float32")})[0].shape == (3, 10)


@pytest.mark.slow
def test_a_run_ends_in_an_int8_file_for_phones_that_is_tested(here, capsys):
    pytest.importorskip("executorch")
    main(["train", "recipe=resnet_digits", *QUICK, "export.format=executorch", "export.quantize=static"])
    results = {one["method"]: one for one in json.loads(Path("run/results.json").read_text())}
    told = json.loads(Path("run/exported/export.json").read_text())
    assert results["exported"]["scores"]["acc"] == told["scores"]["acc"] and told["format"] == "executorch"
    assert abs(told["scores"]["acc"] - results["lora"]["scores"]["acc"]) < 0.1
    assert told["bytes"] < 500_000 and told["inputs"][0]["shape"] == [1, 3, 16, 16]
    assert "pip install torch executorch numpy" in Path("run/exported/README.md").read_text()


@pytest.mark.slow
def test_the_command_calibrates_and_tests_a_file_of_bytes(here, capsys):
    main(["train", "recipe=resnet_digits", *QUICK])
    words = ["export", "adapter=run", "out=out", "bytes=true", "evaluate=true"]
    main([*words, "quantize=static"])
    shown = capsys.readouterr().out
    row = next(line for line in shown.splitlines() if line.startswith("accuracy %") and line.count("(") == 2)
    model, file = (float(cell.split(" (")[0]) for cell in row.removeprefix("accuracy %").split(")")[:2])
    assert abs(model - file) < 8
    main([*words, "overwrite=true"])
    told = json.loads(Path("out/export.json").read_text())
    whole = json.loads(Path("run/results.json").read_text())[0]["scores"]
    assert told["inputs"][0]["dtype"] == "uint8" and told["scores"].keys() <= whole.keys()
