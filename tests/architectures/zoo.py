"""All architectures under test, by name."""

from __future__ import annotations

from .architecture import Architecture
from .zoo_timm import TIMM
from .zoo_torchaudio import TORCHAUDIO
from .zoo_torchvision import TORCHVISION
from .zoo_transformers import TRANSFORMERS

ZOO: dict[str, Architecture] = {**TIMM, **TORCHVISION, **TORCHAUDIO, **TRANSFORMERS}
