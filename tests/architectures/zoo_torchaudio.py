"""Architectures of torchaudio, small."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .architecture import Architecture, sound

_EXTRACTOR = [(16, 10, 5), (16, 3, 2), (16, 3, 2)]


def _wav2vec2(kind: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import torchaudio

        large = kind == "hubert_large"
        options: dict[str, Any] = {
            "extractor_mode": "layer_norm" if large else "group_norm",
            "extractor_conv_layer_config": _EXTRACTOR,
            "extractor_conv_bias": large,
            "encoder_embed_dim": 32,
            "encoder_projection_dropout": 0.1,
            "encoder_pos_conv_kernel": 8,
            "encoder_pos_conv_groups": 4,
            "encoder_num_layers": 2,
            "encoder_num_heads": 2,
            "encoder_attention_dropout": 0.1,
            "encoder_ff_interm_features": 64,
            "encoder_ff_interm_dropout": 0.1,
            "encoder_dropout": 0.1,
            "encoder_layer_norm_first": large,
            "encoder_layer_drop": 0.0,
            "aux_num_out": 7,
        }
        if kind == "wavlm":
            options.update(encoder_num_buckets=16, encoder_max_distance=20)
            return torchaudio.models.wavlm_model(**options)
        return torchaudio.models.wav2vec2_model(**options)

    return build


def _audio(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import torchaudio

        return getattr(torchaudio.models, name)(**options)

    return build


def frames(size: int, count: int = 12) -> Callable[[], Any]:
    return lambda: (torch.randn(2, count, size), torch.tensor([count, count - 2]))


def _rnnt_batch() -> Any:
    return (
        torch.randn(2, 12, 8),
        torch.tensor([12, 12]),
        torch.randint(0, 9, (2, 5)),
        torch.tensor([5, 4]),
    )


def _tacotron_batch() -> Any:
    return torch.randint(0, 20, (2, 6)), torch.tensor([6, 5]), torch.randn(2, 10, 7), torch.tensor([7, 6])


TORCHAUDIO = {
    "ta_wav2vec2": Architecture(_wav2vec2("wav2vec2"), sound(), quick=True),
    "ta_hubert": Architecture(_wav2vec2("hubert_large"), sound()),
    "ta_wavlm": Architecture(
        _wav2vec2("wavlm"),
        sound(),
        quick=True,
    ),
    "ta_conformer": Architecture(
        _audio(
            "Conformer", input_dim=16, num_heads=2, ffn_dim=32, num_layers=2, depthwise_conv_kernel_size=5
        ),
        frames(16),
        quick=True,
    ),
    "ta_emformer": Architecture(
        _audio(
            "Emformer",
            input_dim=16,
            num_heads=2,
            ffn_dim=32,
            num_layers=2,
            segment_length=4,
            right_context_length=2,
        ),
        frames(16, 14),
    ),
    "ta_deepspeech": Architecture(
        _audio("DeepSpeech", n_feature=8, n_hidden=24, n_class=7), lambda: (torch.randn(2, 1, 12, 8),)
    ),
    "ta_wav2letter": Architecture(
        _audio("Wav2Letter", num_classes=7, input_type="mfcc", num_features=8),
        lambda: (torch.randn(2, 8, 12),),
    ),
    "ta_tacotron2": Architecture(
        _audio(
            "Tacotron2",
            n_mels=10,
            n_symbol=20,
            symbol_embedding_dim=24,
            encoder_embedding_dim=24,
            decoder_rnn_dim=24,
            attention_rnn_dim=24,
            attention_hidden_dim=16,
            prenet_dim=16,
            postnet_embedding_dim=24,
            attention_location_n_filter=8,
            attention_location_kernel_size=7,
        ),
        _tacotron_batch,
        quick=True,
    ),
    "ta_rnnt": Architecture(
        _audio(
            "emformer_rnnt_model",
            input_dim=8,
            encoding_dim=16,
            num_symbols=9,
            segment_length=8,
            right_context_length=4,
            time_reduction_input_dim=8,
            time_reduction_stride=4,
            transformer_num_heads=2,
            transformer_ffn_dim=32,
            transformer_num_layers=2,
            transformer_dropout=0.1,
            transformer_activation="gelu",
            transformer_left_context_length=4,
            transformer_max_memory_size=0,
            symbol_embedding_dim=16,
            transformer_weight_init_scale_strategy="depthwise",
            transformer_tanh_on_mem=True,
            num_lstm_layers=2,
            lstm_layer_norm=True,
            lstm_layer_norm_epsilon=1e-3,
            lstm_dropout=0.1,
        ),
        _rnnt_batch,
    ),
    "ta_conv_tasnet": Architecture(
        _audio(
            "ConvTasNet",
            enc_num_feats=16,
            msk_num_feats=16,
            msk_num_hidden_feats=24,
            msk_num_layers=2,
            msk_num_stacks=2,
        ),
        lambda: (torch.randn(2, 1, 200),),
    ),
}
