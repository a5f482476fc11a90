"""Nothing in a checkpoint, an adapter, a merged file or a picture is executed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra.utils import instantiate
from omegaconf import OmegaConf
from payloads import (
    NODES,
    config_for,
    npy,
    pickled,
    refusal,
    use,
)
from safetensors.torch import save_file
from small import Classifier, loader, mlp, trainer

import lora_lightning as ll
from lora_lightning.app.check import checkpoint_problems
from lora_lightning.app.inspect import inspect
from lora_lightning.app.rebuild import merge_files
from lora_lightning.data.decoding import opened_image
from lora_lightning.data.detection import read_image
from lora_lightning.data.findings import DataError
from lora_lightning.files.checkpoint_digests import KEY, add_digests
from lora_lightning.files.locate import read_source
from lora_lightning.files.pair import CONFIG_FILE, TENSOR_FILE, digest_of, read_tensors


class Obedient(Classifier):
    """A module that has Hydra build what its hyperparameters say."""

    def __init__(self, net: Any = None, lr: float = 0.05) -> None:
        super().__init__(lr=lr)
        self.save_hyperparameters()
        if net:
            instantiate(OmegaConf.create(net))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("fit")
    fitted = trainer(
        folder, ll.LoRACallback(rank=2), max_epochs=1, limit_train_batches=1, enable_checkpointing=False
    )
    fitted.fit(Obedient(), loader())
    fitted.save_checkpoint(folder / "x.ckpt", weights_only=True)
    return torch.load(folder / "x.ckpt", weights_only=True)


def save_forged(checkpoint: dict[str, Any], path: Path, key: str, values: dict[str, Any]) -> None:
    """With other hyperparameters, and the checksums that belong to them."""
    forged = {name: value for name, value in checkpoint.items() if name != "hyper_parameters"} | {key: values}
    forged[KEY] = dict(forged[KEY])
    add_digests(forged)
    torch.save(forged, path)


CLI = "lightning.pytorch.cli.instantiate_module"
HYPERPARAMETERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "target": lambda m: {"net": NODES["mkdir"](m)},
    "nested": lambda m: {"net": {"a": [{"b": NODES["mkdir"](m)}]}},
    "class path": lambda m: {"net": {"class_path": "evil_module.Evil", "init_args": {}}},
    "class": lambda m: {"_class_path": "evil_module.Evil", "_instantiator": CLI},
    "instantiator": lambda m: {"_instantiator": "evil_module.build"},
    "objects by LightningCLI": lambda m: {
        "_instantiator": CLI, "net": {"a": "evil_module.f"}
    },
}  # fmt: skip


@pytest.mark.parametrize("key", ["hyper_parameters", "hparams", "module_arguments"])
@pytest.mark.parametrize("name", HYPERPARAMETERS)
def test_hyperparameters_call_nothing(name, key, checkpoint, tmp_path, marker, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "evil_module.py").write_text(f"open({str(marker)!r}, 'w')\n")
    values = HYPERPARAMETERS[name](marker)
    save_forged(checkpoint, tmp_path / "x.ckpt", key, values)
    told = refusal(lambda: ll.load_from_checkpoint(Obedient, tmp_path / "x.ckpt"), marker)
    assert "its hyperparameters name what is to be called" in told
    if "net" in values and "_instantiator" not in values:  # those that the caller gives are the caller's
        assert isinstance(ll.load_from_checkpoint(Obedient, tmp_path / "x.ckpt", net=None), Obedient)
        assert not marker.exists()


def test_plain_hyperparameters_of_lightning_cli_are_taken(checkpoint, tmp_path, marker, monkeypatch):
    noted = {"lr": 0.5, "_instantiator": CLI}
    save_forged(checkpoint, tmp_path / "x.ckpt", "hyper_parameters", noted)
    assert ll.load_from_checkpoint(Obedient, tmp_path / "x.ckpt").lr == 0.5
    save_forged(checkpoint, tmp_path / "x.ckpt", "hyper_parameters", {"net": NODES["mkdir"](marker)})
    ll.load_from_checkpoint(
        Obedient, tmp_path / "x.ckpt", weights_only=False
    )  # the control: trusted, it runs
    assert marker.exists()


def forged(folder: Path, adapter: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """An adapter's folder with another description, and the digest that belongs to it."""
    about = json.loads((adapter / CONFIG_FILE).read_text())
    change(about)
    about.pop("sha256")
    tensors, _ = read_tensors(adapter / TENSOR_FILE)
    digest = digest_of(about, tensors)
    folder.mkdir()
    save_file(tensors, folder / TENSOR_FILE, {"format": "pt", "sha256": digest})
    (folder / CONFIG_FILE).write_text(json.dumps({**about, "sha256": digest}))
    return folder


EVIL = {"_target_": "os.system", "command": "touch marker"}
FORGED: dict[str, Callable[[dict[str, Any]], None]] = {
    "targets": lambda a: a["config"].update(target_modules=EVIL),
    "a target in a list": lambda a: a["config"].update(target_modules=[EVIL]),
    "rank": lambda a: a["config"].update(rank=EVIL),
    "an option": lambda a: a["config"].update(EVIL),
    "rank pattern": lambda a: a["config"].update(rank_pattern={"x": EVIL}),
    "a layer": lambda a: a["plan"]["layers"][0].update(
        name="__init__.__globals__", module="__init__.__globals__"
    ),
    "a layer's rank": lambda a: a["plan"]["layers"][0].update(rank=EVIL),
    "a slot": lambda a: next(iter(a["slots"].values())).update(parameter=EVIL),
    "a slot by attribute": lambda a: next(iter(a["slots"].values())).update(parameter="__class__"),
    "training": lambda a: a.update(training=[EVIL]),
    "base": lambda a: a.update(fingerprint=EVIL),
}


@pytest.mark.parametrize("name", FORGED)
def test_an_adapter_names_nothing_to_call(name, adapter, tmp_path, marker, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = forged(tmp_path / "forged", adapter, FORGED[name])
    model = mlp()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    refusal(lambda: ll.load_adapter(model, folder, check_base=False), marker)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


PEFT: dict[str, dict[str, Any]] = {
    "megatron": {"megatron_config": {"a": 1}, "megatron_core": "evil_module"},
    "type": {"peft_type": EVIL},
    "bias": {"bias": EVIL},
    "initialization": {"init_lora_weights": "evil_module"},
    "rank": {"r": EVIL},
}


@pytest.mark.parametrize("name", PEFT)
def test_an_adapter_of_peft_names_nothing_to_import(name, tmp_path, marker, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "evil_module.py").write_text(f"open({str(marker)!r}, 'w')\n")
    model = mlp()
    ll.inject(model, ll.LoRAConfig(rank=2))
    ll.save_adapter(model, tmp_path / "peft", format="peft")
    file = tmp_path / "peft" / CONFIG_FILE
    about = json.loads(file.read_text())
    mapping = {"auto_mapping": {"base_model_class": "Evil", "parent_library": "evil_module"}}
    file.write_text(json.dumps(about | PEFT[name] | mapping))
    refusal(lambda: ll.load_adapter(mlp(), tmp_path / "peft", check_base=False), marker)
    assert "evil_module" not in sys.modules


@pytest.mark.parametrize("contents", [pickled, npy], ids=["pickle", "npy"])
def test_no_file_is_unpickled(contents, adapter, run, tmp_path, marker):
    file = tmp_path / "evil.ckpt"
    file.write_bytes(contents(marker))
    config = config_for("merge")
    config["model"]["checkpoint"] = str(file)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "provides.yaml").write_text("num_classes: 2\n")
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / CONFIG_FILE).write_bytes((adapter / CONFIG_FILE).read_bytes())
    (folder / TENSOR_FILE).write_bytes(contents(marker))
    named = tmp_path / "evil.safetensors"
    named.write_bytes(contents(marker))
    for act in (
        lambda: read_source(file),
        lambda: inspect(file),
        lambda: inspect(named),
        lambda: merge_files(adapter, tmp_path / "out.safetensors", named),
        lambda: ll.load_adapter(mlp(), folder),
        lambda: use("merge", run),
    ):
        refusal(act, marker)
    refusal(lambda: ll.load_from_checkpoint(Classifier, file), marker)
    assert checkpoint_problems(str(file)) and not marker.exists()
    (folder / CONFIG_FILE).write_bytes(contents(marker))
    refusal(lambda: ll.load_adapter(mlp(), folder), marker)


def save_merged(tensors: dict[str, torch.Tensor], path: Path, about: str) -> None:
    """A merged file with these words of its origin, and the checksum that belongs to them."""
    texts = {"lora_lightning": about}
    save_file(tensors, path, {**texts, "sha256": digest_of(texts, tensors)})


@pytest.mark.parametrize(
    "about", [json.dumps(EVIL), "!!python/object/apply:os.system ['touch marker']", "{", "[]"]
)
def test_metadata_are_read_alone(about, tmp_path, marker, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_merged({"x": torch.zeros(1)}, tmp_path / "x.safetensors", about)
    assert "no adapter" in refusal(lambda: inspect(tmp_path / "x.safetensors"), marker)


def test_a_page_holds_no_orders_to_the_terminal(adapter, tmp_path):
    """Names in files may hold control characters, which clear it, set its title, turn the writing round."""

    def rename(about: dict[str, Any]) -> None:
        about["base_class"] = "A\x1b]0;evil\x07\x9b2J\u202eB"

    page = inspect(forged(tmp_path / "forged", adapter, rename))
    assert r"A\x1b]0;evil\x07\x9b2J\u202eB" in page
    about = {
        "merged_from": "\x1b[2J",
        "recipe": "",
        "training": {},
        "base_class": "",
        "fingerprint": "",
        "layers": 1,
    }
    about = json.dumps({**about, "rounding": [0, 0]})
    save_merged({"x\x1b": torch.zeros(1)}, tmp_path / "x.safetensors", about)
    assert r"\x1b[2J" in (page := inspect(tmp_path / "x.safetensors")) and "\x1b" not in page


def test_postscript_is_no_picture(tmp_path, marker, monkeypatch):
    """PIL hands it to Ghostscript, whatever the file is called."""
    from PIL import EpsImagePlugin, Image

    def ghostscript(*_: Any, **__: Any) -> Any:
        marker.touch()
        return Image.new("RGB", (4, 4)).im

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", ghostscript)
    file = tmp_path / "picture.tif"
    file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(DataError, match="cannot be read as an image"):
        read_image(file)
    with pytest.raises(OSError, match="cannot identify"):
        opened_image(file)
    assert not marker.exists()
    Image.open(file).load()
    assert marker.exists()
