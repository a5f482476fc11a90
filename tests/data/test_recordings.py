"""Recordings as batches: the check before training, buckets under a budget, augmentation, resumption."""

import numpy as np
import pytest
import soundfile
import speech_files
import torch
from torch.utils.data import DataLoader

from lora_lightning.data.buckets import Batches, bucketed
from lora_lightning.data.pipelines import labels
from lora_lightning.data.recordings import RecordingsDataModule
from lora_lightning.data.speech import Utterance
from lora_lightning.data.speech_augment import Augmentation, at_speed, with_noise
from lora_lightning.errors import ConfigError, UserError
from lora_lightning.trainer.loader import ResumableLoader

QUIET = {"num_workers": 0}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def module(manifest, **options) -> RecordingsDataModule:
    data = RecordingsDataModule(manifest=str(manifest), **(QUIET | options))
    data.prepare_data()
    data.setup()
    return data


@pytest.fixture
def flawed(tmp_path):
    """A sound manifest with one utterance more for each thing that can be wrong."""
    path = speech_files.manifest(tmp_path)
    folder = tmp_path / "audio"
    soundfile.write(folder / "silent.wav", np.zeros(16_000), 16_000)
    (folder / "broken.flac").write_bytes(b"fLaC" + bytes(99))
    speech_files.write(folder / "short.wav", 0.1)
    speech_files.write(folder / "long.wav", 21.0)
    texts = {
        "silent.wav": "red",
        "broken.flac": "red",
        "absent.wav": "red",
        "short.wav": "a",
        "long.wav": "red",
    }
    texts |= {"s0-0.wav": " ?! ", "s0-1.wav": "room 101", "s0-2.wav": "red " * 20}
    with path.open("a") as file:
        for name, text in texts.items():
            file.write(f"audio/{name},{text},s0,Scottish\n")
    return path


def test_everything_wrong_is_found_in_one_pass(flawed):
    data = RecordingsDataModule(manifest=str(flawed), vocabulary="WAV2VEC2_ASR_BASE_960H")
    with pytest.raises(UserError) as error:
        data.prepare_data()
    text = str(error.value)
    assert "8 of 28 utterances cannot be used" in text and "strict=false" in text
    for line in (
        "unreadable", "silent", "peak -200 dB", "0.10 s, least 0.3 s", "21.0 s, most 20 s", "empty text",
        "'0' 1, '1' 1", "79 characters in 0.8 s",
    ):  # fmt: skip
        assert line in text, line


def test_what_cannot_be_used_is_left_out_and_told_once(flawed, capsys):
    options = {"vocabulary": "WAV2VEC2_ASR_BASE_960H", "strict": False}
    data = module(flawed, **options)
    assert sum(map(len, data.parts.values())) == 20
    module(flawed, **options)
    assert capsys.readouterr().out.count("They are left out") == 1


def test_unchanged_files_are_heard_once(tmp_path, monkeypatch):
    path = speech_files.manifest(tmp_path)
    module(path)
    heard = []
    listen = "lora_lightning.data.speech_check._listen"
    from lora_lightning.data.speech_check import _listen

    monkeypatch.setattr(listen, lambda row: heard.append(row.path) or _listen(row))
    module(path)
    assert not heard
    speech_files.write(tmp_path / "audio" / "s0-0.wav", 0.9)
    module(path)
    assert heard == [str(tmp_path / "audio" / "s0-0.wav")]


def test_batches_hold_what_the_rows_say(tmp_path):
    data = module(speech_files.manifest(tmp_path), batch_seconds=2.0)
    assert data.provides["vocabulary"][:3] == ["<blank>", " ", "a"]
    seen = []
    for batch in data.train_dataloader():
        assert batch.waves.shape == (len(batch.texts), batch.lengths.max())
        assert batch.waves.numel() <= 2.0 * 16_000
        for wave, length in zip(batch.waves, batch.lengths):
            assert wave[:length].any() and not wave[length:].any()
        seen += batch.ids
    assert sorted(seen) == sorted(row.id for row in data.parts["train"])
    assert {s for b in data.test_dataloader() for s in b.speakers}.isdisjoint(
        {row.speaker for row in data.parts["train"]}
    )


def test_the_vocabulary_of_a_pipeline_or_of_the_texts(tmp_path):
    path = speech_files.manifest(tmp_path)
    name = "WAV2VEC2_ASR_BASE_960H"
    assert module(path, vocabulary=name).provides["vocabulary"] == labels(name)
    assert labels(name)[:4] == ["<blank>", " ", "e", "t"] and len(labels(name)) == 29
    assert module(path, vocabulary="HUBERT_BASE").vocabulary == module(path).vocabulary


def test_only_one_accent_and_some_minutes(tmp_path):
    path = speech_files.manifest(tmp_path, speakers=6)
    data = module(path, accent="welsh", train_minutes=2 / 60)
    assert {row.accent for part in data.parts.values() for row in part} == {"Welsh"}
    assert 1 <= sum(data.parts["train"].values()) <= 2


def test_an_interrupted_epoch_goes_on_where_it_stopped(tmp_path):
    options = {
        "batch_seconds": 2.0,
        "augment": {"speed": [0.9, 1.1], "noise_snr": [0, 10], "noise_prob": 1.0},
    }
    path = speech_files.manifest(tmp_path)

    def epoch(skip: int, workers: int = 0):
        loader = module(path, **options, **{"num_workers": workers}).train_dataloader()
        assert isinstance(loader, ResumableLoader)
        loader.sampler.set_epoch(1)
        loader.load_state_dict({"batch": skip})
        return list(loader)

    whole, rest = epoch(0), epoch(2)
    assert len(whole) - 2 == len(rest) > 1
    for first, second in zip(whole[2:], rest):
        assert first.ids == second.ids and torch.equal(first.waves, second.waves)
    assert torch.equal(epoch(2, workers=2)[0].waves, rest[0].waves)


def test_only_training_is_augmented(tmp_path):
    path = speech_files.manifest(tmp_path)
    plain, noisy = (
        module(path),
        module(path, augment={"noise_snr": [0, 0], "noise_prob": 1.0, "gain_db": [3, 3]}),
    )
    for part in ("val", "test"):
        batches = [getattr(data, f"{part}_dataloader")() for data in (plain, noisy)]
        assert all(torch.equal(a.waves, b.waves) for a, b in zip(*batches, strict=True))
    a, b = next(iter(plain.train_dataloader())), next(iter(noisy.train_dataloader()))
    assert a.ids == b.ids and not torch.allclose(a.waves, b.waves, atol=0.01)


def test_no_augmented_utterance_is_longer_than_the_longest_one_allowed(tmp_path):
    """Whisper refuses it in the middle of an epoch; these last 0.6, 0.7, 0.8 and 0.9 s, divided by 0.8."""
    data = module(speech_files.manifest(tmp_path), augment={"speed": [0.8]}, max_seconds=0.9)
    batches = list(data.train_dataloader())
    longest = {int(n) for batch in batches for n in batch.lengths}
    assert longest == {12_000, 14_000, 12_800, 14_400}  # 0.8 and 0.9 s stay as they are


def test_batches_keep_to_their_budget():
    seconds = np.random.default_rng(0).uniform(1, 15, 300).tolist()
    batches = bucketed(seconds, 60.0, seed=3)
    assert sorted(i for batch in batches for i in batch) == list(range(300))
    costs = [len(batch) * max(seconds[i] for i in batch) for batch in batches]
    assert max(costs) <= 60
    assert sum(seconds) / sum(costs) > 0.95  # hardly any padding
    assert bucketed([70.0, 1.0, 1.0], 60.0) == [[0], [1, 2]]
    assert batches == bucketed(seconds, 60.0, seed=3)


def test_speed_changes_length_and_pitch():
    wave = torch.from_numpy(speech_files.tone(1.0, pitch=200)[:, 0])
    fast = at_speed(wave, 1.1)
    assert abs(len(fast) - 16_000 / 1.1) <= 1
    peak = torch.fft.rfft(fast).abs().argmax() * 16_000 / len(fast)
    assert abs(peak - 220) < 2


def test_noise_has_the_ratio_asked_for(tmp_path):
    wave, noise = torch.randn(16_000), torch.rand(16_000)
    added = with_noise(wave, noise, 7.0) - wave
    assert 10 * torch.log10(wave.square().mean() / added.square().mean()) == pytest.approx(7.0, abs=0.01)
    assert not with_noise(torch.zeros(9), noise[:9], 0.0).any()
    speech_files.write(tmp_path / "hum.ogg", 0.3)
    heard = Augmentation(noise_snr=[5, 5], noise_prob=1.0, noise_dir=str(tmp_path))(wave)
    assert heard.shape == wave.shape and not torch.equal(heard, wave)


def test_every_bad_option_at_once():
    with pytest.raises(ConfigError) as error:
        RecordingsDataModule(
            corpus="vctk", split_by="speakers", val_share=0.6, min_seconds=3, max_seconds=2, batch_seconds=0,
            vocabulary="WAV2VEC2_ASR_BASE", strict=1, augment={"speed": [0.1], "gain": 3},
        )  # fmt: skip
    text = str(error.value)
    for part in (
        "root=null: corpus=vctk is nowhere yet: give root=FOLDER",
        "Did you mean 'speaker'", "val_share=0.6", "max_seconds=2",
        "batch_seconds=0", "WAV2VEC2_ASR_BASE_", "strict=1", "augment.gain",
    ):  # fmt: skip
        assert part in text, part


def test_a_loader_without_workers_gives_whole_batches():
    batches = Batches([[0, 1], [2]], [Utterance(torch.ones(i + 1), id=str(i)) for i in range(3)])
    first, second = DataLoader(batches, batch_size=None)
    assert first.ids == ["0", "1"] and second.waves.shape == (1, 3)


def without_speakers(tmp_path, texts=None):
    """The usual manifest of own recordings: path and text alone."""
    path = speech_files.manifest(tmp_path)
    rows = [line.split(",") for line in path.read_text().splitlines()]
    texts = texts or [row[1] for row in rows[1:]]
    lines = [f"{row[0]},{text}" for row, text in zip(rows[1:], texts)]
    path.write_text("\n".join(["path,text", *lines]) + "\n")
    return path


def test_without_speakers_the_texts_are_kept_apart_and_that_is_said(tmp_path, capsys):
    path = without_speakers(tmp_path)
    data = module(path)
    texts = {part: {row.text.lower() for row in rows} for part, rows in data.parts.items()}
    assert all(texts.values())
    assert texts["train"].isdisjoint(texts["val"] | texts["test"]) and texts["val"].isdisjoint(texts["test"])
    said = capsys.readouterr().out
    assert f"data.split_by=speaker: the rows of {path} name no speakers; they are split by text" in said
    assert module(path, split_by="text").parts == data.parts


def test_what_cannot_be_split_is_said_before_a_model_is_built(tmp_path):
    data = RecordingsDataModule(manifest=str(without_speakers(tmp_path, ["red"] * 99)), **QUIET)
    with pytest.raises(ConfigError, match=r"split_by=text: .* 1 different; .* Give split_by=utterance"):
        data.prepare_data()


def test_all_are_test_utterances_where_they_are_evaluated_alone(tmp_path):
    path = speech_files.manifest(tmp_path)
    data = module(path, test_share=1)
    assert set(data.parts["test"]) == set(data.rows) and not data.parts["train"] and not data.parts["val"]
    assert sum(len(batch.ids) for batch in data.test_dataloader()) == len(data.rows)
    with pytest.raises(
        ConfigError, match=r"test_share=0\.7: give a share above 0 and below 0\.5, or 1 for all"
    ):
        module(path, test_share=0.7)
