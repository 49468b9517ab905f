"""`hf-vtc bench`: the time to the first token, measured."""

from typing import Annotated

import typer
from rich.console import Console

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
    status,
)
from .package import checkpoint_path, pages_of


def bench(
    image: ImagesOption = None,
    question: QuestionOption = None,
    model: ModelOption = None,
    budget: BudgetOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="The same prompt this many times.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Measured rounds.")] = 10,
    warmup: Annotated[int, typer.Option(min=0, help="Rounds that are not counted.")] = 2,
    json_output: JsonOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    debug: DebugOption = False,
) -> None:
    """Measure the time to the first token, beside what was possible. Several images form one prompt.

    Default budget: auto, or 0.5 where auto depends on the pixels or keeps all although it need not.
    """
    chosen = parse_budget(budget)
    check_dtype(dtype)
    path = checkpoint_path(model)
    pages = pages_of(image, question)
    pages = pages if image else pages[:1]

    from hf_vtc.report import bench as measure
    from hf_vtc.report import default_budget

    from .answers import find_device, load, model_inputs, with_pictures, working_with

    find_device(device)
    pictures = [page["picture"] for page in with_pictures(pages)]
    with status("Loading the model ..."):
        loaded, processor = load(path, device, dtype)
    with working_with(path), status(f"Measuring {warmup + repeats} rounds ..."):
        inputs = model_inputs(processor, pictures, pages[0]["questions"][0]["question"], batch_size)
        result = measure(loaded, inputs, chosen or default_budget(loaded.config), repeats, warmup)
    if json_output:
        print_json(result.to_dict())
    else:
        Console().print(result)
