"""`examples/train_stage.py` and the recipes: every stage takes a step, and says where its values are from."""

import importlib.util
import re
from pathlib import Path

import factories
import pytest
import torch
import yaml
from transformers import AutoModelForImageTextToText

from hf_vtc.fit.recipe import RECIPES as RECIPE_FOLDER
from hf_vtc.fit.recipe import RunOptions, read_recipe, recipe_file, trainer_class, training_arguments
from hf_vtc.methods import RECORDS
from hf_vtc.trainers import VtcTrainer

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted(RECIPE_FOLDER.glob("*.yaml"))
DATA = ROOT / "examples" / "finetune_data" / "records.json"

# of the log of a step, beside the loss
METRICS = {
    "vico_consistency": {"kl", "compressed_tiles", "kept_tokens"},
    "vico_router": {"router_entropy", "compressed_tiles", "kept_tokens"},
    "vico_adaptation": {"kl", "compressed_tiles", "kept_tokens"},
    "avg_llava_stage1": set(),
    "avg_llava_stage2": set(),
    "avg_llava_stage3": {f"loss_{scale}" for scale in (1, 2, 4, 8, 16)},
    "avg_llava_stage4": {"router_entropy", "kept_tokens", "chosen_1"},
    "vistog_stage1": {"used_groups", "group_entropy", "visual_tokens"},
    "vistog_stage2": {"used_groups", "group_entropy", "visual_tokens"},
    "llavolta_pretrain": {"visual_tokens"},
    "llavolta_finetune": {"visual_tokens"},
    "convllava_stage1": {"visual_tokens"},
    "convllava_stage2": {"visual_tokens"},
    "convllava_stage3": {"visual_tokens"},
}
# what trains, as the beginning of names
TRAINED = {
    "vico_router": ("model.router.",),
    "vico_adaptation": ("model.multi_modal_projector.", "model.compressed_projector.", "model.language_model."),
    "avg_llava_stage1": ("model.multi_modal_projector.",),
    "avg_llava_stage4": ("model.router.",),
    "vistog_stage1": ("model.multi_modal_projector.", "model.semantic_tokens", "model.grouping."),
    "llavolta_pretrain": ("model.multi_modal_projector.",),
    "convllava_stage1": ("model.multi_modal_projector.", "model.vision_tower.encoder.stages.4."),
}
SMALL = (
    "batch_size=2",
    "training.per_device_train_batch_size=1",
    "training.max_steps=1",
    "training.warmup_steps=0",
    "training.learning_rate=0.01",
)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_stage", ROOT / "examples" / "train_stage.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny(recipe_name: str, seed: int = 0):
    """A tiny model that the recipe can start from."""
    method = yaml.safe_load(recipe_file(recipe_name).read_text(encoding="utf-8"))["method"]
    overrides = {}
    if method == "llavolta":
        # enough layers for four stages to differ
        text = factories.tiny_config(method).text_config.to_dict()
        # follows from the number of layers
        del text["layer_types"]
        overrides["text_config"] = {**text, "num_hidden_layers": 6}
    if recipe_name == "convllava_stage1":
        vision = {"hidden_sizes": [8, 8, 12, 16], "depths": [1, 1, 2, 1], "image_size": 48, "patch_size": 1}
        overrides["vision_config"] = {"model_type": "convnext", "layer_scale_init_value": 0.5, **vision}
    return factories.tiny_model(method, seed=seed, **overrides), factories.tiny_processor(method)


def arguments_for(name: str, folder: Path, *overrides: str) -> list[str]:
    """Command line of a recipe on a tiny model, which is written to `folder`."""
    model, processor = tiny(name)
    model.save_pretrained(folder / "start", save_code=False)
    processor.save_pretrained(folder / "start", save_code=False)
    found = [name, "--model", str(folder / "start")]
    if name in ("vico_router", "vico_adaptation"):
        tiny(name, seed=1)[0].save_pretrained(folder / "reference", save_code=False)
        found += ["--reference", str(folder / "reference")]
    if name == "convllava_stage1":
        overrides = (*overrides, "add_stage.num_blocks=1", "add_stage.width=32")
    found += ["--data", str(DATA), "--output", str(folder / "out"), "--logging-steps", "1", "--workers", "0"]
    return found + [part for override in (*SMALL, *overrides) for part in ("--set", override)]


def test_every_recipe_is_tested():
    assert {file.stem for file in RECIPES} == set(METRICS)


def test_every_method_names_recipes_of_its_own():
    for record in RECORDS.values():
        if record.is_training_free:
            continue
        assert record.recipes
        assert {read_recipe(recipe_file(name))["method"] for name in record.recipes} == {record.name}


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_recipe_takes_a_step(script, file, tmp_path):
    name = file.stem
    # ViCO's router learns from the past, of which the first step has none
    steps = 2 if name == "vico_router" else 1
    trainer = script.main(arguments_for(name, tmp_path, f"training.max_steps={steps}"))
    assert trainer.state.global_step == steps
    logged = trainer.state.log_history[0]
    assert METRICS[name] <= logged.keys()
    assert all(torch.isfinite(torch.tensor(value)) for value in logged.values())
    assert trainer.args.gradient_accumulation_steps == 2

    before = AutoModelForImageTextToText.from_pretrained(tmp_path / "start").state_dict()
    after = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").state_dict()
    moved = {key for key in after if key not in before or not torch.equal(after[key], before[key])}
    trainable = {key for key, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert moved and moved <= trainable
    if name in TRAINED:
        assert all(key.startswith(TRAINED[name]) for key in trainable)
    else:
        assert any(key.startswith("model.language_model.") for key in moved)
    assert (tmp_path / "out" / "tokenizer_config.json").is_file()


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_recipe_fits_its_trainer(file, tmp_path):
    recipe = read_recipe(file)
    trainer = trainer_class(recipe)
    assert trainer is VtcTrainer or recipe["method"].split("_")[0] in trainer.__name__.lower()
    # as on 8 devices, where the papers were trained
    training = training_arguments(recipe, RunOptions(tmp_path), 8)
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps * 8
    assert batch == recipe["batch_size"]


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_recipe_says_where_each_value_is_from(file):
    text = file.read_text(encoding="utf-8")
    general = re.search(r"^# Values: [\w./-]+@[0-9a-f]{7}", text, flags=re.MULTILINE)
    section = ""
    for line in text.splitlines():
        found = re.match(r"( *)(\w+):(.*)", line)
        if found and not found[1]:
            section = found[2]
        if found and section in ("options", "batch_size", "max_length", "training", "config", "lora") and found[3]:
            assert general or " # " in found[3], line
    assert "arXiv" in text


@pytest.mark.parametrize(
    "override, message",
    [
        ("options.marjin=1", "no options"),
        ("training.learning_rat=1", "learning_rat"),
        ("training.output_dir=elsewhere", "output_dir"),
        ("trainer=Trainer", "must be one of"),
        ("colour=red", "section.name=value"),
        ("batch_size=3", "multiple of 4"),
        ("method=vico", "is for 'vtc_vico'"),
        ("train_only=[projektor]", "projektor"),
    ],
)
def test_what_a_recipe_must_not_say_is_an_error(script, tmp_path, override, message):
    arguments = arguments_for("avg_llava_stage4", tmp_path, "training.per_device_train_batch_size=4", "batch_size=4")
    with pytest.raises(ValueError, match=message):
        script.main([*arguments, "--set", override])
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_section_that_nobody_reads_is_an_error(tmp_path):
    text = RECIPES[0].read_text(encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text(f"{text}\nschedule: cosine\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"unknown sections \['schedule'\]"):
        read_recipe(tmp_path / "recipe.yaml")
    (tmp_path / "recipe.yaml").write_text("method: vico\n", encoding="utf-8")
    with pytest.raises(ValueError, match="lacks .*trainer"):
        read_recipe(tmp_path / "recipe.yaml")


def test_resume_goes_on_where_it_was(script, tmp_path):
    steps = ("training.max_steps=2", "training.lr_scheduler_type=cosine")
    arguments = [*arguments_for("llavolta_finetune", tmp_path, *steps), "--save-steps", "1"]
    whole = script.main(arguments)
    expected = {name: tensor.clone() for name, tensor in whole.model.state_dict().items()}
    # as if it had been stopped in its second step
    for file in (tmp_path / "out" / "checkpoint-2").iterdir():
        file.unlink()
    (tmp_path / "out" / "checkpoint-2").rmdir()
    resumed = script.main([*arguments, "--resume"])
    assert resumed.state.global_step == 2
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.model.state_dict().items())


@pytest.mark.parametrize("file", sorted((ROOT / "examples" / "accelerate").glob("*.yaml")), ids=lambda file: file.stem)
def test_accelerate_reads_its_configs(file):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(file))
    assert config.num_processes == 8 and config.mixed_precision == "bf16"
    expected = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero3": "DEEPSPEED"}
    assert config.distributed_type.value == expected[file.stem]
