"""Pretrained speech models: the same names and numbers as torchaudio's, and padding that changes nothing."""

import pytest
import torch
from torchaudio.models import Wav2Vec2Model

import lora_lightning as ll
from lora_lightning.data import pipelines
from lora_lightning.errors import AdapterFileError, ConfigError, MissingFileError
from lora_lightning.models.speech import pretrained_recognizer, spans

SMALL = {
    "extractor_conv_layer_config": [(16, 10, 5), (16, 3, 2), (16, 3, 2)],
    "encoder_embed_dim": 32,
    "encoder_pos_conv_kernel": 8,
    "encoder_pos_conv_groups": 4,
    "encoder_num_layers": 2,
    "encoder_num_heads": 2,
    "encoder_ff_interm_features": 64,
}
VOCABULARY = ["<blank>", " ", "a", "b"]
KINDS = (
    "WAV2VEC2_ASR_BASE_960H", "WAV2VEC2_LARGE_LV60K", "HUBERT_BASE", "HUBERT_LARGE", "WAVLM_BASE",
    "WAVLM_LARGE",
)  # fmt: skip


def small(name, **options):
    return pretrained_recognizer(name, VOCABULARY, pretrained=False, **{**SMALL, **options})


def padded(*waves):
    lengths = torch.tensor([len(w) for w in waves])
    return torch.nn.utils.rnn.pad_sequence(list(waves), batch_first=True), lengths


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("adapted", [False, True])
def test_padding_changes_nothing(name, adapted):
    model = small(name).eval()
    if adapted:
        ll.inject(model, ll.LoRAConfig(rank=2))
        for parameter in ll.lora_parameters(model):
            torch.nn.init.normal_(parameter, std=0.2)
    waves = [torch.randn(n) * scale + 0.1 for n, scale in ((4000, 1.0), (2500, 0.1), (730, 3.0))]
    together, frames = model(*padded(*waves))
    for wave, row, count in zip(waves, together, frames):
        alone, length = model(wave[None], torch.tensor([len(wave)]))
        assert length == count == alone.shape[1]
        assert (row[:count] - alone[0]).abs().max() < 1e-5
    if not adapted:
        base = Wav2Vec2Model(model.feature_extractor, model.encoder, model.aux)
        wave = waves[0][None]
        expected = torch.nn.functional.layer_norm(wave, wave.shape) if model.normalize else wave
        assert torch.allclose(base(expected)[0], together[:1, : frames[0]], atol=1e-5)


def test_torchaudio_itself_is_changed_by_padding():
    """Why there is a forward of our own."""
    model = small("WAV2VEC2_ASR_BASE_960H").eval()
    base = Wav2Vec2Model(model.feature_extractor, model.encoder, model.aux)
    long, short = torch.randn(4000), torch.randn(2500)
    together, frames = base(*padded(long, short))
    assert (together[1, : frames[1]] - base(short[None])[0][0]).abs().max() > 1e-3


def test_names_are_torchaudios_and_the_head_is_found():
    model = small("WAVLM_BASE")
    base = Wav2Vec2Model(model.feature_extractor, model.encoder, model.aux)
    assert model.state_dict().keys() == base.state_dict().keys()
    assert model.get_classifier() is model.aux
    assert not any(p.requires_grad for p in model.feature_extractor.parameters())
    plan = ll.plan(model, ll.LoRAConfig(rank=2))
    assert "trained in full: aux" in str(plan)


def test_the_weight_normed_convolution_adapts_and_merges():
    model = small("HUBERT_BASE").eval()
    batch = padded(torch.randn(4000), torch.randn(2500))
    before = model(*batch)[0]
    report = ll.inject(model, ll.LoRAConfig(rank=2, target_modules=["pos_conv_embed.conv"]))
    assert [layer.name for layer in report.layers] == ["encoder.transformer.pos_conv_embed.conv"]
    for parameter in ll.lora_parameters(model):
        torch.nn.init.normal_(parameter, std=0.3)
    adapted = model(*batch)[0]
    assert (adapted - before).abs().max() > 1e-3
    with ll.adapters_off(model):
        assert torch.equal(model(*batch)[0], before)
    ll.merge(model)
    assert torch.allclose(model(*batch)[0], adapted, atol=1e-5)
    merged = {n: t for n, t in model.state_dict().items() if "lora_" not in n}
    base = small("HUBERT_BASE").eval()
    base.load_state_dict(merged)
    assert torch.allclose(base(*batch)[0], adapted, atol=1e-5)


def test_masks_are_for_training_alone():
    model = small("WAV2VEC2_ASR_BASE_960H", mask_time=0.3, mask_channels=0.3, layer_drop=0.0)
    batch = padded(torch.randn(4000))
    model.eval()
    assert torch.equal(model(*batch)[0], model(*batch)[0])
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for layer in model.encoder.transformer.layers:
        layer.attention.dropout = 0.0
    assert not torch.allclose(model(*batch)[0], model(*batch)[0])


def test_spans_cover_what_they_begin():
    masks = spans(200, 100, 0.05, 10, torch.device("cpu"))
    share = 1 - (1 - 0.05) ** 10
    assert masks[:, 10:].float().mean() == pytest.approx(share, abs=0.02)
    assert not spans(2, 50, 0.0, 10, torch.device("cpu")).any()


def test_weights_from_a_file_and_from_the_cache(tmp_path, monkeypatch):
    from safetensors.torch import save_file

    name = "WAV2VEC2_ASR_BASE_960H"
    own = pipelines.labels(name)
    source = pretrained_recognizer(name, own, pretrained=False, **SMALL)
    state = source.state_dict()
    save_file({k: v.clone() for k, v in state.items()}, tmp_path / "w.safetensors")
    same = pretrained_recognizer(name, own, checkpoint=str(tmp_path / "w.safetensors"), **SMALL)
    assert all(torch.equal(a, b) for a, b in zip(same.state_dict().values(), state.values()))
    other = pretrained_recognizer(name, VOCABULARY, checkpoint=str(tmp_path / "w.safetensors"), **SMALL)
    assert other.aux.out_features == 4 and torch.equal(
        other.encoder.feature_projection.projection.weight,
        source.encoder.feature_projection.projection.weight,
    )
    # As torchaudio's files are: fairseq's symbols at 1, 2, 3 still in the output layer.
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cached = pipelines.pipeline_file(name)
    cached.parent.mkdir(parents=True)
    fairseq = dict(state)
    for key in ("aux.weight", "aux.bias"):
        fairseq[key] = torch.cat([state[key][:1], torch.full_like(state[key][:3], 9.0), state[key][1:]])
    torch.save(fairseq, cached)
    loaded = pretrained_recognizer(name, own, **SMALL)
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), state.values()))
    with pytest.raises(AdapterFileError, match="of another shape: encoder"):
        pretrained_recognizer(name, own, **{**SMALL, "encoder_ff_interm_features": 32})


def test_weights_that_are_not_here(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("lora_lightning.utils.download.PROBE_SECONDS", 0.05)
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: (_ for _ in ()).throw(OSError("offline")))
    with pytest.raises(MissingFileError) as error:
        pretrained_recognizer("WAVLM_LARGE", VOCABULARY)
    for part in ("WAVLM_LARGE", "offline", str(tmp_path), "https://download.pytorch.org", "curl -LO"):
        assert part in str(error.value)


def test_bad_options_at_once():
    with pytest.raises(ConfigError, match=r"Did you mean 'WAVLM_BASE'(?s:.*)layer_drop=2"):
        pretrained_recognizer("WAVLM_BAS", VOCABULARY, layer_drop=2)


def test_dropped_layers_have_no_gradient_alone_and_zeros_among_processes(monkeypatch):
    model = small("HUBERT_BASE", layer_drop=0.999).train()
    batch = padded(torch.randn(4000))
    weights = [layer.attention.q_proj.weight for layer in model.encoder.transformer.layers]
    model(*batch)[0].sum().backward()
    assert all(w.grad is None for w in weights)
    monkeypatch.setattr("lora_lightning.models.speech._distributed", lambda: True)
    model(*batch)[0].sum().backward()
    assert all(w.grad is not None and not w.grad.any() for w in weights)


@pytest.mark.parametrize("name", ["hubert_base", "torchaudio.pipelines.HUBERT_BASE"])
def test_a_pipeline_by_another_spelling(name):
    assert pipelines.pipeline_name(name) == "HUBERT_BASE"
    assert len(small(name).state_dict()) == len(small("HUBERT_BASE").state_dict())
    with pytest.raises(ConfigError, match="name='hubert_bose'"):
        small("hubert_bose")
    with pytest.raises(ConfigError, match=r"name=\['HUBERT_BASE'\]"):
        small(["HUBERT_BASE"])
