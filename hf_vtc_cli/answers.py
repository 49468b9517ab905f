"""Questions asked of a checkpoint: load it, answer uncompressed and compressed, time the first token, draw what stays.

A page is a dictionary as in `examples/images/pages.json`: "image" is a path or URL, or "video" the path of a file,
"questions" a list of dictionaries with "question" and, where they are known, "answer" and "kind"; "picture" is the
decoded image or video.
"""

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.utils import logging

from hf_vtc.data import read_video
from hf_vtc.demo.prompts import Prompt, model_inputs
from hf_vtc.files import blaming
from hf_vtc.hub.source import load_model, load_processor
from hf_vtc.methods import find_record
from hf_vtc.models.image_processing_vtc import VtcImageProcessor
from hf_vtc.models.prompt_vtc import Budget

__all__ = [
    "Prompt",
    "can_meet",
    "config_of",
    "find_device",
    "interview",
    "is_compressing",
    "load",
    "model_inputs",
    "processor_of",
    "with_pictures",
    "working_with",
]

# formats that people have, and Pillow does not read by itself
_UNREAD_FORMATS = {
    ".heic": "HEIC",
    ".heif": "HEIF",
    ".jxl": "JPEG XL",
    ".svg": "SVG",
    ".pdf": "PDF",
    ".dng": "a raw photograph",
}
_VIDEOS = (".mp4", ".mov", ".webm")


def config_of(path: str) -> PretrainedConfig | dict[str, Any]:
    """The config of a checkpoint; a dictionary where transformers does not know its type.

    Raises:
        FileNotFoundError: there is none.
    """
    reason = "the folder has none"
    with blaming(path):
        try:
            content, _ = PretrainedConfig.get_config_dict(path)
        except OSError as error:
            content, reason = {}, str(error)
        if "model_type" not in content:
            raise FileNotFoundError(
                f"No config.json of a model can be read from {path} ({reason}). Check the path or id."
            )
        known = content["model_type"] in CONFIG_MAPPING
        return AutoConfig.from_pretrained(path, trust_remote_code=False) if known else content


@contextmanager
def working_with(path: str) -> Iterator[None]:
    """Name the checkpoint whose settings have passed every check and then fail at work.

    Raises:
        ValueError: in place of an error that does not speak to users.
    """
    try:
        yield
    except (ValueError, OSError, ImportError, RuntimeError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(
            f"{path} does not work as a model ({type(error).__name__}: {error}). Check config.json and the files "
            "beside it; --debug shows where it fails."
        ) from error


def is_compressing(config: PretrainedConfig | Mapping[str, Any]) -> bool:
    """Whether a config is that of a model of hf_vtc."""
    return find_record(config) is not None


def load(path: str, device: str | None = None, dtype: str | None = None) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Model of hf_vtc in eval mode on its device, and processor.

    Args:
        path (`str`): folder, or id of the Hub.
        device (`str`, *optional*): such as "cpu". Default: the fastest one here.
        dtype (`str`, *optional*): "auto" for that of the checkpoint, or the name of one of torch. Default: float32 on
            CPU, elsewhere "auto".

    Raises:
        ValueError: this is another model, or the device is not available.
        OSError: nothing can be read from `path`.
    """
    place = find_device(device)
    if dtype is None:
        # 16-bit arithmetic is slow or inexact on most CPUs
        dtype = "float32" if place.type == "cpu" else "auto"
    processor = processor_of(path)
    model = load_model(path, "auto" if dtype == "auto" else getattr(torch, dtype))
    return model.to(place).eval(), processor


def processor_of(path: str) -> ProcessorMixin:
    """Processor of a model of hf_vtc.

    Raises:
        ValueError: this is another model.
        OSError: nothing can be read from `path`.
    """
    if not is_compressing(config_of(path)):
        raise ValueError(
            f"{path} is no model of hf_vtc. Convert it first: hf-vtc convert {path} FOLDER, then use --model FOLDER."
        )
    if Path(path).is_dir():
        # a download is worth a progress bar, reading a file is not
        logging.disable_progress_bar()
    return load_processor(path)


def find_device(name: str | None) -> torch.device:
    """A device by its name, the fastest one here for None.

    Raises:
        ValueError: there is none of that name.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    if name is None:
        return found or torch.device("cpu")
    available = {"cpu": 1} | ({found.type: torch.accelerator.device_count()} if found else {})
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or (device.index or 0) >= available.get(device.type, 0):
        names = ", ".join(
            kind if kind == "cpu" else f"{kind}:{idx}" for kind, count in available.items() for idx in range(count)
        )
        raise ValueError(f"`device` {name!r} is not available here. Available: {names}.")
    return device


def with_pictures(pages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Pages with their images and videos decoded, each once.

    Raises:
        ValueError: one cannot be decoded, or is far too large.
        OSError: one cannot be read.
        ImportError: a video is to be decoded, and PyAV is not installed.
    """
    read, pictures = VtcImageProcessor().fetch_images, []
    for page in pages:
        if "video" in page:
            pictures.append(read_video(page["video"]))
            continue
        try:
            pictures.append(read(page["image"]))
        except (OSError, ValueError) as error:
            suffix = Path(page["image"]).suffix.lower()
            if suffix in _VIDEOS:
                raise ValueError(f"Image {page['image']!r} is a video. Give it as `video`.") from error
            if isinstance(error.__cause__, UnidentifiedImageError) and suffix in _UNREAD_FORMATS:
                raise ValueError(
                    f"Image {page['image']!r} is {_UNREAD_FORMATS[suffix]}, a format that is not read here. Convert "
                    "it to PNG or JPEG."
                ) from error
            raise
        # a bomb is none of these, and decoders report damage by exceptions of every kind
        except Exception as error:
            raise ValueError(f"Image {page['image']!r} cannot be read ({error}). Give another one.") from error
    return [{**page, "picture": picture} for page, picture in zip(pages, pictures)]


def can_meet(model: PreTrainedModel, processor: Any, page: Mapping[str, Any], budget: Budget) -> bool:
    """Whether a model has a count of visual tokens for this page within a budget; some methods have one count only."""
    prompt = Prompt(model, processor, page["picture"], page["questions"][0]["question"])
    try:
        prompt.count(budget)
    except ValueError:
        return False
    return True


def interview(
    model: PreTrainedModel,
    processor: Any,
    pages: Sequence[Mapping[str, Any]],
    budgets: Sequence[Budget],
    max_new_tokens: int,
    on_page: Callable[[int, str, list[dict[str, Any]]], None] | None = None,
) -> tuple[dict[str, Any], list[list[Image.Image]]]:
    """Ask everything about every page with every budget.

    Args:
        pages: of `with_pictures`.
        on_page: called with the number of pages that are done, the page's name and its answers.

    Returns:
        Facts, answers and their summary, ready for JSON; and for every page, per budget other than `"full"`, a
        picture of its first question, and of another one of which the model keeps another number of tokens.
    """
    results, pictures, model_name = [], [], Path(model.config.name_or_path).name
    for page in pages:
        picture, kind = page["picture"], "video" if "video" in page else "image"
        name = Path(page[kind]).name
        prompts = [Prompt(model, processor, picture, asked["question"]) for asked in page["questions"]]
        if not results:
            for budget in budgets:
                # the first run of each shape pays for what is set up once
                prompts[0].generate(budget, 1)
        answers = []
        for asked, prompt in zip(page["questions"], prompts):
            runs = [prompt.answer(budget, max_new_tokens) for budget in budgets]
            answers.append(marked({kind: page[kind], **asked, "runs": runs}))
        results += answers
        pictures.append(_pictures(prompts, answers, f"{model_name}, {name}"))
        if on_page is not None:
            on_page(len(pictures), name, answers)
    content = {
        "model": model.config.name_or_path,
        "num_parameters": model.num_parameters(),
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "max_new_tokens": max_new_tokens,
        "results": results,
        "summary": [summary(results, run_idx) for run_idx in range(len(budgets))],
    }
    return content, pictures


def _pictures(prompts: Sequence[Prompt], answers: Sequence[Mapping[str, Any]], name: str) -> list[Image.Image]:
    """One page, a picture per compressing budget; two where what is kept depends on the question."""
    drawn = []
    for run_idx, first in enumerate(answers[0]["runs"]):
        if first["budget"] == "full":
            continue
        others = (idx for idx, each in enumerate(answers) if each["runs"][run_idx]["num_kept"] != first["num_kept"])
        for idx in (0, *itertools.islice(others, 1)):
            run = answers[idx]["runs"][run_idx]
            mark = {True: ", right", False: f", expected {answers[idx].get('answer')}", None: ""}[run["correct"]]
            caption = [f"Question: {answers[idx]['question']}", f"Answer: {run['answer']}{mark}"]
            drawn.append(prompts[idx].overlay(run["budget"], f"{name}, budget {run['budget']}", caption))
    return drawn


def marked(result: dict[str, Any]) -> dict[str, Any]:
    """A question with, for each run, whether its answer is the expected one; None where none is known."""
    expected = result.get("answer")
    for run in result["runs"]:
        run["correct"] = None if expected is None else run["answer"].casefold() == expected.casefold()
    return result


def summary(results: Sequence[Mapping[str, Any]], run_idx: int) -> dict[str, Any]:
    """One run of all questions: right answers, visual tokens, median time."""
    runs = [result["runs"][run_idx] for result in results]
    marks = [run["correct"] for run in runs if run["correct"] is not None]
    reserved, kept = (sum(run[name] for run in runs) for name in ("num_reserved", "num_kept"))
    return {
        "budget": runs[0]["budget"],
        "num_correct": sum(marks) if marks else None,
        "num_marked": len(marks),
        "num_reserved": reserved,
        "num_kept": kept,
        "compression_ratio": reserved / kept,
        "ttft_ms": statistics.median(run["ttft_ms"] for run in runs),
    }
