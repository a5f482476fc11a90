"""Whisper from small files in its own formats: padding, loss, texts, adapters, and what is missing."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_whisper import small_whisper
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

import lora_lightning as ll
from lora_lightning.data.speech import Utterance, collate
from lora_lightning.errors import AdapterFileError, ConfigError, MissingFileError
from lora_lightning.models.whisper import Whisper, whisper
from lora_lightning.tasks.seq2seq import Seq2SeqRecognizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_whisper(tmp_path_factory.mktemp("whisper"))


def batch(*texts: str):
    generator = torch.Generator().manual_seed(1)
    waves = [torch.randn(4000 + 3000 * i, generator=generator) for i in range(len(texts))]
    return collate([Utterance(w, t, str(i), "x", "s") for i, (w, t) in enumerate(zip(waves, texts))])


def test_padding_changes_nothing(folder):
    model = whisper(checkpoint=str(folder), language="en").eval()
    both = batch("ab", "cd")
    alone = both.waves[:1, : both.lengths[0]]
    single = model(alone, both.lengths[:1])[0]
    assert (model(both.waves, both.lengths)[0][:1] - single).abs().max() < 1e-5
    losses = [
        model.loss(both.waves[i : i + 1], both.lengths[i : i + 1], [t]) for i, t in enumerate(both.texts)
    ]
    assert torch.allclose(model.loss(both.waves, both.lengths, both.texts), sum(losses) / 2, atol=1e-5)


def test_the_loss_is_that_of_text_and_end_alone(folder):
    model = whisper(checkpoint=str(folder), language="en").eval()
    both = batch("ab", "a cde")
    tokenizer = model.tokenizer
    assert tokenizer.convert_ids_to_tokens(tokenizer.prefix_tokens)[1] == "<|en|>"
    total, count = 0.0, 0
    mels = model.log_mels(both.waves, both.lengths)
    for i, text in enumerate(both.texts):
        tokens = tokenizer(f" {text}", add_special_tokens=False).input_ids
        given = torch.tensor([[*tokenizer.prefix_tokens, *tokens]])
        logits = model.network(input_features=mels[i : i + 1], decoder_input_ids=given).logits[0]
        wanted = torch.tensor([*tokens, tokenizer.eos_token_id])
        total += torch.nn.functional.cross_entropy(logits[-len(wanted) :], wanted, reduction="sum")
        count += len(wanted)
    assert torch.allclose(model.loss(both.waves, both.lengths, both.texts), total / count, atol=1e-5)


def test_a_shorter_window_is_the_network_with_its_first_positions(folder):
    """Against transformers' own network of 500 positions, on the first 1,000 frames of the features."""
    heard = batch("ab", "cd")
    model = whisper(checkpoint=str(folder), language="en", seconds=10).eval()
    state = load_file(folder / "model.safetensors")
    table = "model.encoder.embed_positions.weight"
    config = WhisperConfig.from_pretrained(folder, max_source_positions=500)
    cut = WhisperForConditionalGeneration(config).eval()
    cut.load_state_dict({**state, table: state[table][:500]}, strict=False)
    mels = WhisperFeatureExtractor()([w.numpy() for w in heard.waves], sampling_rate=16_000)
    mels = torch.tensor(mels.input_features)[:, :, :1000]
    assert torch.allclose(model.log_mels(heard.waves, heard.lengths), mels, atol=1e-5)
    encoded, frames = model(heard.waves, heard.lengths)
    assert encoded.shape[1] == 500 and frames.tolist() == [500, 500]
    assert torch.allclose(encoded, cut.model.encoder(mels).last_hidden_state, atol=1e-5)
    assert not torch.allclose(encoded[0, -1], whisper(checkpoint=str(folder)).eval()(*heard[:2])[0][0, 499])
    assert len(model.transcribe(heard.waves, heard.lengths)) == 2


def test_an_adapter_of_a_window_loads_into_another(folder, tmp_path):
    """The base is the same one, whole: its positions are not cut, only not asked for."""
    short, long = (
        Seq2SeqRecognizer(whisper(checkpoint=str(folder), seconds=s), ["<blank>", "a"]) for s in (3, 30)
    )
    assert short.state_dict().keys() == long.state_dict().keys()
    ll.inject(short, ll.LoRAConfig(modules_to_save=None))
    torch.nn.init.ones_(ll.lora_parameters(short)[-1])
    ll.save_adapter(short, tmp_path)
    ll.load_adapter(long, tmp_path)
    both = batch("ab", "cd")
    assert not torch.equal(short.eval().batch_loss(both), long.eval().batch_loss(both))


def test_a_window_longer_than_the_positions_or_shorter_than_the_waves(folder):
    network = whisper(checkpoint=str(folder))
    with pytest.raises(ConfigError, match="this Whisper has positions for 30"):
        Whisper(network.network, network.tokenizer, network.features, seconds=31)
    with pytest.raises(ConfigError, match="seconds=0: give a whole number from 1 to 30"):
        whisper(checkpoint=str(folder), seconds=0)
    model = whisper(checkpoint=str(folder), seconds=2)
    for hears in (model, model.transcribe):
        with pytest.raises(ConfigError, match=r"a recording has 3\.0 s, and this Whisper hears 2 s"):
            hears(torch.zeros(1, 48_000), torch.tensor([48_000]))


@pytest.mark.slow
def test_lora_teaches_a_frozen_network_two_words_and_switches_off(folder):
    task = Seq2SeqRecognizer(whisper(checkpoint=str(folder), language="en"), ["<blank>", " ", "a", "b"])
    times = torch.arange(20 * 16_000) / 16_000
    low, high = (torch.sin(2 * torch.pi * f * times) for f in (300, 3000))
    words = collate([Utterance(low, "ab", "0", "x", "s"), Utterance(high, "ba", "1", "x", "s")])
    before = task.eval().batch_loss(words)
    torch.manual_seed(0)
    ll.inject(task, ll.LoRAConfig(rank=8, target_modules="all", modules_to_save=None))
    optimizer = torch.optim.Adam(ll.lora_parameters(task), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        task.batch_loss(words).backward()
        optimizer.step()
    assert task.predict_and_loss(words)[0] == ["ab", "ba"]
    assert task.batch_loss(words) < 0.1 * before
    with ll.adapters_off(task):
        assert torch.allclose(task.batch_loss(words), before, atol=1e-5)


def test_a_batch_is_heard_and_scored(folder):
    task = Seq2SeqRecognizer(whisper(checkpoint=str(folder)), ["<blank>", "a"]).eval()
    heard, loss = task.predict_and_loss(batch("ab", "cd"))
    assert len(heard) == 2 and loss.isfinite()


def test_what_loops_is_heard_again_without_and_the_rest_stays(folder):
    """A network that answers one letter to a silent wave for ever, and what it heard to others."""
    model, both = whisper(checkpoint=str(folder), language="en").eval(), batch("ab", "cd")
    alone = model.transcribe(both.waves[:1], both.lengths[:1])
    letter = model.tokenizer.encode("a", add_special_tokens=False)[0]

    def push(module, inputs, kwargs, output):
        rows = kwargs["encoder_outputs"].last_hidden_state if "encoder_outputs" in kwargs else None
        at = torch.tensor([bool((row - silent).abs().max() < 1e-4) for row in rows])
        output.logits[at, :, letter] = 1e4
        return output

    waves = torch.cat([both.waves[:1], torch.zeros_like(both.waves[:1])])
    lengths = both.lengths[:1].repeat(2)
    silent = model(waves, lengths)[0][1]
    model.network.register_forward_hook(push, with_kwargs=True)
    texts = model.transcribe(waves, lengths)
    assert texts[0] == alone[0]
    tokens = model.tokenizer.encode(texts[1], add_special_tokens=False)
    triples = list(zip(tokens, tokens[1:], tokens[2:], strict=False))
    assert texts[1].startswith("aa") and len(triples) == len(set(triples))


@pytest.mark.parametrize("whole", [False, True], ids=["bf16-mixed", "bf16-true"])
def test_it_hears_in_half_precision(folder, whole):
    model, both = whisper(checkpoint=str(folder)).eval(), batch("ab", "cd")
    exact = model.log_mels(both.waves, both.lengths)
    loss = model.loss(both.waves, both.lengths, both.texts)
    model = model.bfloat16() if whole else model
    with torch.autocast("cpu", torch.bfloat16, enabled=not whole):
        mels = model.log_mels(both.waves, both.lengths)
        torch.testing.assert_close(
            model.loss(both.waves, both.lengths, both.texts).float(), loss, rtol=0.02, atol=0
        )
        assert len(model.transcribe(both.waves, both.lengths)) == 2
    torch.testing.assert_close(mels, exact.to(mels.dtype))


def test_weights_that_are_not_whole_are_refused(folder, tmp_path, capsys):
    """transformers would fill the gap with random numbers, and tell the terminal."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    state = load_file(folder / "model.safetensors")
    name = "model.encoder.layers.0.fc1.weight"
    for wrong, says in (
        ({}, "1 tensor is missing"),
        ({name: state[name][:5].clone()}, r"\(5, 32\) in the file"),
    ):
        others = {n: t for n, t in state.items() if n != name}
        save_file({**others, **wrong}, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(AdapterFileError, match=rf"does not fit Whisper(?s:.*){says}") as error:
            whisper(checkpoint=str(tmp_path))
        assert name in str(error.value)
    assert capsys.readouterr() == ("", "")


def test_what_is_missing_or_wrong(folder, tmp_path, monkeypatch):
    with pytest.raises(MissingFileError, match=r"has no config.json, model\.safetensors"):
        whisper(checkpoint=str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(MissingFileError) as error:
        whisper("openai/whisper-nano.xx")
    for part in ("openai/whisper-nano.xx", "HF_HUB_OFFLINE", "hf download", "model.checkpoint=whisper"):
        assert part in str(error.value)
    with pytest.raises(ConfigError, match="language='klingon'"):
        whisper(checkpoint=str(folder), language="klingon")
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(AdapterFileError, match="cannot be loaded as Whisper"):
        whisper(checkpoint=str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterFileError, match=r"holds adapter_config\.json: .* not loaded unasked"):
        whisper(checkpoint=str(tmp_path))
    model = whisper(checkpoint=str(folder))
    with pytest.raises(ConfigError, match=r"a recording has 31\.0 s, and this Whisper hears 30 s"):
        model(torch.zeros(1, 31 * 16_000), torch.tensor([31 * 16_000]))
