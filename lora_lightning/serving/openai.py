"""OpenAI's shapes: of a transcription in its formats, of its events, and of errors."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from lora_lightning.serving.asking import Event
from lora_lightning.serving.uploads import RefusedError

OPENAI = "/v1/audio/transcriptions"
FORMATS = ("json", "text", "srt", "verbose_json", "vtt")
KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def errors_shape(status: int, message: str) -> dict[str, Any]:
    """Of an error, for every route."""
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": str(status)}}


def plain_text(form: str) -> bool:
    """Whether a format is no JSON."""
    return form in ("text", "srt", "vtt")


def format_of(given: Any) -> str:
    """What is asked for; JSON unless given.

    Raises:
        RefusedError: there is no such format.
    """
    form = "json" if given is None else given
    if form not in FORMATS:
        raise RefusedError(400, f"response_format: give one of {', '.join(FORMATS)}.")
    return str(form)


def transcription_of(answer: Mapping[str, Any], form: str) -> Any:
    """Of an answer of the engine, in one of the formats."""
    text, segments = answer["text"], answer["segments"]
    if form == "json":
        return {"text": text}
    if form == "text":
        return f"{text}\n"
    if form == "srt":
        blocks = enumerate(segments, 1)
        return "\n".join(f"{i}\n{_span(s, ',')}\n{s['text']}\n" for i, s in blocks)
    if form == "vtt":
        return "WEBVTT\n\n" + "\n".join(f"{_span(s, '.')}\n{s['text']}\n" for s in segments)
    words = [{"word": w["text"], "start": w["start"], "end": w["end"]} for s in segments for w in s["words"]]
    numbered = [{"id": i, **{n: s[n] for n in ("start", "end", "text")}} for i, s in enumerate(segments)]
    return {
        "task": "transcribe",
        "language": "",
        "duration": answer["seconds"],
        "text": text,
        "segments": numbered,
        "words": words,
    }


def sse_of() -> Callable[[Event], str]:
    """Events of one stream as OpenAI names them: a delta a segment, and the whole text at the end."""
    begun = False

    def shown(event: Event) -> str:
        nonlocal begun
        if event.what == "part":
            text = (" " if begun else "") + event.content["segment"]["text"]
            begun = True
            return _data({"type": "transcript.text.delta", "delta": text})
        if event.what == "answer":
            return _data({"type": "transcript.text.done", "text": event.content["text"]}) + "data: [DONE]\n\n"
        return _data(errors_shape(event.status, event.content["message"]))

    return shown


def _data(content: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _span(segment: Mapping[str, Any], point: str) -> str:
    return f"{_stamp(segment['start'], point)} --> {_stamp(segment['end'], point)}"


def _stamp(seconds: float, point: str) -> str:
    """`00:01:02,345`"""
    minutes, milliseconds = divmod(round(1000 * seconds), 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{milliseconds // 1000:02}{point}{milliseconds % 1000:03}"
