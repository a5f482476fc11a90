"""The base is digested once a run, however often it saves, and every checkpoint tells the truth of it."""

import copy
import pickle

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from small import Classifier, loader, trainer
from torch import nn

import lora_lightning as ll
from lora_lightning.files import frozen_base as frozen
from lora_lightning.files.checkpoint_digests import KEY
from lora_lightning.files.fingerprint import fingerprint_of
from lora_lightning.utils.torch_file import read_torch

WEIGHT = "model.3.weight"


class Saves(pl.Callback):
    """Saves after every step, and notes what the base was then; may do something to it before the third."""

    def __init__(self, folder, change=None):
        self.folder, self.change, self.truth = folder, change, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.change and len(self.truth) == 2:
            self.change(pl_module)
        trainer.save_checkpoint(self.folder / f"{len(self.truth)}.ckpt")
        self.truth.append(fingerprint_of(pl_module))

    def stored(self):
        return [read_torch(self.folder / f"{i}.ckpt", "")[KEY]["fingerprint"] for i in range(len(self.truth))]


@pytest.fixture
def looks(monkeypatch):
    """How many tensors were digested, each time that a base was looked at."""
    counts, real = [], frozen.digests

    def digests(tensors):
        counts.append(len(tensors))
        return real(tensors)

    monkeypatch.setattr(frozen, "digests", digests)
    return counts


def fit(folder, module, *callbacks, path=None, **options):
    run = trainer(folder, ll.LoRACallback(rank=2, verbose=False), *callbacks, max_epochs=1, **options)
    run.fit(module, loader(), ckpt_path=path, weights_only=True)
    return run


@pytest.mark.parametrize("beside", [[], [EMAWeightAveraging(decay=0.9)]], ids=["alone", "averaged"])
def test_a_run_that_saves_at_every_step_digests_it_once(beside, looks, tmp_path):
    saves = Saves(tmp_path)
    fit(tmp_path, Classifier(), saves, *copy.deepcopy(beside))
    assert len(saves.truth) == 4 and saves.stored() == saves.truth
    assert len(looks) == 1 and looks[0] >= 10


def test_a_resumed_run_has_digested_it_when_it_was_compared(looks, tmp_path):
    fit(tmp_path, Classifier(), ModelCheckpoint(tmp_path, "x"))
    looks.clear()
    saves = Saves(tmp_path)
    run = trainer(tmp_path, ll.LoRACallback(rank=2, verbose=False), saves, max_epochs=2)
    run.fit(Classifier(), loader(), ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    assert saves.truth and saves.stored() == saves.truth
    assert len(looks) == 1


def doubled(layer):
    return {n: 2 * t for n, t in layer.state_dict().items()}


def assigned(module):
    module.model[3].weight = nn.Parameter(module.model[3].weight * 2, requires_grad=False)


CHANGES = {
    "loaded": lambda m: m.model.load_state_dict({"3.weight": torch.ones(12, 8, 3, 3)}, strict=False),
    "loaded into one layer": lambda m: m.model[1].load_state_dict(doubled(m.model[1])),
    "written": lambda m: torch.no_grad()(m.model[3].bias.add_)(1),
    "another": assigned,
    "other memory": lambda m: setattr(m.model[3].bias, "data", m.model[3].bias * 2),
    "statistics": lambda m: m.model[4].running_mean.add_(1),
    "trains now": lambda m: m.model[0].weight.requires_grad_(True),
    "another adapter": lambda m: (
        ll.add_adapter(m, "other", ll.LoRAConfig(rank=1, modules_to_save=["3"], target_modules=["6"])),
        ll.set_adapter(m, "other"),
    ),
    "merged": ll.merge,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_base_that_changes_within_a_run_is_digested_anew(change, looks, tmp_path):
    saves = Saves(tmp_path, CHANGES[change])
    fit(tmp_path, Classifier(), saves)
    assert saves.stored() == saves.truth
    assert (saves.truth[2] != saves.truth[1]) is (change != "merged")
    assert len(looks) >= 2


def test_a_base_that_was_changed_between_two_fits_is_digested_anew(looks, tmp_path):
    """Also by way of `.data`, which torch does not count."""
    module = Classifier()
    first, second = Saves(tmp_path / "one"), Saves(tmp_path / "two")
    fit(tmp_path, module, first)
    module.model[3].base_weight("weight").data.mul_(2)
    fit(tmp_path, module, second)
    assert first.stored() == first.truth and second.stored() == second.truth
    assert [n for n, d in second.truth[0].items() if d != first.truth[0][n]] == [WEIGHT]
    assert len(looks) == 2


def test_a_copy_of_the_module_looks_for_itself(looks, tmp_path):
    module = Classifier()
    run = fit(tmp_path, module, Saves(tmp_path))
    run.save_checkpoint(tmp_path / "x.ckpt")
    known = module.on_save_checkpoint.args[-1]
    for copied in (copy.deepcopy(known), pickle.loads(pickle.dumps(known))):
        assert copied.model is not module and copied.now() == known.now()
        with torch.no_grad():
            copied.model.model[3].base_weight("weight").add_(1)
        assert copied.now() != known.now()
