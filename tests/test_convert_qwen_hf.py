"""Qwen3-VL and Qwen2.5-VL of transformers as bases: equal models and processor, and what is refused."""

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
    AutoProcessor,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
)

from hf_vtc.convert import convert, from_base
from hf_vtc.convert.refused import REFUSED_BASES
from hf_vtc.methods import RECORDS, record_named
from hf_vtc.models.host_vtc import GRID_BASES, RELEASE

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


def qwen_tokenizer():
    """The tiny tokenizer, whose placeholder is spelt as Qwen spells it."""
    backend = Tokenizer.from_str(tiny_tokenizer().backend_tokenizer.to_str().replace("<IMG_CONTEXT>", "<|image_pad|>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|endoftext|>", eos_token="<|im_end|>")


def stock_images(**settings):
    # that of PIL, whose name the releases differ about
    try:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    except ImportError:
        return Qwen2VLImageProcessor(**settings)
    return Qwen2VLImageProcessorPil(**settings)


def converted_images(base, folder, settings):
    """The image processor of what a folder with these settings becomes."""
    if not (folder / "hf").exists():
        stock_folder(base, folder / "hf")
        qwen_tokenizer().save_pretrained(folder / "hf")
    (folder / "hf" / "preprocessor_config.json").write_text(json.dumps(settings))
    convert(folder / "hf", folder / "dst", "llavolta")
    return AutoProcessor.from_pretrained(folder / "dst").image_processor


def test_the_processor_gives_what_that_of_the_base_gives(base, tmp_path):
    stock = stock_folder(base, tmp_path / "hf")
    qwen_tokenizer().save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    vision = stock.config.vision_config
    images = stock_images(
        patch_size=vision.patch_size, merge_size=2, min_pixels=512, max_pixels=4096, image_mean=[0.5] * 3
    )
    images.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "dst", "llavolta")
    processor = AutoProcessor.from_pretrained(tmp_path / "dst")
    assert (processor.chat_template, processor.image_token) == ("{{ messages }}", "<|image_pad|>")
    noise = torch.randint(256, (90, 130, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pictures = [Image.fromarray(noise.numpy()).resize(size) for size in ((130, 90), (40, 24), (17, 50), (9, 9))]
    expected = images(pictures, return_tensors="pt")
    counts = (expected["image_grid_thw"].prod(-1) // 4).tolist()
    inputs = processor(images=pictures, text=["x".join(["<|image_pad|>"] * 4) + "x"], return_tensors="pt")
    assert torch.equal(inputs["image_grid_thw"], expected["image_grid_thw"])
    # 255 is divided by here, and its inverse is multiplied with there
    torch.testing.assert_close(inputs["pixel_values"], expected["pixel_values"], rtol=0, atol=1e-6)
    assert [processor.reserved_tokens(picture.height, picture.width) for picture in pictures] == counts

    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "dst")
    assert model.count_visual_tokens(**inputs, vtc_budget="full").tolist() == counts
    # what the processor of the base returns is taken as well
    for given in (inputs, {**inputs, **expected, "mm_token_type_ids": torch.zeros_like(inputs["input_ids"])}):
        length = inputs["input_ids"].shape[1] + GREEDY["max_new_tokens"]
        assert model.generate(**given, **GREEDY).shape[1] == length


@pytest.mark.parametrize(
    ("name", "value"),
    (
        ("patch_size", 3),
        ("merge_size", 4),
        ("temporal_patch_size", 1),
        ("do_resize", False),
        ("do_convert_rgb", False),
        ("do_center_crop", True),
        ("do_pad", True),
        ("data_format", "channels_last"),
        ("rescale_factor", 1 / 127),
    ),
)
def test_settings_of_another_image_processor_are_refused(base, tmp_path, name, value):
    with pytest.raises(ValueError, match=f"`{name}` of the image processor must be"):
        converted_images(base, tmp_path, {name: value})


def test_settings_that_nobody_knows_are_refused(base, tmp_path):
    with pytest.raises(ValueError, match="`do_sharpen` of the image processor is not known"):
        converted_images(base, tmp_path, {"do_sharpen": True})
    for size in ({"height": 64, "width": 64}, 64):
        with pytest.raises(ValueError, match="`size` of the image processor must be limits in pixels"):
            converted_images(base, tmp_path, {"size": size})


@pytest.mark.parametrize(
    "settings",
    (
        {},
        {"do_rescale": False},
        {"do_normalize": False},
        {"resample": 2},
        {"image_mean": [0.1, 0.2, 0.3]},
        {"image_std": [0.5, 0.6, 0.7]},
        {"size": {"shortest_edge": 3000, "longest_edge": 5000}},
        {"size": {"shortest_edge": 3000, "longest_edge": 5000}, "min_pixels": 512, "max_pixels": 1024},
        {"rescale_factor": 1 / 255, "do_convert_rgb": True, "crop_size": None, "input_data_format": None},
    ),
)
def test_settings_of_the_image_processor_are_honoured(base, tmp_path, settings):
    patch_size = uncompressed(model_of(base)).config.vision_config.patch_size
    # beside what every file says; the host's own defaults are those of other towers
    size = {"shortest_edge": 512, "longest_edge": 4096}
    given = {"patch_size": patch_size, "merge_size": 2, "size": size} | settings
    noise = torch.randint(256, (50, 70, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    picture, limits = Image.fromarray(noise.numpy()), {}
    if RELEASE < (5, 0):
        # 4.57 does not read `size` of a file
        limits = {"min_pixels": given["size"]["shortest_edge"], "max_pixels": given["size"]["longest_edge"]}
    expected = stock_images(**limits | given)([picture], return_tensors="pt")
    inputs = converted_images(base, tmp_path, given)([picture], return_tensors="pt")
    assert torch.equal(inputs["image_grid_thw"], expected["image_grid_thw"])
    largest = float(expected["pixel_values"].abs().max())
    torch.testing.assert_close(inputs["pixel_values"], expected["pixel_values"], rtol=0, atol=1e-6 * largest)


def test_older_names_of_limits_are_read(base, tmp_path):
    images = converted_images(base, tmp_path, {"size": {"min_pixels": 512, "max_pixels": 1024}})
    assert (images.min_pixels, images.max_pixels) == (512, 1024)


# videos


def video_folder(base, folder, images=None, videos=None):
    """A stock folder whose tokenizer knows the placeholder of videos, and its settings."""
    names = {"<|im_start|>": "<|video_pad|>", "<img>": "<|vision_start|>", "</img>": "<|vision_end|>"}
    text = qwen_tokenizer().backend_tokenizer.to_str()
    for ours, theirs in names.items():
        text = text.replace(ours, theirs)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(text), pad_token="<|endoftext|>", eos_token="<|im_end|>"
    )
    model = tiny_model(f"llavolta on {base}", video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"))
    uncompressed(model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    own = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(own | (images or {})))
    if videos is not None:
        (folder / "video_preprocessor_config.json").write_text(json.dumps(own | videos))
    return folder


def test_videos_are_taken_as_the_base_takes_them(base, tmp_path):
    settings = {"size": {"shortest_edge": 128, "longest_edge": 2048}, "min_frames": 2, "processor_class": "X"}
    convert(video_folder(base, tmp_path / "hf", videos=settings), tmp_path / "dst", "llavolta")
    processor = AutoProcessor.from_pretrained(tmp_path / "dst")
    sampling = {"qwen3_vl": (True, 2), "qwen2_5_vl": (False, None)}[base]
    video = processor.video
    assert (video["min_pixels"], video["max_pixels"], video["min_frames"]) == (128, 2048, 2)
    assert (video["do_sample_frames"], video["fps"], video["base"]) == (*sampling, base)
    frames = [Image.new("RGB", (24, 16), colour) for colour in ("red", "blue", "green", "white")]
    inputs = processor(
        text="a<|vision_start|><|video_pad|><|vision_end|>b",
        videos=frames,
        video_metadata={"fps": 2},
        return_tensors="pt",
    )
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "dst")
    assert model.count_visual_tokens(**inputs, vtc_budget="full").tolist() == [12]
    assert model.generate(**inputs, **GREEDY).shape[1] > inputs["input_ids"].shape[1]


def test_videos_without_settings_of_their_own_have_those_of_images(base, tmp_path):
    convert(video_folder(base, tmp_path / "hf", {"min_pixels": 512, "max_pixels": 4096}), tmp_path / "dst", "llavolta")
    video = AutoProcessor.from_pretrained(tmp_path / "dst").video
    assert (video["min_pixels"], video["max_pixels"]) == (512, 4096)


@pytest.mark.parametrize(
    ("settings", "reason"),
    (
        ({"cap_pixels_per_frame": True}, "`cap_pixels_per_frame` of the video processor must be False"),
        ({"image_mean": [0.1] * 3}, "`image_mean` of the video processor must be that of the image processor"),
        ({"do_rescale": False}, "`do_rescale` of the video processor must be that of the image processor"),
        ({"temporal_patch_size": 3}, "`temporal_patch_size` of the video processor must be 2"),
        ({"do_slow_motion": True}, "`do_slow_motion` of the video processor is not known"),
        ({"fps": 2, "num_frames": 4}, "Give one of them"),
    ),
)
def test_videos_that_are_taken_otherwise_are_refused_with_the_reason(base, tmp_path, settings, reason):
    report = convert(video_folder(base, tmp_path / "hf", videos=settings), tmp_path / "dst", "llavolta")
    assert any(re.search(reason, note) for note in report.notes)
    processor = AutoProcessor.from_pretrained(tmp_path / "dst")
    with pytest.raises(ValueError, match="`videos` and `audio` are not supported"):
        processor(text="<|video_pad|>", videos=[Image.new("RGB", (24, 16))] * 2)


def test_a_vocabulary_without_the_placeholder_of_videos(base, tmp_path):
    stock_folder(base, tmp_path / "hf")
    qwen_tokenizer().save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "dst", "llavolta")
    assert AutoProcessor.from_pretrained(tmp_path / "dst").video is None
    stock = uncompressed(tiny_model(f"llavolta on {base}"))
    stock.config.video_token_id = 10**6
    assert from_base(stock, "llavolta").config.video_token_id is None


# what is refused


def refused_by(method):
    return record_named(method).config.refused_bases


@pytest.mark.parametrize(
    "method", [record.name for record in RECORDS.values() if "qwen3_vl" in record.config.refused_bases]
)
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
