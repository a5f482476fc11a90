"""The libraries around torch: which versions load together, and one message where one does not load."""

from __future__ import annotations

import contextlib
import importlib
import traceback
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from lora_lightning.errors import UserError

TORCHVISION = {"2.11": "0.26", "2.12": "0.27", "2.13": "0.28", "2.14": "0.29"}  # by the torch it is built for
TORCHAUDIO = "2.11.0"  # beside each of these; 2.11.1 does not load beside torch 2.11 and 2.12
BINARY = ("torchvision", "torchaudio")  # what is compiled for one torch
EXTRAS = {"timm": "vision", "torchvision": "vision", "torchaudio": "speech"}


class LibraryError(UserError, ImportError):
    """A library that is missing, or that does not load beside the torch that is installed."""


@contextlib.contextmanager
def loading(name: str, extra: str | None = None) -> Iterator[None]:
    """Around the imports of a library that stands on torch, at the end of a module's own imports.

    Args:
        name: what is imported.
        extra: of this package, that brings it; None is the one of `EXTRAS`.

    Raises:
        LibraryError: it is missing or does not load. Says what is installed, what fits and what to type.
    """
    try:
        yield
    except LibraryError:
        raise
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise LibraryError(_explained(name, extra or EXTRAS.get(name), error)) from None


def load_lightning() -> None:
    """Import Lightning before a module of ours does: its metrics import torchvision where that is installed.

    Raises:
        LibraryError: as `loading` does.
    """
    with loading("lightning"):
        importlib.import_module("lightning.pytorch")


def _explained(name: str, extra: str | None, error: Exception) -> str:
    chain = list(_chain(error))
    for cause in chain:
        root = (cause.name or "").partition(".")[0] if isinstance(cause, ModuleNotFoundError) else ""
        if root and find_spec(root) is None:
            what = f"{name} is" if root == name else f"{name} needs {root}, which is"
            return f"{what} not installed: pip install {_package(extra)}"
    culprit = _culprit(chain, name)
    beside = f" beside torch {_version('torch')}" if culprit in BINARY else ""
    reason = (str(chain[-1]).strip().splitlines() or [type(chain[-1]).__name__])[0]
    remedy = _remedy(culprit, extra)
    return f"{culprit} {_version(culprit)} does not load{beside}: {reason}\n{remedy}"


def _package(extra: str | None) -> str:
    return f"'lora-lightning[{extra}]'" if extra else "lora-lightning"


def _remedy(culprit: str, extra: str | None) -> str:
    return _remedy_of_binaries() if culprit in BINARY else f"Type: pip install --upgrade {_package(extra)}"


def _remedy_of_binaries() -> str:
    """What is installed, what fits it, and the command."""
    found = {n: v for n in ("torch", *BINARY) if (v := _version(n))}
    torch, _, build = found.get("torch", "").partition("+")
    minor = ".".join(torch.split(".")[:2])
    if minor not in TORCHVISION:
        minor = list(TORCHVISION)[-1]
        torch = f"{minor}.*"
    fitting = {"torch": torch, "torchvision": f"{TORCHVISION[minor]}.*", "torchaudio": TORCHAUDIO}
    words = [f'"{n}=={fitting[n]}"' for n in found]
    if all(v.startswith(fitting[n].rstrip("*")) for n, v in found.items()):
        words.insert(0, "--force-reinstall --no-deps")  # the versions fit, so they are of different builds
    if build:
        words.append(f"--index-url https://download.pytorch.org/whl/{build}")
    return (
        f"Installed: {', '.join(f'{n} {v}' for n, v in found.items())}. Torch {minor} takes torchvision "
        f"{TORCHVISION[minor]} and torchaudio {TORCHAUDIO}, all from one place.\n"
        f"Type: pip install {' '.join(words)}"
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what caused it, the first cause last."""
    while error is not None:
        yield error
        error = error.__cause__


def _culprit(chain: Sequence[BaseException], name: str) -> str:
    """The library in whose code it happened: timm, transformers and Lightning's metrics import others."""
    frames = [frame for e in chain for frame, _ in traceback.walk_tb(e.__traceback__)]
    roots = [str(frame.f_globals.get("__name__")).partition(".")[0] for frame in frames]
    return next((root for root in reversed(roots) if root in BINARY), name)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
