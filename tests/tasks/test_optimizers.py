"""Every optimizer by its name: the library's own class and options, and a run that goes on exactly."""

from importlib.util import find_spec

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from small import adapted, loader, mlp, pretrained, trainer, vit
from torch import nn

import lora_lightning as ll
from lora_lightning.errors import ConfigError
from lora_lightning.tasks import optimizers
from lora_lightning.tasks.classification import ImageClassifier
from lora_lightning.tasks.optim import optimizer_of
from lora_lightning.tasks.optim_config import OptimConfig
from lora_lightning.tasks.optimizers import KINDS, class_of

EIGHT_BITS = find_spec("bitsandbytes") is not None
NAMES = [
    pytest.param(name, marks=[] if kind.library != "bitsandbytes" or EIGHT_BITS else pytest.mark.xfail(
        reason="bitsandbytes is not installed", raises=ConfigError, strict=True))
    for name, kind in KINDS.items()
]  # fmt: skip


def steps_of(optimizer, parameters, steps=3):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_librarys_class_with_its_own_options(name):
    """What ours does is what the class by itself does."""
    config = OptimConfig(name=name, lr=1e-2, weight_decay=0.1, schedule={"name": "constant", "warmup": 0})
    ours, theirs = ([nn.Parameter(pretrained(mlp)[0].weight.detach().clone())] for _ in range(2))
    module = adapted(mlp)
    optimizer, _ = optimizer_of(
        [{"name": "a", "params": ours, "weight_decay": 0.1}], config, 10, module=module
    )
    assert type(optimizer) is class_of(name)
    assert f"{type(optimizer).__name__}" == KINDS[name].target.rpartition(".")[2]
    steps_of(optimizer, ours)
    own = {**KINDS[name].given, **({"module": module} if KINDS[name].for_updates else {})}
    plain = class_of(name)(theirs, lr=1e-2, weight_decay=0.1, **own)
    steps_of(plain, theirs)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=1e-7)
    assert not torch.equal(ours[0], pretrained(mlp)[0].weight)


def classifier(**options):
    torch.manual_seed(3)
    model = vit()
    model.num_classes = 3
    return ImageClassifier(model, 3, optim={"lr": 1e-2, "weight_decay": 0.05, **options})


QUICK = ("adamw", "sgd", "muon", "adamw8bit", "scaled_adamw")


@pytest.mark.parametrize(
    "name",
    [
        p if p.values[0] in QUICK else pytest.param(*p.values, marks=[*p.marks, pytest.mark.slow])
        for p in NAMES
    ],
)
def test_a_run_that_goes_on_ends_the_same(name, tmp_path):
    """Over a restart, at which the optimizer forgets the updates and the rate climbs again."""

    def fit(folder, path=None):
        module = classifier(name=name)
        save = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=3)
        run = trainer(folder, ll.LoRACallback(rank=2, restarts=1, verbose=False), save, max_epochs=2)
        data = ll.ResumableLoader(loader(vit, size=8).dataset, 2)
        run.fit(module, data, ckpt_path=path, weights_only=True)
        return module.state_dict()

    wanted = fit(tmp_path / "straight")
    found = fit(tmp_path / "resumed", tmp_path / "straight" / "step=3.ckpt")
    assert all(torch.equal(wanted[n], found[n]) for n in wanted)
    start = classifier(name=name)
    before = dict(start.named_parameters())
    assert any(not torch.equal(wanted[n], before[n]) for n in wanted if n in before)


def test_eight_bits_are_kept_where_it_pays():
    if not EIGHT_BITS:
        pytest.skip("bitsandbytes is not installed")
    large, small = nn.Parameter(torch.randn(64, 64)), nn.Parameter(torch.randn(8, 64))
    optimizer, _ = optimizer_of([{"params": [large, small]}], OptimConfig(name="adamw8bit"), 10)
    steps_of(optimizer, [large, small])
    assert optimizer.state[large]["state1"].dtype == torch.uint8
    assert optimizer.state[small]["state1"].dtype == torch.float32


def test_options_go_to_the_class_and_others_are_refused():
    parameters = [nn.Parameter(torch.zeros(2, 2))]
    config = OptimConfig(name="sgd", momentum=0.8, nesterov=True)
    optimizer, _ = optimizer_of([{"params": parameters}], config, 10)
    (group,) = optimizer.param_groups
    assert (group["momentum"], group["nesterov"]) == (0.8, True)
    default, _ = optimizer_of([{"params": parameters}], OptimConfig(name="sgd"), 10)
    assert default.param_groups[0]["momentum"] == 0.9
    adam, _ = optimizer_of([{"params": parameters}], OptimConfig(betas=[0.8, 0.9], eps=1e-6), 10)
    assert (adam.param_groups[0]["betas"], adam.param_groups[0]["eps"]) == ((0.8, 0.9), 1e-6)
    with pytest.raises(ConfigError, match=r"momentum=0\.9: adamw has no momentum: leave it out"):
        OptimConfig(momentum=0.9)
    with pytest.raises(ConfigError, match="give momentum above 0"):
        OptimConfig(name="sgd", momentum=0, nesterov=True)
    with pytest.raises(ConfigError, match=r"Did you mean .*'adamw8bit'"):
        OptimConfig(name="adam8bit")
    (problem,) = OptimConfig.problems({"name": "lion", "eps": 1e-3}, "optim.")
    assert problem.startswith("optim.eps=0.001: lion has no eps")


def test_a_missing_library_is_one_message_before_anything_is_built(monkeypatch):
    monkeypatch.setattr(optimizers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        OptimConfig(name="adamw8bit")
    assert caught.value.problems == [
        "name='adamw8bit': needs bitsandbytes, which is not installed: pip install 'lora-lightning[nf4]'"
    ]


def test_muon_takes_the_head_for_none_of_its_matrices():
    optimizer, _ = optimizer_of(ll.param_groups(vit()), OptimConfig(name="muon"), 10)
    assert {g["name"]: g["use_fallback"] for g in optimizer.param_groups} == {
        "backbone": False, "backbone_no_decay": False, "head": True, "head_no_decay": True,
    }  # fmt: skip


def test_a_fit_without_an_end_needs_a_constant_rate(tmp_path):
    stop = pl.callbacks.EarlyStopping("train/loss", patience=0, check_on_train_epoch_end=True, mode="max")
    options = {"max_epochs": -1, "limit_train_batches": 2}
    with pytest.raises(ConfigError, match=r"schedule=constant schedule\.warmup=0"):
        trainer(tmp_path, stop, **options).fit(classifier(), loader(vit))
    stop.patience, stop.wait_count = 1, 0
    trainer(tmp_path, stop, **options).fit(
        classifier(schedule={"name": "constant", "warmup": 0}), loader(vit)
    )
