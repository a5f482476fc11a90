"""Two machines, each a network of its own, trained by torchrun; one of them is killed or falls silent."""

import contextlib
import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from processes import HERE, end, free_port, start

pytestmark = pytest.mark.slow
SCRIPT = HERE / "run_slowly.py"


class Machine:
    """A network namespace, or this machine itself."""

    def __init__(self, namespace: str | None, address: str, interface: str) -> None:
        self.namespace, self.address, self.interface = namespace, address, interface

    def run(self, rank: int, main: "Machine", port: int, seconds: float, folder: Path):
        launch = ["-m", "torch.distributed.run", "--nnodes", 2, "--nproc-per-node", 1, "--node-rank", rank]
        launch += ["--master-addr", main.address, "--master-port", port, "--local-addr", self.address]
        prefix = ("ip", "netns", "exec", self.namespace) if self.namespace else ()
        return start(
            [*launch, SCRIPT, 1, 2, seconds, folder],
            prefix,
            GLOO_SOCKET_IFNAME=self.interface,
            TORCHELASTIC_ERROR_FILE="",
        )


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)


@contextlib.contextmanager
def two_networks() -> Iterator[list[Machine]]:
    mark = uuid.uuid4().hex[:6]
    names, links = [f"lora-{mark}-{i}" for i in range(2)], [f"l{mark}{i}" for i in range(2)]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", links[0], "netns", names[0], "type", "veth", "peer", links[1], "netns", names[1])
        for i, (name, link) in enumerate(zip(names, links)):
            ip("-n", name, "address", "add", f"10.97.0.{i + 1}/24", "dev", link)
            ip("-n", name, "link", "set", link, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield [Machine(name, f"10.97.0.{i + 1}", link) for i, (name, link) in enumerate(zip(names, links))]
    finally:
        for name in names:
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "delete", name)


def why_no_networks() -> str | None:
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need iproute2's ip"
    try:
        with two_networks():
            return None
    except subprocess.CalledProcessError as error:
        return f"no network namespaces here: {error.stderr.decode().strip()}"


@pytest.fixture(params=["namespaces", "localhost"])
def machines(request) -> Iterator[list[Machine]]:
    if request.param == "localhost":
        yield [Machine(None, "127.0.0.1", "lo") for _ in range(2)]
        return
    if reason := why_no_networks():
        pytest.skip(reason)
    with two_networks() as both:
        yield both


def train(machines: list[Machine], folder: Path, seconds: float = 0.0) -> list[subprocess.Popen]:
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    return [m.run(rank, machines[0], port, seconds, folder) for rank, m in enumerate(machines)]


def complete(machines: list[Machine], folder: Path) -> list[dict[str, torch.Tensor]]:
    processes = train(machines, folder)
    try:
        for process in processes:
            _, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            end(process)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def lose(machines: list[Machine], folder: Path, victim: int, silently: bool) -> tuple[int, str, float]:
    """Train, lose one machine in the third epoch, and see what the other one says, and after how long."""
    processes = train(machines, folder, seconds=0.2)
    survivor = processes[1 - victim]
    try:
        line = f"rank {1 - victim} step 9"
        assert any(line in text for text in survivor.stdout), survivor.stderr.read()
        lost = time.monotonic()
        if silently:  # no process says good-bye: the cable is cut
            ip("-n", machines[victim].namespace, "link", "set", machines[victim].interface, "down")
        else:
            end(processes[victim])
        _, errors = survivor.communicate(timeout=180)
        return survivor.returncode, errors, time.monotonic() - lost
    finally:
        for process in processes:
            end(process)


@pytest.mark.parametrize("victim", [1, 0])
def test_one_of_two_machines_is_killed(machines, victim, tmp_path):
    straight = complete(machines, tmp_path / "straight")
    folder = tmp_path / "killed" / "checkpoints"
    code, errors, seconds = lose(machines, folder, victim, silently=False)
    assert code != 0
    assert "Another process of this run has gone" in errors, errors
    assert "Go on with resume=" in errors
    assert seconds < 90
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 8
    resumed = complete(machines, folder)
    for found, wanted in zip(resumed, straight):
        assert all(torch.equal(found[n], wanted[n]) for n in wanted)
        assert all(torch.equal(resumed[0][n], found[n]) for n in found)


def test_a_silent_machine_is_given_up(machines, tmp_path):
    if machines[0].namespace is None:
        pytest.skip("only a network of its own can be cut")
    code, errors, seconds = lose(machines, tmp_path / "cut" / "checkpoints", 1, silently=True)
    assert code != 0
    assert "Another process of this run has gone" in errors, errors
    assert seconds < 120  # the timeout of the strategy is 20 s
