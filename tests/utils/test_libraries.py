"""Which libraries load together: one message where one does not, and one place for what fits."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from lora_lightning.app.signatures import import_problem
from lora_lightning.utils import libraries
from lora_lightning.utils.libraries import LibraryError, loading

ROOT = Path(__file__).parents[2]
SYMBOL = "/site/torchaudio/lib/_torchaudio.abi3.so: undefined symbol: torch_exception_get_what"
NMS = "operator torchvision::nms does not exist"
BROKEN = {
    "torchaudio": f"raise OSError('Could not load this library: _torchaudio.so') from OSError('{SYMBOL}')",
    "torchvision": f"raise RuntimeError('{NMS}')",
}


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """Modules of these names that raise, in place of what is installed, of these versions."""

    def breaks(versions, **modules):
        for name, code in modules.items():
            for loaded in [n for n in sys.modules if n.partition(".")[0] == name]:
                monkeypatch.delitem(sys.modules, loaded)
            (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(libraries, "_version", versions.get)

    return breaks


def message(name, extra=None):
    with pytest.raises(LibraryError) as raised, loading(name, extra):
        __import__(name)
    assert isinstance(raised.value, ImportError) and raised.value.__suppress_context__
    return str(raised.value).splitlines()


def test_a_library_built_for_another_torch(broken):
    broken({"torch": "2.12.1", "torchvision": "0.27.1", "torchaudio": "2.11.1"}, **BROKEN)
    assert message("torchaudio") == [
        f"torchaudio 2.11.1 does not load beside torch 2.12.1: {SYMBOL}",
        "Installed: torch 2.12.1, torchvision 0.27.1, torchaudio 2.11.1. Torch 2.12 takes torchvision 0.27"
        " and torchaudio 2.11.0, all from one place.",
        'Type: pip install "torch==2.12.1" "torchvision==0.27.*" "torchaudio==2.11.0"',
    ]


@pytest.mark.parametrize("name", ["timm", "lightning", "transformers"])
def test_the_library_behind_is_named(broken, name):
    broken({"torch": "2.14.1", "torchvision": "0.28.0"}, **BROKEN, **{name: "import torchvision"})
    first, _, command = message(name)
    assert first == f"torchvision 0.28.0 does not load beside torch 2.14.1: {NMS}"
    assert command == 'Type: pip install "torch==2.14.1" "torchvision==0.29.*"'


def test_versions_that_fit_are_of_different_builds(broken):
    broken({"torch": "2.13.0+cpu", "torchaudio": "2.11.0"}, **BROKEN)
    assert message("torchaudio")[-1] == (
        'Type: pip install --force-reinstall --no-deps "torch==2.13.0" "torchaudio==2.11.0"'
        " --index-url https://download.pytorch.org/whl/cpu"
    )


@pytest.mark.parametrize("torch", ["2.9.1", "2.15.0", "3.0"])
def test_beside_a_torch_that_nothing_fits_the_newest_set_is_named(broken, torch):
    broken({"torch": torch, "torchvision": "0.29.1"}, **BROKEN)
    assert message("torchvision")[-1] == 'Type: pip install "torch==2.14.*" "torchvision==0.29.*"'


def test_what_is_missing_is_named_with_the_extra_that_brings_it(broken):
    broken({}, timm="import nowhere_at_all", transformers="from torch import no_such_name")
    assert message("timm") == [
        "timm needs nowhere_at_all, which is not installed: pip install 'lora-lightning[vision]'"
    ]
    assert message("nowhere", "detr") == ["nowhere is not installed: pip install 'lora-lightning[detr]'"]
    first, command = message("transformers", "whisper")
    assert first.startswith("transformers None does not load: cannot import name 'no_such_name'")
    assert command == "Type: pip install --upgrade 'lora-lightning[whisper]'"


def test_a_target_that_needs_it_says_so(broken, tmp_path, capfd):
    broken({"torch": "2.12.1", "torchaudio": "2.11.1"}, **BROKEN)
    (tmp_path / "own_recognizer.py").write_text(
        "from lora_lightning.utils.libraries import loading\n"
        "with loading('torchaudio'):\n    import torchaudio\n"
    )
    with pytest.raises(LibraryError, match=r"torchaudio 2\.11\.1 does not load"):
        import_problem("own_recognizer.Recognizer")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("torchvision", ["train.py", "recipe=fcos_shapes", "debug=fast"]),  # or Lightning by its metrics
        pytest.param(
            *("torchaudio", ["train.py", "recipe=accent_espeak", "debug=fast"]),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_command_ends_with_one_message(tmp_path, name, words):
    (tmp_path / f"{name}.py").write_text(BROKEN[name])
    run = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    lines = run.stderr.strip().splitlines()
    assert (run.returncode, run.stdout, len(lines)) == (2, "", 3), run.stderr
    assert lines[0].startswith(f"{name} ") and "does not load beside torch" in lines[0]


def test_every_import_is_guarded():
    """In the package these libraries are imported within `loading` alone."""
    loose = []
    for path in (ROOT / "lora_lightning").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        guarded = {
            node
            for block in ast.walk(tree)
            if isinstance(block, ast.With) and "loading(" in ast.unparse(block.items[0])
            for node in ast.walk(block)
        }
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            if {n.partition(".")[0] for n in names} & {*libraries.EXTRAS, "transformers"}:
                loose += [f"{path}:{node.lineno}"] * (node not in guarded)
    assert loose == []


def test_what_fits_is_the_same_everywhere():
    """The table in `libraries`, the bounds of pyproject.toml, both files of constraints, the docs."""
    toml = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    bounds = {
        name: Requirement(re.search(rf'"({name}[<>=][^"]*)"', toml).group(1)).specifier
        for name in ("torch", *libraries.BINARY)
    }
    ends = [constraints(end) for end in ("oldest", "newest")]
    for end, (torch, torchvision) in zip(ends, [list(libraries.TORCHVISION.items())[i] for i in (0, -1)]):
        assert end["torch"].startswith(f"{torch}.") and end["torchvision"].startswith(f"{torchvision}.")
        assert end["torchaudio"] == libraries.TORCHAUDIO
        assert all(bounds[name].contains(end[name]) for name in bounds)
    assert not bounds["torchaudio"].contains("2.11.1")
    for name, after in (("torch", "2.15.0"), ("torchvision", "0.30.0"), ("torch", "2.10.0")):
        assert not bounds[name].contains(after)
    table = (ROOT / "docs" / "installing.md").read_text(encoding="utf-8")
    for torch, torchvision in libraries.TORCHVISION.items():
        assert re.search(
            rf"^\| {torch}\S* \| {torchvision}\S* \| {libraries.TORCHAUDIO} \| .*loads", table, re.M
        )


def constraints(end):
    lines = (ROOT / ".ci" / f"{end}.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line)
