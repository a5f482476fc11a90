"""pytorch_lightning, the package with the same classes as lightning.pytorch: its Trainer, our callback."""

import pytest
import pytorch_lightning as twin
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import (
    BackboneFinetuning,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from small import Classifier, cnn, loader

import lora_lightning as ll
from lora_lightning.trainer.checkpoint_io import WholeCheckpointIO


class Owner(twin.LightningModule):
    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.model, self.lr = cnn(), lr
        self.save_hyperparameters()

    def training_step(self, batch, index):
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch, index):
        self.log("val", F.cross_entropy(self.model(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def trainer(folder, *callbacks, **options):
    settings = {"accelerator": "cpu", "max_epochs": 3, "logger": False, "enable_progress_bar": False}
    return twin.Trainer(callbacks=list(callbacks), default_root_dir=folder, **{**settings, **options})


def data():
    return ll.ResumableLoader(loader().dataset, 4, shuffle=True)


AVERAGES = (
    lambda: EMAWeightAveraging(decay=0.9),
    lambda: StochasticWeightAveraging(0.01, swa_epoch_start=1),
)


@pytest.mark.parametrize("average", [None, *AVERAGES], ids=["none", "ema", "swa"])
def test_its_trainer_saves_resumes_and_loads(average, tmp_path):
    def run(path=None):
        module, saver = Owner(), ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        fitting = trainer(
            tmp_path, *([average()] if average else []), ll.LoRACallback(rank=2, dropout=0.1), saver
        )
        fitting.fit(module, data(), loader(), ckpt_path=path)
        assert isinstance(fitting.strategy.checkpoint_io, WholeCheckpointIO)
        return module

    straight = run()
    state = torch.load(tmp_path / "step=5.ckpt", weights_only=True)["state_dict"]
    trained = {n for n, p in straight.named_parameters() if p.requires_grad}
    assert {n for n, t in state.items() if t.numel()} == trained
    assert type(ll.load_from_checkpoint(Owner, tmp_path / "step=5.ckpt")) is Owner
    resumed = run(tmp_path / "step=5.ckpt")
    for (name, one), other in zip(straight.named_parameters(), resumed.parameters()):
        assert torch.equal(one, other), name


def test_what_is_refused_is_refused_there_too(tmp_path):
    class Backbone(Owner):
        @property
        def backbone(self):
            return self.model

    with pytest.raises(ll.ConfigError, match="BackboneFinetuning trains the backbone"):
        trainer(tmp_path, BackboneFinetuning(), ll.LoRACallback(rank=2)).fit(Backbone(), data())

    class Early(Owner):
        def configure_optimizers(self):
            return torch.optim.SGD(self.model[9].parameters(), lr=0.1)

    with pytest.raises(ll.UserError, match="no optimizer holds the LoRA parameters"):
        trainer(tmp_path, ll.LoRACallback(rank=2)).fit(Early(), data())


def test_the_module_and_the_trainer_are_of_one_package(tmp_path):
    """Lightning's own refusal, which names the kinds."""
    with pytest.raises(TypeError, match="must be a `LightningModule`"):
        trainer(tmp_path, ll.LoRACallback(rank=2)).fit(Classifier(), loader())
