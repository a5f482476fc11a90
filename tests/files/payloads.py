"""Payloads: what creates a file, the marker, if it is executed, in the forms that files can carry."""

from __future__ import annotations

import io
import pickle
import pydoc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lora_lightning as ll
from lora_lightning.app.predict import predict
from lora_lightning.app.rebuild import merge_files
from lora_lightning.app.recognizer import recognizer

Node = dict[str, Any]
TIMM = "lora_lightning.models.timm.timm_model"
DATA = "lora_lightning.data.digits.DigitsDataModule"
TASKS = {
    "merge": "lora_lightning.tasks.classification.ImageClassifier",
    "transcribe": "lora_lightning.tasks.ctc.SpeechRecognizer",
    "predict": "lora_lightning.tasks.detection.ObjectDetector",
}
BY_HYDRA = ("open", "mkdir", "touch", "torch_load", "numpy_load", "through_a_model", "through_data")
RESOLVERS = ("${oc.env:HOME}", "${oc.decode:'1'}", "${oc.create:{a:1}}", "${hydra:runtime.cwd}", "${now:%Y}")


class Touch:
    """Unpickled, it creates the marker."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (self.marker, "w")


def pickled(marker: Path) -> bytes:
    return pickle.dumps({"state_dict": {}, "x": Touch(marker)})


def npy(marker: Path) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([Touch(marker)], object), allow_pickle=True)
    return file.getvalue()


def calls(target: str, **options: Any) -> Callable[[Path], Node]:
    """A call with options in which {m} is the marker."""
    return lambda m: {"_target_": target} | {k: str(v).format(m=m) for k, v in options.items()}


def unpickles(target: str, contents: Callable[[Path], bytes], **options: Any) -> Callable[[Path], Node]:
    """A call that reads a file beside the marker."""

    def node(marker: Path) -> Node:
        file = marker.with_name("evil.bin")
        file.write_bytes(contents(marker))
        return {"_target_": target, "_args_": [str(file)], **options}

    return node


def path_of(marker: Path) -> Node:
    return {"_target_": "pathlib.Path", "_args_": [str(marker)]}


NODES: dict[str, Callable[[Path], Node]] = {
    "open": calls("builtins.open", file="{m}", mode="w"),
    "system": calls("os.system", command="touch {m}"),
    "mkdir": calls("os.mkdir", path="{m}"),
    "process": lambda m: {"_target_": "subprocess.check_call", "_args_": [["touch", str(m)]]},
    "eval": lambda m: {"_target_": "builtins.eval", "_args_": [f"open({str(m)!r}, 'w')"]},
    "touch": lambda m: {"_target_": "pathlib.Path.touch", "_args_": [path_of(m)]},
    "torch_load": unpickles("torch.load", pickled, weights_only=False),
    "numpy_load": unpickles("numpy.load", npy, allow_pickle=True),
    "through_the_package": calls("lora_lightning.files.locate.os.system", command="touch {m}"),
    "through_a_model": unpickles("lora_lightning.models.timm.torch.load", pickled, weights_only=False),
    "through_data": unpickles("lora_lightning.data.detection.np.load", npy, allow_pickle=True),
}


def apply_plan(node: Any) -> Any:
    """What `hydra.utils.instantiate` does, without the list of names that some versions of it refuse."""
    if isinstance(node, list):
        return [apply_plan(value) for value in node]
    if not isinstance(node, dict):
        return node
    options = {name: apply_plan(value) for name, value in node.items() if name != "_target_"}
    call: Any = pydoc.locate(node["_target_"])
    return call(*options.pop("_args_", []), **options)


def other_letters(name: str) -> str:
    """The name with its first o in Cyrillic, which looks the same."""
    return name.replace("o", "\N{CYRILLIC SMALL LETTER O}", 1)


def config_for(command: str) -> dict[str, Any]:
    return {
        "model": {"_target_": TIMM, "name": "vit_tiny_patch16_224"},
        "data": {"_target_": DATA, "train_size": 10},
        "task": {"_target_": TASKS[command]},
        "trainer": {"_target_": "lightning.pytorch.Trainer", "accelerator": "cpu", "precision": "32-true"},
    }


def use(command: str, run: Path) -> None:
    """What a user does with the folder of somebody else."""
    if command == "merge":
        merge_files(run / "adapter", run / "out.safetensors")
    elif command == "transcribe":
        recognizer(str(run / "adapter"))
    else:
        predict({"adapter": str(run / "adapter"), "out": str(run / "out")}, [])


def refusal(act: Callable[[], object], marker: Path) -> str:
    """The one message of ours with which it is refused; nothing has run."""
    with pytest.raises(ll.UserError) as caught:
        act()
    assert not marker.exists()
    assert "Traceback" not in str(caught.value)
    return str(caught.value)
