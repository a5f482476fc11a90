"""Trainer checkpoints that are damaged, edited, foreign, locked or no files: one error of ours each, before
weights are touched; and bits that mean nothing change nothing."""

import contextlib
import os
import random
import stat

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from small import Classifier, loader, save_checkpoint, trainer

import lora_lightning as ll
from lora_lightning.app.inspect import inspect
from lora_lightning.app.rebuild import merge_files
from lora_lightning.files.checkpoint_digests import DIGESTS, KEY, check_digests, content_digest
from lora_lightning.utils.torch_file import read_torch

GIVE = "Give another."


def fitted(folder, *callbacks, **options):
    module = Classifier()
    run = trainer(folder, ll.LoRACallback(rank=2, verbose=False), *callbacks, max_epochs=1, **options)
    run.fit(module, loader())
    return module, run


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint with everything, and what is loaded from it."""
    folder = tmp_path_factory.mktemp("saved")
    _, run = fitted(folder, enable_checkpointing=False)
    run.save_checkpoint(folder / "whole.ckpt")
    return folder / "whole.ckpt", state_of(folder / "whole.ckpt")


def state_of(path):
    return {n: t.clone() for n, t in ll.load_from_checkpoint(Classifier, path).state_dict().items()}


def refused_or_the_same(path, wanted):
    """Whether it is refused; what loads is what was saved."""
    try:
        found = state_of(path)
    except ll.AdapterFileError:
        return True
    assert found.keys() == wanted.keys() and all(torch.equal(t, wanted[n]) for n, t in found.items())
    return False


@pytest.mark.parametrize("count", [60, pytest.param(3_000, marks=pytest.mark.slow)])
def test_no_flipped_bit_and_no_cut_goes_unseen(count, saved, tmp_path):
    whole, wanted = saved
    raw, numbers = whole.read_bytes(), random.Random(count)
    path = tmp_path / "x.ckpt"
    refused = 0
    for i in range(count):
        damaged = bytearray(raw)
        if i % 3:
            damaged[numbers.randrange(len(raw))] ^= 1 << numbers.randrange(8)
        else:
            damaged = damaged[: numbers.randrange(len(raw))]
        path.write_bytes(damaged)
        refused += refused_or_the_same(path, wanted)
    assert refused > 0.85 * count  # the others flipped bits of padding


def test_an_archive_that_names_several_disks_is_damaged(saved, tmp_path):
    raw = bytearray(saved[0].read_bytes())
    raw[raw.rindex(b"PK\x06\x07") + 16] ^= 2  # how many disks there are; Python's zipfile raises
    (tmp_path / "x.ckpt").write_bytes(raw)
    with pytest.raises(ll.AdapterFileError, match=r"x\.ckpt is damaged"):
        state_of(tmp_path / "x.ckpt")


def edited(path, target, change):
    """The checkpoint with something else in it, and the checksums of before."""
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, target)
    return target


def adapter_of(checkpoint):
    return checkpoint[KEY]["adapters"]["default"]


def first(checkpoint, ending):
    return next(t for n, t in checkpoint["state_dict"].items() if n.endswith(ending))


EDITS = {
    "NaN": lambda c: first(c, "lora_B").fill_(float("nan")),
    "update": lambda c: first(c, "lora_A").view(-1)[0].mul_(1.5),
    "head": lambda c: first(c, "9.weight").view(-1)[0].add_(1),
    "alpha": lambda c: [p.update(alpha=p["alpha"] + 1) for p in adapter_of(c)["plan"]["layers"]],
    "config": lambda c: adapter_of(c)["config"].update(use_rslora=True),
    "base": lambda c: c[KEY].update(fingerprint={}),
    "optimizer": lambda c: [s["exp_avg"].add_(1) for s in c["optimizer_states"][0]["state"].values()],
    "rate": lambda c: c["optimizer_states"][0]["param_groups"][0].update(lr=1.0),
    "progress": lambda c: c["loops"]["fit_loop"]["epoch_progress"]["total"].update(ready=7),
    "random": lambda c: c["lora_lightning_progress"]["processes"][0]["random"]["torch"][0].add_(1),
    "lost": lambda c: c[KEY].pop(DIGESTS),
}


@pytest.mark.parametrize("change", EDITS)
def test_an_edited_checkpoint_is_refused_everywhere(change, saved, tmp_path):
    path = edited(saved[0], tmp_path / "edited.ckpt", EDITS[change])
    told = "lost its checksums" if change == "lost" else "was edited: the checksum of"
    for use in (
        lambda: ll.load_from_checkpoint(Classifier, path),
        lambda: merge_files(path, tmp_path / "out.safetensors"),
        lambda: inspect(path),
    ):
        with pytest.raises(ll.AdapterFileError, match=told):
            use()
    for verb in ("fit", "validate", "test", "predict") if change in ("NaN", "alpha") else ("fit",):
        module = Classifier()
        before = {n: t.clone() for n, t in module.model.state_dict().items()}
        run = trainer(tmp_path, ll.LoRACallback(rank=2, verbose=False), enable_checkpointing=False)
        with pytest.raises(ll.AdapterFileError, match=told):
            getattr(run, verb)(module, loader(), ckpt_path=path, weights_only=True)
        after = module.model.state_dict()
        assert all(torch.equal(t, after[n]) for n, t in before.items())


def test_what_is_taken_out_to_save_room_is_not_missed(saved, tmp_path):
    path = edited(saved[0], tmp_path / "small.ckpt", lambda c: c.pop("optimizer_states"))
    assert not refused_or_the_same(path, saved[1])


class Noting(pl.Callback):
    """Adds to a checkpoint and changes one in its hooks, before and after ours."""

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        checkpoint["mine"] = {"a": [torch.ones(2), (1, 2.5, None, "x")], 3: b"bytes"}
        checkpoint["state_dict"] = dict(reversed(checkpoint["state_dict"].items()))


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("weights_only", [False, True])
def test_the_checksums_are_of_what_is_written(order, weights_only, tmp_path):
    """With averages in the place of weights, entries of other callbacks, and a writer of its own thread."""
    callbacks = [ll.LoRACallback(rank=2, verbose=False), EMAWeightAveraging(decay=0.9), Noting()][::order]
    save = ModelCheckpoint(tmp_path, "x", save_weights_only=weights_only)
    run = trainer(tmp_path, *callbacks, save, max_epochs=1, plugins=[AsyncCheckpointIO()])
    run.fit(Classifier(), loader())
    checkpoint = read_torch(tmp_path / "x.ckpt", GIVE)
    assert checkpoint[KEY][DIGESTS].keys() == checkpoint.keys()
    assert ("averaging_state" in checkpoint and "mine" in checkpoint) is not weights_only
    check_digests(checkpoint, "x")
    run.validate(Classifier(), loader(), ckpt_path=tmp_path / "x.ckpt", verbose=False)
    checkpoint["state_dict"]["model.9.bias"][0] += 1
    with pytest.raises(ll.AdapterFileError, match="the checksum of state_dict does not match"):
        check_digests(checkpoint, "x")


def test_a_digest_tells_types_and_places_apart():
    shared = [1]
    trees = [
        1, 1.0, True, None, "1", b"1", [1], [[1]], {1: 2}, {"1": 2}, [], {}, "", torch.ones(1),
        torch.ones(1, 1), torch.ones(1).double(), torch.zeros(0), {"a": [1], "b": 2}, {"a": [1, "b", 2]},
        [shared, shared],
        torch.tensor(1.0), torch.tensor(True), float("nan"), 1j, {3, 1}, {1},
    ]  # fmt: skip
    assert len({content_digest(t) for t in trees}) == len(trees)
    assert content_digest((1, torch.arange(6).view(2, 3).t())) == content_digest(
        [1, torch.tensor([[0, 3], [1, 4], [2, 5]])]
    )
    own: list = []
    own.append(own)
    assert content_digest(own) != content_digest([])


def test_a_claim_of_terabytes_takes_neither_memory_nor_time(saved, tmp_path):
    path = tmp_path / "claim.ckpt"
    checkpoint = torch.load(saved[0], weights_only=True)
    name = next(n for n in checkpoint["state_dict"] if n.endswith("lora_A"))
    checkpoint["state_dict"][name] = torch.zeros(1).expand(10**12)
    save_checkpoint(checkpoint, path)
    with pytest.raises(ll.AdapterFileError, match=r"lora_A"):
        ll.load_from_checkpoint(Classifier, path)


def odd_files(folder):
    """(path, what is said)"""
    (folder / "empty.ckpt").touch()
    (folder / "text.ckpt").write_text("no checkpoint")
    (folder / "folder.ckpt").mkdir()
    (folder / "link.ckpt").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "pipe.ckpt")
    os.mknod(folder / "socket.ckpt", stat.S_IFSOCK | 0o600)
    torch.save([1, 2], folder / "list.ckpt")
    torch.save(torch.nn.Linear(2, 2), folder / "code.ckpt")
    return [
        ("empty.ckpt", "is empty"),
        ("text.ckpt", "cut short or not a checkpoint"),
        ("folder.ckpt", "is a folder"),
        ("link.ckpt", "is a link that leads nowhere"),
        ("pipe.ckpt", "is a pipe"),
        ("socket.ckpt", "a socket"),
        ("code.ckpt", "holds code; nothing in it was run"),
        ("empt.ckpt", "does not exist.*Did you mean .*empty.ckpt"),
        ("no\0name.ckpt", "cannot be read: embedded null byte"),
        ("list.ckpt", "is not a Trainer's checkpoint: it has no state_dict"),
    ]


def test_odd_files_are_named(tmp_path):
    for name, told in odd_files(tmp_path):
        path = str(tmp_path / name)
        with pytest.raises(ll.AdapterFileError, match=told):
            ll.load_from_checkpoint(Classifier, path)
        if name != "folder.ckpt":
            with pytest.raises(ll.AdapterFileError, match=told):
                inspect(path)
        if name != "no\0name.ckpt":
            run = trainer(tmp_path, ll.LoRACallback(rank=2, verbose=False), enable_checkpointing=False)
            with pytest.raises(ll.AdapterFileError, match=told):
                run.validate(Classifier(), loader(), ckpt_path=path, weights_only=True)


def test_a_locked_file_is_named(saved, tmp_path, monkeypatch):
    def locked(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("lora_lightning.utils.torch_file.open", locked, raising=False)
    with pytest.raises(ll.AdapterFileError, match=r"whole.ckpt cannot be read: Permission denied\. Give"):
        ll.load_from_checkpoint(Classifier, saved[0])


def test_a_file_without_torchs_own_checksums_is_still_checked_by_ours(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        _, run = fitted(tmp_path, enable_checkpointing=False)
        run.save_checkpoint(tmp_path / "x.ckpt")
    finally:
        torch.serialization.set_crc32_options(True)
    wanted = state_of(tmp_path / "x.ckpt")
    raw = bytearray((tmp_path / "x.ckpt").read_bytes())
    at = raw.find(wanted["model.9.weight"].numpy().tobytes())
    raw[at + 5] ^= 1
    (tmp_path / "y.ckpt").write_bytes(raw)
    with pytest.raises(ll.AdapterFileError, match="the checksum of state_dict does not match"):
        ll.load_from_checkpoint(Classifier, tmp_path / "y.ckpt")


def layer(checkpoint):
    return adapter_of(checkpoint)["plan"]["layers"][0]


FORGED = [
    (lambda c: layer(c).update(rank=10**9), r"lora_A: .1000000000, 8, 3, 3. in the model"),
    (lambda c: layer(c).update(rank=-1), "another kind"),
    (lambda c: layer(c).update(rank=2.0), "another kind"),
    (lambda c: layer(c).update(alpha=float("nan")), "another kind"),
    (lambda c: layer(c).update(alpha=10**400), "damaged|another kind"),
    (lambda c: layer(c).update(shape=[10**9, 10**9]), "in the file"),
    (lambda c: layer(c).update(module="nowhere"), "no layer model.3.*Build all layers"),
    (lambda c: adapter_of(c)["plan"].update(heads=["x"]), "no module x"),
    (lambda c: adapter_of(c)["plan"].update(layers=3), "damaged"),
    (lambda c: adapter_of(c)["config"].update(rank=0), "rank=0"),
    (lambda c: adapter_of(c)["config"].update(extra=1), "extra"),
    (lambda c: adapter_of(c)["slots"].clear(), "damaged"),
    (lambda c: adapter_of(c).update(extra_trainables=[1]), "what was trained"),
    (lambda c: adapter_of(c).update(values=3), "what was trained"),
    (lambda c: c[KEY].update(active=[["default"]]), "which adapters"),
    (lambda c: c[KEY].update(active=["other"]), "which adapters"),
    (lambda c: c[KEY].update(adapters={"a b": adapter_of(c)}), "which adapters"),
    (lambda c: c[KEY].update(version=9), "version 9.*Upgrade"),
    (lambda c: c[KEY].update(training=[]), "training"),
    (lambda c: c.update(state_dict=[]), "no state_dict"),
    (lambda c: c.update({KEY: 3}), "damaged|no adapter"),
    (lambda c: c["state_dict"].update({"model.3.lora.default.weight.lora_A": "x"}), "lora_A is missing"),
    (lambda c: c["state_dict"].pop("model.9.bias"), "Missing key.*model.9.bias"),
    (lambda c: first(c, "lora_B").fill_(float("nan")), "lora_B holds NaN or infinity"),
    (lambda c: first(c, "9.weight")[0].fill_(float("inf")), "9.weight holds NaN or infinity"),
]


@pytest.mark.parametrize(("change", "told"), FORGED)
def test_a_forged_checkpoint_with_right_checksums_is_refused(change, told, saved, tmp_path):
    path = tmp_path / "forged.ckpt"
    checkpoint = torch.load(saved[0], weights_only=True)
    change(checkpoint)
    if isinstance(checkpoint[KEY], dict):
        save_checkpoint(checkpoint, path)
    else:
        torch.save(checkpoint, path)
    with pytest.raises(ll.AdapterFileError, match=told):
        ll.load_from_checkpoint(Classifier, path)
    with contextlib.suppress(ll.UserError):  # some are found by the model alone
        inspect(path)
    with contextlib.suppress(ll.UserError):
        merge_files(path, tmp_path / "out.safetensors")


def test_a_plan_of_other_layers_is_refused_before_it_is_built_in_a_fit(saved, tmp_path):
    path = tmp_path / "forged.ckpt"
    checkpoint = torch.load(saved[0], weights_only=True)
    layer(checkpoint).update(rank=10**9)
    save_checkpoint(checkpoint, path)
    run = trainer(tmp_path, ll.LoRACallback(rank=2, verbose=False), enable_checkpointing=False)
    with pytest.raises(ll.AdapterFileError, match="1000000000"):
        run.fit(Classifier(), loader(), ckpt_path=path, weights_only=True)
