"""Where the shards of a stream lie: patterns made into files, files opened here or behind any address."""

from __future__ import annotations

import itertools
import os
import re
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Literal

from lora_lightning.errors import ConfigError, MissingFileError, did_you_mean
from lora_lightning.utils.libraries import LibraryError, loading
from lora_lightning.utils.tables import truncate_list

Kind = Literal["tar", "parquet", "litdata"]
KINDS: dict[str, Kind] = {".tar": "tar", ".parquet": "parquet", ".pq": "parquet"}
INDEX = "index.json"  # by which a folder of litdata's is known
PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
MOST = 100_000  # shards that one pattern may name
BRACES = re.compile(r"\{([^{}]*)\}")


def find_shards(option: str, source: str | Sequence[str]) -> tuple[Kind, list[str]]:
    """The shards that an option's patterns name, in the order given, those of a glob by name.

    Args:
        option: its name, for errors.
        source: paths or addresses, with braces (`train-{000..099}.tar`, `{a,b}.tar`) or globs; or folders.

    Returns:
        Of which kind they are, all alike, and their names: files, or for litdata the folders.

    Raises:
        ConfigError: a pattern that is none; files of another kind, or of several.
        MissingFileError: a file or folder that is not there, and what is.
    """
    patterns = [source] if isinstance(source, str) else list(source)
    names = [name for pattern in patterns for name in _matching(option, pattern)]
    kinds = {name: _kind(option, name) for name in dict.fromkeys(names)}
    if len(set(kinds.values())) > 1:
        first = {kind: name for name, kind in reversed(kinds.items())}
        told = " and ".join(f"{kind}: {name}" for kind, name in reversed(first.items()))
        raise ConfigError([f"{option}={source}: names shards of several kinds, {told}. Give one kind."])
    return next(iter(kinds.values())), list(kinds)


def expand_braces(option: str, pattern: str) -> list[str]:
    """`a-{8..10}.tar` is `a-8.tar`, `a-9.tar`, `a-10.tar`, `{08..10}` keeps the zero; `{a,b}` is each.

    Raises:
        ConfigError: braces that do not say a range or a choice.
    """
    parts = BRACES.split(pattern)
    if "{" in "".join(parts[::2]) or "}" in "".join(parts[::2]):
        raise ConfigError(
            [f"{option}={pattern}: has braces that do not close; write {{000..099}} or {{a,b}}."]
        )
    choices = [[p] if i % 2 == 0 else _choices(option, pattern, p) for i, p in enumerate(parts)]
    return ["".join(words) for words in itertools.product(*choices)]


def _choices(option: str, pattern: str, inside: str) -> list[str]:
    if found := re.fullmatch(r"(\d+)\.\.(\d+)", inside, re.ASCII):
        first, last = found.groups()
        count = int(last) - int(first) + 1
        if not 0 < count <= MOST:
            raise ConfigError(
                [f"{option}={pattern}: {{{inside}}} counts {max(count, 0):,} shards; give 1 to {MOST:,}."]
            )
        return [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    if "," in inside:
        return inside.split(",")
    raise ConfigError(
        [f"{option}={pattern}: {{{inside}}} is no range and no choice; write {{000..099}} or {{a,b}}."]
    )


def _matching(option: str, pattern: str) -> list[str]:
    named = expand_braces(option, pattern.removeprefix("file://"))
    found = {one: _present(option, one) for one in named}
    if gone := [one for one, files in found.items() if not files]:
        raise MissingFileError(_missing(option, pattern, gone, len(named)))
    return [file for files in found.values() for file in files]


def _present(option: str, name: str) -> list[str]:
    """The files that a name or glob stands for; the shards of a folder of shards; the folder of litdata's."""
    files = files_of(option, name)
    plain = name if is_url(name) else os.path.expanduser(name)

    def matching(glob: str) -> list[str]:
        return sorted(files.unstrip_protocol(f) if is_url(name) else f for f in files.glob(glob))

    if any(sign in name for sign in "*?["):
        return matching(plain)
    if not files.exists(plain):
        return []
    if not files.isdir(plain) or files.exists(f"{plain.rstrip('/')}/{INDEX}"):
        return [plain]
    inside = [f for suffix in KINDS for f in matching(f"{plain.rstrip('/')}/*{suffix}")]
    if not inside:
        raise ConfigError(
            [
                f"{option}={name}: the folder holds no shards: give one with *.tar, *.parquet or "
                f"litdata's {INDEX}."
            ]
        )
    return inside


def _kind(option: str, name: str) -> Kind:
    lower = name.lower()
    if lower.endswith(PACKED):
        raise ConfigError(
            [
                f"{option}={name}: a packed archive cannot be read from its middle; unpack it to .tar first "
                f"(gunzip FILE), which costs no space worth naming: pictures are packed already."
            ]
        )
    for suffix, kind in KINDS.items():
        if lower.endswith(suffix):
            return kind
    files = files_of(option, name)
    if files.exists(f"{name.rstrip('/')}/{INDEX}"):
        return "litdata"
    raise ConfigError(
        [
            f"{option}={name}: is of no known kind; give .tar (WebDataset), .parquet (Hugging Face), or a "
            f"folder that litdata optimized, with its {INDEX}."
        ]
    )


def _missing(option: str, pattern: str, gone: list[str], count: int) -> str:
    some = f"{len(gone)} of {count} files are" if count > 1 else "it is"
    lines = [f"{option}={pattern}: {some} not there. Give what is.", f"  looked for: {truncate_list(gone)}"]
    if not is_url(pattern):
        folder = Path(gone[0]).expanduser().absolute().parent
        if folder.is_dir():
            inside = sorted(f.name for f in folder.iterdir())
            near = did_you_mean(Path(gone[0]).name, inside[:MOST])
            lines.append(
                f"  near miss:  {folder} holds {truncate_list(inside) if inside else 'nothing'}.{near}"
            )
        else:
            above = next(p for p in folder.parents if p.is_dir())
            lines.append(f"  near miss:  there is no folder {folder}; {above} is the last one that there is.")
    return "\n".join(lines)


def is_url(name: str) -> bool:
    """Whether a name is an address, such as `s3://bucket/a.tar`, and no path."""
    return re.match(r"[A-Za-z][\w+.-]*://", name) is not None


def files_of(option: str, name: str) -> Any:
    """The file system behind a name, by fsspec.

    Raises:
        ConfigError: an address of a kind that fsspec does not know.
        LibraryError: the package for that kind is not installed; fsspec says which.
    """
    with loading("fsspec"):
        import fsspec
    protocol = name.partition("://")[0] if is_url(name) else "file"
    try:
        return fsspec.filesystem(protocol)
    except ValueError:
        known = fsspec.available_protocols()
        raise ConfigError(
            [
                f"{option}={name}: {protocol}:// is no address that fsspec knows."
                f"{did_you_mean(protocol, known)} Install what adds it, or give a file."
            ]
        ) from None
    except ImportError as error:
        packages = _packages(str(error))
        remedy = f": pip install {' '.join(packages)}" if packages else ""
        raise LibraryError(f"{option}={name}: {str(error).rstrip('.')}{remedy}") from None


def _packages(said: str) -> list[str]:
    """What fsspec asks for: `Install the x package to …`, or `… requires "x" and "y" to be installed`."""
    one = re.search(r'nstall (?:the )?"?([\w-]+)', said)
    return [one[1]] if one else re.findall(r'"([\w-]+)"', said)


class OpenFiles:
    """A few files kept open in each process, read at any place; the one unused longest is closed.

    Args:
        most: how many.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._open: OrderedDict[str, IO[bytes]] = OrderedDict()
        self._process = os.getpid()

    def __len__(self) -> int:
        return len(self._open)

    def read(self, name: str, offset: int, size: int) -> bytes:
        """So many bytes from there, or fewer at the file's end."""
        file = self.file(name)
        file.seek(offset)
        return file.read(size)

    def file(self, name: str) -> IO[bytes]:
        """The open file; another process has its own, since two would share one place in it."""
        if self._process != os.getpid():
            self._open, self._process = OrderedDict(), os.getpid()
        if name not in self._open:
            while len(self._open) >= self.most:
                self._open.popitem(last=False)[1].close()
            self._open[name] = open_shard(name)
        self._open.move_to_end(name)
        return self._open[name]

    def __getstate__(self) -> dict[str, Any]:
        return {"most": self.most}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(vars(OpenFiles(state["most"])))


def open_shard(name: str) -> IO[bytes]:
    """A file here or behind an address, for reading."""
    return files_of("source", name).open(name, "rb") if is_url(name) else open(name, "rb")


def size_and_time(name: str) -> tuple[int, str]:
    """Bytes of a file, and what changes when it is written again."""
    info = files_of("source", name).info(name)
    stamp = next((info[k] for k in ("mtime", "LastModified", "ETag", "etag", "updated") if k in info), "")
    return int(info["size"]), str(stamp)
