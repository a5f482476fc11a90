"""Several adapters in files: saved one by one, loaded under any name, in a Trainer's checkpoint."""

import itertools
import re
from pathlib import Path

import pytest
import torch
from several import OTHERS, alone, two
from small import BATCHES, Classifier, cnn, encoder, loader, trainer, vit

import lora_lightning as ll


@pytest.mark.parametrize("adapter", ["one", "two"])
@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("build", [cnn, encoder])
def test_a_saved_adapter_loads_under_another_name_or_in_place(build, options, adapter, tmp_path):
    """As a new name; over one of the same shapes; over one of another rank; selected or not."""
    model = two(build, **options)
    x = BATCHES[build]()
    ll.save_adapter(model, tmp_path, adapter=adapter)
    ll.set_adapter(model, adapter)
    wanted = model(x)
    selections = itertools.cycle((["one"], ["two", "one"]))
    for name in ("three", "one", "two"):
        for selected in (next(selections),) if adapter == "one" else (["two", "one"],):
            twin = two(build, **options)
            ll.add_adapter(twin, "four", ll.LoRAConfig(rank=4, target_modules="all"))
            ll.set_adapter(twin, *selected)
            before = twin(x)
            ll.load_adapter(twin, tmp_path, adapter=name)
            assert list(twin.lora_state.active) == selected
            if name not in selected:
                assert torch.equal(twin(x), before)
            ll.set_adapter(twin, name)
            torch.testing.assert_close(twin(x), wanted, rtol=1e-6, atol=1e-6)


def test_loading_over_the_same_shapes_compiles_nothing_anew(tmp_path):
    compiled = 0

    def count(graph, inputs):
        nonlocal compiled
        compiled += 1
        return graph.forward

    other = alone(vit, "default", 5, rank=2)
    ll.save_adapter(other, tmp_path)
    model = alone(vit, "default", 6, rank=2)
    fast = torch.compile(model, fullgraph=True, backend=count)
    x = BATCHES[vit]()
    before = fast(x)
    assert compiled == 1
    ll.load_adapter(model, tmp_path, adapter="default")
    assert not torch.equal(fast(x), before)
    torch.testing.assert_close(fast(x), other(x))
    assert compiled == 1
    ll.save_adapter(alone(vit, "default", 7, rank=4), tmp_path)
    with pytest.raises(ll.AdapterFileError, match="rank 2 in the model, 4 in the file"):
        ll.load_adapter(model, tmp_path)
    ll.load_adapter(model, tmp_path, adapter="default")
    torch.testing.assert_close(fast(x), alone(vit, "default", 7, rank=4)(x))
    assert compiled == 2


def test_a_lightning_module_with_two_adapters_saves_the_right_one(tmp_path):
    module = two(lambda: Classifier(vit()), rank=3)
    ll.save_adapter(module, tmp_path, adapter="two")
    torch.manual_seed(0)
    bare = vit().eval()
    ll.load_adapter(bare, tmp_path)
    x = BATCHES[vit]()
    assert not torch.equal(bare(x), module(x))
    ll.set_adapter(module, "two")
    assert torch.equal(bare(x), module(x))


def test_a_trainers_checkpoint_holds_every_adapter(tmp_path):
    """The heads of adapters that are not selected too; other adapters or another selection are refused."""

    def module(*selected: str) -> Classifier:
        model = two(lambda: Classifier(cnn()), **OTHERS["own"])
        ll.set_adapter(model, *selected)
        return model

    def fit(model, path=None):
        callback = ll.LoRACallback(model.lora_state.config, verbose=False)
        run = trainer(tmp_path, callback, max_epochs=1 if path is None else 2, enable_checkpointing=False)
        run.fit(model, loader(), ckpt_path=path)
        run.save_checkpoint(tmp_path / "run.ckpt")

    trained, x = module("two"), BATCHES[cnn]()
    with torch.no_grad():
        for value in trained.lora_state.adapters["one"].values.values():
            value.add_(1)
    fit(trained)
    resumed = module("two")
    fit(resumed, tmp_path / "run.ckpt")
    assert not torch.equal(resumed.eval()(x), trained.eval()(x))
    for model in (trained, resumed):
        ll.set_adapter(model, "one")
    assert torch.equal(resumed.eval()(x), trained.eval()(x))
    single = alone(lambda: Classifier(cnn()), "one", 1, rank=2)
    for other, says in [(module("one"), "select the same"), (single, "select the same")]:
        with pytest.raises((ll.UserError, RuntimeError), match=says):
            fit(other, tmp_path / "run.ckpt")


def test_the_examples_of_the_documentation(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(block, "adapters.md", "exec"), names)
    model = names["model"]
    assert ll.adapter_names(model) == ["scottish", "visitor", "irish", "both", "short", "ties"]
    assert names["y"].shape == (4, 10)
