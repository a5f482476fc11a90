"""The server, in processes of its own: the page's commands, the openai client, a killed worker, the end."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from served import picture, save_digits, save_speech, sound, utterances

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def server(*words: str, **environment: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Its address, and its process."""
    command = [sys.executable, "-c", "from lora_lightning.app.entry_point import main; main()", "serve"]
    process = subprocess.Popen(
        [*command, *words, "port=0", "threads=1"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment},
    )  # fmt: skip
    try:
        line = process.stdout.readline()
        address = re.match(r"(http://127\.0\.0\.1:\d+): serves ", line)
        assert address, (line, process.stderr.read())
        yield address[1], process
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def post(address: str, body: bytes, seconds: float = 120.0) -> str:
    with urllib.request.urlopen(urllib.request.Request(address, body), timeout=seconds) as answer:
        return answer.read().decode()


def probabilities(answer: str) -> dict[str, float]:
    """By the class."""
    return {one["label"]: one["probability"] for one in json.loads(answer)["predictions"]}


def test_a_life_of_a_server(tmp_path: Path, monkeypatch, capsys) -> None:
    """Started, asked, its worker killed, asked again, ended while a request runs; nothing is left."""
    for seed, name in enumerate(["ada", "bob"]):
        save_digits(tmp_path / name, seed)
    with server(f"adapters={tmp_path}", "max_wait_ms=1500") as (address, process):
        first = post(f"{address}/v1/classify?adapter=ada", picture(1))
        assert '"adapter":"ada"' in first
        (tmp_path / "picture.png").write_bytes(picture(1))
        page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
        commands = [line for line in page.splitlines() if line.startswith("curl ")]
        for command in commands:
            line = command.replace("http://127.0.0.1:8000", address)
            run = subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=120)
            assert '"error"' not in run.stdout and '"ada"' in run.stdout, (command, run)
        assert len(commands) == 3
        (block,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
        monkeypatch.chdir(tmp_path)
        exec(block.replace("http://127.0.0.1:8000", address), {})
        names, best, refusal = capsys.readouterr().out.splitlines()
        assert names == "['base', 'ada', 'bob']" and re.fullmatch(r"\w+: 0\.\d\d", best)
        assert refusal.startswith("404 adapter=ida: there is none of this name.")
        for path in ("/litserve/info", "/litserve/health", "/info", "/redoc"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(f"{address}{path}")
        assert "script" in urllib.request.urlopen(f"{address}/").headers["content-security-policy"]
        save_digits(tmp_path / "cyd", 5)  # found while it runs
        time.sleep(1.1)
        assert '"adapter":"cyd"' in post(f"{address}/v1/classify?adapter=cyd", picture(1))
        metrics = urllib.request.urlopen(f"{address}/metrics").read().decode()
        worker = int(re.search(r'lora_adapters_in_memory\{worker="(\d+)"\} 2', metrics)[1])
        assert urllib.request.urlopen(f"{address}/ready").status == 200
        os.kill(worker, signal.SIGKILL)
        with pytest.raises(urllib.error.HTTPError, match="503"):  # noqa: PT012
            for _ in range(100):  # until it is seen
                urllib.request.urlopen(f"{address}/ready")
                time.sleep(0.1)
        again = None
        for _ in range(120):
            with contextlib.suppress(urllib.error.HTTPError, TimeoutError):
                again = post(f"{address}/v1/classify?adapter=ada", picture(1))
                break
            time.sleep(1)
        assert probabilities(again) == pytest.approx(probabilities(first), rel=0, abs=1e-5)
        answers: list[str] = []
        url = f"{address}/v1/classify?adapter=ada"
        asking = threading.Thread(target=lambda: answers.append(post(url, picture(1))))
        asking.start()
        time.sleep(0.7)  # it waits for others now
        process.terminate()
        asking.join(60)
        assert probabilities(answers[0]) == pytest.approx(probabilities(first), rel=0, abs=1e-5)
        assert process.wait(60) == 0
        assert process.stderr.read() == ""
    listed = subprocess.run(["ps", "-A", "-o", "ppid="], capture_output=True, text=True).stdout.split()
    assert str(process.pid) not in listed


def test_the_openai_client(tmp_path: Path) -> None:
    import openai

    save_speech(tmp_path / "voices" / "ada", 0)
    (tmp_path / "a.wav").write_bytes(sound(utterances(5.0, pause=1.0)))
    with server(f"adapters={tmp_path / 'voices'}", LORA_LIGHTNING_TOKEN="s3cret") as (address, _):
        client = openai.OpenAI(api_key="s3cret", base_url=f"{address}/v1", max_retries=0)

        def ask(**options):
            with open(tmp_path / "a.wav", "rb") as file:
                return client.audio.transcriptions.create(file=file, **{"model": "ada", **options})

        text = ask().text
        assert text and ask(response_format="verbose_json").text == text
        assert ask(response_format="text") == text + "\n"
        *deltas, done = list(ask(stream=True))
        assert "".join(d.delta for d in deltas) == text == done.text
        with pytest.raises(openai.NotFoundError, match="whisper-1: there is none of this name"):
            ask(model="whisper-1")
        assert [m.id for m in client.models.list()] == ["base", "ada"]
        client.api_key = "other"
        with pytest.raises(openai.AuthenticationError, match="give the token"):
            ask()
        assert urllib.request.urlopen(f"{address}/health").status == 200
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{address}/openapi.json")
        assert "<title>" in urllib.request.urlopen(f"{address}/").read().decode()


def test_two_servers_of_one_folder(tmp_path: Path) -> None:
    """One reads the folder, the other copies from it by its address; one is killed, and the other goes on."""
    shelf, body = tmp_path / "shelf", picture(1)
    save_digits(shelf / "ada", 0)

    def ask(address: str, name: str) -> dict[str, float]:
        return probabilities(post(f"{address}/v1/classify?adapter={name}", body))

    with (
        server(f"adapters={shelf}") as (one, first),
        server(f"adapters=file://{shelf}", XDG_CACHE_HOME=str(tmp_path / "cache")) as (other, _),
    ):
        assert ask(one, "ada") == pytest.approx(ask(other, "ada"), rel=0, abs=1e-5)
        save_digits(shelf / "bob", 1)
        time.sleep(1.1)
        bob = ask(other, "bob")
        assert bob != ask(other, "ada") and bob == pytest.approx(ask(one, "bob"), rel=0, abs=1e-5)
        first.kill()
        first.wait(10)
        time.sleep(3)  # its processes look twice a second
        with pytest.raises(OSError, match="refused"):
            ask(one, "ada")
        assert ask(other, "bob") == pytest.approx(bob, rel=0, abs=1e-5)


@pytest.mark.parametrize("words", [["adapter={}/broken"], ["adapters={}/none"]])
def test_a_server_that_cannot_begin_ends_with_a_message(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    save_digits(tmp_path / "broken", 0)
    (tmp_path / "broken" / "adapter_model.safetensors").write_bytes(b"half")
    command = [sys.executable, "-c", "from lora_lightning.app.entry_point import main; main()", "serve"]
    ended = subprocess.run(
        [*command, *[w.format(tmp_path) for w in words], "port=0"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 2 and ended.stdout == ""
    assert "Traceback" not in ended.stderr and len(ended.stderr.strip().splitlines()) == 2, ended.stderr


def test_a_listening_process_that_is_killed_ends_the_server_with_a_message(tmp_path: Path) -> None:
    save_digits(tmp_path / "ada", 0)
    with server(f"adapters={tmp_path}", "workers=2") as (address, process):
        asked = [f"{address}/v1/classify?adapter=ada"] * 6
        with ThreadPoolExecutor(6) as pool:
            answers = [*map(probabilities, pool.map(lambda url: post(url, picture(1)), asked))]
        for answer in answers:  # of batches of different sizes, whose sums differ in the last bits
            assert answer == pytest.approx(answers[0], rel=0, abs=1e-5)
        port = address.rpartition(":")[2]
        held = subprocess.run(["ss", "-ltnpH", f"sport = :{port}"], capture_output=True, text=True).stdout
        os.kill(int(re.search(r"pid=(\d+)", held)[1]), signal.SIGKILL)
        assert process.wait(90) == 2
        assert "the process that listens has ended: start the server again." in process.stderr.read()
