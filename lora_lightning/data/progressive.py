"""Progressive: training begins with small pictures, which grow to their full size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from torch import nn

from lora_lightning.data.picture_transform import fixed_size
from lora_lightning.errors import ConfigError
from lora_lightning.utils.checks import Options
from lora_lightning.utils.marks import Check, above, at_least, between

STEP = 4  # pixels by which a size grows where the model has no patches


@dataclass
class Progressive(Options):
    """Progressive resizing with the defaults of MosaicML's Composer (after Howard 2018, fast.ai): half the
    size for half of the training, full size in its last fifth.

    The size is a function of the steps done and of all steps, so that a resumed run goes on exactly.

    Args:
        start: the first size, as a share of the full one.
        delay: share of the training that is done at the first size.
        finetune: share of the training that is done at the full size, at its end.
        step: pixels by which the size grows; None takes the patch of a ViT, else 4.

    Raises:
        ConfigError: one line for each bad option.
    """

    owner = "progressive resizing"

    start: Annotated[float, above(0), between(0, 1)] = 0.5
    delay: Annotated[float, between(0, 1)] = 0.5
    finetune: Annotated[float, between(0, 1)] = 0.2
    step: Annotated[int | None, at_least(1)] = None

    @classmethod
    def of(cls, given: Progressive | Mapping[str, Any] | bool | None) -> Progressive | None:
        """What a data module was given: true is the defaults; None where sizes stay."""
        if isinstance(given, Mapping):
            return cls(**given)
        return cls() if given is True else given or None

    def size(self, full: int, done: float, step: int) -> int:
        """Height or width, in pixels, when `done` of the training is behind, in [0, 1)."""
        growing = max(1 - self.delay - self.finetune, 0)
        share = (done - self.delay) / growing if growing else float(done >= self.delay)
        scale = self.start + (1 - self.start) * min(max(share, 0.0), 1.0)
        return full if scale >= 1 else max(step, int(scale * full / step) * step)

    def step_of(self, model: nn.Module | None) -> int:
        """Pixels by which sizes grow for this model.

        Raises:
            ConfigError: it takes pictures of one size alone.
        """
        known = [] if model is None else [m for m in model.modules() if hasattr(m, "patch_embed")]
        if not known:
            return self.step or STEP
        if size := fixed_size(known[0]):
            raise ConfigError(
                [
                    f"progressive: {type(known[0]).__name__} takes pictures of {size[0]} x {size[1]} alone; "
                    "give progressive=null, or build the model with dynamic_img_size=true, which a ViT of "
                    "timm has."
                ]
            )
        patch = getattr(known[0].patch_embed, "patch_size", STEP)
        return self.step or int(patch[0] if isinstance(patch, (tuple, list)) else patch)


def _details(name: str, value: Any, show: Any) -> list[str]:
    return Progressive.problems(value, f"{name}.") if isinstance(value, Mapping) else []


PROGRESSIVE = Check(
    "true, null, or a mapping of start, delay, finetune, step",
    lambda v: isinstance(v, (Progressive, Mapping, bool)) or v is None,
    details=_details,
)
ProgressiveOptions = Annotated[Progressive | Mapping[str, Any] | bool | None, PROGRESSIVE]
