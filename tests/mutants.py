"""Whether the tests would notice: break the package in many small places, one at a time, and run them.

    python tests/mutants.py                        # every mutant, into mutants.json; goes on where it stopped
    python tests/mutants.py --only dora-norm-held  # one of them, again
    python tests/mutants.py --check                # whether each mutant's place is still in the package
    python tests/mutants.py --table                # what is known, as a table

Run it before and after the tests are changed: what the old ones caught the new ones must catch. The mutants
are in `mutants.yaml`. Each is run in a copy of the checkout: first the tests that are likely to catch it,
then, where these pass, the whole default suite. A test counts only if it passes on the copy unbroken.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PACKAGE = "lora_lightning"
FAILED = re.compile(r"^(?:FAILED|ERROR) (tests/\S+?\.py(?:::.*?)?)(?: - .*)?$", re.MULTILINE)
NO_TESTS = 5  # pytest's exit code where a selection is empty
LIKELY_SECONDS, SUITE_SECONDS = 900, 5400


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
        name: says what is broken.
        changes: fragment and what takes its place; of several the first that is there counts.
        likely: stems of test files, without `test_`, whose tests are tried first.
        k: pytest's `-k` for these, "" for all of them.
    """

    name: str
    changes: tuple[tuple[str, str], ...]
    likely: str
    k: str = ""


def mutants() -> list[Mutant]:
    """Those of `mutants.yaml`."""
    found = []
    for entry in yaml.safe_load((HERE / "mutants.yaml").read_text()):
        was, becomes = (v if isinstance(v, list) else [v] for v in (entry["was"], entry["becomes"]))
        changes = tuple(zip(was, becomes, strict=True))
        found.append(Mutant(entry["name"], changes, entry["likely"], entry.get("k", "")))
    return found


class Copy:
    """A copy of the checkout in which one mutant at a time stands in its place.

    Attributes:
        root: its folder.
        spared: node ids of tests that fail on it unbroken, and so catch nothing.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.spared, self._time = root, set[str](), int(time.time())
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        for name in listed.stdout.splitlines():
            if (ROOT / name).is_file():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, root / name)
        self.sources = {path: path.read_text() for path in (root / PACKAGE).rglob("*.py")}

    def place(self, mutant: Mutant) -> tuple[Path, str]:
        """The file that a mutant changes, and what it makes of it.

        Raises:
            LookupError: none of its fragments stands exactly once in the whole package.
        """
        counts = []
        for fragment, replacement in mutant.changes:
            found = [(path, text.count(fragment)) for path, text in self.sources.items() if fragment in text]
            counts.append(sum(n for _, n in found))
            if counts[-1] == 1:
                path = found[0][0]
                return path, self.sources[path].replace(fragment, replacement)
        raise LookupError(f"{mutant.name}: its fragments stand {counts} times in {PACKAGE}, not once")

    def misplaced(self, every: Iterable[Mutant]) -> list[str]:
        """The mutants that have no place, or no likely tests; each is said."""
        names = []
        for mutant in every:
            try:
                self.place(mutant)
                if self.likely(mutant):
                    continue
                print(f"{mutant.name}: there is no test file called {mutant.likely}")
            except LookupError as error:
                print(error)
            names.append(mutant.name)
        return names

    def write(self, path: Path, text: str) -> None:
        """Write a source; with a time of its own, so that no compiled file of before is taken for it."""
        path.write_text(text)
        self._time += 2
        os.utime(path, (self._time, self._time))

    def likely(self, mutant: Mutant) -> list[str]:
        """The test files whose stems a mutant names, and its `-k`."""
        stems = mutant.likely.split()
        files = [
            p
            for p in sorted((self.root / "tests").rglob("test_*.py"))
            if p.stem.removeprefix("test_") in stems
        ]
        selected = ["-k", mutant.k] if files and mutant.k else []
        return [*(str(p.relative_to(self.root)) for p in files), *selected]

    def pytest(self, arguments: list[str], seconds: int) -> list[str]:
        """The tests that fail, by node id. Hanging is failing too."""
        environment = {**os.environ, "PYTHONPATH": str(self.root), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", *arguments]
        process = subprocess.Popen(
            command, cwd=self.root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, start_new_session=True,
        )  # fmt: skip
        try:
            output = process.communicate(timeout=seconds)[0]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.communicate()
            return ["(the tests hang)"]
        found = FAILED.findall(output)
        if not found and process.returncode not in (0, NO_TESTS):
            found = [f"(pytest ended with {process.returncode})"]
        return found

    def run(self, mutant: Mutant, suite: bool) -> dict[str, object]:
        """Which test catches a mutant, of the likely ones or of the whole suite, and the seconds it took."""
        began = time.monotonic()
        source, broken = self.place(mutant)
        spared = [word for node in self.spared for word in ("--deselect", node)]
        choices = [("likely", self.likely(mutant), LIKELY_SECONDS)]
        choices += [("suite", ["-n", "2", "tests"], SUITE_SECONDS)] if suite else []
        self.write(source, broken)
        found: list[str] = []
        try:
            for by, arguments, seconds in choices:  # noqa: B007
                if found := self.pytest(["-x", *arguments, *spared], seconds) if arguments else []:
                    break
        finally:
            self.write(source, self.sources[source])
        survived = "SURVIVED" if suite else "not caught by the likely tests"
        return {
            "caught": found[0] if found else survived,
            "by": by if found else "",
            "file": str(source.relative_to(self.root)),
            "seconds": round(time.monotonic() - began),
        }

    def try_unbroken(self, nodes: set[str]) -> None:
        """Run these tests on the copy unbroken; those that fail are spared from now on."""
        known = [n for n in sorted(nodes) if not n.startswith("(")]
        failing = self.pytest(known, SUITE_SECONDS) if known else []
        if not {*failing} <= {*known}:
            raise RuntimeError(f"the tests that have caught mutants cannot be run unbroken: {failing}")
        self.spared |= {*failing}


def table(results: dict[str, dict[str, object]]) -> str:
    """One line a mutant, and the sum."""
    width = max((len(name) for name in results), default=0)
    lines = [f"{n:{width}}  {r['seconds']:>5} s  {r['file']}  {r['caught']}" for n, r in results.items()]
    caught = sum(bool(r["by"]) for r in results.values())
    return "\n".join([*lines, f"{caught} of {len(results)} caught"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("mutants.json"), help="results; done ones are skipped"
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these mutants, done or not")
    parser.add_argument("--likely", action="store_true", help="never run the whole suite")
    parser.add_argument("--check", action="store_true", help="look for each mutant's place alone")
    parser.add_argument("--table", action="store_true", help="print what --out holds")
    options = parser.parse_args()
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    if options.table:
        print(table(results))
        return
    every = {mutant.name: mutant for mutant in mutants()}
    if unknown := set(options.only or ()) - every.keys():
        parser.error(f"no such mutant: {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = Copy(Path(folder))
        misplaced = copy.misplaced(every.values())
        wanted = options.only or [name for name in every if name not in results]
        todo = [] if options.check else [name for name in wanted if name not in misplaced]
        while todo:
            for name in todo:
                results[name] = copy.run(every[name], suite=not options.likely)
                options.out.write_text(json.dumps(results, indent=1) + "\n")
                print(table({name: results[name]}).splitlines()[0], flush=True)
            caught = {name: str(results[name]["caught"]) for name in todo if results[name]["by"]}
            copy.try_unbroken({*caught.values()})
            todo = [name for name, node in caught.items() if node in copy.spared]
    print(f"{len(every)} mutants" if options.check else table(results).splitlines()[-1])
    if misplaced:
        sys.exit(f"{len(misplaced)} of {len(every)} mutants have no place: mend mutants.yaml")


if __name__ == "__main__":
    main()
