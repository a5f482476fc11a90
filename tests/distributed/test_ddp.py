"""Several processes train what one does."""

from pathlib import Path

import pytest
import run_ddp
import run_quantized
import torch
from processes import run
from small import Classifier, pretrained, vit

import lora_lightning as ll


def train(folder: Path, processes: int, samples: int, batch: int, accumulate: int = 1, *more) -> list[dict]:
    folder.mkdir()
    if processes == 1:
        run_ddp.train(1, samples, batch, accumulate, folder, *more)
    else:
        run("run_ddp.py", processes, samples, batch, accumulate, folder, *more)
    return [torch.load(folder / f"rank{i}.pt") for i in range(processes)]


def same(ranks: list[dict]) -> bool:
    return all(torch.equal(ranks[0][n], rank[n]) for rank in ranks for n in ranks[0])


def close(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys() and any("lora_B" in n and t.any() for n, t in wanted.items())
    for name, tensor in wanted.items():  # a mean over shares rounds otherwise than over the whole
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def test_two_processes_end_as_one_with_the_same_global_batch(tmp_path):
    """One global batch is the whole data, so that the sampler's order cannot matter."""
    (single,) = train(tmp_path / "one", 1, samples=4, batch=4)
    ranks = train(tmp_path / "two", 2, samples=4, batch=2)
    assert same(ranks)
    close(ranks[0], single)
    checkpoint = torch.load(tmp_path / "two" / "x.ckpt", weights_only=True)
    trained = {n: t for n, t in checkpoint["state_dict"].items() if t.numel()}
    assert trained.keys() == single.keys()
    assert [p.name for p in (tmp_path / "two").glob("**/*.ckpt") if "epoch" not in p.name] == ["x.ckpt"]
    assert list((tmp_path / "two" / "checkpoints").iterdir())
    for rank in range(2):
        torch.manual_seed(0)
        model = Classifier()
        ll.load_adapter(model, tmp_path / "two" / f"adapter{rank}")
        stored = model.state_dict()
        assert all(torch.equal(stored[n], t) for n, t in ranks[0].items())


def test_two_processes_with_quantized_weights_end_as_one(tmp_path):
    """DDP sends every process the parameters of the first, which makes floats of them on the way."""
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    run_quantized.train(1, 4, tmp_path / "one")
    run("run_quantized.py", 2, 2, tmp_path / "two")
    single = torch.load(tmp_path / "one" / "rank0.pt")
    ranks = [torch.load(tmp_path / "two" / f"rank{i}.pt") for i in range(2)]
    assert same(ranks) and torch.equal(ranks[0]["codes"], single["codes"])
    close(ranks[0], single)
    for rank in range(2):  # their bases are still known as the one in floats
        ll.load_adapter(pretrained(vit), tmp_path / "two" / f"adapter{rank}")


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [(1, 2), (2, 1)])
def test_a_checkpoint_goes_on_with_another_number_of_processes(first, second, tmp_path, monkeypatch):
    """Four epochs here and four there end as eight of one process."""
    (wanted,) = train(tmp_path / "straight", 1, samples=4, batch=4)
    monkeypatch.setenv("EPOCHS", "4")
    train(tmp_path / "first", first, 4, 4 // first)
    monkeypatch.setenv("EPOCHS", "8")
    ranks = train(tmp_path / "second", second, 4, 4 // second, 1, tmp_path / "first" / "x.ckpt")
    assert same(ranks)
    close(ranks[0], wanted)


@pytest.mark.slow
def test_three_processes_with_accumulation_exchange_once_a_step(tmp_path):
    (single,) = train(tmp_path / "one", 1, samples=12, batch=12)
    ranks = train(tmp_path / "three", 3, samples=12, batch=2, accumulate=2)
    assert same(ranks)
    close(ranks[0], single)
    for rank in range(3):
        synced, total = map(int, (tmp_path / "three" / f"synced{rank}.txt").read_text().split())
        assert (synced, total) == (8, 16)


@pytest.mark.slow
def test_uneven_shares_and_last_batches(tmp_path):
    """11 samples for two processes in batches of 4: the sampler pads, the last batches have 2."""
    ranks = train(tmp_path / "two", 2, samples=11, batch=4)
    assert same(ranks)


def test_an_unused_layer_stops_every_process_and_is_named(tmp_path):
    said = run("run_unused.py", tmp_path)
    for rank in range(2):
        strict, ddp = (tmp_path / f"rank{rank}.txt").read_text().split("\n---\n")
        assert (
            "UserError: 1 of 4 adapted layers got no gradient in the first 5 training steps: spare." in strict
        )
        assert "not used in producing the loss" in ddp  # DDP's own error, which names nothing
    assert "1 of 4 adapted layers got no gradient in the first 1 training steps: spare." in said
