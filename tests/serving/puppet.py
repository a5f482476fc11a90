"""A server whose workers have no model: they do what the body says, `WORD SECONDS`. Run as a program.

`answer 2` answers after two seconds with the worker's process, `parts 2` tells a part each 0.1 s until then,
`die 0` ends the process as a signal would. `PUPPET_SETUP` in the environment is how many seconds they need to
begin.
"""

import os
import signal
import sys
import threading
import time

from lora_lightning.app import cli
from lora_lightning.app.interrupts import interruptible, leave_at_once
from lora_lightning.serving.asking import Ask, Event, Tell
from lora_lightning.serving.catalog import Catalog
from lora_lightning.serving.routes import Manners
from lora_lightning.serving.server import Place, Server


class Puppet:
    """In the place of an engine, and of its store."""

    def __init__(self, device: str) -> None:
        time.sleep(float(os.environ.get("PUPPET_SETUP", 0)))
        self.store = self

    def residents(self) -> list[object]:
        return []

    def submit(self, ask: Ask, tell: Tell) -> None:
        threading.Thread(target=self.act, args=(*ask.body.decode().split(), tell), daemon=True).start()

    @staticmethod
    def act(word: str, seconds: str, tell: Tell) -> None:
        end = time.monotonic() + float(seconds)
        while time.monotonic() < end:
            time.sleep(min(0.1, max(0.0, end - time.monotonic())))
            if word == "parts":
                tell(Event("part", {"segment": {"text": "word"}}))
        if word == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        tell(Event("answer", {"process": os.getpid(), "text": "word", "segments": []}))


def serve(words: list[str]) -> None:
    place = Place(port=0, accelerator="cpu", **{k: int(v) for k, v in (w.split("=") for w in words)})
    with interruptible():
        Server(Puppet, Catalog(), place, Manners(timeout=30.0), "puppets").serve()


if __name__ == "__main__":
    leave_at_once()
    cli.COMMANDS["puppets"] = serve
    cli.main(["puppets", *sys.argv[1:]])
