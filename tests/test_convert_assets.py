"""What `hf_vtc.convert` writes beside the weights: tokenizer, processor, generation settings, code."""

import json
from pathlib import Path

import pytest
from factories import tiny_tokenizer
from internvl_checkpoints import (
    IMAGE_TOKEN_ID,
    files_of,
    official_config,
    official_state,
    stock_model,
    with_tokenizer,
    write_checkpoint,
)
from transformers import AutoModelForImageTextToText, AutoProcessor

from hf_vtc.convert import convert, load_official


@pytest.fixture
def flash_folder(tmp_path: Path) -> Path:
    config = official_config()
    return write_checkpoint(tmp_path / "flash", config, official_state(config))


@pytest.mark.window
def test_tokenizer_and_processor_are_written(tmp_path):
    from PIL import Image

    token_id = with_tokenizer(tmp_path / "src")
    (tmp_path / "src" / "generation_config.json").write_text('{"max_new_tokens": 5, "do_sample": false}')
    report = convert(tmp_path / "src", tmp_path / "dst")
    assert report.has_processor
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "dst")
    processor = AutoProcessor.from_pretrained(tmp_path / "dst")
    assert model.config.image_token_id == processor.image_token_id == token_id
    assert processor.image_seq_length == model.config.image_seq_length == 16
    images = processor.image_processor
    assert (images.tiling, images.size["height"]) == ("dynamic", 16)
    assert (images.min_tiles, images.max_tiles, images.use_thumbnail) == (1, 6, True)
    assert model.generation_config.max_new_tokens == 5
    assert model.generation_config.eos_token_id == processor.tokenizer.convert_tokens_to_ids("<|im_end|>")

    inputs = processor(images=Image.new("RGB", (40, 16)), text="<IMG_CONTEXT> what?", return_tensors="pt")
    output = model.generate(**inputs, do_sample=False)
    assert output.shape[1] > inputs["input_ids"].shape[1]
    loaded = load_official(tmp_path / "src")
    assert loaded.config.image_token_id == token_id
    assert loaded.generation_config.eos_token_id == model.generation_config.eos_token_id


@pytest.mark.window
@pytest.mark.parametrize("written_by", ["nobody", "4", "5"])
def test_generic_tokenizers_of_every_version(tmp_path, written_by):
    token_id = with_tokenizer(tmp_path / "src")
    file = tmp_path / "src" / "tokenizer_config.json"
    config = json.loads(file.read_text())
    extra = config.pop("additional_special_tokens", None) or config.pop("extra_special_tokens")
    if written_by == "nobody":
        file.unlink()
    elif written_by == "4":
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": extra}
        file.write_text(json.dumps(config))
    else:
        config |= {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": extra}
        file.write_text(json.dumps(config))
    convert(tmp_path / "src", tmp_path / "dst")
    processor = AutoProcessor.from_pretrained(tmp_path / "dst")
    assert processor.image_token_id == token_id
    ids = processor.tokenizer("a<img><IMG_CONTEXT>b")["input_ids"]
    assert len(ids) == 4 and ids[2] == token_id


def test_processor_of_a_model_of_transformers(tmp_path):
    tokenizer = tiny_tokenizer()
    base = stock_model(vocab_size=len(tokenizer))
    base.config.image_token_id = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    base.save_pretrained(tmp_path / "hf")
    tokenizer.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "preprocessor_config.json").write_text('{"min_patches": 2, "max_patches": 5}')
    assert convert(tmp_path / "hf", tmp_path / "dst", "vico").has_processor
    processor = AutoProcessor.from_pretrained(tmp_path / "dst")
    assert (processor.image_processor.min_tiles, processor.image_processor.max_tiles) == (2, 5)
    assert processor.image_token_id == base.config.image_token_id


def test_without_a_tokenizer_the_model_alone_is_written(tmp_path, flash_folder):
    report = convert(flash_folder, tmp_path / "dst", image_token_id=IMAGE_TOKEN_ID)
    assert not report.has_processor
    assert any("no tokenizer" in note for note in report.notes)
    assert not (tmp_path / "dst" / "processor_config.json").exists()


def test_the_placeholder_must_be_known(tmp_path, flash_folder):
    with pytest.raises(ValueError, match="placeholder is unknown.*there is no tokenizer.*give `image_token_id`"):
        load_official(flash_folder)
    token_id = with_tokenizer(tmp_path / "src")
    with pytest.raises(ValueError, match=f"not clear: `image_token_id` says 3, .* says {token_id}"):
        load_official(tmp_path / "src", image_token_id=3)


def test_the_code_travels_on_request(tmp_path, flash_folder):
    convert(flash_folder, tmp_path / "with", image_token_id=IMAGE_TOKEN_ID)
    convert(flash_folder, tmp_path / "without", image_token_id=IMAGE_TOKEN_ID, save_code=False)
    assert "modeling_vico.py" in files_of(tmp_path / "with")
    assert files_of(tmp_path / "without") == {"config.json", "generation_config.json", "model.safetensors"}
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("with", "without")]
    assert ["auto_map" in config for config in configs] == [True, False]
