"""The frozen part of an update, by which one that begins away from zero adds nothing, for every family.

`pissa` stands for all that have one; how each init begins is in test_inits.py.
"""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from families import (
    CASES,
    Model,
    adapted,
    base_model,
    check_merging,
    config,
    equal,
    every_case,
    in_mode,
    loss,
    reference,
    reference_run,
    run,
    same_flags,
)
from small import BATCHES, Classifier, cnn, loader, mlp, pretrained, trainer
from small import adapted as small_adapted

import lora_lightning as ll
from lora_lightning.files.compatibility import check_tensors
from lora_lightning.files.locate import read_source
from lora_lightning.layers.registry import lora_layers
from lora_lightning.layers.update import FIXED, LowRankUpdate
from lora_lightning.planning.plan import Plan
from lora_lightning.trainer.collapse import update_sizes

MIXED = [  # one of each family that has a road of its own
    "Conv2d-groups", "Conv2d-depthwise-dora", "ConvTranspose1d-groups", "Embedding-padding", "Attention-q-v",
    "LSTM-gates-dora", "Linear-dora", "Conv1D", "weight-norm",
]  # fmt: skip


@every_case
def test_nothing_changes_at_injection_and_gradients_are_those_of_the_whole_weight(name):
    inputs = CASES[name].inputs()
    model = base_model(name)
    base = same_flags(name, model)
    planned = ll.inject(model, config(name, init="pissa"))
    assert planned.total == sum(p.numel() for p in model.parameters())
    assert planned.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert all(u.lora_A.any() and u.lora_B.any() and u.is_zero() for u in updates(model))
    for one, other in zip(run(model, inputs), run(in_mode(base, True), inputs), strict=True):
        assert (one - other).abs().max() <= 1e-6 * other.abs().max()
    model, inputs = adapted(name, torch.float64, init="pissa"), CASES[name].inputs(torch.float64)
    plain, weights = reference(name, model)
    got, wanted = run(model, inputs), reference_run(plain, weights, inputs, True)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    gradients = torch.autograd.grad(loss(got), ll.lora_parameters(model))
    expected = torch.autograd.grad(loss(wanted), ll.lora_parameters(model))
    torch.testing.assert_close(gradients, expected, rtol=1e-10, atol=1e-10)


def updates(model: torch.nn.Module) -> list[LowRankUpdate]:
    return [u for layer in lora_layers(model).values() for u in layer.updates("default")]


def fixed(model: torch.nn.Module) -> list[torch.Tensor]:
    return [getattr(u, name).detach().clone() for u in updates(model) for name in FIXED]


@pytest.mark.parametrize("name", MIXED)
def test_the_life_of_an_update_with_a_fixed_part(name, tmp_path):
    """Trained with weight decay, off, merged, copied, saved in our format and loaded, ejected."""
    model, inputs = base_model(name), CASES[name].inputs()
    ll.inject(model, config(name, init="pissa"))
    before, A = fixed(model), updates(model)[0].lora_A.clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.5)
    loss(run(model.train(), inputs)).backward()
    optimizer.step()
    assert equal(fixed(model), before) and not torch.equal(updates(model)[0].lora_A, A)
    base = in_mode(same_flags(name, model), False)
    with torch.no_grad(), ll.adapters_off(model.eval()):
        assert equal(run(model, inputs), run(base, inputs))
    check_merging(model, inputs, 1e-5)
    wanted = run(model, inputs)
    twins = [copy.deepcopy(model)] + ([] if "-norm" in name else [pickle.loads(pickle.dumps(model))])
    ll.save_adapter(model, tmp_path)
    loaded, again = base_model(name).eval(), base_model(name).eval()
    ll.inject(again, config(name))  # whose updates have no fixed part
    for twin in (loaded, again):
        ll.load_adapter(twin, tmp_path, adapter="default")
    for twin in (*twins, loaded, again):
        assert equal(run(twin, inputs), wanted)
        assert [p.requires_grad for p in updates(twin)[0].parameters()].count(False) == 2
    ll.eject(model)
    assert equal(run(model, inputs), run(base_model(name).eval(), inputs))


SUMMED = ["Conv2d-groups", "ConvTranspose1d-groups", "Embedding-padding", "Linear", "LSTM"]


@pytest.mark.parametrize("name", SUMMED)
def test_sums_and_mixed_batches_have_the_fixed_part(name):
    torch.manual_seed(0)
    model, inputs = adapted(name, init="pissa").eval(), CASES[name].inputs()
    ll.add_adapter(model, "plain", config(name, rank=1))
    torch.nn.init.normal_(lora_layers(model)["layer"].updates("plain")[0].lora_A)
    torch.nn.init.normal_(lora_layers(model)["layer"].updates("plain")[0].lora_B)
    alone = [run(model, inputs)]
    ll.combine(model, ["default", "plain"], [0.5, 2.0], into="sum")
    ll.set_adapter(model, "default", "plain")
    both = run(model, inputs)
    ll.set_adapter(model, "plain")
    alone.append(run(model, inputs))
    ll.combine(model, ["default", "plain"], [1.0, 1.0], into="both")
    assert not any(u.fixed for u in lora_layers(model)["layer"].updates("both"))
    ll.set_adapter(model, "both")
    torch.testing.assert_close(run(model, inputs), both, rtol=1e-4, atol=1e-4)
    rows = inputs[0].shape[CASES[name].batch]
    with ll.mixed_adapters(model, (["default", "plain"] * rows)[:rows]):
        mixed = run(model, inputs)
    for i, one in enumerate(alone):
        for got, wanted in zip(mixed, one, strict=True):
            dim = CASES[name].batch if got.shape[CASES[name].batch] == rows else 1
            mine = [t.index_select(dim, torch.arange(i, rows, 2)) for t in (got, wanted)]
            torch.testing.assert_close(*mine, rtol=1e-4, atol=1e-5)


def test_half_precision_memory_and_flags():
    model = base_model("Linear").bfloat16()
    ll.inject(model, config("Linear", init="pissa"))
    (update,) = updates(model)
    assert {p.dtype for p in update.parameters()} == {torch.float32}
    model.half().requires_grad_(False)
    assert {p.dtype for p in update.parameters()} == {torch.float32}
    ll.set_adapter(model, "default")
    assert ll.lora_parameters(model) == [update.lora_A, update.lora_B]
    assert all(p.requires_grad for p in ll.lora_parameters(model))
    assert not any(getattr(update, name).requires_grad for name in FIXED)
    model.to_empty(device="cpu")
    update.reset_parameters()
    assert update.is_zero() and not update.lora_B.any() and not update.lora_fixed_B.any()


def test_an_update_without_a_fixed_part_is_what_it_was():
    (update,) = updates(adapted("Linear"))
    A, B = update.factors()
    assert A is update.lora_A and B is update.lora_B and update.total_rank == update.rank
    assert list(update.state_dict()) == ["lora_A", "lora_B"]


def test_dropout_sees_one_mask_so_that_nothing_changes_at_injection():
    model, inputs = base_model("Linear").train(), CASES["Linear"].inputs()
    wanted = run(model, inputs)
    ll.inject(model, config("Linear", init="pissa", dropout=0.5))
    torch.testing.assert_close(run(model, inputs), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["Linear", "Linear-dora", "Conv2d-groups", "Embedding-padding"])
def test_weights_that_arrive_after_the_injection_are_begun_from(name):
    torch.manual_seed(5)
    weights = {n: torch.randn_like(t) for n, t in base_model(name).state_dict().items()}
    model, late = base_model(name), base_model(name)
    model.load_state_dict(weights)
    ll.inject(model, config(name, init="pissa"))
    ll.inject(late, config(name, init="pissa"))
    assert not equal(fixed(late), fixed(model))
    late.load_state_dict(weights, strict=False)
    assert equal([*late.state_dict().values()], [*model.state_dict().values()])
    with torch.no_grad():
        updates(late)[0].lora_A.add_(1)  # it trains: now it has a place of its own
    late.load_state_dict(base_model(name).state_dict(), strict=False)
    assert equal(fixed(late), fixed(model))


def test_a_trainers_checkpoint_holds_the_fixed_part_and_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    def fit(epochs, path=None):
        torch.manual_seed(0)
        module = Classifier()
        run = trainer(tmp_path, ll.LoRACallback(rank=2, init="pissa"), max_epochs=epochs)
        run.fit(module, loader(), ckpt_path=path)
        return run, module

    _, whole = fit(2)
    first, _ = fit(1)
    first.save_checkpoint(tmp_path / "a.ckpt")
    _, resumed = fit(2, tmp_path / "a.ckpt")
    assert equal([*resumed.state_dict().values()], [*whole.state_dict().values()])
    names = [n for n in torch.load(tmp_path / "a.ckpt")["state_dict"] if "lora_fixed" in n]
    assert len(names) == 2 * len(updates(whole)) > 0
    loaded = ll.load_from_checkpoint(Classifier, tmp_path / "a.ckpt")
    assert loaded.lora_state.plan == whole.lora_state.plan
    saved = read_source(tmp_path / "a.ckpt").saved
    assert {n.rpartition(".")[2] for n in saved.update_shapes()} == {"lora_A", "lora_B", *FIXED}


def test_a_plan_that_says_nothing_of_a_fixed_part_has_none():
    planned = ll.plan(mlp(), ll.LoRAConfig(init="pissa"))
    about = planned.to_dict()
    assert Plan.from_dict(about) == planned
    assert all(p.fixed == p.rank for p in planned.layers)
    for layer in about["layers"]:
        del layer["fixed"]
    assert {p.fixed for p in Plan.from_dict(about).layers} == {0}
    about["layers"][0]["fixed"] = -1
    with pytest.raises(TypeError):
        Plan.from_dict(about)


def test_files_with_a_fixed_part_of_another_shape_or_none_are_refused(tmp_path):
    ll.save_adapter(small_adapted(mlp, init="pissa"), tmp_path)
    saved = read_source(tmp_path).saved
    name = next(n for n in saved.tensors if n.endswith("lora_fixed_B"))
    kept = saved.tensors.pop(name)
    with pytest.raises(ll.AdapterFileError, match=f"{name} is missing"):
        check_tensors(saved, "here")
    saved.tensors[name] = kept[:, :1]
    with pytest.raises(ll.AdapterFileError, match=f"{name}: .* in the file"):
        check_tensors(saved, "here")
    saved.tensors[name] = kept
    without = replace(saved.plan, layers=[replace(p, fixed=0) for p in saved.plan.layers])
    with pytest.raises(ll.AdapterFileError, match="lora_fixed_A has no place"):
        check_tensors(replace(saved, plan=without), "here")


def test_the_promises_hold():
    assert ll.verify(small_adapted(cnn, init="pissa"), BATCHES[cnn]()) == []


def test_norms_are_folded_into_convolutions_with_a_fixed_part():
    made = []
    for fold in (False, True):
        model = small_adapted(cnn, init="pissa", fold_norms=fold).train()
        torch.manual_seed(1)
        model(BATCHES[cnn]()).square().sum().backward()
        made.append([p.grad for p in ll.lora_parameters(model)])
    assert sum(layer.lora_norm is not None for layer in lora_layers(model).values()) == 1
    torch.testing.assert_close(*made, rtol=1e-3, atol=1e-4)


def test_a_collapse_is_told_by_the_size_of_the_whole_update():
    model = pretrained(mlp)
    ll.inject(model, ll.LoRAConfig(rank=2, init="pissa"))
    assert max(update_sizes(model).values()) < 1e-6


def test_what_has_no_values_is_refused_by_name():
    with torch.device("meta"):
        model = Model("Linear")
    with pytest.raises(ll.ConfigError, match=r"init='pissa'.*meta.*\"default\""):
        ll.inject(model, config("Linear", init="pissa"))
    model = base_model("Linear")
    model.layer.weight.data[0, 0] = float("nan")
    with pytest.raises(ll.UserError, match="init='pissa': the weight of layer holds NaN"):
        ll.inject(model, config("Linear", init="pissa"))
    assert not hasattr(model, "lora_state") and all(p.requires_grad for p in model.parameters())
