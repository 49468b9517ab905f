"""What a fit refuses before work begins, what a preset and an override change, and the command around it."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from fit_samples import small_request, write_model, write_records
from typer.testing import CliRunner

import hf_vtc.fit
from hf_vtc.fit import FitRequest, fit, plan
from hf_vtc.fit.folder import FitFolder
from hf_vtc.fit.recipe import RECIPES, read_recipe, recipe_file
from hf_vtc.fit.request import PRESETS, read_preset
from hf_vtc.methods import RECORDS, record_named
from hf_vtc_cli.app import app

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "model_cards" / "base-tiny"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_records(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def llavolta(tmp_path_factory):
    return write_model("llavolta", tmp_path_factory.mktemp("llavolta"))


def request(data, model=BASE, **options) -> FitRequest:
    return FitRequest(str(model), str(data), Path("never-written"), **{"method": "vico", **options})


REFUSED = {
    "no method": ({"method": None}, "`method` is needed"),
    "no such method": ({"method": "vicco"}, "The method must be one of"),
    "no such data": ({"data": "nothing.json"}, "`data` must be an existing file"),
    "no such folder": ({"image_folder": "nowhere"}, "`image_folder` must be an existing folder"),
    "no such model": ({"model": "no/such/model"}, "does not exist"),
    "no such preset": ({"preset": "huge"}, "`preset` must be a YAML file, or one of tiny"),
    "no such stage": ({"stages": ("vico_rooter",)}, "A recipe must be a YAML file, or one of .*vico_router"),
    "a recipe elsewhere": ({"stages": ("../recipes/vico_router",)}, "A recipe must be a YAML file"),
    "a stage twice": ({"stages": ("vico_consistency",) * 2}, "different recipes"),
    "a foreign stage": ({"stages": ("vistog_stage1",)}, "is of the method vistog, but the model of vico"),
    "a router first": ({"stages": ("vico_router",)}, "Give that model as `reference`"),
    "a share above 1": ({"held_out": 1.5}, "`held_out` must be a share"),
    "an unknown field": ({"overrides": ("training.learning_rat=1",)}, "Stage vico_consistency: .*learning_rat"),
    "an unknown option": ({"overrides": ("vico_router.options.probee=one_tile",)}, "no options .*probee"),
    "a word for a number": (
        {"overrides": ("training.learning_rate=fast",)},
        "training.learning_rate must be a number",
    ),
    "a schedule": ({"overrides": ("training.lr_scheduler_type=zigzag",)}, "Stage vico_consistency: .*zigzag"),
    "no override": ({"overrides": ("learning_rate",)}, "`--set` must be"),
    "an override of nothing": ({"overrides": ("train_only=[lm_head]",)}, "no stage has 'train_only'. .*vico_consis"),
    "a batch that does not divide": (
        {"overrides": ("batch_size=3", "training.per_device_train_batch_size=2")},
        "mult",
    ),
    "adapters beside a part": (
        {"lora": True, "overrides": ("vico_consistency.train_only=[compressed_projector]",)},
        "Leave one out",
    ),
    "adapters for nothing": (
        {"stages": ("vico_router",), "reference": str(BASE), "lora": True},
        "`lora` has no effect",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_plan_refuses(case, data):
    fields, message = REFUSED[case]
    fields = {"model": str(BASE), "data": str(data), "output": Path("never-written"), "method": "vico", **fields}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        plan(FitRequest(**fields), 1)
    assert not Path("never-written").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "vico"}, "is of the method llavolta, but `method` is 'vico'"),
        ({"config": {"compress_stride": 4}}, "`config` is for a conversion"),
        ({"vision_tower": "clip"}, "`vision_tower` is for a conversion"),
    ],
)
def test_plan_refuses_for_a_model_that_is_converted(fields, message, data, llavolta):
    with pytest.raises(ValueError, match=message):
        plan(FitRequest(str(llavolta), str(data), Path("never-written"), **fields), 1)


def test_a_model_of_hf_vtc_needs_no_method(data, llavolta):
    planned = plan(request(data, llavolta, method=None), 1)
    assert planned.is_converted and planned.record is record_named("llavolta")


def test_stages_are_those_of_the_method_unless_others_are_named(data):
    assert list(plan(request(data), 1).recipes) == ["vico_consistency", "vico_router"]
    file = str(RECIPES / "vico_consistency.yaml")
    assert list(plan(request(data, stages=(file,)), 1).recipes) == ["vico_consistency"]


def test_numbers_need_no_point(data):
    planned = plan(request(data, overrides=("training.learning_rate=1e-5", "training.warmup_steps=0.1")), 1)
    assert planned.recipes["vico_router"]["training"]["learning_rate"] == 1e-5


def test_overrides_win_over_presets_and_those_over_recipes(data):
    tiny = read_preset("tiny")["recipes"]["vico_router"]
    plain, preset = plan(request(data), 1), plan(request(data, preset="tiny"), 1)
    assert plain.recipes["vico_router"]["training"]["max_steps"] == 500
    assert preset.recipes["vico_router"]["training"]["max_steps"] == tiny["training"]["max_steps"] != 500
    # what a preset does not say stays
    assert preset.recipes["vico_router"]["options"]["ratio_loss"] == "kl"
    overrides = ("training.max_steps=7", "vico_router.training.max_steps=9", "vico_router.options.percentile=60")
    own = plan(request(data, preset="tiny", overrides=overrides), 1)
    assert [recipe["training"]["max_steps"] for recipe in own.recipes.values()] == [7, 9]
    assert own.recipes["vico_router"]["options"]["percentile"] == 60
    assert own.run.workers == 0 and plan(request(data, preset="tiny", workers=3), 1).run.workers == 3


@pytest.mark.parametrize("file", sorted(PRESETS.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_preset_fits_its_recipes(file):
    preset = read_preset(file.stem)
    # those that run unasked, and others of the package
    assert {name for record in RECORDS.values() for name in record.recipes} <= set(preset["recipes"])
    assert set(preset["recipes"]) <= {each.stem for each in RECIPES.glob("*.yaml")}
    for name, values in preset["recipes"].items():
        recipe = read_recipe(recipe_file(name), (), values)
        assert recipe["training"]["max_steps"] == values["training"]["max_steps"]
        assert recipe["batch_size"] % recipe["training"]["per_device_train_batch_size"] == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [({"recipe": {}}, "sections of a preset"), ({"run": {"seed": 3}}, "may have workers"), ([1], "sections")],
)
def test_a_preset_that_says_more_is_refused(content, message, tmp_path):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=message):
        read_preset(str(tmp_path / "mine.yaml"))


CHANGES = {
    "seed": {"seed": 43},
    "held_out": {"held_out": 3},
    "metric": {"metric": "contains"},
    "recipes.llavolta_finetune.training.max_steps": {"overrides": ("training.max_steps=4",)},
    "lora": {"lora": True},
    "on_error": {"on_error": "skip"},
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_output_of_other_settings_is_refused(name, data, llavolta, tmp_path):
    first = small_request(llavolta, data, tmp_path / "out", "llavolta")
    folder = FitFolder(tmp_path / "out")
    assert not folder.adopt(plan(first, 1).settings()) and folder.adopt(plan(first, 1).settings())
    folder.split.touch()
    other = small_request(llavolta, data, tmp_path / "out", "llavolta", **CHANGES[name])
    with pytest.raises(ValueError, match=f"other settings: {name}"):
        fit(other)


def test_data_and_model_that_changed_are_other_settings(data, llavolta, tmp_path):
    for name in ("records.json", *(f"{idx}.png" for idx in range(8)), "again.bmp"):
        (tmp_path / name).write_bytes((data.parent / name).read_bytes())
    own = tmp_path / "records.json"
    folder = FitFolder(tmp_path / "out")
    asked = small_request(llavolta, own, tmp_path / "out", "llavolta", overrides=("batch_size=4",))
    folder.adopt(plan(asked, 1).settings())
    folder.split.touch()
    own.write_text(json.dumps(json.loads(own.read_text())[:-1]))
    with pytest.raises(ValueError, match="other settings: data.files.records.json"):
        fit(asked)
    # a checkpoint cut for another number of processes goes on differently
    own.write_bytes(data.read_bytes())
    with pytest.raises(ValueError, match="num_processes was 1 and is 2 now"):
        folder.adopt(plan(asked, 2).settings())


def test_what_nothing_depends_on_yet_may_change(data, llavolta, tmp_path):
    folder = FitFolder(tmp_path / "out")
    asked = small_request(BASE, data, tmp_path / "out", "llavolta")

    def adopt(**changes):
        return folder.adopt(plan(dataclasses.replace(asked, **changes), 1).settings())

    # nothing is done: a wrong base or method can be set right
    assert not adopt() and adopt(method="vico", overrides=()) and adopt()
    folder.start.mkdir(parents=True)
    assert adopt(held_out=0.5, on_error="skip", data=str(data.parent)) and adopt()
    with pytest.raises(ValueError, match="other settings: seed was 42 and is 7 now"):
        adopt(seed=7)
    folder.split.touch()
    assert adopt(budgets=("auto",), tolerance=0.03) and adopt(relative=True) and adopt()
    with pytest.raises(ValueError, match="other settings: held_out was None and is 0.5 now"):
        adopt(held_out=0.5)


def test_budgets_may_change_until_they_are_asked_for(data, tmp_path):
    start = write_model("vico", tmp_path / "start")
    asked = small_request(start, data, tmp_path / "out", "vico", budgets=("full", 1))
    with pytest.raises(ValueError, match="too small for 1 of 1 images"):
        fit(asked)
    assert not (tmp_path / "out" / "fit" / "before").exists()
    fit(dataclasses.replace(asked, budgets=("full",)))
    with pytest.raises(ValueError, match="other settings: budgets was"):
        fit(asked)


def test_an_output_that_holds_something_else_is_left_alone(data, llavolta, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds something that is no fit"):
        fit(small_request(llavolta, data, tmp_path / "out", "llavolta"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_two_runs_do_not_share_an_output(data, llavolta, tmp_path):
    with (
        FitFolder(tmp_path / "out").alone(),
        pytest.raises(RuntimeError, match="Another run works in `output`"),
    ):
        fit(small_request(llavolta, data, tmp_path / "out", "llavolta"))


def invoke(*arguments):
    return CliRunner().invoke(app, ["fit", *map(str, arguments)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--held-out", "some"), "`--held-out` must be a share of the records (0.1, 10%) or a number"),
        (("--held-out", "1.5"), "`--held-out` must be a share of the records below 1"),
        (("--tolerance", "1"), "`--tolerance` must lie between 0 and 1"),
        (("--tolerance", "0.1", "--keep", "0.9"), "Give `--keep` or `--tolerance`, not both"),
        (("--budgets", "full,most"), "`--budget` must be auto, full, a share"),
        (("--config", "stride"), "`--config` must be name=value"),
        (("--dtype", "int8"), "`--dtype` must be one of"),
        (("--preset", "huge"), "`--preset` must be a YAML file, or one of tiny"),
        (("--stages", "vico_router"), "Give that model as `--reference`"),
        (("--image-folder", "nowhere"), "`--image-folder` must be an existing folder"),
    ],
)
def test_a_bad_argument_is_one_line(options, message, data, tmp_path):
    result = invoke(BASE, "--method", "vico", "--data", data, "--output", tmp_path / "out", *options)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ") and message in line
    assert not (tmp_path / "out").exists()


def test_the_command_hands_everything_on(data, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(hf_vtc.fit, "fit", lambda request, report: asked.append(request))
    options = ["--method", "vico", "--image-folder", data.parent, "--stages", "vico_consistency, vico_router"]
    options += ["--preset", "tiny", "--set", "batch_size=4", "--set", "vico_router.training.max_steps=2"]
    options += ["--config", "flash_absolute_threshold=0.7", "--lora", "--reference", BASE, "--held-out", "20%"]
    options += ["--on-error", "skip", "--budgets", "full, auto,0.5", "--metric", "anls", "--seed", "3"]
    options += ["--keep", "0.97"]
    options += ["--dtype", "bfloat16", "--base-model", "them/base", "--license", "mit", "--workers", "2"]
    options += ["--logging-steps", "5", "--save-steps", "6", "--report-to", "tensorboard", "--vision-tower", "clip"]
    result = invoke("model", "--data", data, "--output", tmp_path / "out", *options)
    assert result.exit_code == 0, result.stderr
    expected = FitRequest(
        "model",
        str(data),
        tmp_path / "out",
        method="vico",
        image_folder=str(data.parent),
        stages=("vico_consistency", "vico_router"),
        preset="tiny",
        overrides=("batch_size=4", "vico_router.training.max_steps=2"),
        config={"flash_absolute_threshold": 0.7},
        lora=True,
        reference=str(BASE),
        vision_tower="clip",
        held_out=0.2,
        on_error="skip",
        budgets=("full", "auto", 0.5),
        metric="anls",
        tolerance=0.03,
        relative=True,
        seed=3,
        dtype="bfloat16",
        base_model="them/base",
        license="mit",
        workers=2,
        logging_steps=5,
        save_steps=6,
        report_to="tensorboard",
    )
    assert asked == [expected]
    # every field but what is positional is an option
    assert {name for name in vars(expected) if getattr(FitRequest, name, None) == getattr(expected, name)} == set()
