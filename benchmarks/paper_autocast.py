"""A device without data on which autocast casts as on CUDA, which the meta device has not.

Fake tensors of a device of torch's own making ("paper", PrivateUse1) run on the meta device's functions, in
forward and backward alike. Which operators autocast runs in half precision and which in float32 is read from
the header that comes with torch, and registered for that device. A test compares what comes of it with CUDA's
own autocast, which runs without a GPU in a forward, though not in a backward.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from lora_lightning.kernels import common

NAME = "paper"
KEY = torch._C.DispatchKey.AutocastPrivateUse1
HEADER = Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h"


class Paper:
    """The device. A process has one: what it registers stays."""

    def __init__(self) -> None:
        _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
        self._mode = FakeTensorMode()
        common.PLAIN |= {FakeTensor}  # they stand for tensors that are plain
        common.WIDENING |= {NAME}
        self._half: dict[int, tuple[Tensor, Tensor]] = {}  # as CUDA's: of trained parameters, while it is on
        self._others = torch.library.Library("_", "IMPL")
        self._others.fallback(torch.library.fallthrough_kernel, KEY.name)
        self._library = torch.library.Library("aten", "IMPL")
        for policy, run in (
            ("LOWER_PRECISION_FP", self._in_half),
            ("FP32", self._in_float),
            ("FP32_SET_OPT_DTYPE", self._to_float),
            ("PROMOTE", self._in_widest),
        ):
            for op in listed(policy):
                self._library.impl(op, _kernel(op, run), KEY.name)
        for op in (torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default):
            self._library.impl(op, self._made_by(op), "PrivateUse1")

    def move(self, model: nn.Module) -> nn.Module:
        """A model of the meta device on this one."""
        return model._apply(lambda t: FakeTensor(self._mode, t.detach(), torch.device(NAME, 0)))

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """In bfloat16, as a step of training is."""
        with torch.autocast(NAME, torch.bfloat16):
            yield
        self._half.clear()

    def _made_by(self, op: Any) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            with self._mode:
                return op(*args, **kwargs)

        return made

    def _in_half(self, op: Any, args: Any, kwargs: Any) -> Any:
        return op(*self._cast(args, torch.bfloat16), **self._cast(kwargs, torch.bfloat16))

    def _in_float(self, op: Any, args: Any, kwargs: Any) -> Any:
        return op(*self._cast(args, torch.float32), **self._cast(kwargs, torch.float32))

    def _to_float(self, op: Any, args: Any, kwargs: Any) -> Any:
        """With a result of float32, unless one is asked for."""
        place = [a.name for a in op._schema.arguments].index("dtype")
        if kwargs.get("dtype") is None and len(args) <= place and _is_eligible(args[0]):
            kwargs = {**kwargs, "dtype": torch.float32}
        return op(*args, **kwargs)

    def _in_widest(self, op: Any, args: Any, kwargs: Any) -> Any:
        dtypes = {t.dtype for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and _is_eligible(t)}
        widest = torch.float32 if torch.float32 in dtypes else torch.bfloat16
        return op(*self._cast(args, widest), **self._cast(kwargs, widest))

    def _cast(self, values: Any, dtype: torch.dtype) -> Any:
        return tree_map_only(Tensor, lambda t: self._one(t, dtype), values)

    def _one(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if not _is_eligible(tensor) or tensor.dtype == dtype:
            return tensor
        if dtype == torch.float32 or not (tensor.requires_grad and tensor.is_leaf) or tensor._is_view():
            return tensor.to(dtype)
        if id(tensor) not in self._half:
            self._half[id(tensor)] = tensor, tensor.to(dtype)
        return self._half[id(tensor)][1]


class _Module(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def listed(policy: str) -> list[Any]:
    """The operators that autocast treats so, by the installed torch's header."""
    text = HEADER.read_text().split(f"#define AT_FORALL_{policy}(_)", 1)[1]
    body = re.match(r"(?:.*\\\n)*.*\n", text)
    assert body is not None
    found = re.findall(r"_\((\w+)(?:, (\w+))?\)", body.group())
    return [getattr(getattr(torch.ops.aten, name), overload or "default") for name, overload in found]


def _kernel(op: Any, run: Callable[[Any, Any, Any], Any]) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(KEY)):
            return run(op, args, kwargs)

    return kernel


def _is_eligible(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype != torch.float64
