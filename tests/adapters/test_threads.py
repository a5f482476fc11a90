"""The choice of adapters holds for the calling thread and asyncio task alone; copies are settled models."""

import asyncio
import contextlib
import copy
import gc
import inspect
import io
import itertools
import pickle
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from lightning.pytorch import Trainer
from small import Classifier, cnn, encoder, mlp, vit
from test_mixed_batch import SAMPLES, assert_unchanged, batch, several, snapshot
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_lightning as ll


class Speech(nn.Module):
    """A convolution, a recurrent layer, and a head that the adapters train in full."""

    def __init__(self):
        super().__init__()
        self.front = nn.Conv1d(6, 8, 3, padding=1)
        self.layers = nn.ModuleList([nn.LSTM(8, 8, batch_first=True), nn.GRU(8, 8, batch_first=True)])
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.front(x.mT).mT
        for layer in self.layers:
            x = layer(x)[0]
        return self.head(x)


def speech() -> nn.Module:
    return Speech()


WAYS = {  # what a thread does, by the adapter that each row of its outputs has
    "off": (lambda model: ll.adapters_off(model), [None] * 6),
    "samples": (lambda model: ll.mixed_adapters(model, SAMPLES), SAMPLES),
    "others": (lambda model: ll.mixed_adapters(model, SAMPLES[::-1]), SAMPLES[::-1]),
    "one alike": (lambda model: ll.mixed_adapters(model, ["two"] * 6), ["two"] * 6),
    "nested": (lambda model: nested(model), ["three"] * 6),
    "select": (lambda model: selected(model, "two"), ["two"] * 6),
    "another": (lambda model: selected(model, "three"), ["three"] * 6),
    "plain": (lambda model: contextlib.nullcontext(), ["one"] * 6),
}


@contextlib.contextmanager
def nested(model):
    with ll.mixed_adapters(model, SAMPLES), ll.adapters_off(model), ll.mixed_adapters(model, ["three"] * 6):
        yield


@contextlib.contextmanager
def selected(model, name):
    ll.set_adapter(model, name)
    yield


def wanted(model, x):
    """The output of each row with each adapter, by itself and in one thread."""
    outputs = {None: None, "one": None, "two": None, "three": None}
    for name in outputs:
        if name is None:
            with ll.adapters_off(model):
                outputs[name] = model(x)
        else:
            ll.set_adapter(model, name)
            outputs[name] = model(x)
    ll.set_adapter(model, "one")
    return {way: torch.stack([outputs[n][i] for i, n in enumerate(rows)]) for way, (_, rows) in WAYS.items()}


@pytest.fixture
def hasty():
    """Threads give way to one another as often as can be."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def run(model, x, way, right, times, start) -> list[str]:
    wrong = []
    with torch.set_grad_enabled(way in ("samples", "select")):
        start.wait()
        for i in range(times):
            with WAYS[way][0](model):
                y = model(x)
            if not torch.allclose(y, right[way], rtol=1e-4, atol=1e-5):
                wrong.append(f"{way}, call {i}: {(y - right[way]).abs().max():.2g}")
    return wrong


def in_threads(model, x, ways, times) -> list[str]:
    right = wanted(model, x)
    start = threading.Barrier(len(ways))
    with ThreadPoolExecutor(len(ways)) as pool:
        runs = [pool.submit(run, model, x, way, right, times, start) for way in ways]
        return [fault for r in runs for fault in r.result()]


PAIRS = [*itertools.combinations(WAYS, 2), ("off", "off"), ("samples", "samples"), ("select", "select")]


@pytest.mark.parametrize("ways", PAIRS, ids="-".join)
def test_two_threads_have_each_their_own(ways, hasty):
    model = several(mlp)
    before = snapshot(model)
    assert in_threads(model, batch(mlp), ways, 6) == []
    if not {"select", "another"} & {*ways}:
        assert_unchanged(model, before)


@pytest.mark.slow
@pytest.mark.parametrize("build", [mlp, cnn, vit, encoder, speech])
@pytest.mark.parametrize("ways", PAIRS, ids="-".join)
def test_two_threads_have_each_their_own_at_length(build, ways, hasty):
    model = several(build)
    x = torch.randn(6, 5, 6) if build is speech else batch(build)
    assert in_threads(model, x, ways, 60) == []


@pytest.mark.parametrize("build", [cnn, vit, encoder, speech])
def test_all_at_once(build, hasty):
    model = several(build)
    x = torch.randn(6, 5, 6) if build is speech else batch(build)
    before = snapshot(model)
    assert in_threads(model, x, list(WAYS), 4) == []
    assert model.state_dict().keys() == before[0].keys()
    assert torch.backends.mha.get_fastpath_enabled()


def test_the_thread_of_the_model_selects_for_all_who_have_not(hasty):
    model, x = several(mlp), batch(mlp)
    right = wanted(model, x)
    stop, wrong = threading.Event(), []

    def others(way):
        start = threading.Barrier(1)
        while not stop.is_set():
            wrong.extend(run(model, x, way, right, 1, start))

    threads = [threading.Thread(target=others, args=(way,)) for way in ("off", "samples", "select")]
    for thread in threads:
        thread.start()
    with torch.no_grad():
        for name, way in [("two", "select"), ("three", "another"), ("one", "plain")] * 10:
            ll.set_adapter(model, name)
            with ThreadPoolExecutor(1) as pool:  # a thread that has selected nothing
                assert torch.allclose(pool.submit(model, x).result(), right[way], rtol=1e-4, atol=1e-5)
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_tasks_of_one_thread_have_each_their_own():
    model, x = several(vit), batch(vit)
    right = wanted(model, x)

    async def task(way):
        outputs = []
        with WAYS[way][0](model):
            for _ in range(3):
                await asyncio.sleep(0)
                outputs.append(model(x))
            outputs.append(await asyncio.to_thread(model, x))  # takes the task's context along
        return [way for y in outputs if not torch.allclose(y, right[way], rtol=1e-4, atol=1e-5)]

    async def all_tasks():
        return await asyncio.gather(*(task(way) for way in WAYS))

    assert asyncio.run(all_tasks()) == [[]] * len(WAYS)
    assert torch.allclose(model(x), right["plain"], rtol=1e-4, atol=1e-5)


def test_a_thread_that_selected_sees_what_the_adapter_becomes_and_that_it_is_gone():
    model, x = several(mlp), batch(mlp)
    with ThreadPoolExecutor(1) as pool, torch.no_grad():
        pool.submit(ll.set_adapter, model, "two").result()
        ll.set_adapter(model, "two")
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.1)
        changed = model(x)
        ll.set_adapter(model, "one")
        torch.testing.assert_close(pool.submit(model, x).result(), changed)
        ll.delete_adapter(model, "two")
        with pytest.raises(ll.UserError, match="no adapter 'two'"):
            pool.submit(model, x).result()
        pool.submit(ll.set_adapter, model, "three").result()
        ll.eject(model)
        assert torch.equal(pool.submit(model, x).result(), model(x))


def test_a_fit_trains_the_models_own_choice_in_a_thread_that_had_another():
    model = several(lambda: Classifier(vit()), train_bias="none")

    def fit():
        ll.set_adapter(model, "two")
        callback = ll.LoRACallback(model.lora_state.config, verbose=False)
        callback.setup(Trainer(logger=False, enable_checkpointing=False, accelerator="cpu"), model, "fit")
        return model(x), model.lora_state.active

    x = batch(vit)
    plain = model(x)
    with ThreadPoolExecutor(1) as pool:
        y, active = pool.submit(fit).result()
    assert active == ("one",)
    assert torch.equal(y, plain)


def test_what_changes_the_model_for_all_waits_for_the_contexts_of_others():
    model = several(mlp)
    inside, leave = threading.Event(), threading.Event()

    def hold():
        with ll.adapters_off(model):
            inside.set()
            leave.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait()
    acts = [
        lambda: ll.add_adapter(model, "four"),
        lambda: ll.delete_adapter(model, "two"),
        lambda: ll.merge(model),
        lambda: ll.eject(model),
    ]
    before = snapshot(model)
    for act in acts:
        with pytest.raises(ll.UserError, match=r"another thread or task is within adapters_off\(model\)"):
            act()
    assert_unchanged(model, before)
    ll.set_adapter(model, "two")
    leave.set()
    thread.join()
    ll.set_adapter(model, "one")
    with ThreadPoolExecutor(1) as pool:
        pool.submit(ll.set_adapter, model, "two").result()
        for act in acts:
            with pytest.raises(ll.UserError, match="selected adapters for itself alone"):
                pool.submit(act).result()
    for act in acts:
        act()


@pytest.mark.parametrize("build", [mlp, vit, encoder, speech])
@pytest.mark.parametrize("way", WAYS)
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
