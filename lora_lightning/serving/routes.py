"""What a server answers at which address. Who answers is the desk's."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

from lora_lightning.serving.asking import Ask, Event
from lora_lightning.serving.catalog import Catalog, UnknownAdapter
from lora_lightning.serving.gate import FullError, Gate
from lora_lightning.serving.metrics import Metrics
from lora_lightning.serving.openai import OPENAI, errors_shape, plain_text, sse_of, transcription_of
from lora_lightning.serving.uploads import FILE, RefusedError, Upload, read_upload
from lora_lightning.utils.libraries import loading

with loading("litserve", "serve"):
    from fastapi import FastAPI, Query, Request, Response
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
    from starlette.exceptions import HTTPException

BASE = "base"  # names the base in the place of an adapter
GONE = 499  # nginx's status of a client that has left
KINDS = ("classify", "detect", "segment", "transcribe")
NUMBERS: dict[str, tuple[Callable[[str], float], float, float]] = {  # options: their type, least and most
    "top": (int, 1, 100_000),
    "threshold": (float, 0, 1),
    "score": (float, 0, 1),
}
BODY = {  # for the OpenAPI page: FastAPI itself reads none
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {"type": "object", "properties": {FILE: {"type": "string", "format": "binary"}}}
            },
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
            "application/json": {
                "schema": {"type": "object", "properties": {FILE: {"type": "string", "format": "byte"}}}
            },
        },
    }
}


class Asked(Protocol):
    """Who answers."""

    gate: Gate
    metrics: Metrics

    def ask(self, ask: Ask) -> AsyncIterator[Event]:
        """What is told of a request, the last time an "answer" or an "error"."""


@dataclass(frozen=True)
class Manners:
    """How requests are treated.

    Attributes:
        most: bytes of an upload.
        reading: seconds for an upload to arrive.
        timeout: seconds from then to the answer.
    """

    most: int = 32 * 2**20
    reading: float = 30.0
    timeout: float = 60.0


def add_routes(
    app: FastAPI, desk: Asked, catalog: Catalog, manners: Manners, ready: Callable[[], bool]
) -> None:
    """Give an application the routes of `/v1`, `/health`, `/ready` and `/metrics`.

    Args:
        ready: whether a worker is.
    """
    routes = Routes(desk, catalog, manners)
    for kind in KINDS:
        app.add_api_route(
            f"/v1/{kind}", routes.of(kind), methods=["POST"], openapi_extra=BODY, summary=kind.capitalize()
        )
    app.add_api_route(OPENAI, routes.openai, methods=["POST"], openapi_extra=BODY, summary="As OpenAI has it")
    app.add_api_route("/v1/models", routes.models, methods=["GET"], summary="The adapters there are")

    async def health() -> Response:
        return PlainTextResponse("ok\n")

    async def is_ready() -> Response:
        good = await asyncio.to_thread(ready)
        return PlainTextResponse("ready\n" if good else "not ready\n", 200 if good else 503)

    async def metrics() -> Response:
        return PlainTextResponse(desk.metrics.text(desk.gate.inside))

    app.add_api_route("/health", health, methods=["GET"], summary="The server runs")
    app.add_api_route("/ready", is_ready, methods=["GET"], summary="A worker can answer")
    app.add_api_route("/metrics", metrics, methods=["GET"], summary="In Prometheus's form")
    app.add_exception_handler(RefusedError, _refused)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _invalid)


class Routes:
    """The routes that ask the engine."""

    def __init__(self, desk: Asked, catalog: Catalog, manners: Manners) -> None:
        self.desk, self.catalog, self.manners = desk, catalog, manners

    def of(self, kind: str) -> Callable[..., Coroutine[Any, Any, Response]]:
        """The route of a kind."""

        async def route(
            request: Request,
            adapter: Annotated[str | None, Query(description="its name; base is the base")] = None,
            top: Annotated[str | None, Query(description="classes, the likeliest first")] = None,
            threshold: Annotated[str | None, Query(description="least probability of a class")] = None,
            score: Annotated[str | None, Query(description="least score of an object")] = None,
            stream: Annotated[str | None, Query(description="true: segments as they are heard")] = None,
        ) -> Response:
            query = {"adapter": adapter, "top": top, "threshold": threshold, "score": score, "stream": stream}
            given = {name: value for name, value in query.items() if value is not None}

            async def answer(upload: Upload) -> Response:
                said = {**upload.fields, **given}
                ask = await self._ask(kind, upload.body, said, said.get("adapter"))
                if ask.options.get("stream"):
                    return await self._streamed(
                        ask, lambda e: f"event: {e.what}\ndata: {json.dumps(e.content)}\n\n"
                    )
                return JSONResponse(await self._answer(ask))

            return await self._counted(f"/v1/{kind}", request, answer)

        return route

    async def openai(self, request: Request) -> Response:
        """OpenAI's `audio/transcriptions`: a form with `file` and `model`, which names the adapter."""

        async def answer(upload: Upload) -> Response:
            said = upload.fields
            ask = await self._ask(
                "transcribe", upload.body, {"stream": said.get("stream")}, said.get("model")
            )
            if ask.options.get("stream"):
                return await self._streamed(ask, sse_of())
            form = str(said.get("response_format", "json"))
            content = transcription_of(await self._answer(ask), form)
            return PlainTextResponse(content) if plain_text(form) else JSONResponse(content)

        return await self._counted(OPENAI, request, answer)

    async def models(self) -> Response:
        """The base and the adapters, in OpenAI's shape."""
        names = await asyncio.to_thread(self.catalog.names)
        data = [{"id": name, "object": "model", "owned_by": "lora_lightning"} for name in (BASE, *names)]
        return JSONResponse({"object": "list", "data": data})

    async def _ask(self, kind: str, body: bytes, said: Mapping[str, Any], adapter: Any) -> Ask:
        options = _options(said)
        if adapter is not None and not isinstance(adapter, str):
            raise RefusedError(400, "adapter: give a name.")
        if adapter is None:
            name = await asyncio.to_thread(self.catalog.default)
        else:
            name = None if adapter == BASE else adapter
        if name is not None:
            try:
                await asyncio.to_thread(self.catalog.folder, name)
            except UnknownAdapter as error:
                raise RefusedError(404, f"{error} GET /v1/models lists them.") from None
        return Ask(name, kind, body, options, time.monotonic() + self.manners.timeout)

    async def _answer(self, ask: Ask) -> dict[str, Any]:
        async with contextlib.aclosing(self.desk.ask(ask)) as events:  # type: ignore[type-var]  # a generator
            async for event in events:
                if event.what == "error":
                    raise RefusedError(event.status, event.content["message"])
                if event.what == "answer":
                    self.desk.metrics.batches.add(event.batch)
                    return event.content
        raise RefusedError(503, "the server ends: try again later.")

    async def _streamed(self, ask: Ask, shown: Callable[[Event], str]) -> Response:
        """Server-sent events. An error before the first is an answer of its status."""
        events = self.desk.ask(ask)
        first = await anext(events)
        if first.what == "error":
            raise RefusedError(first.status, first.content["message"])

        async def lines() -> AsyncIterator[str]:
            async with contextlib.aclosing(events):  # type: ignore[type-var]  # a generator
                yield shown(first)
                async for event in events:
                    yield shown(event)

        return StreamingResponse(
            lines(), media_type="text/event-stream", headers={"cache-control": "no-store"}
        )

    async def _counted(
        self, route: str, request: Request, answer: Callable[[Upload], Coroutine[Any, Any, Response]]
    ) -> Response:
        begun, status = time.monotonic(), 500
        try:
            with self.desk.gate.place():
                upload = await read_upload(request, self.manners.most, self.manners.reading)
                response = await _unless_gone(request, answer(upload))
                status = response.status_code
                return response
        except FullError:
            status = 429
            message = "there are too many requests: try again in a second."
            raise RefusedError(429, message, {"retry-after": "1", "connection": "close"}) from None
        except RefusedError as error:
            status = error.status
            raise
        finally:
            self.desk.metrics.answered(route, status, time.monotonic() - begun)


async def _unless_gone(request: Request, answer: Coroutine[Any, Any, Response]) -> Response:
    """The answer; who has left frees the place at once."""
    answering = asyncio.create_task(answer)
    leaving = asyncio.create_task(_left(request))
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return answering.result() if answering.done() else Response(status_code=GONE)
    finally:
        for task in (answering, leaving):
            task.cancel()
        await asyncio.gather(answering, leaving, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _options(said: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a kind, checked."""
    options: dict[str, Any] = {}
    for name, (kind, least, most) in NUMBERS.items():
        if (value := said.get(name)) is None:
            continue
        try:
            number = kind(str(value)[:20])
        except ValueError:
            number = float("nan")
        if not least <= number <= most:
            what = "a whole number" if kind is int else "a number"
            raise RefusedError(400, f"{name}: give {what} from {least} to {most:g}.")
        options[name] = number
    stream = said.get("stream")
    if stream not in (None, "true", "false", True, False):
        raise RefusedError(400, "stream: give true or false.")
    return {**options, **({"stream": True} if stream in ("true", True) else {})}


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    return JSONResponse(errors_shape(error.status, error.message), error.status, error.headers)


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse(errors_shape(error.status_code, f"{error.detail}."), error.status_code, error.headers)


async def _invalid(request: Request, error: Exception) -> Response:
    return JSONResponse(errors_shape(422, "the query string has other values than /docs says."), 422)
