"""The choice of adapters holds for the calling thread and asyncio task alone; copies are settled models."""

import asyncio
import itertools
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from lightning.pytorch import Trainer
from mixed import assert_unchanged, batch, several, snapshot
from small import Classifier, cnn, encoder, mlp, vit
from ways import WAYS, speech, wanted

import lora_lightning as ll


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
