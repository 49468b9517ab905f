"""`hf-vtc estimate`: what compression can save at best."""

import re
from typing import Annotated

import typer
from rich.console import Console

from .options import BudgetOption, DebugOption, JsonOption, parse_budget, print_json
from .package import checkpoint_path


def estimate(
    source: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Folder or id; only its config is read. Default: vico-tiny.")
    ] = None,
    image_size: Annotated[str, typer.Option(metavar="HxW", help="Height and width in pixels.")] = "896x1344",
    num_tiles: Annotated[int | None, typer.Option(min=1, help="Tiles, instead of --image-size.")] = None,
    text_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt that are not visual.")] = 64,
    budget: BudgetOption = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answer.")] = 32,
    json_output: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Say what compression can save at best: tokens, memory, arithmetic, time.

    Default budget: auto, or 0.5 where auto depends on the pixels or keeps all although it need not.
    """
    chosen = parse_budget(budget)
    size = re.fullmatch(r"(\d+)\s*[xX,]\s*(\d+)", image_size.strip())
    if size is None:
        raise ValueError(f"`--image-size` must be height x width in pixels, such as 896x1344, got {image_size!r}.")

    path = checkpoint_path(source)

    from hf_vtc.hub.source import load_processor
    from hf_vtc.report import default_budget
    from hf_vtc.report import estimate as estimate_costs

    from .answers import config_of, is_compressing, working_with

    config = config_of(path)
    image_processor = load_processor(path).image_processor if is_compressing(config) else None
    with working_with(path):
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
        print_json(result.to_dict())
    else:
        Console().print(result)
