"""A saved folder as users of transformers meet it: Auto classes, chat template, pipeline, save and load again."""

import pickle

import numpy as np
import pytest
import torch
import transformers
from factories import METHODS, budgets_of, tiny_model, tiny_processor
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

import hf_vtc


@pytest.fixture(scope="module", params=METHODS)
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    tiny_model(request.param).save_pretrained(path)
    tiny_processor(request.param).save_pretrained(path)
    return path


def picture(width=64, height=40, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8))


def chat(*images, question="what is this?"):
    content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


@pytest.mark.window
def test_the_readme_block(folder):
    model = hf_vtc.AutoModelForVision2Seq.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor.apply_chat_template(
        chat(picture()), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    share = budgets_of(model.config)[0]
    out = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False, vtc_budget=share)
    length = inputs["input_ids"].shape[1]
    assert torch.equal(out[:, :length], inputs["input_ids"]) and out.shape[1] == length + 5
    kept = model.count_visual_tokens(**inputs, vtc_budget=share)
    reserved = int((inputs["input_ids"] == model.config.image_token_id).sum())
    assert kept.shape == (1,) and 0 < int(kept) <= reserved * share
    assert isinstance(processor.decode(out[0, length:]), str)


@pytest.mark.window
def test_batches_of_chats_equal_single_chats(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    chats = [chat(picture()), chat(picture(32, 96, 1), picture(50, 50, 2)), chat(question="no image")]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    together = processor.apply_chat_template(chats, padding=True, **options)
    generated = model.generate(**together, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    for row, one in enumerate(chats):
        alone = processor.apply_chat_template(one, **options)
        expected = model.generate(**alone, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert torch.equal(generated[row, -4:], expected[0, -4:])


@pytest.mark.window
def test_all_parts_load_in_the_dtype_of_the_file(folder, tmp_path):
    """A config says of each part how it was made, which is in float32 here."""
    AutoModelForImageTextToText.from_pretrained(folder).to(torch.bfloat16).save_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    made = AutoModelForImageTextToText.from_config(model.config)
    assert {parameter.dtype for parameter in made.parameters()} == {torch.bfloat16}


@pytest.mark.window
def test_save_and_load_again_is_bit_equal(folder, tmp_path):
    first = AutoModelForImageTextToText.from_pretrained(folder)
    first.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    second = AutoModelForImageTextToText.from_pretrained(tmp_path)
    state = second.state_dict()
    assert state.keys() == first.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in first.state_dict().items())
    assert second.config.to_diff_dict().keys() == first.config.to_diff_dict().keys()


@pytest.mark.window
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_runs(folder, dtype):
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
    inputs = AutoProcessor.from_pretrained(folder).apply_chat_template(
        chat(picture()), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        out = model(**inputs)
    assert out.logits.dtype == dtype and bool(out.logits.isfinite().all())
    assert model.generate(**inputs, max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]


@pytest.mark.window
def test_pipeline(folder):
    generator = pipeline("image-text-to-text", model=str(folder), device="cpu")
    [result] = generator(text=chat(picture()), max_new_tokens=4, return_full_text=False)
    assert isinstance(result["generated_text"], str)
    budget = {"vtc_budget": budgets_of(generator.model.config)[0]}
    [compressed] = generator(text=chat(picture()), max_new_tokens=4, return_full_text=False, generate_kwargs=budget)
    assert isinstance(compressed["generated_text"], str)


def test_fresh_parts_of_a_partial_checkpoint_are_initialised(folder, tmp_path):
    """What a checkpoint lacks must not be uninitialised memory."""
    model = AutoModelForImageTextToText.from_pretrained(folder)
    part = "router" if "router" in dict(model.model.named_children()) else "vision_tower"
    state = {name: tensor for name, tensor in model.state_dict().items() if f".{part}." not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    torch.manual_seed(0)
    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] and all(f".{part}." in name for name in info["missing_keys"])
    for name, parameter in loaded.named_parameters():
        assert bool(parameter.isfinite().all()) and float(parameter.abs().max()) < 1e2, name
    fresh = {name: float(tensor.std()) for name, tensor in getattr(loaded.model, part).named_parameters()}
    # AVG-LLaVA draws its voter from a normal distribution of width 1, all else is smaller
    assert max(fresh.values()) < 1.5
    if model.config.model_type == "vtc_vico":
        assert 0 < fresh["query_token"] < 0.1
    if model.config.model_type == "vtc_convllava":
        scale = model.config.vision_config.layer_scale_init_value
        scales = [tensor for name, tensor in loaded.named_parameters() if name.endswith("layer_scale_parameter")]
        assert scales and all(bool((tensor == scale).all()) for tensor in scales)


def test_pipeline_joins_rows_of_images_of_different_sizes(folder):
    generator = pipeline("image-text-to-text", model=str(folder), device="cpu", dtype=torch.float32)
    chats = [chat(picture(60, 90)), chat(picture(140, 40, 1), question="and this?"), chat(picture(200, 200, 2))]
    answers = [
        generator(
            text=chats,
            batch_size=size,
            return_full_text=False,
            generate_kwargs={"do_sample": False, "max_new_tokens": 6},
        )
        for size in (1, 2, 3)
    ]
    assert answers[0] == answers[1] == answers[2]


def test_joined_images_are_padded_and_other_results_plain():
    processor = tiny_processor("convllava")
    first, second = (
        processor.image_processor(picture(*size), return_tensors="pt")["pixel_values"]
        for size in ((64, 200), (200, 64))
    )
    assert first.shape != second.shape
    joined = torch.cat([first, second.to(torch.float32)], dim=0)
    height, width = (max(one.shape[axis] for one in (first, second)) for axis in (2, 3))
    assert joined.shape == (2, 3, height, width) and type(joined) is type(first)
    assert torch.equal(joined[:1, :, : first.shape[2], : first.shape[3]], first)
    assert not joined[0, :, first.shape[2] :].any() and not joined[1, :, :, second.shape[3] :].any()
    assert type(joined[0]) is type(joined + 1) is type(pickle.loads(pickle.dumps(joined))) is torch.Tensor
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        torch.cat([first, second], dim=1)


@pytest.mark.skipif(
    not hasattr(transformers, "AutoModelForMultimodalLM"), reason="transformers 4.57 has no such class"
)
def test_auto_model_for_multimodal_lm(folder):
    model = transformers.AutoModelForMultimodalLM.from_pretrained(folder)
    assert type(model) is type(AutoModelForImageTextToText.from_pretrained(folder))
