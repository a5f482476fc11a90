"""The recipes of pretrained speech models on small files in the formats of their corpora."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import speech_files
import torch
from safetensors.torch import save_file
from small_whisper import small_whisper

from lora_lightning.app import cli
from lora_lightning.app.application import main
from lora_lightning.data.pipelines import labels
from lora_lightning.models.speech import pretrained_recognizer

ROOT = Path(__file__).parents[2]
SMALL = {
    "extractor_conv_layer_config": [[16, 10, 5], [16, 3, 2], [16, 3, 2]],
    "encoder_embed_dim": 32,
    "encoder_pos_conv_kernel": 8,
    "encoder_pos_conv_groups": 4,
    "encoder_num_layers": 2,
    "encoder_num_heads": 2,
    "encoder_ff_interm_features": 64,
}
QUICK = [
    "trainer=cpu", "trainer.max_epochs=1", "trainer.precision=32-true", "trainer.log_every_n_steps=1",
    "data.num_workers=0", "threads=1", "logger=csv", "hydra.run.dir=run", "lora.rank=2",
]  # fmt: skip
RECIPES = {
    "wav2vec2_commonvoice": (speech_files.common_voice, "WAV2VEC2_ASR_BASE_960H"),
    "hubert_vctk": (speech_files.vctk, "HUBERT_ASR_LARGE"),
    "wavlm_l2arctic": (speech_files.l2_arctic, "WAVLM_BASE_PLUS"),
}


@pytest.fixture(autouse=True)
def _somewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)


def base(name: str) -> list[str]:
    """A small base's weights in a file, and the options that build it."""
    torch.manual_seed(0)
    model = pretrained_recognizer(name, labels(name) or ["-", "a"], pretrained=False, **SMALL)
    save_file({k: v.clone() for k, v in model.state_dict().items()}, "base.safetensors")
    return [
        "model.checkpoint=base.safetensors",
        *(f"+model.{k}={v}".replace(" ", "") for k, v in SMALL.items()),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_corpus_is_trained_on(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write, name = RECIPES[recipe]
    write(tmp_path / "corpus")
    main([f"recipe={recipe}", f"data.root={tmp_path / 'corpus'}", *base(name), *QUICK])
    out = capsys.readouterr().out
    (result,) = json.loads(Path("run/results.json").read_text())
    assert result["method"] == "lora" and set(result["scores"]) == {"wer", "cer"}
    assert "trained in full: model.aux" in out and Path("run/adapter").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["whisper", "transducer"])
def test_other_losses(kind: str, tmp_path: Path) -> None:
    words = [f"data.manifest={speech_files.manifest(tmp_path)}", *QUICK]
    if kind == "whisper":
        (tmp_path / "whisper").mkdir()
        small_whisper(tmp_path / "whisper")
        main(["recipe=whisper_manifest", "model.checkpoint=whisper", "model.language=en", *words])
    else:
        words += [
            "model=transducer",
            "task=transducer",
            "data.vocabulary=null",
            "model.width=16",
            "model.depth=1",
        ]
        main(["recipe=wav2vec2_manifest", *words])
    (result,) = json.loads(Path("run/results.json").read_text())
    assert set(result["scores"]) == {"wer", "cer"} and Path("run/report.html").is_file()


@pytest.mark.slow
def test_two_processes_drop_layers(tmp_path: Path) -> None:
    manifest = speech_files.manifest(tmp_path, speakers=6)
    words = ["recipe=wav2vec2_manifest", f"data.manifest={manifest}", *base("WAV2VEC2_ASR_BASE_960H")]
    words += [*QUICK, "trainer=ddp_sim", "model.layer_drop=0.5", "data.batch_seconds=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *words], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    assert Path("run/adapter").is_dir()


@pytest.mark.slow
def test_my_voice_from_recordings_to_a_transcript(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = speech_files.manifest(tmp_path, speakers=1, each=12)
    main(["recipe=my_voice", f"data.manifest={manifest}", *base("WAV2VEC2_ASR_BASE_960H"), *QUICK])
    manifest.unlink()  # the run remembers its vocabulary
    capsys.readouterr()
    cli.main(["transcribe", "audio", "adapter=run/adapter", "format=json", "device=cpu"])
    found = json.loads(capsys.readouterr().out)
    assert [Path(f["path"]).name for f in found] == sorted(p.name for p in Path("audio").iterdir())
    assert found[0]["seconds"] == 0.6
    cli.main(["merge", "ckpt=run/adapter", "out=merged.safetensors"])
    pretrained_recognizer("WAV2VEC2_ASR_BASE_960H", checkpoint="merged.safetensors", **SMALL)


def test_offline_one_message_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("offline")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    with pytest.raises(SystemExit) as end:
        main(["recipe=wav2vec2_commonvoice", "logger=none", "hydra.run.dir=run"])
    said = capsys.readouterr().err
    assert end.value.code == 2
    for part in (
        "Common Voice is not on this machine", "validated.tsv", "data.root=FOLDER", "commonvoice.mozilla.org",
        "weights of WAV2VEC2_ASR_BASE_960H are not on this machine", "download.pytorch.org", "TORCH_HOME",
    ):  # fmt: skip
        assert part in said, part


@pytest.mark.parametrize("recipe", [*RECIPES, "wav2vec2_manifest", "whisper_manifest", "my_voice"])
def test_options_of_every_recipe_are_checked(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([f"recipe={recipe}", "data.batch_second=3", "lora.rank=0"])
    said = capsys.readouterr().err
    assert "2 problems" in said and "data.batch_seconds" in said


def test_a_manifest_without_speakers_trains_in_full_precision(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The usual case of own recordings: path and text, and Lightning's own word for float32."""
    manifest = speech_files.manifest(tmp_path, each=3)
    rows = [line.split(",")[:2] for line in manifest.read_text().splitlines()]
    manifest.write_text("\n".join(map(",".join, rows)) + "\n")
    (tmp_path / "whisper").mkdir()
    small_whisper(tmp_path / "whisper")
    words = [f"data.manifest={manifest}", "model.checkpoint=whisper", "model.language=en"]
    quick = [word.replace("32-true", "32") for word in QUICK]
    main(["recipe=whisper_manifest", *words, *quick])
    assert "they are split by text instead" in capsys.readouterr().out
    assert Path("run/adapter").is_dir()


def test_an_option_keeps_its_group_where_it_comes_again() -> None:
    from lora_lightning.app.build import under

    problem = "split_by=text: the rows name 1 different. Give split_by=utterance."
    told = "data.split_by=text: the rows name 1 different. Give data.split_by=utterance."
    assert under("data", problem) == told
    assert under("data", "nothing to split_by=x") == "nothing to split_by=x"
