"""Images from addresses: loaded as from files, and no server makes this machine wait or read without end."""

import io
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from hf_vtc.data import RecordError, load_records
from hf_vtc.models import image_loading_vtc
from hf_vtc.models.image_loading_vtc import decode_base64, download, upright_rgb, upright_size
from hf_vtc.models.image_processing_vtc import VtcImageProcessor


def png():
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (48, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


class Answers(BaseHTTPRequestHandler):
    """`/good`, and what a broken or hostile server answers."""

    def do_GET(self):
        self.server.agents.append(self.headers["User-Agent"])
        content = png()
        self.send_response(404 if self.path == "/missing" else 200)
        if self.path in ("/good", "/short"):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        try:
            if self.path == "/good":
                self.wfile.write(content)
            elif self.path == "/short":
                self.wfile.write(content[:100])
            while self.path in ("/endless", "/slow"):
                self.wfile.write(b"x" * (65536 if self.path == "/endless" else 1))
                self.wfile.flush()
                if self.path == "/slow":
                    time.sleep(0.02)
        except OSError:
            # the client has had enough
            pass

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as running:
        running.agents = []
        running.daemon_threads = True
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def address(server, name):
    return f"http://127.0.0.1:{server.server_port}/{name}"


def record(image):
    return {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}], "images": [image]}


def test_addresses_are_read_as_files_are(server):
    assert download(address(server, "good")) == png()
    assert server.agents[0].startswith("Mozilla/5.0")
    processor = VtcImageProcessor(size=32)
    expected = processor(Image.open(io.BytesIO(png())))["pixel_values"]
    assert np.array_equal(processor(address(server, "good"))["pixel_values"], expected)
    (item,) = load_records([record(address(server, "good"))], allow_urls=True)
    assert np.array_equal(item["images"][0], Image.open(io.BytesIO(png())))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing", "404"),
        ("short", "only 100 of .* bytes came"),
        ("endless", "it is larger than 1000000 bytes"),
        ("slow", "it takes longer than 0.3 seconds"),
    ],
)
def test_servers_that_fail_or_never_end_are_left(name, reason, server, monkeypatch):
    monkeypatch.setattr(image_loading_vtc, "MOST_DOWNLOADED_BYTES", 1_000_000)
    monkeypatch.setattr(image_loading_vtc, "DOWNLOAD_SECONDS", 0.3)
    with pytest.raises(OSError, match=rf"`images`: .*{name}' could not be downloaded .*{reason}"):
        VtcImageProcessor(size=32)(address(server, name))
    with pytest.raises(RecordError, match=rf"record 0: Image .*{name}' could not be downloaded .*{reason}"):
        load_records([record(address(server, name))], allow_urls=True)


def test_no_server_and_no_address():
    for url in ("http://127.0.0.1:9/a.png", "http://[", "gopher://x/a"):
        with pytest.raises((OSError, ValueError)):
            download(url)


def test_base64_with_white_space():
    assert decode_base64("aGVs\n bG8=") == b"hello"
    for text in ("@@@", "aGVsbG8"):
        with pytest.raises(ValueError):
            decode_base64(text)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_upright_size_is_known_before_the_pixels(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / "a.jpg"
    Image.new("RGB", (40, 20)).save(file, exif=exif)
    with Image.open(file) as image:
        size = upright_size(image)
        upright = upright_rgb(image, "images", "the image")
    assert size == (upright.height, upright.width) == ((20, 40) if orientation < 5 else (40, 20))
