"""Spectra of updates by r × r matrices: singular values, effective and stable rank, norm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_lightning.utils.names import family
from lora_lightning.utils.tables import ROOT, format_table, span


@dataclass(frozen=True)
class Spectrum:
    """What an update s·B·A adds to its weight.

    Attributes:
        values: its singular values, (groups, r), largest first.
        effective_rank: exp of the entropy of the singular values over their sum (Roy & Vetterli 2007, "The
            effective rank: a measure of effective dimensionality", section 3), the mean over the groups; 0 of
            a zero update.
        stable_rank: ‖s·B·A‖²_F / σ₁², the mean over the groups; 0 of a zero update.
        norm: ‖s·B·A‖_F.
        relative: norm / ‖W‖_F; None where W is not known.
    """

    values: Tensor
    effective_rank: float
    stable_rank: float
    norm: float
    relative: float | None = None


class Spectra(dict[str, Spectrum]):
    """The spectra of an adapter's updates, by the names of the layers; `print` it for a table."""

    def mean(self) -> dict[str, float]:
        """`effective_rank`, `stable_rank` and `relative_norm`, the mean over the layers; nothing of none."""
        columns = {
            "effective_rank": [s.effective_rank for s in self.values()],
            "stable_rank": [s.stable_rank for s in self.values()],
            "relative_norm": [s.relative for s in self.values() if s.relative is not None],
        }
        return {name: sum(values) / len(values) for name, values in columns.items() if values}

    def __str__(self) -> str:
        families: dict[str, list[Spectrum]] = {}
        for name, spectrum in self.items():
            families.setdefault(family(name) or ROOT, []).append(spectrum)
        if not families:
            return "no layer is adapted"
        rows = [
            (
                name,
                len(group),
                span([s.values.shape[1] for s in group], "{:d}"),
                span([s.effective_rank for s in group], "{:.1f}"),
                span([s.stable_rank for s in group], "{:.1f}"),
                span([s.norm for s in group], "{:.3g}"),
                span([100 * s.relative for s in group if s.relative is not None], "{:.2f}"),
            )
            for name, group in families.items()
        ]
        header = ("layers", "count", "rank", "effective rank", "stable rank", "‖ΔW‖", "‖ΔW‖/‖W‖ %")
        return format_table(header, rows)


@torch.no_grad()
def spectra_of(
    factors: Mapping[str, tuple[Tensor, Tensor]], weights: Mapping[str, Tensor] | None = None
) -> Spectra:
    """The spectra of updates left·right, by name.

    The singular values of left·right are the roots of the eigenvalues of K·KᵀT with left = Q·K, of r × r
    matrices made of leftᵀ·left and right·rightᵀ alone, in float64; those of like shapes in one batch.

    Args:
        factors: (groups, m, r) and (groups, r, k) of each.
        weights: ‖W‖_F of each as a tensor without dimensions, where it is known.
    """
    alike: dict[tuple[torch.Size, torch.Size, torch.device], list[str]] = {}
    for name, (left, right) in factors.items():
        alike.setdefault((left.shape, right.shape, left.device), []).append(name)
    found: dict[str, Spectrum] = {}
    for names in alike.values():
        values = _singular_values([factors[n] for n in names])  # (names, groups, r)
        effective, stable = effective_rank(values).mean(1), stable_rank(values).mean(1)
        norms = values.square().sum((1, 2)).sqrt()
        relative: list[float | None] = [None] * len(names)
        if weights is not None and all(n in weights for n in names):
            whole = torch.stack([weights[n] for n in names]).to(norms.device, norms.dtype)
            relative = (norms / whole.clamp_min(1e-300)).tolist()
        rows = zip(
            names, values.cpu(), effective.tolist(), stable.tolist(), norms.tolist(), relative, strict=True
        )
        found.update({name: Spectrum(*row) for name, *row in rows})
    return Spectra({name: found[name] for name in factors})


def effective_rank(values: Tensor) -> Tensor:
    """exp of the entropy of the singular values (..., r) over their sum, (...): see `Spectrum`."""
    total = values.sum(-1, keepdim=True)
    p = torch.where(total > 0, values / total, 0.0)
    return torch.where(total[..., 0] > 0, torch.special.entr(p).sum(-1).exp(), 0.0)


def stable_rank(values: Tensor) -> Tensor:
    """Σσ² / σ₁² of the singular values (..., r), largest first, (...)."""
    first = values[..., 0].square()
    return torch.where(first > 0, values.square().sum(-1) / first, 0.0)


def _singular_values(factors: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """(n, groups, r) of n products of like shapes."""
    left = torch.stack([left for left, _ in factors]).double()
    right = torch.stack([right for _, right in factors]).double()
    squares, vectors = torch.linalg.eigh(left.mT @ left)
    K = vectors * squares.clamp_min(0).sqrt()[..., None, :]  # K·Kᵀ is leftᵀ·left
    products = torch.linalg.eigvalsh(K.mT @ (right @ right.mT) @ K)
    size = left.square().sum((-1, -2)) * right.square().sum((-1, -2))
    products = torch.where(products > 1e-14 * size[..., None], products, 0.0)  # below is rounding
    return products.flip(-1).sqrt()
