"""The parameter counts that papers and guides quote for LoRA, from models of random weights.

A "total" is the model before (what BERT-large's 99.53 % refers to) or with the updates (`Plan.total`, and
PEFT's `print_trainable_parameters`, whose newer versions count a head that trains twice: the frozen copy
too). Each published number is asserted in its own convention.

- BERT-large (24 layers of width 1024, pooler, no language-model head): 335,141,888 before. The counts
  follow from r·(in + out) for each matrix.
- PEFT's guide "Image classification using LoRA" (docs/source/task_guides/image_classification_lora.md,
  written with PEFT 0.2.0): ViT-base, head of 101 classes, rank 16 on query and value:
  "trainable params: 667493 || all params: 86466149", and 85876325 before. Its successor
  (lora_based_methods.md): "trainable params: 667,493 || all params: 86,543,818".
- The Hugging Face blog on timm in transformers: timm's vit_base_patch16_224, the same head, rank 16 on the
  fused qkv: "trainable params: 667,493 || all params: 86,543,818" as well.
- PEFT's guide "int8 training for automatic speech recognition" (docs/source/task_guides/int8-asr.md, PEFT
  up to 0.6.2): Whisper-large-v2, rank 32 on q_proj and v_proj:
  "trainable params: 15728640 || all params: 1559033600".
"""

import pytest
import torch
from torch import nn

import lora_lightning as ll

BERT_ATTENTION = ["query", "key", "value", "attention.output.dense"]
VIT_QUERY_VALUE = r".*\.(query|q_proj|value|v_proj)"  # transformers 5 renamed them
HEAD = 768 * 101 + 101


def on_meta(model: str, config: str, **options) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):  # shapes alone: a billion parameters take no memory
        return getattr(transformers, model)(getattr(transformers, config)(**options))


def bert_large() -> nn.Module:
    sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
    return on_meta("BertModel", "BertConfig", intermediate_size=4096, **sizes)


def vit_base() -> nn.Module:
    return on_meta("ViTForImageClassification", "ViTConfig", num_labels=101)


def timm_vit_base() -> nn.Module:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        return timm.create_model("vit_base_patch16_224", num_classes=101)


def whisper_large_v2() -> nn.Module:
    sizes = {"layers": 32, "attention_heads": 20, "ffn_dim": 5120}
    sizes = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in sizes.items()}
    return on_meta("WhisperForConditionalGeneration", "WhisperConfig", d_model=1280, **sizes)


@pytest.mark.parametrize(
    ("build", "rank", "targets", "heads", "before", "trainable", "total"),
    [
        (bert_large, 16, ["query", "value"], None, 335_141_888, 1_572_864, 336_714_752),
        (bert_large, 8, BERT_ATTENTION, None, 335_141_888, 1_572_864, 336_714_752),
        (
            bert_large,
            4,
            [*BERT_ATTENTION, "intermediate.dense", "layer.*.output.dense"],
            None,
            335_141_888,
            1_769_472,
            336_911_360,
        ),
        (vit_base, 16, VIT_QUERY_VALUE, ["classifier"], 85_876_325, 667_493, 86_466_149),
        (timm_vit_base, 16, ["qkv"], ["head"], 85_876_325, 667_493, 86_543_818 - HEAD),
        (whisper_large_v2, 32, ["q_proj", "v_proj"], None, 1_543_304_960, 15_728_640, 1_559_033_600),
    ],
)
def test_the_published_count(build, rank, targets, heads, before, trainable, total):
    model = build()
    assert sum(p.numel() for p in model.parameters()) == before
    config = ll.LoRAConfig(rank=rank, target_modules=targets, modules_to_save=heads)
    planned = ll.inject(model, config)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == planned.trainable == trainable
    assert sum(p.numel() for p in model.parameters()) == planned.total == total


def test_bert_large_trains_99_53_percent_fewer():
    config = ll.LoRAConfig(rank=16, target_modules=["query", "value"], modules_to_save=None)
    planned = ll.plan(bert_large(), config)
    before = planned.total - planned.trainable
    assert f"{100 * (1 - planned.trainable / before):.2f}" == "99.53"
    assert f"({100 * planned.trainable / planned.total:.3g} %)" in str(planned)  # of all, updates included


def test_peft_counts_a_trained_head_twice():
    config = ll.LoRAConfig(rank=16, target_modules=VIT_QUERY_VALUE, modules_to_save=["classifier"])
    assert ll.plan(vit_base(), config).total + HEAD == 86_543_818
