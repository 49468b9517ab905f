"""Options that several commands share, and what becomes of their text."""

import io
import json
import os
import re
import stat
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

DTYPES = ("auto", "float32", "bfloat16", "float16")

ModelOption = Annotated[
    str | None, typer.Option("--model", metavar="PATH_OR_ID", help="Model of hf_vtc. Default: the shipped vico-tiny.")
]
ImagesOption = Annotated[
    list[str] | None,
    typer.Option("--image", metavar="PATH_OR_URL", help="Image, may be repeated. Default: the shipped pages."),
]
VideosOption = Annotated[
    list[str] | None, typer.Option("--video", metavar="PATH", help="File of a video, may be repeated; needs PyAV.")
]
QuestionOption = Annotated[str | None, typer.Option("--question", help="Asked about every image and video.")]
BudgetOption = Annotated[
    str | None,
    typer.Option("--budget", help="Share of visual tokens (0.5 or 50%), tokens per image (256), auto, or full."),
]
BudgetsOption = Annotated[
    list[str] | None,
    typer.Option("--budget", help="Share (0.5 or 50%), tokens per image (256), auto, or full; may be repeated."),
]
DeviceOption = Annotated[str | None, typer.Option("--device", help="Such as cpu, cuda:0. Default: the fastest here.")]
DtypeOption = Annotated[
    str | None, typer.Option("--dtype", help=f"One of {', '.join(DTYPES)}. Default: float32 on CPU, else as stored.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on standard output.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show tracebacks and the warnings of transformers.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace an existing model folder.")]
CheckOption = Annotated[bool, typer.Option(help="Prove in a new process that the folder works without hf_vtc.")]
BaseModelOption = Annotated[
    str | None, typer.Option("--base-model", metavar="ID", help="Repository that the weights come from, for the card.")
]
LicenseOption = Annotated[
    str | None, typer.Option("--license", metavar="ID", help="Licence of the weights as the Hub spells it.")
]
KeepOption = Annotated[
    float | None, typer.Option(min=0, max=1, help="Share of the score that a budget must keep, such as 0.99.")
]
ToleranceOption = Annotated[
    float | None, typer.Option(min=0, max=1, help="Or by how much the score may fall. Default: 0.01, one point.")
]
MaxShardSizeOption = Annotated[str, typer.Option("--max-shard-size", help="Largest file of weights.")]


def parse_budget(text: str | None) -> str | int | float | None:
    """A `vtc_budget` from its text; the rule of the package, which cannot be imported without torch."""
    if text in ("auto", "full", None):
        return text
    try:
        if re.fullmatch(r"[+-]?\d+", text, flags=re.ASCII):
            value = int(text)
        else:
            value = float(text.removesuffix("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        value = None
    if value is None or not (value >= 1 if isinstance(value, int) else 0 < value <= 1):
        raise ValueError(
            "`--budget` must be auto, full, a share of the visual tokens above 0 and at most 1 with a point or in "
            f"percent (0.5, 50%), or a number of tokens per image of at least 1 without (256), got {text!r}."
        )
    return value


def parse_margin(keep: float | None, tolerance: float | None) -> float:
    """By how much a score may fall, as a share of it where `keep` is given."""
    if keep is not None and tolerance is not None:
        raise ValueError("Give `--keep` or `--tolerance`, not both: each says how much of the score may be lost.")
    if keep is not None:
        return round(1 - keep, 12)
    return 0.01 if tolerance is None else tolerance


def check_dtype(name: str | None) -> None:
    if name not in (None, *DTYPES):
        raise ValueError(f"`--dtype` must be one of {', '.join(DTYPES)}, got {name!r}.")


def require_writable_picture(path: Path) -> None:
    """Find out before the work that a picture cannot be written.

    Raises:
        ValueError: its name is that of no format that Pillow writes, or of something that is no ordinary file.
        OSError: the folder is missing, or may not be written to.
    """
    from PIL import Image

    kind = Image.registered_extensions().get(path.suffix.lower())
    try:
        # a pixel into memory: some formats can only be read, or hold no colours
        Image.new("RGB", (1, 1)).save(io.BytesIO(), kind)
    except (KeyError, OSError, ValueError, AttributeError):
        what = f"{path.suffix!r} is none" if path.suffix else "it has no ending"
        raise ValueError(
            f"`--save` needs the name of a picture in a format that Pillow writes, such as vtc_run.png; {what}, got "
            f"{str(path)!r}."
        ) from None
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"`--save`: the folder {path.absolute().parent} does not exist. Make it first.")
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"`--save`: {path} is there already and no ordinary file. Give another name.")
    try:
        if path.exists():
            with path.open("ab"):
                return
        with tempfile.NamedTemporaryFile(dir=path.absolute().parent):
            return
    except OSError as error:
        raise OSError(f"`--save`: {path} cannot be written ({error.strerror}). Give another place.") from error


def status(message: str) -> Any:
    """A line that shows what is going on: on standard error, and only where someone watches."""
    return Console(stderr=True).status(message)


class ProgressBar:
    """A bar of what is done: on standard error, and only where someone watches."""

    def __init__(self, message: str, total: int):
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task(message, total=total)

    def __enter__(self) -> "ProgressBar":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def move(self, num_done: int, total: int | None = None) -> None:
        """Say what is done and, where that has changed, of how many."""
        self._bar.update(self._task, completed=num_done, total=total)

    def print(self, what: Any) -> None:
        """Print on standard output; the bar, which may be on the same terminal, makes room meanwhile."""
        self._bar.stop()
        Console().print(what)
        self._bar.start()


def print_json(content: dict[str, Any]) -> None:
    # escaped, since standard output may be unable to hold every character
    sys.stdout.write(json.dumps(content, indent=2) + "\n")


def silence_transformers() -> None:
    """Keep warnings about loading and generation out of the way of a table; errors are raised, not logged."""
    if "transformers" in sys.modules:
        from transformers.utils import logging

        logging.set_verbosity_error()
    else:
        # read when it is imported, which takes seconds and may not be needed
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
