"""`lora-lightning compress`, and `compress=` of a run: smaller models, built again from their files."""

import json
from pathlib import Path

import pytest
import torch

import lora_lightning as ll
from lora_lightning.app.cli import main
from lora_lightning.app.rebuild import rebuilt_model
from lora_lightning.app.trained import named
from lora_lightning.files.locate import read_trained

QUICK = [
    "recipe=resnet_digits", "compare=[]", "trainer.max_epochs=1", "+trainer.limit_train_batches=2",
    "trainer.limit_val_batches=1", "+trainer.limit_test_batches=1", "data.batch_size=16",
    "callbacks.preemption=null", "hydra.run.dir=run",
]  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rebuilt(path):
    source = read_trained(path)
    return rebuilt_model(source.config(), source)[0]


@pytest.mark.parametrize("method", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_a_run_on_a_compressed_base_is_built_again(here, method, capsys):
    main(["train", *QUICK, f"method={method}", "compress.parameters=0.4", "compress.batches=1"])
    assert "of 342,562 (" in capsys.readouterr().out
    model = rebuilt("run")
    assert isinstance(model.layer4[0].conv2, torch.nn.Sequential)
    if method == "full":
        state = read_trained("run").weights
        model.load_state_dict(state)
        assert sum(p.numel() for p in model.parameters()) < 0.4 * 342562
        for checkpoint in ({"ckpt": "run/checkpoints/best.ckpt"}, {"ckpt": "run/model.safetensors"}):
            for words in ([], QUICK[:1]):
                found = named(checkpoint, words, []).model()[0]
                assert all(torch.equal(t, state[n]) for n, t in found.state_dict().items())
        whole = rebuilt_model(read_trained("run").config(), None)[0]
        assert torch.equal(ll.load_compressed(whole, "run").fc.weight, state["fc.weight"])
        with pytest.raises(SystemExit):
            main(["extract", "tuned=run", "rank=2", "out=out"])
        assert "was made smaller before it was tuned, and was not kept" in capsys.readouterr().err
    else:
        ll.load_adapter(model, "run/adapter")
        x = torch.randn(2, 3, 16, 16)
        for words in ([], QUICK[:1]):  # as its run says, or a recipe
            found = named({"adapter": "run"}, words, []).model()[0]
            torch.testing.assert_close(found(x), model.eval()(x), rtol=1e-4, atol=1e-4)
        main(["merge", "ckpt=run/adapter", "out=merged.safetensors"])
        rebuilt("merged.safetensors").load_state_dict(read_trained("merged.safetensors").weights)


@pytest.mark.slow
def test_an_adapter_that_is_compared_with_full_fine_tuning_has_its_base(here):
    main(["train", *QUICK, "compare=[lora]", "method=full", "compress.parameters=0.4", "compress.batches=1"])
    kept = torch.nn.Module.state_dict(rebuilt("run/lora/checkpoints/best.ckpt"))
    found = named({"ckpt": "run/lora/checkpoints/best.ckpt"}, [], []).model()[0]
    assert sum(p.numel() for p in found.parameters()) < 0.4 * 342562
    moved = [n for n, t in found.state_dict().items() if not torch.equal(t, kept[n])]
    assert moved and all(n.endswith("weight") or n.startswith("fc.") for n in moved)


def test_a_base_is_compressed_and_loads_again(here, capsys):
    words = ["recipe=resnet_digits", "data.batch_size=16"]
    main(["compress", *words, "parameters=0.5", "batches=1", "out=small"])
    shown = capsys.readouterr().out
    assert "score on the test data" in shown and "parameters: " in shown
    assert sorted(p.name for p in Path("small").iterdir()) == ["compressed.json", "model.safetensors"]
    smaller = rebuilt("small")
    smaller.load_state_dict(read_trained("small").weights)
    again = ll.load_compressed(rebuilt_model(read_trained("small").config(), None)[0], "small")
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(again.eval()(x), smaller.eval()(x))
    description = json.loads(Path("small/compressed.json").read_text())
    assert {e["form"] for e in description["layers"]} <= {"svd", "channel", "spatial", "tucker"}
    with pytest.raises(SystemExit):
        main(["compress", "adapter=small", "parameters=0.5", "out=other"])
    assert "was compressed already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["compress", "recipe=resnet_digits", "out=small"],
            "give one of parameters, flops, latency or energy",
        ),
        (["compress", "recipe=resnet_digits", "out=small", "parameters=0.5", "flops=0.5"], "give one"),
        (["compress", "recipe=resnet_digits", "out=small", "parameters=5"], "parameters=5: give a number"),
        (["compress", "parameters=0.5", "out=small"], "give recipe=NAME, or adapter=FOLDER"),
        (
            ["train", *QUICK, "compress.parameters=5"],
            "compress.parameters=5: give a number above 0 and below 1",
        ),
        (["train", *QUICK, "compress.flops=.5", "compress.energy=.9"], "give one of these"),
        (["train", *QUICK, "compress.latency=2"], "compress.latency=2: give a number above 0 and below 1"),
        (["train", *QUICK, "+compress.nil=1"], "compress.nil"),
    ],
)
def test_mistakes_are_one_message(here, words, says, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert says in capsys.readouterr().err
    assert not Path("small").exists()
