"""Two processes that start once: they train what one does, sharded or not, and a dead layer stops both."""

from pathlib import Path

import pytest
import run_ddp
import run_quantized
import run_regularized
import torch
from processes import close, run, same
from run_together import PROGRAMS
from small import Classifier, pretrained, vit

import lora_lightning as ll


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the two processes left, one folder a program, and in `said.txt` what they printed."""
    folder = tmp_path_factory.mktemp("together")
    for name in PROGRAMS:
        (folder / name).mkdir()
    (folder / "said.txt").write_text(run("run_together.py", folder))
    return folder


def ranks_in(folder: Path) -> list[dict]:
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def test_two_processes_end_as_one_with_the_same_global_batch(folder, tmp_path):
    """One global batch is the whole data, so that the sampler's order cannot matter."""
    run_ddp.train(1, 4, 4, 1, tmp_path)
    single, ranks, two = torch.load(tmp_path / "rank0.pt"), ranks_in(folder / "ddp"), folder / "ddp"
    assert same(ranks)
    close(ranks[0], single)
    checkpoint = torch.load(two / "x.ckpt", weights_only=True)
    trained = {n: t for n, t in checkpoint["state_dict"].items() if t.numel()}
    assert trained.keys() == single.keys()
    assert [p.name for p in two.glob("**/*.ckpt") if "epoch" not in p.name] == ["x.ckpt"]
    assert list((two / "checkpoints").iterdir())
    for rank in range(2):
        torch.manual_seed(0)
        model = Classifier()
        ll.load_adapter(model, two / f"adapter{rank}")
        stored = model.state_dict()
        assert all(torch.equal(stored[n], t) for n, t in ranks[0].items())


def test_two_processes_with_quantized_weights_end_as_one(folder, tmp_path):
    """DDP sends every process the parameters of the first, which makes floats of them on the way."""
    run_quantized.train(1, 4, tmp_path)
    single, ranks = torch.load(tmp_path / "rank0.pt"), ranks_in(folder / "quantized")
    assert same(ranks) and torch.equal(ranks[0]["codes"], single["codes"])
    close(ranks[0], single)
    for rank in range(2):  # their bases are still known as the one in floats
        ll.load_adapter(pretrained(vit), folder / "quantized" / f"adapter{rank}")


def test_two_processes_with_terms_added_to_the_loss_end_as_one(folder, tmp_path):
    run_regularized.train(1, tmp_path)
    ranks = ranks_in(folder / "regularized")
    assert same(ranks)
    close(ranks[0], torch.load(tmp_path / "rank0.pt"))


def test_two_shards_train_what_the_whole_model_does(folder):
    """Values, frozen weights, the adapter's file and what is refused: asserted in run_sharded.py."""
    assert all((folder / "sharded" / f"rank{rank}.txt").exists() for rank in range(2))


def test_an_unused_layer_stops_every_process_and_is_named(folder):
    for rank in range(2):
        strict, ddp = (folder / "unused" / f"rank{rank}.txt").read_text().split("\n---\n")
        assert (
            "UserError: 1 of 4 adapted layers got no gradient in the first 5 training steps: spare." in strict
        )
        assert "not used in producing the loss" in ddp  # DDP's own error, which names nothing
    said = (folder / "said.txt").read_text()
    assert "1 of 4 adapted layers got no gradient in the first 1 training steps: spare." in said
