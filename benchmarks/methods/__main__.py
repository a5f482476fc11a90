"""Methods compared fairly: each rate by validation data, from as many for each; then seeds of their own.

python -m benchmarks.methods --suite embedded              goes on where it was stopped
python -m benchmarks.methods --suite embedded --tasks vit_digits --methods lora,pissa
python -m benchmarks.methods --suite embedded --table      the table and the picture of what is there

A run is a line of `results/methods_SUITE.jsonl`, appended as it ends; a killed benchmark loses the run that
it was at. Several processes may be started: each takes methods that no other has.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

from benchmarks.fits import quiet
from benchmarks.measure import keep_memory
from benchmarks.methods.catalog import METHODS, unknown
from benchmarks.methods.ledger import Ledger
from benchmarks.methods.report import write
from benchmarks.methods.search import Cell, Train, carry_out
from benchmarks.methods.suites import SUITES, cells
from benchmarks.real_files import require_files
from lora_lightning.errors import UserError
from lora_lightning.utils.progress import working

RESULTS = Path(__file__).parents[1] / "results"
CLAIMS = Path(tempfile.gettempdir()) / "benchmarks_methods_claims"
WAIT = 60  # seconds before what another process has is looked at again


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--suite", choices=SUITES, required=True)
    parser.add_argument("--tasks", type=_names, default=None, help="some of the suite's, by commas")
    parser.add_argument("--methods", type=_names, default=None, help="some of them, by commas")
    parser.add_argument("--table", action="store_true", help="train nothing")
    options = parser.parse_args()
    tasks, methods = options.tasks or list(SUITES[options.suite]), options.methods or list(METHODS)
    wrong = unknown(tasks, SUITES[options.suite], "--tasks") + unknown(methods, METHODS, "--methods")
    if wrong:
        sys.exit("\n".join(wrong))
    quiet()
    warnings.filterwarnings("ignore")  # torchvision's, PEFT's
    keep_memory()
    ledger = Ledger(RESULTS / f"methods_{options.suite}.jsonl", CLAIMS)
    try:
        if not options.table:
            if options.suite == "real":
                require_files()
            work(options.suite, tasks, methods, ledger)
        write(options.suite, ledger, RESULTS)
    except UserError as error:
        sys.exit(str(error))


def work(suite: str, tasks: list[str], methods: list[str], ledger: Ledger) -> None:
    """Carry out every cell, those of other processes last."""
    waiting = cells(suite, tasks, methods, METHODS)
    while waiting:
        busy = []
        for task, method in working(waiting, f"suite {suite}", "methods"):
            with ledger.claimed(suite, task, method) as own:
                if own:
                    carry_out(cell(suite, task, method), ledger, trainer_of(suite, task, method))
                else:
                    busy.append((task, method))
            gc.collect()
        if len(busy) == len(waiting):
            time.sleep(WAIT)
        waiting = busy


def cell(suite: str, task: str, method: str) -> Cell:
    """What a method gets on a task."""
    from benchmarks.methods.training import centre

    of = SUITES[suite][task]
    return Cell(task, method, centre(of, METHODS[method]), of.better, of.budget, of.rates_of)


def trainer_of(suite: str, task: str, method: str) -> Train:
    """What trains a method on a task, by stage, rate and seed."""
    if SUITES[suite][task].by_commands:
        from benchmarks.methods.commands import train
    else:
        from benchmarks.methods.training import train
    return partial(train, SUITES[suite][task], METHODS[method])


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


if __name__ == "__main__":
    main()
