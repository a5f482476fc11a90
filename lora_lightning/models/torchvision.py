"""torchvision_model: a classifier of torchvision by its name, with weights from a file or torchvision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from torch import Tensor, nn

from lora_lightning.errors import ConfigError, did_you_mean
from lora_lightning.files.weights import load_into, network_state
from lora_lightning.models.base_file import Weights, base_file, begin_at_zero, read_base
from lora_lightning.planning.heads import find_heads
from lora_lightning.utils.checks import require
from lora_lightning.utils.download import DOWNLOAD_AGAIN, url_file
from lora_lightning.utils.libraries import loading
from lora_lightning.utils.marks import TEXT, Check, Null, at_least
from lora_lightning.utils.torch_file import read_torch

with loading("torchvision"):
    import torchvision
    from torchvision.models import SqueezeNet, WeightsEnum, get_model_builder, get_model_weights
    from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

State = Mapping[str, Tensor]
NAMES = torchvision.models.list_models(module=torchvision.models)
AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # heads for training from scratch
INCEPTIONS = ("googlenet", "inception_v3")


def _plain_name(name: Any) -> Any:
    return name.removeprefix("torchvision/") if isinstance(name, str) else name


NAME = Check(
    "a classifier of torchvision, such as resnet50 (torchvision.models.list_models() lists them)",
    lambda v: _plain_name(v) in NAMES,
    near=lambda v: did_you_mean(str(_plain_name(v)), NAMES),
)


def torchvision_model(
    name: Annotated[str, NAME],
    *,
    pretrained: bool = False,
    weights: Annotated[str | None, TEXT, Null("torchvision's best")] = None,
    checkpoint: Weights = None,
    num_classes: Annotated[int | None, at_least(1), Null("the weights' own head")] = None,
    **kwargs: Any,
) -> nn.Module:
    """Build a classifier of torchvision, (batch, channels, height, width) -> (batch, num_classes).

    Weights are loaded whole or not at all; only the head may differ, whatever it is called, and is then a
    fresh one, which begins at zero (SqueezeNet's bias, before a ReLU, at one). Auxiliary heads are left out.
    The model says as `pretrained_cfg`, as timm's do, which pictures its weights were made for.

    Args:
        name: a name of `torchvision.models.list_models()`, also as `torchvision/resnet50`.
        pretrained: load torchvision's weights, from torch's cache or the internet. They are files of
            `torch.save`, read without running code.
        weights: which of them, such as `IMAGENET1K_V2`.
        checkpoint: a .safetensors file; it takes the place of `pretrained`. Keys may carry the `model.` of a
            LightningModule.
        num_classes: outputs of the head; None keeps the weights' own.
        **kwargs: the model's own options (`dropout`, `image_size` of a ViT, …).

    Raises:
        ConfigError: an unknown name, or bad options.
        MissingFileError: weights that are not on this machine and cannot be downloaded now.
        AdapterFileError: a checkpoint that is pickled, damaged, or made for another model.
    """
    name = _plain_name(name)
    require(torchvision_model, locals(), [_weights_problem(name, weights)])
    chosen = _chosen(name, weights)
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    if checkpoint is None and not pretrained:
        return _described(_build(name, num_classes or 1000, kwargs), chosen)
    if checkpoint is not None:
        path = base_file(checkpoint)
        state = read_base(path)
    else:
        path = url_file(name, chosen.url)
        state = read_torch(path, DOWNLOAD_AGAIN)
    classes = num_classes or _classes_of(name, state, kwargs)
    model = _build(name, classes, kwargs)
    stored = {n: t for n, t in network_state(model, state).items() if not n.startswith(AUXILIARY)}
    if isinstance(model, VisionTransformer):
        stored = dict(_at_size(model, stored))
    built = model.state_dict()
    fresh = [head for head in find_heads(model) if _rows(stored, head) not in (0, _rows(built, head))]
    remedy = "Give the model the options that the weights were made with, or the weights of this model."
    load_into(model, stored, path, f"{name} as it was built", remedy, fresh)
    begin_at_zero(model, fresh)
    if isinstance(model, SqueezeNet) and fresh:  # a ReLU follows its head, and has no gradient at zero
        nn.init.ones_(model.get_submodule(fresh[0]).get_parameter("bias"))
    return _described(model, chosen)


def _weights_problem(name: Any, weights: Any) -> str | None:
    """Why a model has no weights of this name, if it has none."""
    known = [w.name for w in get_model_weights(name)] if name in NAMES else [weights]
    if weights in (None, "DEFAULT", *known):
        return None
    return f"weights={weights!r}: {name} has {', '.join(known)}.{did_you_mean(str(weights), known)}"


def _chosen(name: str, weights: str | None) -> Any:
    kind: Any = get_model_weights(name)
    return kind.DEFAULT if weights is None else kind[weights]


def _build(name: str, num_classes: int, kwargs: Mapping[str, Any]) -> nn.Module:
    own: dict[str, Any] = {}
    if name in INCEPTIONS:  # as torchvision itself builds them around its weights
        own = {"aux_logits": False, "transform_input": True, "init_weights": False}
    try:
        return get_model_builder(name)(weights=None, num_classes=num_classes, **{**own, **kwargs})
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:  # torchvision's own checks
        given = ", ".join(f"{key}={value!r}" for key, value in kwargs.items()) or "no options"
        raise ConfigError(
            [f"torchvision cannot build {name} with {given}: {error}. Give what it takes."]
        ) from None


def _classes_of(name: str, state: State, kwargs: Mapping[str, Any]) -> int:
    """How many classes a state was made for, read off its head; 1000 where it has none."""
    head = find_heads(_build(name, 1000, kwargs))[-1]
    return _rows(state, head) or _rows(state, f"model.{head}") or 1000


def _rows(state: State, head: str) -> int:
    weight = state.get(f"{head}.weight")
    return 0 if weight is None else len(weight)


def _at_size(model: VisionTransformer, state: State) -> State:
    """Position embeddings for the pictures' size that the model was built for."""
    name = "encoder.pos_embedding"
    if name not in state or state[name].shape == model.state_dict()[name].shape:
        return state
    return interpolate_embeddings(model.image_size, model.patch_size, dict(state))


def _described(model: Any, weights: WeightsEnum) -> nn.Module:
    """The model with what is told of timm's: its classes, and the pictures that its weights were made for."""
    transform = weights.transforms()
    size, resized = transform.crop_size[0], transform.resize_size[0]
    side = getattr(model, "image_size", size)
    head = find_heads(model)[-1]
    model.num_classes = _rows(model.state_dict(), head)
    model.pretrained_cfg = {
        "input_size": (3, side, side),
        "mean": tuple(transform.mean),
        "std": tuple(transform.std),
        "interpolation": transform.interpolation.value,
        "crop_pct": size / resized,
        "crop_mode": "center",
        "classifier": head,
    }
    return model
