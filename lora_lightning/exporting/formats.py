"""The formats by name: what writes each, what runs it, and the lines by which `run.py` does. Nothing here
loads torch: the command line reads the names."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_lightning.exporting.checks import Run
    from lora_lightning.exporting.subject import Subject

TORCH_CALL = "[tensor.detach().numpy() for tensor in model(*map(torch.from_numpy, inputs.values()))]"
OPENS_WITH_ADAPTER = """\
settings = onnxruntime.SessionOptions()
settings.log_severity_level = 3  # it warns of inputs with values
model = onnxruntime.InferenceSession(here / "base.onnx", settings, providers=["CPUExecutionProvider"])
options = onnxruntime.RunOptions()  # of a request; without an adapter it is the base's
if sys.argv[-1].startswith("adapter="):
    name, adapter = sys.argv.pop()[8:], onnxruntime.LoraAdapter()
    if name not in (names := [path.stem for path in here.glob("*.onnx_adapter")]):
        sys.exit(f"adapter={name}: give one of {', '.join(sorted(names))}")
    adapter.Load(str(here / f"{name}.onnx_adapter"))
    options.add_active_adapter(adapter)"""

EXECUTORCH = """\
from executorch.runtime import Runtime

program = Runtime.get().load_program(here / "model.pte")
method = program.load_method("forward")"""


@dataclass(frozen=True)
class Format:
    """A format.

    Attributes:
        title: in words, for cards and tables.
        file: its main file.
        module: of this package, with `write` and `load`.
        packages: whose versions wrote the file.
        imports: the runtime that `run.py` imports; empty where the file is no program.
        beside: another package that it needs.
        opens, calls: the line of `run.py` that loads the file, and its words for what comes out of `inputs`,
            arrays by name: a list of arrays.
        adapters: whether the file takes each adapter of the model.
        single: whether it takes inputs of one size alone.
        int8: the module of this package that makes int8 of the file; empty where none does.
        quantizer: another package that this takes.
    """

    title: str
    file: str
    module: str
    packages: tuple[str, ...]
    imports: str = ""
    opens: str = ""
    calls: str = ""
    beside: str = ""
    adapters: bool = False
    single: bool = False
    int8: str = ""
    quantizer: str = ""

    @property
    def needs(self) -> tuple[str, ...]:
        """What `run.py` needs but numpy."""
        return tuple(name for name in (self.imports, self.beside) if name)

    def write(self, subject: Subject, folder: Path) -> None:
        """Fill a folder.

        Raises:
            LibraryError: a library is missing.
            UserError: the model cannot be written so.
        """
        _module(self.module).write(subject, folder)

    def load(self, folder: Path, subject: Subject | None = None) -> Run | dict[str | None, Run]:
        """What runs a folder's file; one for each name where it takes adapters.

        Raises:
            LibraryError: the runtime is missing.
        """
        found: Run | dict[str | None, Run] = _module(self.module).load(folder, subject)
        return found

    def int8_module(self) -> Any:
        """What has `quantize`, and the kinds of layers that it takes."""
        return _module(self.int8)


def _module(name: str) -> Any:
    return importlib.import_module(f"{__package__}.{name}")


FORMATS = {
    "onnx": Format(
        "ONNX",
        "model.onnx",
        "onnx",
        ("torch", "onnx", "onnxscript", "onnxruntime"),
        "onnxruntime",
        'model = onnxruntime.InferenceSession(here / "model.onnx", providers=["CPUExecutionProvider"])',
        "model.run(None, {one.name: inputs[one.name] for one in model.get_inputs()})",
        int8="onnx_int8",
    ),
    "onnx_adapters": Format(
        "ONNX with adapters",
        "base.onnx",
        "onnx_adapters",
        ("torch", "onnx", "onnxscript", "onnxruntime"),
        "onnxruntime",
        OPENS_WITH_ADAPTER,
        "model.run(None, {one.name: inputs[one.name] for one in model.get_inputs()}, options)",
        adapters=True,
    ),
    "pt2": Format(
        "torch.export",
        "model.pt2",
        "pt2",
        ("torch",),
        "torch",
        'model = torch.export.load(here / "model.pt2").module()',
        TORCH_CALL,
    ),
    "aoti": Format(
        "AOTInductor",
        "model.pt2",
        "aoti",
        ("torch",),
        "torch",
        'model = torch._inductor.aoti_load_package(str(here / "model.pt2"))',
        TORCH_CALL,
        int8="aoti_int8",
        quantizer="torchao",
    ),
    "executorch": Format(
        "ExecuTorch",
        "model.pte",
        "executorch",
        ("torch", "executorch"),
        "torch",
        EXECUTORCH,
        "[tensor.numpy() for tensor in method.execute([*map(torch.from_numpy, inputs.values())])]",
        beside="executorch",
        single=True,
        int8="executorch_int8",
        quantizer="torchao",
    ),
    "safetensors": Format(
        "safetensors",
        "model.safetensors",
        "plain_weights",
        ("torch", "safetensors"),
    ),
}
INT8 = tuple(name for name, form in FORMATS.items() if form.int8)
SCORED = tuple(name for name, form in FORMATS.items() if form.imports and not form.adapters)
