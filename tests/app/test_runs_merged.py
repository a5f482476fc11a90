"""Trainer checkpoints: they name their base, and become plain weights and pages like adapter folders."""

import pytest
import torch
import yaml
from safetensors.torch import load_file
from small import Classifier, cnn, loader, save_checkpoint, trainer

import lora_lightning as ll
from lora_lightning.app.inspect import inspect
from lora_lightning.app.rebuild import merge_files
from lora_lightning.files.checkpoint_digests import KEY
from lora_lightning.files.locate import read_source


class Other(Classifier):
    """The same network with other pretrained weights."""

    def __init__(self) -> None:
        torch.manual_seed(5)
        super().__init__(cnn())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    module = Classifier()
    fitted = trainer(folder, ll.LoRACallback(rank=2), max_epochs=2, enable_checkpointing=False)
    fitted.fit(module, loader())
    fitted.save_checkpoint(folder / "whole.ckpt")
    fitted.save_checkpoint(folder / "weights.ckpt", weights_only=True)
    return folder, module


@pytest.mark.parametrize("name", ["whole.ckpt", "weights.ckpt"])
def test_a_checkpoint_of_another_base_is_refused_in_both_modes_unless_asked(name, run, tmp_path):
    folder, module = run

    def tested(module, **options):
        again = trainer(tmp_path, ll.LoRACallback(rank=2, **options), enable_checkpointing=False)
        again.test(module, loader(), ckpt_path=folder / name, verbose=False, weights_only=True)
        return module

    tested(Classifier())
    with pytest.raises(ll.AdapterFileError, match=r"another base model: 5 of 13 frozen tensors"):
        tested(Other())
    tested(Other(), check_base=False)
    again = ll.load_from_checkpoint(Classifier, folder / name)
    x = torch.randn(3, 3, 10, 10)
    assert torch.equal(again.eval()(x), module.eval()(x))
    with pytest.raises(ll.AdapterFileError, match="another base model"):
        ll.load_from_checkpoint(Other, folder / name)
    ll.load_from_checkpoint(Other, folder / name, check_base=False)


def test_a_full_checkpoint_brings_its_own_base(tmp_path):
    module = Classifier()
    fitted = trainer(tmp_path, ll.LoRACallback(rank=2, checkpoint="full"), enable_checkpointing=False)
    fitted.fit(module, loader())
    fitted.save_checkpoint(tmp_path / "full.ckpt")
    other = Other()
    again = trainer(tmp_path, ll.LoRACallback(rank=2, checkpoint="full"), enable_checkpointing=False)
    again.test(other, loader(), ckpt_path=tmp_path / "full.ckpt", verbose=False)
    x = torch.randn(3, 3, 10, 10)
    assert torch.equal(other.eval()(x), module.eval()(x))
    merge_files(tmp_path / "full.ckpt", tmp_path / "out.safetensors")
    plain = cnn()
    plain.load_state_dict(load_file(tmp_path / "out.safetensors"))
    assert torch.allclose(plain.eval()(x), module(x), atol=1e-6)


def test_the_entry_is_small_and_the_page_tells_of_the_training(run):
    folder, _ = run
    page = inspect(folder / "weights.ckpt")
    assert (
        "(Trainer checkpoint)" in page and "2 epochs, 8 steps" in page and "Sequential · fingerprint" in page
    )
    checkpoint = torch.load(folder / "weights.ckpt", weights_only=True)
    ll.save_adapter(ll.load_from_checkpoint(Classifier, folder / "weights.ckpt"), folder / "adapter")
    one, two = read_source(folder / "adapter").saved, read_source(folder / "weights.ckpt").saved
    assert one.plan == two.plan and one.config == two.config and one.fingerprint == two.fingerprint
    assert all(torch.equal(t, two.tensors[n]) for n, t in one.tensors.items())
    entry = checkpoint[KEY]
    adapter = entry["adapters"]["default"]
    broken = [{k: v for k, v in entry.items() if k != key} for key in ("fingerprint", "active", "adapters")]
    for key in ("config", "plan", "slots", "extra_trainables"):
        broken.append({**entry, "adapters": {"default": {k: v for k, v in adapter.items() if k != key}}})
    for damaged in broken:
        save_checkpoint({**checkpoint, KEY: damaged}, folder / "broken.ckpt")
        with pytest.raises(ll.AdapterFileError, match="damaged"):
            read_source(folder / "broken.ckpt")
    torch.save({"state_dict": {}}, folder / "broken.ckpt")
    with pytest.raises(ll.AdapterFileError, match="not saved with LoRACallback"):
        read_source(folder / "broken.ckpt")


def test_the_base_is_rebuilt_from_the_run_and_timm_loads_the_merged_file_alone(tmp_path):
    timm = pytest.importorskip("timm")
    from lora_lightning.models.timm import timm_model
    from lora_lightning.tasks.classification import ImageClassifier

    options = {"img_size": 16, "patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3}
    name = "vit_tiny_patch16_224"
    task = ImageClassifier(timm_model(name, checkpoint="vit_digits", num_classes=10, **options), 10)
    ll.inject(task, ll.LoRAConfig(rank=2))
    with torch.no_grad():
        for parameter in ll.lora_parameters(task):
            parameter.add_(0.05 * torch.randn_like(parameter))
        task.model.head.weight.add_(0.1)
    ll.save_adapter(task, tmp_path / "run" / "adapter")
    model = {"_target_": "lora_lightning.models.timm.timm_model", "name": name, "checkpoint": "vit_digits"}
    data = {"_target_": "lora_lightning.data.digits.DigitsDataModule"}
    (tmp_path / "run" / "config.yaml").write_text(
        yaml.safe_dump({"model": {**model, **options}, "data": data})
    )
    (tmp_path / "run" / ".hydra").mkdir()
    hydra = {"hydra": {"runtime": {"choices": {"recipe": "vit_digits"}}}}
    (tmp_path / "run" / ".hydra" / "hydra.yaml").write_text(yaml.safe_dump(hydra))
    merge_files(tmp_path / "run" / "adapter", tmp_path / "merged.safetensors")
    alone = timm.create_model(name, num_classes=10, **options)
    alone.load_state_dict(load_file(tmp_path / "merged.safetensors"))
    x = torch.randn(4, 3, 16, 16)
    assert torch.allclose(alone.eval()(x), task.eval()(x), atol=1e-5)
    assert "recipe vit_digits" in inspect(tmp_path / "merged.safetensors")
    assert "recipe vit_digits" in inspect(tmp_path / "run" / "adapter")
