"""Checkpoint folders as remote code: the same answer with and without hf_vtc, and across supported transformers."""

import inspect
import json
import os
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from hf_vtc.auto import REMOTE_CODE_FROM_FOLDER

needs_remote_code_from_folder = pytest.mark.skipif(
    not REMOTE_CODE_FROM_FOLDER, reason="remote code from a local folder needs transformers >= 5.11"
)
needs_other_python = pytest.mark.skipif(
    "HF_VTC_OTHER_PYTHON" not in os.environ,
    reason="HF_VTC_OTHER_PYTHON names no interpreter with another transformers",
)


def encoded(processor) -> dict[str, torch.Tensor]:
    """A prompt with two small images as the processor writes it."""
    pixels = bytes(index * index // 97 % 256 for index in range(40 * 60 * 3))
    images = [Image.frombytes("RGB", (60, 40), pixels), Image.frombytes("RGB", (40, 60), pixels)]
    text = f"{processor.image_token} and {processor.image_token}\nWhat is different?"
    return dict(processor(images=images, text=[text], return_tensors="pt"))


def answers(model, inputs) -> dict[str, torch.Tensor]:
    """Logits at full length for each budget."""
    # ConvLLaVA has one count, all of the tokens
    budgets = {"auto": "auto", "full": "full", "share": 1.0 if model.config.model_type == "vtc_convllava" else 0.5}
    with torch.no_grad():
        return {f"logits {name}": model(**inputs, vtc_budget=budget).logits for name, budget in budgets.items()}


# both functions travel as text into processes that cannot import this file
ANSWER = f"""
import sys
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

{inspect.getsource(encoded)}

{inspect.getsource(answers)}

way, folder, inputs_file, outputs_file = sys.argv[1:]
if way == "installed":
    import hf_vtc
torch.set_num_threads(1)
remote = way == "remote"
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=remote)
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=remote)
package = "transformers_modules." if remote else "hf_vtc."
assert type(model).__module__.startswith(package), type(model)
assert type(processor).__module__.startswith(package), type(processor)
results = encoded(processor) | answers(model, load_file(inputs_file))
save_file({{name: value.contiguous() for name, value in results.items()}}, outputs_file)
"""

LOAD_SEVERAL_TIMES = """
import sys
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

package, *folders = sys.argv[1:]
if package == "hf_vtc":
    import hf_vtc
for folder in folders:
    for auto_class in (AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor):
        classes = [type(auto_class.from_pretrained(folder, trust_remote_code=True)) for _ in range(3)]
        assert len(set(classes)) == 1, classes
        assert classes[0].__module__.startswith(package + "."), classes
assert package == "hf_vtc" or sys.modules.get("hf_vtc") is None
"""

SAVE_AGAIN = """
import sys
from transformers import AutoModelForImageTextToText, AutoProcessor

source, target, way = sys.argv[1:]
if way == "installed":
    import hf_vtc
remote = way == "remote"
AutoModelForImageTextToText.from_pretrained(source, trust_remote_code=remote).save_pretrained(target)
AutoProcessor.from_pretrained(source, trust_remote_code=remote).save_pretrained(target)
"""

SAVE_TINY = """
import sys
import factories
import torch

method, folder = sys.argv[1:]
torch.manual_seed(0)
factories.tiny_model(method).save_pretrained(folder)
factories.tiny_processor(method).save_pretrained(folder)
"""


@pytest.fixture(scope="module")
def answer(run_python, tmp_path_factory):
    """Load a folder in a new process and give what its processor and its model make of fixed inputs."""

    def run(folder: Path, inputs: Path, way: str, python: str | None = None) -> dict[str, torch.Tensor]:
        outputs = tmp_path_factory.mktemp("answer") / "outputs.safetensors"
        options = {} if python is None else {"python": python}
        run_python(ANSWER, way, folder, inputs, outputs, installed=way == "installed", **options)
        return load_file(outputs)

    return run


@pytest.fixture(scope="module")
def inputs(saved, tmp_path_factory) -> Path:
    """File with what the installed processor makes of the prompt, moved a little so that rounding shows."""
    file = tmp_path_factory.mktemp("inputs") / "inputs.safetensors"
    values = encoded(AutoProcessor.from_pretrained(saved))
    noise = torch.randn(values["pixel_values"].shape, generator=torch.Generator().manual_seed(0))
    values["pixel_values"] = values["pixel_values"] + noise
    save_file({name: value.contiguous() for name, value in values.items()}, file)
    return file


@pytest.fixture(scope="module")
def expected(saved, inputs, answer) -> dict[str, torch.Tensor]:
    """The answer of the installed classes."""
    return answer(saved, inputs, "installed")


@pytest.fixture(scope="module")
def other_saved(method, run_python, tmp_path_factory) -> Path:
    """The tiny model as the other transformers saves it."""
    folder = tmp_path_factory.mktemp("other") / f"{method}-tiny"
    run_python(SAVE_TINY, method, folder, installed=True, python=os.environ["HF_VTC_OTHER_PYTHON"])
    return folder


@pytest.fixture(scope="module")
def other_expected(other_saved, inputs, answer) -> dict[str, torch.Tensor]:
    """The answer of this transformers to what the other one saved."""
    return answer(other_saved, inputs, "installed")


def assert_same(results: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert results.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(results[name], value), name


def assert_close(results: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Equal within 1e-5 wherever both have a value: a processor may return more keys on one transformers."""
    shared = results.keys() & expected.keys()
    assert {"input_ids", "attention_mask", "pixel_values", "logits auto", "logits full", "logits share"} <= shared
    for name in shared:
        assert results[name].shape == expected[name].shape, name
        assert torch.allclose(results[name], expected[name], atol=1e-5, rtol=0), name


def assert_complete(folder: Path) -> None:
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert auto_map.keys() == {"AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoModelForVision2Seq"}
    text = "".join(file.read_text(encoding="utf-8") for file in folder.glob("*.json"))
    named = set(re.findall(r'"((?:configuration|modeling|image_processing|processing)_\w+)\.\w+"', text))
    assert len(named) >= 4
    for name in named:
        assert (folder / f"{name}.py").is_file(), name
    for file in folder.glob("*.py"):
        for name in re.findall(r"^\s*from \.(\w+) import", file.read_text(encoding="utf-8"), flags=re.MULTILINE):
            assert (folder / f"{name}.py").is_file(), f"{file.name} imports {name}"


@pytest.mark.window
def test_saving_writes_every_key_and_the_code(saved):
    assert_complete(saved)


@pytest.mark.window
def test_saving_without_code_writes_neither_keys_nor_code(saved, tmp_path):
    AutoModelForImageTextToText.from_pretrained(saved).save_pretrained(tmp_path, save_code=False)
    AutoProcessor.from_pretrained(saved).save_pretrained(tmp_path, save_code=False)
    assert not list(tmp_path.glob("*.py"))
    assert not [file.name for file in tmp_path.glob("*.json") if "auto_map" in file.read_text(encoding="utf-8")]


@pytest.mark.window
def test_installed_classes_load_and_save_the_code_again(saved, inputs, expected, answer, run_python, tmp_path):
    run_python(SAVE_AGAIN, saved, tmp_path / "again", "installed", installed=True)
    assert_complete(tmp_path / "again")
    assert_same(answer(tmp_path / "again", inputs, "installed"), expected)


@needs_remote_code_from_folder
def test_remote_code_gives_the_same_bits(saved, inputs, expected, answer):
    assert_same(answer(saved, inputs, "remote"), expected)


@needs_remote_code_from_folder
def test_remote_code_survives_being_saved_again(saved, inputs, expected, answer, run_python, tmp_path):
    run_python(SAVE_AGAIN, saved, tmp_path / "again", "remote")
    assert_complete(tmp_path / "again")
    assert {file.name for file in saved.glob("*.py")} == {file.name for file in (tmp_path / "again").glob("*.py")}
    assert_same(answer(tmp_path / "again", inputs, "remote"), expected)


@needs_remote_code_from_folder
@pytest.mark.parametrize(
    "installed, package",
    [
        pytest.param(False, "transformers_modules", id="not installed"),
        pytest.param(True, "transformers_modules", id="installed"),
        pytest.param(True, "hf_vtc", id="imported"),
    ],
)
def test_repeated_loads_give_the_same_class(every_saved, run_python, installed, package):
    run_python(LOAD_SEVERAL_TIMES, package, *every_saved, installed=installed)


@needs_other_python
def test_the_other_transformers_loads_what_this_one_saves(saved, inputs, expected, answer):
    results = answer(saved, inputs, "installed", python=os.environ["HF_VTC_OTHER_PYTHON"])
    assert_close(results, expected)


@needs_other_python
def test_this_transformers_loads_what_the_other_one_saves(other_saved, other_expected, inputs, answer):
    other = os.environ["HF_VTC_OTHER_PYTHON"]
    assert_close(other_expected, answer(other_saved, inputs, "installed", python=other))


@needs_other_python
@needs_remote_code_from_folder
def test_remote_code_saved_by_the_other_transformers(other_saved, other_expected, inputs, answer):
    assert_complete(other_saved)
    assert_same(answer(other_saved, inputs, "remote"), other_expected)
