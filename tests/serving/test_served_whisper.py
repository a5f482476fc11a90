"""Adapters of Whisper: several in one batch over HTTP, as the command transcribes with each."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from desk import client_of
from jsonschema import validate
from served import engine_for, sound, utterances
from small_whisper import small_whisper

import lora_lightning as ll
from lora_lightning.app import cli
from lora_lightning.app.served import kind_of
from lora_lightning.app.trained import Trained
from lora_lightning.errors import UserError
from lora_lightning.models.whisper import whisper
from lora_lightning.serving.described import ANSWERS
from lora_lightning.serving.inputs import Limits

TASK = "lora_lightning.tasks.seq2seq.Seq2SeqRecognizer"


@torch.no_grad()
def save(folder: Path, base: Path, seed: int) -> None:
    """An adapter by which the small Whisper writes something of its own."""
    options = {"checkpoint": str(base), "language": "en", "seconds": 4}
    model = whisper(**options)
    ll.inject(model, ll.LoRAConfig(rank=4, modules_to_save=None))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    config = {
        "model": {"_target_": "lora_lightning.models.whisper.whisper", "name": "small", **options},
        "data": {"_target_": "lora_lightning.data.recordings.RecordingsDataModule"},
        "task": {"_target_": TASK},
        "trainer": {"accelerator": "cpu", "precision": "32-true"},
    }
    facts = {"vocabulary": ["<blank>", " ", "a"], "kept": []}
    ll.save_adapter(model, folder, origin={"recipe": "whisper_manifest", "config": config, "facts": facts})


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("whisper")
    (folder / "base").mkdir()
    small_whisper(folder / "base")
    for seed, name in enumerate(["ada", "bob"]):
        save(folder / "shelf" / name, folder / "base", seed)
    (folder / "a.wav").write_bytes(sound(utterances(6.0, pause=1.0)))
    return folder


def transcribed(shelf: Path, name: str, capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    capsys.readouterr()
    given = [str(shelf / "a.wav"), f"adapter={shelf / 'shelf' / name}", "format=json", "device=cpu"]
    cli.main(["transcribe", *given, *words])
    found = json.loads(capsys.readouterr().out)
    return {name: value for name, value in found.items() if name != "path"}


def test_two_adapters_share_a_batch(shelf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = (shelf / "a.wav").read_bytes()
    alone = {name: transcribed(shelf, name, capsys) for name in ("ada", "bob")}
    assert alone["ada"]["text"] and alone["ada"]["text"] != alone["bob"]["text"]
    assert len(alone["ada"]["segments"]) > 1
    engine = engine_for({"adapters": str(shelf / "shelf"), "max_wait_ms": 500.0}, Limits())
    client, run = client_of(engine), []
    hear = engine.kind.listener.hear
    engine.kind.listener.hear = lambda units: (run.append(len(units)), hear(units))
    with ThreadPoolExecutor(2) as pool:
        paths = [f"/v1/transcribe?adapter={name}" for name in alone]
        answers = list(pool.map(lambda path: client.post(path, content=body).json(), paths))
    for answer, (name, whole) in zip(answers, alone.items(), strict=True):
        assert answer == {"adapter": name, **whole}
        validate(answer, ANSWERS["transcribe"])
    count = len(alone["ada"]["segments"])
    assert max(run) > count and sum(run) >= 2 * count  # together, not adapter by adapter
    assert client.get("/v1/models").json()["data"][0]["kind"] == "transcribe"
    form = {"model": "ada", "response_format": "srt"}
    subtitles = client.post("/v1/audio/transcriptions", files={"file": ("a.wav", body)}, data=form).text
    assert subtitles.startswith("1\n00:00:") and alone["ada"]["segments"][0]["text"] in subtitles
    lines = client.post("/v1/transcribe?adapter=bob&stream=true", content=body).text.splitlines()
    told = [json.loads(line[6:])["segment"] for line in lines if '"segment"' in line[:20]]
    assert told == alone["bob"]["segments"]
    engine.close()


def test_a_loop_in_a_batch_of_several_adapters_is_heard_anew(shelf: Path, monkeypatch) -> None:
    """What is heard anew is the whole batch, so that each row keeps its adapter."""
    monkeypatch.setattr("lora_lightning.models.whisper.LOOP", 0.0)
    engine = engine_for({"adapters": str(shelf / "shelf"), "max_wait_ms": 500.0}, Limits())
    client, body = client_of(engine), (shelf / "a.wav").read_bytes()
    one = client.post("/v1/transcribe?adapter=ada", content=body).json()
    with ThreadPoolExecutor(2) as pool:
        paths = [f"/v1/transcribe?adapter={name}" for name in ("ada", "bob")]
        both = list(pool.map(lambda path: client.post(path, content=body).json(), paths))
    assert both[0] == one and both[1]["text"] != one["text"]
    engine.close()


def test_what_is_of_ctc_recognizers_is_refused(shelf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        transcribed(shelf, "ada", capsys, "beam=8", "chunk=10")
    said = capsys.readouterr().err
    assert "chunk=10.0: is of CTC recognizers" in said and "beam=8: is of CTC" in said


def test_a_transducer_is_refused_before_anything_is_built() -> None:
    target = "lora_lightning.tasks.transducer.TransducerRecognizer"
    with pytest.raises(UserError, match=r"TransducerRecognizer, is not served: give an adapter of .*seq2seq"):
        kind_of(Trained(None, {"task": {"_target_": target}}, True, None))
