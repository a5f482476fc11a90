"""The watch over a training: what counts as a collapse, on recorded curves, and how a Trainer ends."""

import json
import math
import random
from pathlib import Path

import pytest
import torch
from small import Classifier, loader, mlp, trainer
from torch import nn

import lora_lightning as ll
from lora_lightning.trainer import collapse
from lora_lightning.trainer.collapse import EVERY, Look, fault, rate_of_updates, update_sizes

CURVES = json.loads((Path(__file__).parent / "curves.json").read_text())


def faults(losses: list[float], dwarfed: bool) -> list[str | None]:
    """What is said at each look at a curve."""
    looks = [Look.of(losses[i : i + EVERY]) for i in range(0, len(losses) - EVERY + 1, EVERY)]
    return [fault(looks[: n + 1], dwarfed) for n in range(len(looks))]


@pytest.mark.parametrize("name", CURVES["healthy"])
def test_a_healthy_run_is_left_alone_even_if_its_updates_are_large(name):
    losses = CURVES["healthy"][name]
    assert len(losses) >= 3 * EVERY
    assert set(faults(losses, dwarfed=True)) == {None}
    assert CURVES["sizes"][name][0] < collapse.BURIES / 3


@pytest.mark.parametrize("name", CURVES["collapsed"])
def test_a_run_that_collapsed_is_seen(name):
    """By its losses, with updates of the sizes that they had, or by these alone."""
    middle = CURVES["sizes"][name][0]
    assert middle > collapse.BURIES or any(faults(CURVES["collapsed"][name], middle > collapse.DWARFS))


def test_losses_that_are_not_finite_are_seen_at_the_first_look():
    assert faults([1.0] * EVERY + [math.nan] * EVERY, dwarfed=False)[-1] == "its loss is not finite"
    assert faults([1.0, math.inf] * EVERY, dwarfed=False) == [None, None]  # each second batch alone


def test_a_loss_above_its_start_is_a_fault_only_with_large_updates_or_when_it_has_doubled():
    risen = [1.0] * EVERY + [1.6] * 4 * EVERY
    assert "began at 1 and stays above that, at 1.6" in faults(risen, dwarfed=True)[-1]
    assert set(faults(risen, dwarfed=False)) == {None}
    assert "stays above" in faults([1.0] * EVERY + [2.5] * 4 * EVERY, dwarfed=False)[-1]


def test_one_bad_stretch_is_forgiven():
    losses = [2.0] * EVERY + [1.0] * EVERY + [9.0] * 2 * EVERY + [0.8] * 4 * EVERY
    assert set(faults(losses, dwarfed=True)) == {None}


@pytest.mark.parametrize("level", [2.3, 0.01, -4.0])
def test_pure_noise_is_no_collapse(level):
    """Nothing is learned, and single losses differ by far more than 10 %."""
    numbers = random.Random(0)
    for _ in range(50):
        losses = [level + abs(level) * numbers.gauss(0, 0.5) for _ in range(20 * EVERY)]
        assert set(faults(losses, dwarfed=False)) == {None}


class Diverges(Classifier):
    """Its rate is far too high for its updates, from the third epoch on or at once."""

    def training_step(self, batch, index):
        return super().training_step(batch, index) * getattr(self, "factor", 1.0)


def fit(tmp_path, module, steps=100, data=None, **options):
    callback = ll.LoRACallback(rank=2, target_modules="all", verbose=False, **options)
    run = trainer(tmp_path, callback, max_epochs=-1, max_steps=steps, enable_checkpointing=False)
    run.fit(module, data or loader(mlp, 32))
    return run


def test_a_rate_far_too_high_ends_the_fit_with_one_message_that_says_what_to_change(tmp_path):
    with pytest.raises(ll.UserError) as caught:
        fit(tmp_path, Classifier(mlp(), lr=20.0), steps=120)
    message = str(caught.value)
    assert "has collapsed at step" in message
    assert "learning rate of 20 is too high here: give about a third, 7 " in message
    assert "(rank 2) is" in message and "times its weight" in message
    for remedy in (
        "schedule.warmup",
        "trainer.gradient_clip_val",
        "train_norm='both'",
        "watch_collapse=False",
    ):
        assert remedy in message


def test_a_loss_of_nan_ends_the_fit(tmp_path):
    module = Diverges(mlp(), lr=1e-3)
    module.factor = math.nan
    with pytest.raises(ll.UserError, match="at step 20: its loss is not finite"):
        fit(tmp_path, module)


def test_the_watch_can_be_switched_off_and_leaves_sound_runs_alone(tmp_path):
    assert fit(tmp_path, Classifier(mlp(), lr=20.0), watch_collapse=False, steps=120).global_step == 120
    assert fit(tmp_path, Classifier(mlp(), lr=1e-3)).global_step == 100


def test_between_two_looks_no_loss_is_read(tmp_path, monkeypatch):
    looked = []
    monkeypatch.setattr(
        collapse.Look, "of", classmethod(lambda cls, losses: looked.append(len(losses)) or cls(1.0, 0.0, 1.0))
    )
    fit(tmp_path, Classifier(mlp(), lr=1e-3), steps=2 * EVERY + 7)
    assert looked == [EVERY, EVERY]


def test_a_module_that_gives_no_loss_is_not_watched(tmp_path):
    class Manual(Classifier):
        def __init__(self) -> None:
            super().__init__(mlp(), lr=30.0)
            self.automatic_optimization = False

        def training_step(self, batch, index):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, index))
            optimizer.step()

    assert fit(tmp_path, Manual()).global_step == 100


def test_sizes_are_those_of_the_matrices():
    model = nn.Sequential(nn.Linear(6, 5), nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(4, 8, 3, groups=2))
    ll.inject(model, ll.LoRAConfig(rank=2, target_modules="all", modules_to_save=None))
    assert set(update_sizes(model).values()) == {0.0}
    with torch.no_grad():
        for parameter in ll.lora_parameters(model):
            parameter.normal_()
    sizes = update_sizes(model)
    for name, layer in model.named_children():
        base = layer.base_weight("weight").flatten(1)
        wanted = torch.linalg.matrix_norm(layer.weight.flatten(1) - base, 2) / torch.linalg.matrix_norm(
            base, 2
        )
        assert sizes[name] == pytest.approx(wanted.item(), rel=0.1)


def test_the_rate_that_is_told_is_the_one_that_the_option_sets():
    """Not the head's own, nor LoRA+'s multiple of it, of which a third may be more than was given."""
    model = mlp()
    ll.inject(model, ll.LoRAConfig(rank=2, target_modules=["0", "3"], modules_to_save=["5"]))
    groups = ll.param_groups(model, lr=1e-3, head_lr=0.1, lora_plus=16, head=model[5].parameters())
    assert rate_of_updates(model, groups) == 1e-3
    assert rate_of_updates(model, [{**group, "initial_lr": 2 * group["lr"]} for group in groups]) == 2e-3
    assert rate_of_updates(model, [{"params": [], "lr": 0.5}]) == 0.5
    assert rate_of_updates(model, []) == 0.0


def test_every_process_gives_the_same_verdict():
    """A process of two whose own losses are sound, beside one whose are not."""

    class Two:
        world_size, global_step, optimizers = 2, EVERY, ()

        class strategy:
            root_device = torch.device("cpu")

            @staticmethod
            def reduce(values, reduce_op):
                assert reduce_op == "sum"
                return values + torch.tensor([math.nan, math.nan, math.nan, 1.0])

    model = mlp()
    ll.inject(model, ll.LoRAConfig(rank=2))
    watch = collapse.CollapseWatch(model)
    said = [watch.after_batch({"loss": torch.tensor(1.0)}, Two()) for _ in range(EVERY)]
    assert said[:-1] == [None] * (EVERY - 1) and "its loss is not finite" in said[-1]


@pytest.mark.slow
def test_the_application_ends_with_one_message_and_exit_code_2(tmp_path, monkeypatch, capsys):
    from lora_lightning.app.application import main

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(
            [
                "recipe=resnet_digits",
                "rates.lora=3.0",
                "compare=[]",
                "trainer.max_epochs=40",
                "hydra.run.dir=run",
            ]
        )
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.strip().startswith("the training has collapsed at step") and "Traceback" not in error
    assert "learning rate of 3 is too high here" in error and not (tmp_path / "run" / "adapter").exists()
