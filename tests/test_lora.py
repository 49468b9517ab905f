"""LoRA on every method: what trains, what an adapter file holds, and that it comes back as it was."""

import copy

import peft
import pytest
import torch
import transformers
from conftest import METHOD_NAMES
from factories import random_batch, tiny_model, tiny_processor
from packaging.version import Version
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from trainer_helpers import arguments, changed, snapshot
from transformers import AutoModelForImageTextToText, Trainer
from transformers.integrations.peft import MIN_PEFT_VERSION

from hf_vtc.data import VtcCollator
from hf_vtc.lora import compressor_modules, default_lora_config, full_precision_modules, quantization_config

# routers, which the loss of the language model does not reach
UNTAUGHT = ("model.router",)


def taught_modules(config):
    return [name for name in compressor_modules(config) if name not in UNTAUGHT]


def batch_for(model, num_rows=3):
    return random_batch(model.config, torch.Generator().manual_seed(0), num_rows=num_rows)


def with_adapter(method, base=None):
    """A model whose adapter and compressor copies are far from where they start."""
    base = base or tiny_model(method)
    model = get_peft_model(base, default_lora_config(base, r=4)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def logits_of(model, batch):
    return model.eval()(**batch).logits


def assert_same_weights(model, expected):
    expected = expected.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert not [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, expected[name])]


def plain_name(name):
    """The name of a parameter in the model that PEFT wraps."""
    return name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")


def test_compressor_modules_are_modules(method):
    model = tiny_model(method)
    names = compressor_modules(model.config)
    assert names and all(isinstance(model.get_submodule(name), nn.Module) for name in names)
    # with tower, decoder and head they are the whole model, but for the bare parameter of a newline
    known = (*(f"{name}." for name in names), "model.vision_tower.", "model.language_model.", "lm_head.")
    assert {name for name in model.state_dict() if not name.startswith(known)} <= {"model.image_newline"}


def test_default_lora_config_trains_adapters_and_compressor_alone(method):
    model = get_peft_model(tiny_model(method), default_lora_config(tiny_model(method)))
    parts = tuple(f"{name}." for name in taught_modules(model.config))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    adapters = {name for name in trained if ".lora_" in name}
    assert adapters and all(name.startswith("base_model.model.model.language_model.layers.") for name in adapters)
    layers = {name.rpartition(".lora_")[0].rpartition(".")[2] for name in adapters}
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    compressor = {name for name in trained - adapters if ".modules_to_save.default." in name}
    assert compressor == trained - adapters
    own = {name for name, _ in tiny_model(method).named_parameters() if name.startswith(parts)}
    assert {plain_name(name) for name in compressor} == own


def test_default_lora_config_leaves_parts_out(method):
    model = tiny_model(method)
    first = compressor_modules(model.config)[0]
    for chosen in ((), (first,)):
        adapted = get_peft_model(copy.deepcopy(model), default_lora_config(model, compressor=chosen))
        trained = [plain_name(name) for name, parameter in adapted.named_parameters() if parameter.requires_grad]
        others = {name for name in trained if ".lora_" not in name}
        assert all(name.startswith(f"{first}.") for name in others) and bool(others) == bool(chosen)
    config = default_lora_config(model, r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], use_rslora=True)
    adapted = get_peft_model(copy.deepcopy(model), config)
    names = {name.split(".lora_")[0].rpartition(".")[2] for name, _ in adapted.named_parameters() if ".lora_" in name}
    assert names == {"q_proj", "v_proj"}
    assert (config.r, config.lora_alpha, config.use_rslora, config.task_type) == (2, 8, True, "CAUSAL_LM")


def test_saved_adapter_holds_the_compressor_and_comes_back_bit_for_bit(method, tmp_path):
    model = with_adapter(method)
    batch = batch_for(model)
    expected = logits_of(model, batch)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    parts = tuple(f"base_model.model.{name}." for name in taught_modules(model.config))
    whole = {f"base_model.model.{name}" for name in tiny_model(method).state_dict()}
    assert {name for name in whole if name.startswith(parts)} == {name for name in saved if ".lora_" not in name}

    reloaded = PeftModel.from_pretrained(tiny_model(method), tmp_path)
    assert not torch.equal(logits_of(tiny_model(method), batch), expected)
    assert torch.equal(logits_of(reloaded, batch), expected)
    with torch.no_grad():
        assert torch.equal(
            reloaded.generate(**batch, max_new_tokens=4, do_sample=False),
            model.generate(**batch, max_new_tokens=4, do_sample=False),
        )


def test_merged_model_is_an_ordinary_one(method, tmp_path):
    model = with_adapter(method)
    batch = batch_for(model)
    expected = logits_of(model, batch)
    merged = model.merge_and_unload()
    assert set(merged.state_dict()) == set(tiny_model(method).state_dict())
    assert (logits_of(merged, batch) - expected).abs().max() < 1e-5
    merged.save_pretrained(tmp_path, save_code=False)
    assert_same_weights(AutoModelForImageTextToText.from_pretrained(tmp_path), merged)


def train(model, folder, processor, records):
    trainer = Trainer(
        model=model,
        args=arguments(folder, max_steps=2, per_device_train_batch_size=3, learning_rate=1e-2),
        train_dataset=records,
        data_collator=VtcCollator(processor),
    )
    trainer.args.remove_unused_columns = False
    return trainer.train()


def make_records(num_records=6):
    from test_data import assistant, image, user

    shown = {"type": "image"}
    return [
        {"messages": [user(shown, "how many?"), assistant(f"{idx} boxes")], "images": [image(60, 40, idx)]}
        if idx % 3
        else {"messages": [user("hello"), assistant("good day")]}
        for idx in range(num_records)
    ]


def test_trainer_teaches_an_adapter_and_goes_on_from_a_saved_one(method, tmp_path):
    """Everything that should train moves, nothing else does by a bit; a saved adapter trains on."""
    processor, base = tiny_processor(method), tiny_model(method)
    adapted = get_peft_model(base, default_lora_config(base, r=4))
    for folder in ("first", "second"):
        before = snapshot(adapted)
        trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
        train(adapted, tmp_path / folder, processor, make_records())
        moved = changed(adapted, before)
        assert moved <= trained and not [name for name in trained if plain_name(name).startswith(UNTAUGHT)]
        still = trained - moved
        # of a fresh adapter, A has no gradient as long as B is zero; keys of a softmax have no use for a bias
        assert not {name for name in still if not name.endswith(("k_proj.bias",))}, still
        adapted.save_pretrained(tmp_path / "adapter")
        expected = logits_of(adapted, batch_for(adapted))
        adapted = PeftModel.from_pretrained(tiny_model(method), tmp_path / "adapter", is_trainable=True)
        assert {name for name, parameter in adapted.named_parameters() if parameter.requires_grad} == trained
        assert torch.equal(logits_of(adapted, batch_for(adapted)), expected)


@pytest.mark.parametrize("budget", ("full", 0.5))
def test_a_step_runs_no_router_that_it_does_not_teach(budget):
    """AVG-LLaVA's takes longer than the language model, and nothing reads it where a budget decides."""
    base = tiny_model("avg_llava")
    adapted = get_peft_model(base, default_lora_config(base, r=4)).train()
    ran = []
    base.model.router.register_forward_hook(lambda module, args, output: ran.append(1))
    batch = batch_for(adapted)
    adapted(**batch, labels=batch["input_ids"], vtc_budget=budget).loss.backward()
    assert not ran
    adapted(**batch, labels=batch["input_ids"]).loss.backward()
    assert ran == [1]


@pytest.mark.parametrize("method", ("vico", "avg_llava"))
def test_a_frozen_router_that_chooses_has_no_graph(method):
    """Nothing goes back through it: the others have the gradients that they have beside one that trains."""
    found = []
    for frozen in (False, True):
        model = tiny_model(method).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.model.router.requires_grad_(not frozen)
        batch = batch_for(model)
        out = model(**batch, labels=batch["input_ids"])
        out.loss.backward()
        assert out.router_logits.requires_grad != frozen
        found.append(
            {name: each.grad for name, each in model.named_parameters() if not name.startswith("model.router.")}
        )
    beside, alone = found
    assert beside.keys() == alone.keys()
    for name, gradient in beside.items():
        assert gradient is None and alone[name] is None or torch.equal(gradient, alone[name]), name


@pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason=f"`load_adapter` of transformers {transformers.__version__} asks for peft >= {MIN_PEFT_VERSION}, this is "
    f"{peft.__version__}; PeftModel works",
)
def test_adapter_folder_loads_by_the_auto_class(method, saved, tmp_path):
    adapted = with_adapter(method, AutoModelForImageTextToText.from_pretrained(saved))
    adapted.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert loaded.active_adapters() == ["default"]
    assert_same_weights(loaded, adapted.get_base_model())
    batch = batch_for(adapted)
    # equal weights; convolutions round differently where a file left them at odd addresses
    assert (logits_of(loaded, batch) - logits_of(adapted, batch)).abs().max() < 1e-5


REMOTE = """
from pathlib import Path
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText
target, *folders = sys.argv[1:]
for folder in folders:
    print(folder, file=sys.stderr)
    given = Path(target, Path(folder).name)
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    model = PeftModel.from_pretrained(model, str(given)).eval()
    with torch.no_grad():
        torch.save(model(**torch.load(given / "batch.pt")).logits, given / "logits.pt")
"""


def test_adapters_fit_remote_code(every_saved, run_python, tmp_path):
    """Trained with the package installed, used where it is not; all methods in one process, which is slow to start."""
    expected = {}
    for method, folder in zip(METHOD_NAMES, every_saved):
        adapter = tmp_path / folder.name
        model = with_adapter(method)
        model.save_pretrained(adapter)
        batch = batch_for(model)
        torch.save(dict(batch), adapter / "batch.pt")
        local = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(folder), adapter)
        expected[method] = logits_of(local, batch)
    run_python(REMOTE, tmp_path, *every_saved)
    for method, folder in zip(METHOD_NAMES, every_saved):
        assert torch.equal(torch.load(tmp_path / folder.name / "logits.pt"), expected[method]), method


def test_quantization_reaches_the_decoder_alone(method):
    should_convert = pytest.importorskip(
        "transformers.quantizers.quantizers_utils", reason="transformers 4.57 has the rule inside of its loop"
    ).should_convert_module
    model = tiny_model(method)
    skipped = quantization_config(model).llm_int8_skip_modules
    assert skipped == full_precision_modules(model.config)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    quantized = {name for name in linear if should_convert(name, skipped)}
    assert quantized == {name for name in linear if name.startswith("model.language_model.")}
    assert not [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]


def test_quantization_config_takes_a_configuration_and_fields():
    config = tiny_model("vico").config
    default = quantization_config(config)
    assert default.load_in_4bit and default.bnb_4bit_quant_type == "nf4" and default.bnb_4bit_use_double_quant
    eight = quantization_config(config, load_in_8bit=True, llm_int8_skip_modules=["model.language_model.layers.0"])
    assert eight.load_in_8bit and not eight.load_in_4bit
    assert eight.llm_int8_skip_modules == [*full_precision_modules(config), "model.language_model.layers.0"]


def test_names_are_checked():
    model = tiny_model("vico")
    with pytest.raises(ValueError, match="`compressor` must be some of model.multi_modal_projector"):
        default_lora_config(model, compressor=["model.vision_tower"])
    with pytest.raises(ValueError, match="`target_modules` must be some of down_proj"):
        default_lora_config(model, target_modules=["query"])
    with pytest.raises(ValueError, match="give the model with its head"):
        default_lora_config(model.model)
    with pytest.raises(ValueError, match="`model_type` must be one of .*vtc_vico, .*, got 'qwen3'"):
        compressor_modules(model.config.text_config)
