"""Files that claim what is not so: forged descriptions and sizes, values that are not finite, no files."""

import json
import multiprocessing
import os
import resource
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from seeded import adapter, base
from torch import nn

import lora_lightning as ll
from lora_lightning.files.format import read_adapter, write_adapter
from lora_lightning.files.merge import merge_state
from lora_lightning.files.pair import CONFIG_FILE, TENSOR_FILE, digest_of


def forged(folder, target, change):
    """An adapter whose description was changed and given a right digest: damage of a clever kind."""
    saved = read_adapter(folder)
    about = json.loads(json.dumps(saved.description()))
    change(about)
    digest = digest_of(about, saved.tensors)
    target.mkdir()
    save_file(saved.tensors, target / TENSOR_FILE, {"format": "pt", "sha256": digest})
    (target / CONFIG_FILE).write_text(json.dumps({**about, "sha256": digest}))
    return target


FORGED = [
    (lambda a: [layer.update(rank=10**9) for layer in a["plan"]["layers"]], "1000000000"),
    (lambda a: a["plan"]["layers"][0].update(shape=[10**9, 10**9]), "in the file"),
    (lambda a: a["plan"]["layers"][0].update(rank=-1), "another kind"),
    (lambda a: a["plan"]["layers"][0].update(rank=2.0), "another kind"),
    (lambda a: a["plan"]["layers"][0].update(alpha="x"), "another kind"),
    (lambda a: a["plan"]["layers"][0].update(name="5.lora"), "damaged"),
    (lambda a: a["plan"]["layers"][0].update(module="nowhere"), "no layer|damaged"),
    (lambda a: a["plan"]["layers"].append(a["plan"]["layers"][0]), "twice"),
    (lambda a: a["plan"].update(layers=[{}] * 10**5), "damaged"),
    (lambda a: a["plan"].update(heads=["x"]), "no module x"),
    (lambda a: a["plan"].update(heads="x"), "another kind"),
    (lambda a: a["plan"].update(backbone="x"), "no backbone x"),
    (lambda a: a["slots"]["0"].update(groups=2), "in the model"),
    (lambda a: a["slots"]["0"].update(groups=0), "groups=0"),
    (lambda a: a["slots"]["0"].update(out_range=[5, 2]), "out_range="),
    (lambda a: a["slots"]["0"].update(parameter=3), "parameter=3"),
    (lambda a: a["slots"]["0"].update(unknown=3), "damaged"),
    (lambda a: a["config"].update(rank=10**30, target_modules="a{9999999999}"), "damaged|problem"),
    (lambda a: a["config"].update(dropout=float("nan")), "dropout"),
    (lambda a: a["config"].update(extra=1), "extra"),
    (lambda a: a["config"].update(use_dora=True), "lora_magnitude is missing"),
    (lambda a: a["plan"]["layers"][0].update(mixed=[["a", 1], ["b", 1]], fixed=1), "another kind"),
    (
        lambda a: (
            a["config"].update(use_dora=True),
            a["plan"]["layers"][0].update(mixed=[["a", 1], ["b", 1]]),
        ),
        "mixture, which has no DoRA",
    ),
    (lambda a: a.update(fingerprint={"x": 1}), "base"),
    (lambda a: a.update(fingerprint=[]), "base"),
    (lambda a: a.update(config=[]), "damaged"),
    (lambda a: a.update(plan="x" * 1000), "damaged"),
]


@pytest.mark.parametrize(("change", "told"), FORGED)
def test_a_forged_description_is_refused(change, told, tmp_path):
    adapter(tmp_path / "one", 1)
    folder = forged(tmp_path / "one", tmp_path / "forged", change)
    model = base()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises((ll.AdapterFileError, ll.ConfigError), match=told):
        ll.load_adapter(model, folder)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert not hasattr(model, "lora_state")


def test_updates_that_are_not_finite_are_neither_saved_nor_loaded(tmp_path):
    adapter(tmp_path / "one", 1)
    saved = read_adapter(tmp_path / "one")
    saved.tensors["0.lora_A"][0, 0] = float("inf")
    write_adapter(tmp_path / "broken", saved)
    with pytest.raises(ll.AdapterFileError, match=r"0.lora_A holds NaN or infinity"):
        ll.load_adapter(base(), tmp_path / "broken")
    model = base()
    ll.inject(model, ll.LoRAConfig(rank=2))
    with torch.no_grad():
        ll.lora_parameters(model)[0].fill_(float("nan"))
    with pytest.raises(ll.UserError, match=r"0.lora_A holds NaN or infinity.*Nothing was written"):
        ll.save_adapter(model, tmp_path / "one")
    ll.load_adapter(base(), tmp_path / "one")


@pytest.mark.parametrize("name", ["1.weight", "1.running_mean", "3.bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_heads_norms_and_statistics_that_are_not_finite_are_neither_saved_nor_merged(name, value, tmp_path):
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 3))
    weights = {n: t.clone() for n, t in net.state_dict().items()}
    ll.inject(net, ll.LoRAConfig(rank=2, target_modules=["0", "2"], modules_to_save=["3"], train_norm="both"))
    tensor = net.state_dict()[name]
    good = tensor.clone()
    ll.save_adapter(net, tmp_path)
    tensor[1] = value
    for format in ("lora_lightning", "peft"):
        with pytest.raises(ll.UserError, match=f"{name} holds NaN or infinity.*Nothing was written"):
            ll.save_adapter(net, tmp_path, format=format)
    tensor.copy_(good)
    saved = read_adapter(tmp_path)
    saved.tensors[name][1] = value
    with pytest.raises(ll.UserError, match=f"{name}: merged it would hold NaN or infinity"):
        merge_state(saved, weights)
    write_adapter(tmp_path, saved)
    with pytest.raises(ll.AdapterFileError, match=f"{name} holds NaN or infinity"):
        ll.load_adapter(net, tmp_path)


def load_within(memory, folders, answers):
    """In a process of its own, with so many bytes above what it has already."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
    model = base()
    for folder in folders:
        try:
            ll.load_adapter(model, folder)
            answers.put("loaded")
        except ll.AdapterFileError as error:
            answers.put(str(error))
        except BaseException as error:
            answers.put(repr(error))


def test_no_claim_of_a_size_takes_memory(tmp_path):
    """Half a GiB above what the program takes is enough to refuse terabytes, and a plan of millions."""
    adapter(tmp_path / "one", 1)
    whole = (tmp_path / "one" / TENSOR_FILE).read_bytes()
    text = (tmp_path / "one" / CONFIG_FILE).read_bytes()
    header = {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    claims = json.dumps(header).encode()
    folders = []
    for name, files in {
        "terabytes": (struct.pack("<Q", len(claims)) + claims, text),
        "header": (struct.pack("<Q", 2**50) + whole[8:], text),
        "layers": (whole, b'{"format": "lora_lightning", "plan": [' + b"{}," * 4_000_000 + b"{}]}"),
        "config": (whole, b'{"x": "' + b"x" * 2**26 + b'"}'),
        "deep": (whole, b"[" * 10**6),
        "number": (whole, b'{"format": ' + b"9" * 10**6 + b"}"),
    }.items():
        folders.append(tmp_path / name)
        folders[-1].mkdir()
        for file, data in zip((TENSOR_FILE, CONFIG_FILE), files):
            (folders[-1] / file).write_bytes(data)
    forged_rank = forged(
        tmp_path / "one", tmp_path / "rank", lambda a: [p.update(rank=10**9) for p in a["plan"]["layers"]]
    )
    folders.append(forged_rank)
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    process = context.Process(target=load_within, args=(2**29, folders, answers))
    process.start()
    for folder in folders:
        assert str(folder) in (answer := answers.get()) and "Error(" not in answer, answer
    process.join()
    assert process.exitcode == 0


def test_things_that_are_no_files(tmp_path, monkeypatch):
    adapter(tmp_path / "one", 1)
    (tmp_path / "link").symlink_to(tmp_path / "one")
    ll.load_adapter(base(), tmp_path / "link")
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in (CONFIG_FILE, TENSOR_FILE):  # as in the cache of a hub
        (linked / name).symlink_to(tmp_path / "one" / name)
    ll.load_adapter(base(), linked)
    broken, folder, file = tmp_path / "broken", tmp_path / "folder", tmp_path / "file"
    broken.mkdir()
    (broken / CONFIG_FILE).symlink_to(tmp_path / "nowhere")
    with pytest.raises(ll.AdapterFileError, match=r"adapter_config.json is a link that leads nowhere"):
        ll.load_adapter(base(), broken)
    (folder / CONFIG_FILE).mkdir(parents=True)
    pipe = tmp_path / "pipe"
    pipe.mkdir()
    os.mkfifo(pipe / CONFIG_FILE)
    with pytest.raises(ll.AdapterFileError, match=r"adapter_config.json is a pipe"):  # and does not wait
        ll.load_adapter(base(), pipe)
    with pytest.raises(ll.AdapterFileError, match="is a folder, not a file"):
        ll.load_adapter(base(), folder)
    with pytest.raises(OSError, match="a folder stands in the place of the file"):
        adapter(folder, 1)
    assert sorted(p.name for p in folder.iterdir()) == [CONFIG_FILE]
    file.touch()
    with pytest.raises(ll.AdapterFileError, match=r"adapter_config.json does not exist\. Give a folder"):
        ll.load_adapter(base(), file)
    with pytest.raises(OSError, match="cannot be written: a file stands in the place of the folder"):
        adapter(file, 1)

    def denied(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("lora_lightning.files.pair.Path.read_bytes", denied)
    with pytest.raises(ll.AdapterFileError, match="cannot be read: Permission denied"):
        ll.load_adapter(base(), tmp_path / "one")
    monkeypatch.setattr("lora_lightning.files.pair.open", denied, raising=False)
    with pytest.raises(ll.AdapterFileError, match="cannot be read: Permission denied"):
        ll.load_adapter(base(), tmp_path / "one")
