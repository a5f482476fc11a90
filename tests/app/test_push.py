"""`lora-lightning push`: what goes to a hub, what does not, and that it comes back from there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hf_stand_in import TOKEN, Hub, ask, hf_hub
from small import mlp

import lora_lightning as ll
from lora_lightning.app.cli import main
from lora_lightning.files.random_base import keep_base

FILES = {"adapter_config.json", "adapter_model.safetensors", "README.md"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hf_hub() as found:
        ask(found, tmp_path, monkeypatch)
        yield found


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A folder with an adapter, and with more than is to be uploaded."""
    model = mlp()
    ll.inject(model, ll.LoRAConfig(rank=2, target_modules="all"))
    with torch.no_grad():
        for parameter in ll.lora_parameters(model):
            parameter.add_(0.1)
    config = {"model": {"name": "net", "checkpoint": "/home/somebody/base.safetensors"}}
    ll.save_adapter(model, tmp_path / "adapter", origin={"config": config})
    (tmp_path / "adapter" / "secret.txt").write_text("secret")
    (tmp_path / "adapter" / ".env").write_text("HF_TOKEN=x")
    return tmp_path / "adapter"


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        main(words)
    out, message = capsys.readouterr()
    assert caught.value.code == 2 and out == "" and "Traceback" not in message and TOKEN not in message
    return message


def test_an_adapter_goes_and_comes_back(hub: Hub, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["push", f"adapter={adapter}", "to=hf:me/new", "license=mit"])
    said = capsys.readouterr().out
    assert "a new repository, private" in said and "model.checkpoint=/home/somebody/base.safetensors" in said
    there = hub.repos["me/new"]["main"]
    assert there.keys() == FILES and "me/new" in hub.private
    assert b"somebody" not in b"".join(there.values()) and b"secret" not in b"".join(there.values())
    there["README.md"] = b"by hand"
    main(["push", f"adapter={adapter}", "to=hf:me/new"])
    said = capsys.readouterr().out
    assert said.count("README.md") == 1 and "README.md there stays as it is" in said
    assert there["README.md"] == b"by hand"
    main(["push", f"adapter={adapter}", "to=hf:me/new", "overwrite=true"])
    assert there["README.md"] != b"by hand"
    ours, theirs = mlp(), mlp()
    theirs.load_state_dict(ours.state_dict())
    ll.load_adapter(ours, adapter, check_base=False)
    ll.load_adapter(theirs, "hf:me/new", check_base=False)
    x = torch.randn(3, 6)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)


def test_branches_folders_and_what_everybody_sees(hub: Hub, adapter: Path, tmp_path: Path) -> None:
    main(["push", f"adapter={adapter}", "to=hf:me/open/a@dev", "private=false"])
    assert not hub.private and {f"a/{name}" for name in FILES} == hub.repos["me/open"]["dev"].keys()
    assert not hub.repos["me/open"]["main"]
    main(["push", "adapter=hf:me/open/a@dev", "to=hf:me/copy"])  # from hub to hub
    key = "adapter_model.safetensors"
    assert hub.repos["me/copy"]["main"][key] == hub.repos["me/open"]["dev"][f"a/{key}"]


def test_dry_asks_nobody(hub: Hub, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for to in ("hf:me/new", "wandb:me/p/n:best"):
        main(["push", f"adapter={adapter}", f"to={to}", "dry=true"])
        said = capsys.readouterr().out
        assert f"This would go to {to}; nothing is uploaded." in said and "adapter_model.safetensors" in said
        assert "library_name: lora-lightning" in said and "secret" not in said
    assert hub.seen == []


def test_a_random_base_goes_when_it_is_asked_for(
    hub: Hub, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep_base(mlp(), adapter)
    words = ["push", f"adapter={adapter}", "to=hf:me/new"]
    assert "give base=true, which takes them along" in refused(words, capsys) and hub.seen == []
    main([*words, "dry=true"])
    assert "It would be refused" in capsys.readouterr().out
    main([*words, "base=true"])
    assert hub.repos["me/new"]["main"].keys() == FILES | {"base.safetensors"}


def test_mistakes_are_told_before_anything_is_asked(
    hub: Hub,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    given = f"adapter={adapter}"
    wrong: dict[str, list[str]] = {
        "give hf:USER/NAME": [given, "to=me/x"],
        "give a licence": [given, "to=hf:me/x", "license=My Licence"],
        "a branch": [given, f"to=hf:me/x@{'a' * 40}"],
        "W&B numbers versions itself": [given, "to=wandb:e/p/n:v3"],
        "private=false: is an option of hf:": [given, "to=wandb:e/p/n", "private=false"],
        "W&B has no key here": [given, "to=wandb:e/p/n"],
        "give to=ADDRESS": [given],
        "there is no such file": ["adapter=nowhere", "to=hf:me/x"],
        "Did you mean 'overwrite'": [given, "to=hf:me/x", "overwrit=true"],
    }
    for told, words in wrong.items():
        assert told in refused(["push", *words], capsys), told
    (tmp_path / "empty").mkdir()
    refused(["push", f"adapter={tmp_path / 'empty'}", "to=hf:me/x"], capsys)
    assert hub.seen == []


def test_who_may_not_write_is_told(
    hub: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["push", f"adapter={adapter}", "to=hf:me/x"]
    for status in (401, 403, 500):
        hub.refuses = status
        message = refused(words, capsys)
        assert str(status) in message or "hf auth login" in message
        assert hub.repos == {}
    hub.refuses = 0
    monkeypatch.setenv("HF_TOKEN", "hf_wrongWrongWrongWrong")
    assert "wrongWrong" not in refused(words, capsys) and hub.repos == {}


def test_nothing_is_shrunk_into_an_address(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(["shrink", f"adapter={adapter}", "rank=1", "out=hf:me/x"], capsys)
    assert "lora-lightning push adapter=FOLDER to=hf:me/x" in message
