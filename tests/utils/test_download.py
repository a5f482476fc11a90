"""Files fetched by address, whole or not at all, with a bar that keeps control characters out of files."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from torchvision.datasets.utils import download_url

from lora_lightning.data.torchvision_downloads import our_bar
from lora_lightning.errors import MissingFileError
from lora_lightning.utils import screens
from lora_lightning.utils.download import url_file

CONTENT = bytes(range(256)) * 4000


class Handler(BaseHTTPRequestHandler):
    """Sends CONTENT, of `/cut.bin` half of what it promises."""

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.end_headers()

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[: len(CONTENT) // 2] if self.path == "/cut.bin" else CONTENT)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines from the first piece on."""
    monkeypatch.setattr(screens, "FIRST_LINE", 0.0)


def test_a_file_is_fetched_once(address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        path = url_file("a model", f"{address}/whole.bin", str(tmp_path))
        assert path.read_bytes() == CONTENT
    told = capsys.readouterr().err
    assert told.count("1/1 MB") >= 1
    assert told.startswith("downloading whole.bin")
    assert not set("\r\x1b") & set(told)


def test_half_a_file_is_none(address: str, tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="cut off after 512,000 of 1,024,000 bytes"):
        url_file("a model", f"{address}/cut.bin", str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_torchvision_downloads_with_our_bar(
    address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with our_bar():
        download_url(f"{address}/set.bin", str(tmp_path), "set.bin")
    assert (tmp_path / "set.bin").read_bytes() == CONTENT
    told = capsys.readouterr().err
    assert "downloading the data set  1/1 MB" in told
    assert not set("\r\x1b") & set(told)
