"""One base and many adapters for onnxruntime: base.onnx, whose factors are optional inputs, and a small
.onnx_adapter file for each adapter, chosen in each request."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from lora_lightning.exporting.checks import Arrays, Run
from lora_lightning.exporting.factors import OpenSubject
from lora_lightning.exporting.onnx import made, opened_session
from lora_lightning.exporting.subject import Subject
from lora_lightning.utils.libraries import loading

FILE, SUFFIX = "base.onnx", ".onnx_adapter"


def write(subject: Subject, folder: Path) -> None:
    """Write `base.onnx` and a file for each adapter.

    Raises:
        LibraryError: a library is missing.
        UserError: the model cannot be written so.
    """
    assert isinstance(subject, OpenSubject)
    program = made(subject, subject.computed)
    import onnx_ir

    for value in program.model.graph.inputs:
        if value.name in subject.defaults:  # an input that has a value may be left out
            value.const_value = onnx_ir.tensor(subject.defaults[value.name].numpy(), name=value.name)
            program.model.graph.register_initializer(value)
    used = {value.name for value in program.model.graph.inputs}
    program.save(str(folder / FILE))
    for name, tensors in subject.adapters.items():
        _write_adapter(folder / f"{name}{SUFFIX}", {n: t.numpy() for n, t in tensors.items() if n in used})


def _write_adapter(path: Path, arrays: Arrays) -> None:
    with loading("onnxruntime", "export"):
        import onnxruntime
    form = onnxruntime.AdapterFormat()
    form.set_adapter_version(1)
    form.set_model_version(1)
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
    form.set_parameters(values)
    form.export_adapter(str(path))


def load(folder: Path, _subject: Subject | None = None) -> dict[str | None, Run]:
    """Runs the base of a folder with each of its adapters, by name; None is the base alone.

    Raises:
        LibraryError: onnxruntime is missing.
    """
    with loading("onnxruntime", "export"):
        import onnxruntime
    session = opened_session(folder / FILE)
    adapters: dict[str | None, Any] = {None: None}
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        adapters[path.stem] = onnxruntime.LoraAdapter()
        adapters[path.stem].Load(str(path))
    takes = [one.name for one in session.get_inputs()]

    def run(adapter: Any, inputs: Arrays) -> list[Any]:
        options = onnxruntime.RunOptions()
        if adapter is not None:
            options.add_active_adapter(adapter)
        return list(session.run(None, {name: inputs[name] for name in takes}, options))

    return {name: partial(run, adapter) for name, adapter in adapters.items()}
