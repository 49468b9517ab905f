"""Checkpoint folders as remote code: the same answer with and without hf_vtc, and across supported transformers."""

import inspect
import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import METHOD_NAMES, ON_VIDEOS, save_tiny
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from hf_vtc.auto import REMOTE_CODE_FROM_FOLDER

needs_remote_code_from_folder = pytest.mark.skipif(
    not REMOTE_CODE_FROM_FOLDER, reason="remote code from a local folder needs transformers >= 5.11"
)
NAMES = (*METHOD_NAMES, *ON_VIDEOS)
needs_other_python = pytest.mark.skipif(
    "HF_VTC_OTHER_PYTHON" not in os.environ,
    reason="HF_VTC_OTHER_PYTHON names no interpreter with another transformers",
)


def encoded(processor) -> dict[str, torch.Tensor]:
    """A prompt with two small images, and a video where there may be one, as the processor writes it."""
    pixels = bytes(index * index // 97 % 256 for index in range(40 * 60 * 3))
    images = [Image.frombytes("RGB", (60, 40), pixels), Image.frombytes("RGB", (40, 60), pixels)]
    text, video = f"{processor.image_token} and {processor.image_token}\nWhat is different?", {}
    if processor.video is not None:
        frames = [Image.frombytes("RGB", (60, 40), pixels[idx:] + pixels[:idx]) for idx in range(0, 400, 80)]
        text, video = text + processor.video_token, {"videos": [frames], "video_metadata": {"fps": 2}}
    return dict(processor(images=images, text=[text], return_tensors="pt", **video))


def answers(model, inputs) -> dict[str, torch.Tensor]:
    """Logits at full length for each budget, and ids of an answer."""
    # ConvLLaVA has one count, all of the tokens
    budgets = {"auto": "auto", "full": "full", "share": 1.0 if model.config.model_type == "vtc_convllava" else 0.5}
    with torch.no_grad():
        logits = {f"logits {name}": model(**inputs, vtc_budget=budget).logits for name, budget in budgets.items()}
    ids = model.generate(**inputs, vtc_budget=budgets["share"], max_new_tokens=4, do_sample=False)
    return logits | {"ids": ids}


# both functions travel as text into processes that cannot import this file; each process takes all methods, since
# starting it takes longer than the rest
ANSWER = f"""
import sys
from pathlib import Path
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

{inspect.getsource(encoded)}

{inspect.getsource(answers)}

way, inputs, outputs, *folders = sys.argv[1:]
if way == "installed":
    import hf_vtc
torch.set_num_threads(1)
remote = way == "remote"
for folder in folders:
    print(folder, file=sys.stderr)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=remote)
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=remote)
    package = "transformers_modules." if remote else "hf_vtc."
    assert type(model).__module__.startswith(package), type(model)
    assert type(processor).__module__.startswith(package), type(processor)
    file = Path(folder).name + ".safetensors"
    results = encoded(processor) | answers(model, load_file(Path(inputs, file)))
    save_file({{name: value.contiguous() for name, value in results.items()}}, Path(outputs, file))
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
from pathlib import Path
from transformers import AutoModelForImageTextToText, AutoProcessor

way, target, *folders = sys.argv[1:]
if way == "installed":
    import hf_vtc
remote = way == "remote"
for folder in folders:
    print(folder, file=sys.stderr)
    again = Path(target, Path(folder).name)
    AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=remote).save_pretrained(again)
    AutoProcessor.from_pretrained(folder, trust_remote_code=remote).save_pretrained(again)
"""

SAVE_TINY = """
import sys
from pathlib import Path
import conftest

for method in sys.argv[2:]:
    conftest.save_tiny(method, Path(sys.argv[1]))
"""

Answers = dict[str, dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def every_saved(every_saved, tmp_path_factory) -> list[Path]:
    """A folder for each method, and for methods that take videos."""
    return every_saved + [save_tiny(name, tmp_path_factory.mktemp("on_videos")) for name in ON_VIDEOS]


@pytest.fixture(scope="module")
def answer(run_python, inputs, tmp_path_factory):
    """Load folders in a new process, and give by their names what processors and models make of fixed inputs."""

    def run(folders: list[Path], way: str, python: str = sys.executable) -> Answers:
        outputs = tmp_path_factory.mktemp("answer")
        run_python(ANSWER, way, inputs, outputs, *folders, installed=way == "installed", python=python)
        return {folder.name: load_file(outputs / f"{folder.name}.safetensors") for folder in folders}

    return run


@pytest.fixture(scope="module")
def save_again(run_python, tmp_path_factory):
    """Load folders in a new process and save them elsewhere."""

    def run(folders: list[Path], way: str) -> list[Path]:
        target = tmp_path_factory.mktemp("again")
        run_python(SAVE_AGAIN, way, target, *folders, installed=way == "installed")
        return [target / folder.name for folder in folders]

    return run


@pytest.fixture(scope="module")
def inputs(every_saved, tmp_path_factory) -> Path:
    """What the installed processors make of the prompt, a file each, moved a little so that rounding shows."""
    parent = tmp_path_factory.mktemp("inputs")
    for folder in every_saved:
        values = encoded(AutoProcessor.from_pretrained(folder))
        for name in {"pixel_values", "pixel_values_videos"} & {*values}:
            noise = torch.randn(values[name].shape, generator=torch.Generator().manual_seed(0))
            values[name] = values[name] + noise
        contiguous = {name: value.contiguous() for name, value in values.items()}
        save_file(contiguous, parent / f"{folder.name}.safetensors")
    return parent


@pytest.fixture(scope="module")
def expected(every_saved, answer) -> Answers:
    """The answers of the installed classes."""
    return answer(every_saved, "installed")


@pytest.fixture(scope="module")
def other_saved(run_python, tmp_path_factory) -> list[Path]:
    """The tiny models as the other transformers saves them."""
    parent = tmp_path_factory.mktemp("other")
    run_python(SAVE_TINY, parent, *NAMES, installed=True, python=os.environ["HF_VTC_OTHER_PYTHON"])
    return sorted(parent.iterdir())


@pytest.fixture(scope="module")
def other_expected(other_saved, answer) -> Answers:
    """The answers of this transformers to what the other one saved."""
    return answer(other_saved, "installed")


def assert_same(results: Answers, expected: Answers) -> None:
    assert results.keys() == expected.keys() and len(results) == len(NAMES)
    for name, values in expected.items():
        assert results[name].keys() == values.keys(), name
        assert not [key for key, value in values.items() if not torch.equal(results[name][key], value)], name


def assert_close(results: Answers, expected: Answers) -> None:
    """Equal within 1e-5 wherever both have a value: a processor may return more keys on one transformers."""
    assert results.keys() == expected.keys() and len(results) == len(NAMES)
    for name in expected:
        shared = results[name].keys() & expected[name].keys()
        assert {"input_ids", "attention_mask", "pixel_values", "logits auto", "logits full", "logits share"} <= shared
        for key in shared:
            found, wanted = results[name][key], expected[name][key]
            assert found.shape == wanted.shape, f"{name} {key}"
            assert torch.allclose(found, wanted, atol=1e-5, rtol=0), f"{name} {key}"


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
def test_installed_classes_load_and_save_the_code_again(every_saved, expected, answer, save_again):
    again = save_again(every_saved, "installed")
    for folder in again:
        assert_complete(folder)
    assert_same(answer(again, "installed"), expected)


@needs_remote_code_from_folder
def test_remote_code_gives_the_same_bits(every_saved, expected, answer):
    assert_same(answer(every_saved, "remote"), expected)


@needs_remote_code_from_folder
def test_remote_code_survives_being_saved_again(every_saved, expected, answer, save_again):
    again = save_again(every_saved, "remote")
    for folder, source in zip(again, every_saved):
        assert_complete(folder)
        assert {file.name for file in source.glob("*.py")} == {file.name for file in folder.glob("*.py")}
    assert_same(answer(again, "remote"), expected)


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
def test_the_other_transformers_loads_what_this_one_saves(every_saved, expected, answer):
    assert_close(answer(every_saved, "installed", python=os.environ["HF_VTC_OTHER_PYTHON"]), expected)


@needs_other_python
def test_this_transformers_loads_what_the_other_one_saves(other_saved, other_expected, answer):
    other = os.environ["HF_VTC_OTHER_PYTHON"]
    assert_close(other_expected, answer(other_saved, "installed", python=other))


@needs_other_python
@needs_remote_code_from_folder
def test_remote_code_saved_by_the_other_transformers(other_saved, other_expected, answer):
    for folder in other_saved:
        assert_complete(folder)
    assert_same(answer(other_saved, "remote"), other_expected)
