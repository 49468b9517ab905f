"""`hf-vtc estimate`: what compression can save at best."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .options import BudgetOption, DebugOption, JsonOption, parse_budget, print_json
from .package import checkpoint_path

CARD_NAMES = ("h100", "a100", "l4", "rtx4090", "cpu")


def estimate(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL_OR_SHAPE", help="Folder or Hub id, of which only the config is read, or a shape."
        ),
    ] = None,
    shape: Annotated[
        str | None, typer.Option(metavar="NAME", help="Such as llava-1.5-7b or vico-8b; a wrong name lists all.")
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(metavar="NAME", help=f"One of {', '.join(CARD_NAMES)}; cpu measures this one. Default: h100."),
    ] = None,
    peak_flops: Annotated[float | None, typer.Option(help="Other hardware: FLOP/s of dense matrix products.")] = None,
    bandwidth: Annotated[float | None, typer.Option(help="Other hardware: bytes/s from its memory.")] = None,
    image_size: Annotated[
        str | None, typer.Option(metavar="HxW", help="Height and width in pixels. Default: 896x1344, or the shape's.")
    ] = None,
    num_tiles: Annotated[int | None, typer.Option(min=1, help="Tiles, instead of --image-size.")] = None,
    text_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt that are not visual.")] = 64,
    budget: BudgetOption = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answer.")] = 32,
    json_output: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Say what compression can save at best: tokens, memory, arithmetic, time. No weights are read.

    Default budget: auto, or 0.5 where auto depends on the pixels or keeps all although it need not.
    """
    chosen = parse_budget(budget)
    size = None if image_size is None else _parsed_size(image_size)
    _check_hardware(gpu, peak_flops, bandwidth)
    if source is not None and shape is not None:
        raise ValueError("Give MODEL_OR_SHAPE or `--shape`, not both.")
    name, path = _shape_or_path(source, shape)

    from hf_vtc.report import Hardware, default_budget
    from hf_vtc.report import estimate as estimate_costs

    from .answers import working_with

    config, image_processor, own_size = _of_shape(name) if path is None else _of_path(path)
    hardware = Hardware("other hardware", peak_flops, bandwidth) if peak_flops else gpu or "h100"
    with working_with(path or name):
        result = estimate_costs(
            config,
            size or own_size,
            text_tokens,
            chosen or default_budget(config),
            batch_size,
            max_new_tokens,
            num_tiles=num_tiles,
            image_processor=image_processor,
            hardware=hardware,
        )
    if json_output:
        print_json(result.to_dict())
    else:
        Console().print(result)


def _parsed_size(text: str) -> tuple[int, int]:
    size = re.fullmatch(r"(\d+)\s*[xX,]\s*(\d+)", text.strip(), flags=re.ASCII)
    if size is None or 0 in (int(size[1]), int(size[2])):
        raise ValueError(f"`--image-size` must be height x width in pixels, such as 896x1344, got {text!r}.")
    return int(size[1]), int(size[2])


def _check_hardware(gpu: str | None, peak_flops: float | None, bandwidth: float | None) -> None:
    if gpu is not None and gpu not in CARD_NAMES:
        raise ValueError(f"`--gpu` must be one of {', '.join(CARD_NAMES)}, got {gpu!r}.")
    if gpu is not None and (peak_flops, bandwidth) != (None, None):
        raise ValueError("Give `--gpu`, or `--peak-flops` and `--bandwidth` of other hardware, not both.")
    if (peak_flops is None) != (bandwidth is None):
        raise ValueError("`--peak-flops` and `--bandwidth` belong together. Give both, or a card by `--gpu`.")
    for name, value in (("--peak-flops", peak_flops), ("--bandwidth", bandwidth)):
        # a comparison that not-a-number fails too
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"`{name}` must be a number above 0, such as 3e12, got {value}.")


def _shape_or_path(source: str | None, shape: str | None) -> tuple[str | None, str | None]:
    """A shape's name or a path, the other one None. A folder is a folder, whatever it is called."""
    if shape is not None:
        return shape, None
    looks_like_a_path = source is None or "/" in source or source in (".", "..") or Path(source).is_dir()
    return (None, checkpoint_path(source)) if looks_like_a_path else (source, None)


def _of_shape(name: str) -> tuple[dict[str, Any], Any, tuple[int, int]]:
    from hf_vtc.report.shapes import config_of_shape, image_processor_of_shape, shape_names

    if name not in shape_names():
        raise ValueError(
            f"{name!r} is no folder, no owner/name of a repository on the Hub, and none of the shapes "
            f"{', '.join(shape_names())}."
        )
    config, shape = config_of_shape(name)
    return config, image_processor_of_shape(shape), shape.image_size


def _of_path(path: str) -> tuple[Any, Any, tuple[int, int]]:
    from hf_vtc.hub.source import load_processor
    from hf_vtc.report.analytic import IMAGE_SIZE

    from .answers import config_of, is_compressing

    config = config_of(path)
    # of a folder that holds a config alone, images are cut as its base cuts them
    alone = Path(path).is_dir() and not any(Path(path).glob("*processor_config.json"))
    image_processor = load_processor(path).image_processor if is_compressing(config) and not alone else None
    return config, image_processor, IMAGE_SIZE
