"""What a model is shown of a picture: its preprocessing as plain facts, and the transforms made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image
from torch import Tensor, nn

from lora_lightning.data.augment import TRIVIAL, AugmentConfig
from lora_lightning.data.cropping import faster
from lora_lightning.errors import ConfigError
from lora_lightning.utils.libraries import loading

with loading("timm"):
    import timm.data
    from timm.data import auto_augment
    from timm.data.transforms import MaybePILToTensor

with loading("torchvision"):
    from torchvision.transforms import v2

Facts = dict[str, Any]
LONGEST = 32  # times the shorter side
FACTS = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")


def preprocessing_of(
    model: nn.Module | None, image_size: int | None = None, crop_pct: float | None = None
) -> Facts:
    """What evaluation does to a picture for this model, in plain numbers, words and flat lists.

    Args:
        model: has a timm data config as `pretrained_cfg`, or holds a module that has one; with none,
            ImageNet's is taken.
        image_size: height and width in pixels; None takes the model's.
        crop_pct: the share of the shorter side that is kept; None takes the model's.

    Returns:
        input_size [3, height, width], mean and std of values in [0, 1], interpolation, crop_pct, crop_mode.

    Raises:
        ConfigError: the model was built for pictures of another size alone.
    """
    modules = [] if model is None else model.modules()
    known = next((m for m in modules if hasattr(m, "pretrained_cfg")), None)
    built = fixed_size(known)
    size = (image_size, image_size) if image_size else None
    if size and built and built != size:
        raise ConfigError(
            [
                f"image_size={image_size}: {type(known).__name__} takes "
                f"{built[0]} x {built[1]}; give image_size=null, or build the model with "
                f"img_size={image_size}."
            ]
        )
    size = size or built or _built_size(known)
    args = {"input_size": (3, *size)} if size else {}
    config = timm.data.resolve_data_config(args, model=known or nn.Identity())
    if crop_pct is not None:
        config["crop_pct"] = crop_pct
    return {name: _plain(config[name]) for name in FACTS}


def fixed_size(model: nn.Module | None) -> tuple[int, int] | None:
    """Height and width of the only pictures that a model takes; None where it takes any."""
    embed = getattr(model, "patch_embed", None)
    flexible = getattr(model, "dynamic_img_size", False) or not getattr(embed, "strict_img_size", True)
    return None if flexible else _built_size(model)


def _built_size(model: nn.Module | None) -> tuple[int, int] | None:
    built = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return (int(built[0]), int(built[1])) if built else None


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def weights_config(preset: Any) -> Facts:
    """The data config, as timm has it, of torchvision's weights: what a model of torchvision may carry as
    `pretrained_cfg`.

    Args:
        preset: what `transforms()` of the weights makes, of torchvision's class ImageClassification.
    """
    crop, resize = preset.crop_size[0], preset.resize_size[0]
    return {
        "input_size": (3, crop, crop),
        "mean": tuple(preset.mean),
        "std": tuple(preset.std),
        "interpolation": preset.interpolation.value,
        "crop_pct": crop / resize,
        "crop_mode": "center",
    }


def evaluation_transform(facts: Mapping[str, Any]) -> Callable[[Image.Image], Tensor]:
    """RGB picture -> (3, height, width), float32, normalized: just what validation and test show a model.

    Args:
        facts: as `preprocessing_of` gives them.
    """
    return _whole(timm.data.create_transform(**_evaluation(facts)))


def unfinished_evaluation_transform(facts: Mapping[str, Any]) -> v2.Compose:
    """The same before it is made float and normalized, which a data module does on the device: uint8."""
    return _whole(timm.data.create_transform(**_evaluation(facts), use_prefetcher=True))


def _whole(transform: Any) -> v2.Compose:
    return v2.Compose([without_ends, *transform.transforms])


def without_ends(picture: Image.Image) -> Image.Image:
    """A strip without its ends, which the crop in the middle would cut off anyway: scaled up as a whole by
    its shorter side it would fill the memory."""
    width, height = picture.size
    most = LONGEST * min(width, height)
    if max(width, height) <= most:
        return picture
    left, top = max(0, (width - most) // 2), max(0, (height - most) // 2)
    return picture.crop((left, top, left + min(width, most), top + min(height, most)))


def unfinished_training_transform(
    facts: Mapping[str, Any], augment: AugmentConfig
) -> Callable[[Image.Image], Tensor]:
    """RGB picture -> (3, height, width), uint8, augmented: what the workers do for training."""
    stages: list[Any] = []
    policy = augment.auto_augment
    if augment.crop_scale is None:
        stages += unfinished_evaluation_transform(facts).transforms[:-1]  # but the one that makes tensors
    crop, policies, _ = timm.data.create_transform(
        input_size=tuple(facts["input_size"]),
        interpolation=facts["interpolation"],
        mean=tuple(facts["mean"]),
        is_training=True,
        separate=True,
        scale=_pair(augment.crop_scale or (1, 1)),
        ratio=_pair(augment.crop_ratio),
        hflip=0.0,
        color_jitter=None,  # type: ignore[arg-type]  # which timm takes for none
        auto_augment=None if policy == TRIVIAL else policy,
    )
    if augment.crop_scale is not None:
        stages += map(faster, crop.transforms)
    if augment.hflip:
        stages.append(v2.RandomHorizontalFlip(augment.hflip))
    if augment.vflip:
        stages.append(v2.RandomVerticalFlip(augment.vflip))
    policies = [v2.TrivialAugmentWide()] if policy == TRIVIAL else list(map(_one_bit, policies.transforms))
    if policies:  # they are drawn by PIL
        stages += [_as_picture, *policies]
    if augment.color_jitter:
        stages.append(v2.ColorJitter(*(float(augment.color_jitter),) * 3))
    return v2.Compose([*stages, MaybePILToTensor()])


def _one_bit(policy: Any) -> Any:
    """A policy of timm whose strongest posterizing keeps one bit: by none a picture is black, and newer
    Pillows refuse it."""
    operations = getattr(policy, "ops", None) or [op for several in policy.policy for op in several]
    for operation in operations:
        if operation.aug_fn is auto_augment.posterize:
            operation.aug_fn = _posterized
    return policy


def _posterized(picture: Image.Image, bits: int, **options: Any) -> Image.Image:
    return auto_augment.posterize(picture, max(1, bits), **options)


def _as_picture(image: Image.Image | Tensor) -> Image.Image:
    return v2.functional.to_pil_image(image) if isinstance(image, Tensor) else image


def _pair(values: Sequence[float]) -> tuple[float, float]:
    return float(values[0]), float(values[1])


def _evaluation(facts: Mapping[str, Any]) -> Facts:
    return {
        "input_size": tuple(facts["input_size"]),
        "mean": tuple(facts["mean"]),
        "std": tuple(facts["std"]),
        "interpolation": facts["interpolation"],
        "crop_pct": facts["crop_pct"],
        "crop_mode": facts["crop_mode"],
    }
