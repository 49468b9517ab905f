"""Compiled ops and remote code: found where hf_vtc is installed, without importing it; absent where it is not."""

import os
import shutil

import factories
import pytest
import torch

from hf_vtc.auto import REMOTE_CODE_FROM_FOLDER

pytestmark = pytest.mark.skipif(
    not REMOTE_CODE_FROM_FOLDER, reason="remote code from a local folder needs transformers >= 5.11"
)

# the processor is not needed: the op of the connector runs on random pixels
SCRIPT = """
import sys
import torch
from transformers import AutoModelForImageTextToText

folder, expected = sys.argv[1:]
models = [AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True) for _ in range(2)]
assert type(models[0]) is type(models[1])
assert type(models[0]).__module__.startswith("transformers_modules."), type(models[0])
kernels = sys.modules[type(models[0]).__module__.rsplit(".", 1)[0] + ".kernels_vtc"]
size = models[0].config.vision_config.image_size
size = size if isinstance(size, int) else size[0]
torch.manual_seed(0)
answers = [model.get_image_features(torch.randn(1, 3, size, size)).pooler_output for model in models]
print(kernels.has_kernel("unshuffle_layernorm", "cpu"))
assert str(kernels.has_kernel("unshuffle_layernorm", "cpu")) == expected
assert sys.modules.get("hf_vtc") is None, "remote code imported the installed package"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp("remote") / "vico-tiny"
    torch.manual_seed(0)
    factories.tiny_model("vico").save_pretrained(target)
    return target


def test_compiled_ops_of_the_installed_package_are_used(folder, run_python, compiled_cpu, monkeypatch):
    monkeypatch.setenv("HF_VTC_OPS", "auto")
    monkeypatch.setenv("HF_VTC_OPS_DIR", str(compiled_cpu.parent))
    assert run_python(SCRIPT, folder, True, installed=True) == "True\n"


def test_a_remote_copy_does_not_build(folder, run_python, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_VTC_OPS", "auto")
    monkeypatch.setenv("HF_VTC_OPS_DIR", str(tmp_path / "empty"))
    assert run_python(SCRIPT, folder, False, installed=True) == "False\n"
    assert not (tmp_path / "empty").exists()


@pytest.mark.parametrize("damage", ["truncated", "written by others"])
def test_a_remote_copy_runs_nothing_that_the_package_would_not(
    folder, run_python, compiled_cpu, tmp_path, monkeypatch, damage
):
    built = tmp_path / "cache" / compiled_cpu.name
    built.parent.mkdir(mode=0o700)
    shutil.copy(compiled_cpu, built)
    monkeypatch.setenv("HF_VTC_OPS", "auto")
    monkeypatch.setenv("HF_VTC_OPS_DIR", str(built.parent))
    if damage == "truncated":
        os.truncate(built, built.stat().st_size // 2)
    else:
        built.chmod(0o666)
    before = built.stat()
    assert run_python(SCRIPT, folder, False, installed=True) == "False\n"
    assert built.stat().st_mtime_ns == before.st_mtime_ns


def test_without_the_package_the_reference_runs(folder, run_python, compiled_cpu, monkeypatch):
    monkeypatch.setenv("HF_VTC_OPS", "auto")
    monkeypatch.setenv("HF_VTC_OPS_DIR", str(compiled_cpu.parent))
    assert run_python(SCRIPT, folder, False) == "False\n"


def test_require_names_the_missing_package(folder, run_python, monkeypatch):
    monkeypatch.setenv("HF_VTC_OPS", "require")
    with pytest.raises(AssertionError, match="hf_vtc, which brings them, is not installed"):
        run_python(SCRIPT, folder, True)
