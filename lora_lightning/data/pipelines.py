"""torchaudio's pretrained speech models: their names, labels, options and weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_lightning.data.text import BLANK, SPACE
from lora_lightning.utils.download import DOWNLOAD_AGAIN, url_file
from lora_lightning.utils.libraries import loading
from lora_lightning.utils.torch_file import read_torch

with loading("torchaudio"):
    import torchaudio

SOURCE = "https://download.pytorch.org/torchaudio/models/"
PIPELINES: dict[str, Any] = {
    name: bundle
    for name in torchaudio.pipelines.__all__
    if isinstance(bundle := getattr(torchaudio.pipelines, name), torchaudio.pipelines.Wav2Vec2Bundle)
    and not isinstance(bundle, torchaudio.pipelines.Wav2Vec2FABundle)
}


def pipeline_name(name: Any) -> Any:
    """The name of a pipeline as PIPELINES has it, which may be given in small letters or with its module;
    anything else as it is."""
    known = name.removeprefix("torchaudio.pipelines.").upper() if isinstance(name, str) else name
    return known if isinstance(known, str) and known in PIPELINES else name


def labels(name: str) -> list[str] | None:
    """The outputs of a pipeline that was fine-tuned to write, blank first, in small letters, with " " for
    its word boundary "|"; None for the others."""
    bundle = PIPELINES[name]
    if not hasattr(bundle, "get_labels"):
        return None
    return [BLANK, *(SPACE if label == "|" else label.lower() for label in bundle.get_labels()[1:])]


def pipeline_state(name: str) -> dict[str, Tensor]:
    """The weights of a pipeline: from torch's cache, else downloaded. Nothing in the file is executed.

    Raises:
        MissingFileError: they are not on this machine and cannot be had now.
        AdapterFileError: the file is damaged.
    """
    path = url_file(name, SOURCE + PIPELINES[name]._path)
    return without_unused_outputs(name, read_torch(path, DOWNLOAD_AGAIN))


def without_unused_outputs(name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """fairseq's output layers have rows for symbols that are never written (<pad>, </s>, <unk>), which
    torchaudio takes out; a state without them is returned as it is."""
    bundle, state = PIPELINES[name], dict(state)
    unused = getattr(bundle, "_remove_aux_axis", ())
    for key in ("aux.weight", "aux.bias") if unused else ():
        if key in state and len(state[key]) == bundle._params["aux_num_out"] + len(unused):
            kept = [i for i in range(len(state[key])) if i not in unused]
            state[key] = state[key][kept]
    return state


def pipeline_file(name: str) -> Path:
    """Where torch's cache keeps the weights of a pipeline."""
    return Path(torch.hub.get_dir()) / "checkpoints" / PIPELINES[name]._path
