"""What a fit is asked for, and the stages that follow from it: everything that can be refused before work begins."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..convert.folders import local_folder
from ..data.records import POLICIES
from ..evaluation.scores import find_metric
from ..files import read_json
from ..methods import Record, find_record, record_named
from .recipe import (
    Recipe,
    RunOptions,
    parse_override,
    read_recipe,
    recipe_file,
    trainer_class,
    training_arguments,
    with_lora,
)
from .split import check_held_out

PRESETS = Path(__file__).parent / "presets"
# of the run, which a preset may set where the caller does not
_RUN_FIELDS = {"workers": 4, "logging_steps": 10, "save_steps": 500}
_SECTIONS_OF_PRESETS = {"recipes", "config", "run"}
# small files of a model's folder are hashed as they are, of large ones the size
_LARGEST_HASHED = 2**20


@dataclass(frozen=True)
class FitRequest:
    """What to fit, on what, and how.

    Args:
        model (`str`): folder or Hub id: a base that `convert` knows, or a model of hf_vtc to go on from.
        data (`str`): `.json`, `.jsonl` or `.parquet` file, or a folder of them; see `load_records`.
        output (`Path`): folder of the result; what is done already lies in `fit` inside of it.
        method (`str`, *optional*): such as `"vico"`. Default: that of a model of hf_vtc.
        image_folder (`str`, *optional*): where paths of images start. Default: the folder of the data.
        stages (`tuple[str, ...]`, *optional*): recipes by their name or file, in turn. Default: those of the method.
        preset (`str`, *optional*): values for a kind of machine or model, by its name or file: `"tiny"`.
        overrides (`tuple[str, ...]`): `[recipe.]section.name=value`; without a recipe for all that have the section.
        config (`Mapping`): fields of the config of the converted model.
        lora (`bool`): adapters in place of the language model in those stages that train it.
        reference (`str`, *optional*): frozen model that stages compare with. Default: what the first one starts from.
        vision_tower (`str`, *optional*): of a base without its tower, as for `convert`.
        held_out (`float` or `int`, *optional*): share or number of the records that are kept aside; 0 leaves the
            evaluation out. Default: a tenth, at most 1000.
        on_error (`str`): what to do with bad records, `"raise"` or `"skip"`.
        budgets (`tuple`, *optional*), metric (`str`), tolerance (`float`), relative (`bool`): of the evaluation
            afterwards, see `hf_vtc.evaluate`.
        seed (`int`): of everything that is drawn.
        dtype (`str`, *optional*): of the result. Default: that of the model that training starts from.
        base_model, license (`str`, *optional*): for the card. Default of the former: `model`, if it is a Hub id.
        workers, logging_steps, save_steps (`int`, *optional*), report_to (`str`): see `RunOptions`.
    """

    model: str
    data: str
    output: Path
    method: str | None = None
    image_folder: str | None = None
    stages: tuple[str, ...] | None = None
    preset: str | None = None
    overrides: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    lora: bool = False
    reference: str | None = None
    vision_tower: str | None = None
    held_out: float | int | None = None
    on_error: str = "raise"
    budgets: tuple[str | float | int, ...] | None = None
    metric: str = "auto"
    tolerance: float = 0.01
    relative: bool = False
    seed: int = 42
    dtype: str | None = None
    base_model: str | None = None
    license: str | None = None
    workers: int | None = None
    logging_steps: int | None = None
    save_steps: int | None = None
    report_to: str = "none"


@dataclass(frozen=True)
class Plan:
    """What a request comes to.

    Args:
        request ([`FitRequest`]): as it was given.
        source (`Path`): folder of its model.
        record ([`Record`]): of the method.
        reference (`Path`, *optional*): folder of the frozen model that was asked for.
        is_converted (`bool`): whether the model is one of hf_vtc already.
        config (`dict`): fields of the config of the converted model, those of the preset among them.
        recipes (`dict`): of each stage in turn, by name, with everything that replaces its values.
        run ([`RunOptions`]): its `output` is that of the request.
        num_processes (`int`): of the run.
    """

    request: FitRequest
    source: Path
    reference: Path | None
    record: Record
    is_converted: bool
    config: dict[str, Any]
    recipes: dict[str, Recipe]
    run: RunOptions
    num_processes: int

    def max_length(self) -> int | None:
        """Most tokens of a row, in the stage that has the fewest."""
        lengths = [recipe["max_length"] for recipe in self.recipes.values() if recipe.get("max_length")]
        return min(lengths, default=None)

    def settings(self) -> dict[str, Any]:
        """All that the result depends on, and that must not change while it is made; ready for JSON."""
        request = self.request
        return {
            "model": request.model,
            "model_files": fingerprint(self.source),
            "method": self.record.name,
            "config": self.config,
            "reference": None if self.reference is None else fingerprint(self.reference),
            "vision_tower": request.vision_tower,
            "recipes": self.recipes,
            "lora": request.lora,
            "data": {"source": request.data, "files": fingerprint(Path(request.data))},
            "image_folder": request.image_folder,
            "held_out": request.held_out,
            "on_error": request.on_error,
            "budgets": request.budgets,
            "metric": request.metric,
            "tolerance": request.tolerance,
            "relative": request.relative,
            "seed": request.seed,
            "dtype": request.dtype,
            "num_processes": self.num_processes,
        }


def plan(request: FitRequest, num_processes: int) -> Plan:
    """Check a request, and work out its stages.

    Raises:
        ValueError, FileNotFoundError: an argument is outside of its range, or names what is not there.
    """
    check_held_out(request.held_out)
    if request.metric != "auto":
        find_metric(request.metric)
    if not 0 < request.tolerance < 1:
        raise ValueError(
            f"`tolerance` must lie between 0 and 1, got {request.tolerance}. 0.01 is one point of a hundred."
        )
    if request.on_error not in POLICIES:
        raise ValueError(f"`on_error` must be one of {', '.join(POLICIES)}, got {request.on_error!r}.")
    if not Path(request.data).exists():
        raise FileNotFoundError(f"`data` must be an existing file or folder, got {request.data!r}.")
    if request.image_folder is not None and not Path(request.image_folder).is_dir():
        raise FileNotFoundError(f"`image_folder` must be an existing folder, got {request.image_folder!r}.")
    preset = read_preset(request.preset) if request.preset else {}
    source = local_folder(request.model)
    record, is_converted = _method_of(source, request)
    if record.is_training_free:
        raise ValueError(
            f"{record.name} is training-free, so that there is nothing to fit. Convert the base by `hf-vtc convert`, "
            "and measure it by `hf-vtc eval`."
        )
    names = request.stages or record.need("recipes", "`hf-vtc fit`")
    recipes = _recipes(names, record, request, preset.get("recipes", {}))
    given = {name: getattr(request, name) for name in _RUN_FIELDS if getattr(request, name) is not None}
    run_fields = {**_RUN_FIELDS, **preset.get("run", {}), **given}
    run = RunOptions(request.output, request.seed, report_to=request.report_to, **run_fields)
    for name, recipe in recipes.items():
        trainer_class(recipe)
        try:
            training_arguments(recipe, run, num_processes)
        except (TypeError, ValueError) as error:
            raise ValueError(f"Stage {name}: {error}") from error
    config = {} if is_converted else {**preset.get("config", {}).get(record.name, {}), **request.config}
    reference = None if request.reference is None else local_folder(request.reference)
    return Plan(request, source, reference, record, is_converted, config, recipes, run, num_processes)


def read_preset(name: str) -> dict[str, Any]:
    """A preset of the package by its name, or any YAML file by its path.

    Raises:
        ValueError: there is none, or it has an unknown section.
    """
    file = Path(name) if Path(name).suffix in (".yaml", ".yml") else PRESETS / f"{Path(name).name}.yaml"
    if not file.is_file():
        names = ", ".join(sorted(each.stem for each in PRESETS.glob("*.yaml")))
        raise ValueError(f"`preset` must be a YAML file, or one of {names}, got {name!r}.")
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not content.keys() <= _SECTIONS_OF_PRESETS:
        raise ValueError(f"The sections of a preset are {', '.join(sorted(_SECTIONS_OF_PRESETS))}; check {file}.")
    unknown = sorted(content.get("run", {}).keys() - _RUN_FIELDS.keys())
    if unknown:
        raise ValueError(f"`run` of {file} has {unknown}, but may have {', '.join(_RUN_FIELDS)} only.")
    return content


def fingerprint(path: Path) -> dict[str, str]:
    """What files are known by: the digest of their content, of large weights the size alone."""
    files = [path] if path.is_file() else sorted(each for each in path.iterdir() if each.is_file())
    is_data = path.is_file() or not (path / "config.json").is_file()
    return {each.name: _digest(each, whole=is_data) for each in files}


def _digest(file: Path, whole: bool) -> str:
    size = file.stat().st_size
    if size > _LARGEST_HASHED and not whole:
        return f"{size} bytes"
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_LARGEST_HASHED):
            digest.update(block)
    return digest.hexdigest()


def _method_of(source: Path, request: FitRequest) -> tuple[Record, bool]:
    """The record of the method, and whether the model is of hf_vtc already."""
    found = find_record(read_json(source / "config.json")) if (source / "config.json").is_file() else None
    if found is None:
        if request.method is None:
            raise ValueError(f"`method` is needed, since {request.model} is no model of hf_vtc yet. Name one.")
        return record_named(request.method), False
    if request.method not in (None, found.name):
        raise ValueError(f"{request.model} is of the method {found.name}, but `method` is {request.method!r}.")
    for name in ("config", "vision_tower"):
        if getattr(request, name):
            raise ValueError(f"`{name}` is for a conversion, but {request.model} is converted already. Leave it out.")
    return found, True


def _recipes(
    names: tuple[str, ...], record: Record, request: FitRequest, presets: Mapping[str, Any]
) -> dict[str, Recipe]:
    files = {file.stem: file for file in map(recipe_file, names)}
    if len(files) != len(names):
        raise ValueError(f"`stages` must name different recipes, got {', '.join(map(str, names))}.")
    overrides = _overrides_of(files, request.overrides, presets)
    recipes = {}
    for name, file in files.items():
        recipe = read_recipe(file, overrides[name], presets.get(name))
        if recipe["method"] != record.name:
            raise ValueError(f"Stage {name} is of the method {recipe['method']}, but the model of {record.name}.")
        if recipe.get("reference") == "earlier" and not recipes and request.reference is None:
            raise ValueError(
                f"Stage {name} compares with the model that the stages before it started from, but is the first. "
                f"Give that model as `reference`, or set {name}.reference=null where its trainer can do without."
            )
        if request.lora and "lora" in recipe and "train_only" in recipe:
            raise ValueError(
                f"`lora` adds adapters, but stage {name} trains {recipe['train_only']} only. Leave one out."
            )
        recipes[name] = with_lora(recipe) if request.lora and "lora" in recipe else recipe
    if request.lora and not any("lora" in recipe for recipe in recipes.values()):
        raise ValueError(f"`lora` has no effect: no language model trains in {', '.join(recipes)}. Leave it out.")
    return recipes


def _overrides_of(
    files: Mapping[str, Path], overrides: Sequence[str], presets: Mapping[str, Any]
) -> dict[str, list[str]]:
    """The overrides of each recipe: its own, and those for all that have the section.

    Raises:
        ValueError: no recipe has the section of one.
    """
    found: dict[str, list[str]] = {name: [] for name in files}
    sections = {name: read_recipe(file, (), presets.get(name)).keys() for name, file in files.items()}
    own = []
    for override in overrides:
        first, _, rest = override.partition(".")
        if first in files:
            own.append((first, rest))
            continue
        section, *_ = parse_override(override)
        takers = [name for name in files if section in sections[name]]
        if not takers:
            name = next(iter(files))
            raise ValueError(
                f"`overrides` {override!r} has no effect, since no stage has {section!r}. Say which is meant: "
                f"{name}.{override}."
            )
        for name in takers:
            found[name].append(override)
    for name, override in own:
        found[name].append(override)
    return found
