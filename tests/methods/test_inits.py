"""How updates begin, against numpy and against PEFT's same init of a linear layer."""

import numpy as np
import pytest
import torch
from families import CASES, base_model, config, every_case, in_mode, run, same_flags
from small import Classifier, adapted, loader, mlp, trainer
from torch import nn

import lora_lightning as ll
from lora_lightning.config import OFF_ZERO
from lora_lightning.layers.registry import lora_layers
from lora_lightning.layers.update import LowRankUpdate
from lora_lightning.methods.inits import INITS

ALL = tuple(INITS)
SHAPES = [(7, 11), (11, 7), (3, 6, 5)]  # of a matrix, and of three groups


def begun(init: str, shape: tuple[int, ...], rank: int, scaling: float) -> tuple[np.ndarray, ...]:
    torch.manual_seed(3)
    W = torch.randn(shape, dtype=torch.float64).reshape(-1, *shape[-2:])
    left, right = INITS[init](W, rank, scaling)
    assert left.shape == (*W.shape[:2], rank) and right.shape == (len(W), rank, W.shape[2])
    return W.numpy(), left.numpy(), right.numpy()


SINGULAR = [("pissa", slice(3)), ("pissa_fast", slice(3)), ("milora", slice(-3, None))]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("init", "chosen"), SINGULAR)
def test_singular_vectors_are_shared_out_evenly(init, chosen, shape):
    for W, left, right in zip(*begun(init, shape, 3, 1.7), strict=True):
        values, vectors = np.linalg.eigh(W.T @ W if W.shape[0] >= W.shape[1] else W @ W.T)
        part = vectors[:, ::-1][:, chosen]
        wanted = W @ part @ part.T if W.shape[0] >= W.shape[1] else part @ part.T @ W
        np.testing.assert_allclose(1.7 * left @ right, wanted, atol=1e-8)
        singular = np.sqrt(values[::-1][chosen])
        np.testing.assert_allclose(left.T @ left, np.diag(singular) / 1.7, atol=1e-8)
        np.testing.assert_allclose(right @ right.T, np.diag(singular) / 1.7, atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_olora_is_the_beginning_of_the_qr_decomposition(shape):
    for W, left, right in zip(*begun("olora", shape, 3, 1.7), strict=True):
        Q, R = np.linalg.qr(W)
        np.testing.assert_allclose(left @ right, Q[:, :3] @ R[:3], atol=1e-12)
        np.testing.assert_allclose(left.T @ left, np.eye(3), atol=1e-12)
        np.testing.assert_allclose(right[:, :3], np.triu(right[:, :3]), atol=1e-12)


@pytest.mark.parametrize("rank", [1, 4, 5])
def test_orthogonal_factors_have_no_product_and_both_get_gradients(rank):
    for _, left, right in zip(*begun("orthogonal", (3, 6, 7), rank, 2.0), strict=True):
        np.testing.assert_allclose(left @ right, 0, atol=1e-14)
        assert np.linalg.matrix_rank(right) == (rank + 1) // 2
        assert np.linalg.matrix_rank(left) == rank // 2


@pytest.mark.parametrize("init", ALL)
def test_nothing_changes_at_injection(init):
    check_injection(init, "Conv2d-groups")
    check_injection(init, "Linear-dora")


@pytest.mark.slow
@every_case
def test_nothing_changes_at_injection_in_any_family(name):
    for init in ALL:
        check_injection(init, name)


def check_injection(init: str, name: str) -> None:
    model, inputs = base_model(name), CASES[name].inputs()
    base = same_flags(name, model)
    ll.inject(model, config(name, init=init))
    updates = [u for layer in lora_layers(model).values() for u in layer.updates("default")]
    assert all(u.is_zero() and (u.lora_A.any() or u.lora_B.any()) for u in updates)
    assert all(u.fixed == (u.rank if init in OFF_ZERO else 0) for u in updates)
    for one, other in zip(run(model, inputs), run(in_mode(base, True), inputs), strict=True):
        assert (one - other).abs().max() <= 1e-6 * other.abs().max()


THEIRS = [("pissa", "pissa"), ("pissa_fast", "pissa_niter_16"), ("olora", "olora")]


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(("init", "theirs"), THEIRS)
def test_it_is_pefts_of_a_linear_layer(init, theirs, rslora):
    """The same A, B and effective weight, before and after a change of A and B."""
    peft = pytest.importorskip("peft")
    base, model = nn.Sequential(nn.Linear(12, 10)), nn.Sequential(nn.Linear(12, 10))
    U, _, V = torch.linalg.svd(torch.randn(10, 12), full_matrices=False)
    W = U @ torch.diag(2.0 ** -torch.arange(10)) @ V
    for one in (base, model):
        one.load_state_dict({"0.weight": W, "0.bias": torch.zeros(10)})
    shared = {"use_rslora": rslora, "target_modules": ["0"]}
    about = peft.LoraConfig(r=4, lora_alpha=5, init_lora_weights=theirs, **shared)
    layer = peft.get_peft_model(base, about).base_model.model[0]
    ll.inject(model, ll.LoRAConfig(rank=4, alpha=5, modules_to_save=None, init=init, **shared))
    (update,) = lora_layers(model)["0"].updates("default")
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    sign = torch.sign((A * update.lora_A).sum(1))  # of singular vectors
    torch.testing.assert_close(update.lora_A * sign[:, None], A, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(update.lora_B * sign, B, rtol=1e-4, atol=1e-4)
    residual = W + update.scaling * update.lora_fixed_B @ update.lora_fixed_A
    torch.testing.assert_close(residual, layer.base_layer.weight, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        A.add_(0.1), B.add_(0.2)
        update.lora_A.add_(0.1 * sign[:, None]), update.lora_B.add_(0.2 * sign)
    x = torch.randn(3, 12)
    torch.testing.assert_close(model(x), layer(x), rtol=1e-4, atol=1e-4)


def test_orthogonal_is_pefts():
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(12, 10))
    about = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights="orthogonal")
    layer = peft.get_peft_model(model, about).base_model.model[0]
    torch.manual_seed(2)
    layer.orthogonal_init("default")
    torch.manual_seed(2)
    left, right = INITS["orthogonal"](layer.base_layer.weight.detach()[None], 4, 2.0)
    torch.testing.assert_close(right[0], layer.lora_A["default"].weight.data)
    torch.testing.assert_close(left[0], layer.lora_B["default"].weight.data)


@pytest.mark.parametrize("init", ["pissa", "pissa_fast", "milora"])
def test_a_weight_without_such_singular_values_still_trains(init):
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2))
    nn.init.zeros_(model[0].weight)
    ll.inject(model, ll.LoRAConfig(rank=2, target_modules=["0"], init=init))
    model(torch.randn(3, 6)).sum().backward()
    (update,) = lora_layers(model)["0"].updates("default")
    assert update.is_zero() and update.lora_B.grad.abs().min() > 0


def test_fast_singular_vectors_take_no_random_number_and_are_the_same_each_time():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    W = torch.randn(1, 40, 30, generator=torch.Generator().manual_seed(1))
    one, other = INITS["pissa_fast"](W, 4, 1.0), INITS["pissa_fast"](W, 4, 1.0)
    assert torch.equal(one[0], other[0]) and torch.equal(torch.get_rng_state(), state)


def test_what_is_loaded_is_not_decomposed(tmp_path, monkeypatch):
    run = trainer(tmp_path, ll.LoRACallback(rank=2, init="olora"), max_epochs=1)
    run.fit(module := Classifier(), loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    ll.save_adapter(module, tmp_path / "adapter")
    monkeypatch.setitem(INITS, "olora", None)
    ll.load_from_checkpoint(Classifier, tmp_path / "a.ckpt")
    ll.load_adapter(Classifier(), tmp_path / "adapter")


def test_the_row_of_padding_stays_what_it_is():
    model = nn.Sequential(nn.Embedding(7, 6, padding_idx=2))
    nn.init.normal_(model[0].weight)
    ll.inject(model, ll.LoRAConfig(rank=2, target_modules=["0"], modules_to_save=None, init="pissa"))
    (update,) = lora_layers(model)["0"].updates("default")
    before = model(torch.arange(7))
    nn.init.normal_(update.lora_B)
    with torch.no_grad():
        changed = (model(torch.arange(7)) - before).abs().amax(1)
    assert changed[2] == 0 and (changed > 1e-3).sum() == 6


def test_quantized_weights_are_begun_from_as_they_are_read():
    model = adapted(mlp).float()
    ll.eject(model)
    ll.quantize(model, "int8")
    x = torch.randn(3, 6)
    wanted = model(x)
    ll.inject(model, ll.LoRAConfig(rank=2, init="pissa"))
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-6)
    updates = [u for layer in lora_layers(model).values() for u in layer.updates("default")]
    assert all(isinstance(u, LowRankUpdate) and u.lora_B.any() for u in updates)
