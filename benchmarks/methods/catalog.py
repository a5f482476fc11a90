"""What is compared: each method by the words that a user would type, beside it PEFT's where it has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

REFERENCE = "lora"  # what the others are compared with


@dataclass(frozen=True, eq=False)
class Method:
    """A way to train.

    Attributes:
        label: as the tables have it.
        words: of a command line, beside the task's own.
        method: the word of `method=`.
        rate: where its rates begin, as a multiple of the recipe's for this `method`.
        match: the rank is chosen so that as many parameters train as by LoRA on the task's own layers.
        peft: options of PEFT's LoraConfig beside those that our plan gives; only for `method="peft"`.
        only: the tasks that have it, None all.
    """

    label: str
    words: tuple[str, ...] = ()
    method: str = "lora"
    rate: float = 1.0
    match: bool = False
    peft: Mapping[str, Any] = field(default_factory=dict)
    only: tuple[str, ...] | None = None


LINEAR = ("lora.exclude_modules=[patch_embed.proj]",)  # of the digits' ViT
PEFTS = {
    "pissa": "PiSSA",
    "olora": "OLoRA",
    "orthogonal": "A begins orthogonal",
    "gaussian": "A begins gaussian",
    "eva": "EVA, even ranks",
}


def _by_peft(label: str, init: str) -> Method:
    """PEFT's own way to begin, which most of its inits know for linear layers alone."""
    return Method(
        f"{label} by PEFT, linear layers",
        LINEAR,
        method="peft",
        peft={"init_lora_weights": init},
        only=("vit_digits",),
    )


METHODS: dict[str, Method] = {
    "before": Method("before", method="none"),
    "lora": Method("LoRA"),
    "full": Method("full fine-tuning", method="full"),
    "probe": Method("linear probe", method="linear_probe"),
    "bitfit": Method("BitFit", method="bitfit"),
    "norms": Method("norms only", method="norm_only"),
    "peft": Method("LoRA by PEFT", method="peft"),
    "rslora": Method("rsLoRA", ("lora.use_rslora=true",), rate=0.5),
    "dora": Method("DoRA", ("lora.use_dora=true",)),
    "peft_dora": Method("DoRA by PEFT", ("lora.use_dora=true",), method="peft"),
    "gaussian": Method("A begins gaussian", ("lora.init=gaussian",)),
    "orthogonal": Method("A begins orthogonal", ("lora.init=orthogonal",)),
    "pissa": Method("PiSSA", ("lora.init=pissa",)),
    "milora": Method("MiLoRA", ("lora.init=milora",)),
    "olora": Method("OLoRA", ("lora.init=olora",)),
    "eva": Method("EVA, even ranks", ("lora.init=eva",)),
    "eva_ranks": Method("EVA, its ranks", ("lora.init=eva", "lora.rank=auto")),
    "lora_one": Method("LoRA-One", ("lora.init=lora_one",)),
    "lora_one_ranks": Method("LoRA-One, ranks by gradients", ("lora.init=lora_one", "lora.rank=auto")),
    "rank_auto": Method("ranks by the inputs", ("lora.rank=auto",)),
    "energy": Method("ranks of 95 % of the inputs' energy", ("lora.rank=energy:0.95",)),
    "relora": Method("ReLoRA, 2 restarts", ("lora.restarts=2",)),
    "last_in_full": Method(
        "LoRA, the last block in full", ("lora.modules_to_save=[auto,blocks.3,norm]",), only=("vit_digits",)
    ),
    "last_stage_in_full": Method(
        "LoRA, the last stage in full", ("lora.modules_to_save=[auto,layer4]",), only=("resnet_digits",)
    ),
    "box_head_in_full": Method(
        "LoRA, the box head in full",
        ("lora.modules_to_save=[auto,box_head]",),
        only=("fasterrcnn_shapes",),
    ),
    "box_head_scaled": Method(
        "LoRA, four times the scaling in the box head",
        ("lora.alpha_pattern={fc6:128,fc7:128}",),
        only=("fasterrcnn_shapes",),
    ),
    "auto": Method("layers of “auto”, same size", ("lora.target_modules=auto",), match=True),
    "attention": Method(
        "attention alone, same size",
        ("lora.target_modules=[qkv,attn.proj]",),
        match=True,
        only=("vit_digits",),
    ),
    "lora_plus": Method("LoRA+, B at 16 times the rate", ("optim.lora_plus=16",), rate=0.2),
    "scaled_adamw": Method("scaled AdamW", ("optim=scaled_adamw",)),
    "peft_rslora": Method(
        "rsLoRA by PEFT", ("lora.use_rslora=true",), method="peft", rate=0.5, only=("vit_digits",)
    ),
    **{f"peft_{init}": _by_peft(label, init) for init, label in PEFTS.items()},
    "lora_linear": Method("LoRA, linear layers", LINEAR, only=("vit_digits",)),
    "eva_linear": Method("EVA, even ranks, linear layers", (*LINEAR, "lora.init=eva"), only=("vit_digits",)),
    "norms_too": Method("LoRA, norms train too", ("lora.train_norm=both",)),
    "biases_too": Method("LoRA, biases train too", ("lora.train_bias=all",)),
    "frobenius": Method("regularized, Frobenius 1e-2", ("lora.regularizer.frobenius=1e-2",)),
    "outputs": Method("regularized, outputs 0.1", ("lora.regularizer.outputs=0.1",)),
    "rank_4": Method("LoRA, r = 4", ("lora.rank=4",)),
    "rank_64": Method("LoRA, r = 64", ("lora.rank=64",)),
    "rslora_64": Method("rsLoRA, r = 64", ("lora.rank=64", "lora.use_rslora=true"), rate=0.25),
}
CORE = ("before", "lora", "full", "probe", "peft", "bitfit")  # of the tasks whose runs take minutes


def unknown(names: list[str], known: Mapping[str, Any], what: str) -> list[str]:
    """A line for each name that there is not."""
    return [f"{what}={name}: give one of {', '.join(known)}." for name in names if name not in known]
