"""The formats by name: what writes each, what runs it, and the lines by which `run.py` does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lora_lightning.exporting import onnx, onnx_adapters, plain_weights, pt2
from lora_lightning.exporting.checks import Run
from lora_lightning.exporting.subject import Subject

TORCH_CALL = "[tensor.detach().numpy() for tensor in model(*map(torch.from_numpy, inputs.values()))]"


@dataclass(frozen=True)
class Format:
    """A format.

    Attributes:
        title: in words, for cards and tables.
        file: its main file.
        write: fills a folder.
        load: what runs the folder's file.
        packages: whose versions wrote the file.
        imports: the runtime that `run.py` imports; empty where the file is no program.
        opens, calls: the line of `run.py` that loads the file, and its words for what comes out of `inputs`,
            arrays by name: a list of arrays.
        adapters: whether the file takes each adapter of the model; `load` then gives a `Run` for each name.
    """

    title: str
    file: str
    write: Callable[[Subject, Path], None]
    load: Callable[[Path, Subject], Run | dict[str | None, Run]]
    packages: tuple[str, ...]
    imports: str = ""
    opens: str = ""
    calls: str = ""
    adapters: bool = False


FORMATS = {
    "onnx": Format(
        "ONNX",
        onnx.FILE,
        onnx.write,
        lambda folder, _: onnx.load(folder),
        ("torch", "onnx", "onnxscript", "onnxruntime"),
        "onnxruntime",
        'model = onnxruntime.InferenceSession(here / "model.onnx", providers=["CPUExecutionProvider"])',
        "model.run(None, {one.name: inputs[one.name] for one in model.get_inputs()})",
    ),
    "onnx_adapters": Format(
        "ONNX with adapters",
        onnx_adapters.FILE,
        onnx_adapters.write,
        lambda folder, _: onnx_adapters.load(folder),
        ("torch", "onnx", "onnxscript", "onnxruntime"),
        "onnxruntime",
        onnx_adapters.OPENS,
        "model.run(None, {one.name: inputs[one.name] for one in model.get_inputs()}, options)",
        adapters=True,
    ),
    "pt2": Format(
        "torch.export",
        pt2.FILE,
        pt2.write,
        lambda folder, _: pt2.load(folder),
        ("torch",),
        "torch",
        'model = torch.export.load(here / "model.pt2").module()',
        TORCH_CALL,
    ),
    "aoti": Format(
        "AOTInductor",
        pt2.FILE,
        pt2.write_compiled,
        lambda folder, _: pt2.load_compiled(folder),
        ("torch",),
        "torch",
        'model = torch._inductor.aoti_load_package(str(here / "model.pt2"))',
        TORCH_CALL,
    ),
    "safetensors": Format(
        "safetensors",
        plain_weights.FILE,
        plain_weights.write,
        plain_weights.load,
        ("torch", "safetensors"),
    ),
}
