"""Checksums of what a Trainer's checkpoint holds, part by part: written at its end, compared before use."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from lora_lightning.errors import AdapterFileError
from lora_lightning.utils.tables import truncate_list

KEY = "lora_lightning"  # of the adapter's description in a Trainer's checkpoint
DIGESTS = "sha256"  # of the checksums in that description
SHARDED = ""  # in the place of a checksum: each process has a part, no one could compare the whole
PLAIN = (bool, int, float, complex, str, bytes)
MOST_REPEATED = 2**30  # bytes by which a tensor may be larger than its memory and still be written out


class _IsSharded(Exception):
    """No one process has the tensors."""


def add_digests(checkpoint: dict[str, Any]) -> None:
    """Note in the adapter's description a SHA-256 of every entry of the checkpoint: weights, optimizers,
    counters, callbacks, hyperparameters, and the description itself. To be called when all is in it.

    Entries added later are not covered, and entries that are taken out (the optimizers' states, to save
    room) are not missed.
    """
    about = checkpoint[KEY]
    about.pop(DIGESTS, None)
    about[DIGESTS] = {name: content_digest(value) for name, value in checkpoint.items()}


def check_digests(checkpoint: Any, where: object) -> None:
    """Compare a checkpoint that was read with the checksums in it; one without an adapter has none.

    Args:
        where: the file, named in errors.

    Raises:
        AdapterFileError: they differ, or are gone.
    """
    about = checkpoint.get(KEY) if isinstance(checkpoint, dict) else None
    if about is None:
        return
    digests = about.get(DIGESTS) if isinstance(about, dict) else None
    if not isinstance(digests, dict) or not {KEY, "state_dict"} <= digests.keys():
        raise AdapterFileError(f"{where} is damaged: it has lost its checksums. Take another checkpoint.")
    plain = {**checkpoint, KEY: {n: v for n, v in about.items() if n != DIGESTS}}
    wrong = [
        n for n, stated in digests.items() if n in plain and stated not in (SHARDED, content_digest(plain[n]))
    ]
    if wrong:
        raise AdapterFileError(
            f"{where} is damaged, or was edited: the checksum of {truncate_list(wrong)} does not match. "
            "Copy it again, or take another checkpoint."
        )


def content_digest(value: Any) -> str:
    """SHA-256 over a tree of plain values and tensors, the same before `torch.save` and after `torch.load`;
    of other objects the class alone counts.

    Returns:
        64 hexadecimal digits; `SHARDED` where a tensor is only a part of one.
    """
    digest = sha256()
    try:
        _feed(digest.update, value, ())
    except _IsSharded:
        return SHARDED
    return digest.hexdigest()


def _feed(update: Callable[[Any], None], value: Any, above: tuple[int, ...]) -> None:
    if isinstance(value, Tensor):
        _feed_tensor(update, value)
    elif isinstance(value, (dict, list, tuple, set, frozenset)):
        if id(value) in above:  # pickle can hold what holds itself
            update(b"again;")
            return
        parts: Any = value
        if isinstance(value, dict):
            parts = [part for item in value.items() for part in item]
        elif isinstance(value, (set, frozenset)):
            parts = sorted(content_digest(v) for v in value)
        update(f"{len(value)}{'{' if isinstance(value, dict) else '['}".encode())
        for part in parts:
            _feed(update, part, (*above, id(value)))
    elif value is None or isinstance(value, PLAIN):
        plain: Any = next((t for t in PLAIN if isinstance(value, t)), type(None))
        text = plain.__repr__(value)  # of a subclass, such as numpy.float64, as of the class itself
        update(f"{plain.__name__} {len(text)} {text}".encode("utf-8", "surrogatepass"))
    elif hasattr(value, "tobytes") and hasattr(value, "dtype"):  # numpy's arrays and numbers
        update(f"{value.dtype} {value.shape} ".encode())
        update(value.tobytes())
    else:
        update(f"{type(value).__qualname__};".encode())


def _feed_tensor(update: Callable[[Any], None], tensor: Tensor) -> None:
    if hasattr(tensor, "full_tensor") or type(tensor).__name__ == "ShardedTensor":
        raise _IsSharded
    update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    tensor = tensor.detach()
    if tensor.is_meta:
        return
    if hasattr(tensor, "__tensor_flatten__"):  # a quantized weight
        names, context = tensor.__tensor_flatten__()
        update(repr(context).encode())
        for name in names:
            _feed_tensor(update, getattr(tensor, name))
        return
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    memory = tensor.untyped_storage()
    if tensor.nbytes > memory.nbytes() + MOST_REPEATED:  # a small file can claim terabytes so
        update(f"{tensor.stride()} {tensor.storage_offset()} ".encode())
        tensor = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(memory)
    flat = tensor.resolve_conj().resolve_neg().contiguous().cpu().reshape(-1)
    update(flat.view(torch.uint8).numpy().data)
