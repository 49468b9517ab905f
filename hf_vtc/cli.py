"""`hf-vtc`: see what compression does, convert, export and push checkpoints, estimate and measure what is saved.

Commands check their arguments before they import what they run, since that loads torch; `hf_vtc_cli.py` starts this
file.
"""

import functools
import importlib.util
import io
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

# what users can cause ends in one line and this status, anything else in a traceback
_BAD_INPUT = 2
_INPUT_ERRORS = (ValueError, OSError, ImportError, RuntimeError)
_PACKAGE = Path(__file__).resolve().parent
# a wheel carries copies inside of the package (setup.py); in a clone the originals are beside it
_SHIPPED = _PACKAGE / "_shipped" if (_PACKAGE / "_shipped").is_dir() else _PACKAGE.parent
_SHIPPED_MODELS = _SHIPPED / "model_cards"
_DEFAULT_MODEL = "vico-tiny"
_SHIPPED_PAGES = _SHIPPED / "examples" / "images" / "pages.json"
_QUESTION = "Describe the image."
_DTYPES = ("auto", "float32", "bfloat16", "float16")
_CLONE = "install hf_vtc from a clone of its repository: pip install -e ."

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
    str | None,
    typer.Option("--budget", help="Share of visual tokens (0.5), tokens per image (256), auto, or full."),
]
_Device = Annotated[str | None, typer.Option("--device", help="Such as cpu or cuda:0. Default: the fastest here.")]
_Dtype = Annotated[
    str | None, typer.Option("--dtype", help=f"One of {', '.join(_DTYPES)}. Default: float32 on CPU, else as stored.")
]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on standard output.")]
_Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and the warnings of transformers.")]
_Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing model folder.")]
_Check = Annotated[bool, typer.Option(help="Prove in a new process that the folder works without hf_vtc.")]
_BaseModel = Annotated[
    str | None, typer.Option("--base-model", metavar="ID", help="Repository that the weights come from, for the card.")
]
_License = Annotated[
    str | None, typer.Option("--license", metavar="ID", help="Licence of the weights as the Hub spells it.")
]
_MaxShardSize = Annotated[str, typer.Option("--max-shard-size", help="Largest file of weights.")]


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
        except Exception as error:
            note = _note_on_newer_host(error)
            if debug or not (note or isinstance(error, _INPUT_ERRORS)):
                raise
            message = " ".join(str(error).split()) or type(error).__name__
            if not isinstance(error, _INPUT_ERRORS):
                message = f"{type(error).__name__}: {message}"
            typer.echo(f"Error: {message}" + (f" ({note})" if note else ""), err=True)
            raise typer.Exit(_BAD_INPUT) from None

    return wrapper


def _note_on_newer_host(error: Exception) -> str | None:
    """The remedy, if transformers is newer than what was proven and `error` may come of that, else None."""
    host = sys.modules.get("transformers")
    note = _module_alone("models/window_vtc.py").note_on_newer(host.__version__) if host else None
    if isinstance(error, ImportError):
        from_host = (error.name or "").split(".")[0] == "transformers"
    elif isinstance(error, _INPUT_ERRORS):
        # a missing file is reported by the host on behalf of whoever named it
        modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
        from_host = not isinstance(error, OSError) and modules[-1].split(".")[0] == "transformers"
    else:
        from_host = True
    return note if from_host else None


def _module_alone(path: str) -> ModuleType:
    """A file of the package as a module by itself; the package would load torch."""
    file = _PACKAGE / path
    spec = importlib.util.spec_from_file_location(f"_hf_vtc_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _print_version(wanted: bool) -> None:
    if wanted:
        window = _module_alone("models/window_vtc.py")
        proven = f"proven on transformers {window.OLDEST_PROVEN} to {window.NEWEST_PROVEN}"
        typer.echo(f"hf_vtc {_module_alone('version.py').__version__}, {proven}")
        raise typer.Exit()


# the help of all commands is that of `app`, so this function has no docstring
@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def _silence_transformers() -> None:
    """Keep warnings about loading and generation out of the way of a table; errors are raised, not logged."""
    if "transformers" in sys.modules:
        from transformers.utils import logging

        logging.set_verbosity_error()
    else:
        # read when it is imported, which takes seconds and may not be needed
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


@app.command()
@_reporting_errors
def run(
    image: _Images = None,
    question: _Question = None,
    model: _Model = None,
    compare: Annotated[bool, typer.Option("--all", help="Every shipped model side by side.")] = False,
    budget: _BudgetText = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 32,
    save: Annotated[Path, typer.Option(metavar="PNG", help="Picture of what was kept.")] = Path("vtc_run.png"),
    json_output: _Json = False,
    device: _Device = None,
    dtype: _Dtype = None,
    debug: _Debug = False,
) -> None:
    """Answer questions about images, uncompressed and compressed, and draw what was kept.

    Without options: questions about pages of real handwriting, answered by the checkpoint that comes with hf_vtc, with
    budget auto and, where the method can, 0.5.
    """
    chosen = _parse_budget(budget)
    _check_dtype(dtype)
    _require_writable_picture(save)
    if compare and model is not None:
        raise ValueError("Give `--all` or `--model`, not both: `--all` runs the models that come with hf_vtc.")
    paths = _shipped_models() if compare else [_checkpoint_path(model)]
    pages = _pages(image, question)

    from . import tables
    from .answers import can_meet, interview, load
    from .plot import stack

    console, contents, pictures = Console(), [], [[] for _ in pages]
    for path in paths:
        with _status(f"Loading {path} ..."):
            loaded = load(path, device, dtype)
        if compare:
            budgets = ["full", "auto" if chosen in (None, "full") else chosen]
        elif chosen is None:
            budgets = ["full", "auto", *([0.5] if can_meet(*loaded, pages[0], 0.5) else [])]
        else:
            budgets = list(dict.fromkeys(["full", "auto", chosen]))
        with _status(f"Page 1 of {len(pages)} ...") as status:

            def on_page(num_done: int, name: str, answers: list[dict[str, Any]], status: Any = status) -> None:
                status.update(f"Page {num_done + 1} of {len(pages)} ...")
                if not json_output and not compare:
                    console.print(tables.page_table(name, answers))

            content, drawn = interview(*loaded, pages, budgets, max_new_tokens, on_page)
        contents.append({**content, "picture": str(save)})
        for row, page_pictures in zip(pictures, drawn):
            row += page_pictures

    stack(pictures).save(save)
    if json_output:
        _print_json({"picture": str(save), "models": contents} if compare else contents[0])
        return
    if compare:
        console.print(tables.comparison_table(contents))
        console.print(tables.ranking_table(contents))
    else:
        console.print(tables.summary_table(contents[0]))
    console.print(Text(f"What was kept: {save}"))


@app.command()
@_reporting_errors
def convert(
    src: Annotated[str, typer.Argument(metavar="SRC", help="Official checkpoint: a folder, or an id of the Hub.")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write.")],
    method: Annotated[str | None, typer.Option(help="Such as vico; needed only where several fit.")] = None,
    image_token_id: Annotated[int | None, typer.Option(help="Placeholder, where SRC has no tokenizer.")] = None,
    vision_tower: Annotated[
        str | None,
        typer.Option(metavar="PATH_OR_ID", help="Folder or Hub id of the tower, if SRC names one that is not here."),
    ] = None,
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
            vision_tower=vision_tower,
        )
    typer.echo(report.summary())


@app.command()
@_reporting_errors
def export(
    src: Annotated[str, typer.Argument(metavar="SRC", help="Model of hf_vtc: a folder, or an id of the Hub.")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write.")],
    check: _Check = True,
    base_model: _BaseModel = None,
    license: _License = None,
    max_shard_size: _MaxShardSize = "5GB",
    overwrite: _Overwrite = False,
    debug: _Debug = False,
) -> None:
    """Write a self-contained folder: weights, processor, card, and the code that they need."""
    path = _checkpoint_path(src)

    from .answers import config_of
    from .hub import export as export_folder

    # before anything is loaded or written
    config_of(path)
    with _status(f"Exporting {src} ..."):
        folder = export_folder(
            path,
            dst,
            check=check,
            base_model=base_model,
            license=license,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
        )
    proof = "proven in a process without hf_vtc" if check else "not checked"
    typer.echo(f"{folder} ({proof})")


@app.command()
@_reporting_errors
def push(
    src: Annotated[str, typer.Argument(metavar="SRC", help="Model of hf_vtc: a folder, or an id of the Hub.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO", help="Repository on the Hub: name or owner/name.")],
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Visibility of a new repository; of an old one it stays.")
    ] = None,
    revision: Annotated[str | None, typer.Option(metavar="BRANCH", help="Branch, made if it does not exist.")] = None,
    message: Annotated[str, typer.Option(help="First line of the commit.")] = "Upload model, processor and code",
    check: _Check = True,
    base_model: _BaseModel = None,
    license: _License = None,
    max_shard_size: _MaxShardSize = "5GB",
    debug: _Debug = False,
) -> None:
    """Export and upload as one commit; prints the address of that commit. Needs `hf auth login` or HF_TOKEN."""
    path = _checkpoint_path(src)

    from .answers import config_of
    from .hub import push as push_folder

    # before anything is loaded or written
    config_of(path)
    with _status(f"Pushing {src} to {repo_id} ..."):
        address = push_folder(
            path,
            repo_id,
            private=private,
            revision=revision,
            commit_message=message,
            check=check,
            base_model=base_model,
            license=license,
            max_shard_size=max_shard_size,
        )
    typer.echo(address)


@app.command()
@_reporting_errors
def estimate(
    source: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Folder or id; only its config is read. Default: vico-tiny.")
    ] = None,
    image_size: Annotated[str, typer.Option(metavar="HxW", help="Height and width in pixels.")] = "896x1344",
    num_tiles: Annotated[int | None, typer.Option(min=1, help="Tiles, instead of --image-size.")] = None,
    text_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt that are not visual.")] = 64,
    budget: _BudgetText = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answer.")] = 32,
    json_output: _Json = False,
    debug: _Debug = False,
) -> None:
    """Say what compression can save at best: tokens, memory, arithmetic, time.

    Default budget: auto, or 0.5 where auto depends on the pixels.
    """
    chosen = _parse_budget(budget)
    size = re.fullmatch(r"(\d+)\s*[xX,]\s*(\d+)", image_size.strip())
    if size is None:
        raise ValueError(f"`--image-size` must be height x width in pixels, such as 896x1344, got {image_size!r}.")

    path = _checkpoint_path(source)

    from transformers import AutoProcessor

    from .answers import config_of, is_compressing
    from .report import default_budget
    from .report import estimate as estimate_costs

    config = config_of(path)
    image_processor = AutoProcessor.from_pretrained(path).image_processor if is_compressing(config) else None
    result = estimate_costs(
        config,
        (int(size[1]), int(size[2])),
        text_tokens,
        chosen or default_budget(config),
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
    budget: _BudgetText = None,
    batch_size: Annotated[int, typer.Option(min=1, help="The same prompt this many times.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Measured rounds.")] = 10,
    warmup: Annotated[int, typer.Option(min=0, help="Rounds that are not counted.")] = 2,
    json_output: _Json = False,
    device: _Device = None,
    dtype: _Dtype = None,
    debug: _Debug = False,
) -> None:
    """Measure the time to the first token, beside what was possible. Several images form one prompt.

    Default budget: auto, or 0.5 where auto depends on the pixels.
    """
    chosen = _parse_budget(budget)
    _check_dtype(dtype)
    path = _checkpoint_path(model)
    pages = _pages(image, question)
    pages = pages if image else pages[:1]

    from .answers import load, model_inputs
    from .report import bench as measure
    from .report import default_budget

    with _status("Loading the model ..."):
        loaded, processor = load(path, device, dtype)
    pictures = [processor.image_processor.fetch_images(page["image"]) for page in pages]
    inputs = model_inputs(processor, pictures, pages[0]["questions"][0]["question"], batch_size)
    with _status(f"Measuring {warmup + repeats} rounds ..."):
        result = measure(loaded, inputs, chosen or default_budget(loaded.config), repeats, warmup)
    if json_output:
        _print_json(result.to_dict())
    else:
        Console().print(result)


def _pages(images: Sequence[str] | None, question: str | None) -> list[dict[str, Any]]:
    """The images of the command line with its question, or the shipped pages with theirs."""
    if images:
        return [{"image": image, "questions": [{"question": question or _QUESTION}]} for image in images]
    if not _SHIPPED_PAGES.is_file():
        raise FileNotFoundError(
            f"The pages that come with hf_vtc are not here ({_SHIPPED_PAGES}). Name a picture with --image, or "
            f"{_CLONE}"
        )
    pages = json.loads(_SHIPPED_PAGES.read_text(encoding="utf-8"))
    for page in pages:
        page["image"] = str(_SHIPPED_PAGES.parent / page["image"])
        if question:
            page["questions"] = [{"question": question}]
    return pages


def _parse_budget(text: str | None) -> str | int | float | None:
    """A `vtc_budget` from its text; the rule of `budget_vtc.py`, which cannot be imported without torch."""
    if text in ("auto", "full", None):
        return text
    try:
        value = int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)
    except ValueError:
        value = None
    if value is None or not (value >= 1 if isinstance(value, int) else 0 < value <= 1):
        raise ValueError(
            "`--budget` must be auto, full, a share of the visual tokens above 0 and at most 1 with a point (0.5), or "
            f"a number of tokens per image of at least 1 without (256), got {text!r}."
        )
    return value


def _check_dtype(name: str | None) -> None:
    if name not in (None, *_DTYPES):
        raise ValueError(f"`--dtype` must be one of {', '.join(_DTYPES)}, got {name!r}.")


def _require_writable_picture(path: Path) -> None:
    from PIL import Image

    if path.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"`--save` needs the name of a picture, such as vtc_run.png, got {str(path)!r}.")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"`--save`: the folder {path.absolute().parent} does not exist. Make it first.")


def _checkpoint_path(name: str | None) -> str:
    """The folder or repository of a model; a shipped checkpoint by default."""
    if name is None:
        folder = _SHIPPED_MODELS / _DEFAULT_MODEL
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"The checkpoint that comes with hf_vtc is not here ({folder}). Name a model with --model, or {_CLONE}"
            )
        return str(folder)
    folder = Path(name).expanduser()
    if folder.is_dir() or re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith("."):
        return str(folder) if folder.is_dir() else name
    raise FileNotFoundError(f"{name!r} is neither a folder nor owner/name of a repository on the Hub. Check the path.")


def _shipped_models() -> list[str]:
    """Folders of the checkpoints that come with hf_vtc; their uncompressed base is none of them."""
    configs = sorted(_SHIPPED_MODELS.glob("*-tiny/config.json"))
    types = [json.loads(path.read_text(encoding="utf-8")).get("model_type", "") for path in configs]
    folders = [str(path.parent) for path, model_type in zip(configs, types) if model_type.startswith("vtc_")]
    if not folders:
        raise FileNotFoundError(
            f"The checkpoints that come with hf_vtc are not here ({_SHIPPED_MODELS}). Name a model with --model, or "
            f"{_CLONE}"
        )
    return folders


def _status(message: str) -> Any:
    # on standard error, and only where someone watches
    return Console(stderr=True).status(message)


def _print_json(content: dict[str, Any]) -> None:
    # escaped, since standard output may be unable to hold every character
    sys.stdout.write(json.dumps(content, indent=2) + "\n")
