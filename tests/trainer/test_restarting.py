"""Restarts in a Trainer: against ReLoRA by hand, in runs that go on, beside averages, and what is refused."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from small import Classifier, loader, mlp, pretrained, trainer
from torch import nn
from torch.func import functional_call
from torch.utils.data import DataLoader

import lora_lightning as ll
from lora_lightning.adapters.restarts import done, updates_of
from lora_lightning.trainer import restarting

STEPS, RESTARTS = 8, 2  # two epochs of four batches; restarts after 2 and 5 steps


class Watches(pl.Callback):
    """The trained values behind each step and each restart."""

    def __init__(self, monkeypatch) -> None:
        self.steps, self.restarts, self.batches = [], [], []
        original = restarting.restart_adapter

        def watched(module, adapter, *optimizers):
            with torch.no_grad():
                before = effective(module)
                original(module, adapter, *optimizers)
                assert all(
                    torch.allclose(a, b, atol=1e-6) for a, b in zip(before, effective(module), strict=True)
                )
            self.restarts.append((module.trainer.global_step, trained(module)))

        monkeypatch.setattr(restarting, "restart_adapter", watched)

    def on_train_start(self, run, module) -> None:
        self.start = trained(module)

    def on_train_batch_start(self, run, module, batch, index) -> None:
        self.batches.append(batch)

    def on_train_batch_end(self, run, module, *_) -> None:
        if run.global_step > len(self.steps):
            self.steps.append(trained(module))


def trained(module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}


def effective(module) -> list[torch.Tensor]:
    return [m.weight.detach().clone() for m in module.modules() if isinstance(m, nn.Linear)]


def fit(folder, *callbacks, path=None, seed=0, **settings):
    torch.manual_seed(seed)
    module = Classifier(pretrained(mlp))
    adapting = ll.LoRACallback(rank=2, restarts=RESTARTS, verbose=False)
    run = trainer(folder, adapting, *callbacks, **settings)
    data = ll.ResumableLoader(loader(mlp).dataset, 4, shuffle=True)
    run.fit(module, data, DataLoader(loader(mlp).dataset, 8), ckpt_path=path, weights_only=True)
    return module


@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_is_relora_by_hand(accumulate, tmp_path, monkeypatch):
    """W ← W + s·B·A after each cycle, A as the Trainer drew it, and AdamW without a memory of A and B."""
    watch = Watches(monkeypatch)
    module = fit(tmp_path, watch, max_epochs=2 * accumulate, accumulate_grad_batches=accumulate)
    assert [step for step, _ in watch.restarts] == [2, 5] and len(watch.steps) == STEPS
    model = pretrained(mlp).requires_grad_(False)
    head = [p.requires_grad_() for n, p in model.named_parameters() if f"model.{n}" in watch.steps[0]]
    layers = [layer.module.removeprefix("model.") for layer in module.lora_state.plan.layers]
    W = {n: model.get_submodule(n).weight.clone() for n in layers}
    rest = torch.optim.AdamW(head, lr=0.05, weight_decay=0.1)
    data = iter(watch.batches)
    for steps, values in zip([2, 3, 3], [watch.start, *(v for _, v in watch.restarts)], strict=True):
        A, B = (
            {n: values[f"model.{n}.lora.default.weight.lora_{k}"].requires_grad_() for n in W} for k in "AB"
        )
        assert not any(b.any() for b in B.values())
        factors = torch.optim.AdamW([*A.values(), *B.values()], lr=0.05, weight_decay=0.1)
        for _ in range(steps):
            rest.zero_grad(), factors.zero_grad()
            for x, y in (next(data) for _ in range(accumulate)):
                weights = {f"{n}.weight": W[n] + 2 * B[n] @ A[n] for n in W}
                (F.cross_entropy(functional_call(model, weights, x), y) / accumulate).backward()
            rest.step(), factors.step()
        W = {n: (W[n] + 2 * B[n] @ A[n]).detach() for n in W}
    for name in W:
        found = module.model.get_submodule(name).weight.detach()
        torch.testing.assert_close(found, W[name], rtol=1e-4, atol=1e-5)


class SavesEach(pl.Callback):
    """Behind each step; and, at one step, within the batch that a restart has just preceded."""

    def __init__(self, folder: Path, within: int = -1) -> None:
        self.folder, self.within = folder, within

    def on_train_batch_start(self, run, module, *_) -> None:
        if run.global_step == self.within:
            run.save_checkpoint(self.folder / "within.ckpt")

    def on_train_batch_end(self, run, module, *_) -> None:
        run.save_checkpoint(self.folder / f"{run.global_step}.ckpt")


def test_a_run_goes_on_as_if_it_had_not_stopped(tmp_path, recwarn):
    """Stopped before, at and after a restart, in the batch behind it, and at the end; seeds draw other A."""
    module = fit(tmp_path, SavesEach(tmp_path, within=5))
    wanted = module.state_dict()
    assert done(module, "default") == RESTARTS
    for name in ("1", "2", "within", "6", "8"):
        recwarn.clear()
        found = fit(tmp_path / "again", path=tmp_path / f"{name}.ckpt", seed=3).state_dict()
        assert found.keys() == wanted.keys()
        assert not [w for w in recwarn if "earlier training" in str(w.message)]  # it is the same one
        assert all(torch.equal(found[n], wanted[n]) for n in wanted), name
    stored = torch.load(tmp_path / "2.ckpt", weights_only=True)["state_dict"]
    assert not any(t.any() for n, t in stored.items() if "fixed" in n)  # of the time before the restart
    loaded = ll.load_from_checkpoint(Classifier, tmp_path / "8.ckpt", model=pretrained(mlp))
    assert all(torch.equal(a, b) for a, b in zip(effective(loaded), effective(module), strict=True))
    other = fit(tmp_path / "other", seed=1)
    (one, *_), (two, *_) = updates_of(module, "default"), updates_of(other, "default")
    assert not torch.equal(one.lora_A, two.lora_A)


def test_a_second_training_of_the_same_adapter_has_no_room_left(tmp_path):
    module = fit(tmp_path)
    run = trainer(tmp_path, ll.LoRACallback(rank=2, restarts=RESTARTS, verbose=False), max_epochs=1)
    kept = [u.lora_fixed_B.clone() for u in updates_of(module, "default")]
    with pytest.warns(UserWarning, match="restarts=2: adapter 'default' has had 2 of them in an "):
        run.fit(module, loader(mlp))
    assert all(
        torch.equal(u.lora_fixed_B, b) for u, b in zip(updates_of(module, "default"), kept, strict=True)
    )


def test_averages_begin_anew_with_A_and_B(tmp_path, monkeypatch):
    watch = Watches(monkeypatch)
    module = fit(tmp_path, ll.EMA(decay=0.5, warmup=False), watch)
    average, restarts = watch.start, dict(watch.restarts)
    for number, step in enumerate(watch.steps):
        average |= {n: t for n, t in restarts.get(number, {}).items() if "lora_" in n}
        average = {n: 0.5 * average[n] + 0.5 * step[n] for n in average}
    for name, tensor in trained(module).items():
        torch.testing.assert_close(tensor, average[name])


class Compares(pl.Callback):
    def __init__(self, averaging, at: int) -> None:
        self.averaging, self.at = averaging, at

    def on_train_batch_start(self, run, module, *_) -> None:
        if run.global_step == self.at:
            mine, theirs = module.state_dict(), self.averaging._average_model.module.state_dict()
            assert all(torch.equal(theirs[n], t) for n, t in mine.items() if "lora_" in n)
            assert any(t.any() for n, t in theirs.items() if "lora_fixed" in n)
            self.averaging = None


def test_lightnings_average_begins_anew_too(tmp_path):
    averaging = EMAWeightAveraging(decay=0.5)
    compares = Compares(averaging, 5)
    fit(tmp_path, averaging, compares)
    assert compares.averaging is None


class Manual(Classifier):
    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.automatic_optimization = False


def test_what_cannot_be_is_refused_by_name(tmp_path):
    def problems(*callbacks, module=None, data=None, **options):
        run = trainer(tmp_path, ll.LoRACallback(rank=2, restarts=9, verbose=False), *callbacks, **options)
        with pytest.raises(ll.ConfigError) as refusal:
            run.fit(module or Classifier(pretrained(mlp)), data or loader(mlp))
        return refusal.value.problems

    (told,) = problems(max_epochs=-1)
    assert told.startswith("restarts=9: they are spread over the training") and "trainer.max_epochs" in told
    (told,) = problems(max_epochs=2)
    assert told == "restarts=9: the training has 8 steps; give fewer restarts than steps."
    first, second = problems(StochasticWeightAveraging(0.01), module=Manual(pretrained(mlp)))
    assert "StochasticWeightAveraging would average factors" in first and "manual optimization" in second
