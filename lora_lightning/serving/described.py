"""The routes as /openapi.json describes them, and by the same tables the options of a kind are checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lora_lightning.serving.openai import FORMATS
from lora_lightning.serving.uploads import FILE


@dataclass(frozen=True)
class Number:
    """An option that is a number: its type, the least and the most that it may be."""

    of: Callable[[str], float]
    least: float
    most: float
    about: str


NUMBERS = {
    "top": Number(int, 1, 100_000, "classes at most, the likeliest first; 5 unless given"),
    "threshold": Number(float, 0, 1, "least probability of a class, where a picture has several; 0.5"),
    "score": Number(float, 0, 1, "least score of an object; what the task says unless given"),
}
KINDS: dict[str, tuple[str, ...]] = {  # what is asked -> its options, beside the adapter
    "classify": ("top", "threshold"),
    "detect": ("score",),
    "segment": (),
    "transcribe": ("stream",),
}
ABOUT = {
    "classify": "The classes of a picture with their probabilities, or a number",
    "detect": "The objects in a picture: boxes in pixels, classes, scores",
    "segment": "The class of each pixel of a picture",
    "transcribe": "What is said in a sound, each word with its time",
}
ERRORS = {
    400: "a malformed request",
    401: "without the token, where the server asks for one",
    404: "an unknown adapter, or another kind than the base's",
    408: "an upload that is too slow",
    409: "an adapter that does not say what it was trained for",
    413: "an upload that is too large",
    415: "a file that is no picture or sound",
    422: "a damaged file",
    429: "too many requests; Retry-After has seconds",
    503: "a worker or an adapter that cannot be used",
    504: "an answer that took too long",
}
TEXT, SHARE = {"type": "string"}, {"type": "number", "minimum": 0, "maximum": 1}
NUMBER, WHOLE = {"type": "number"}, {"type": "integer"}
ADAPTER = {"description": "which has answered; null is the base", "type": ["string", "null"]}


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(properties), "properties": properties}


def _list(item: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item}


WORD = _object(text=TEXT, start=NUMBER, end=NUMBER, confidence=SHARE)
SEGMENT = _object(text=TEXT, start=NUMBER, end=NUMBER, words=_list(WORD))
BOX = {**_list(NUMBER), "minItems": 4, "maxItems": 4, "description": "left, top, right, bottom"}
ANSWERS = {
    "classify": {
        "oneOf": [
            _object(adapter=ADAPTER, predictions=_list(_object(label=TEXT, probability=SHARE))),
            _object(adapter=ADAPTER, value=NUMBER),
        ]
    },
    "detect": _object(
        adapter=ADAPTER, width=WHOLE, height=WHOLE,
        predictions=_list(_object(label=TEXT, score=SHARE, box=BOX)),
    ),
    "segment": _object(
        adapter=ADAPTER, width=WHOLE, height=WHOLE,
        classes=_list(_object(label=TEXT, value=WHOLE, share=SHARE)),
        mask={**TEXT, "description": "a PNG in base64, whose values are the classes"},
    ),
    "transcribe": _object(adapter=ADAPTER, seconds=NUMBER, text=TEXT, segments=_list(SEGMENT)),
}  # fmt: skip
MODEL = _object(id=TEXT, object=TEXT, owned_by=TEXT, kind={**TEXT, "enum": list(KINDS)})
ERROR = _object(error=_object(message=TEXT, type=TEXT, param={"type": "null"}, code=TEXT))
CHOICE = {**TEXT, "description": "true or false", "enum": ["true", "false"]}


def of_kind(kind: str) -> dict[str, Any]:
    """A route that answers pictures or sounds."""
    options = {"adapter": {**TEXT, "description": "its name; base is the base"}}
    options |= {name: _option(name) for name in KINDS[kind]}
    parameters = [
        {"name": name, "in": "query", "required": False, "schema": one, "description": one["description"]}
        for name, one in options.items()
    ]
    answer: dict[str, Any] = {"application/json": {"schema": ANSWERS[kind]}}
    if "stream" in KINDS[kind]:
        answer["text/event-stream"] = {"schema": {**TEXT, "description": "events part, answer, error"}}
    return {"parameters": parameters, "requestBody": _body(options), "responses": _answers(answer)}


def of_openai() -> dict[str, Any]:
    """OpenAI's route for sounds."""
    fields = {
        "model": {**TEXT, "description": "names the adapter"},
        "response_format": {**TEXT, "enum": list(FORMATS)},
        "stream": CHOICE,
    }
    answer: dict[str, Any] = {"application/json": {"schema": _object(text=TEXT)}}
    answer |= {kind: {"schema": TEXT} for kind in ("text/plain", "text/event-stream")}
    return {"requestBody": _body(fields), "responses": _answers(answer)}


def of_models() -> dict[str, Any]:
    """The list of the adapters."""
    listed = _object(object=TEXT, data=_list(MODEL))
    return {"responses": _answers({"application/json": {"schema": listed}}, (401, 429, 503, 504))}


def of_text(*statuses: int) -> dict[str, Any]:
    """A route that answers with a text."""
    return {"responses": _answers({"text/plain": {"schema": TEXT}}, statuses)}


def completed(document: dict[str, Any]) -> dict[str, Any]:
    """The whole document, with the token, which a server may ask for."""
    token = {"type": "http", "scheme": "bearer", "description": "LORA_LIGHTNING_TOKEN, where it is set"}
    document.setdefault("components", {})["securitySchemes"] = {"token": token}
    document["security"] = [{"token": []}, {}]
    return document


def _option(name: str) -> dict[str, Any]:
    if name == "stream":
        return {**CHOICE, "description": "true: server-sent events, a segment each as it is heard"}
    number = NUMBERS[name]
    kind = "integer" if number.of is int else "number"
    return {"type": kind, "minimum": number.least, "maximum": number.most, "description": number.about}


def _body(fields: Mapping[str, Any]) -> dict[str, Any]:
    def shape(form: str, about: str) -> dict[str, Any]:
        properties = {FILE: {**TEXT, "format": form}, **fields}
        told = {"type": "object", "required": [FILE], "properties": properties, "description": about}
        return {"schema": told}

    return {
        "required": True,
        "content": {
            "multipart/form-data": shape("binary", "the file as a part; options may stand beside it"),
            "application/octet-stream": {
                "schema": {
                    **TEXT,
                    "format": "binary",
                    "description": "the file itself, of any type",
                }
            },
            "application/json": shape("byte", "the file in base64; options may stand beside it"),
        },
    }


def _answers(content: Mapping[str, Any], errors: tuple[int, ...] = tuple(ERRORS)) -> dict[str, Any]:
    failed = {
        str(status): {"description": ERRORS[status], "content": {"application/json": {"schema": ERROR}}}
        for status in errors
    }
    return {"200": {"description": "the answer", "content": dict(content)}, **failed}
