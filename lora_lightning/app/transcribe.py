"""`lora-lightning transcribe`: recordings to text, subtitles or JSON with the time of every word."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_lightning.app.parser import missing_path
from lora_lightning.app.recognizer import recognizer
from lora_lightning.data.audio import SUFFIXES, AudioError, audio_info, read_audio
from lora_lightning.errors import UserError
from lora_lightning.tasks.decoding import BeamDecoder
from lora_lightning.tasks.listening import Listener, Transcription, to_srt
from lora_lightning.tasks.own_texts import TextListener
from lora_lightning.tasks.transcription import Transcriber
from lora_lightning.utils.atomic import write_whole
from lora_lightning.utils.progress import Bar

FORMATS = {"plain": ".txt", "srt": ".srt", "json": ".json"}
OF_CTC = ("chunk", "overlap", "beam", "lm", "lexicon")
AHEAD = 2  # files that are decoded while the model hears another


def transcribe(paths: Sequence[str], options: Mapping[str, Any]) -> None:
    """Print or write what is said in audio files and in those of folders.

    Args:
        paths: files and folders.
        options: of the command `transcribe`, by name.

    Raises:
        UserError: every mistake in one message, before the model is built; or, at the end, the files that
            could not be read, when the others are done.
    """
    files, problems = _files(paths)
    try:
        _device(options)
    except UserError as error:
        problems.append(str(error))
    form = options.get("format", "plain")
    out = Path(options["out"]) if "out" in options else None
    folder = out is not None and (out.is_dir() or len(files) > 1 or not out.suffix)
    if form == "srt" and len(files) > 1 and out is None:
        problems.append("format=srt: there are several files, one each: give out=FOLDER.")
    if problems:
        raise UserError("\n".join(problems))
    heard = _heard(files, options)
    done: list[dict[str, Any]] = []
    failed: list[str] = []
    for path, result in heard:
        if isinstance(result, AudioError):
            failed.append(str(result))
        elif out is not None and folder:
            out.mkdir(parents=True, exist_ok=True)
            _write(out / _name(path, files, FORMATS[form]), _text(path, result, form))
        elif form == "json":
            done.append({"path": str(path), **result.to_dict()})
        else:
            label = f"{path}\t" if len(files) > 1 else ""
            text = label + _text(path, result, form)
            _write(out, text) if out else print(text, flush=True)
    if form == "json" and not folder and done:
        whole = json.dumps(done if len(files) > 1 else done[0], indent=2, ensure_ascii=False)
        _write(out, whole) if out else print(whole, flush=True)
    if failed:
        raise UserError("\n".join(failed))


def _heard(
    files: Sequence[Path], options: Mapping[str, Any]
) -> Iterator[tuple[Path, Transcription | AudioError]]:
    """Each file and its transcription, or why there is none; a bar over the seconds of all."""
    listener = _listener(options)
    seconds = {path: _seconds(path) for path in files}
    errors: dict[Path, AudioError] = {}
    readable: list[Path] = []
    total = sum(seconds.values())
    with Bar("transcribing", total, "seconds of sound") as bar:
        for result in listener.all(_waves(files, errors, readable)):
            path = readable.pop(0)
            bar.advance(seconds[path])
            yield path, result
    yield from errors.items()


def _listener(options: Mapping[str, Any]) -> Listener:
    model, vocabulary = recognizer(
        options.get("adapter"), options.get("recipe"), options.get("check_base", True)
    )
    device = _device(options)
    model = model.to(device).eval()
    batch = {k: options[k] for k in ("batch",) if k in options}
    if vocabulary is None:
        if given := [name for name in OF_CTC if name in options]:
            told = "is of CTC recognizers, and this one writes its texts by itself: leave it out."
            raise UserError("\n".join(f"{name}={options[name]}: {told}" for name in given))
        text_model: Any = model
        return TextListener(text_model, device, **batch)
    decoder = None
    if {"beam", "lm", "lexicon"} & options.keys():
        decoder = BeamDecoder(**{k: options[k] for k in ("beam", "lm", "lexicon") if k in options})
    chunks = {k: options[k] for k in ("chunk", "overlap") if k in options}
    return Transcriber(model, vocabulary, decoder, **chunks, **batch)


def _waves(files: Sequence[Path], errors: dict[Path, AudioError], readable: list[Path]) -> Iterator[Tensor]:
    """The wave of each file that can be read, decoded ahead by threads."""

    def read(path: Path) -> Tensor | AudioError:
        try:
            return read_audio(path)
        except AudioError as error:
            return error

    with ThreadPoolExecutor(AHEAD) as pool:
        waiting = [pool.submit(read, path) for path in files[:AHEAD]]
        for i, path in enumerate(files):
            wave = waiting.pop(0).result()
            if i + AHEAD < len(files):
                waiting.append(pool.submit(read, files[i + AHEAD]))
            if isinstance(wave, AudioError):
                errors[path] = wave
            else:
                readable.append(path)
                yield wave


def _device(options: Mapping[str, Any]) -> torch.device:
    name = options.get("device", "cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
        return device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={name}: {str(error).splitlines()[0]}") from None


def _files(paths: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Files, those of folders among them, and a line for each path that gives none."""
    files: list[Path] = []
    problems = [] if paths else ["give audio files or folders."]
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
            files += inside
            if not inside:
                problems.append(f"{path}: holds no audio ({', '.join(SUFFIXES)}). Give a folder that does.")
        elif path.is_file():
            files.append(path)
        else:
            problems.append(f"{path}: {missing_path(path)}")
    return list(dict.fromkeys(files)), problems


def _seconds(path: Path) -> float:
    try:
        return audio_info(path).seconds
    except AudioError:
        return 0.0  # it is read later, and reported then


def _name(path: Path, files: Sequence[Path], suffix: str) -> Path:
    """Of a file's transcript: below the folder that all files share, so that no two are the same."""
    common = Path(os.path.commonpath([p.absolute().parent for p in files]))
    relative = path.absolute().relative_to(common)
    twins = [p for p in files if p.stem == path.stem and p.parent == path.parent]
    name = f"{relative.name}{suffix}" if len(twins) > 1 else f"{relative.stem}{suffix}"
    return relative.with_name(name)


def _text(path: Path, result: Transcription, form: str) -> str:
    if form == "json":
        return json.dumps({"path": str(path), **result.to_dict()}, indent=2, ensure_ascii=False)
    return to_srt(result) if form == "srt" else result.text


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda temporary: Path(temporary).write_text(text + "\n", encoding="utf-8"))
