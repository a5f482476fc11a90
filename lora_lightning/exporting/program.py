"""The graph of a model by `torch.export`, from which most formats are written."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.export import Dim, ExportedProgram

from lora_lightning.errors import UserError
from lora_lightning.exporting.detection import traced_suppression
from lora_lightning.exporting.subject import Subject
from lora_lightning.exporting.two_products import keep_two_products

FIXED = re.compile(r"\['inputs'\]\[(\d+)\]\.size\(\)\[(\d+)\] as dynamic but .* to be a constant \((\d+)\)")
LINES = re.compile(
    r"(?:Constraints violated|specialized|[Cc]ould not|data-dependent|Unsupported|not support)"
)


def program_of(subject: Subject) -> ExportedProgram:
    """The graph, its dynamic axes of any size; the subject is told under which conditions.

    Raises:
        UserError: the model cannot be traced as a whole, or fixes an axis that is to be dynamic.
    """
    with told_as("torch.export", subject), traced_suppression(), torch.no_grad():
        program = torch.export.export(
            subject.model, tuple(subject.inputs.values()), dynamic_shapes={"inputs": axes_of_graph(subject)}
        )
    subject.guards[:] = program._guards_code
    keep_two_products(program)
    without_sources(program)
    return program


def axes_of_graph(subject: Subject) -> tuple[dict[int, Any] | None, ...]:
    """The dynamic axes of each input, as torch.export takes them."""
    return tuple(dict.fromkeys(subject.dynamic.get(name, {}), Dim.DYNAMIC) or None for name in subject.inputs)


def without_sources(program: ExportedProgram) -> None:
    """Take out of the graph which lines of which files each node comes from: files that are given away would
    tell the paths of this machine, and be larger by it."""
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)


@contextlib.contextmanager
def told_as(who: str, subject: Subject) -> Iterator[None]:
    """One message of ours for what an exporter says, and nothing of its own on the screen.

    Args:
        who: the exporter, in words.

    Raises:
        UserError: it failed.
    """
    with quietly():
        try:
            yield
        except (UserError, OSError):
            raise
        except Exception as error:  # theirs, of many kinds
            raise UserError(_explained(who, subject, error)) from None


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Exporters warn of what is meant, and print their steps."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _explained(who: str, subject: Subject, error: Exception) -> str:
    causes: list[str] = []
    chain: BaseException | None = error
    while chain is not None:
        causes.append(re.sub(r"\x1b\[[0-9;]*m", "", str(chain)))
        chain = chain.__cause__ or chain.__context__
    text = "\n".join(causes)
    kind = type(subject.network).__name__
    if missing := sorted({*re.findall(r"No ONNX function found for <OpOverload\(op='([\w.]+)'", text)}):
        return f"export: {who} knows no {', '.join(missing)}, which {kind} uses. Take another format."
    if re.search(r"specializ|Constraints violated|marked .*as dynamic|mark_dynamic", text):
        names = list(subject.inputs)
        fixed = [f"axis {axis} of {names[int(i)]} is always {n}" for i, axis, n in FIXED.findall(text)]
        why = f"{', '.join(dict.fromkeys(fixed))}." if fixed else _line(text)
        return (
            f"export: {kind} does not allow other sizes of all its dynamic axes: {why} "
            "Leave out of dynamic what is of one size."
        )
    return f"export: {who} cannot take {kind}: {_line(text)} Take another format."


def _line(text: str) -> str:
    """The line of a long message that says why."""
    lines = [line.strip(" -\t") for line in text.splitlines() if line.strip(" -\t")]
    best = next((line for line in lines if LINES.search(line)), lines[0] if lines else "no reason is given")
    return f"{' '.join(best.split())[:240].rstrip('.')}."
