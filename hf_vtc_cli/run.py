"""`hf-vtc run`: questions about images and videos, uncompressed and compressed."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from .options import (
    BudgetOption,
    DebugOption,
    DeviceOption,
    DtypeOption,
    ImagesOption,
    JsonOption,
    ModelOption,
    ProgressBar,
    QuestionOption,
    VideosOption,
    check_dtype,
    parse_budget,
    print_json,
    require_writable_picture,
    status,
)
from .package import NOTE_ON_TINY_MODELS, checkpoint_path, is_shipped, pages_of, shipped_models


def run(
    image: ImagesOption = None,
    video: VideosOption = None,
    question: QuestionOption = None,
    model: ModelOption = None,
    compare: Annotated[bool, typer.Option("--all", help="Every shipped model side by side.")] = False,
    budget: BudgetOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 32,
    save: Annotated[Path, typer.Option(metavar="PNG", help="Picture of what was kept.")] = Path("vtc_run.png"),
    gain: Annotated[
        bool,
        typer.Option(help="Measure what the method gains here at a size where tokens cost, if the model is tiny."),
    ] = True,
    json_output: JsonOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    debug: DebugOption = False,
) -> None:
    """Answer questions about images and videos, uncompressed and compressed, draw what was kept, and measure the gain.

    Without options: questions about pages of real handwriting, answered by the checkpoint that comes with hf_vtc, with
    budget auto and, where the method can, 0.5.
    """
    chosen = parse_budget(budget)
    check_dtype(dtype)
    require_writable_picture(save)
    if compare and model is not None:
        raise ValueError("Give `--all` or `--model`, not both: `--all` runs the models that come with hf_vtc.")
    paths = shipped_models() if compare else [checkpoint_path(model)]
    pages = pages_of(image, question, video)

    from hf_vtc.plot import stack

    from . import tables
    from .answers import find_device, with_pictures

    # what is found out in a moment, before what takes minutes
    find_device(device)
    pages = with_pictures(pages)
    loaded, contents, pictures = None, [], [[] for _ in pages]
    for path in paths:
        loaded, content, drawn = _asked(
            path, pages, chosen, compare, max_new_tokens, device, dtype, quiet=json_output or compare
        )
        contents.append({**content, "picture": str(save)})
        for row, page_pictures in zip(pictures, drawn):
            row += page_pictures

    stack(pictures).save(save)
    console = Console(quiet=json_output)
    for table in tables.closing_tables(contents, compare):
        console.print(table)
    console.print(Text(f"What was kept: {save}"))
    measured, reason = _gain_or_reason(loaded, gain, compare)
    notes = [NOTE_ON_TINY_MODELS] if (image or video) and any(map(is_shipped, paths)) else []
    notes += [reason] if reason else []
    for line in [*(tables.gain_lines(measured) if measured else ()), *map(Text, notes)]:
        console.print(line)
    if json_output:
        extra = {"gain": None if measured is None else measured.to_dict(), "notes": notes}
        print_json({"picture": str(save), "models": contents, **extra} if compare else {**contents[0], **extra})


def _asked(
    path: str,
    pages: list[dict[str, Any]],
    chosen: str | int | float | None,
    compare: bool,
    max_new_tokens: int,
    device: str | None,
    dtype: str | None,
    quiet: bool,
) -> tuple[Any, dict[str, Any], list[list[Any]]]:
    """A model, and what it says of every page, in data and in pictures; each page is printed once it is done."""
    from hf_vtc.models.video_processing_vtc import VideoSettings

    from . import tables
    from .answers import interview, load, working_with

    with status(f"Loading {path} ..."):
        loaded = load(path, device, dtype)
    video = loaded[1].video
    if video is not None and VideoSettings.from_dict(video).as_tiles and any("video" in page for page in pages):
        raise ValueError(
            f"{path} shows frames of a video as tiles, of which what is kept cannot be drawn. `hf-vtc eval` and "
            "`hf-vtc bench` take such videos."
        )
    with working_with(path), ProgressBar(f"Asking {Path(path).name}, by page", len(pages)) as bar:

        def on_page(num_done: int, name: str, answers: list[dict[str, Any]]) -> None:
            bar.move(num_done)
            if not quiet:
                bar.print(tables.page_table(name, answers))

        budgets = _budgets(chosen, compare, loaded, pages[0])
        content, drawn = interview(*loaded, pages, budgets, max_new_tokens, on_page)
    return loaded[0], content, drawn


def _gain_or_reason(model: Any, wanted: bool, compare: bool) -> tuple[Any, str]:
    """What a tiny model's method gains at a size where tokens cost, or why that is not measured."""
    from hf_vtc.report import measure_gain, shape_of_gain

    from .tables import is_small

    if not wanted or not is_small(model.num_parameters()):
        # not asked for, or to be seen in the table above
        return None, ""
    if compare:
        return None, "`hf-vtc run --model FOLDER` measures what one method gains here at a size where tokens cost."
    shape = shape_of_gain(model)
    if shape is None:
        return None, (
            "No gain is measured for this method: an image has one count of visual tokens, or its record names no "
            "shape `100m`. `hf-vtc estimate` counts what models of every shape cost."
        )
    with ProgressBar(f"Measuring {shape}, in rounds", 2) as bar:
        return measure_gain(shape, model.device, model.dtype, on_round=bar.move), ""


def _budgets(
    chosen: str | int | float | None, compare: bool, loaded: tuple[Any, Any], page: dict[str, Any]
) -> list[str | int | float]:
    """What every question is asked with: uncompressed first, in a comparison one budget beside it."""
    from .answers import can_meet

    if compare:
        return ["full", "auto" if chosen in (None, "full") else chosen]
    if chosen is None:
        return ["full", "auto", *([0.5] if can_meet(*loaded, page, 0.5) else [])]
    return list(dict.fromkeys(["full", "auto", chosen]))
