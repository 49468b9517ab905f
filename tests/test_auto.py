"""Auto classes: what importing hf_vtc registers, and `AutoModelForVision2Seq` on every supported transformers."""

import importlib
import textwrap

import factories
import pytest
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import hf_vtc
from hf_vtc import AutoModelForVision2Seq
from hf_vtc.methods import RECORDS, record_named

pytestmark = pytest.mark.window

# a checkpoint folder of somebody else, from the time when only this key was written
LEGACY_CODE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel


class LegacyConfig(PretrainedConfig):
    model_type = "legacy_for_test"

    def __init__(self, width=3, **kwargs):
        self.width = width
        super().__init__(**kwargs)


class LegacyModel(PreTrainedModel):
    config_class = LegacyConfig

    def __init__(self, config):
        super().__init__(config)
        self.linear = torch.nn.Linear(3, 3)
        self.post_init()

    def forward(self, x):
        return self.linear(x)
"""


@pytest.fixture
def legacy_folder(tmp_path, monkeypatch):
    """Folder with remote code whose `auto_map` has the key `AutoModelForVision2Seq` only."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "modeling_legacy.py").write_text(textwrap.dedent(LEGACY_CODE))
    monkeypatch.syspath_prepend(source)
    module = importlib.import_module("modeling_legacy")
    config = module.LegacyConfig()
    config.auto_map = {
        "AutoConfig": "modeling_legacy.LegacyConfig",
        "AutoModelForVision2Seq": "modeling_legacy.LegacyModel",
    }
    folder = tmp_path / "legacy"
    module.LegacyModel(config).save_pretrained(folder)
    (folder / "modeling_legacy.py").write_text(textwrap.dedent(LEGACY_CODE))
    yield folder
    del importlib.sys.modules["modeling_legacy"]


def entry_of(method):
    return record_named(method)


def test_every_listed_method_has_a_factory():
    assert sorted(record.name for record in RECORDS.values()) == sorted(factories.METHODS)


def test_auto_classes_build_each_method(method):
    entry = entry_of(method)
    assert type(AutoConfig.for_model(entry.config.model_type)) is entry.config
    config = factories.tiny_model(method).config
    assert type(AutoModel.from_config(config)) is entry.model
    assert type(AutoModelForImageTextToText.from_config(config)) is entry.head
    assert type(AutoModelForVision2Seq.from_config(config)) is entry.head


def test_auto_classes_load_each_method(method, saved):
    entry = entry_of(method)
    assert type(AutoConfig.from_pretrained(saved)) is entry.config
    assert type(AutoModel.from_pretrained(saved)) is entry.model
    assert type(AutoModelForImageTextToText.from_pretrained(saved)) is entry.head
    assert type(AutoProcessor.from_pretrained(saved)) is entry.processor
    assert type(AutoImageProcessor.from_pretrained(saved)) is entry.image_processor


def test_auto_model_for_vision2seq_loads_the_same_weights(method, saved):
    expected = AutoModelForImageTextToText.from_pretrained(saved).state_dict()
    model, loading = AutoModelForVision2Seq.from_pretrained(saved, output_loading_info=True)
    assert not loading["missing_keys"]
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_auto_model_for_vision2seq_passes_arguments_on(saved):
    model = AutoModelForVision2Seq.from_pretrained(saved, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16


def test_registering_twice_changes_nothing(method, saved):
    before = type(AutoModelForImageTextToText.from_pretrained(saved))
    importlib.reload(hf_vtc.models)
    assert type(AutoModelForImageTextToText.from_pretrained(saved)) is before
    assert type(AutoModelForVision2Seq.from_pretrained(saved)) is before


def test_auto_model_for_vision2seq_is_not_instantiated():
    with pytest.raises(OSError, match="from_pretrained"):
        AutoModelForVision2Seq()


def test_auto_model_for_vision2seq_registers_for_image_text_to_text():
    class OwnConfig(transformers.PretrainedConfig):
        model_type = "own_for_test"

    class OwnModel(transformers.PreTrainedModel):
        config_class = OwnConfig

    AutoModelForVision2Seq.register(OwnConfig, OwnModel)
    assert AutoModelForVision2Seq._model_mapping[OwnConfig] is OwnModel


def test_auto_model_for_vision2seq_loads_code_known_by_its_own_key(legacy_folder):
    for _ in range(2):
        model = AutoModelForVision2Seq.from_pretrained(legacy_folder, trust_remote_code=True)
        assert type(model).__name__ == "LegacyModel"
        assert type(model).__module__.startswith("transformers_modules")


def test_auto_model_for_vision2seq_sorts_the_arguments_of_remote_code(legacy_folder):
    model, loading = AutoModelForVision2Seq.from_pretrained(
        legacy_folder, trust_remote_code=True, width=5, dtype=torch.bfloat16, output_loading_info=True
    )
    assert model.config.width == 5
    assert model.dtype == torch.bfloat16
    assert not loading["missing_keys"]


def test_auto_model_for_vision2seq_takes_a_config_of_remote_code(legacy_folder):
    config = AutoConfig.from_pretrained(legacy_folder, trust_remote_code=True)
    keys = set(config.auto_map)
    loaded = AutoModelForVision2Seq.from_pretrained(legacy_folder, config=config, trust_remote_code=True)
    assert type(loaded).__name__ == "LegacyModel"
    built = AutoModelForVision2Seq.from_config(config, trust_remote_code=True)
    assert type(built).__name__ == "LegacyModel"
    assert set(config.auto_map) == keys


def test_auto_model_for_vision2seq_asks_for_trust(legacy_folder):
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForVision2Seq.from_pretrained(legacy_folder, trust_remote_code=False)


def test_auto_model_for_vision2seq_reports_a_missing_folder(tmp_path):
    with pytest.raises((OSError, ValueError)):
        AutoModelForVision2Seq.from_pretrained(tmp_path / "nowhere")


def test_install_vision2seq_serves_the_import_of_old_code(run_python):
    script = """
import hf_vtc
hf_vtc.install_vision2seq()
from transformers import AutoModelForVision2Seq
from transformers.models.auto import AutoModelForVision2Seq as same
assert AutoModelForVision2Seq is same is hf_vtc.AutoModelForVision2Seq
"""
    run_python(script, installed=True)


def test_importing_the_package_leaves_transformers_as_it_is(run_python):
    script = """
import transformers
before = "AutoModelForVision2Seq" in dir(transformers)
import hf_vtc
assert ("AutoModelForVision2Seq" in dir(transformers)) == before
"""
    run_python(script, installed=True)


def test_importing_the_package_stays_light(run_python):
    script = """
import sys
import hf_vtc
for heavy in ("peft", "matplotlib", "hf_vtc.trainers", "hf_vtc.convert", "hf_vtc.hub"):
    assert heavy not in sys.modules, heavy
assert hf_vtc.hub.export and "hf_vtc.hub" in sys.modules
"""
    run_python(script, installed=True)


def test_public_names():
    for name in hf_vtc.__all__:
        assert name in dir(hf_vtc)
        assert getattr(hf_vtc, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        hf_vtc.nonsense  # noqa: B018
