"""`hf-vtc serve`: an OpenAI client asks about an image, whole and streamed, with a budget in the request."""

import base64
import io
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from factories import budgets_of, tiny_config
from PIL import Image
from typer.testing import CliRunner

from hf_vtc_cli.app import app

ROOT = Path(__file__).resolve().parents[1]
REASON = "pip install 'transformers[serving]>=5'"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Of a server in a process of its own."""
    for package in ("fastapi", "uvicorn", "openai", "transformers.cli.serve"):
        pytest.importorskip(package, reason=REASON)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    log = (tmp_path_factory.mktemp("serve") / "log").open("w+")
    process = subprocess.Popen(
        [sys.executable, "-c", "from hf_vtc_cli import main; main()", "serve", "--port", str(port), "--device", "cpu"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=log,
        stderr=log,
    )
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://localhost:{port}/health").read()
                break
            except OSError:
                assert process.poll() is None, log.seek(0) or log.read()
                time.sleep(0.5)
        yield f"http://localhost:{port}/v1"
    finally:
        process.terminate()
        process.wait(30)
        log.close()


@pytest.fixture
def ask(address, saved):
    import openai

    client = openai.OpenAI(base_url=address, api_key="none", max_retries=0)
    page = io.BytesIO()
    Image.new("RGB", (60, 40), "red").save(page, "PNG")
    url = "data:image/png;base64," + base64.b64encode(page.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what is this?"}]

    def ask(**extra):
        stream = extra.pop("stream", False)
        return client.chat.completions.create(
            model=str(saved),
            messages=[{"role": "user", "content": content}],
            max_tokens=4,
            temperature=0,
            stream=stream,
            extra_body=extra,
        )

    return ask


def test_answers_whole_and_streamed(ask):
    whole = ask()
    assert whole.usage.completion_tokens <= 4 and whole.usage.prompt_tokens > 4
    streamed = [chunk.choices[0].delta.content or "" for chunk in ask(stream=True) if chunk.choices]
    # a random model may end within a character, which a stream does not show
    assert "".join(streamed).rstrip("\ufffd") == whole.choices[0].message.content.rstrip("\ufffd")


def test_a_request_has_a_budget_or_is_refused(ask, method):
    import openai

    full = ask(vtc_budget="full").choices[0].message.content
    assert isinstance(full, str)
    assert isinstance(ask(vtc_budget=budgets_of(tiny_config(method))[0]).choices[0].message.content, str)
    for asked, answer in (({"vtc_budget": 1e-9}, "`vtc_budget`"), ({"vtc_budgets": 0.5}, "Unexpected fields")):
        with pytest.raises(openai.UnprocessableEntityError) as refused:
            ask(**asked)
        assert answer in refused.value.response.text


def test_without_a_server_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.cli.transformers", None)
    result = CliRunner().invoke(app, ["serve", "--port", "1"])
    assert result.exit_code == 2 and "pip install 'transformers[serving]>=5'" in result.output
