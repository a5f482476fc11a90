"""What griffe calls while it reads the package: the site shows `Annotated[int, at_least(1)]` as `int`."""

from __future__ import annotations

from typing import Any

from griffe import Attribute, Expr, ExprSubscript, ExprTuple, Extension, Function


class Plain(Extension):
    """Leaves what checks an option out of signatures; the docstring says what it may be."""

    def on_attribute(self, *, attr: Attribute, **kwargs: Any) -> None:
        """A field of a dataclass."""
        attr.annotation = plain(attr.annotation)

    def on_function(self, *, func: Function, **kwargs: Any) -> None:
        """A function's parameters."""
        for parameter in func.parameters:
            parameter.annotation = plain(parameter.annotation)


def plain(annotation: str | Expr | None) -> str | Expr | None:
    """The type in `Annotated[type, …]`, or the annotation as it is."""
    if isinstance(annotation, ExprSubscript) and annotation.canonical_name == "Annotated":
        inside = annotation.slice
        return inside.elements[0] if isinstance(inside, ExprTuple) else inside
    return annotation
