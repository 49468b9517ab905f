"""`hf-vtc`: see what compression does, convert and export checkpoints, estimate and measure what is saved."""

import functools
import io
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from transformers import PreTrainedModel, ProcessorMixin

# what users can cause ends in one line and this status, anything else in a traceback
_BAD_INPUT = 2
_INPUT_ERRORS = (ValueError, OSError, ImportError, RuntimeError)
_ROOT = Path(__file__).resolve().parents[1]
_SHIPPED_MODEL = _ROOT / "model_cards" / "vico-tiny"
_SHIPPED_PAGES = _ROOT / "examples" / "images" / "pages.json"
_QUESTION = "Describe the image."
_DTYPES = ("auto", "float32", "bfloat16", "float16")
# parameters below which a first token costs about the same however many tokens there are
_SMALL_MODEL = 50e6
# pixels of the longer side of an image in the picture of what was kept
_PICTURE_SIDE = 448
# first tokens are timed this often, unless one alone takes longer than a second
_FIRST_TOKEN_RUNS = 3

app = typer.Typer(
    name="hf-vtc",
    help="Vision-token compression for transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_Model = Annotated[
    str | None, typer.Option("--model", metavar="PATH_OR_ID", help="Model of hf_vtc. Default: the shipped vico-tiny.")
]
_Images = Annotated[
    list[str] | None,
    typer.Option("--image", metavar="PATH_OR_URL", help="Image, may be repeated. Default: the shipped pages."),
]
_Question = Annotated[str | None, typer.Option("--question", help="Asked about every image.")]
_BudgetText = Annotated[
    str, typer.Option("--budget", help="Share of visual tokens (0.5), tokens per image (256), auto, or full.")
]
_Device = Annotated[str | None, typer.Option("--device", help="Such as cpu or cuda:0. Default: the fastest here.")]
_Dtype = Annotated[
    str | None, typer.Option("--dtype", help=f"One of {', '.join(_DTYPES)}. Default: float32 on CPU, else as stored.")
]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on standard output.")]
_Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and the warnings of transformers.")]
_Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing model folder.")]


def _reporting_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turn errors that users can cause into one line on standard error and exit status 2, unless with `--debug`."""

    @functools.wraps(command)
    def wrapper(*args: Any, debug: bool, **kwargs: Any) -> None:
        if not debug:
            _silence_transformers()
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                # an answer may hold characters that this terminal lacks
                stream.reconfigure(errors="replace")
        try:
            command(*args, debug=debug, **kwargs)
        except BrokenPipeError:
            # who reads has seen enough; click ends the process quietly
            raise
        except _INPUT_ERRORS as error:
            if debug:
                raise
            message = " ".join(str(error).split()) or type(error).__name__
            typer.echo(f"Error: {message}", err=True)
            raise typer.Exit(_BAD_INPUT) from None

    return wrapper


def _silence_transformers() -> None:
    """Keep warnings about loading and generation out of the way of a table; errors are raised, not logged."""
    from transformers.utils import logging

    logging.set_verbosity_error()


@app.command()
@_reporting_errors
def run(
    image: _Images = None,
    question: _Question = None,
    model: _Model = None,
    budget: _BudgetText = "0.5",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 32,
    save: Annotated[Path, typer.Option(metavar="PNG", help="Picture of what was kept.")] = Path("vtc_run.png"),
    json_output: _Json = False,
    device: _Device = None,
    dtype: _Dtype = None,
    debug: _Debug = False,
) -> None:
    """Answer questions about images, uncompressed and compressed, and draw what was kept.

    Without options: questions about pages of real handwriting, answered by the checkpoint that comes with hf_vtc.
    """
    budgets = list(dict.fromkeys(["full", "auto", _parse_budget(budget)]))
    _require_writable_picture(save)
    pages = _pages(image, question)
    with _status("Loading the model ..."):
        loaded, processor = _load(model, device, dtype)
    results, pictures = [], []
    for page_idx, page in enumerate(pages):
        with _status(f"Page {page_idx + 1} of {len(pages)} ..."):
            picture = processor.image_processor.fetch_images(page.image)
            prompts = [_Prompt(loaded, processor, picture, asked["question"]) for asked in page.questions]
            if page_idx == 0:
                for entry in budgets:
                    # the first run of each shape pays for what is set up once
                    prompts[0].first_token_seconds(entry)
            answers = [
                {"image": page.image, **asked, "runs": [prompt.answer(entry, max_new_tokens) for entry in budgets]}
                for asked, prompt in zip(page.questions, prompts)
            ]
            name = Path(page.image).name
            pictures.append([prompts[0].overlay(entry, name) for entry in budgets if entry != "full"])
        for answer in answers:
            _mark(answer)
        results += answers
        if not json_output:
            Console().print(_page_table(name, answers))

    from .plot import stack

    stack(pictures).save(save)
    content = {
        "model": loaded.config.name_or_path,
        "num_parameters": loaded.num_parameters(),
        "device": str(loaded.device),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "max_new_tokens": max_new_tokens,
        "picture": str(save),
        "results": results,
        "summary": [_summary(results, run_idx) for run_idx in range(len(budgets))],
    }
    if json_output:
        _print_json(content)
        return
    console = Console()
    console.print(_summary_table(content))
    console.print(Text(f"What was kept: {save}"))


@app.command()
@_reporting_errors
def convert(
    src: Annotated[str, typer.Argument(metavar="SRC", help="Official checkpoint: a folder, or an id of the Hub.")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write.")],
    method: Annotated[str | None, typer.Option(help="Such as vico; needed only where several fit.")] = None,
    image_token_id: Annotated[int | None, typer.Option(help="Placeholder, where SRC has no tokenizer.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Such as bfloat16. Default: as stored.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file, which bounds the memory too.")] = "2GB",
    code: Annotated[bool, typer.Option(help="Copy the code beside the weights, for trust_remote_code.")] = True,
    overwrite: _Overwrite = False,
    debug: _Debug = False,
) -> None:
    """Convert a published checkpoint to a folder that from_pretrained loads."""
    from .convert import convert as convert_folder

    with _status(f"Converting {src} ..."):
        report = convert_folder(
            src,
            dst,
            method,
            image_token_id=image_token_id,
            dtype=dtype,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            save_code=code,
        )
    typer.echo(report.summary())


@app.command()
@_reporting_errors
def export(
    src: Annotated[str, typer.Argument(metavar="SRC", help="Model of hf_vtc: a folder, or an id of the Hub.")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write.")],
    check: Annotated[bool, typer.Option(help="Prove in a new process that the folder works without hf_vtc.")] = True,
    overwrite: _Overwrite = False,
    debug: _Debug = False,
) -> None:
    """Write a self-contained folder: weights, processor, card, and the code that they need."""
    from .hub import export as export_folder

    path = _checkpoint_path(src)
    # before anything is loaded or written
    _config_of(path)
    with _status(f"Exporting {src} ..."):
        folder = export_folder(path, dst, check=check, overwrite=overwrite)
    proof = "proven in a process without hf_vtc" if check else "not checked"
    typer.echo(f"{folder} ({proof})")


@app.command()
@_reporting_errors
def estimate(
    source: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Folder or id; only its config is read. Default: vico-tiny.")
    ] = None,
    image_size: Annotated[str, typer.Option(metavar="HxW", help="Height and width in pixels.")] = "896x1344",
    num_tiles: Annotated[int | None, typer.Option(min=1, help="Tiles, instead of --image-size.")] = None,
    text_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt that are not visual.")] = 64,
    budget: _BudgetText = "0.5",
    batch_size: Annotated[int, typer.Option(min=1)] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answer.")] = 32,
    json_output: _Json = False,
    debug: _Debug = False,
) -> None:
    """Say what compression can save at best: tokens, memory, arithmetic, time."""
    parsed = _parse_budget(budget)
    size = re.fullmatch(r"(\d+)\s*[xX,]\s*(\d+)", image_size.strip())
    if size is None:
        raise ValueError(f"`--image-size` must be height x width in pixels, such as 896x1344, got {image_size!r}.")

    from .report import estimate as estimate_costs

    config, image_processor = _config_and_tiling(source)
    result = estimate_costs(
        config,
        (int(size[1]), int(size[2])),
        text_tokens,
        parsed,
        batch_size,
        max_new_tokens,
        num_tiles=num_tiles,
        image_processor=image_processor,
    )
    if json_output:
        _print_json(result.to_dict())
    else:
        Console().print(result)


@app.command()
@_reporting_errors
def bench(
    image: _Images = None,
    question: _Question = None,
    model: _Model = None,
    budget: _BudgetText = "0.5",
    batch_size: Annotated[int, typer.Option(min=1, help="The same prompt this many times.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Measured rounds.")] = 10,
    warmup: Annotated[int, typer.Option(min=0, help="Rounds that are not counted.")] = 2,
    json_output: _Json = False,
    device: _Device = None,
    dtype: _Dtype = None,
    debug: _Debug = False,
) -> None:
    """Measure the time to the first token, beside what was possible. Several images form one prompt."""
    parsed = _parse_budget(budget)
    pages = _pages(image, question)
    pages = pages if image else pages[:1]
    with _status("Loading the model ..."):
        loaded, processor = _load(model, device, dtype)

    from .report import bench as measure

    pictures = [processor.image_processor.fetch_images(page.image) for page in pages]
    inputs = _inputs(processor, pictures, pages[0].questions[0]["question"], batch_size)
    with _status(f"Measuring {warmup + repeats} rounds ..."):
        result = measure(loaded, inputs, parsed, repeats, warmup)
    if json_output:
        _print_json(result.to_dict())
    else:
        Console().print(result)


@dataclass
class _Page:
    """An image and what is asked about it; each question has "question" and may have "answer" and "kind"."""

    image: str
    questions: list[dict[str, str]]


def _pages(images: Sequence[str] | None, question: str | None) -> list[_Page]:
    """The images of the command line with its question, or the shipped pages with theirs."""
    if images:
        return [_Page(image, [{"question": question or _QUESTION}]) for image in images]
    if not _SHIPPED_PAGES.is_file():
        raise FileNotFoundError(
            f"The pages that come with hf_vtc are not here ({_SHIPPED_PAGES}). Name a picture with --image, or "
            "install hf_vtc from a clone of its repository: pip install -e ."
        )
    entries = json.loads(_SHIPPED_PAGES.read_text(encoding="utf-8"))
    folder = _SHIPPED_PAGES.parent
    return [
        _Page(str(folder / entry["image"]), [{"question": question}] if question else entry["questions"])
        for entry in entries
    ]


def _parse_budget(text: str) -> str | int | float:
    from .models.budget_vtc import budgets_per_image

    try:
        value = text if text in ("auto", "full") else int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)
    except ValueError:
        # left as text, which the check below refuses in full words
        value = text
    if isinstance(value, int) and value < 1:
        raise ValueError(f"`--budget` in tokens per image must be at least 1, got {value}.")
    (checked,) = budgets_per_image(value, 1)
    return checked


def _require_writable_picture(path: Path) -> None:
    from PIL import Image

    if path.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"`--save` needs the name of a picture, such as vtc_run.png, got {str(path)!r}.")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"`--save`: the folder {path.absolute().parent} does not exist. Make it first.")


def _load(name: str | None, device: str | None, dtype: str | None) -> tuple["PreTrainedModel", "ProcessorMixin"]:
    """Model in eval mode on its device, and processor."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    place = _torch_device(device)
    if dtype is None:
        # 16-bit arithmetic is slow or inexact on most CPUs
        dtype = "float32" if place.type == "cpu" else "auto"
    if dtype not in _DTYPES:
        raise ValueError(f"`--dtype` must be one of {', '.join(_DTYPES)}, got {dtype!r}.")
    path = _checkpoint_path(name)
    config = _config_of(path)
    if isinstance(config, dict) or not config.model_type.startswith("vtc_"):
        raise ValueError(
            f"{path} is no model of hf_vtc. Convert it first: hf-vtc convert {path} FOLDER, then use --model FOLDER."
        )
    if Path(path).is_dir():
        # a download is worth a progress bar, reading a file is not
        from transformers.utils import logging

        logging.disable_progress_bar()
    processor = AutoProcessor.from_pretrained(path)
    torch_dtype = "auto" if dtype == "auto" else getattr(torch, dtype)
    loaded = AutoModelForImageTextToText.from_pretrained(path, dtype=torch_dtype)
    return loaded.to(place).eval(), processor


def _torch_device(name: str | None) -> "torch.device":
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    if name is None:
        return found or torch.device("cpu")
    device = torch.device(name)
    if device.type not in ("cpu", found.type if found else "cpu"):
        available = "cpu" if found is None else f"cpu, {found.type}"
        raise ValueError(f"`--device {name}` is not available here. Available: {available}.")
    return device


def _checkpoint_path(name: str | None) -> str:
    """The folder or repository of a model; the shipped checkpoint by default."""
    if name is None:
        if not (_SHIPPED_MODEL / "config.json").is_file():
            raise FileNotFoundError(
                f"The checkpoint that comes with hf_vtc is not here ({_SHIPPED_MODEL}). Name a model with --model, or "
                "install hf_vtc from a clone of its repository: pip install -e ."
            )
        return str(_SHIPPED_MODEL)
    folder = Path(name).expanduser()
    if folder.is_dir() or re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith("."):
        return str(folder) if folder.is_dir() else name
    raise FileNotFoundError(f"{name!r} is neither a folder nor owner/name of a repository on the Hub. Check the path.")


def _config_of(path: str) -> Any:
    """The config of a checkpoint; a dictionary where transformers does not know its type."""
    from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

    reason = "the folder has none"
    try:
        content, _ = PretrainedConfig.get_config_dict(path)
    except OSError as error:
        content, reason = {}, str(error)
    if "model_type" not in content:
        raise FileNotFoundError(f"No config.json of a model can be read from {path} ({reason}). Check the path or id.")
    return AutoConfig.from_pretrained(path) if content.get("model_type") in CONFIG_MAPPING else content


def _config_and_tiling(source: str | None) -> tuple[Any, Any]:
    """Config of a checkpoint, and its image processor if it is a model of hf_vtc."""
    path = _checkpoint_path(source)
    config = _config_of(path)
    if isinstance(config, dict) or not config.model_type.startswith("vtc_"):
        return config, None
    from transformers import AutoProcessor

    return config, AutoProcessor.from_pretrained(path).image_processor


def _inputs(processor: Any, pictures: Sequence["Image.Image"], question: str, batch_size: int = 1) -> Any:
    """Model inputs of one question about some images."""
    content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return processor(images=[list(pictures)] * batch_size, text=[text] * batch_size, return_tensors="pt")


class _Prompt:
    """One question about one image, ready to be asked with several budgets."""

    def __init__(self, model: "PreTrainedModel", processor: Any, picture: "Image.Image", question: str):
        self.model, self.processor, self.picture = model, processor, picture
        self.inputs = _inputs(processor, [picture], question).to(model.device)
        self.num_reserved = int((self.inputs["input_ids"] == model.config.image_token_id).sum())

    def _generate(self, budget: Any, max_new_tokens: int) -> tuple["torch.Tensor", float]:
        """New tokens, and seconds from the call to the first of them."""
        clock = _FirstTokenClock()
        start = time.perf_counter()
        out = self.model.generate(
            **self.inputs, vtc_budget=budget, max_new_tokens=max_new_tokens, do_sample=False, streamer=clock
        )
        return out[0, self.inputs["input_ids"].shape[1] :], clock.first_token - start

    def first_token_seconds(self, budget: Any) -> float:
        return self._generate(budget, 1)[1]

    def answer(self, budget: Any, max_new_tokens: int) -> dict[str, Any]:
        """Answer, visual tokens, and median time to the first token without loading and tiling the image."""
        tokens, first = self._generate(budget, max_new_tokens)
        seconds = [first]
        while len(seconds) < _FIRST_TOKEN_RUNS and first < 1:
            seconds.append(self.first_token_seconds(budget))
        kept = int(self.model.count_visual_tokens(**self.inputs, vtc_budget=budget).sum())
        return {
            "budget": budget,
            "answer": self.processor.decode(tokens, skip_special_tokens=True).strip(),
            "num_reserved": self.num_reserved,
            "num_kept": kept,
            "compression_ratio": self.num_reserved / kept,
            "ttft_ms": 1e3 * statistics.median(seconds),
        }

    def overlay(self, budget: Any, name: str) -> "Image.Image":
        import torch

        from .plot import overlay

        with torch.no_grad():
            output = self.model(**self.inputs, vtc_budget=budget, logits_to_keep=1)
        title = f"{name}, budget {budget}"
        return overlay(self.picture, output, self.processor, title=title, max_side=_PICTURE_SIDE)


class _FirstTokenClock:
    """A streamer that notes when the first new token reached the host; `generate` streams the prompt before it."""

    def __init__(self) -> None:
        self.num_calls, self.first_token = 0, 0.0

    def put(self, value: Any) -> None:
        self.num_calls += 1
        if self.num_calls == 2:
            self.first_token = time.perf_counter()

    def end(self) -> None:
        return None


def _mark(answer: dict[str, Any]) -> None:
    """Say for each run whether its answer is the expected one, where there is one."""
    for attempt in answer["runs"]:
        expected = answer.get("answer")
        attempt["correct"] = None if expected is None else attempt["answer"].casefold() == expected.casefold()


def _summary(results: Sequence[dict[str, Any]], run_idx: int) -> dict[str, Any]:
    attempts = [result["runs"][run_idx] for result in results]
    marks = [attempt["correct"] for attempt in attempts if attempt["correct"] is not None]
    reserved, kept = (sum(attempt[name] for attempt in attempts) for name in ("num_reserved", "num_kept"))
    return {
        "budget": attempts[0]["budget"],
        "num_correct": sum(marks) if marks else None,
        "num_marked": len(marks),
        "num_reserved": reserved,
        "num_kept": kept,
        "compression_ratio": reserved / kept,
        "ttft_ms": statistics.median(attempt["ttft_ms"] for attempt in attempts),
    }


def _page_table(name: str, answers: Sequence[dict[str, Any]]) -> Group:
    table = Table()
    table.add_column("question", max_width=32)
    for heading in ("budget", "answer"):
        table.add_column(heading)
    for heading in ("tokens kept", "ratio", "first token"):
        table.add_column(heading, justify="right", no_wrap=True)
    for answer in answers:
        expected = f"\n({answer['answer']})" if "answer" in answer else ""
        question = Text(answer["question"]).append(expected, style="dim")
        for run_idx, attempt in enumerate(answer["runs"]):
            style = {True: "green", False: "red", None: ""}[attempt["correct"]]
            mark = {True: " ✓", False: " ✗", None: ""}[attempt["correct"]]
            table.add_row(
                question if run_idx == 0 else "",
                str(attempt["budget"]),
                Text(attempt["answer"] + mark, style=style),
                *_token_cells(attempt),
                end_section=run_idx == len(answer["runs"]) - 1,
            )
    return Group(Text(name, style="bold"), table)


def _summary_table(content: dict[str, Any]) -> Group:
    title = f"All questions, {Path(content['model']).name} on {content['device']} in {content['dtype']}"
    note = "First token: median, from pixels to token, without loading and tiling of images."
    if content["num_parameters"] < _SMALL_MODEL:
        note += (
            f" A model of {content['num_parameters'] / 1e6:.1f} M parameters spends it on fixed costs, not on tokens: "
            "`hf-vtc estimate` says what larger ones gain."
        )
    table = Table()
    table.add_column("budget")
    for heading in ("right answers", "tokens kept", "ratio", "first token"):
        table.add_column(heading, justify="right", no_wrap=True)
    for line in content["summary"]:
        right = "" if line["num_correct"] is None else f"{line['num_correct']} of {line['num_marked']}"
        table.add_row(str(line["budget"]), right, *_token_cells(line))
    return Group(Text(title, style="bold"), table, Text(note))


def _token_cells(line: dict[str, Any]) -> tuple[str, str, str]:
    tokens = f"{line['num_kept']} of {line['num_reserved']}"
    return tokens, f"{line['compression_ratio']:.2f}", f"{line['ttft_ms']:.1f} ms"


def _status(message: str) -> Any:
    # on standard error, and only where someone watches
    return Console(stderr=True).status(message)


def _print_json(content: dict[str, Any]) -> None:
    # escaped, since standard output may be unable to hold every character
    sys.stdout.write(json.dumps(content, indent=2) + "\n")
