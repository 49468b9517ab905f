"""`hf-vtc eval`: what compression costs on your own questions."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .options import (
    DebugOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    KeepOption,
    ToleranceOption,
    check_dtype,
    parse_budget,
    parse_margin,
    print_json,
    status,
)
from .package import checkpoint_path

# what --tasks takes too
_WITH_TASKS = {
    "model",
    "tasks",
    "include_path",
    "budgets",
    "metric",
    "keep",
    "tolerance",
    "confidence",
    "seed",
    "limit",
    "holdout",
    "batch_size",
    "save",
    "json_output",
    "device",
    "dtype",
    "debug",
}


def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="Model of hf_vtc: a folder, or an id of the Hub.")
    ],
    context: typer.Context,
    data: Annotated[
        Path | None, typer.Option(help="Held-out records: .json, .jsonl, .parquet, or a folder of them.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Or tasks of lmms-eval, with commas between; it must be there.")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(metavar="DIR", help="With --tasks: a folder of tasks of one's own.")
    ] = None,
    image_folder: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where paths of images and videos start. Default: beside the data."),
    ] = None,
    budgets: Annotated[
        str | None, typer.Option(help="Such as full,auto,0.5,64. Default: auto and three shares, where images admit.")
    ] = None,
    metric: Annotated[
        str, typer.Option(help="exact, contains, choice, anls, relaxed, vqa, f1, iou@0.5, module:function, or auto.")
    ] = "auto",
    baselines: Annotated[
        str, typer.Option(help="Beside each budget: random, pool, smaller, subset, fixed, or none.")
    ] = "random,pool,smaller",
    keep: KeepOption = None,
    tolerance: ToleranceOption = None,
    confidence: Annotated[float, typer.Option(help="Of intervals and of the recommendation.")] = 0.95,
    seeds: Annotated[int, typer.Option(min=1, help="Draws of a baseline by lot.")] = 5,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    group_by: Annotated[str, typer.Option(metavar="FIELD", help="Field whose values are reported apart.")] = "kind",
    turns: Annotated[str, typer.Option(help="Ask for the last answer of a conversation, or all.")] = "last",
    limit: Annotated[int | None, typer.Option(min=1, help="Ask so many questions, drawn from all.")] = None,
    clip: Annotated[
        bool, typer.Option("--clip", help="Give images and videos more where they admit no less.")
    ] = False,
    holdout: Annotated[
        bool | None,
        typer.Option("--holdout/--no-holdout", help="Choose on one half, vouch by the other. Default: from 1,000 on."),
    ] = None,
    train_data: Annotated[
        Path | None, typer.Option(help="Training records; a question about one of their pictures is an error.")
    ] = None,
    train_image_folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where paths of training images start.")
    ] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out records that cannot be used.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions in a batch.")] = 16,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer. Default: the longest reference and 8 tokens more.")
    ] = None,
    time: Annotated[
        bool, typer.Option("--time", help="Time some questions too, alone and in a batch, to first token and answer.")
    ] = False,
    price_per_hour: Annotated[
        float | None, typer.Option(metavar="PRICE", help="Of the machine, with --time: say what is saved in money.")
    ] = None,
    save: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Answers as they come, report and plots; an ended run goes on.")
    ] = None,
    json_output: JsonOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    debug: DebugOption = False,
) -> None:
    """Measure what compression costs on your own questions, and recommend a budget.

    Each question is asked at full length, at each budget, and of baselines that spend as many visual tokens.
    """
    check_dtype(dtype)
    points = None if budgets is None else _budgets(budgets)
    rivals = [] if baselines == "none" else [name.strip() for name in baselines.split(",")]
    margin = parse_margin(keep, tolerance)
    if train_image_folder is not None and train_data is None:
        raise ValueError("`--train-image-folder` says where the images of `--train-data` are, which is not given.")
    if (data is None) == (tasks is None):
        raise ValueError("Give `--data`, records of your own, or `--tasks`, which lmms-eval has; and one of them.")
    if tasks is None and include_path is not None:
        raise ValueError("`--include-path` says where `--tasks` are, which are not given.")
    path = checkpoint_path(model)
    if tasks is not None:
        _refuse_others(context)
        settings = {"tolerance": margin, "confidence": confidence, "relative": keep is not None, "seed": seed}
        names = [name.strip() for name in tasks.split(",")]
        asked = {"batch_size": batch_size, "limit": limit, "device": device, "metric": metric}
        report = _of_tasks(path, names, points, include_path, dtype, asked, settings, holdout, save)
        _show(report, save, json_output)
        return

    from hf_vtc.evaluation import evaluate as measure
    from hf_vtc.evaluation import records_to_ask

    from .answers import find_device, load, processor_of, working_with

    find_device(device)
    on_error = "skip" if skip_bad else "raise"
    with status("Reading records ..."):
        videos = {"takes_videos": processor_of(path).video is not None}
        try:
            records = records_to_ask(data, image_folder, group_by, on_error=on_error, **videos)
        except ValueError as error:
            raise ValueError(str(error).replace("`on_error='skip'`", "`--skip-bad`")) from error
        trained = None if train_data is None else records_to_ask(train_data, train_image_folder, group_by, **videos)
    with status(f"Loading {path} ..."):
        loaded, processor = load(path, device, dtype)
    with working_with(path):
        report = measure(
            loaded,
            processor,
            records,
            budgets=points,
            metric=metric,
            baselines=rivals,
            tolerance=margin,
            relative=keep is not None,
            confidence=confidence,
            seeds=seeds,
            seed=seed,
            group_by=group_by,
            turns=turns,
            limit=limit,
            clip=clip,
            holdout=holdout,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            train_records=trained,
            time=time,
            price_per_hour=price_per_hour,
            output=save,
        )
    _show(report, save, json_output)


def _show(report: Any, save: Path | None, json_output: bool) -> None:
    files = [] if save is None else report.save(save)
    if json_output:
        print_json(report.to_dict())
        return
    console = Console()
    console.print(report)
    if files:
        names = ", ".join(file.name for file in files)
        console.print(f"{save}: {names}", markup=False, highlight=False, soft_wrap=True)


def _refuse_others(context: typer.Context) -> None:
    """Raise for options that lmms-eval knows nothing of."""
    given = [
        f"`--{name.replace('_', '-')}`"
        for name in context.params
        if name not in _WITH_TASKS and context.get_parameter_source(name).name == "COMMANDLINE"
    ]
    if given:
        raise ValueError(
            f"{', '.join(given)} cannot go with `--tasks`, which lmms-eval asks and scores. Leave it out."
        )


def _of_tasks(
    path: str,
    names: list[str],
    points: list[Any] | None,
    include_path: Path | None,
    dtype: str | None,
    asked: dict[str, Any],
    settings: dict[str, Any],
    holdout: bool | None,
    save: Path | None,
) -> Any:
    from hf_vtc.evaluation.summary import Settings
    from hf_vtc.evaluation.tasks import TasksRequest, evaluate_tasks

    from .answers import find_device

    if dtype is None:
        dtype = "float32" if find_device(asked["device"]).type == "cpu" else "auto"
    own = None if include_path is None else str(include_path.absolute())
    request = TasksRequest(path, names, points, own, dtype=dtype, **asked)
    with status("lmms-eval is running ..."):
        return evaluate_tasks(request, Settings(**settings), holdout, save)


def _budgets(text: str) -> list[str | int | float | None]:
    try:
        return [parse_budget(each.strip()) for each in text.split(",")]
    except ValueError as error:
        raise ValueError(str(error).replace("`--budget` must", "`--budgets`: each must")) from None
