"""The processes of a server killed one by one, and ended by hand: what is said, and that none is left."""

import contextlib
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

PUPPET = str(Path(__file__).with_name("puppet.py"))
pytestmark = pytest.mark.slow


@dataclass
class Running:
    """A server in a session of its own."""

    process: subprocess.Popen[str]
    port: int = 0

    def begun(self) -> "Running":
        line = self.process.stdout.readline()
        found = re.match(r"http://127\.0\.0\.1:(\d+): serves puppets", line)
        assert found, (line, self.process.stderr.read())
        self.port = int(found[1])
        return self

    def post(self, body: str, seconds: float = 60.0) -> tuple[int, str, float]:
        """Status, answer, seconds."""
        since = time.monotonic()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/v1/classify", body.encode())
        try:
            with urllib.request.urlopen(request, timeout=seconds) as answer:
                status, told = answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            status, told = error.code, error.read().decode()
        return status, told, time.monotonic() - since

    def worker(self) -> int:
        return json.loads(self.post("answer 0")[1])["process"]

    def listening(self) -> int:
        held = subprocess.run(["ss", "-ltnpH", f"sport = :{self.port}"], capture_output=True, text=True)
        return int(re.search(r"pid=(\d+)", held.stdout)[1])

    def family(self) -> dict[int, str]:
        """Processes of the session that are not ended, and what they run."""
        listed = subprocess.run(["ps", "-ww", "-s", str(self.process.pid), "-o", "pid=,stat=,args="],
                                capture_output=True, text=True).stdout  # fmt: skip
        rows = [line.split(maxsplit=2) for line in listed.splitlines()]
        return {int(pid): args for pid, stat, args in rows if not stat.startswith("Z")}

    def ends(self, code: int, told: str = "", seconds: float = 20.0) -> None:
        """It has ended with this code and message, nothing of it is left, and its port is free."""
        assert self.process.wait(seconds) == code
        assert self.process.stderr.read().strip() == told
        self.is_gone()

    def is_gone(self) -> None:
        end = time.monotonic() + 10
        while (left := self.family()) and time.monotonic() < end:
            time.sleep(0.2)
        assert not left
        if self.port:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("127.0.0.1", self.port))


@contextlib.contextmanager
def puppets(*words: str, setup: float = 0.0) -> Iterator[Running]:
    """A server whose workers have no model; whatever is left of it at the end is killed."""
    process = subprocess.Popen(
        [sys.executable, PUPPET, *words], start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PUPPET_SETUP": str(setup)},
    )  # fmt: skip
    running = Running(process)
    try:
        yield running
    finally:
        for pid in running.family():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(10)


def wait_for_worker(running: Running, but: int = 0) -> int:
    """The process of a worker that is being set up."""
    for _ in range(300):
        found = [p for p, a in running.family().items() if "spawn_main" in a and p != but]
        if found:
            return found[0]
        time.sleep(0.1)
    raise AssertionError("there is no worker")


@pytest.mark.parametrize("how", ["killed", "kills itself"])
def test_what_a_killed_worker_had_gets_503_and_the_next_answers_what_waited(how: str) -> None:
    with puppets() as running, ThreadPoolExecutor(16) as pool:
        running.begun()
        for _ in range(2):
            worker = running.worker()
            had = [pool.submit(running.post, "answer 20") for _ in range(3)]
            time.sleep(0.7)
            if how == "killed":
                os.kill(worker, signal.SIGKILL)
            else:
                had.append(pool.submit(running.post, "die 0"))
                time.sleep(0.1)
            waited = []
            for _ in range(8):  # some while the queue still takes for the worker that is gone
                waited.append(pool.submit(running.post, "answer 0"))
                time.sleep(0.1)
            for status, told, seconds in (one.result() for one in had):
                assert status == 503 and "a worker has ended: try again." in told and seconds < 5
            answers = [one.result() for one in waited]
            assert {status for status, _, _ in answers} == {200}
            assert worker not in {json.loads(told)["process"] for _, told, _ in answers}
        running.process.terminate()
        running.ends(0)


def test_with_two_workers_one_goes_on_while_the_other_is_away() -> None:
    with puppets("workers=2", "threads=1", setup=4) as running, ThreadPoolExecutor(8) as pool:
        running.begun()
        while len({running.worker() for _ in range(8)}) < 2:
            time.sleep(0.5)
        worker = running.worker()
        os.kill(worker, signal.SIGKILL)
        answers = list(pool.map(running.post, ["answer 0"] * 24))
        assert {status for status, _, _ in answers} == {200} and max(s for _, _, s in answers) < 4
        running.process.terminate()
        running.ends(0)


def test_a_worker_that_is_killed_while_it_is_set_up() -> None:
    with puppets(setup=60) as running:
        os.kill(wait_for_worker(running), signal.SIGKILL)
        begun = "the server has not begun: a worker has ended while it was set up: see above for why."
        running.ends(2, begun)
    with puppets(setup=1) as running:
        running.begun()
        worker = running.worker()
        os.kill(worker, signal.SIGKILL)
        second = wait_for_worker(running, worker)
        os.kill(second, signal.SIGKILL)
        status, told, _ = running.post("answer 0")
        assert status == 200 and json.loads(told)["process"] not in (worker, second)
        running.process.terminate()
        running.ends(0)


@pytest.mark.parametrize("who", ["first", "listening", "queues"])
def test_when_a_process_that_the_others_need_is_killed_none_is_left(who: str) -> None:
    with puppets() as running, ThreadPoolExecutor(2) as pool:
        running.begun()
        first, listening, worker = running.process.pid, running.listening(), running.worker()
        queues = next(
            p for p, a in running.family().items()
            if p not in (first, listening, worker) and "resource_tracker" not in a
        )  # fmt: skip
        asked = pool.submit(running.post, "answer 3")
        time.sleep(0.5)
        os.kill({"first": first, "listening": listening, "queues": queues}[who], signal.SIGKILL)
        if who == "first":
            assert running.process.wait(5) == -signal.SIGKILL
            running.is_gone()
        else:
            what = "the process that listens" if who == "listening" else "a process that the others need"
            running.ends(2, f"{what} has ended: start the server again.", 60)
        asked.exception()


@pytest.mark.parametrize("when", ["at its start", "in a worker's set-up", "as it starts a worker anew"])
def test_sigterm_ends_it_quietly(when: str) -> None:
    with puppets(setup=0 if when == "as it starts a worker anew" else 60) as running:
        if when == "as it starts a worker anew":
            running.begun()
            worker = running.worker()
            os.kill(worker, signal.SIGKILL)
            wait_for_worker(running, worker)
        elif when == "in a worker's set-up":
            wait_for_worker(running)
            time.sleep(1.5)
        else:
            time.sleep(1.0)
        running.process.terminate()
        code = running.process.wait(20)
        assert code in ((0, -signal.SIGTERM) if when == "at its start" else (0,))
        assert running.process.stderr.read() == ""
        running.is_gone()


@pytest.mark.parametrize("when", ["at its start", "in a worker's set-up", "idle", "answering", "twice"])
def test_ctrl_c_in_a_terminal(when: str) -> None:
    late = when in ("at its start", "in a worker's set-up")
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's "&" has it ignored
        os.environ["PUPPET_SETUP"] = "60" if late else "0"
        command = "from lora_lightning.app.entry_point import main; main()"
        words = ["-c", command, "serve", "adapters=/"] if when == "at its start" else [PUPPET]
        os.execv(sys.executable, [sys.executable, *words])
    running = Running(subprocess.Popen(["true"], text=True))
    running.process.wait()
    running.process.pid = pid  # also its session's
    try:
        shown = "" if late else read_until(terminal, "puppets")
        if when == "in a worker's set-up":
            wait_for_worker(running)
        time.sleep(1.2)
        with ThreadPoolExecutor(1) as pool:
            asked = None
            if not late:
                running.port = int(re.search(r":(\d+): serves", shown)[1])
            if when in ("answering", "twice"):
                asked = pool.submit(running.post, "answer 3" if when == "answering" else "answer 25")
                time.sleep(0.7)
            since = time.monotonic()
            os.write(terminal, b"\x03")
            if when == "twice":
                time.sleep(1.0)
                os.write(terminal, b"\x03")
            told = read_until(terminal, None)
            assert time.monotonic() - since < 12, told
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            running.is_gone()
            if when == "answering":
                assert asked.result()[0] == 200
            elif asked is not None:
                asked.exception()
        assert code == 130 and told.replace("^C", "").split() == ["Interrupted."], told
    finally:
        for one in running.family():
            os.kill(one, signal.SIGKILL)
        os.close(terminal)


def read_until(terminal: int, word: str | None) -> str:
    """What a terminal shows until a word; None is until it is closed."""
    shown, end = "", time.monotonic() + 60
    while time.monotonic() < end and (word is None or word not in shown):
        if not select.select([terminal], [], [], 0.2)[0]:
            continue
        try:
            part = os.read(terminal, 4096).decode()
        except OSError:  # nobody has its other end any more
            return shown
        if not part:
            return shown
        shown += part
    return shown
