"""Terms of the loss against dense matrices, for every layer family; what their names say."""

import numpy as np
import pytest
import torch
from families import adapted, by_groups, typical_cases
from small import encoder, mlp
from torch import nn

import lora_lightning as ll
from lora_lightning.adapters.regularization import OF_WEIGHTS
from lora_lightning.config import REGULARIZERS
from lora_lightning.layers.registry import lora_layers
from lora_lightning.layers.update import LowRankUpdate
from lora_lightning.methods.regularizers import TERMS, alike, of_outputs, of_updates

ALONE = {"target_modules": "all", "modules_to_save": None}


def updates_of(model: nn.Module) -> list:
    return [u for layer in lora_layers(model).values() for u in layer.updates("default")]


def dense(update) -> torch.Tensor:
    """s·B·A by sums over indices, of each group a matrix."""
    product = by_groups(update.lora_A, update.lora_B, update.rank, update.slot.transposed)
    return update.scaling * product.reshape(update.slot.groups, -1, product[0].numel())


def gradients(value: torch.Tensor, updates: list) -> list[torch.Tensor]:
    return torch.autograd.grad(value, [p for u in updates for p in (u.lora_A, u.lora_B)])


def test_the_names_of_the_configuration_are_the_terms_that_there_are():
    assert (*OF_WEIGHTS, "outputs") == REGULARIZERS and set(TERMS) < set(OF_WEIGHTS)


@typical_cases
def test_frobenius_is_the_dense_norm_with_its_gradient_in_every_family(name):
    updates = updates_of(adapted(name, torch.float64))
    ours = of_updates(alike(updates), ["frobenius"])["frobenius"]
    theirs = sum(dense(u).square().sum() for u in updates)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)
    for one, other in zip(gradients(ours, updates), gradients(theirs, updates), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["Linear", "Conv2d-groups", "ConvTranspose2d-groups"])
@pytest.mark.parametrize("fixed", [1, 2, 5])
def test_frobenius_is_of_the_whole_update_where_a_part_is_fixed(name, fixed):
    update = updates_of(adapted(name, torch.float64))[0]
    weight = torch.empty(1, dtype=torch.float64).expand(update.product(base_of(name)).shape)
    whole = LowRankUpdate(weight, update.slot, update.rank, update.scaling, fixed=fixed)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.normal_()
    theirs = whole.product(weight).square().sum()
    ours = of_updates([[whole]], ["frobenius"])["frobenius"]
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)
    for one, other in zip(gradients(ours, [whole]), gradients(theirs, [whole]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def base_of(name: str) -> torch.Tensor:
    return adapted(name, torch.float64).layer.base_weight("weight")


def test_frobenius_of_an_init_in_the_weight_begins_at_zero_and_loses_nothing():
    model = nn.Sequential(nn.Linear(64, 64))
    ll.inject(model, ll.LoRAConfig(rank=4, init="pissa", **ALONE, regularizer={"frobenius": 1.0}))
    assert ll.regularization(model) == 0
    update = updates_of(model)[0]
    with torch.no_grad():
        update.lora_B += 1e-5 * torch.randn_like(update.lora_B)
    double = update.thin_factors()[0].double() @ update.thin_factors()[1].double()
    assert ll.regularization(model).item() == pytest.approx(double.square().sum().item(), rel=1e-3)
    with pytest.raises(ll.ConfigError, match=r"regularizer.l2=1 draws A and B to zero.*init='pissa'"):
        ll.LoRAConfig(init="pissa", regularizer={"l2": 1})


def test_frobenius_is_the_norm_of_what_stands_in_the_weights():
    model = adapted("Conv2d-groups")
    update = updates_of(model)[0]
    weight = model.layer.weight - model.layer.base_weight("weight")
    found = of_updates(alike([update]), ["frobenius"])["frobenius"]
    torch.testing.assert_close(found, weight.square().sum(), rtol=1e-5, atol=0)


def test_l2_is_a_bound_of_the_nuclear_norm_and_is_reached():
    for name in ("Linear", "Conv2d-groups", "ConvTranspose2d-groups", "Embedding"):
        for update in updates_of(adapted(name, torch.float64)):
            nuclear = sum(np.linalg.norm(m, "nuc") for m in dense(update).detach().numpy())
            found = of_updates([[update]], ["l2"])["l2"].item()
            factors = update.lora_A.square().sum() + update.lora_B.square().sum()
            assert found == pytest.approx(update.scaling * factors.item() / 2) and found > nuclear
    update = updates_of(adapted("Linear", torch.float64))[0]
    U, S, V = np.linalg.svd(dense(update)[0].detach().numpy() / update.scaling, full_matrices=False)
    root, rank = np.sqrt(S[: update.rank]), update.rank
    with torch.no_grad():
        update.lora_A.copy_(torch.from_numpy(root[:, None] * V[:rank]))
        update.lora_B.copy_(torch.from_numpy(U[:, :rank] * root))
    nuclear = np.linalg.norm(dense(update)[0].detach().numpy(), "nuc")
    assert of_updates([[update]], ["l2"])["l2"].item() == pytest.approx(nuclear)


def test_orthogonal_leaves_a_fresh_update_and_orthogonal_directions_alone():
    model = mlp()
    ll.inject(model, ll.LoRAConfig(rank=4, **ALONE, regularizer={"orthogonal": 1.0}))
    updates = updates_of(model)
    for grad, update in zip(gradients(ll.regularization(model), updates)[1::2], updates, strict=True):
        assert not update.lora_B.any() and not grad.any()
    with torch.no_grad():
        for update in updates:  # of one direction each, of whatever lengths
            update.lora_A.copy_(3 * torch.eye(*update.lora_A.shape)), update.lora_B.zero_().fill_diagonal_(5)
    assert ll.regularization(model) == 0
    with torch.no_grad():
        updates[0].lora_A[1] = torch.tensor([1.0, 2, 0, 0, 0, 0])
    assert ll.regularization(model) == 18  # the product of rows 0 and 1 is 3, in both orders


def test_orthogonal_turns_directions_apart():
    model = adapted("Linear", regularizer={"orthogonal": 1.0})
    optimizer = torch.optim.SGD(ll.lora_parameters(model), lr=0.2)
    before = ll.regularization(model)
    for _ in range(120):
        optimizer.zero_grad()
        ll.regularization(model).backward()
        optimizer.step()
    assert ll.regularization(model) < 1e-3 * before


def test_terms_are_the_same_under_autocast():
    model = adapted("Linear", regularizer={"frobenius": 1.0, "l2": 1.0, "orthogonal": 1.0})
    wanted = ll.regularization(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ll.regularization(model)
    assert found.dtype == torch.float32 and torch.equal(found, wanted)
    y = torch.randn(4, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = of_outputs([y.bfloat16()], [y.bfloat16()])
    assert found.dtype == torch.float32 and found == 0


def test_layers_of_one_shape_are_taken_together():
    """The calls of a step do not grow with the depth."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Count.calls += 1
            return func(*args, **(kwargs or {}))

    counts = []
    for depth in (2, 6):
        layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
        model = nn.TransformerEncoder(layer, depth)
        ll.inject(model, ll.LoRAConfig(rank=2, **ALONE, regularizer={"frobenius": 1.0}))
        kinds = alike(updates_of(model))
        with Count():
            Count.calls = 0
            of_updates(kinds, ["frobenius"])
        counts.append(Count.calls)
    assert counts[0] == counts[1] < 100


def test_heads_are_held_by_their_base_values():
    model = mlp()
    ll.inject(model, ll.LoRAConfig(rank=2, train_norm="affine", regularizer={"heads": 2.0}))
    assert ll.regularization(model) == 0
    with torch.no_grad():
        model[5].weight += 1.0
        model[1].bias -= 2.0
    torch.testing.assert_close(ll.regularization(model), torch.tensor(36.0 + 16 * 4.0))


def test_of_several_adapters_the_selected_ones_count():
    config = ll.LoRAConfig(rank=2, **ALONE, regularizer={"frobenius": 1.0})
    model = encoder()
    ll.inject(model, config, adapter="one")
    ll.add_adapter(model, "two", config)
    with torch.no_grad():
        for n, parameter in model.named_parameters():
            if ".lora." in n:
                parameter.fill_(0.1 if ".one." in n else 0.2)
    one = ll.regularization(model)
    ll.set_adapter(model, "two")
    two = ll.regularization(model)
    ll.set_adapter(model, "one", "two")
    torch.testing.assert_close(ll.regularization(model), one + two)
    torch.testing.assert_close(two, 16 * one)


def test_a_mixture_of_updates_that_are_done_training_adds_nothing():
    config = ll.LoRAConfig(rank=2, **ALONE, regularizer={"frobenius": 1.0})
    model = mlp()
    ll.inject(model, config, adapter="one")
    ll.add_adapter(model, "two", config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora." in name:
                parameter.fill_(0.1)
    alone = ll.regularization(model)
    ll.mixture(model, ["one", "two"], "both")
    ll.set_adapter(model, "one", "both")
    torch.testing.assert_close(ll.regularization(model), alone)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "it has no terms; give terms of the weights: frobenius, l2, orthogonal, heads."),
        ({"regularizer": {"outputs": 1.0}}, "LoRACallback alone can add how far the outputs move"),
        ({"regularizer": {"heads": 1.0}, **ALONE}, "regularizer.heads: no head, norm or bias"),
    ],
)
def test_what_cannot_be_told_is_refused(options, says):
    model = mlp()
    ll.inject(model, ll.LoRAConfig(rank=2, **options))
    with pytest.raises(ll.ConfigError, match=says):
        ll.regularization(model)
