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


def gpt2(**options):
    config = transformers.GPT2Config(
        n_embd=16,
        n_layer=1,
        n_head=2,
        vocab_size=20,
        n_positions=16,
        bos_token_id=0,
        eos_token_id=0,
        **options,
    )
    return transformers.GPT2LMHeadModel(config).eval()


def adapted(model, *targets):
    ll.inject(model, ll.LoRAConfig(rank=2, target_modules=[*targets], modules_to_save=None))
    for parameter in ll.lora_parameters(model):
        torch.nn.init.normal_(parameter, std=0.1)
    return model


TOKENS = torch.arange(10)[None]


def test_resizing_embeddings_beside_adapted_layers(tmp_path):
    model = adapted(gpt2(), "c_attn", "c_fc")
    before = model(TOKENS).logits
    model.resize_token_embeddings(25, mean_resizing=False)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert torch.allclose(model(TOKENS).logits[..., :20], before, atol=1e-6)
    ll.save_adapter(model, tmp_path)
    ll.eject(model)
    assert model(TOKENS).logits.shape[-1] == 25


def test_resizing_an_adapted_embedding_is_refused_and_changes_nothing():
    model = adapted(gpt2(), "wte")
    before = model(TOKENS).logits
    with pytest.raises(
        ll.UserError, match=r"wte: num_embeddings of an adapted Embedding is 20, .* 25. Resize"
    ):
        model.resize_token_embeddings(25, mean_resizing=False)
    with pytest.raises(ll.UserError, match=r"wte: weight of an adapted Embedding is \(20, 16\), .*Resize"):
        model.transformer.wte.weight = torch.nn.Parameter(torch.zeros(25, 16))
    assert torch.equal(model(TOKENS).logits, before)


def test_tying_again_ties_the_base_weight():
    model = adapted(gpt2(), "wte", "c_attn")
    before = model(TOKENS).logits
    base = dict(model.named_parameters())["transformer.wte.weight"]
    assert model.get_parameter("transformer.wte.weight") is base
    assert model.transformer.wte.get_parameter("weight") is base
    model.tie_weights()
    assert model.lm_head.weight is base
    assert torch.equal(model(TOKENS).logits, before)


def test_a_resized_head_is_one_message():
    model = gpt2(tie_word_embeddings=False)
    ll.inject(model, ll.LoRAConfig(rank=2, target_modules=["c_attn"], modules_to_save=["lm_head"]))
    model.resize_token_embeddings(25, mean_resizing=False)
    with pytest.raises(ll.UserError, match="lm_head: another module, or a weight of another shape"):
        ll.set_adapter(model, "default")
    ll.eject(model)
    assert model(TOKENS).logits.shape[-1] == 25
