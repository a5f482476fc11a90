"""The promises of an adapted layer, for every family and setting, against independent maths."""

import copy
import io
import pickle

import pytest
import torch
from families import (
    CASES,
    Model,
    adapted,
    base_model,
    config,
    equal,
    fill,
    loss,
    reference,
    reference_run,
    run,
    same_flags,
)
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils.checkpoint import checkpoint

import lora_lightning as ll
from lora_lightning.layers.registry import LoRALayer, lora_layers

# Where each way of compiling differs most, and a few settings of each family; the rest is the long tail.
COMPILED = {"Conv2d-groups", "ConvTranspose2d", "EmbeddingBag-mean", "Attention-q-v", "LSTM", "weight-norm"}
TYPICAL = COMPILED | {
    "Conv1d", "Conv2d-depthwise-dora", "Conv3d", "ConvTranspose1d-groups", "Embedding-padding",
    "EmbeddingBag-sparse", "Attention", "Attention-kdim", "EncoderLayer", "fused-qkv-dora", "LSTM-deep",
    "LSTM-gates-dora", "GRU-packed", "LSTMCell", "Linear", "Conv1D", "StdConv2d", "weight-norm-LSTM",
    "spectral-norm-conv", "own-class",
}  # fmt: skip


def cases(quick: set[str]) -> pytest.MarkDecorator:
    assert quick <= set(CASES)
    names = [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
    return pytest.mark.parametrize("name", names)


every_case, typical_cases, compiled_cases = cases(set(CASES)), cases(TYPICAL), cases(COMPILED)
both_modes = pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])


@every_case
@both_modes
def test_outputs_and_gradients_are_those_of_the_effective_weight(name, train):
    model = adapted(name, torch.float64).train(train)
    inputs = CASES[name].inputs(torch.float64)
    plain, weights = reference(name, model)
    got, wanted = run(model, inputs), reference_run(plain, weights, inputs, train)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    parameters = ll.lora_parameters(model)
    gradients = torch.autograd.grad(loss(got), parameters)
    expected = torch.autograd.grad(loss(wanted), parameters)
    torch.testing.assert_close(gradients, expected, rtol=1e-10, atol=1e-10)


@typical_cases
@both_modes
def test_outputs_in_float32(name, train):
    model = adapted(name).train(train)
    inputs = CASES[name].inputs()
    plain, weights = reference(name, model)
    with torch.no_grad():  # where attention and its encoder layer take their fused path
        got, wanted = run(model, inputs), reference_run(plain, weights, inputs, train)
    for one, other in zip(got, wanted, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


@every_case
@both_modes
def test_outputs_do_not_change_at_injection(name, train):
    model = base_model(name).train(train)
    ll.inject(model, config(name))
    base, inputs = same_flags(name, model), CASES[name].inputs()
    with torch.no_grad():
        assert equal(run(model, inputs), run(base, inputs))
    for one, other in zip(run(model, inputs), run(base, inputs), strict=True):
        assert (one - other).abs().max() <= 1e-6 * other.abs().max()


@every_case
@both_modes
def test_adapters_off_is_the_base_bit_for_bit(name, train):
    model = adapted(name).train(train)
    inputs = CASES[name].inputs()
    with torch.no_grad():
        changed, wanted = run(model, inputs), run(same_flags(name, model), inputs)
        assert not equal(changed, wanted)
        with ll.adapters_off(model):
            assert equal(run(model, inputs), wanted)
        assert equal(run(model, inputs), changed)
        ll.merge(model)
        with ll.adapters_off(model):
            assert equal(run(model, inputs), wanted)


def weights_of(model: nn.Module) -> list[torch.Tensor]:
    return [t.clone() for t in model.state_dict().values()]


@every_case
def test_merged_equals_unmerged_and_unmerging_restores(name):
    check_merging(name, torch.float32, 1e-5)


@typical_cases
def test_merging_half_precision_weights(name):
    check_merging(name, torch.bfloat16, 0.03)


def check_merging(name: str, dtype: torch.dtype, allowed: float) -> None:
    model = adapted(name, dtype).eval()
    inputs = CASES[name].inputs(dtype)
    with torch.no_grad():
        before, weights = run(model, inputs), weights_of(model)
        ll.merge(model)
        merged = run(model, inputs)
        assert {p.dtype for n, p in model.named_parameters() if ".lora." not in n} == {dtype}
        for restored in (pickled_if_possible(model), model):
            ll.unmerge(restored)
            assert equal(weights_of(restored), weights)
            assert equal(run(restored, inputs), before)
    for one, other in zip(before, merged, strict=True):
        assert (one - other).abs().max() <= allowed * one.abs().max()


def pickled_if_possible(model: Model) -> nn.Module:
    if "-norm" in model.name:  # torch forbids pickling what has a parametrization
        return copy.deepcopy(model)
    return pickle.loads(pickle.dumps(model))


@every_case
def test_training_changes_the_updates_and_nothing_else(name):
    model = adapted(name).train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    inputs = CASES[name].inputs()
    for _ in range(3):
        optimizer.zero_grad()
        loss(run(model, inputs)).backward()
        optimizer.step()
    after = model.state_dict()
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor) == (".lora." not in key), key


@typical_cases
def test_adapter_files(name, tmp_path):
    model, inputs = adapted(name).eval(), CASES[name].inputs()
    ll.save_adapter(model, tmp_path)
    fresh = base_model(name).eval()
    ll.load_adapter(fresh, tmp_path)
    assert equal(run(fresh, inputs), run(model, inputs))
    again = base_model(name).eval()
    ll.inject(again, config(name))
    ll.load_adapter(again, tmp_path)
    assert equal(run(again, inputs), run(model, inputs))


@typical_cases
def test_the_original_state_dict_still_loads(name):
    model, original = base_model(name), base_model(name).state_dict()
    ll.inject(model, config(name))
    result = model.load_state_dict(original, strict=False)
    assert not result.unexpected_keys and all(".lora." in n for n in result.missing_keys)


@typical_cases
def test_copies(name):
    model, inputs = adapted(name).eval(), CASES[name].inputs()
    run(model, inputs)
    wanted = run(model, inputs)
    twins = [copy.deepcopy(model), copy.deepcopy(copy.deepcopy(model)), pickled_if_possible(model)]
    if "-norm" not in name:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twins.append(torch.load(file, weights_only=False))
    for twin in twins:
        assert equal(run(twin, inputs), wanted)
        fill(twin), [p.data.mul_(2) for p in ll.lora_parameters(twin)]
        assert not equal(run(twin, inputs), wanted)
        ll.eject(twin)
    assert equal(run(model, inputs), wanted)


@typical_cases
@pytest.mark.parametrize("merged", [False, True])
def test_eject_gives_back_a_plain_model(name, merged):
    model, base, inputs = adapted(name).eval(), base_model(name).eval(), CASES[name].inputs()
    adapted_output = run(model, inputs)
    ll.eject(model, merged=merged)
    assert not lora_layers(model)
    assert all(p.requires_grad for p in model.parameters())
    if merged:
        for one, other in zip(run(model, inputs), adapted_output, strict=True):
            assert (one - other).abs().max() <= 1e-5 * other.abs().max()
        assert not any(isinstance(m, LoRALayer) for m in model.modules())
    else:
        assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()] or any(
            is_parametrized(m) for m in base.modules()
        )
        assert list(model.state_dict()) == list(base.state_dict())
        assert equal(run(model, inputs), run(base, inputs))
    for parameter in model.parameters():  # the plain layer computes with the parameters that it has
        parameter.data.mul_(0.5)
    assert not equal(run(model, inputs), adapted_output)
    loss(run(model.train(), inputs)).backward()
    if "EncoderLayer" not in name:
        assert all(p.grad is not None for p in model.parameters())
    ll.inject(model, config(name))
    assert equal(run(copy.deepcopy(model), inputs), run(model, inputs))


@typical_cases
def test_a_layer_called_twice_sums_its_gradients(name):
    model, inputs = adapted(name, torch.float64).eval(), CASES[name].inputs(torch.float64)
    loss(run(model, inputs)).backward()
    once = [p.grad.clone() for p in ll.lora_parameters(model)]
    model.zero_grad()
    (loss(run(model, inputs)) + 2 * loss(run(model, inputs))).backward()
    for parameter, gradient in zip(ll.lora_parameters(model), once, strict=True):
        torch.testing.assert_close(parameter.grad, 3 * gradient, rtol=1e-10, atol=1e-10)


@typical_cases
def test_gradient_checkpointing(name):
    model, inputs = adapted(name).train(), CASES[name].inputs()
    inputs = tuple(x.requires_grad_() if x.is_floating_point() else x for x in inputs)
    anchor = torch.ones((), requires_grad=True)  # reentrant checkpointing wants an input with a gradient
    loss(run(model, inputs)).backward()
    wanted = [p.grad.clone() for p in ll.lora_parameters(model)]
    for reentrant in (True, False):
        model.zero_grad()
        outputs = checkpoint(lambda _, *x: tuple(run(model, x)), anchor, *inputs, use_reentrant=reentrant)
        loss(outputs).backward()
        for parameter, gradient in zip(ll.lora_parameters(model), wanted, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)


@typical_cases
def test_empty_batch(name):
    def cut(t, dim):
        return t.narrow(dim, 0, 0)

    model, dim = adapted(name), CASES[name].batch
    if dim is None:
        pytest.skip("no batch")
    base = same_flags(name, model)
    inputs = tuple(cut(x, dim) for x in CASES[name].inputs())
    try:
        wanted = run(base, inputs)
    except (RuntimeError, ValueError) as error:
        pytest.skip(f"the base layer refuses it: {error}")
    got = run(model, inputs)
    assert [y.shape for y in got] == [y.shape for y in wanted]
    loss(got).backward()
    assert all(p.grad is not None and p.grad.eq(0).all() for p in ll.lora_parameters(model))


@typical_cases
def test_bfloat16_weights_keep_float32_updates(name):
    model, inputs = base_model(name, torch.bfloat16), CASES[name].inputs(torch.bfloat16)
    ll.inject(model.eval(), config(name))
    assert {p.dtype for p in ll.lora_parameters(model)} == {torch.float32}
    with torch.no_grad():
        assert equal(run(model, inputs), run(same_flags(name, model), inputs))
    fill(model)
    outputs = run(model, inputs)
    assert {y.dtype for y in outputs} == {torch.bfloat16}
    later = adapted(name).eval().bfloat16()
    assert {p.dtype for p in ll.lora_parameters(later)} == {torch.float32}
    for one, other in zip(run(later, inputs), outputs, strict=True):
        assert (one - other).abs().max() <= 0.02 * other.abs().max()
    loss(outputs).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ll.lora_parameters(model))
    exact, x = adapted(name), tuple(x.float() if x.is_floating_point() else x for x in inputs)
    for one, other in zip(outputs, run(exact.eval(), x), strict=True):
        assert (one - other).abs().max() <= 0.03 * other.abs().max()


@typical_cases
def test_autocast(name):
    model, inputs = adapted(name).eval(), CASES[name].inputs()
    base = same_flags(name, model)
    exact = run(model, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = run(model, inputs)
        dtypes = [y.dtype for y in run(base_model(name).eval(), inputs)]  # with gradients, as the adapted
        with ll.adapters_off(model), torch.no_grad():
            assert equal(run(model, inputs), run(base, inputs))
    assert [y.dtype for y in outputs] == dtypes
    loss([y.float() for y in outputs]).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ll.lora_parameters(model))
    for one, other in zip(outputs, exact, strict=True):
        assert (one - other).abs().max() <= 0.03 * other.abs().max()


@compiled_cases
def test_compile(name):
    torch._dynamo.reset()
    inputs = CASES[name].inputs()
    base = same_flags(name, adapted(name).train())
    try:
        run(torch.compile(base, backend="aot_eager", fullgraph=True), inputs)
        fullgraph = True
    except torch._dynamo.exc.Unsupported:
        fullgraph = False
    torch._dynamo.reset()
    model = adapted(name).train()
    wanted = run(model, inputs)
    gradients = torch.autograd.grad(loss(wanted), ll.lora_parameters(model))
    got = run(torch.compile(model, backend="aot_eager", fullgraph=fullgraph), inputs)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    compiled = torch.autograd.grad(loss(got), ll.lora_parameters(model))
    torch.testing.assert_close(compiled, gradients, rtol=1e-4, atol=1e-5)


@compiled_cases
def test_export(name):
    inputs = CASES[name].inputs()
    try:
        torch.export.export(same_flags(name, adapted(name).eval()), inputs)
    except Exception as error:
        pytest.skip(f"the base layer cannot be exported: {str(error)[:80]}")
    model = adapted(name).eval()
    exported = torch.export.export(model, inputs).module()
    torch.testing.assert_close(run(exported, inputs), run(model, inputs), rtol=1e-5, atol=1e-5)


@typical_cases
def test_meta_device(name):
    with torch.device("meta"):
        model = Model(name)
    if config(name).use_dora:
        with pytest.raises(ll.ConfigError, match="meta"):
            ll.inject(model, config(name))
        assert not lora_layers(model)
        return
    planned = ll.inject(model, config(name))
    assert planned == ll.plan(base_model(name), config(name))
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    for module in model.modules():
        for reset in ("_reset_parameters", "reset_parameters"):
            if hasattr(module, reset):
                getattr(module, reset)()
    for layer in lora_layers(model).values():
        for update in layer.lora["default"].values():
            W = update.slot.of(layer.base_weight(update.slot.parameter))
            assert update.product(W).eq(0).all()
            assert update.lora_A.any() or update.lora_B.any()
        if hasattr(layer.original_class, "reset_parameters") and not is_parametrized(layer):
            assert all(layer.base_weight(n).isfinite().all() for n in layer.properties)
