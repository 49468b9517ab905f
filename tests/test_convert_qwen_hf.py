"""Qwen3-VL and Qwen2.5-VL of transformers as bases: equal models, processor, remote code, and what is refused."""

import json
import re
from pathlib import Path

import pytest
import torch
from contract_samples import GREEDY
from factories import (
    METHODS,
    TINY,
    stock_inputs,
    tiny_model,
    tiny_tokenizer,
    uncompressed,
)
from llava_checkpoints import stock_model
from PIL import Image
from qwen_models import BASES, batch_of, model_of
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from hf_vtc.auto import REMOTE_CODE_FROM_FOLDER
from hf_vtc.convert import convert, from_base
from hf_vtc.convert.refused import REFUSED_BASES
from hf_vtc.methods import RECORDS, record_named
from hf_vtc.models.host_vtc import GRID_BASES

pytestmark = pytest.mark.window


@pytest.fixture(scope="module", params=BASES)
def base(request):
    return request.param


# checkpoints


def stock_folder(base, folder):
    stock = uncompressed(model_of(base))
    stock.generation_config = GenerationConfig(pad_token_id=0)
    stock.save_pretrained(folder)
    return stock


def with_older_names(folder):
    """The names that files of Qwen2.5-VL on the Hub have."""
    weights = load_file(folder / "model.safetensors")
    names = {
        name: name.replace("model.visual.", "visual.").replace("model.language_model.", "model.") for name in weights
    }
    save_file(
        {names[name]: tensor for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )


def test_from_base_equals_the_stock_model_bit_for_bit(base, tmp_path):
    stock = stock_folder(base, tmp_path / "hf")
    fields = {"compress_layer_idx": 1, "compress_stride": 4}
    report = convert(tmp_path / "hf", tmp_path / "dst", "llavolta", **fields)
    assert not report.fresh_keys and not report.unused_keys and not report.missing_keys
    sources = [stock, tmp_path / "hf"]
    models = [from_base(source, "llavolta", **fields) for source in sources]
    models.append(AutoModelForImageTextToText.from_pretrained(tmp_path / "dst"))
    with_older_names(tmp_path / "hf")
    models.append(from_base(tmp_path / "hf", "llavolta", **fields))
    for model in models:
        assert (model.config.model_type, model.config.grid_base) == ("vtc_llavolta", base)
        batch = batch_of(model, 8, images_per_row=[2, 1], padding_side="left")
        with torch.no_grad():
            expected = stock(**stock_inputs(stock, batch)).logits
            assert torch.equal(model(**batch, vtc_budget="full").logits, expected)
            assert torch.equal(model(**batch).logits, models[0](**batch).logits)


@pytest.mark.skipif(not REMOTE_CODE_FROM_FOLDER, reason="remote code from a local folder needs transformers >= 5.11")
def test_remote_code_gives_the_same_logits(base, tmp_path, run_python):
    model = model_of(base)
    model.save_pretrained(tmp_path / "model")
    batch = dict(batch_of(model, 9, images_per_row=[1, 2]))
    with torch.no_grad():
        torch.save({"batch": batch, "logits": model(**batch).logits}, tmp_path / "expected.pt")
    script = """
import sys, torch
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
saved = torch.load(sys.argv[2])
with torch.no_grad():
    print(torch.equal(model(**saved["batch"]).logits, saved["logits"]), type(model).__module__.split(".")[0])
"""
    assert run_python(script, tmp_path / "model", tmp_path / "expected.pt").split() == ["True", "transformers_modules"]


def qwen_tokenizer():
    """The tiny tokenizer, whose placeholder is spelt as Qwen spells it."""
    backend = Tokenizer.from_str(tiny_tokenizer().backend_tokenizer.to_str().replace("<IMG_CONTEXT>", "<|image_pad|>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|endoftext|>", eos_token="<|im_end|>")


@pytest.mark.parametrize("named", (False, True))
def test_the_processor_of_the_base_is_kept(base, tmp_path, named):
    stock = stock_folder(base, tmp_path / "hf")
    qwen_tokenizer().save_pretrained(tmp_path / "hf")
    with pytest.raises(ValueError, match="preprocessor_config.json"):
        convert(tmp_path / "hf", tmp_path / "dst", "llavolta")
    vision = stock.config.vision_config
    images = Qwen2VLImageProcessor(patch_size=vision.patch_size, merge_size=2, min_pixels=64, max_pixels=4096)
    images.save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf" / "preprocessor_config.json"
    settings = json.loads(file.read_text())
    wanted = {"qwen3_vl": "Qwen3VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor"}[base]
    if named:
        file.write_text(json.dumps(settings | {"processor_class": "SomeProcessor"}))
    convert(tmp_path / "hf", tmp_path / "dst", "llavolta")
    kept = json.loads((tmp_path / "dst" / "preprocessor_config.json").read_text())
    assert kept == settings | {"processor_class": "SomeProcessor" if named else wanted}

    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "dst")
    inputs = AutoImageProcessor.from_pretrained(tmp_path / "dst")(
        [Image.new("RGB", (40, 24), "red"), Image.new("RGB", (17, 50))], return_tensors="pt"
    )
    counts = (inputs["image_grid_thw"].prod(-1) // 4).tolist()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "dst")
    ids = tokenizer("x".join("<|image_pad|>" * count for count in counts) + "x", return_tensors="pt")["input_ids"]
    assert model.count_visual_tokens(ids, **inputs, vtc_budget="full").tolist() == counts
    assert model.generate(ids, **inputs, **GREEDY).shape[1] == ids.shape[1] + GREEDY["max_new_tokens"]

    file.write_text(json.dumps(settings | {"auto_map": {"AutoImageProcessor": "x.Y"}}))
    with pytest.raises(ValueError, match="auto_map"):
        convert(tmp_path / "hf", tmp_path / "other", "llavolta")


# what is refused


def refused_by(method):
    return record_named(method).config.refused_bases


@pytest.mark.parametrize("method", [record.name for record in RECORDS.values() if record.config.refused_bases])
def test_methods_that_do_not_fit_are_refused_by_name(base, method, tmp_path):
    fields = TINY[f"llavolta on {base}"].config
    parts = {name: fields[name] for name in ("vision_config", "text_config")}
    if method != "convllava":
        with pytest.raises(ValueError, match=f"vtc_{method} does not fit {base}"):
            record_named(method).config(**parts)
    with pytest.raises(ValueError, match=f"{method} does not fit {base}"):
        from_base(uncompressed(model_of(base)), method)


def test_a_base_that_the_host_lacks_is_refused_with_the_version_it_needs(base, monkeypatch):
    from hf_vtc.convert import qwen_hf

    stock = uncompressed(model_of(base))
    monkeypatch.setattr(qwen_hf, "CONFIG_MAPPING", {})
    with pytest.raises(ImportError, match=f"{base} needs transformers >= {re.escape(GRID_BASES[base])}"):
        from_base(stock, "llavolta")


@pytest.mark.parametrize("model_type", sorted(REFUSED_BASES))
def test_other_bases_are_refused_by_name(model_type, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ValueError, match=f"'{model_type}', which no method fits yet: "):
        from_base(tmp_path, "llavolta")


TILED = ("internvl", "llava", "llava_next")
CASES = [(kind, name) for kind in TILED for name in ("vico", "vistog", "convllava") if kind in refused_by(name)]


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_bases_of_tiles_are_refused_with_the_reason(kind, method, tmp_path):
    stock = uncompressed(tiny_model("vico")) if kind == "internvl" else stock_model(kind)
    with pytest.raises(ValueError, match=f"{method} does not fit {kind}: {re.escape(refused_by(method)[kind])}"):
        from_base(stock, method)


def test_the_table_of_bases_has_no_blank():
    table = (Path(__file__).parents[1] / "docs" / "bases.md").read_text(encoding="utf-8")
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) >= 12
    for name, *cells in rows:
        assert len(cells) == len(METHODS), name
        assert all(cell.strip().startswith(("proven", "refused: ")) for cell in cells), name
