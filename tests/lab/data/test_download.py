"""Against a server of our own on this machine."""

from __future__ import annotations

import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from intrafusion.lab.data.download import fetch
from intrafusion.lab.errors import LabError

CONTENT = bytes(range(256)) * 400
MD5 = hashlib.md5(CONTENT).hexdigest()


class Host(http.server.BaseHTTPRequestHandler):
    """Sends CONTENT; ``breaks_after`` bytes of each answer it hangs up; it knows ranges if ``ranges``."""

    breaks_after = len(CONTENT)
    ranges = True
    asked: list[str]

    def do_GET(self) -> None:
        wanted = self.headers.get("Range", "")
        self.asked.append(wanted)
        start = int(wanted.removeprefix("bytes=").removesuffix("-") or 0) if self.ranges else 0
        if start >= len(CONTENT):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        self.wfile.write(CONTENT[start : start + self.breaks_after])

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def host() -> type[Host]:
    return type("OneHost", (Host,), {"asked": []})


@pytest.fixture
def url(host: type[Host]) -> Iterator[str]:
    with http.server.HTTPServer(("127.0.0.1", 0), host) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/data.tar.gz"
        server.shutdown()
        thread.join()


def test_the_whole_file(url: str, tmp_path: Path) -> None:
    fetch(url, tmp_path / "sub" / "data", MD5)
    assert (tmp_path / "sub" / "data").read_bytes() == CONTENT
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["data"]


@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_download_goes_on(url: str, host: type[Host], tmp_path: Path, ranges: bool) -> None:
    host.breaks_after, host.ranges = 40_000, ranges
    with pytest.raises(LabError, match=r"broke off .*; 0\.0 MiB are kept in .*data\.part, and the same command"):
        fetch(url, tmp_path / "data", MD5)
    assert not (tmp_path / "data").exists()
    assert (tmp_path / "data.part").read_bytes() == CONTENT[:40_000]
    host.breaks_after = len(CONTENT)
    fetch(url, tmp_path / "data", MD5)
    assert host.asked == ["", "bytes=40000-"]
    assert (tmp_path / "data").read_bytes() == CONTENT
    assert not (tmp_path / "data.part").exists()


def test_an_attempt_that_got_everything_but_was_killed(url: str, tmp_path: Path) -> None:
    (tmp_path / "data.part").write_bytes(CONTENT)
    fetch(url, tmp_path / "data", MD5)
    assert (tmp_path / "data").read_bytes() == CONTENT


def test_another_checksum_leaves_nothing(url: str, tmp_path: Path) -> None:
    (tmp_path / "data.part").write_bytes(b"something else")
    with pytest.raises(LabError, match=f"another checksum than md5 {MD5}"):
        fetch(url, tmp_path / "data", MD5)
    assert list(tmp_path.iterdir()) == []


def test_nobody_answers(tmp_path: Path) -> None:
    with pytest.raises(LabError, match=r"the download of http://127\.0\.0\.1:9/x broke off \(.*refused\); 0\.0 MiB"):
        fetch("http://127.0.0.1:9/x", tmp_path / "data", MD5)
