"""The rooms of the package: imports run one way, from the application down to the errors, in no circle."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lora_lightning"
TESTS = Path(__file__).parent
# From the ground up: a room imports those before it. "" is `lora_lightning` itself, the public names.
ROOMS = (
    "errors", "utils", "config", "kernels", "layers", "planning", "methods", "adapters", "files", "trainer",
    "data", "models", "compression", "exporting", "report", "tasks", "serving", "app", "",
)  # fmt: skip
CORE = ROOMS[: ROOMS.index("data")]
# What the recipes need and the core does not; utils.libraries loads them by name where they are asked for.
FOREIGN = {
    "hydra", "omegaconf", "wandb", "mlflow", "comet_ml", "aim", "timm", "torchvision", "torchaudio",
    "transformers", "matplotlib",
}  # fmt: skip
# Folders of tests that go through several rooms, or beside them.
BESIDE = {"acceptance", "architectures", "benchmarks", "distributed", "docs"}


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room(module: str) -> str:
    return [*module.split("."), ""][1]


def imported(module: str) -> Iterator[tuple[str, bool]]:
    """Every module that is imported anywhere in one, and whether it is for types alone."""
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    typing = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                yield (name if name in FILES else str(node.module)), id(node) in typing
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in typing


IMPORTS = {module: set(imported(module)) for module in FILES}


def test_every_file_is_in_a_room():
    assert {room(module) for module in FILES} == set(ROOMS)
    loose = {path.name for path in PACKAGE.glob("*.py")}
    assert loose == {"__init__.py", "config.py", "errors.py"}


def test_no_import_runs_back_up():
    up = [
        f"{module} imports {other}"
        for module, others in IMPORTS.items()
        for other, _ in others
        if other in FILES and ROOMS.index(room(other)) > ROOMS.index(room(module))
    ]
    assert not up


def test_no_circles():
    """Types alone may be named both ways within a room: that is no import when the code runs."""
    graph = {
        module: {other for other, types in others if other in FILES and not types}
        for module, others in IMPORTS.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(reversed(error.args[1]))}")


def test_the_core_knows_no_library_of_the_recipes():
    foreign = [
        f"{module} imports {other}"
        for module, others in IMPORTS.items()
        if room(module) in CORE
        for other, _ in others
        if other.split(".")[0] in FOREIGN
    ]
    assert not foreign


def test_every_room_says_in_one_sentence_what_is_inside():
    for module, path in FILES.items():
        if path.name == "__init__.py" and module != "lora_lightning":
            tree = ast.parse(path.read_text(encoding="utf-8"))
            text = ast.get_docstring(tree)
            assert text and len(tree.body) == 1, f"{module}: a sentence, and no code"
            assert text.endswith(".") and len(text.splitlines()) == 1, module


def test_the_tests_mirror_the_package():
    folders = {path.name for path in TESTS.iterdir() if path.is_dir() and any(path.glob("test_*.py"))}
    assert folders - BESIDE <= set(ROOMS)
    assert {r for r in ROOMS if (PACKAGE / r).is_dir() and r} <= folders
