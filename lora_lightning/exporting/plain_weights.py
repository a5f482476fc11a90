"""A plain state dict in safetensors, which the library of the model loads strictly."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lora_lightning.exporting.checks import Arrays, Run, array_of
from lora_lightning.exporting.subject import Subject
from lora_lightning.files.weights import weights_writer

FILE = "model.safetensors"


def write(subject: Subject, folder: Path) -> None:
    """Write the network's own tensors under its own names."""
    about = {"exported": type(subject.network).__name__}
    weights_writer(subject.network.state_dict(), about)(str(folder / FILE))


@torch.no_grad()
def load(folder: Path, subject: Subject) -> Run:
    """Runs a network of the same build that had other values before the file was loaded into it, strictly."""
    model, network = _emptied(subject)
    network.load_state_dict(load_file(folder / FILE))
    wanted = subject.network.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in network.state_dict().items())

    @torch.no_grad()
    def run(inputs: Arrays) -> list[Any]:
        given = [torch.from_numpy(inputs[name]).to(like.dtype) for name, like in subject.inputs.items()]
        return [array_of(tensor) for tensor in model(*given)]

    return run


def _emptied(subject: Subject) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A copy of what is exported, and the network in it, all of whose saved tensors are zero."""
    model, network = copy.deepcopy((subject.model, subject.network))
    for tensor in network.state_dict().values():
        tensor.zero_()
    return model, network
