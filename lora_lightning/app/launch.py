"""Around a job: user errors as one message, a quiet Lightning, and processes that start right."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import signal
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from lora_lightning.app import interrupts
from lora_lightning.app.compose import USERS
from lora_lightning.app.console import short_path
from lora_lightning.app.interrupts import INTERRUPTED
from lora_lightning.app.logger_failures import logger_failure
from lora_lightning.app.recipe_file import WORD, RecipeFile
from lora_lightning.errors import UserError
from lora_lightning.trainer.compat import is_a
from lora_lightning.utils.ranks import on_rank_zero

PROGRAM = Path(__file__).with_name("process.py")
TRACEBACKS = "HYDRA_FULL_ERROR"
FAILED, MISTAKE, LOST, PREEMPTED = 1, 2, 3, 128 + signal.SIGTERM  # exit codes, and INTERRUPTED
# What gloo and NCCL say when a process at the other end has ended, or its machine is silent.
LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "caused pair closure",
    "Timed out waiting",
    "NCCL communicator was aborted",
    "Watchdog caught collective operation timeout",
    "remote process has terminated",
    "failed to recv",
)
DISTRIBUTED = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
CHATTER = (
    r".*does not have many workers.*",
    r".*(Checkpoint|Experiment logs) directory .* exists and is not empty.*",
    r".*is smaller than the logging interval.*",
    r".*Be aware that when using `ckpt_path`, callbacks used to create.*",
    r".*You requested to overfit but enabled train dataloader shuffling.*",
    r".*The dirpath has changed from.*",
    r".*frozen weights of .* look random.*",  # said before, with the options that mend it
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
)


@contextlib.contextmanager
def hydra_raises() -> Iterator[None]:
    """Let Hydra raise instead of printing errors its own way, so that `reported` can word them."""
    before = os.environ.get(TRACEBACKS)
    os.environ[TRACEBACKS] = "1"
    try:
        yield
    finally:
        _restore(TRACEBACKS, before)


@contextlib.contextmanager
def started_with(arguments: list[str]) -> Iterator[None]:
    """Meanwhile this process looks as if it had been started so: Hydra reads it, and Lightning copies it."""
    before, sys.argv = sys.argv, arguments
    try:
        yield
    finally:
        sys.argv = before


class Reported(SystemExit):
    """The end of a process whose user has been told why."""

    def __init__(self, message: str, code: int) -> None:
        self.message = message
        super().__init__(code)


@contextlib.contextmanager
def reported(folder: Path | None = None, tracebacks: bool = False) -> Iterator[None]:
    """Turn what a user can cause into one message on stderr and an exit code.

    Args:
        folder: the run's, to say where an interrupted run can go on.
        tracebacks: let them through instead, since HYDRA_FULL_ERROR=1 asks for them.

    Raises:
        Reported: in place of such an error.
    """
    try:
        yield
    except BrokenPipeError:  # `train.py --help | head`: the reader has gone, and with it stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        explained = explain(error, folder)
        if explained is None or tracebacks:
            raise
        message, code = explained
        if on_rank_zero() or code == LOST:  # the first process may be the one that has gone
            print(f"\n{message}", file=sys.stderr, flush=True)
        interrupts.said()
        raise Reported(message, code) from None


def explain(error: BaseException, folder: Path | None = None) -> tuple[str, int] | None:
    """The message and the exit code for an error that a user can mend; None for any other."""
    chain = list(_chain(error))
    if isinstance(error, Reported):
        return None
    if any(isinstance(e, KeyboardInterrupt) for e in chain):
        return f"Interrupted.{_resume(folder)}", INTERRUPTED
    if is_a(error, "SIGTERMException"):
        code = getattr(error, "code", None)
        return f"Ended by SIGTERM.{_resume(folder)}", PREEMPTED if code is None else int(code)
    if isinstance(error, SystemExit):
        return None
    for e in chain:
        if isinstance(e, UserError):
            return str(e), MISTAKE
        if failure := logger_failure(e, folder):
            return f"{failure}{_resume(folder)}", FAILED
        if (isinstance(e, OSError) and e.errno == errno.ENOSPC) or "No space left on device" in str(e):
            return _no_space(e, folder), MISTAKE
    if isinstance(error, RuntimeError) and any(sign in str(error) for sign in LOST_PEER):
        first = str(error).strip().splitlines()[0]
        return f"Another process of this run has gone: {first[:200]}\n{_resume(folder).strip()}", LOST
    if type(error).__module__.startswith("submitit."):
        return f"A job of the sweep failed. {error}", FAILED
    if (torch := sys.modules.get("torch")) and isinstance(error, torch.OutOfMemoryError):
        return (
            "The device's memory is full. Give a smaller data.batch_size with"
            " trainer.accumulate_grad_batches, or trainer.precision=bf16-mixed.",
            MISTAKE,
        )
    if isinstance(error, (PermissionError, FileExistsError, NotADirectoryError)):
        return f"Cannot write {error.filename}: {error.strerror}. Give another hydra.run.dir.", MISTAKE
    if is_a(error, "MisconfigurationException"):
        return f"Lightning refuses these options: {error}", MISTAKE
    if isinstance(error, RuntimeError) and str(error).startswith("Error(s) in loading state_dict"):
        lines = [line.strip() for line in str(error).splitlines()[1:4]]
        detail = "\n".join(f"  {line[:160]}{'…' * (len(line) > 160)}" for line in lines)
        return f"ckpt_path: the checkpoint was made by another configuration:\n{detail}", MISTAKE
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        return f"{error}\n{TRACEBACKS}=1 shows where.", MISTAKE
    return None


def _resume(folder: Path | None) -> str:
    last = folder / "checkpoints" / "last.ckpt" if folder else None
    return f" Go on with resume={short_path(last.parents[1])}" if last and last.exists() else ""


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what led to it: causes, and for an exit what was being handled."""
    while error is not None:
        yield error
        leaving = isinstance(error, SystemExit) and not error.__suppress_context__
        error = error.__cause__ or (error.__context__ if leaving else None)


def _no_space(error: BaseException, folder: Path | None) -> str:
    name = getattr(error, "filename", None) or folder
    place = f" for {short_path(name)}" if name else ""
    return (
        f"No space left on the device{place}. Free some, or give hydra.run.dir=FOLDER on another disk."
        " Files that were complete before are untouched."
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what tells a user nothing: Lightning's hints about hardware and its tips."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for pattern in CHATTER:
            warnings.filterwarnings("ignore", pattern)
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextlib.contextmanager
def one_job(tracebacks: bool = False) -> Iterator[None]:
    """Make the processes that Lightning starts for this job run this job alone, in its folder, and
    leave nothing of it behind for the next job of a sweep.

    Lightning starts each with this process's `sys.argv` and the configured `hydra.run.dir`: under a
    sweep that would be the whole sweep again, in another folder.

    Args:
        tracebacks: the user wants them, of those processes too.
    """
    environment = {name: os.environ.get(name) for name in DISTRIBUTED}
    hydra = HydraConfig.get()
    before = os.environ.pop(TRACEBACKS, None)
    if tracebacks:
        os.environ[TRACEBACKS] = "1"
    launched: Any = sys.modules["__main__"]
    module = getattr(launched, "__spec__", None)
    # Whatever has started this process, submitit for one, the others start from the application.
    launched.__spec__ = None
    node: Any = hydra
    with read_write(node), open_dict(node):
        node.run.dir = hydra.runtime.output_dir
    try:
        with started_with([str(PROGRAM), *_words_of(hydra)]):
            yield
    finally:
        launched.__spec__ = module
        _restore(TRACEBACKS, before)
        if environment["LOCAL_RANK"] is None and "lightning" in sys.modules:
            _end_processes()
            for name, value in environment.items():
                _restore(name, value)


def _words_of(hydra: HydraConf) -> list[str]:
    """The command line that runs this job alone."""
    own = [source for source in hydra.runtime.config_sources if source.provider == USERS]
    folders = [source.path for source in own if source.schema == "file"]
    recipe = next((source.path for source in own if source.schema == RecipeFile.scheme()), None)
    node: Any = hydra.overrides
    given: Any = OmegaConf.to_container(node, resolve=False)  # ${…} as it was typed
    words = [w for w in given["hydra"] if not w.lstrip("+").startswith(("hydra.mode", "hydra.sweep"))]
    task = [f"{WORD}{recipe}" if recipe and w.startswith(WORD) else w for w in given["task"]]
    return [*(f"--config-dir={f}" for f in folders), *task, *words, "hydra.mode=RUN"]


def _end_processes() -> None:
    import torch
    from lightning.pytorch.utilities import rank_zero_only

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    rank_zero_only.rank = 0  # type: ignore[attr-defined] # of a function, where Lightning keeps it


def _restore(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


@contextlib.contextmanager
def wrapped(wanted: bool, width: int = 100) -> Iterator[None]:
    """Hydra lists all choices of a group in one line, however long: break what is printed meanwhile."""
    if not wanted:
        yield
        return
    page = io.StringIO()
    try:
        with contextlib.redirect_stdout(page):
            yield
    finally:
        for line in page.getvalue().splitlines():
            listing = len(line) > width and line[:1].isalpha()
            print(textwrap.fill(line, width, subsequent_indent="  ") if listing else line)
