"""Records of methods: what each says, and that a tool names what is missing."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from factories import METHODS, random_batch, tiny_config, tiny_model, tiny_processor, tiny_tokenizer, uncompressed
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText
from typer.testing import CliRunner

import hf_vtc.trainers
from hf_vtc import bench, estimate
from hf_vtc.convert import convert, from_base
from hf_vtc.hub import export
from hf_vtc.lora import default_lora_config, full_precision_modules
from hf_vtc.methods import RECORDS, find_record, record_named, record_of, register, vico
from hf_vtc.plot import overlay
from hf_vtc.trainers import VistogTrainer, VtcTrainer
from hf_vtc.trainers.base import require_method
from hf_vtc.trainers.sharding import sharded_units
from hf_vtc_cli.app import app

PARTS = ("costs", "oracle", "draw", "compressor", "base", "sharding", "trainers")


@pytest.mark.parametrize("method", METHODS)
def test_records_are_complete(method):
    record = record_named(method)
    assert record is record_of(tiny_config(method)) is record_of(tiny_config(method).to_dict())
    assert all(record.need(part, "this test") is not None for part in PARTS)
    model = tiny_model(method)
    assert type(model) is record.head and type(model.model) is record.model and type(model.config) is record.config
    assert type(AutoModel.from_config(model.config)) is record.model
    modules = dict(model.named_modules())
    assert set(record.base.fresh_modules) | set(record.compressor(model.config)) <= modules.keys()
    assert record.base.fresh_fields.keys() <= vars(model.config).keys()


def test_every_trainer_of_a_method_is_named_by_its_record():
    named = {name for record in RECORDS.values() for name in record.trainers}
    offered = {name for name, each in vars(hf_vtc.trainers).items() if isinstance(each, type)}
    of_methods = {name for name in offered if issubclass(getattr(hf_vtc.trainers, name), VtcTrainer)} - {"VtcTrainer"}
    assert named == of_methods


@pytest.mark.parametrize("trainer", [VistogTrainer, type("Mine", (VistogTrainer,), {})])
def test_trainers_refuse_models_of_other_methods(trainer):
    require_method(trainer, tiny_model("vistog"))
    require_method(VtcTrainer, tiny_model("vico"))
    with pytest.raises(ValueError, match="must be of the method vistog, got `model_type` 'vtc_vico'"):
        trainer(tiny_model("vico"), stage=2)


def test_models_of_others_have_no_record():
    assert find_record({"model_type": "llava"}) is None and find_record({}) is None
    assert find_record({"model_type": ["vtc_vico"]}) is None
    with pytest.raises(ValueError, match="`model_type` must be one of .*vtc_vico.*, got 'llava'"):
        record_of({"model_type": "llava"})
    with pytest.raises(ValueError, match="The method must be one of .*vico.*, got 'pooling'"):
        record_named("pooling")


def test_a_method_that_is_not_known_here_is_refused_by_name():
    config = {**tiny_config("vico").to_dict(), "model_type": "vtc_later"}
    with pytest.raises(ValueError, match="'vtc_later' is the name of a method of hf_vtc of which there is no record"):
        estimate(config)


def test_register_refuses_names_that_are_taken_or_none():
    with pytest.raises(ValueError, match="Two methods are called 'vtc_vico'"):
        register(replace(vico.RECORD, config=type("Other", (vico.RECORD.config,), {})))
    with pytest.raises(ValueError, match="must begin with 'vtc_', got 'vico'"):
        register(replace(vico.RECORD, config=type("Other", (vico.RECORD.config,), {"model_type": "vico"})))
    assert record_named("vico") is vico.RECORD


class Tools:
    """What people do with a model of a method, each by the tool's own entry."""

    def __init__(self, folder: Path):
        self.folder, self.model = folder, tiny_model("vico")

    def estimate(self):
        estimate(self.model)

    def bench(self):
        batch = random_batch(self.model.config, torch.Generator().manual_seed(0), num_rows=1)
        bench(self.model, batch, repeats=1, warmup=0)

    def overlay(self):
        overlay(Image.new("RGB", (32, 32)), [True], tiny_processor("vico"), config=self.model.config)

    def run(self):
        self.model.save_pretrained(self.folder / "model")
        tiny_processor("vico").save_pretrained(self.folder / "model")
        Image.new("RGB", (32, 32)).save(self.folder / "page.png")
        arguments = ["--model", self.folder / "model", "--image", self.folder / "page.png", "--max-new-tokens", 1]
        picture = ["--save", self.folder / "kept.png", "--json"]
        result = CliRunner().invoke(app, ["run", *map(str, arguments + picture)])
        if result.exit_code:
            raise ValueError(result.stderr)
        json.loads(result.stdout)

    def lora(self):
        default_lora_config(self.model)

    def quantization(self):
        full_precision_modules(self.model.config)

    def export(self):
        export(self.model, tiny_processor("vico"), self.folder / "exported", check=False)

    def convert(self):
        base = uncompressed(self.model)
        base.save_pretrained(self.folder / "base")
        tiny_tokenizer().save_pretrained(self.folder / "base")
        convert(self.folder / "base", self.folder / "converted", "vico")
        AutoModelForImageTextToText.from_pretrained(self.folder / "converted")

    def from_base(self):
        from_base(uncompressed(self.model), "vico")

    def shard(self):
        sharded_units(self.model)


@pytest.mark.parametrize(
    "part, tool",
    [
        ("costs", "estimate"),
        ("costs", "bench"),
        # its card has a table of costs
        ("costs", "export"),
        ("oracle", "bench"),
        ("draw", "overlay"),
        ("draw", "run"),
        ("compressor", "lora"),
        ("compressor", "quantization"),
        ("base", "convert"),
        ("base", "from_base"),
        ("sharding", "shard"),
    ],
)
def test_tools_name_what_a_record_lacks(part, tool, tmp_path, monkeypatch):
    use = getattr(Tools(tmp_path), tool)
    use_again = getattr(Tools(tmp_path / "again"), tool)
    (tmp_path / "again").mkdir()
    use()
    monkeypatch.setitem(RECORDS, "vtc_vico", replace(vico.RECORD, **{part: None}))
    with pytest.raises(ValueError, match=f"The record of 'vtc_vico' has no `{part}`, which .* needs"):
        use_again()
    assert not (tmp_path / "again" / "exported").exists() and not (tmp_path / "again" / "converted").exists()
