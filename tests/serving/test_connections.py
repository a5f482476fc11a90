"""Connections that are slow, huge or deaf are ended, and the others are answered meanwhile."""

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from desk import listening
from served import engine_for, picture, save_digits

from lora_lightning.serving import connections, gate
from lora_lightning.serving.inputs import Limits

POST = b"POST /v1/classify HTTP/1.1\r\nhost: x\r\n"


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    folder = tmp_path_factory.mktemp("shelf")
    save_digits(folder / "ada", 0)
    engine = engine_for({"adapters": str(folder)}, Limits())
    yield engine
    engine.close()


def connected(address: str, *sent: bytes) -> socket.socket:
    host, port = address.removeprefix("http://").split(":")
    client = socket.create_connection((host, int(port)), timeout=20)
    for part in sent:
        client.sendall(part)
    return client


def rest_of(client: socket.socket) -> bytes:
    """What comes until the server ends the connection."""
    found = b""
    try:
        while part := client.recv(1 << 16):
            found += part
    except ConnectionResetError:
        pass
    client.close()
    return found


@pytest.mark.parametrize("sent", [b"", b"\r\n", POST, POST + b"x-a: 1"])
def test_a_head_that_never_ends_is_given_up(digits, sent: bytes, monkeypatch) -> None:
    monkeypatch.setattr(connections, "SECONDS", 0.3)
    with listening(digits) as address:
        since = time.monotonic()
        assert rest_of(connected(address, sent)) == b"" and time.monotonic() - since > 0.25
        client = connected(address, b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n", b"GET /hea")  # the second one
        assert rest_of(client).endswith(b"ok\n")


def test_a_head_or_a_trailer_without_end_is_refused_unread(digits) -> None:
    large = b"x-a: " + bytes(100_000).replace(b"\0", b"a")
    with listening(digits) as address:
        answer = rest_of(connected(address, POST, large))
        assert answer.startswith(b"HTTP/1.1 400 ") and answer.endswith(b": send a smaller one.")
        chunked = POST + b"transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n"
        client = connected(address, chunked)
        time.sleep(0.2)  # its head and its body are whole before the trailer comes
        client.sendall(large[:70_000])
        assert rest_of(client) == b""
        several = httpx.get(f"{address}/health", headers={f"x-{i}": "a" * 100 for i in range(100)})
        assert several.status_code == 200


def test_who_takes_nothing_of_an_answer_is_left(digits, monkeypatch) -> None:
    monkeypatch.setattr(connections, "UNREAD", 0.3)
    with listening(digits) as address:
        client = connected(address)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with pytest.raises(OSError, match=r"reset|Broken pipe"):  # noqa: PT012
            for _ in range(3000):  # pages, of which none is read
                client.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
                time.sleep(0.002)


def test_slow_uploads_give_their_places_to_others(digits, monkeypatch) -> None:
    """As many as there are places, of which not one ends; who comes is answered, and the first told so."""
    monkeypatch.setattr(gate, "PATIENCE", 60.0)
    with listening(digits, most=4) as address:
        slow = [connected(address, POST + b"content-length: 1000\r\n\r\n", b"x") for _ in range(4)]
        while "lora_requests_inside 4\n" not in httpx.get(f"{address}/metrics").text:
            time.sleep(0.02)
        early = httpx.post(f"{address}/v1/classify", content=picture(0))
        assert early.status_code == 429 and "too many" in early.text  # none has been slow for long
        monkeypatch.setattr(gate, "PATIENCE", 0.0)
        late = httpx.post(f"{address}/v1/classify", content=picture(0))
        assert late.status_code == 200
        assert rest_of(slow[0]).startswith(b"HTTP/1.1 429 ")
        assert "lora_requests_inside 3\n" in httpx.get(f"{address}/metrics").text
        for client in slow[1:]:
            client.close()


def test_websockets_are_no_way_in(digits) -> None:
    head = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
    key = b"sec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\nsec-websocket-version: 13\r\n\r\n"
    with listening(digits) as address:
        client = connected(address, head, key)
        assert client.recv(12) == b"HTTP/1.1 200"
        client.close()


def test_other_bytes_than_http_get_one_line(digits, tmp_path: Path) -> None:
    with listening(digits) as address:
        for sent in (b"\x16\x03\x01\x02\0\1\0" * 9, b"GET /\xff HTTP/1.1\r\n\r\n", b"GET / HTTP/9\r\n\r\n"):
            answer = rest_of(connected(address, sent))
            assert answer.startswith(b"HTTP/1.1 400 ") and str(tmp_path.parent).encode() not in answer
