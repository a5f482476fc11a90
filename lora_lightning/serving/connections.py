"""Connections: uvicorn's, of which it times neither the head of a request nor the reading of an answer."""

from __future__ import annotations

from asyncio import TimerHandle, Transport

from lora_lightning.utils.libraries import loading

with loading("litserve", "serve"):
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD = 64 * 1024  # bytes of a request's head, or between two parts of its body
SECONDS = 10.0  # for a head to arrive, from the connection's beginning or from the answer before
UNREAD = 30.0  # seconds for which a client takes nothing of an answer


class Connection(HttpToolsProtocol):
    """Ends a connection whose head is too slow or too large, and one that takes nothing of its answer."""

    _timer: TimerHandle | None = None  # of the head
    _stuck: TimerHandle | None = None  # of the answer
    _beside = 0  # bytes that came since a head or a part of a body was whole

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_came()
        self._is_read()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._beside += len(data)
        super().data_received(data)
        if self._beside > HEAD and not self.transport.is_closing():
            if self._timer:  # nothing is answered yet
                self.send_400_response("The head of the request is too large: send a smaller one.")
            else:
                self.transport.abort()

    def on_headers_complete(self) -> None:
        self._beside = 0
        self._head_came()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._beside = 0
        super().on_body(body)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete and not self.transport.is_closing():
            self._await_head()

    def pause_writing(self) -> None:
        self._stuck = self.loop.call_later(UNREAD, self.transport.abort)
        super().pause_writing()

    def resume_writing(self) -> None:
        self._is_read()
        super().resume_writing()

    def _await_head(self) -> None:
        self._head_came()
        self._timer = self.loop.call_later(SECONDS, self.timeout_keep_alive_handler)

    def _head_came(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None

    def _is_read(self) -> None:
        if self._stuck:
            self._stuck.cancel()
            self._stuck = None
