"""Contexts beyond their own lines: copies made in them, checkpointed parts, autograd's threads, classes."""

import copy
import gc
import inspect
import io
import pickle
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from mixed import assert_unchanged, batch, several, snapshot
from small import encoder, mlp, vit
from torch import nn
from torch.utils.checkpoint import checkpoint
from ways import WAYS, speech, wanted

import lora_lightning as ll

BUILDS = (mlp, vit, encoder, speech)


@pytest.mark.parametrize(
    ("build", "way"),
    [
        pytest.param(build, way, marks=[] if i % len(BUILDS) == j else pytest.mark.slow)
        for i, way in enumerate(WAYS)
        for j, build in enumerate(BUILDS)
    ],
)
def test_a_copy_made_in_a_context_is_a_settled_model(build, way):
    model = several(build)
    x = torch.randn(6, 5, 6) if build is speech else batch(build)
    before = snapshot(model)
    plain = model(x)
    with WAYS[way][0](model):
        saved = io.BytesIO()
        torch.save(model, saved)
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    copies.append(torch.load(io.BytesIO(saved.getvalue()), weights_only=False))
    ll.set_adapter(model, "one")
    assert_unchanged(model, before)
    right = wanted(model, x)[way] if way in ("select", "another") else plain
    for twin in copies:
        assert torch.equal(twin(x), right)
        assert [*map(type, twin.modules())] == [*map(type, model.modules())]
        ll.set_adapter(twin, "two")
        assert torch.equal(model(x), plain)


def test_checkpointed_parts_are_computed_again_by_the_view_of_their_forward():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([mlp() for _ in range(2)])
            self.again = False

        def forward(self, x):
            for block in self.blocks:
                x = torch.nn.functional.pad(block(x), (0, 3)) if not self.again else torch.nn.functional.pad(
                    checkpoint(block, x, use_reentrant=False), (0, 3))  # fmt: skip
            return x

    model = several(Checkpointed, ("two", "one"), modules_to_save=None, train_norm="frozen")
    x = batch(mlp).requires_grad_()
    for way in ("samples", "off", "one alike"):
        gradients = []
        for model.again in (False, True):
            model.zero_grad()
            with WAYS[way][0](model):
                y = model(x)
            y.square().sum().backward()  # after the context
            gradients.append(
                {n: p.grad for n, p in [("x", x), *model.named_parameters()] if p.grad is not None}
            )
            x.grad = None
        torch.testing.assert_close(*gradients)
        assert len(gradients[0]) > 1 or way == "off"


def test_a_context_that_is_left_elsewhere_holds_no_more():
    model, x = several(mlp), batch(mlp)
    plain, before = model(x), snapshot(model)
    context = ll.adapters_off(model)
    context.__enter__()
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(model, x).result(), plain)
        with pytest.raises(ll.UserError, match="enter and leave it where the model is called"):
            pool.submit(context.__exit__, None, None, None).result()
    assert_unchanged(model, before)
    for _ in range(2):  # also while another context is open
        assert torch.equal(model(x), plain)
        with ThreadPoolExecutor(1) as pool:
            other = ll.adapters_off(model)
            pool.submit(other.__enter__).result()
            assert torch.equal(model(x), plain)
            pool.submit(other.__exit__, None, None, None).result()
    ll.merge(model)


class Deep(torch.autograd.Function):
    """Its backward calls backward again, `depth` times; deep down torch takes a thread of its own."""

    @staticmethod
    def forward(ctx, x, act, depth):
        ctx.act, ctx.depth = act, depth
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            x = torch.ones(1, requires_grad=True)
            if ctx.depth:
                Deep.apply(x, ctx.act, ctx.depth - 1).backward()
            else:
                ctx.act()
        return grad, None, None


def test_threads_of_autograd_see_what_their_caller_does():
    torch_hands_on = "_stash_obj_in_tls" in inspect.getsource(torch.autograd.graph._engine_run_backward)
    model, x, seen = several(mlp), batch(mlp), []

    def act():
        seen.append((threading.current_thread(), model(x).detach()))

    right = wanted(model, x)
    for way in ("off", "samples", "plain"):
        with WAYS[way][0](model):
            y = Deep.apply(torch.ones(1, requires_grad=True), act, 61)
            if way != "plain" and not torch_hands_on:
                with pytest.raises(ll.UserError, match=r"use_reentrant=False, or torch 2\.14"):
                    y.backward()
                continue
            y.backward()
        thread, y = seen.pop()
        assert thread is not threading.current_thread()
        torch.testing.assert_close(y, right[way], rtol=1e-4, atol=1e-5)


def test_classes_are_let_go_with_the_models_that_had_them():
    gone = []
    for _ in range(3):

        class Own(nn.Linear):
            pass

        model = nn.Sequential(Own(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        ll.inject(model, ll.LoRAConfig(rank=1, modules_to_save=["2"]))
        with ll.adapters_off(model):
            model(torch.randn(3, 4))
        gone += [weakref.ref(Own), weakref.ref(type(model[0]))]
    assert gone[-1]() is type(model[0])
    del model, Own
    gc.collect()
    assert [reference() for reference in gone] == [None] * 6
