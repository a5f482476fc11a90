"""How an adapted layer runs, for every family: twice, checkpointed, empty, in half precision, compiled."""

import pytest
import torch
from families import (
    CASES,
    adapted,
    base_model,
    check_merging,
    compiled_cases,
    config,
    equal,
    fill,
    loss,
    run,
    same_flags,
    typical_cases,
)
from torch.utils.checkpoint import checkpoint

import lora_lightning as ll


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


@typical_cases
def test_merging_half_precision_weights(name):
    check_merging(adapted(name, torch.bfloat16).eval(), CASES[name].inputs(torch.bfloat16), 0.03)


@compiled_cases
def test_compile(name):
    """In one graph where the base is one."""

    def compiled(model, fullgraph):
        torch._dynamo.reset()
        return run(torch.compile(model, backend="aot_eager", fullgraph=fullgraph), inputs)

    model, inputs = adapted(name).train(), CASES[name].inputs()
    try:
        got = compiled(model, fullgraph=True)
    except torch._dynamo.exc.Unsupported:
        with pytest.raises(torch._dynamo.exc.Unsupported):
            compiled(same_flags(name, model), fullgraph=True)
        got = compiled(model, fullgraph=False)
    wanted = run(model, inputs)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    gradients, plain = (torch.autograd.grad(loss(y), ll.lora_parameters(model)) for y in (got, wanted))
    torch.testing.assert_close(gradients, plain, rtol=1e-4, atol=1e-5)


@compiled_cases
def test_export(name):
    model, inputs = adapted(name).eval(), CASES[name].inputs()
    try:
        exported = torch.export.export(model, inputs).module()
    except Exception as error:
        with pytest.raises(type(error)):
            torch.export.export(same_flags(name, model), inputs)
        pytest.skip(f"the base layer cannot be exported: {str(error)[:80]}")
    torch.testing.assert_close(run(exported, inputs), run(model, inputs), rtol=1e-5, atol=1e-5)
