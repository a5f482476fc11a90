"""Client: asks a server of `lora-lightning serve`; needs nothing but Python."""

from __future__ import annotations

import base64
import io
import json
import struct
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from http.client import HTTPException, HTTPResponse
from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from lora_lightning.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

File = str | PathLike[str] | bytes  # a path, or what a file holds
FLOATS = 3  # WAV's number of the format of 32-bit floats


class ServerError(UserError):
    """A server refused a request, or could not be asked.

    Args:
        message: the server's, in one line.
        status: of HTTP; 0 where there was no answer.
        retry_after: seconds after which to ask again, where the server says so.
    """

    def __init__(self, message: str, status: int = 0, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after


class Client:
    """Asks a server of `lora-lightning serve`. One may be used by several threads.

    Pictures are paths, the bytes of a file, or PIL's; sounds are paths, the bytes of a file, or arrays
    (samples,) of floats in [-1, 1]. Answers are dictionaries, as the server's /docs describes them.

    Args:
        address: of the server, as it prints it.
        token: that it asks for, its LORA_LIGHTNING_TOKEN; None sends none.
        timeout: seconds without a byte from the server, after which a request is given up.

    Raises:
        UserError: the address is none, or the token cannot be sent.
    """

    def __init__(
        self, address: str = "http://127.0.0.1:8000", token: str | None = None, timeout: float = 120.0
    ) -> None:
        try:
            scheme = urllib.parse.urlsplit(address).scheme
        except ValueError:  # brackets that are not closed
            scheme = ""
        if scheme not in ("http", "https"):
            raise UserError(f"address={address!r}: give the server's, as http://127.0.0.1:8000.")
        if token is not None and not is_token(token):
            raise UserError("token: is empty, or has letters that cannot be sent: give the server's.")
        self.address, self.timeout = address.rstrip("/"), timeout
        self._headers = {"Authorization": f"Bearer {token}"} if token is not None else {}
        self._opener = urllib.request.build_opener(_Unmoved)

    def models(self) -> list[dict[str, Any]]:
        """The base and the adapters: `id`, and `kind`, which says what is asked of them.

        Raises:
            ServerError: the server refuses, or does not answer.
        """
        with self._asked("/v1/models", {}) as response:
            return list(_read(response)["data"])

    def classify(
        self,
        picture: File | Image,
        adapter: str | None = None,
        top: int | None = None,
        threshold: float | None = None,
    ) -> dict[str, Any]:
        """The classes of a picture: `predictions`, each with `label` and `probability`; or a `value`.

        Args:
            picture: a path, the bytes of a file, or PIL's.
            adapter: its name; None is the only one there is, of several the base, as "base" is.
            top: classes at most; None is 5.
            threshold: least probability of a class, where a picture has several; None is 0.5.

        Raises:
            ServerError: the server refuses, or does not answer.
        """
        return self._answer("classify", _picture(picture), adapter, top=top, threshold=threshold)

    def detect(
        self, picture: File | Image, adapter: str | None = None, score: float | None = None
    ) -> dict[str, Any]:
        """The objects in a picture: `predictions`, each with `label`, `score` and `box`: left, top, right and
        bottom in pixels.

        Args:
            picture: a path, the bytes of a file, or PIL's.
            adapter: its name; None is the only one there is, of several the base, as "base" is.
            score: least score of an object; None is what the task says.

        Raises:
            ServerError: the server refuses, or does not answer.
        """
        return self._answer("detect", _picture(picture), adapter, score=score)

    def segment(self, picture: File | Image, adapter: str | None = None) -> dict[str, Any]:
        """The class of each pixel: `classes`, each with `label`, `value` and `share`, and `mask`, the bytes
        of a PNG whose values are the classes'.

        Args:
            picture: a path, the bytes of a file, or PIL's.
            adapter: its name; None is the only one there is, of several the base, as "base" is.

        Raises:
            ServerError: the server refuses, or does not answer.
        """
        answer = self._answer("segment", _picture(picture), adapter)
        return {**answer, "mask": base64.b64decode(answer["mask"])}

    @overload
    def transcribe(
        self, sound: File | np.ndarray, adapter: str | None = None, *, rate: int = 16_000,
        stream: Literal[False] = False,
    ) -> dict[str, Any]: ...  # fmt: skip

    @overload
    def transcribe(
        self, sound: File | np.ndarray, adapter: str | None = None, *, rate: int = 16_000,
        stream: Literal[True],
    ) -> Iterator[dict[str, Any]]: ...  # fmt: skip

    def transcribe(
        self,
        sound: File | np.ndarray,
        adapter: str | None = None,
        *,
        rate: int = 16_000,
        stream: bool = False,
    ) -> dict[str, Any] | Iterator[dict[str, Any]]:
        """What is said in a sound: `text`, and `segments` with the `words` and their times.

        Args:
            sound: a path, the bytes of a file, or an array (samples,) of floats in [-1, 1].
            adapter: its name; None is the only one there is, of several the base, as "base" is.
            rate: of an array, in Hz.
            stream: give each segment as soon as it is heard, in an iterator.

        Raises:
            ServerError: the server refuses, or does not answer; of a stream also while it is read.
        """
        body = _sound(sound, rate)
        if not stream:
            return self._answer("transcribe", body, adapter)
        return _segments(self._asked("/v1/transcribe", {"adapter": adapter, "stream": "true"}, body))

    def _answer(self, kind: str, body: bytes, adapter: str | None, **options: Any) -> dict[str, Any]:
        with self._asked(f"/v1/{kind}", {"adapter": adapter, **options}, body) as response:
            return _read(response)

    def _asked(self, path: str, options: Mapping[str, Any], body: bytes | None = None) -> HTTPResponse:
        query = urllib.parse.urlencode({n: v for n, v in options.items() if v is not None})
        headers = {**self._headers, "Content-Type": "application/octet-stream"}
        address = f"{self.address}{path}" + f"?{query}" * bool(query)
        try:
            request = urllib.request.Request(address, body, headers)
            return self._opener.open(request, timeout=self.timeout)
        except urllib.error.HTTPError as error:
            with error:
                raise _refused(error) from None
        except (OSError, HTTPException, ValueError) as error:
            raise self._silent(error) from None

    def _silent(self, error: Exception) -> ServerError:
        reason = str(getattr(error, "reason", error)) or type(error).__name__
        return ServerError(f"{self.address} does not answer ({reason}): is the server running?")


def is_token(given: object) -> bool:
    """Whether a header can bring it: printable ASCII, and no spaces at the ends, which are stripped."""
    return isinstance(given, str) and given.isascii() and given.isprintable() and given.strip() == given != ""


class _Unmoved(urllib.request.HTTPRedirectHandler):
    """A server that sends elsewhere is not followed: the token would go with it."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _refused(error: urllib.error.HTTPError) -> ServerError:
    """What the server says of its refusal; whoever answers in its place may say nothing."""
    try:
        message = json.loads(error.read(1 << 16))["error"]["message"]
    except (ValueError, KeyError, TypeError, OSError, HTTPException):
        message = f"the server answers with {error.code} {error.reason}."
    after = error.headers.get("Retry-After", "")
    return ServerError(str(message), error.code, float(after) if after.isdecimal() else None)


def _read(response: HTTPResponse) -> dict[str, Any]:
    try:
        return dict(json.loads(response.read()))
    except (ValueError, TypeError):
        raise ServerError("the answer is none of lora-lightning's: is this its address?") from None
    except (OSError, HTTPException):
        raise _broken() from None


def _broken() -> ServerError:
    return ServerError("the answer was broken off: ask again.")


def _segments(response: HTTPResponse) -> Iterator[dict[str, Any]]:
    """The segments of a stream of events."""
    with response:
        try:
            event = ""
            for line in response:
                name, _, value = line.decode().strip().partition(": ")
                event = value if name == "event" else event
                if name != "data":
                    continue
                content = json.loads(value)
                if event == "error":
                    raise ServerError(content["message"], content.get("status", 0))
                if event == "answer":
                    return
                yield content["segment"]
        except (OSError, HTTPException, ValueError, KeyError):
            raise _broken() from None
        raise _broken()


def _picture(given: File | Image) -> bytes:
    """The bytes of a file; a picture in memory as a PNG, upright as the same file would be."""
    if isinstance(given, (str, bytes, PathLike)) or not hasattr(given, "getbands"):
        return _file(given, "picture", "a path, the bytes of a file, or a picture of PIL")
    from PIL import ImageOps

    buffer = io.BytesIO()
    try:
        upright = ImageOps.exif_transpose(given)
        plain = upright.mode in ("RGB", "RGBA", "L", "LA", "P", "1")
        (upright if plain else upright.convert("RGB")).save(buffer, "PNG")
    except (OSError, ValueError, SyntaxError) as error:  # a file cut off, which PIL reads only now; no pixels
        raise UserError(f"picture: cannot be read ({error}): give one that can be shown.") from None
    return buffer.getvalue()


def _sound(given: File | np.ndarray, rate: int) -> bytes:
    """The bytes of a file; of an array those of a WAV of floats, which loses nothing."""
    if isinstance(given, (str, bytes, PathLike)) or not hasattr(given, "__array__"):
        return _file(given, "sound", "a path, the bytes of a file, or an array of floats")
    import numpy as np

    samples = np.asarray(given)
    if samples.ndim != 1 or samples.dtype.kind != "f" or not samples.size:
        shape = f"{samples.dtype}, {samples.shape}"
        raise UserError(f"sound: an array of {shape}: give floats in [-1, 1] of the shape (samples,).")
    if not isinstance(rate, Integral) or not 0 < rate < 2**30:
        raise UserError(f"rate={rate!r}: give the samples of a second, a whole number, as 16000.")
    data = samples.astype("<f4").tobytes()
    head = struct.pack("<HHIIHH", FLOATS, 1, rate, 4 * rate, 4, 32)
    parts = [(b"fmt ", head), (b"fact", struct.pack("<I", samples.size)), (b"data", data)]
    content = b"".join(name + struct.pack("<I", len(part)) + part for name, part in parts)
    return b"RIFF" + struct.pack("<I", 4 + len(content)) + b"WAVE" + content


def _file(given: Any, what: str, allowed: str) -> bytes:
    if isinstance(given, (bytes, bytearray, memoryview)):
        return bytes(given)
    if not isinstance(given, (str, PathLike)):
        raise UserError(f"{what}: is of the type {type(given).__name__}: give {allowed}.")
    try:
        return Path(given).expanduser().read_bytes()
    except (OSError, ValueError) as error:  # the latter of a null byte
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{what}={given}: cannot be read ({reason}): give {allowed}.") from None
