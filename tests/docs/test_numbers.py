"""Numbers that pages show are those of benchmarks/results/, and the README's are those of the pages."""

import json
import re
from statistics import mean, stdev

import pytest
from pages import DOCS, ROOT, text_of

from benchmarks.compression_chain import cells_of_seeds
from benchmarks.compression_pictures import table as pictures_table
from benchmarks.compression_voices import cells_of_bits, cells_of_voices
from benchmarks.exported import page_of_int8
from benchmarks.serving.tables import page_rows

RESULTS = ROOT / "benchmarks" / "results"
NUMBER = re.compile(r"\d[\d,]*\.\d+|\d{1,3}(?:,\d{3})+")
SPEED = {"ViT-S/16": "vit_small", "ResNet-50": "resnet50", "wav2vec 2.0 base": "wav2vec2_base"}


def row(name, path=DOCS / "results.md"):
    """The cells of the first table row that begins so."""
    line = next(
        line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith(f"| {name}")
    )
    return [cell.strip() for cell in line.strip("| ").split("|")][1:]


def result(name):
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def test_the_readme_shows_no_number_that_no_page_has():
    pages = " ".join(path.read_text(encoding="utf-8") for path in DOCS.glob("*.md"))
    known = {*NUMBER.findall(pages)}
    assert not {*NUMBER.findall(text_of(ROOT / "README.md"))} - known


@pytest.mark.parametrize(("name", "model"), [("ViT, ", "vit"), ("ResNet, ", "resnet")])
def test_digits(name, model):
    found = result(f"tune_digits_{model}")
    scores = {method: chosen["test_acc"] for method, chosen in found["chosen"].items()}
    shown = [
        f"{mean(scores[m]):.1f} ± {stdev(scores[m]):.1f}" if m in scores else ""
        for m in ("probe", "lora", "peft", "full")
    ]
    assert row(name) == [f"{found['before_test_acc']:.1f}", *shown]


@pytest.mark.parametrize("name", SPEED)
def test_steps(name):
    ways = result(f"training_{SPEED[name]}_1t")["ways"]
    shown = [f"{ways[w]['ratio']:.2f}; {ways[w]['saved_mib']:.0f} MiB" for w in ("ours", "peft", "full")]
    assert row(name) == shown


def test_adapted_compressed_quantized():
    shown = (DOCS / "compression.md").read_text(encoding="utf-8").splitlines()
    for one in result("compression_chain")["rows"]:
        cells = [one["way"], f"{one['score']:.1f}", f"{one['bytes'] / 1e6:.2f}"]
        cells += [f"{one['int8']:.1f}", f"{one['int8_bytes'] / 1e6:.2f}"]
        assert f"| {' | '.join(cells)} |" in shown
    for row_of_seeds in cells_of_seeds(result("compression_chain")["seeds"]):
        assert f"| {' | '.join(row_of_seeds)} |" in shown


def test_a_real_network_compressed():
    shown = (DOCS / "compression.md").read_text(encoding="utf-8").splitlines()
    assert {*pictures_table(result("compression_pictures")["rows"]).splitlines()} <= {*shown}


def test_int8_files_of_compressed_lstms():
    shown = (DOCS / "compression.md").read_text(encoding="utf-8").splitlines()
    rows = result("compression_recurrent")["int8"]
    for name in rows[0]["faster"]:
        label, size = "1, torch" if name == "torch" else name, rows[0]["megabytes"].get(name)
        cells = [label, f"{size:.1f}" if size else "", *(f"{one['faster'][name]:.2f}" for one in rows)]
        assert f"| {' | '.join(cells)} |" in shown


def test_a_real_recurrent_network_distilled():
    text = (DOCS / "compression.md").read_text(encoding="utf-8")
    (found,) = result("compression_recurrent")["voices"]
    for cells in (*cells_of_voices(found)[1], *cells_of_bits(found)[1]):
        assert f"| {' | '.join(cells)} |" in text.splitlines()
    told = [f"{found['steps']} steps", f"{found['share']:.2f} of its parameters", f"rank {found['rank']}"]
    told += [f"{found[f'faster at {batch}']:.2f}" for batch in (1, 16)]
    assert not [one for one in told if one not in text]


def test_int8_of_programs_and_compiled_files():
    shown = (DOCS / "export.md").read_text(encoding="utf-8").splitlines()
    rows = page_of_int8(result("exported"))
    assert len(rows) > 6 and not {*rows} - {*shown}


def test_serving():
    lines = (RESULTS / "serving.jsonl").read_text(encoding="utf-8").splitlines()
    shown = (DOCS / "serving.md").read_text(encoding="utf-8").splitlines()
    rows = page_rows([json.loads(line) for line in lines])
    assert rows and not {*rows} - {*shown}


def test_compression():
    named = {
        "resnet_digits": "ResNet, digits: accuracy",
        "conformer_us": "Conformer, US English: word error rate",
    }
    shown = (DOCS / "compression.md").read_text(encoding="utf-8").splitlines()
    for one in result("compression")["rows"]:
        cells = [named[one["model"]], f"{one['parameters']:.2f}", f"{one.get('flops', 1):.2f}"]
        cells += [f"{one['score']:.1f}", f"{one['plain']:.1f}" if "plain" in one else ""]
        assert f"| {' | '.join(cells)} |" in shown
    named = {"vgg16_classifier": "VGG-16, classifier", "resnet50": "ResNet-50"}
    for one in result("compression")["speeds"]:
        assert f"| {named[one['model']]} | {one['parameters']:.2f} | {one['faster']:.2f} |" in shown
