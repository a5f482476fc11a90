"""The state of every random number generator of a process: read, set, and put aside for a while."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """The state of Python, numpy, torch and the current CUDA device, in types that every checkpoint can
    hold and that load with `weights_only=True`."""
    _, key, *rest = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": {"key": torch.from_numpy(np.asarray(key, np.int64)), "rest": rest},
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Go back to what `random_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    key = state["numpy"]["key"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", key, *state["numpy"]["rest"]))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Within this context, Python, numpy and torch on the CPU draw random numbers that are a function of
    `numbers`; afterwards they go on as if nothing had been drawn."""
    digest = int.from_bytes(sha256(repr(numbers).encode()).digest()[:8], "big")
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(digest)
    np.random.seed(digest % 2**32)
    torch.default_generator.manual_seed(digest)  # torch.manual_seed would reset the GPUs as well
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
