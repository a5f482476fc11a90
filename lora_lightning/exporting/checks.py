"""Whether an exported file gives what the model gives: fresh inputs, other sizes, and how far they differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from lora_lightning.errors import UserError
from lora_lightning.exporting.guards import Elsewhere
from lora_lightning.exporting.subject import BATCH, Axes, sizes_of

Arrays = dict[str, np.ndarray]
Inputs = Mapping[str, Tensor]
Run = Callable[[Arrays], list[np.ndarray]]
Pair = tuple[Inputs, Sequence[Tensor]]  # inputs, and the model's outputs of them
MOST = 1e-4  # of the output's scale


def fresh_inputs(inputs: Mapping[str, Tensor], dynamic: Axes) -> list[dict[str, Tensor]]:
    """Inputs of two sizes of each dynamic axis, with other values than the example's: a batch of one and one
    of three; other axes as in the example and half as long again.

    Floats have the example's mean and deviation; whole numbers are drawn from the example's own.
    """
    source = torch.Generator().manual_seed(0)
    found = []
    for grown in (False, True) if dynamic else (False,):
        made = {}
        for name, tensor in inputs.items():
            shape = list(tensor.shape)
            for axis, text in dynamic.get(name, {}).items():
                size = shape[axis]
                shape[axis] = (3 if grown else 1) if text == BATCH else size + size // 2 * grown
            made[name] = _like(tensor, shape, source)
        found.append(made)
    return found


def _like(tensor: Tensor, shape: Sequence[int], source: torch.Generator) -> Tensor:
    count = int(np.prod(shape))
    if tensor.dtype == torch.uint8:
        return torch.randint(256, shape, generator=source, dtype=torch.uint8)
    if not tensor.is_floating_point():
        picked = torch.randint(max(tensor.numel(), 1), (count,), generator=source)
        return tensor.flatten()[picked].view(shape)
    values = tensor.float()
    deviation = values.std() if values.numel() > 1 else values.new_tensor(1.0)
    return (torch.randn(shape, generator=source) * deviation + values.mean()).to(tensor.dtype)


def array_of(tensor: Tensor) -> np.ndarray:
    """A tensor's values; of bfloat16, which numpy does not have, in float32."""
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def compare(
    run: Run,
    pairs: Sequence[Pair],
    what: str,
    most: float = MOST,
    boxes: bool = False,
) -> float:
    """The largest difference between what a file gives and what was wanted, of the output's scale.

    Args:
        pairs: inputs, and the adapted model's outputs of them.
        what: the file, for errors.
        most: that is accepted.
        boxes: the outputs are boxes, labels, scores and what else belongs to each box, best first; those
            whose scores are the same but for rounding may come in any order.

    Raises:
        UserError: it is more, of other sizes, or the file cannot be run.
    """
    largest = 0.0
    for inputs, wanted in pairs:
        sizes = sizes_of(inputs)
        try:
            given = run({name: array_of(value) for name, value in inputs.items()})
        except Exception as error:  # the runtimes' own
            reason = " ".join(str(error).split())[:240].rstrip(".") or type(error).__name__
            raise UserError(
                f"export: {what} cannot be run with {sizes}: {reason}. Leave out of dynamic what is of one "
                "size."
            ) from None
        given = in_order(wanted, given) if boxes else given
        for number, (ours, theirs) in enumerate(zip(wanted, given, strict=True)):
            if tuple(ours.shape) != theirs.shape:
                raise UserError(
                    f"export: {what} gives {theirs.shape} for {sizes} and the model {tuple(ours.shape)}. "
                    "Leave out of dynamic what is of one size, or take another format."
                )
            if (kind := array_of(ours).dtype).kind != theirs.dtype.kind:
                raise UserError(
                    f"export: {what} gives {theirs.dtype} for output {number} and the model {kind}. Take "
                    "another format."
                )
            difference = _difference(array_of(ours), theirs)
            largest = max(largest, difference)
            if difference > most:
                half = "Give model.float(), or take" if ours.dtype == torch.float16 else "Take"
                raise UserError(
                    f"export: {what} differs from the model by {difference:.1e} of output {number}'s scale "
                    f"for {sizes}; at most {most:g} is accepted. {half} another format."
                )
    return largest


def in_order(wanted: Sequence[Tensor], given: list[np.ndarray]) -> list[np.ndarray]:
    """Boxes of a file in the order of the model's; as they came, where the scores are others or
    the model has one that it lacks.

    Args:
        wanted: boxes (n, 4), labels (n,), scores (n,), and what else each box has.
        given: the file's.
    """
    boxes, labels, scores = (array_of(tensor).astype("f8") for tensor in wanted[:3])
    if any(ours.shape != theirs.shape for ours, theirs in zip((boxes, labels, scores), given, strict=False)):
        return given
    room = MOST * float(np.abs(scores).max(initial=0.0))
    if np.abs(given[2] - scores).max(initial=0.0) > room:
        return given
    free, order = np.ones(len(scores), bool), []
    for box, label, score in zip(boxes, labels, scores, strict=True):
        like = np.flatnonzero(free & (given[1] == label) & (np.abs(given[2] - score) <= room))
        if not len(like):
            return given
        order.append(like[np.abs(given[0][like] - box).max(1).argmin()])
        free[order[-1]] = False
    return [theirs[order] for theirs in given]


def refuse_elsewhere(
    run: Run, model: Callable[[Inputs], list[Tensor]], found: Sequence[Elsewhere], kind: str
) -> None:
    """Refuse a file that gives something else than its model at a size that its graph was not traced for. A
    size that the model itself does not take is no such thing, nor a smaller one that the file does not take.

    Args:
        model: gives the model's outputs, or raises UserError.
        kind: the model's, for errors.

    Raises:
        UserError: it is one.
    """
    for other in found:
        try:
            wanted = model(other.inputs)
        except UserError:
            continue
        try:
            given = run({name: array_of(value) for name, value in other.inputs.items()})
        except Exception:  # the runtimes' own
            same = not other.larger
        else:
            same = all(
                tuple(ours.shape) == theirs.shape and _difference(array_of(ours), theirs) <= MOST
                for ours, theirs in zip(wanted, given, strict=True)
            )
        if not same:
            raise UserError(
                f"export: {kind} computes in another way where {other.where}, and a file has one way alone. "
                "Leave that axis out of dynamic."
            )


def _difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Of the largest finite value; NaN and infinities have to be the same in both."""
    if not ours.size:
        return 0.0
    if not np.issubdtype(ours.dtype, np.floating):
        return 0.0 if np.array_equal(ours, theirs) else float("inf")
    finite = np.isfinite(ours)
    if (
        not np.array_equal(ours[~finite], theirs[~finite], equal_nan=True)
        or not np.isfinite(theirs[finite]).all()
    ):
        return float("inf")
    ours, theirs = ours[finite].astype("f8"), theirs[finite].astype("f8")
    return float(np.abs(ours - theirs).max(initial=0.0)) / max(float(np.abs(ours).max(initial=0.0)), 1e-30)
