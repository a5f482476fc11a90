"""AugmentConfig: how training pictures are augmented. Presets with published values: `conf/data/augment/`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

from lora_lightning.utils.checks import Options, fields_of
from lora_lightning.utils.libraries import loading
from lora_lightning.utils.marks import Check, above, at_least, between, listed, number

with loading("timm"):
    import timm.data

TRIVIAL = "trivialaugment"  # torchvision has it, timm has not
POLICIES = (TRIVIAL, "rand-m9-mstd0.5-inc1", "augmix-m3-w3", "original", "v0")
PROBABILITY = between(0, 1, noun="a probability")
ALPHA = at_least(0, note="0.2, 0.8 or 1 are usual, 0 switches it off")
SHARES = listed(
    "two shares of the area, 0 < least <= greatest <= 1: [0.08, 1]",
    number(above(0), between(0, 1)),
    count=2,
    ascending=True,
)
RATIOS = listed(
    "two ratios of width to height, the lesser first: [0.75, 1.333]",
    number(above(0)),
    count=2,
    ascending=True,
)


def _is_policy(value: Any) -> bool:
    if value == TRIVIAL:
        return True
    try:
        timm.data.create_transform(32, is_training=True, auto_augment=value or "?")
    except Exception:  # timm checks the text by assertions and conversions
        return False
    return True


POLICY = Check(f"{TRIVIAL} or a policy of timm, such as {', '.join(POLICIES[1:])}", _is_policy, POLICIES)


@dataclass
class AugmentConfig(Options):
    """What is done to training pictures; the defaults are those of fine-tuning on ImageNet, `light`.

    Crops, mirroring and policies are a picture's own and happen in the workers, on whole pictures of 8 bits;
    erasing and mixing happen a batch at a time, on the batch's device.

    Args:
        crop_scale: least and greatest share of the area that a crop keeps (Szegedy et al. 2015, arXiv
            1409.4842); None shows a picture as in evaluation.
        crop_ratio: least and greatest ratio of a crop's width to its height.
        hflip: probability of mirroring a picture left to right.
        vflip: of turning it upside down, for pictures from above or through a microscope.
        color_jitter: by which part brightness, contrast and saturation change at most.
        auto_augment: "trivialaugment" (Müller and Hutter 2021, arXiv 2103.10158), a policy of timm such as
            "rand-m9-mstd0.5-inc1" (RandAugment, Cubuk et al. 2020, arXiv 1909.13719), or None.
        random_erasing: probability of erasing a rectangle (Zhong et al. 2017, arXiv 1708.04896).
        mixup: alpha of mixup (Zhang et al. 2017, arXiv 1710.09412); 0 switches it off.
        cutmix: alpha of cutmix (Yun et al. 2019, arXiv 1905.04899); 0 switches it off. With both on, each
            batch takes one of them.
        mix_prob: probability that a batch is mixed at all.

    Raises:
        ConfigError: one line for each bad option.
    """

    owner = "the augmentation"

    crop_scale: Annotated[Sequence[float] | None, SHARES] = (0.08, 1.0)
    crop_ratio: Annotated[Sequence[float], RATIOS] = (3 / 4, 4 / 3)
    hflip: Annotated[float, PROBABILITY] = 0.5
    vflip: Annotated[float, PROBABILITY] = 0.0
    color_jitter: Annotated[float, between(0, 1)] = 0.0
    auto_augment: Annotated[str | None, POLICY] = None
    random_erasing: Annotated[float, PROBABILITY] = 0.0
    mixup: Annotated[float, ALPHA] = 0.0
    cutmix: Annotated[float, ALPHA] = 0.0
    mix_prob: Annotated[float, PROBABILITY] = 1.0

    @classmethod
    def of(cls, given: AugmentConfig | Mapping[str, Any]) -> AugmentConfig:
        """What a data module was given, which may be a plain mapping."""
        return given if isinstance(given, AugmentConfig) else cls(**given)


def _preset(value: Any) -> str:
    return f" A preset is chosen by data/augment={value}." if isinstance(value, str) else ""


OPTIONS = replace(fields_of(AugmentConfig), near=_preset)
AugmentOptions = Annotated[AugmentConfig | Mapping[str, Any] | None, OPTIONS]
