"""Models of transformers: what its own saving, loading and resizing do to an adapted model."""

import pytest
import torch

import lora_lightning as ll

transformers = pytest.importorskip("transformers")


def wav2vec2():
    config = transformers.Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=12,
        conv_dim=(16, 16), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
    )  # fmt: skip
    return transformers.Wav2Vec2ForCTC(config).eval()


def test_a_merged_model_with_weight_norm_loads_by_from_pretrained(tmp_path):
    model, x = wav2vec2(), torch.randn(2, 800)
    ll.inject(model, ll.LoRAConfig(rank=2, target_modules="all"))
    for parameter in ll.lora_parameters(model):
        torch.nn.init.normal_(parameter, std=0.1)
    wanted = model(x).logits
    ll.eject(model, merged=True)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert (loaded(x).logits - wanted).norm() <= 1e-5 * wanted.norm()
