"""`VtcProcessor` with `vtc_budget`: prompts that hold just what enters the language model, and their configuration."""

import copy
import shutil

import pytest
import torch
from factories import METHODS, tiny_config, tiny_model, tiny_processor
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoConfig, AutoProcessor

import hf_vtc  # noqa: F401  registers the classes
from hf_vtc.models.image_processing_vtc import VtcImageProcessor
from hf_vtc.models.processing_vtc import COUNT_RULES

pytestmark = pytest.mark.window

# methods whose own decision reads the pixels
ROUTED = ("vico", "avg_llava")
# (height, width) in pixels of the images of each row: none, one, several
ROWS = ([(40, 70)], [], [(32, 96), (50, 33)])
# budgets that every method but ConvLLaVA can meet, one of them with a budget for each image
BUDGETS = ("full", 0.5, [0.9, "full", 0.3])
PINPOINTS = [[32, 64], [64, 32], [64, 64]]
GREEDY = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 0}
# fields of model and processor; `"shortened early"` is LLaVolta before the sequence is built, where less enters
VARIANTS = {method: (method, {}, {}) for method in METHODS} | {
    "shortened early": ("llavolta", {"compress_layer_idx": -1}, {}),
    "joined and shortened early": (
        "llavolta",
        {"compress_layer_idx": -1, "mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": PINPOINTS},
        {"tiling": "anyres", "image_grid_pinpoints": PINPOINTS, "count_rule": "unpad_true_aspect"},
    ),
    "one tile": ("vistog", {}, {"tiling": "pad"}),
    "without the full grid": ("avg_llava", {"vis_token_granularity": [1, 2, 8]}, {}),
}


def noise(height, width):
    return Image.effect_noise((width, height), 60).convert("RGB")


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request):
    """A tiny model and its processor, which knows the model's configuration."""
    method, fields, settings_of_images = VARIANTS[request.param]
    model, processor = tiny_model(method, **fields), tiny_processor(method, **settings_of_images)
    processor.model_config = model.config
    return model, processor


def inputs_of(processor, rows=ROWS, between="", **call):
    images = [[noise(*size) for size in row] for row in rows]
    text = [f"a{between.join([processor.image_token] * len(row))} what?" for row in rows]
    torch.manual_seed(0)
    return processor(text=text, images=images, return_tensors="pt", **call)


def budgets_of(model):
    return ("full", "auto", 1.0) if model.config.model_type == "vtc_convllava" else BUDGETS


def labels_of(inputs, model):
    # nothing predicts the first token of a row
    predicted = inputs["attention_mask"].cumsum(1) * inputs["attention_mask"] > 1
    predicted &= inputs["input_ids"] != model.config.image_token_id
    return inputs["input_ids"].masked_fill(~predicted, -100)


def both(processor, budget, **call):
    """The prompt that is written for a budget, and the one that reserves the largest count, of the same images."""
    exact, default = (inputs_of(processor, vtc_budget=budget, **call), inputs_of(processor, **call))
    shared = {name: default[name] for name in default if name not in ("input_ids", "attention_mask")}
    return {**exact, **shared}, default


@pytest.mark.parametrize("touching", [False, True])
def test_exact_prompts_give_what_default_ones_give_at_their_budget(pair, touching):
    model, processor = pair
    if touching:
        processor = copy.copy(processor)
        processor.image_start_token = processor.image_end_token = None
    for budget in budgets_of(model):
        exact, default = both(processor, budget, between="" if touching else " and ")
        out = model(**exact, labels=labels_of(exact, model), vtc_budget=budget)
        expected = model(**default, labels=labels_of(default, model), vtc_budget=budget)
        assert out.num_visual_tokens.tolist() == expected.num_visual_tokens.tolist()
        torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=1e-5)
        for row in range(len(ROWS)):
            ours, theirs = out.logits[row][out.kept_mask[row]], expected.logits[row][expected.kept_mask[row]]
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        new, wanted = (
            model.generate(**inputs, **GREEDY, vtc_budget=budget)[:, inputs["input_ids"].shape[1] :]
            for inputs in (exact, default)
        )
        assert torch.equal(new, wanted)


def test_exact_prompts_hold_what_enters_and_nothing_is_dropped(pair):
    model, processor = pair
    for budget in budgets_of(model):
        exact = inputs_of(processor, between=" and ", vtc_budget=budget)
        written = (exact["input_ids"] == model.config.image_token_id).sum()
        out = model(**exact, vtc_budget=budget)
        if model.config.model_type == "vtc_llavolta" and model.config.compress_layer_idx > 0:
            # images get shorter between the layers: all of them enters
            assert written == model.count_visual_tokens(**exact, vtc_budget="full").sum()
        else:
            assert written == out.num_visual_tokens.sum()
            assert torch.equal(out.kept_mask, exact["attention_mask"].bool())
        sizes = [size for row in ROWS for size in row]
        counted = processor._get_num_multimodal_tokens(image_sizes=sizes, vtc_budget=budget)
        assert sum(counted.num_image_tokens) == int(written)


def test_an_exact_prompt_is_refused_at_another_budget(pair):
    model, processor = pair
    if model.config.model_type == "vtc_convllava" or model.config.level_entering(1) == 0:
        # one count is all there is
        assert inputs_of(processor)["input_ids"].shape == inputs_of(processor, vtc_budget="full")["input_ids"].shape
        return
    exact = inputs_of(processor, between=" and ", vtc_budget=0.3)
    for other in ("full", [0.3, 0.3, "full"]):
        for call in (model, lambda **inputs: model.generate(**inputs, **GREEDY), model.count_visual_tokens):
            with pytest.raises(ValueError, match="needs the same `vtc_budget`"):
                call(**exact, vtc_budget=other)
    # one order of budgets is not another
    mixed = inputs_of(processor, between=" and ", vtc_budget=[0.3, "full", 0.3])
    with pytest.raises(ValueError, match="needs the same `vtc_budget`"):
        model(**mixed, vtc_budget=[0.3, 0.3, "full"])


def test_a_router_gets_the_room_for_every_decision_or_none(pair):
    model, processor = pair
    method = model.config.model_type.removeprefix("vtc_")
    if method not in ROUTED:
        own = inputs_of(processor, vtc_budget="auto")
        # without a word of the caller the model decides as it does for `"auto"`
        assert model(**own).num_visual_tokens.tolist() == model(**inputs_of(processor)).num_visual_tokens.tolist()
        return
    for budget in ("auto", ["full", "auto", "full"]):
        with pytest.raises(ValueError, match=r"decide from the pixels of image (0|1)\b.*Leave `vtc_budget` out"):
            inputs_of(processor, vtc_budget=budget)
    exact = inputs_of(processor, between=" and ", vtc_budget=0.5)
    with pytest.raises(ValueError, match="needs the same `vtc_budget`"):
        model(**exact)
    # where nothing routes, all tokens are the model's own decision
    switch = {"vico": "flash_mode", "avg_llava": "router_select"}[method]
    processor = tiny_processor(method)
    processor.model_config = tiny_config(method, **{switch: False})
    assert torch.equal(inputs_of(processor, vtc_budget="auto")["input_ids"], inputs_of(processor)["input_ids"])


def test_chats_take_a_budget_as_prompts_do():
    processor = tiny_processor("vistog")
    processor.model_config = tiny_config("vistog")
    chat = [{"role": "user", "content": [{"type": "image", "image": noise(40, 70)}, {"type": "text", "text": "a"}]}]
    written = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    out = processor.apply_chat_template(chat, **written, processor_kwargs={"vtc_budget": "auto"})
    nested = processor.apply_chat_template(chat, **written, processor_kwargs={"images_kwargs": {"vtc_budget": "auto"}})
    assert torch.equal(out["input_ids"], nested["input_ids"])
    tiles, groups = int(out["num_tiles"]), processor.model_config.num_semantic_tokens
    assert int((out["input_ids"] == processor.image_token_id).sum()) == tiles * groups
    longest = processor.apply_chat_template(chat, **written)
    assert int((longest["input_ids"] == processor.image_token_id).sum()) == tiles * 16


def test_a_model_that_finds_tiles_by_placeholders_gets_all_of_them():
    processor = tiny_processor("vistog", return_layout=False)
    processor.model_config = tiny_config("vistog")
    with pytest.raises(ValueError, match="`vtc_budget` does not go with `return_layout=False`"):
        inputs_of(processor, vtc_budget="auto")
    model, joined = tiny_model("avg_llava"), tiny_processor("avg_llava", return_layout=False)
    joined.model_config = model.config
    exact = inputs_of(joined, between=" and ", vtc_budget=0.5)
    assert "num_tiles" not in exact
    assert (
        model(**exact, vtc_budget=0.5).num_visual_tokens.sum() == (exact["input_ids"] == joined.image_token_id).sum()
    )


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ("ful", "`vtc_budget` must be None or 'auto'"),
        (0.0, "`vtc_budget` must be None or 'auto'"),
        (True, "`vtc_budget` must be None or 'auto'"),
        ([0.5], "3 images, 1 entries"),
        (3, "smallest admissible count is"),
    ],
)
def test_budgets_that_say_nothing_are_refused(budget, words):
    processor = tiny_processor("vistog")
    processor.model_config = tiny_config("vistog")
    with pytest.raises(ValueError, match=words):
        inputs_of(processor, vtc_budget=budget)


def test_a_budget_without_images_or_text_is_checked():
    processor = tiny_processor("vistog")
    assert set(processor(text="a", vtc_budget=0.5)) == {"input_ids", "attention_mask"}
    with pytest.raises(ValueError, match="0 images, 1 entries"):
        processor(text="a", vtc_budget=[0.5])
    with pytest.raises(ValueError, match="`vtc_budget` says how many placeholders `text` gets"):
        processor(images=noise(9, 9), vtc_budget=0.5)
    with pytest.raises(ValueError, match="`VtcImageProcessor` has no argument `vtc_budget`"):
        processor.image_processor(noise(9, 9), vtc_budget=0.5)


def test_the_configuration_is_that_of_the_folder(saved, method, tmp_path):
    processor = AutoProcessor.from_pretrained(saved)
    assert processor.model_config.to_dict() == AutoConfig.from_pretrained(saved).to_dict()
    budget = "full" if method == "convllava" else 0.5
    mine = tiny_processor(method)
    mine.model_config = tiny_config(method)
    assert torch.equal(
        inputs_of(processor, vtc_budget=budget)["input_ids"], inputs_of(mine, vtc_budget=budget)["input_ids"]
    )
    # it travels with copies, and is no part of what is written
    assert "model_config" not in repr(processor)
    assert copy.deepcopy(processor).model_config.model_type == f"vtc_{method}"
    processor.save_pretrained(tmp_path)
    assert "model_config" not in (tmp_path / "processor_config.json").read_text()


def test_a_missing_or_foreign_configuration_is_named(saved, method, tmp_path):
    alone = tiny_processor(method)
    remedy = "Set `processor.model_config = model.config`"
    with pytest.raises(ValueError, match=f"was not loaded beside one. {remedy}"):
        inputs_of(alone, vtc_budget="full")
    shutil.copytree(saved, tmp_path / "processor", ignore=shutil.ignore_patterns("config.json", "*.safetensors"))
    apart = AutoProcessor.from_pretrained(tmp_path / "processor")
    # without a budget nothing is missing
    inputs_of(apart)
    with pytest.raises(ValueError, match=f"none could be read from .*processor.*{remedy}"):
        inputs_of(apart, vtc_budget="full")
    with pytest.raises(ValueError, match="`model_config` must be the configuration of a model of hf_vtc, got"):
        apart.model_config = tiny_config(method).text_config
    apart.model_config = tiny_config(method)
    inputs_of(apart, vtc_budget="full")


def test_a_configuration_of_another_model_is_refused():
    processor = tiny_processor("vico")
    processor.model_config = tiny_config(
        "vico", vision_config={**tiny_config("vico").vision_config.to_dict(), "image_size": [64, 64]}
    )
    with pytest.raises(ValueError, match="belong to different models"):
        inputs_of(processor, vtc_budget="full")


@pytest.mark.slow
def test_the_configuration_of_remote_code_is_found(saved, method, tmp_path, run_python):
    noise(40, 70).save(tmp_path / "image.png")
    script = """
import sys
import torch
from PIL import Image
from transformers import AutoProcessor
folder, image, budget, out = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor(text=processor.image_token, images=Image.open(image), vtc_budget=budget, return_tensors="pt")
assert type(processor.model_config).__module__.startswith("transformers_modules")
torch.save(inputs["input_ids"], out)
"""
    budget = "full" if method in ROUTED else "auto"
    run_python(script, saved, tmp_path / "image.png", budget, tmp_path / "out.pt")
    mine = tiny_processor(method)
    mine.model_config = tiny_config(method)
    image = Image.open(tmp_path / "image.png")
    ours = mine(text=mine.image_token, images=image, vtc_budget=budget, return_tensors="pt")
    assert torch.equal(torch.load(tmp_path / "out.pt"), ours["input_ids"])


# rules of `processor_config.json` with the configurations and tilings that they belong to
RULES = [
    *((method, {}, {}) for method in METHODS),
    ("avg_llava", {"unpad_rule": "token_grid"}, {"count_rule": "unpad_token_grid"}),
    (
        "llavolta",
        {"mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": PINPOINTS},
        {"tiling": "anyres", "image_grid_pinpoints": PINPOINTS, "count_rule": "unpad_true_aspect"},
    ),
    ("vistog", {}, {"tiling": "pad"}),
    ("llavolta", {}, {"tiling": "crop"}),
    *(("convllava", {}, {"tiling": tiling}) for tiling in ("pad", "single", "crop")),
]


@pytest.mark.parametrize(("method", "fields", "settings_of_images"), RULES)
@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.tuples(st.integers(8, 400), st.integers(8, 400)), min_size=1, max_size=4))
def test_rules_of_the_processor_are_those_of_the_configuration(method, fields, settings_of_images, sizes):
    config, processor = tiny_config(method, **fields), tiny_processor(method, **settings_of_images)
    layouts = [processor.image_processor.get_tile_layout(*size) for size in sizes]
    told = torch.tensor([processor.image_processor.get_model_size(*size) for size in sizes])
    of_model = config.reserved_tokens(config.sizes_of(torch.tensor([each.num_tiles for each in layouts]), told))
    assert of_model.tolist() == [processor.reserved_tokens(*size) for size in sizes]


def test_every_rule_of_the_processor_is_compared():
    used = {tiny_processor(method, **fields).count_rule for method, _, fields in RULES}
    assert used == set(COUNT_RULES)


def test_model_sizes_are_those_of_the_call():
    for settings_of_images in (
        {"tiling": "keep_aspect", "size": 48, "token_stride": 16},
        {"tiling": "dynamic", "size": 32},
    ):
        processor = VtcImageProcessor(**settings_of_images)
        for size in ((40, 70), (90, 31), (48, 48)):
            assert processor(noise(*size))["image_sizes"].tolist() == [list(processor.get_model_size(*size))]
