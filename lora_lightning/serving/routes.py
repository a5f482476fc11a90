"""What a server answers at which address. Who answers is the desk's."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from lora_lightning.errors import did_you_mean
from lora_lightning.serving import described
from lora_lightning.serving.asking import ABOUT, Ask, Event
from lora_lightning.serving.catalog import BASE, SHOWN, Catalog, UnknownAdapter
from lora_lightning.serving.gate import FullError, Gate
from lora_lightning.serving.metrics import Metrics
from lora_lightning.serving.openai import (
    OPENAI,
    errors_shape,
    format_of,
    plain_text,
    sse_of,
    transcription_of,
)
from lora_lightning.serving.uploads import RefusedError, Upload, read_upload
from lora_lightning.utils.libraries import loading

with loading("litserve", "serve"):
    from fastapi import FastAPI, Request, Response
    from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
    from starlette.exceptions import HTTPException
    from starlette.types import Receive, Scope, Send

GONE = 499  # nginx's status of a client that has left


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
    app.router.redirect_slashes = False  # by the Host that a client says

    def add(path: str, route: Callable[..., Any], about: str, said: dict[str, Any], *methods: str) -> None:
        plain = "text/plain" in said["responses"]["200"]["content"] and path != OPENAI
        shape: type[Response] = PlainTextResponse if plain else JSONResponse
        app.add_api_route(
            path, route, methods=[*methods], summary=about, openapi_extra=said, response_class=shape
        )

    for kind in described.KINDS:
        add(f"/v1/{kind}", routes.of(kind), described.ABOUT[kind], described.of_kind(kind), "POST")
    add(OPENAI, routes.openai, "As OpenAI has it", described.of_openai(), "POST")
    add("/v1/models", routes.models, "The adapters there are", described.of_models(), "GET")

    async def health() -> Response:
        return PlainTextResponse("ok\n")

    async def is_ready() -> Response:
        good = await asyncio.to_thread(ready)
        return PlainTextResponse("ready\n" if good else "not ready\n", 200 if good else 503)

    async def metrics() -> Response:
        return PlainTextResponse(desk.metrics.text(desk.gate.inside))

    for path, route in (("/health", health), ("/ready", is_ready), ("/metrics", metrics)):
        app.add_api_route(path, route, methods=["HEAD"], include_in_schema=False)
    add("/health", health, "The server runs; needs no token", described.of_text(), "GET")
    add("/ready", is_ready, "A worker can answer; needs no token", described.of_text(503), "GET")
    add("/metrics", metrics, "What the server counts, in Prometheus's form", described.of_text(401), "GET")
    app.add_exception_handler(RefusedError, _refused)
    app.add_exception_handler(HTTPException, _http)
    document = app.openapi
    app.openapi = lambda: described.completed(document())  # type: ignore[method-assign]  # as FastAPI asks for


class Routes:
    """The routes that ask the engine."""

    def __init__(self, desk: Asked, catalog: Catalog, manners: Manners) -> None:
        self.desk, self.catalog, self.manners = desk, catalog, manners
        self.kind = ""  # of the base, from the first time it was asked for

    def of(self, kind: str) -> Callable[..., Coroutine[Any, Any, Response]]:
        """The route of a kind."""

        async def route(request: Request) -> Response:
            async def answer(upload: Upload) -> Response:
                said = {**upload.fields, **request.query_params}
                _known(kind, said)
                ask = await self._ask(kind, upload.body, said, said.get("adapter"))
                if ask.options.get("stream"):
                    return await self._streamed(ask, _sse)
                return JSONResponse(await self._answer(ask))

            return await self._counted(f"/v1/{kind}", request, answer)

        return route

    async def openai(self, request: Request) -> Response:
        """OpenAI's `audio/transcriptions`: a form with `file` and `model`, which names the adapter."""

        async def answer(upload: Upload) -> Response:
            said = upload.fields
            form = format_of(said.get("response_format"))
            ask = await self._ask(
                "transcribe", upload.body, {"stream": said.get("stream")}, said.get("model")
            )
            if ask.options.get("stream"):
                return await self._streamed(ask, sse_of())
            content = transcription_of(await self._answer(ask), form)
            return PlainTextResponse(content) if plain_text(form) else JSONResponse(content)

        return await self._counted(OPENAI, request, answer)

    async def models(self) -> Response:
        """The base and the adapters, in OpenAI's shape, and what they answer."""
        if not self.kind:
            about = Ask(None, ABOUT, b"", {}, time.monotonic() + self.manners.timeout)
            self.kind = (await self._answer(about))["kind"]
        names = await asyncio.to_thread(self.catalog.names)
        shape = {"object": "model", "owned_by": "lora_lightning", "kind": self.kind}
        data = [{"id": name, **shape} for name in (BASE, *names)]
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
                await asyncio.to_thread(self.catalog.check, name)
            except UnknownAdapter as error:
                raise RefusedError(404, f"{error} GET /v1/models lists them.") from None
        return Ask(name, kind, body, options, time.monotonic() + self.manners.timeout)

    async def _answer(self, ask: Ask) -> dict[str, Any]:
        async with contextlib.aclosing(self.desk.ask(ask)) as events:  # type: ignore[type-var]  # a generator
            async for event in events:
                if event.what == "error":
                    raise RefusedError(event.status, event.content["message"])
                if event.what == "answer":
                    if event.batch:  # 0 of silence: nothing ran
                        self.desk.metrics.batches.add(event.batch)
                    return event.content
        raise RefusedError(503, "the server ends: try again later.")

    async def _streamed(self, ask: Ask, shown: Callable[[Event], str]) -> Response:
        """Server-sent events. An error before the first is an answer of its status."""
        async with contextlib.AsyncExitStack() as held:
            events = self.desk.ask(ask)
            await held.enter_async_context(contextlib.aclosing(events))  # type: ignore[type-var]  # a generator
            first = await anext(events)
            if first.what == "error":
                raise RefusedError(first.status, first.content["message"])

            async def lines() -> AsyncIterator[str]:
                yield shown(first)
                async for event in events:
                    yield shown(event)

            return _Stream(lines(), held.pop_all())

    async def _counted(
        self, route: str, request: Request, answer: Callable[[Upload], Coroutine[Any, Any, Response]]
    ) -> Response:
        begun, status = time.monotonic(), 500
        with contextlib.ExitStack() as held:
            held.callback(lambda: self.desk.metrics.answered(route, status, time.monotonic() - begun))
            try:
                held.enter_context(self.desk.gate.place())
                upload = await self.desk.gate.arrival(
                    read_upload(request, self.manners.most, self.manners.reading)
                )
                response = await _unless_gone(request, answer(upload))
            except FullError:
                status = 429
                message = "there are too many requests: try again in a second."
                raise RefusedError(429, message, {"retry-after": "1", "connection": "close"}) from None
            except RefusedError as error:
                status = error.status
                raise
            status = response.status_code
            if isinstance(response, _Stream):  # is not answered yet
                response.held.push(held.pop_all())
            return response


class _Stream(StreamingResponse):
    """Server-sent events. What is held is let go when all is sent, or the client has left."""

    def __init__(self, lines: AsyncIterator[str], held: contextlib.AsyncExitStack) -> None:
        super().__init__(lines, media_type="text/event-stream", headers={"cache-control": "no-store"})
        self.held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self.held:
            await super().__call__(scope, receive, send)


def _sse(event: Event) -> str:
    """An event; of an error its status is told, too, since the stream has begun with 200."""
    content = event.content if event.what != "error" else {**event.content, "status": event.status}
    return f"event: {event.what}\ndata: {json.dumps(content)}\n\n"


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


def _known(kind: str, said: Mapping[str, Any]) -> None:
    """That a kind has every option that is given."""
    known = ("adapter", *described.KINDS[kind])
    for name in said:
        if name not in known:
            shown = ascii(name[:SHOWN])
            told = f"{shown}: {kind} has no such option, but {', '.join(known)}.{did_you_mean(name, known)}"
            raise RefusedError(400, told)


def _options(said: Mapping[str, Any]) -> dict[str, Any]:
    """What is said, checked."""
    options: dict[str, Any] = {}
    for name, number in described.NUMBERS.items():
        if (value := said.get(name)) is None:
            continue
        try:
            found = number.of(str(value)[:20])
        except ValueError:
            found = float("nan")
        if not number.least <= found <= number.most:
            what = "a whole number" if number.of is int else "a number"
            raise RefusedError(400, f"{name}: give {what} from {number.least} to {number.most:g}.")
        options[name] = found
    stream = said.get("stream")
    if stream not in (None, "true", "false", True, False):
        raise RefusedError(400, "stream: give true or false.")
    return {**options, **({"stream": True} if stream in ("true", True) else {})}


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    return JSONResponse(errors_shape(error.status, error.message), error.status, error.headers)


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    told = f"{error.detail}: GET /docs shows the addresses."
    return JSONResponse(errors_shape(error.status_code, told), error.status_code, error.headers)
