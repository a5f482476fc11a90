"""Adapters as artifacts of Weights & Biases: the real client and a stand-in, which may be wicked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small import mlp
from wandb_stand_in import KEY, Artifacts, b64md5, wandb_hub

import lora_lightning as ll
from lora_lightning.app.cli import main
from lora_lightning.errors import UserError
from lora_lightning.files.hubs.address import address_of
from lora_lightning.files.hubs.fetch import cache, fetched
from lora_lightning.files.hubs.weights_and_biases import _remote

wandb = pytest.importorskip("wandb", minversion="0.31")
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
WHERE = "wandb:me/p/mine:best"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Artifacts]:
    """One for all, since the client goes on with its first connection; it ends with its service."""
    with wandb_hub() as hub, pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
            patch.delenv(name, raising=False)
        patch.setenv("WANDB_BASE_URL", hub.url)
        patch.setenv("WANDB_API_KEY", KEY)
        for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DIR"):
            patch.setenv(name, str(tmp_path_factory.mktemp(name)))
        wandb.teardown()
        yield hub
        wandb.teardown()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "a"
    model = mlp()
    ll.inject(model, ll.LoRAConfig(rank=2, target_modules="all"))
    with torch.no_grad():
        for parameter in ll.lora_parameters(model):
            parameter.add_(0.1)
    return ll.save_adapter(model, folder, origin={"config": {"model": {"checkpoint": "/home/somebody/b.pt"}}})


@pytest.fixture
def hub(server: Artifacts, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Artifacts:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for kept in (server.artifacts, server.aliases, server.stated, server.urls, server.answer):
        kept.clear()
    server.seen.clear()
    server.counted = server.refuses = 0
    files = {p.name: p.read_bytes() for p in adapter.iterdir()}
    server.put("mine", {**files, "train.py": b"boom", "README.md": b"# x"}, "best")
    return server


def refusal(address: str = WHERE) -> str:
    """One message, no key in it, nothing kept."""
    with pytest.raises(UserError) as caught:
        fetched(address)
    text = str(caught.value)
    assert text.startswith(f"{address}: ") and KEY not in text and "\n" not in text
    assert not list(cache().rglob("*.safetensors")) and not list(cache().rglob(".lora*"))
    return text


def test_without_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused before the client connects; all else is slow, since its service has to start."""
    address = address_of(WHERE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert "WANDB_MODE=offline" in refusal()
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert "W&B has no key here" in refusal()
    wicked: dict[str, dict[str, Any]] = {
        "is a reference to file:///etc/passwd": {"ref": "file:///etc/passwd"},
        "has no digest": {"ref": None, "digest": "AAAA", "size": 3},
        "or no size": {"ref": None, "digest": b64md5(b"x"), "size": None},
    }
    for told, entry in wicked.items():
        with pytest.raises(UserError, match=told):
            _remote(address, TENSORS, SimpleNamespace(**entry), "http://127.0.0.1:9")


@pytest.mark.slow
def test_an_artifact_is_fetched_by_an_allow_list(hub: Artifacts, adapter: Path) -> None:
    folder = fetched(WHERE)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        p.name: p.read_bytes() for p in adapter.iterdir()
    }
    assert fetched("wandb:me/p/mine") == folder == fetched("wandb:me/p/mine:v0")
    hub.seen.clear()
    assert fetched("wandb:me/p/mine:v0") == folder and hub.seen == []  # a version never changes
    ll.load_adapter(mlp(), WHERE, check_base=False)


@pytest.mark.slow
def test_wicked_manifests(hub: Artifacts, monkeypatch: pytest.MonkeyPatch) -> None:
    for ref in ("file:///etc/passwd", "s3://bucket/x", "http://127.0.0.1/x", "wandb-artifact://0/x"):
        hub.stated[TENSORS] = {"ref": ref}
        assert "is a reference to" in refusal()
    hub.stated[TENSORS] = {"size": 2**45}
    assert "are fetched. Nothing was" in refusal()
    hub.stated[TENSORS] = {"digest": b64md5(b"another")}
    assert "altered: its md5 digest differs" in refusal()
    hub.stated[TENSORS] = {"digest": "no digest"}
    assert "has no digest" in refusal()
    hub.stated = {"../../evil.safetensors": {}, "/etc/evil": {}, f"../{CONFIG}": {}}
    assert {p.name for p in fetched(WHERE).iterdir()} == {CONFIG, TENSORS}  # names that nobody asks for
    assert not list(cache().parent.rglob("*evil*"))
    hub.stated.clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache() / "other"))
    hub.counted = 10**6
    assert "1,000,000 files" in refusal()
    hub.counted = 0
    for url in ("file:///etc/passwd", "ftp://127.0.0.1/x", ""):
        hub.urls[TENSORS] = url
        refusal()
    hub.urls.clear()
    hub.artifacts["mine"][0].pop(CONFIG)
    assert f"holds no {CONFIG}" in refusal()


@pytest.mark.slow
def test_who_is_refused_is_told_why(hub: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no such artifact, alias or project" in refusal("wandb:me/p/none:best")
    with monkeypatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        assert "WANDB_MODE=offline" in refusal()
    with monkeypatch.context() as patch:
        patch.setenv("WANDB_API_KEY", "6" * 40)
        assert "W&B refuses" in (text := refusal()) and "6666" not in text and "wandb login" in text
    with monkeypatch.context() as patch:
        patch.delenv("WANDB_API_KEY")
        patch.setenv("NETRC", str(tmp_path / "none"))
        assert "W&B has no key here" in refusal()
    folder = fetched(WHERE)
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.warns(UserWarning, match="WANDB_MODE=offline"):
        assert fetched(WHERE) == folder


@pytest.mark.slow
def test_an_adapter_goes_and_comes_back(
    hub: Artifacts, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And beside its files nothing does but the version of W&B and of Python."""
    main(["push", f"adapter={adapter}", "to=wandb:me/p/pushed:best"])
    said = capsys.readouterr().out
    assert said.startswith("wandb:me/p/pushed:best: v0 of ") and KEY not in said
    there = hub.artifacts["pushed"][0]
    assert there.keys() == {CONFIG, TENSORS, "README.md"}
    assert hub.aliases["pushed"] == {"latest": 0, "best": 0}
    assert hub.types == {"pushed": "model", **{n: "base-model" for n in hub.types if n != "pushed"}}
    assert hub.used == [f"{name}/0" for name, kind in hub.types.items() if kind == "base-model"]  # lineage
    told = {path.rpartition("/")[2] for path in hub.stored if path.startswith("/run/")}
    assert told <= {"config.yaml", "wandb-summary.json"}
    everything = b"".join(hub.stored.values()) + json.dumps(hub.mutations).encode()
    for secret in (b"somebody", str(Path.cwd()).encode(), str(Path.home()).encode() + b"/", KEY.encode()):
        assert secret not in everything
    ours, theirs = mlp(), mlp()
    theirs.load_state_dict(ours.state_dict())
    ll.load_adapter(ours, adapter, check_base=False)
    ll.load_adapter(theirs, "wandb:me/p/pushed:best", check_base=False)
    x = torch.randn(3, 6)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)
    hub.refuses = 403
    with pytest.raises(SystemExit):
        main(["push", f"adapter={adapter}", "to=wandb:me/p/other:best"])
    assert KEY not in capsys.readouterr().err and "other" not in hub.artifacts
