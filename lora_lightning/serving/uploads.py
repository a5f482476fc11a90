"""Bodies of requests read within limits: multipart, JSON with base64, or the file itself."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import logging
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from lora_lightning.utils.libraries import loading

with loading("litserve", "serve"):
    from starlette.datastructures import UploadFile
    from starlette.formparsers import MultiPartException, MultiPartParser
    from starlette.requests import ClientDisconnect, Request

logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it tells the log of every malformed form

FILE = "file"
FIELDS = 16  # of a form
LONGEST = 4096  # bytes of a field
COMMAS = 1000  # of a JSON, whose every value costs much more time and memory than its letters
ENVELOPE = 64 * 1024  # bytes beside the file: of a form's parts, of JSON


class RefusedError(Exception):
    """A request that is answered by an error.

    Args:
        status: of HTTP.
        message: one line.
    """

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers


@dataclass
class Upload:
    """A file and what was said beside it."""

    body: bytes
    fields: dict[str, Any] = field(default_factory=dict)


async def read_upload(request: Request, most: int, seconds: float) -> Upload:
    """Of a request.

    Args:
        most: bytes of the file.
        seconds: for all of it to arrive.

    Raises:
        RefusedError: it is too large, too slow, empty, or not what it says that it is.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    room = most * 4 // 3 + ENVELOPE if kind == "application/json" else most + ENVELOPE
    try:
        body = await asyncio.wait_for(_read(request, room, most), seconds)
    except asyncio.TimeoutError:
        raise RefusedError(408, "the upload was too slow: send it faster.", {"connection": "close"}) from None
    except ClientDisconnect:
        raise RefusedError(400, "the upload was broken off: send all of it.") from None
    if kind == "multipart/form-data":
        upload = await _form(request, body)
    elif kind == "application/json":
        upload = _json(body)
    else:
        upload = Upload(body)
    if not upload.body:
        raise RefusedError(400, "the file is empty: send one with something in it.")
    if len(upload.body) > most:
        raise _too_large(most)
    return upload


def _too_large(most: int) -> RefusedError:
    told = f"the file has more than {most:,} bytes: send a smaller one."
    return RefusedError(413, told, {"connection": "close"})


async def _read(request: Request, room: int, most: int) -> bytes:
    """The body, of which no more than there is room for is ever in memory."""
    said = request.headers.get("content-length", "0")
    if not (said.isascii() and said.isdigit()) or int(said[:20]) > room:
        raise _too_large(most)
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > room:
            raise _too_large(most)
        parts.append(part)
    return b"".join(parts)


async def _form(request: Request, body: bytes) -> Upload:
    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    try:
        parser = MultiPartParser(
            request.headers, stream(), max_files=1, max_fields=FIELDS, max_part_size=LONGEST
        )
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError, LookupError, AssertionError):
        # the last ones: of headers that name a charset or boundary that is none
        raise RefusedError(400, "the form cannot be read: send multipart/form-data with one file.") from None
    fields = {str(name): value for name, value in form.multi_items() if isinstance(value, str)}
    files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
    if not files:
        raise RefusedError(400, f"the form has no file: send it as a part {FILE!r} with a file's name.")
    return Upload(await files[0].read(), fields)


def _json(body: bytes) -> Upload:
    if body.count(b",") > COMMAS:  # base64 has none
        raise RefusedError(400, "the body has too many values: send the file in base64 and a few options.")
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        raise RefusedError(400, "the body is no JSON: send an object with the file in base64.") from None
    text = content.pop(FILE, None) if isinstance(content, dict) else None
    if not isinstance(text, str):
        raise RefusedError(400, f'the body has no file: send {{"{FILE}": "…"}}, in base64.')
    try:
        return Upload(base64.b64decode(text, validate=True), content)
    except (binascii.Error, ValueError):
        raise RefusedError(400, "the file is no base64: encode it anew.") from None
