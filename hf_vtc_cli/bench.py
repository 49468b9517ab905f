"""`hf-vtc bench`: the time to the first token, measured."""

from typing import Annotated, Any

import typer
from rich.console import Console

from .options import (
    BudgetsOption,
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
    status,
)
from .package import checkpoint_path, pages_of


def bench(
    image: ImagesOption = None,
    video: VideosOption = None,
    question: QuestionOption = None,
    model: ModelOption = None,
    random_weights: Annotated[
        str | None,
        typer.Option(metavar="SHAPE", help="A shape in place of a model, such as vico-8b; a wrong name lists all."),
    ] = None,
    budget: BudgetsOption = None,
    batch_size: Annotated[
        list[int] | None, typer.Option(min=1, help="The same prompt this many times; may be repeated. Default: 1.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Measured rounds.")] = 10,
    warmup: Annotated[int, typer.Option(min=0, help="Rounds that are not counted.")] = 2,
    json_output: JsonOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    debug: DebugOption = False,
) -> None:
    """Measure the time to the first token, beside what was possible. Several images and videos form one prompt.

    Every budget is measured at every batch size. Default budget: auto, or 0.5 where auto depends on the pixels or
    keeps all although it need not.
    """
    budgets, batch_sizes = [parse_budget(each) for each in budget or ()], batch_size or [1]
    check_dtype(dtype)
    if random_weights is not None and (model or image or video or question):
        raise ValueError(
            "`--random-weights` brings model, image and text of its own: leave `--model`, `--image`, `--video` and "
            "`--question` out."
        )
    source = checkpoint_path(model) if random_weights is None else random_weights

    from hf_vtc.report import bench as measure
    from hf_vtc.report import default_budget

    from . import tables
    from .answers import find_device, working_with

    find_device(device)
    if random_weights is None:
        loaded, inputs_of = _from_checkpoint(source, image, video, question, device, dtype)
    else:
        loaded, inputs_of = _from_shape(source, device, dtype)
    budgets = budgets or [default_budget(loaded.config)]
    rounds, reports = warmup + repeats, []
    num_rounds = rounds * len(batch_sizes) * len(budgets)
    with working_with(source), ProgressBar("Measuring, in rounds", num_rounds) as bar:
        for size in batch_sizes:
            inputs = inputs_of(size)
            for each in budgets:
                done = rounds * len(reports)

                def on_round(num_done: int, done: int = done) -> None:
                    bar.move(done + num_done)

                reports.append(measure(loaded, inputs, each, repeats, warmup, on_round=on_round))
    if json_output:
        print_json({"source": source, "reports": [report.to_dict() for report in reports]})
    else:
        Console().print(reports[0] if len(reports) == 1 else tables.bench_table(source, reports))


def _from_checkpoint(
    path: str,
    images: list[str] | None,
    videos: list[str] | None,
    question: str | None,
    device: str | None,
    dtype: str | None,
) -> tuple[Any, Any]:
    """A model, and what makes its inputs of a batch size."""
    from .answers import load, model_inputs, with_pictures

    pages = pages_of(images, question, videos)
    pages = pages if images or videos else pages[:1]
    pictures = [page["picture"] for page in with_pictures(pages)]
    with status("Loading the model ..."):
        loaded, processor = load(path, device, dtype)
    return loaded, lambda size: model_inputs(processor, pictures, pages[0]["questions"][0]["question"], size)


def _from_shape(name: str, device: str | None, dtype: str | None) -> tuple[Any, Any]:
    """A random model, and what makes its inputs of a batch size."""
    import torch

    from hf_vtc.report import inputs_of_shape, model_of_shape

    from .answers import find_device

    place = find_device(device)
    if dtype in (None, "auto"):
        dtype = "float32" if place.type == "cpu" else "bfloat16"
    with status(f"Making random weights of {name} ..."):
        loaded, shape = model_of_shape(name, place, getattr(torch, dtype))
    return loaded, lambda size: inputs_of_shape(loaded, shape, size)
