"""What the fused operators make an input from: what the function before the layer saved for its backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from lora_lightning.kernels.fused import plain
from lora_lightning.kernels.sources import centre_and_scale, saved_tensor


class Input(NamedTuple):
    """An input x (..., d_in) as `source` of u.

    Attributes:
        source: as of `kernels.fused.operators`.
        u: (..., d_in).
        mean, rstd: (..., 1), of norms.
        weight, bias: (d_in,), of norms, or None.
    """

    source: str
    u: Tensor
    mean: Tensor | None = None
    rstd: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None

    def by_tokens(self) -> tuple[Tensor | None, ...]:
        """u (T, d_in), mean and rstd (T,), weight, bias."""
        mean, rstd = (None if t is None else t.reshape(-1) for t in (self.mean, self.rstd))
        return self.u.reshape(-1, self.u.shape[-1]), mean, rstd, self.weight, self.bias

    def whole(self) -> Tensor:
        """x, (..., d_in), in torch's operations, as a function of u."""
        if self.rstd is not None:
            centred = self.mean is not None
            mean, rstd = centre_and_scale(
                self.u.to(self.rstd.dtype), self.rstd.view(*self.u.shape[:-1], 1), centred
            )
            return self._replace(mean=mean, rstd=rstd)._computed()
        return self._computed()

    def _computed(self) -> Tensor:
        return plain.SOURCES[self.source](*self.by_tokens()).view(self.u.shape)


def input_of(x: Tensor) -> Input:
    """What to make x, (..., d_in), from; x itself where nothing else is at hand."""
    maker = x.grad_fn
    find = None if maker is None else _FINDERS.get(maker.name())
    if find is None or x._version or not x.is_contiguous():
        return Input("identity", x)
    try:
        found = find(maker)
    except RuntimeError:  # its saved tensors were freed, changed in place, or packed by a hook
        return Input("identity", x)
    fits = found is not None and found.u.shape == x.shape and found.u.is_contiguous()
    return found if fits else Input("identity", x)  # type: ignore[return-value]  # it is there


def _layer_norm(maker: Any) -> Input | None:
    names = "input", "result1", "result2", "weight", "bias"
    u, mean, rstd, weight, bias = (saved_tensor(maker, name) for name in names)
    if u is None or tuple(maker._saved_normalized_shape) != u.shape[-1:]:
        return None
    if not (_of_rows(mean, u) and _of_rows(rstd, u)):
        return None
    return Input("layer_norm", u, mean, rstd, weight, bias)


def _rms_norm(maker: Any) -> Input | None:
    u, rstd, weight = (saved_tensor(maker, name) for name in ("input", "result1", "weight"))
    if u is None or tuple(maker._saved_normalized_shape) != u.shape[-1:]:
        return None
    return Input("rms_norm", u, None, rstd, weight) if _of_rows(rstd, u) else None


def _of_rows(statistic: Tensor | None, u: Tensor) -> bool:
    """Whether there is one number of float32 or better for each token."""
    if statistic is None or statistic.element_size() < 4:
        return False
    return statistic.numel() * u.shape[-1] == u.numel()


def _entries(source: str) -> Callable[[Any], Input | None]:
    def find(maker: Any) -> Input | None:
        u = saved_tensor(maker, "self")
        return None if u is None else Input(source, u)

    return find


def _gelu(maker: Any) -> Input | None:
    return _entries("gelu_tanh" if maker._saved_approximate == "tanh" else "gelu")(maker)


_FINDERS: dict[str, Callable[[Any], Input | None]] = {
    "NativeLayerNormBackward0": _layer_norm,
    "FusedRmsNormBackward0": _rms_norm,
    "GeluBackward0": _gelu,
    "SiluBackward0": _entries("silu"),
}
