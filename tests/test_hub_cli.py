"""`hf-vtc export` and `hf-vtc push`: what they hand on, and how they refuse."""

import factories
import pytest
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from hf_vtc import hub
from hf_vtc_cli.app import app


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "vico-tiny"
    factories.tiny_model("vico").save_pretrained(path, save_code=False)
    factories.tiny_processor("vico").save_pretrained(path, save_code=False)
    return path


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_export_writes_card_and_shards(folder, tmp_path):
    options = ("--no-check", "--base-model", "them/base", "--license", "mit", "--max-shard-size", "100KB")
    result = invoke("export", folder, tmp_path / "out", *options)
    assert result.exit_code == 0, result.stderr
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.base_model, card.data.license) == ("them/base", "mit")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1


def test_push_hands_its_options_on_and_prints_the_address(folder, monkeypatch):
    calls = []
    monkeypatch.setattr(hub, "push", lambda *args, **kwargs: calls.append((args, kwargs)) or "https://hub/tree/abc")
    result = invoke("push", folder, "me/tiny", "--private", "--revision", "next", "--message", "Hi", "--no-check")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "https://hub/tree/abc\n"
    expected = {
        "private": True,
        "revision": "next",
        "commit_message": "Hi",
        "check": False,
        "base_model": None,
        "license": None,
        "max_shard_size": "5GB",
    }
    assert calls == [((str(folder), "me/tiny"), expected)]


def test_push_of_a_bad_name_is_one_line(folder):
    result = invoke("push", folder, "a/b/c")
    assert result.exit_code == 2
    assert result.stderr == "Error: `REPO` must be 'name' or 'owner/name', got 'a/b/c'.\n"


def test_push_without_a_token_is_one_line(folder, monkeypatch):
    def refuse(api):
        raise OSError("Token is required, but no token found. Log in by `hf auth login`.")

    monkeypatch.setattr(hub.HfApi, "whoami", refuse)
    result = invoke("push", folder, "tiny")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and "hf auth login" in result.stderr
