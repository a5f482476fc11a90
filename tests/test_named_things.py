"""What docstrings, comments and documentation name in backticks exists: to rename is to rename there."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lora_lightning"
TICKED = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
DOTTED = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*(?:\(\))?")
WORD = re.compile(r"[A-Za-z_]\w*")
PAIR = re.compile(r"(?=\b([A-Za-z_]\w*\.[A-Za-z_]\w*))")
FILES = re.compile(r"[\w.-]+\.(?:json|tsv|yaml|py|md|csv|ckpt|safetensors|png|txt|jsonl)")
# Names of other libraries and programs that no code here uses, and parts of examples.
FOREIGN = {
    "F.unfold", "NCCL_SOCKET_IFNAME", "ctc_decoder", "print_trainable_parameters", "resnet_fpn_backbone",
    "Linear4bit", "cmu_us_SPEAKER_arctic", "cmu_us_VOICE_arctic", "in_proj_q", "kv",
}  # fmt: skip


def docstrings(tree: ast.Module) -> list[ast.Constant]:
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    first = [n.body[0] for n in ast.walk(tree) if isinstance(n, owners) and n.body]
    values = [n.value for n in first if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
    return [value for value in values if isinstance(value.value, str)]


def code_and_texts(source: str, tree: ast.Module) -> tuple[str, list[tuple[int, str]]]:
    """A module's code, and its docstrings and comments with their lines."""
    lines, texts = source.splitlines(), []
    for doc in docstrings(tree):
        texts.append((doc.lineno, "\n".join(lines[doc.lineno - 1 : doc.end_lineno])))
        lines[doc.lineno - 1 : doc.end_lineno] = [""] * (doc.end_lineno - doc.lineno + 1)
    for number, line in enumerate(lines, 1):
        lines[number - 1], mark, comment = line.partition("#")
        texts += [(number, comment)] if mark else []
    return "\n".join(lines), texts


def defined(tree: ast.Module) -> set[str]:
    """What a module has at its top."""
    names = set()
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {alias.asname or alias.name for alias in node.names}
        else:
            names |= {
                n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
            }
            names |= {node.name} if hasattr(node, "name") else set()
    return names


def missing(name: str, words: set[str], pairs: set[str], have: dict[str, set[str]]) -> str:
    """Why this name means nothing; "" when it means something.

    Args:
        words: of all code.
        pairs: what stands before and after a dot in it.
        have: what each module has, by its dotted name.
    """
    parts = name.removesuffix("()").split(".")
    if gone := [part for part in parts if part not in words]:
        return f"there is no {', '.join(gone)}"
    whole = parts[0] == "lora_lightning"
    for i in range(1, len(parts)):
        module, leaf = ".".join(parts[:i]), parts[i]
        owners = [
            names for n, names in have.items() if n == module or (not whole and n.endswith(f".{module}"))
        ]
        used = not whole and f"{parts[i - 1]}.{leaf}" in pairs
        if owners and not used and not any(leaf in names for names in owners):
            return f"{module} has no {leaf}"
    return ""


def parts_of(path: Path) -> str:
    return " ".join(path.relative_to(ROOT).with_suffix("").parts)


def read() -> tuple[str, list[tuple[Path, int, str]], dict[str, set[str]]]:
    """All code, every text of the package and its documentation with its place, and what each module has."""
    codes, texts, have = [], [], {}
    for path in sorted([*PACKAGE.rglob("*.py"), *(ROOT / "tests").rglob("*.py")]):
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
        code, own = code_and_texts(source, tree)
        codes += [code, parts_of(path)]
        if path.is_relative_to(PACKAGE):
            texts += [(path, line, text) for line, text in own]
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            below = {p.stem for p in path.parent.iterdir()} if path.stem == "__init__" else set()
            have[module] = defined(tree) | below
    for folder in ("conf", "recipes"):
        for path in sorted((ROOT / folder).rglob("*.yaml")):
            codes += [path.read_text(encoding="utf-8"), parts_of(path)]
    pages = [p for p in (ROOT / "docs").rglob("*.md") if not p.name.startswith("from_")]  # of others' names
    for path in sorted([*ROOT.glob("*.md"), *pages]):
        texts.append((path, 1, path.read_text(encoding="utf-8")))
    return "\n".join(codes), texts, have


def test_what_is_named_exists():
    code, texts, have = read()
    words, pairs = set(WORD.findall(code)), set(PAIR.findall(code))
    groups = {path.name for path in (ROOT / "conf").iterdir()}  # what follows them is an option
    found = []
    for path, first, text in texts:
        for match in TICKED.finditer(text):
            name = match[1]
            if not DOTTED.fullmatch(name) or FILES.fullmatch(name) or name in FOREIGN:
                continue
            if name.partition(".")[0] not in groups and (reason := missing(name, words, pairs, have)):
                line = first + text[: match.start()].count("\n")
                found.append(f"{path.relative_to(ROOT)}:{line}: `{name}`: {reason}")
    assert not found, "\n".join(found)


def test_names_that_are_gone_are_noticed():
    have = {"lora_lightning.utils.digests": {"digest"}, "lora_lightning.files.merge": {"merge_state"}}
    code = "lora_lightning utils digests digest files merge merge_state merge_files layer weight layer.weight"
    words, pairs = set(WORD.findall(code)), set(PAIR.findall(code))
    for name in ("digests.digest", "lora_lightning.files.merge.merge_state", "layer.weight", "digest()"):
        assert not missing(name, words, pairs, have)
    for name in ("digests.merge_files", "lora_lightning.files.merge.merge_files", "state_hooks", "x.digest"):
        assert missing(name, words, pairs, have)
