"""Modules that are called once for each adapter of a batch: inputs are taken apart, outputs put together."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_flatten, tree_unflatten

from lora_lightning.adapters.mixed_samples import MixedSamples
from lora_lightning.errors import UserError
from lora_lightning.layers.swap import class_of


def split_call(
    samples: MixedSamples,
    module: nn.Module,
    forward: Callable[..., Any],
    serve: Callable[[int], Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Call `forward` once for each adapter with its samples of the inputs; the samples of the outputs are put
    together again.

    Args:
        serve: makes a context in which `module` is that of the j-th adapter of the samples.

    Raises:
        UserError: the samples cannot be told in an input or an output.
    """
    if getattr(module, "training", False) and isinstance(module, _NormBase) and module.track_running_stats:
        raise UserError(
            f"mixed_adapters: {samples.where(module)} moves its running statistics in train mode, which "
            "samples of several adapters cannot share: call model.eval(), or train with train_norm='affine' "
            "at most."
        )
    if isinstance(module, nn.RNNBase) and args and isinstance(args[0], PackedSequence):
        return _split_packed(samples, module, forward, serve, args, kwargs)
    inputs, outputs = _dims(samples, module, args, kwargs)
    leaves, spec = tree_flatten((args, kwargs))
    parts = []
    for j in range(len(samples.distinct)):
        mine = [x if d is None else samples.take(x, d, j) for x, d in zip(leaves, inputs, strict=True)]
        own_args, own_kwargs = tree_unflatten(mine, spec)
        with serve(j):
            parts.append(forward(*own_args, **own_kwargs))
    return _joined(samples, module, parts, outputs)


def _dims(
    samples: MixedSamples, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[int | None], Callable[[int], int]]:
    """The batch dimension of each leaf of (args, kwargs), None for what all samples share; and of each leaf
    of the output."""
    leaves, _ = tree_flatten((args, kwargs))
    if class_of(module).forward is nn.MultiheadAttention.forward:
        return attention_dims(samples, module, args, kwargs)
    if isinstance(module, nn.RNNBase):
        x = leaves[0]
        if x.dim() != 3:
            raise UserError(
                f"mixed_adapters: the input of {samples.where(module)} has no batch dimension: add one, "
                "x[None]."
            )
        dim = 0 if module.batch_first else 1
        samples.check(x, dim, module)
        return [dim, *[1 if isinstance(t, Tensor) else None for t in leaves[1:]]], lambda i: 1 if i else dim
    tensors = [t for t in leaves if isinstance(t, Tensor) and t.dim()]
    if not tensors:
        raise UserError(
            f"mixed_adapters: {samples.where(module)} is called without a tensor that has "
            "samples: leave it out of the adapters (exclude_modules)."
        )
    if isinstance(module, nn.EmbeddingBag) and tensors[0].dim() != 2:
        raise UserError(
            f"mixed_adapters: {samples.where(module)} is called with offsets: give it a matrix, one row a "
            "bag."
        )
    dim = samples.dim_of(tensors[0], module)
    own = [t for t in tensors[1:] if samples.is_own(t) and t.shape[0] != tensors[0].shape[dim]]
    for other in tensors[1:]:
        if not any(other is t for t in own) and not _goes_with(tensors[0], other, dim, samples):
            raise UserError(
                f"mixed_adapters: {samples.where(module)} is called with {tuple(tensors[0].shape)} and "
                f"{tuple(other.shape)}: it cannot be told whether the second has samples. Leave this module "
                "out of the adapters, or run the samples of each adapter by themselves."
            )
    shared = {id(t) for t in own}
    with_samples = [isinstance(t, Tensor) and t.dim() and id(t) not in shared for t in leaves]
    return [dim if has else None for has in with_samples], lambda i: dim


def _goes_with(x: Tensor, other: Tensor, dim: int, samples: MixedSamples) -> bool:
    """Whether `other` has the samples of x: as many dimensions, or a mask of fewer. A table of rotations has
    fewer too, and maybe as many rows."""
    fits = other.dim() > dim and other.shape[dim] == x.shape[dim] and not samples.is_own(other)
    return fits and (other.dim() >= x.dim() or not other.is_floating_point())


def attention_dims(
    samples: MixedSamples, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[int | None], Callable[[int], int]]:
    names = list(inspect.signature(nn.MultiheadAttention.forward).parameters)[1:]
    dim = 0 if module.batch_first else 1
    dims: list[int | None] = []
    for name, x in [*zip(names, args, strict=False), *kwargs.items()]:
        of = dim if name in ("query", "key", "value") else 0
        shared = not isinstance(x, Tensor) or (name == "attn_mask" and x.dim() == 2)
        if not shared and x.dim() != (2 if name == "key_padding_mask" else 3):
            raise UserError(
                f"mixed_adapters: the {name} of {samples.where(module)} has no batch dimension: add one, "
                "x[None]."
            )
        if not shared and name != "attn_mask":
            samples.check(x, of, module)
        dims.append(None if shared else of)
    return dims, lambda i: 0 if i else dim


def _joined(samples: MixedSamples, module: nn.Module, parts: list[Any], dims: Callable[[int], int]) -> Any:
    flat = [tree_flatten(part) for part in parts]
    joined = []
    for i, leaves in enumerate(zip(*(leaves for leaves, _ in flat), strict=True)):
        if not isinstance(leaves[0], Tensor):
            joined.append(leaves[0])
            continue
        dim = dims(i)
        if any(t.dim() <= dim or t.shape[dim] % samples.count(j) for j, t in enumerate(leaves)):
            raise UserError(
                f"mixed_adapters: an output of {samples.where(module)}, {tuple(leaves[0].shape)}, has no "
                "samples to be put together: leave this module out of the adapters."
            )
        joined.append(samples.join(list(leaves), dim))
    return tree_unflatten(joined, flat[0][1])


def _split_packed(
    samples: MixedSamples,
    module: nn.RNNBase,
    forward: Callable[..., Any],
    serve: Callable[[int], Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Packed sequences: padded, split, packed again, and the outputs likewise."""
    packed, (states, spec) = args[0], tree_flatten((args[1:], kwargs))
    x, lengths = pad_packed_sequence(packed, batch_first=True)
    samples.check(x, 0, module)
    outputs, finals = [], []
    for j in range(len(samples.distinct)):
        mine = pack_padded_sequence(
            samples.take(x, 0, j), samples.take(lengths, 0, j), batch_first=True, enforce_sorted=False
        )
        more, named = tree_unflatten([samples.take(s, 1, j) for s in states], spec)
        with serve(j):
            y, final = forward(mine, *more, **named)
        outputs.append(pad_packed_sequence(y, batch_first=True, total_length=x.shape[1])[0])
        finals.append(final)
    y = samples.join(outputs, 0)
    sorted_before = packed.sorted_indices is None
    whole = pack_padded_sequence(y, lengths, batch_first=True, enforce_sorted=sorted_before)
    return whole, _joined(samples, module, finals, lambda i: 1)
