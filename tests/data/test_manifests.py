"""Manifests and corpora as rows, the accent filter, and parts that share neither speaker nor sentence."""

from collections import Counter

import pytest
import speech_files

from lora_lightning.data.corpora import read_corpus
from lora_lightning.data.manifests import Row, read_manifest, split_rows, with_accent
from lora_lightning.errors import ConfigError, MissingFileError


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_a_manifest_of_each_format(tmp_path, suffix):
    rows = read_manifest(speech_files.manifest(tmp_path, suffix=suffix))
    assert len(rows) == 20
    assert rows[1].path == str(tmp_path / "audio" / "s0-1.wav")
    assert (rows[1].text, rows[1].speaker, rows[1].accent) == (speech_files.sentence(1), "s0", "Scottish")
    assert len({row.id for row in rows}) == 20


def test_names_of_other_tools(tmp_path):
    nemo = tmp_path / "nemo.json"
    nemo.write_text('{"audio_filepath": "/a/b.wav", "text": "hi", "offset": 1.5, "duration": 2}\n')
    assert read_manifest(nemo) == [Row("/a/b.wav", "hi", "nemo-1", start=1.5, end=3.5)]


def test_lines_end_where_the_format_says(tmp_path):
    (tmp_path / "m.csv").write_text('path,text\na.wav,"one\ntwo"\nb.wav,thr\u2028ee\n')
    assert [row.text for row in read_manifest(tmp_path / "m.csv")] == ["one\ntwo", "thr\u2028ee"]


def test_every_problem_of_a_manifest_at_once(tmp_path):
    rows = [
        {"path": "a.wav", "text": "x", "start": "1", "end": "1", "split": "dev"},
        {"path": "", "text": "x", "start": "", "end": "", "split": ""},
        {"path": "a.wav", "text": "x", "start": "soon", "end": "", "split": ""},
        {"path": "a.wav", "text": "x", "start": "", "end": "", "split": "dew"},
    ]
    with pytest.raises(ConfigError) as error:
        read_manifest(speech_files.table(tmp_path / "m.csv", rows))
    text = str(error.value)
    assert "line 2: end=1 is not after start=1" in text and "line 3: path is empty" in text
    assert "line 4: start='soon' is no number of seconds" in text and "line 5: split='dew'" in text
    with pytest.raises(ConfigError, match="has no column text"):
        read_manifest(speech_files.table(tmp_path / "n.csv", [{"path": "a.wav", "txt": "x"}]))
    with pytest.raises(MissingFileError, match=r"Did you mean 'm\.csv'"):
        read_manifest(tmp_path / "mm.csv")
    with pytest.raises(ConfigError, match=r"ends in \.csv"):
        read_manifest(tmp_path / "m.xlsx")


def test_common_voice(tmp_path):
    root = speech_files.common_voice(tmp_path)
    rows = read_corpus("common_voice", root)
    assert Counter(row.split for row in rows) == {"train": 4, "val": 4, "test": 4}
    assert rows[0].path == str(root / "clips" / "common_voice_en_train0.mp3")
    assert rows[0].text == f'The "{speech_files.sentence(0)}".' and rows[0].accent == "Scottish English"
    assert len(with_accent(rows, ["Midlands"])) == 6  # one of the two that a speaker named
    assert {row.split for row in read_corpus("common_voice", root, ["validated"])} == {""}


def test_vctk(tmp_path):
    rows = read_corpus("vctk", speech_files.vctk(tmp_path))
    assert len(rows) == 12 and all(row.path.endswith("_mic1.flac") for row in rows)
    assert rows[0].id == "p225_001" and rows[0].speaker == "p225" and rows[0].accent == "English"


def test_l2_arctic(tmp_path):
    rows = read_corpus("l2_arctic", speech_files.l2_arctic(tmp_path))
    assert Counter(row.accent for row in rows) == {"Hindi": 40, "Korean": 10}
    assert rows[0].id == "ASI-arctic_a0001" and rows[0].text.endswith(", etc.")


def test_librispeech(tmp_path):
    rows = read_corpus("librispeech", speech_files.librispeech(tmp_path))
    assert Counter(row.split for row in rows) == {"train": 3, "val": 3, "test": 3}
    assert rows[0].path.endswith("train-clean-100/19/198/19-198-0000.flac") and rows[0].speaker == "19"


def test_cmu_arctic(tmp_path):
    rows = read_corpus("cmu_arctic", speech_files.cmu_arctic(tmp_path))
    assert Counter(row.accent for row in rows) == {"Scottish": 10, "US": 20, "Indian": 10}
    assert rows[0].text.endswith(', "so".')


def test_a_corpus_that_is_not_there_says_where_it_is_to_be_had(tmp_path):
    with pytest.raises(MissingFileError) as error:
        read_corpus("l2_arctic", tmp_path)
    for part in ("L2-ARCTIC is not on this machine", str(tmp_path), "psi.engr.tamu.edu", "data.root=FOLDER"):
        assert part in str(error.value)
    with pytest.raises(ConfigError, match="Did you mean 'vctk'"):
        read_corpus("vctc", tmp_path)


def test_an_accent_that_nobody_has(tmp_path):
    rows = read_manifest(speech_files.manifest(tmp_path))
    assert {row.accent for row in with_accent(rows, ["scottish"])} == {"Scottish"}
    with pytest.raises(ConfigError, match=r"Did you mean 'Scottish'\? Accents: Scottish \(12\), Welsh \(8\)"):
        with_accent(rows, ["Scotish"])


def test_parts_share_neither_speaker_nor_text():
    rows = [
        Row(f"{s}{t}.wav", f"Text {t}", f"{s}-{t}", speaker=f"s{s}") for s in range(10) for t in range(20)
    ]
    parts, left_out = split_rows(rows, ("speaker", "text"))
    assert sum(map(len, parts.values())) + left_out == 200
    for field in ("speaker", "text"):
        values = [{getattr(row, field) for row in part} for part in parts.values()]
        assert not (values[0] & values[1] or values[0] & values[2] or values[1] & values[2])
    assert parts == split_rows(rows[::-1], ("speaker", "text"))[0] or {
        part: set(of_part) for part, of_part in parts.items()
    } == {part: set(of_part) for part, of_part in split_rows(rows[::-1], ("speaker", "text"))[0].items()}
    assert set(split_rows(rows, ("speaker",), seed=1)[0]["test"]) != set(
        split_rows(rows, ("speaker",))[0]["test"]
    )


def test_a_text_of_one_part_stays_there():
    rows = [Row("", f"Text {s} {t}", f"{s}-{t}", speaker=f"s{s}") for s in range(10) for t in range(20)]
    assert split_rows(rows, ("speaker", "text"))[1] == 0


def test_shares_are_kept_by_utterance():
    rows = [Row("", "", str(i)) for i in range(200)]
    parts, _ = split_rows(rows, ("utterance",), val=0.1, test=0.2)
    assert [len(parts[part]) for part in ("train", "val", "test")] == [140, 20, 40]


def test_too_few_speakers_are_an_error_with_a_remedy():
    rows = [Row("", f"text {i}", str(i)) for i in range(9)]
    with pytest.raises(ConfigError, match=r"name no speakers; .* Give split_by=text"):
        split_rows(rows, ("speaker",))
