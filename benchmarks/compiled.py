"""What a compiled training step costs on a GPU, on paper: no GPU is needed, and nothing is timed.

    python -m benchmarks.compiled [--device H100]

A block of a network is compiled as torch.compile does it, forward and backward: Dynamo, AOTAutograd with the
partition that decides what is saved and what is made again, Inductor's passes and its scheduler, which says
what is fused into one kernel. The code itself is not made, and nothing runs. Each kernel is counted: bytes,
FLOPs, and its time on the device at the rates of `paper_cost`. Writes benchmarks/results/compiled.json and
compiled.md.

What is assumed beside `on_paper`'s assumptions:

- Inductor fuses for a GPU as it does here, for a CPU. A few passes are for one of the two alone; and where a
  CPU's loops are nested, a GPU's reduction keeps a row in registers.
- A product, a convolution and attention read their inputs and write their results once, in any layout.
- "plain", "dense" and "extended" are forms of ours forced upon every layer, "ours" is the rule's choice.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import lora_lightning as ll
from benchmarks.measure import saved_bytes
from benchmarks.paper_cost import DEVICES, Device, Sum, flops_of, name_of
from lora_lightning.kernels import common, compiled

RESULTS = Path(__file__).parent / "results"
RANK = 8
WAYS = ("floor", "full", "peft", "plain", "dense", "extended", "ours")
LINEAR = ("qkv", "attn.proj", "fc1", "fc2")
CONV = ("conv1", "conv2", "conv3")


@dataclass
class Count:
    """The kernels of the graphs that were compiled with `backend`.

    Attributes:
        device: on which they are to run.
        kernels: name and cost of each.
    """

    device: Device
    kernels: list[tuple[str, Sum]] = field(default_factory=list)

    @property
    def total(self) -> Sum:
        total = Sum()
        for _, cost in self.kernels:
            total.add(cost)
        return total

    def backend(self, graph: Any, inputs: Any) -> Any:
        """For `torch.compile`: the graph's outputs are memory without values."""
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(graph, inputs, inner_compile=self._inner)

    def _inner(self, graph: Any, inputs: Any, is_backward: bool = False, **_: Any) -> Callable[..., Any]:
        from torch._inductor import compile_fx
        from torch._inductor.debug import DebugContext
        from torch._inductor.graph import GraphLowering
        from torch._inductor.virtualized import V

        compile_fx.record_original_output_strides(graph)
        with V.set_fake_mode(compile_fx.fake_tensor_prop(graph, inputs)), V.set_debug_handler(DebugContext()):
            compile_fx._recursive_post_grad_passes(graph, False)
            lowered = GraphLowering(
                graph, inputs, shape_env=compile_fx.shape_env_from_inputs(inputs), is_backward=is_backward
            )
            with V.set_graph_handler(lowered):
                lowered.run(*inputs)
                lowered._update_scheduler()
                self.kernels += filter(None, map(self._kernel, lowered.scheduler.nodes))
        outputs = next(n for n in graph.graph.nodes if n.op == "output").args[0]
        given = {node: i for i, node in enumerate(n for n in graph.graph.nodes if n.op == "placeholder")}
        places = [given.get(_base(node)) for node in outputs]

        def run(arguments: list[Any]) -> list[Any]:
            tensors = [*arguments]
            arguments.clear()  # what is a view of an input is no memory of its own
            return [
                _memory(_value(node)) if place is None else tensors[place]
                for node, place in zip(outputs, places, strict=True)
            ]

        run._boxed_call = True  # type: ignore[attr-defined]  # as AOTAutograd asks
        return run

    def _kernel(self, node: Any) -> tuple[str, Sum] | None:
        """A kernel of the scheduler's: fused operations, or one operator of a library."""
        kind = type(node).__name__
        if kind.startswith("Nop") or type(node.node).__name__ == "MultiOutput":  # a part of another's results
            return None
        name, moved, flops, rate = "fused", node.get_read_write_buffers_sizes(), 0, 1.0
        origin = _origin(node.node) if kind.startswith("Extern") else None
        if origin is not None:
            name, out = name_of(origin.target), _value(origin)
            arguments, options = torch.fx.map_arg((origin.args, origin.kwargs), _value)
            read = {id(n): n for n in origin.all_input_nodes}.values()
            tensors = [t for t in tree_leaves(([_value(n) for n in read], out)) if isinstance(t, Tensor)]
            moved = sum(t.nbytes for t in tensors)
            flops = flops_of(origin.target, name, arguments, options, out)
            rate = self.device.peak(name, tensors[-1].dtype)
        seconds = max(moved / self.device.bandwidth, flops / rate, self.device.launch)
        return name, Sum(1, 1, moved, flops, seconds)


def _origin(operator: Any) -> Any:
    """The node of the graph that a call of a library's operator comes from."""
    overload = getattr(operator, "op_overload", None)
    found = (n for n in operator.get_origins() if n.target is overload)
    return operator.get_origin_node() or next(found, None)


def _base(node: Any) -> Any:
    """What a node is a view of."""
    while isinstance(node, torch.fx.Node) and getattr(node.target, "is_view", False):
        node = node.args[0]
    return node


def _value(node: Any) -> Any:
    return node.meta["val"] if isinstance(node, torch.fx.Node) else node


def _memory(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)


def counted(model: nn.Module, x: Tensor, device: Device) -> tuple[Count, int]:
    """The kernels of a step of the model, forward and backward, and the bytes saved between them."""
    count = Count(device)
    torch.compiler.reset()
    step = torch.compile(model, backend=count.backend, fullgraph=True)
    outputs: list[Tensor] = []
    saved = saved_bytes(model, lambda: outputs.append(step(x)) or outputs[0])  # type: ignore[func-returns-value]
    outputs[0].backward(torch.empty_like(outputs[0]))
    return count, saved


def block(width: int, heads: int) -> nn.Module:
    from timm.models.vision_transformer import Block

    return nn.Sequential(Block(width, heads, qkv_bias=True))


def bottleneck(channels: int) -> nn.Module:
    from timm.models.resnet import Bottleneck

    return nn.Sequential(Bottleneck(channels, channels // 4)).to(memory_format=torch.channels_last)


def images(size: int, channels: int, side: int) -> Tensor:
    x = torch.empty(size, channels, side, side, dtype=torch.bfloat16)
    return x.to(memory_format=torch.channels_last)


# name -> the block, its input, what is adapted
UNITS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], tuple[str, ...]]] = {
    f"ViT-{name}, {size} images": (
        lambda width=width, heads=heads: block(width, heads),  # type: ignore[misc]  # mypy takes no defaults
        lambda width=width, size=size: torch.empty(size, 197, width, dtype=torch.bfloat16),  # type: ignore[misc]
        LINEAR,
    )
    for name, width, heads, size in (
        ("S", 384, 6, 128),
        ("B", 768, 12, 128),
        ("B", 768, 12, 8),
        ("L", 1024, 16, 32),
    )
}
UNITS |= {
    f"ResNet-50, {name}, 256 images": (
        lambda channels=channels: bottleneck(channels),  # type: ignore[misc]
        lambda channels=channels, side=side: images(256, channels, side),  # type: ignore[misc]
        CONV,
    )
    for name, channels, side in (("first stage", 256, 56), ("last stage", 2048, 7))
}


def built(way: str, make: Callable[[], nn.Module], targets: tuple[str, ...]) -> nn.Module:
    """The block in bfloat16, with A and B in float32, and norms with statistics frozen but for "full"."""
    model = make()
    if way == "floor":
        model.requires_grad_(False)
    elif way == "peft":
        from peft import LoraConfig, get_peft_model

        names = [name.rpartition(".")[2] for name in targets]
        model = get_peft_model(
            model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=names)
        ).base_model.model
    elif way != "full":
        ll.inject(model, ll.LoRAConfig(rank=RANK, target_modules=list(targets), modules_to_save=None))
    model = model.bfloat16().train()
    for module in model.modules():
        if way != "full" and isinstance(module, nn.BatchNorm2d):
            module.eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return model


@contextmanager
def form(way: str) -> Iterator[None]:
    """Layers take what they take off a CPU: the form named, where there is one, else the rule's choice."""
    rule = compiled.cheapest

    def pick(*arguments: Any) -> str:
        forms = arguments[-1]
        return way if way in forms else "dense" if way == "extended" else rule(*arguments)

    with patch.object(common, "on_cpu", lambda device: False), patch.object(compiled, "cheapest", pick):
        yield


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", choices=DEVICES, default="H100")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    for unit, (make, batch, targets) in UNITS.items():
        found[unit] = rows = {}
        for way in WAYS:
            with form(way):
                count, saved = counted(
                    built(way, make, targets), batch().requires_grad_(), DEVICES[options.device]
                )
            total = count.total
            rows[way] = {
                "kernels": total.launches, "gb": total.bytes / 1e9, "tflop": total.flops / 1e12,
                "saved_mib": saved / 2**20, "us": 1e6 * total.seconds,
            }  # fmt: skip
            rows[way]["ratio"] = rows[way]["us"] / rows["floor"]["us"]
            print(
                f"{unit:32s} {way:9s}", "  ".join(f"{k} {v:8.2f}" for k, v in rows[way].items()), flush=True
            )
    result = {"device": options.device, "rank": RANK, "torch": torch.__version__, "units": found}
    (RESULTS / "compiled.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "compiled.md").write_text(page(found))
    return 0


def page(units: dict[str, Any]) -> str:
    lines = ["# Compiled training steps on a GPU, on paper", "", *WORDS, ""]
    lines += ["| one block | " + " | ".join(WAYS) + " |", "| --- |" + " ---: |" * len(WAYS)]
    for unit, rows in units.items():
        cells = [f"{row['ratio']:.2f}; {row['kernels']}; {row['gb']:.2f}" for row in rows.values()]
        lines.append(f"| {unit} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


WORDS = (
    "Counted, not measured: `python -m benchmarks.compiled`, whose docstring says what is assumed. Time",
    "relative to the floor's; kernels; GB moved. bfloat16, rank 8, forward and backward.",
)

if __name__ == "__main__":
    sys.exit(main())
