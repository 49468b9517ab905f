"""Arguments of processors: every unknown one is refused by its name, wherever it is given, and known ones count."""

import json

import numpy as np
import pytest
import torch
from factories import tiny_processor, tiny_tokenizer
from PIL import Image
from transformers import AutoProcessor
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import hf_vtc.models  # noqa: F401 - registers the Auto classes
from hf_vtc.models.image_processing_vtc import VtcImageProcessor
from hf_vtc.models.processing_vtc import VtcProcessor

pytestmark = pytest.mark.window

IMAGE = "<IMG_CONTEXT>"
TOKENIZED = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
# how transformers, the original repositories and fingers spell arguments, and what is meant
MISNAMED = {
    "max_patches": "max_tiles",
    "max_num": "max_tiles",
    "min_patches": "min_tiles",
    "max_tile": "max_tiles",
    "image_aspect_ratio": "tiling",
    "crop_size": "size",
    "do_normalise": "do_normalize",
    "grid_pinpoints": "image_grid_pinpoints",
}


def noise(height=40, width=70):
    return Image.effect_noise((width, height), 60).convert("RGB")


def chat(image=None):
    return [{"role": "user", "content": [{"type": "image", "image": image or noise()}, {"type": "text", "text": "a"}]}]


def meant(name, known):
    return rf"has no argument `{name}` \(did you mean `{known}`\?\)"


@pytest.mark.parametrize(("name", "known"), MISNAMED.items())
def test_misnamed_fields_of_images_are_refused_wherever_they_are_given(name, known, tmp_path):
    processor = tiny_processor()
    images = processor.image_processor
    processor.save_pretrained(tmp_path / "processor", save_code=False)
    images.save_pretrained(tmp_path / "images", save_code=False)
    given = {name: 1}
    calls = (
        lambda: processor(text=IMAGE, images=noise(), **given),
        lambda: processor(text="no image", **given),
        lambda: processor(text=IMAGE, images=noise(), images_kwargs=given),
        lambda: processor.apply_chat_template(chat(), **TOKENIZED, **given),
        lambda: processor.apply_chat_template(chat(), **TOKENIZED, processor_kwargs=given),
        lambda: processor.apply_chat_template(chat(), **given),
        lambda: processor._get_num_multimodal_tokens(image_sizes=[[40, 70]], **given),
        lambda: processor.reserved_tokens(40, 70, **given),
        lambda: images(noise(), **given),
        lambda: images.preprocess(noise(), **given),
        lambda: images.get_tile_layout(40, 70, **given),
        lambda: images.get_model_size(40, 70, **given),
        lambda: images.padded_size([(40, 70)], **given),
        lambda: images.check_sizes([(40, 70)], **given),
        lambda: images.get_number_of_image_patches(40, 70, given),
        lambda: VtcImageProcessor(**given),
        lambda: AutoImageProcessor.from_pretrained(tmp_path / "images", **given),
        lambda: AutoProcessor.from_pretrained(tmp_path / "processor", **given),
    )
    for call in calls:
        with pytest.raises(ValueError, match=meant(name, known)):
            call()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"vtc_bugdet": 0.5}, meant("vtc_bugdet", "vtc_budget")),
        ({"budget": 0.5}, meant("budget", "vtc_budget")),
        ({"paddin": True}, meant("paddin", "padding")),
        ({"return_tensor": "pt"}, meant("return_tensor", "return_tensors")),
        ({"do_resize": False}, "has no argument `do_resize`"),
        ({"rescale_factor": 1.0}, "has no argument `rescale_factor`"),
        ({"num_frames": 8}, "has no argument .*`num_frames`"),
        ({"text_kwargs": {"paddin": True}}, "`text_kwargs` of `VtcProcessor` has no argument `paddin`"),
        ({"text_kwargs": {"max_tiles": 1}}, "`text_kwargs` of `VtcProcessor` has no argument `max_tiles`"),
        ({"images_kwargs": {"padding": True}}, "`images_kwargs` of `VtcProcessor` has no argument `padding`"),
        ({"videos_kwargs": {"fps": 1}}, "`videos_kwargs` of `VtcProcessor` has no argument `fps`"),
        ({"audio_kwargs": {"sampling_rate": 1}}, "`audio_kwargs` of `VtcProcessor` has no argument `sampling_rate`"),
        ({"common_kwargs": {"return_tensor": "pt"}}, "`common_kwargs` of `VtcProcessor` has no argument"),
        ({"image_kwargs": {"max_tiles": 1}}, meant("image_kwargs", "images_kwargs")),
    ],
    ids=str,
)
def test_other_arguments_of_a_call_are_refused(call, words):
    processor = tiny_processor()
    with pytest.raises(ValueError, match=words):
        processor(text=IMAGE, images=noise(), **call)
    with pytest.raises(ValueError, match=words):
        processor.apply_chat_template(chat(), **TOKENIZED, processor_kwargs=call)


def test_arguments_of_chats_are_refused_or_read():
    processor = tiny_processor()
    with pytest.raises(ValueError, match=meant("add_generation_promt", "add_generation_prompt")):
        processor.apply_chat_template(chat(), add_generation_promt=True)
    for name in ("tools", "documents"):
        with pytest.raises(ValueError, match=f"`{name}` is of no use: the chat template does not write them"):
            processor.apply_chat_template(chat(), **{name: [{"title": "a"}]})
        processor.apply_chat_template(chat(), **{name: None})
    # what only a template reads is its own business
    template = "{{ messages[0]['content'][1]['text'] }}{% if enable_thinking %} aloud{% endif %}"
    text = [{"role": "user", "content": [{"type": "text", "text": ""}, {"type": "text", "text": "think"}]}]
    assert processor.apply_chat_template(text, chat_template=template, enable_thinking=True) == "think aloud"
    out = processor.apply_chat_template(text, chat_template=template, enable_thinking=True, **TOKENIZED)
    assert processor.decode(out["input_ids"][0]) == "think aloud"
    with pytest.raises(ValueError, match="`enable_thinking`"):
        processor.apply_chat_template(text, enable_thinking=True)


def test_flat_arguments_count_beside_nested_ones():
    processor = tiny_processor(return_layout=True)
    out = processor(
        text=[f"{IMAGE} a", f"{IMAGE} abcdefg"],
        images=[noise(32, 64), noise(32, 64)],
        max_tiles=1,
        padding=False,
        images_kwargs={"use_thumbnail": False},
        text_kwargs={"add_special_tokens": True},
    )
    assert out["num_tiles"].tolist() == [1, 1]
    assert len(out["input_ids"][0]) != len(out["input_ids"][1])
    out = processor(text=IMAGE, images=noise(), images_kwargs={"max_tiles": 1}, return_tensors="pt")
    assert isinstance(out["input_ids"], torch.Tensor) and isinstance(out["pixel_values"], torch.Tensor)
    for twice in (
        {"max_tiles": 1, "images_kwargs": {"max_tiles": 2}},
        {"padding": True, "text_kwargs": {"padding": 1}},
    ):
        with pytest.raises(ValueError, match="twice|two times"):
            processor(text=IMAGE, images=noise(), **twice)


def test_text_and_images_in_the_wrong_order_are_named():
    processor = tiny_processor()
    order = r"The order is `processor\(images, text\)`"
    for image in (noise(), np.zeros((8, 8, 3), np.uint8), torch.zeros(3, 8, 8)):
        with pytest.raises(ValueError, match=f"`text` must be a string or a list of strings, got .*{order}"):
            processor(f"{IMAGE} hi", image)
    with pytest.raises(ValueError, match="must be a string or a list of strings"):
        processor([f"{IMAGE} hi"], [noise()])
    for prompt in (f"{IMAGE} hi", "what is this?"):
        with pytest.raises(OSError, match=r"If it is a prompt, name it: `processor\(text=...\)`"):
            processor(prompt)
    right = processor(noise(), f"{IMAGE} hi")
    assert right["input_ids"] == processor(text=f"{IMAGE} hi", images=noise())["input_ids"]


UNIT = np.random.default_rng(0).random((40, 70, 3), dtype=np.float32)
# everything that is taken as 0..1
UNITS = {
    "float32 array": UNIT,
    "float16 array": UNIT.astype(np.float16),
    "boolean array": UNIT > 0.5,
    "float32 tensor": torch.tensor(UNIT),
    "bfloat16 tensor": torch.tensor(UNIT).bfloat16(),
    "boolean tensor": torch.tensor(UNIT > 0.5),
    "float PIL image": Image.fromarray(UNIT[:, :, 0]),
}


@pytest.mark.parametrize("nest", [lambda unit: unit, lambda unit: [[unit]], lambda unit: [[noise(), unit]]])
@pytest.mark.parametrize("kind", UNITS)
def test_pixels_in_0_to_1_are_not_left_unscaled(kind, nest):
    images = nest(UNITS[kind])
    text = IMAGE * (len(images[0]) if isinstance(images, list) else 1)
    processor, kept = tiny_processor(), tiny_processor(do_rescale=False)
    calls = (
        lambda: processor(text=text, images=images, do_rescale=False),
        lambda: processor(text=text, images=images, images_kwargs={"do_rescale": False}),
        lambda: kept(text=text, images=images),
        lambda: processor.image_processor(images, do_rescale=False),
        lambda: kept.image_processor(images),
    )
    for call in calls:
        with pytest.raises(
            ValueError, match="`do_rescale=False` keeps pixels in 0..255, but `images` holds floats or"
        ):
            call()
    processor(text=text, images=images)
    kept(text=text, images=images, do_rescale=True)


def test_rescaled_floats_are_what_8_bit_pixels_are():
    processor, levels = tiny_processor().image_processor, np.rint(UNIT * 255).astype(np.uint8)
    expected = processor(levels)["pixel_values"]
    for unit in (UNIT, torch.tensor(UNIT).permute(2, 0, 1)):
        assert np.array_equal(processor(unit)["pixel_values"], expected)
    raw = processor(levels, do_rescale=False, do_normalize=False)["pixel_values"]
    assert raw.max() > 1 and np.array_equal(raw, np.rint(raw))


def test_fields_beside_a_folder_are_checked_and_count(tmp_path):
    processor = tiny_processor()
    processor.save_pretrained(tmp_path, save_code=False)
    for load in (AutoProcessor, VtcProcessor):
        loaded = load.from_pretrained(tmp_path, max_tiles=2, image_end_token=None)
        assert loaded.image_processor.max_tiles == 2 and loaded.image_end_token is None
        for bad, words in (
            ({"max_tiles": 0}, "`min_tiles` and `max_tiles`"),
            ({"tiling": "grid"}, "`tiling` must be one of"),
            ({"image_seq_len": 4}, meant("image_seq_len", "image_seq_length")),
            ({"count_rules": "tiles"}, meant("count_rules", "count_rule")),
        ):
            with pytest.raises(ValueError, match=words):
                load.from_pretrained(tmp_path, **bad)
        # what a tokenizer or the host reads is theirs
        load.from_pretrained(tmp_path, use_fast=True, model_max_length=64, trust_remote_code=False)


@pytest.mark.parametrize("place", ["processor", "image_processor"])
def test_fields_that_a_file_has_too_many_are_named(place, tmp_path):
    tiny_processor().save_pretrained(tmp_path, save_code=False)
    file = tmp_path / "processor_config.json"
    config = json.loads(file.read_text())
    (config if place == "processor" else config["image_processor"])["tiles_per_second"] = 3
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has no argument `tiles_per_second`"):
        AutoProcessor.from_pretrained(tmp_path)


def test_unknown_fields_of_constructors_are_refused():
    with pytest.raises(ValueError, match="has no argument `tile`"):
        VtcImageProcessor(tile=3)
    with pytest.raises(TypeError, match="image_seq_len"):
        VtcProcessor(VtcImageProcessor(), tiny_tokenizer(), image_seq_len=3)
    # what hosts write into files is no field, and not kept
    written = VtcImageProcessor(image_processor_type="VtcImageProcessor", processor_class="VtcProcessor", auto_map={})
    assert "auto_map" not in written.to_dict()
