"""`hf-vtc fit`: from a base and records of one's own to a measured model."""

import re
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import (
    DTYPES,
    BaseModelOption,
    DebugOption,
    JsonOption,
    KeepOption,
    LicenseOption,
    ToleranceOption,
    parse_budget,
    parse_margin,
    print_json,
)

_METHOD_HELP = "Such as vico. Default: that of a model of hf_vtc."
_STAGES_HELP = "Recipes in turn, by name or YAML file, with commas between. Default: those of the method."
_HELD_OUT_HELP = "Share (0.1) or number (500) of the records that are kept aside. Default: a tenth, at most 1000."


def fit(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Base to convert, or model of hf_vtc: a folder, or an id of the Hub."),
    ],
    data: Annotated[str, typer.Option(metavar="FILE", help="Records: .json, .jsonl, .parquet, or a folder of them.")],
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Result; the same command goes on in it.")],
    method: Annotated[str | None, typer.Option(help=_METHOD_HELP)] = None,
    image_folder: Annotated[str | None, typer.Option(help="Where image paths start. Default: beside FILE.")] = None,
    stages: Annotated[str | None, typer.Option(metavar="NAMES", help=_STAGES_HELP)] = None,
    preset: Annotated[
        str | None, typer.Option(metavar="NAME", help="Values for a kind of model: tiny, or a YAML file.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="[RECIPE.]SECTION.NAME=VALUE", help="Value of recipes, may be repeated."),
    ] = None,
    config: Annotated[
        list[str] | None,
        typer.Option("--config", metavar="NAME=VALUE", help="Field of the converted model's config, may be repeated."),
    ] = None,
    lora: Annotated[bool, typer.Option("--lora", help="Adapters in place of the language model's weights.")] = False,
    reference: Annotated[
        str | None, typer.Option(metavar="PATH_OR_ID", help="Model that stages compare with. Default: the first one.")
    ] = None,
    vision_tower: Annotated[
        str | None, typer.Option(metavar="PATH_OR_ID", help="Tower of a base that comes without, as for convert.")
    ] = None,
    held_out: Annotated[str | None, typer.Option(metavar="N", help=_HELD_OUT_HELP)] = None,
    on_error: Annotated[str, typer.Option(help="What to do with bad records: raise or skip.")] = "raise",
    budgets: Annotated[
        str | None, typer.Option(help="Of the evaluation, with commas between, such as full,auto,0.5.")
    ] = None,
    metric: Annotated[str, typer.Option(help="Of the evaluation: auto, exact, anls, ...; see hf-vtc eval.")] = "auto",
    keep: KeepOption = None,
    tolerance: ToleranceOption = None,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 42,
    dtype: Annotated[str | None, typer.Option(help="Of the result. Default: as the base is stored.")] = None,
    base_model: BaseModelOption = None,
    license: LicenseOption = None,
    workers: Annotated[int | None, typer.Option(min=0, help="Processes that read images. Default: 4.")] = None,
    logging_steps: Annotated[int | None, typer.Option(min=1, help="Default: 10.")] = None,
    save_steps: Annotated[int | None, typer.Option(min=1, help="Between checkpoints. Default: 500.")] = None,
    report_to: Annotated[str, typer.Option(help="tensorboard, wandb, ... or none.")] = "none",
    json_output: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Fit a method to your data: convert, train its stages, measure before and after, and write a card.

    On many devices: accelerate launch --num_processes 8 -m hf_vtc.fit MODEL ...
    """
    if dtype is not None and dtype not in DTYPES[1:]:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES[1:])}, got {dtype!r}.")
    chosen = None if budgets is None else tuple(parse_budget(each.strip()) for each in budgets.split(","))
    held_out, fields = _number(held_out), _fields(config or [])
    margin = parse_margin(keep, tolerance)

    if not debug:
        # of names that the host will give up in a version that is not out yet
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")

    from hf_vtc.fit import FitRequest
    from hf_vtc.fit import fit as run_fit

    request = FitRequest(
        model,
        data,
        output,
        method=method,
        image_folder=image_folder,
        stages=tuple(name.strip() for name in stages.split(",")) if stages else None,
        preset=preset,
        overrides=tuple(overrides or ()),
        config=fields,
        lora=lora,
        reference=reference,
        vision_tower=vision_tower,
        held_out=held_out,
        on_error=on_error,
        budgets=chosen,
        metric=metric,
        tolerance=margin,
        relative=keep is not None,
        seed=seed,
        dtype=dtype,
        base_model=base_model,
        license=license,
        workers=workers,
        logging_steps=logging_steps,
        save_steps=save_steps,
        report_to=report_to,
    )
    measured = run_fit(request, lambda line: typer.echo(line, err=json_output))
    _print(measured, output, json_output)


def _number(text: str | None) -> float | int | None:
    """A share with a point or in percent, or a number without."""
    if text is None:
        return None
    try:
        if re.fullmatch(r"\d+", text):
            return int(text)
        return float(text.removesuffix("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise ValueError(
            f"`--held-out` must be a share of the records (0.1, 10%) or a number of them (500), got {text!r}."
        ) from None


def _fields(pairs: list[str]) -> dict[str, Any]:
    from yaml import YAMLError, safe_load

    fields = {}
    for pair in pairs:
        name, separator, text = pair.partition("=")
        try:
            fields[name] = safe_load(text)
        except YAMLError:
            separator = ""
        if not separator or not name:
            raise ValueError(f"`--config` must be name=value, got {pair!r}.")
    return fields


def _print(measured: Any, output: Path, json_output: bool) -> None:
    """What was measured, in the main process of a run."""
    from hf_vtc.fit import score_text
    from hf_vtc.fit.recipe import process_state

    if not process_state().is_main_process:
        return
    if json_output:
        print_json({"before": measured and measured.before, "after": measured and measured.after})
        return
    if measured is not None:
        (before,) = (row for row in measured.before["rows"] if row["point"] == "full")
        typer.echo(f"\nbefore training, with all visual tokens: {score_text(before)}\n\n{measured.table}")
    typer.echo(f"{output} is ready: hf-vtc run --model {output}")
