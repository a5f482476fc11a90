"""EMA of what trains: against a hand loop, in checkpoints and validation, and in runs that go on."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from small import Classifier, loader, trainer
from torch.utils.data import DataLoader

import lora_lightning as ll
from lora_lightning.trainer.ema import KEY, averaged_tensors


class Watches(pl.Callback):
    """What the weights are behind each step, and in validation."""

    def __init__(self) -> None:
        self.steps, self.validated = [], []

    def on_train_batch_end(self, trainer, module, *args) -> None:
        self.steps.append({n: t.detach().clone() for n, t in averaged_tensors(module).items()})

    def on_validation_batch_end(self, trainer, module, *args) -> None:
        self.validated.append({n: t.detach().clone() for n, t in averaged_tensors(module).items()})


def data():
    return ll.ResumableLoader(loader().dataset, 4, shuffle=True, seed=1)


def fit(folder, *callbacks, path=None, lora=True, **options):
    torch.manual_seed(0)
    module = Classifier()
    first = [ll.LoRACallback(rank=2, verbose=False, train_norm="both") if lora else ll.ExactResume()]
    run = trainer(folder, *callbacks, *first, **options)
    run.fit(module, data(), DataLoader(loader().dataset, 16), ckpt_path=path, weights_only=True)
    return module


def by_hand(steps, start, decay):
    average = {n: t.clone() for n, t in start.items()}
    averages = []
    for n, step in enumerate(steps, 1):
        keep = min(decay, (1 + n) / (10 + n))
        average = {name: keep * average[name] + (1 - keep) * t for name, t in step.items()}
        averages.append(average)
    return averages


class Start(pl.Callback):
    def on_train_start(self, trainer, module) -> None:
        self.start = {n: t.detach().clone() for n, t in averaged_tensors(module).items()}


def close(one, other):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name].to(other[name].dtype), other[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("lora", [True, False])
def test_it_is_the_hand_loops_average(lora, tmp_path):
    begin, watch = Start(), Watches()
    save = ModelCheckpoint(
        tmp_path, "{step}", save_top_k=-1, save_on_train_epoch_end=False, monitor="val/loss"
    )
    module = fit(tmp_path, begin, ll.EMA(decay=0.3), watch, save, lora=lora, num_sanity_val_steps=0)
    wanted = by_hand(watch.steps, begin.start, 0.3)
    assert len(watch.steps) == 8
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    assert averaged_tensors(module).keys() > trained.keys()  # the running statistics of norms that move
    close({n: t.detach() for n, t in averaged_tensors(module).items()}, wanted[-1])
    close(watch.validated[0], wanted[3])
    close(watch.validated[1], wanted[7])
    stored = torch.load(tmp_path / "step=4.ckpt", weights_only=True)
    close({n: stored["state_dict"][n] for n in wanted[3]}, wanted[3])
    close(stored[KEY]["current"], watch.steps[3])
    assert len(stored[KEY]["averages"]) == len(wanted[3])  # nothing that is frozen


def test_what_is_saved_loads_as_the_average(tmp_path):
    module = fit(tmp_path, ll.EMA(decay=0.5))
    wanted = {n: t.detach().clone() for n, t in averaged_tensors(module).items()}
    ll.save_adapter(module, tmp_path / "adapter")
    other = Classifier()
    ll.load_adapter(other, tmp_path / "adapter")
    parameters = dict(other.named_parameters())
    close(
        {n: parameters[n].detach() for n in wanted if n in parameters},
        {n: t for n, t in wanted.items() if n in parameters},
    )


SAVERS = {
    "steps": {"every_n_train_steps": 1},
    "epochs": {"save_on_train_epoch_end": True},
    "validation": {"save_on_train_epoch_end": False},
}


@pytest.mark.parametrize("saver", SAVERS)
@pytest.mark.parametrize("first", [True, False])
def test_a_run_that_goes_on_ends_the_same(saver, first, tmp_path):
    def run(folder, path=None):
        save = ModelCheckpoint(folder, "{step}", save_top_k=-1, **SAVERS[saver])
        module = fit(folder, ll.EMA(decay=0.5), save, path=path, val_check_interval=2)
        return module.state_dict(), sorted(folder.glob("*.ckpt"))

    wanted, files = run(tmp_path / "straight")
    found, _ = run(tmp_path / "resumed", files[0] if first else files[-1])
    assert all(torch.equal(wanted[n], found[n]) for n in wanted)


@pytest.mark.parametrize("hook", ["on_validation_batch_end", "on_train_batch_end"])
def test_a_checkpoint_written_before_its_turn_is_taken_up(hook, tmp_path):
    """Within a validation, and by a callback that stands before it, as on SIGTERM."""

    def saves(self, trainer, module, *args) -> None:
        if not trainer.sanity_checking and trainer.current_epoch == 0 and args[-1] in (0, 2):
            trainer.save_checkpoint(tmp_path / "within.ckpt")

    saving = type("Saves", (pl.Callback,), {hook: saves})
    wanted = fit(tmp_path, saving(), ll.EMA(decay=0.5)).state_dict()
    found = fit(tmp_path, ll.EMA(decay=0.5), path=tmp_path / "within.ckpt").state_dict()
    assert all(torch.equal(wanted[n], found[n]) for n in wanted)


def test_small_steps_are_not_lost_in_half_precision(tmp_path):
    begin, watch = Start(), Watches()
    module = fit(tmp_path, begin, ll.EMA(decay=0.9), watch, precision="bf16-true", lora=False)
    average = {n: t.float() for n, t in begin.start.items()}
    for n, step in enumerate(watch.steps, 1):
        keep = min(0.9, (1 + n) / (10 + n))
        average = {m: keep * average[m] + (1 - keep) * t.float() for m, t in step.items()}
    for name, tensor in averaged_tensors(module).items():
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor.detach().float(), average[name], rtol=5e-3, atol=1e-5)


def test_what_it_cannot_do_is_refused(tmp_path):
    save = ModelCheckpoint(tmp_path, save_weights_only=True)
    with pytest.raises(ll.ConfigError, match="save_weights_only=True: such a checkpoint would hold"):
        fit(tmp_path, ll.EMA(), save)
    with pytest.raises(ll.ConfigError, match="decay=1"):
        ll.EMA(decay=1)


class Unfreezes(pl.Callback):
    """Trains the first layer from the second epoch on, as BackboneFinetuning does the backbone."""

    def on_train_epoch_start(self, trainer, module) -> None:
        first = next(m for m in module.modules() if hasattr(m, "weight"))
        first.requires_grad_(trainer.current_epoch > 0)


def test_what_begins_to_train_later_is_averaged_from_then_on(tmp_path):
    watch = Watches()
    module = fit(tmp_path, ll.EMA(0.3), Unfreezes(), watch, lora=False)
    late = watch.steps[-1].keys() - watch.steps[0].keys()
    assert late
    for name in late:
        average, *following = (step[name] for step in watch.steps[-4:])
        for tensor in following:
            average = 0.3 * average + 0.7 * tensor
        torch.testing.assert_close(averaged_tensors(module)[name].detach(), average)
