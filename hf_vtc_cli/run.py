"""`hf-vtc run`: questions about images, uncompressed and compressed."""

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
    QuestionOption,
    check_dtype,
    parse_budget,
    print_json,
    require_writable_picture,
    status,
)
from .package import checkpoint_path, pages_of, shipped_models


def run(
    image: ImagesOption = None,
    question: QuestionOption = None,
    model: ModelOption = None,
    compare: Annotated[bool, typer.Option("--all", help="Every shipped model side by side.")] = False,
    budget: BudgetOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 32,
    save: Annotated[Path, typer.Option(metavar="PNG", help="Picture of what was kept.")] = Path("vtc_run.png"),
    json_output: JsonOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    debug: DebugOption = False,
) -> None:
    """Answer questions about images, uncompressed and compressed, and draw what was kept.

    Without options: questions about pages of real handwriting, answered by the checkpoint that comes with hf_vtc, with
    budget auto and, where the method can, 0.5.
    """
    chosen = parse_budget(budget)
    check_dtype(dtype)
    require_writable_picture(save)
    if compare and model is not None:
        raise ValueError("Give `--all` or `--model`, not both: `--all` runs the models that come with hf_vtc.")
    paths = shipped_models() if compare else [checkpoint_path(model)]
    pages = pages_of(image, question)

    from hf_vtc.plot import stack

    from . import tables
    from .answers import find_device, interview, load, with_pictures, working_with

    # what is found out in a moment, before what takes minutes
    find_device(device)
    pages = with_pictures(pages)
    console, contents, pictures = Console(), [], [[] for _ in pages]
    for path in paths:
        with status(f"Loading {path} ..."):
            loaded = load(path, device, dtype)
        with working_with(path), status(f"Page 1 of {len(pages)} ...") as shown:
            budgets = _budgets(chosen, compare, loaded, pages[0])

            def on_page(num_done: int, name: str, answers: list[dict[str, Any]], shown: Any = shown) -> None:
                shown.update(f"Page {num_done + 1} of {len(pages)} ...")
                if not json_output and not compare:
                    console.print(tables.page_table(name, answers))

            content, drawn = interview(*loaded, pages, budgets, max_new_tokens, on_page)
        contents.append({**content, "picture": str(save)})
        for row, page_pictures in zip(pictures, drawn):
            row += page_pictures

    stack(pictures).save(save)
    if json_output:
        print_json({"picture": str(save), "models": contents} if compare else contents[0])
        return
    for table in tables.closing_tables(contents, compare):
        console.print(table)
    console.print(Text(f"What was kept: {save}"))


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
