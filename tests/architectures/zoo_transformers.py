"""Architectures of transformers, small."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .architecture import SECOND, Architecture


def _hf(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        settings = getattr(transformers, config)(**options)
        settings._attn_implementation = "eager"
        return getattr(transformers, model)(settings)

    return build


_ENCODER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
_SPEECH = {
    **_ENCODER,
    "conv_dim": (16, 16, 16),
    "conv_kernel": (10, 3, 3),
    "conv_stride": (5, 2, 2),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "vocab_size": 12,
    "layerdrop": 0.0,
    "mask_time_prob": 0.0,
    "apply_spec_augment": False,
}
_WHISPER = {
    "vocab_size": 40,
    "num_mel_bins": 8,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_source_positions": 12,
    "max_target_positions": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
_DETR = {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_queries": 5,
    "num_labels": 3,
}


_DETR_DEAD = {"decoder.layers.0.self_attn.v_proj": "the queries begin at zero, so that its input is zero"}


def _resnet_config() -> Any:
    import transformers

    return transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 24, 32, 40], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage4"],
    )  # fmt: skip


def _detr() -> nn.Module:
    return _hf("DetrForObjectDetection", "DetrConfig", backbone_config=_resnet_config(), **_DETR)()


def _rt_detr() -> nn.Module:
    import transformers

    body = transformers.RTDetrResNetConfig(
        embedding_size=16, hidden_sizes=[16, 24, 32, 40], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    model = _hf(
        "RTDetrForObjectDetection", "RTDetrConfig", backbone_config=body, encoder_hidden_dim=32,
        encoder_in_channels=[24, 32, 40], encoder_ffn_dim=64, encoder_attention_heads=2, d_model=32,
        decoder_in_channels=[32, 32, 32], decoder_ffn_dim=64, decoder_layers=2, decoder_attention_heads=2,
        num_queries=10, num_denoising=0, num_labels=3, anchor_image_size=None,
    )()  # fmt: skip
    for module in model.modules():  # drawn with a deviation of 0.01, they would let every signal vanish
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return model


def tokens(**more: Callable[[], Tensor]) -> Callable[[], Any]:
    return lambda: {"input_ids": torch.randint(3, 40, (2, 6)), **{k: v() for k, v in more.items()}}


def pixels(size: int = 32) -> Callable[[], Any]:
    return lambda: {"pixel_values": torch.rand(2, 3, size, size)}


_TEXT = {**_ENCODER, "vocab_size": 40, "max_position_embeddings": 16, "num_labels": 3}

TRANSFORMERS = {
    "hf_wav2vec2": Architecture(
        _hf("Wav2Vec2ForCTC", "Wav2Vec2Config", **_SPEECH),
        lambda: {"input_values": torch.randn(2, SECOND)},
        quick=True,
    ),
    "hf_wav2vec2_classifier": Architecture(
        _hf("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", **_SPEECH, num_labels=3),
        lambda: {"input_values": torch.randn(2, SECOND)},
    ),
    "hf_hubert": Architecture(
        _hf("HubertForCTC", "HubertConfig", **_SPEECH),
        lambda: {"input_values": torch.randn(2, SECOND)},
    ),
    "hf_wavlm": Architecture(
        _hf("WavLMForCTC", "WavLMConfig", **_SPEECH),
        lambda: {"input_values": torch.randn(2, SECOND)},
    ),
    "hf_whisper": Architecture(
        _hf("WhisperForConditionalGeneration", "WhisperConfig", **_WHISPER),
        lambda: {"input_features": torch.randn(2, 8, 24), "decoder_input_ids": torch.randint(3, 40, (2, 6))},
        quick=True,
    ),
    "hf_ast": Architecture(
        _hf(
            "ASTForAudioClassification",
            "ASTConfig",
            **_ENCODER,
            max_length=32,
            num_mel_bins=16,
            patch_size=8,
            num_labels=3,
        ),
        lambda: {"input_values": torch.randn(2, 32, 16)},
    ),
    "hf_vit": Architecture(
        _hf("ViTForImageClassification", "ViTConfig", **_ENCODER, image_size=16, patch_size=4, num_labels=3),
        pixels(16),
    ),
    "hf_detr": Architecture(_detr, pixels(64), quick=True, dead_in_train=_DETR_DEAD, dead_in_eval=_DETR_DEAD),
    "hf_rt_detr": Architecture(
        _rt_detr,
        pixels(64),
        impossible={"merge": "the queries are the best of all places, and rounding breaks ties between them"},
    ),
    "hf_bert": Architecture(_hf("BertForSequenceClassification", "BertConfig", **_TEXT), tokens()),
    "hf_bert_mlm": Architecture(_hf("BertForMaskedLM", "BertConfig", **_TEXT), tokens()),
    "hf_distilbert": Architecture(
        _hf(
            "DistilBertForSequenceClassification",
            "DistilBertConfig",
            dim=32,
            n_layers=2,
            n_heads=2,
            hidden_dim=64,
            vocab_size=40,
            max_position_embeddings=16,
            num_labels=3,
        ),
        tokens(),
    ),
    "hf_gpt2": Architecture(
        _hf("GPT2LMHeadModel", "GPT2Config", n_embd=32, n_layer=2, n_head=2, vocab_size=40, n_positions=16),
        tokens(),
    ),
}
