"""Common Voice, VCTK, L2-ARCTIC, LibriSpeech and CMU ARCTIC as rows, each from its own folder layout."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from lora_lightning.data.manifests import PART_NAMES, Row, read_manifest
from lora_lightning.errors import ConfigError, MissingFileError, did_you_mean

L2_ARCTIC_ACCENTS = {  # first languages, from the corpus's README (Zhao et al. 2018)
    **dict.fromkeys(("ABA", "SKA", "YBAA", "ZHAA"), "Arabic"),
    **dict.fromkeys(("BWC", "LXC", "NCC", "TXHC"), "Mandarin"),
    **dict.fromkeys(("ASI", "RRBI", "SVBI", "TNI"), "Hindi"),
    **dict.fromkeys(("HJK", "HKK", "YDCK", "YKWK"), "Korean"),
    **dict.fromkeys(("EBVS", "ERMS", "MBMPS", "NJS"), "Spanish"),
    **dict.fromkeys(("HQTV", "PNV", "THV", "TLV"), "Vietnamese"),
}
CMU_ARCTIC_ACCENTS = {  # of the seven voices that the corpus's page describes (Kominek and Black 2004)
    **dict.fromkeys(("bdl", "slt", "clb", "rms"), "US"),
    "jmk": "Canadian",
    "awb": "Scottish",
    "ksp": "Indian",
}


class Corpus(NamedTuple):
    """Where a corpus is to be had, what lies in its folder, and how its rows are read."""

    name: str
    source: str
    layout: str
    read: Callable[[Path, Sequence[str]], list[Row]]
    subsets: tuple[str, ...] = ()  # what is read when none is named


def common_voice(root: Path, subsets: Sequence[str]) -> list[Row]:
    """Mozilla Common Voice (Ardila et al. 2020, arXiv 1912.06670): a table for each subset, and `clips`.

    The tables train, dev and test are split by speaker already; `validated` holds all that was approved,
    and is split anew.
    """
    rows = []
    for subset in subsets:
        part = PART_NAMES.get(subset, "")
        for row in read_manifest(root / f"{subset}.tsv"):
            clip = root / "clips" / Path(row.path).name
            rows.append(replace(row, path=str(clip), id=clip.stem, split=part))
    return rows


def vctk(root: Path, subsets: Sequence[str]) -> list[Row]:
    """VCTK 0.92 (Yamagishi et al. 2019), 110 speakers of English, the first microphone; 0.80 as well.

    Utterances without a text (all of p315) are left out.
    """
    accents = _vctk_accents(root / "speaker-info.txt")
    newer = root / "wav48_silence_trimmed"
    pattern = "*/*_mic1.flac" if newer.is_dir() else "*/*.wav"
    rows = []
    for path in sorted((newer if newer.is_dir() else root / "wav48").glob(pattern)):
        name = path.stem.removesuffix("_mic1")
        text = root / "txt" / path.parent.name / f"{name}.txt"
        if text.is_file():
            speaker = path.parent.name
            rows.append(
                Row(str(path), text.read_text("utf-8").strip(), name, accents.get(speaker, ""), speaker)
            )
    return rows


def _vctk_accents(table: Path) -> dict[str, str]:
    """Speaker -> accent: the words in capitals are the columns, the fourth one is ACCENTS."""
    accents = {}
    for line in table.read_text("utf-8").splitlines()[1:] if table.is_file() else []:
        fields = line.split()
        if len(fields) >= 4:
            speaker = fields[0] if fields[0][0].isalpha() else f"p{fields[0]}"
            accents[speaker] = fields[3]
    return accents


def l2_arctic(root: Path, subsets: Sequence[str]) -> list[Row]:
    """L2-ARCTIC 5.0 (Zhao et al. 2018): 24 speakers of six first languages, named as their accents."""
    rows = []
    for path in sorted(root.glob("**/wav/*.wav")):
        folder = path.parents[1]
        text = folder / "transcript" / f"{path.stem}.txt"
        if text.is_file():
            speaker = folder.name
            accent = L2_ARCTIC_ACCENTS.get(speaker, "")
            rows.append(
                Row(str(path), text.read_text("utf-8").strip(), f"{speaker}-{path.stem}", accent, speaker)
            )
    return rows


def librispeech(root: Path, subsets: Sequence[str]) -> list[Row]:
    """LibriSpeech (Panayotov et al. 2015): the subset's name begins with the part that it belongs to."""
    rows = []
    for subset in subsets:
        folder = root / subset if (root / subset).is_dir() else root / "LibriSpeech" / subset
        for table in sorted(folder.glob("*/*/*.trans.txt")):
            for line in table.read_text("utf-8").splitlines():
                name, _, text = line.partition(" ")
                path = table.parent / f"{name}.flac"
                part = PART_NAMES.get(subset.partition("-")[0], "")
                rows.append(Row(str(path), text, name, "", table.parents[1].name, split=part))
    return rows


def cmu_arctic(root: Path, subsets: Sequence[str]) -> list[Row]:
    """CMU ARCTIC (Kominek and Black 2004): a folder `cmu_us_SPEAKER_arctic` for each voice."""
    rows = []
    for table in sorted(root.glob("cmu_us_*_arctic/etc/txt.done.data")):
        folder = table.parents[1]
        speaker = folder.name.split("_")[2]
        for name, text in re.findall(r'\(\s*(\S+)\s+"(.*)"\s*\)', table.read_text("utf-8")):
            path = folder / "wav" / f"{name}.wav"
            accent = CMU_ARCTIC_ACCENTS.get(speaker, "")
            rows.append(Row(str(path), text.replace('\\"', '"'), f"{speaker}-{name}", accent, speaker))
    return rows


CORPORA = {
    "common_voice": Corpus(
        "Common Voice",
        "https://commonvoice.mozilla.org/datasets (one language; unpack it)",
        "clips/ and a table of each subset: train.tsv, dev.tsv, test.tsv, validated.tsv",
        common_voice,
        ("train", "dev", "test"),
    ),
    "vctk": Corpus(
        "VCTK 0.92",
        "https://datashare.ed.ac.uk/handle/10283/3443 (VCTK-Corpus-0.92.zip; unpack it)",
        "wav48_silence_trimmed/, txt/ and speaker-info.txt",
        vctk,
    ),
    "l2_arctic": Corpus(
        "L2-ARCTIC",
        "https://psi.engr.tamu.edu/l2-arctic-corpus (by request; unpack each speaker's archive)",
        "a folder for each speaker, such as ABA/, with wav/ and transcript/",
        l2_arctic,
    ),
    "librispeech": Corpus(
        "LibriSpeech",
        "https://www.openslr.org/12 (train-clean-100, dev-clean and test-clean; unpack them)",
        "train-clean-100/, dev-clean/ and test-clean/",
        librispeech,
        ("train-clean-100", "dev-clean", "test-clean"),
    ),
    "cmu_arctic": Corpus(
        "CMU ARCTIC",
        "http://festvox.org/cmu_arctic (one archive for each voice; unpack them)",
        "a folder for each voice, such as cmu_us_awb_arctic/, with wav/ and etc/",
        cmu_arctic,
    ),
}  # fmt: skip


def read_corpus(corpus: str, root: str | Path, subsets: Sequence[str] | None = None) -> list[Row]:
    """The rows of a corpus that lies unpacked in `root`.

    Args:
        corpus: a key of CORPORA.
        root: its folder.
        subsets: tables of Common Voice, folders of LibriSpeech; None takes the usual ones.

    Raises:
        MissingFileError: it is not there, or not whole: what to download and where to put it.
        ConfigError: there is no such corpus, or it has no subsets to choose from.
    """
    if corpus not in CORPORA:
        raise ConfigError(
            [f"corpus={corpus!r}: give one of {', '.join(CORPORA)}.{did_you_mean(corpus, CORPORA)}"]
        )
    about = CORPORA[corpus]
    if subsets and not about.subsets:
        raise ConfigError([f"subsets={list(subsets)}: {about.name} has none; give subsets=null."])
    folder = Path(root).expanduser().absolute()
    chosen = tuple(subsets or about.subsets)
    try:
        rows = about.read(folder, chosen)
    except MissingFileError:
        rows = []
    if rows:
        return rows
    found = "which is there, without them" if folder.is_dir() else "which does not exist"
    wanted = f"; of the subsets {', '.join(chosen)}" if subsets else ""
    raise MissingFileError(
        f"{about.name} is not on this machine.\n"
        f"  looked for: {about.layout}{wanted}\n"
        f"  in:         {folder}, {found} (data.root=FOLDER sets another)\n"
        f"  to get it:  {about.source}"
    )
