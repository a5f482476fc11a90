"""Short digests of tensors, cheap enough to take of a whole model at every save."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256

import torch
from torch import Tensor

from lora_lightning.utils.sharding import whole

SAMPLES = 1024  # values looked at in each tensor: other pretrained weights differ in nearly all of them
PART = 6  # hexadecimal digits for each of the three precisions


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The digest of each floating-point tensor that has memory: of its shape and up to 1,024 values spread
    over it, as float32, rounded to bfloat16 and to float16. A quantized weight has the one of the matrix
    that it was made from."""
    tensors = {n: t for n, t in tensors.items() if t.is_floating_point() and not t.is_meta}
    known = {n: t.digest for n, t in tensors.items() if hasattr(t, "digest")}
    sampled = {n: _sample(whole(t)) for n, t in tensors.items() if n not in known}
    if sampled:
        values = torch.cat(list(sampled.values())).cpu()  # one transfer for a whole model on a GPU
        parts = values.split([len(s) for s in sampled.values()])
        known |= {n: _digest(tuple(tensors[n].shape), p) for n, p in zip(sampled, parts, strict=True)}
    return {n: known[n] for n in tensors}


def digest(tensor: Tensor) -> str:
    """The digest of one; "" of a tensor without memory."""
    return digests({"": tensor}).get("", "")


def same(one: str, other: str) -> bool:
    """Whether two digests agree in one of the three precisions."""
    return any(one[i : i + PART] == other[i : i + PART] for i in range(0, 3 * PART, PART))


def _sample(tensor: Tensor) -> Tensor:
    """Up to SAMPLES values, the first and the last among them, as float32."""
    flat, count = tensor.detach().reshape(-1), min(SAMPLES, tensor.numel())
    if count < tensor.numel():
        where = torch.arange(count, device=tensor.device) * (tensor.numel() - 1) // (count - 1)
        flat = flat[where]
    return flat.float()


def _digest(shape: tuple[int, ...], values: Tensor) -> str:
    casts = (values, values.bfloat16(), values.half())
    return "".join(
        sha256(repr(shape).encode() + v.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:PART]
        for v in casts
    )
