"""What CUDA's kernels do that an operator's signature does not show, as it stands in torch's sources.

Each rule names the file of `aten/src/ATen/native` that it was read in. What is not known to be hidden is not
counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

# cuda/MultiTensorApply.cuh, as built with CUDA before 13, since which a launch takes more: entries of a
# chunk, chunks of a launch, tensors of a launch by the number of lists.
CHUNK, BLOCKS = 65_536, 320
LISTED = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
CONCATENATED = 128  # cuda/Shape.cu: tensors of a launch of cat and stack

# Of these tables they read as many entries as they write.
ROWS_OF = {"embedding", "index", "index_select", "gather"}
# Which arguments an operator wants packed, and packs where they are not (`contiguous` in its CUDA function).
PACKS: dict[str, tuple[int, ...]] = {
    "native_layer_norm": (0,),  # cuda/layer_norm_kernel.cu
    "native_layer_norm_backward": (0, 1),
    "_fused_rms_norm": (0,),
    "_fused_rms_norm_backward": (0, 1),
    "_softmax": (0,),  # cuda/SoftMax.cu
    "_log_softmax": (0,),
    "_softmax_backward_data": (0, 1),
    "_log_softmax_backward_data": (0, 1),
    "roll": (0,),  # cuda/TensorTransformations.cu
    "_weight_norm_interface": (0, 1),  # cuda/WeightNorm.cu
}


def hidden_kernels(name: str, args: Any, kwargs: Any, out: Any) -> list[int]:
    """Bytes that each kernel moves which is launched out of sight, most of them copies."""
    found = [2 * _packed(args[i]) for i in PACKS.get(name, ()) if not args[i].is_contiguous()]
    if rule := COPIES.get(name):
        found += [2 * size for size in rule(args, kwargs, out)]
    if name == "_softmax_backward_data":  # cuda/SoftMax.cu: dY·y first
        found.append(3 * _packed(args[0]))
    if name == "native_batch_norm":  # cuda/Normalization.cu: statistics, or the running ones made ready
        channels = 4 * 2 * args[0].shape[1]
        found += [_packed(args[0]) if args[5] else channels, channels]
    if name == "roll":  # TensorTransformations.h: one dimension after the other
        found += [2 * _packed(args[0])] * (len(args[1]) - 1)
    return found


def _packed(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _is_operand(matrix: Tensor) -> bool:
    """Whether cuBLAS can read the last two dimensions: one of them dense, the other's step no shorter."""
    rows, columns = matrix.shape[-2:]
    down, across = matrix.stride()[-2:]
    return (across == 1 and down >= max(1, columns)) or (down == 1 and across >= max(1, rows))


def _product(args: Any, kwargs: Any, out: Any) -> list[int]:  # cuda/Blas.cpp: prepare_matrix_for_cublas
    return [_packed(t) for t in args[:2] if not _is_operand(t)]


def _added_product(args: Any, kwargs: Any, out: Any) -> list[int]:
    """What is added is first copied to the result, unless it is a row, which cuBLASLt adds."""
    start, *operands = args[:3]
    found = [_packed(t) for t in operands if not _is_operand(t)]
    row = start.dim() == 1 and start.is_contiguous() and start.shape[0] == out.shape[-1]
    if not (row or start is out or kwargs.get("beta", 1) == 0):
        found.append(_packed(out))
    return found


def _convolution(args: Any, kwargs: Any, out: Any) -> list[int]:  # Convolution.cpp, cudnn/ConvShared.cpp
    """Input and weight in one format; a bias is added in a pass of its own, which moves what a copy would."""
    x, weight, bias = args[:3]
    return [_packed(t) for t in _unformatted(x, weight)] + ([_packed(out)] if bias is not None else [])


def _convolution_backward(args: Any, kwargs: Any, out: Any) -> list[int]:
    dY, x, weight = args[:3]
    wanted = _common_format(x, weight)
    need_x, need_weight, _ = args[10]
    read = [dY, *([x] if need_weight else []), *([weight] if need_x else [])]
    return [_packed(t) for t in read if not t.is_contiguous(memory_format=wanted)]


def _common_format(x: Tensor, weight: Tensor) -> torch.memory_format:
    last = {torch.channels_last, torch.channels_last_3d} & {
        suggest_memory_format(x),
        suggest_memory_format(weight),
    }
    return last.pop() if last else torch.contiguous_format


def _unformatted(x: Tensor, weight: Tensor) -> list[Tensor]:
    wanted = _common_format(x, weight)
    return [t for t in (x, weight) if not t.is_contiguous(memory_format=wanted)]


def _flash_backward(args: Any, kwargs: Any, out: Any) -> list[int]:  # transformers/cuda/attention_backward.cu
    """Gradient and output are wanted packed as (batch, tokens, heads, width)."""
    return [_packed(t) for t in (args[0], args[4]) if not t.transpose(1, 2).is_contiguous()]


def _lstm(args: Any, kwargs: Any, out: Any) -> list[int]:  # cudnn/RNN.cpp
    """Weights that are not one buffer are copied to one; batch first is turned to time first."""
    x, weights, _, buffer = args[:4]
    weights = [] if buffer is not None else [_packed(w) for w in weights]
    return [*weights, *([_packed(x)] if args[10] else [])]


def _lstm_backward(args: Any, kwargs: Any, out: Any) -> list[int]:
    x, gradient = args[0], args[7]
    return [_packed(t) for t in (x, gradient) if args[14] or not t.is_contiguous()]


def _group_norm(args: Any, kwargs: Any, out: Any) -> list[int]:  # group_norm.cpp
    wanted = suggest_memory_format(args[0])
    return [
        _packed(t)
        for t in args[:2]
        if t is not None and t.dim() > 1 and not t.is_contiguous(memory_format=wanted)
    ]


COPIES: dict[str, Callable[[Any, Any, Any], list[int]]] = {
    "mm": _product,
    "bmm": _product,
    "addmm": _added_product,
    "baddbmm": _added_product,
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
    "_scaled_dot_product_flash_attention_backward": _flash_backward,
    "native_group_norm": _group_norm,
    "native_group_norm_backward": _group_norm,
    "_cudnn_rnn": _lstm,
    "_cudnn_rnn_backward": _lstm_backward,
}


def unread(name: str, args: Any) -> tuple[int, ...]:
    """Places of arguments that the gradients asked for are not made from."""
    if name == "convolution_backward":
        need_x, need_weight, _ = args[10]
        return (() if need_weight else (1,)) + (() if need_x else (2,))
    if name == "native_batch_norm_backward" and not (args[7] or any(args[9][1:])):
        return (1,)  # cuda/Normalization.cu: batch_norm_elementwise_backward_eval
    return (0,) if name in ROWS_OF else ()


def second_pass(name: str, args: Any, kwargs: Any, out: Any) -> int:
    """Bytes that are read again: sums come before what is made with them, each gradient reads dY."""
    if name == "native_batch_norm_backward" and (args[7] or any(args[9][1:])):
        return _packed(args[0]) + _packed(args[1])
    if name in ROWS_OF:
        return _packed(out)
    if name in ("native_layer_norm_backward", "native_group_norm_backward"):
        return (_packed(args[0]) + _packed(args[1])) * (launches(name, args, kwargs, None) - 1)
    if name == "convolution_backward":
        return _packed(args[0]) * (launches(name, args, kwargs, None) - 1)
    return 0


def launches(name: str, args: Any, kwargs: Any, out: Any) -> int:
    """Kernels that the operator itself launches, the hidden copies not among them."""
    if name in ("cat", "stack"):
        return math.ceil(len(args[0]) / CONCATENATED)
    if name.startswith("_foreach_"):
        lists = [a for a in args if isinstance(a, (list, tuple)) and isinstance(a[0], Tensor)]
        return foreach_launches(lists[0], len(lists) + (not name.endswith("_")))
    if name == "native_layer_norm_backward":
        return max(1, args[7][0] + (args[7][1] or args[7][2]))
    if name == "native_group_norm_backward":
        return max(1, args[9][0] + (args[9][1] or args[9][2]))
    if name == "convolution_backward":
        return max(1, sum(args[10]))
    if name in ("_cudnn_rnn", "_cudnn_rnn_backward"):
        return _lstm_kernels(name, args)
    return 1


def foreach_launches(tensors: list[Tensor], lists: int) -> int:
    """Of an operator over lists of tensors: a launch takes so many tensors, and so many chunks of them."""
    count = held = blocks = 0
    for tensor in tensors:
        chunks = math.ceil(tensor.numel() / CHUNK)
        held += chunks > 0
        for chunk in range(1, chunks + 1):
            blocks += 1
            if blocks == BLOCKS or (held == LISTED[lists] and chunk == chunks):
                count, blocks, held = count + 1, 0, int(chunk < chunks)
    return count + (blocks > 0)


def _lstm_kernels(name: str, args: Any) -> int:
    """One a layer and time step at least, each waiting for another; one a layer for weights' gradients."""
    x = args[0]
    layers, batch_first = (args[9], args[10]) if name == "_cudnn_rnn" else (args[13], args[14])
    steps = layers * x.shape[1 if batch_first else 0]
    return steps + (layers if name.endswith("backward") and args[21][3] else 0)


def _lstm_flops(args: Any, out: Any) -> int:
    tokens = args[0].shape[0] * args[0].shape[1]
    return sum(2 * tokens * w.numel() for w in args[1] if w.dim() == 2)


def _lstm_backward_flops(args: Any, out: Any) -> int:
    return _lstm_flops(args, out) * (1 + bool(args[21][3]))


# Multiplications and additions that `torch.utils.flop_counter` does not know.
FLOPS: dict[str, Callable[[Any, Any], int]] = {
    "_cudnn_rnn": _lstm_flops,
    "_cudnn_rnn_backward": _lstm_backward_flops,
}
