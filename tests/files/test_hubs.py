"""Adapters by their addresses on the Hugging Face hub: found, checked, kept; and what a wicked hub can do."""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_stand_in import TOKEN, Hub, ask, hf_hub
from small import mlp

import lora_lightning as ll
from lora_lightning.app.cli import main
from lora_lightning.errors import ConfigError, UserError
from lora_lightning.files.hubs import fetch, remote
from lora_lightning.files.hubs.address import Address, address_of, is_address
from lora_lightning.files.hubs.fetch import cache, fetched
from lora_lightning.files.locate import WeightsSource, read_source, read_trained
from lora_lightning.files.weights import write_weights
from lora_lightning.models.base_file import base_file

constants = pytest.importorskip("huggingface_hub").constants
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
X = torch.linspace(-1, 1, 18).view(3, 6)


def folder_of(folder: Path, **options: Any) -> dict[str, bytes]:
    """The files of an adapter whose updates change something."""
    torch.manual_seed(0)
    model = mlp()
    ll.inject(model, ll.LoRAConfig(rank=2, target_modules="all"))
    with torch.no_grad():
        for parameter in ll.lora_parameters(model):
            parameter.add_(0.1)
    ll.save_adapter(model, folder, **options)
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return folder_of(tmp_path_factory.mktemp("adapter") / "a")


@pytest.fixture
def hub(files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with the adapter me/x, which the client of this process asks."""
    with hf_hub() as found:
        ask(found, tmp_path, monkeypatch)
        found.put("me/x", {**files, "README.md": b"# x", "evil.py": b"boom", "adapter_model.bin": b"pickle"})
        yield found


def left() -> list[str]:
    """What lies in the cache, but for notes of addresses."""
    return sorted(
        p.name for p in cache().rglob("*") if p.is_file() and (p.suffix != ".json" or p.name == CONFIG)
    )


def refusal(address: str = "hf:me/x") -> str:
    """One message, no token in it, nothing kept."""
    with pytest.raises(UserError) as caught:
        fetched(address)
    text = str(caught.value)
    assert text.startswith(f"{address}: ") and TOKEN not in text and "hf_" not in text and "\n" not in text
    assert left() == [] and not list(cache().rglob(".lora*"))
    return text


def test_an_adapter_is_fetched_once_and_loaded_as_its_folder(hub: Hub, files: dict[str, bytes]) -> None:
    folder = fetched("hf:me/x")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == files  # nothing else of the repository
    assert set(hub.tokens) <= {TOKEN, ""} and TOKEN in hub.tokens
    hub.seen.clear()
    model = mlp()
    ll.load_adapter(model, "hf:me/x", check_base=False)
    assert not [line for line in hub.seen if "resolve" in line]
    assert read_source("hf:me/x").path == folder == read_trained(Path("hf:me/x")).path
    hub.put("me/x", {CONFIG: files[CONFIG] + b" "})  # a new commit
    assert fetched("hf:me/x") != folder
    commit = hub.commit("me/x", "main")
    fetched(f"hf:me/x@{commit}")
    hub.seen.clear()
    assert fetched(f"hf:me/x@{commit}").is_dir() and hub.seen == []  # which never changes


def test_a_copy_that_was_altered_here_is_fetched_anew(hub: Hub, files: dict[str, bytes]) -> None:
    kept = fetched("hf:me/x") / "adapter_model.safetensors"
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # of the same size
    assert fetched("hf:me/x") == kept.parent and kept.read_bytes() == whole


def test_several_fetch_at_once(hub: Hub, files: dict[str, bytes]) -> None:
    """As the processes of a training do."""
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(fetched, ["hf:me/x"] * 8))
    assert len(folders) == 1 and {p.name for p in folders.pop().iterdir()} == set(files)
    assert not list(cache().rglob(".lora*"))


def test_branches_folders_and_all_weights(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    hub.put("me/y", {f"sub/in/{n}": f for n, f in files.items()}, "dev")
    assert {p.name for p in fetched("hf:me/y/sub/in@dev").iterdir()} == set(files)
    write_weights(tmp_path / "w.safetensors", mlp().state_dict(), {})
    hub.put("me/w", {"model.safetensors": (tmp_path / "w.safetensors").read_bytes()})
    assert isinstance(read_trained("hf:me/w"), WeightsSource)
    assert base_file("hf:me/w").name == "model.safetensors"
    hub.put("me/x", {"base.safetensors": (tmp_path / "w.safetensors").read_bytes()})
    assert "base.safetensors" in {p.name for p in fetched("hf:me/x").iterdir()}


def test_commands_take_addresses(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", "hf:me/x"])
    assert "rank" in capsys.readouterr().out
    main(["shrink", "adapter=hf:me/x", "rank=1", f"out={tmp_path / 'small'}"])
    write_weights(tmp_path / "w.safetensors", mlp().state_dict(), {})
    hub.put("me/w", {"model.safetensors": (tmp_path / "w.safetensors").read_bytes()})
    words = ["merge", "ckpt=hf:me/x", "base=hf:me/w", "check_base=false", f"out={tmp_path / 'm.safetensors'}"]
    main(words)
    assert (tmp_path / "m.safetensors").is_file()


def test_what_came_is_read_as_a_strangers(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = {"_target_": "lora_lightning.tasks.classification.ImageClassifier"}
    model = {"_target_": "os.system", "command": f"touch {tmp_path / 'done'}"}
    hub.put("me/evil", folder_of(tmp_path / "e", origin={"config": {"model": model, "task": task}}))
    (tmp_path / "pictures").mkdir()
    words = ["predict", "adapter=hf:me/evil", f"images={tmp_path / 'pictures'}", f"out={tmp_path / 'p.csv'}"]
    with pytest.raises(SystemExit):
        main(words)
    message = capsys.readouterr().err
    assert "model._target_=os.system is not run unasked" in message and not (tmp_path / "done").exists()


def answering(**parts: Any) -> Any:
    """An answer with another status, other headers or another body."""

    def answer(handler: Any) -> None:
        handler.send_response(parts.get("status", 200))
        for name, value in parts.get("headers", {}).items():
            handler.send_header(name, value)
        handler.end_headers()
        for piece in parts.get("body", ()):
            handler.wfile.write(piece)
        handler.close_connection = True

    return answer


def test_wicked_files(hub: Hub, files: dict[str, bytes]) -> None:
    size = len(files[TENSORS])
    hub.stated[TENSORS] = {"size": 2**50}
    assert "1 to 4,294,967,296 are fetched" in refusal()
    assert not [line for line in hub.seen if "resolve" in line]
    for wrong in (0, -1, "12", 1.5, None):
        hub.stated[TENSORS] = {"size": wrong}
        refusal()
    hub.stated.clear()
    hub.stated[CONFIG] = {"size": 17 * 2**20}
    assert "16,777,216" in refusal()
    hub.stated.clear()
    altered = bytes([files[TENSORS][0] ^ 1]) + files[TENSORS][1:]
    cases: dict[str, dict[str, Any]] = {
        "altered": {"headers": {"Content-Length": size}, "body": [altered]},
        "torn, with": {"headers": {"Content-Length": size - 9}, "body": [files[TENSORS][:-9]]},
        "more than": {"headers": {"Connection": "close"}, "body": [files[TENSORS], b"x" * 2**20]},
        "cannot be read now": {"headers": {"Content-Length": size}, "body": [files[TENSORS][:50]]},
        "no such file": {"status": 404, "headers": {"Content-Length": 0}},
    }
    for told, answer in cases.items():
        hub.answer[TENSORS] = answering(**answer)
        assert told in refusal(), told
    for there in ("file:///etc/passwd", "ftp://127.0.0.1/x", "//"):
        hub.answer[TENSORS] = answering(status=302, headers={"Location": there, "Content-Length": 0})
        refusal()
    hub.answer.clear()
    hub.stated[CONFIG] = {"type": "directory"}
    assert "holds no adapter_config.json" in (text := refusal()) and "pickle" in text


def test_an_endless_file_is_cut(hub: Hub, files: dict[str, bytes]) -> None:
    def endless(handler: Any) -> None:
        handler.send_response(200)
        handler.end_headers()
        with contextlib.suppress(OSError):  # once nobody listens
            while True:
                handler.wfile.write(b"x" * 2**16)

    hub.answer[TENSORS] = endless
    assert "torn, with more than" in refusal()


def test_to_another_host_no_token_goes(hub: Hub, files: dict[str, bytes]) -> None:
    with hf_hub() as other:
        other.put("me/x", files)
        there = f"{other.url.replace('127.0.0.1', 'localhost')}/me/x/resolve/main/{TENSORS}"
        hub.answer[TENSORS] = answering(status=302, headers={"Location": there, "Content-Length": 0})
        assert fetched("hf:me/x").is_dir()
        assert other.tokens == [""]


def test_what_interrupts_leaves_nothing(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.rename, []

    def interrupted(*names: Any) -> None:
        calls.append(names)
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch.os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetched("hf:me/x")
    assert calls and left() == []
    monkeypatch.setattr(fetch.os, "rename", real)
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 10})())
    assert "make room" in refusal()
    monkeypatch.undo()


def test_who_is_refused_is_told_why(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no such repository, or it is private" in refusal("hf:me/none")
    assert "no revision none" in refusal("hf:me/x@none")
    hub.gated.add("me/x")
    assert "grants access" in refusal()
    hub.gated.clear()
    monkeypatch.setenv("HF_TOKEN", "hf_wrongWrongWrongWrong")
    assert "hf auth login" in refusal()
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN}\nx: {TOKEN}")  # no header can hold it
    refusal()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for status in (400, 403, 429, 500):
        hub.refuses = status
        refusal()


def test_without_a_network_the_copy_is_used(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert "HF_HUB_OFFLINE is set" in (text := refusal()) and "no copy" in text
    folder = fetched("hf:me/x")
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.warns(UserWarning, match="HF_HUB_OFFLINE is set"):
            assert fetched("hf:me/x") == folder
    hub.refuses = 503
    with pytest.warns(UserWarning, match="the copy in"):
        assert fetched("hf:me/x") == folder
    hub.refuses = 0
    fixed = f"hf:me/x@{hub.commit('me/x', 'main')}"
    kept = fetched(fixed) / TENSORS
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # of the same size
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        for address in (fixed, "hf:me/x"):
            with pytest.raises(UserError, match=rf"the copy in {folder} was altered since"):
                fetched(address)
    assert (fetched(fixed) / TENSORS).read_bytes() == whole, "fetched anew"
    (folder / CONFIG).unlink()  # somebody tidied up
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (fetched("hf:me/x") / CONFIG).is_file()
    hub.gated.add("me/x")  # a refusal is no lack of a network
    with pytest.raises(UserError, match="grants access"):
        fetched("hf:me/x")


def test_who_does_not_answer_is_not_waited_for(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.monotonic()
    with pytest.raises(remote.UnreachableError, match="no answer within"):
        remote.answered(lambda: time.sleep(5), 0.05)
    assert time.monotonic() - began < 2
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be read now" in refusal()


@pytest.mark.parametrize(
    "text",
    ["hf:x", "hf:a/b/../c", "hf:../a/b", "hf:a/b@", "hf:a/b@../x", "hf:a/b\n", "hf:a b/c", "hf://a/b",
     "hf:a//b", "wandb:a/b", "wandb:a/b/c:", "wandb:a/b/c/d", "wandb:a/b/c:d:e", "hf:.a/b", "hf:",
     "hf:a/b/x/x/", "https://huggingface.co/a/b/tree/v1"],
)  # fmt: skip
def test_wrong_addresses(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert is_address(text)
    with pytest.raises(UserError, match=r"give hf:USER/NAME.* or wandb:ENTITY"):
        address_of(text)
    with pytest.raises(UserError, match="give hf:USER"):
        ll.load_adapter(mlp(), text)
    with pytest.raises(SystemExit):
        main(["inspect", text])
    assert "give hf:USER/NAME" in capsys.readouterr().err


def test_right_addresses() -> None:
    assert address_of("hf:a/b.c/d/e@v1/x") == Address("hf", "a/b.c", "d/e", "v1/x")
    assert address_of("wandb:e/p/n") == Address("wandb", "e/p/n")
    for text in ("hf:a/b", "hf:a-1/b_2/d@main", "wandb:e/p/n:best"):
        assert str(address_of(text)) == text
    assert address_of(f"hf:a/b@{'0' * 40}").fixed and address_of("wandb:e/p/n:v12").fixed
    assert not address_of("wandb:e/p/n:best").fixed
    for path in ("./hf:a/b", "C:/x", "/hf:a/b", "outputs/run", "hf"):
        assert not is_address(path)
    with pytest.raises(UserError, match="Did you mean 'hf:a/b@v1'"):
        address_of("https://huggingface.co/a/b/tree/v1")


def test_nothing_is_saved_to_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = mlp()
    ll.inject(model, ll.LoRAConfig(rank=2, target_modules="all"))
    with pytest.raises(ConfigError, match="lora-lightning push"):
        ll.save_adapter(model, "hf:me/x")
    assert not list(tmp_path.iterdir())
