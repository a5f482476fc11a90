"""Exported: what `export` tells of a folder that it has written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lora_lightning.exporting.formats import FORMATS


@dataclass(frozen=True)
class Exported:
    """A folder that was written.

    Attributes:
        folder: where it is.
        format: a key of `lora_lightning.exporting.formats.FORMATS`.
        file: the model's file in it.
        bytes: of that file, and of the weights beside it.
        files: all names in the folder.
        inputs: names and sizes, with the names of dynamic axes.
        outputs: names.
        difference: the largest from the adapted model on fresh inputs, or of "static" on those of the
            calibration, of the output's scale.
        sizes: of the inputs on which it was checked.
        quantize: "dynamic" or "static", where weights are int8.
    """

    folder: Path
    format: str
    file: str
    bytes: int
    files: tuple[str, ...]
    inputs: dict[str, tuple[int | str, ...]]
    outputs: tuple[str, ...]
    difference: float
    sizes: tuple[dict[str, tuple[int, ...]], ...]
    quantize: str | None = None

    def __str__(self) -> str:
        title = FORMATS[self.format].title + (f", int8 ({self.quantize})" if self.quantize else "")
        lines = [f"{self.folder / self.file}: {self.bytes:,} bytes, {title}"]
        given = (
            "inputs of the calibration" if self.quantize == "static" else f"{len(self.sizes)} fresh inputs"
        )
        if self.inputs:
            shapes = ", ".join(f"{name} ({', '.join(map(str, s))})" for name, s in self.inputs.items())
            lines += [
                f"takes {shapes}; gives {', '.join(self.outputs)}",
                f"differs from the model by {self.difference:.1e} of the output's scale at most, on {given}",
            ]
        others = ", ".join(name for name in self.files if name != self.file)
        return "\n".join([*lines, f"beside it: {others}"])
