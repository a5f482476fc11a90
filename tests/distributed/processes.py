"""Programs of several processes for the tests: free ports, a time limit each, nothing left running; and
what their ranks must agree in."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import uuid
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# What an earlier test, or a launcher around all of them, may have left, and Lightning would go by.
LEFT = ("PL_GLOBAL_SEED", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "RANK", "WORLD_SIZE")


MARK = "LORA_LIGHTNING_TEST_RUN"  # in the environment of every process of a run


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def environment(**more: object) -> dict[str, str]:
    """This process's, without what would make a child believe that it is part of another run."""
    kept = {name: value for name, value in os.environ.items() if name not in LEFT}
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "tests"), kept.get("PYTHONPATH")]))
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | {n: str(v) for n, v in more.items()}


def start(command: list, prefix: tuple = (), cwd: Path | None = None, **more: object) -> subprocess.Popen:
    """A Python program in a session of its own, marked so that it can be ended with all that it starts."""
    mark = f"{MARK}={uuid.uuid4().hex}"
    process = subprocess.Popen(
        [*prefix, sys.executable, "-u", *map(str, command)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=environment(**more) | dict([mark.split("=")]), cwd=cwd,
    )  # fmt: skip
    process.mark = mark.encode()
    return process


def end(process: subprocess.Popen) -> None:
    """Kill the program and all that it has started: torchrun's workers have sessions of their own."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if process.mark in (folder / "environ").read_bytes().split(b"\0"):
                os.kill(int(folder.name), signal.SIGKILL)
    process.kill()
    process.wait()


def finish(process: subprocess.Popen, timeout: float = 300) -> tuple[int, str, str]:
    """Exit code, output and errors; in the end nothing of it runs."""
    try:
        output, errors = process.communicate(timeout=timeout)
        return process.returncode, output, errors
    finally:
        end(process)


def run(script: str, *arguments: object, timeout: float = 300, **more: object) -> str:
    """The output of a program of this folder that must succeed; Lightning or it starts the others."""
    code, output, errors = finish(
        start([HERE / script, *arguments], MASTER_PORT=free_port(), **more), timeout
    )
    assert code == 0, f"exit code {code}\n{output[-4000:]}\n{errors[-8000:]}"
    return output + errors


def same(ranks: list[dict]) -> bool:
    return all(torch.equal(ranks[0][n], rank[n]) for rank in ranks for n in ranks[0])


def close(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys() and any("lora_B" in n and t.any() for n, t in wanted.items())
    for name, tensor in wanted.items():  # a mean over shares rounds otherwise than over the whole
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
