"""Parity with the original AVG-LLaVA code on a tiny checkpoint in the official layout."""

import copy
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, TrainingArguments

from hf_vtc.convert import convert, load_official
from hf_vtc.convert.avg_llava_official import rename
from hf_vtc.models.image_processing_vtc import VtcImageProcessor
from hf_vtc.models.modeling_router_avg_llava import filter_text, text_similarity
from hf_vtc.models.ops_vtc import pool_pyramid
from hf_vtc.models.prompt_vtc import VisionInputs
from hf_vtc.models.tiling_vtc import best_canvases, unpadded_grids
from hf_vtc.trainers import AvgLlavaGranularityTrainer, AvgLlavaRouterTrainer
from hf_vtc.trainers.losses import best_granularity_loss, granularity_ranking_loss

# the full data, of which the repository holds a selection, can be named instead
FOLDER = Path(os.environ.get("HF_VTC_GOLDEN_AVG_LLAVA", Path(__file__).parent / "golden" / "avg_llava"))
GOLDEN = json.loads((FOLDER / "golden.json").read_text())
TENSORS = load_file(FOLDER / "golden.safetensors")
CASES = GOLDEN["summary"]["cases"]
SCALES = GOLDEN["granularity_order"]
OFFICIAL = json.loads((FOLDER / "checkpoint" / "config.json").read_text())
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
# of the original code, in the prompts
PLACEHOLDER = -200


def has(*names):
    missing = [name for name in names if name not in TENSORS]
    return pytest.mark.skipif(bool(missing), reason=f"this folder does not hold {missing}")


def assert_golden(name, tensor):
    """Compare with a recorded tensor, of which a selection holds every n-th entry."""
    strides = GOLDEN.get("strides", {})
    step = strides.get(name, strides.get(name.rpartition(".")[2]))
    tensor = tensor if step is None else tensor.flatten()[::step]
    torch.testing.assert_close(tensor, TENSORS[name].reshape(tensor.shape), **CLOSE)


def completed_checkpoint(folder):
    """The checkpoint, with zeros where a selection leaves out what no output depends on."""
    shutil.copytree(FOLDER / "checkpoint", folder, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    for name, part in GOLDEN.get("omitted", {}).items():
        whole = torch.zeros(part["shape"])
        if "rows" in part:
            whole[part["rows"]] = tensors[name]
        tensors[name] = whole
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def unused_id():
    """An id of the vocabulary that no prompt and no answer holds, for the placeholder."""
    ids = torch.cat([tensor.flatten() for name, tensor in TENSORS.items() if "_ids" in name])
    return max(set(range(OFFICIAL["vocab_size"])) - set(ids.tolist()))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = completed_checkpoint(tmp_path_factory.mktemp("official"))
    return load_official(folder, image_token_id=unused_id())


@pytest.fixture(scope="module")
def image_processor(model):
    preprocessor = json.loads((FOLDER / "checkpoint" / "vision_tower" / "preprocessor_config.json").read_text())
    return VtcImageProcessor(
        tiling="anyres",
        size=preprocessor["crop_size"],
        image_mean=preprocessor["image_mean"],
        image_std=preprocessor["image_std"],
        image_grid_pinpoints=model.config.image_grid_pinpoints,
    )


def prompt(model, ids, images, reserved, mask=None, labels=None):
    """Model inputs of right-padded rows of official ids, a number of placeholders in place of each image's one."""
    rows, row_labels, remaining = [], [], iter(reserved)
    for row in range(ids.shape[0]):
        length = ids.shape[1] if mask is None else int(mask[row].sum())
        new_row, new_labels = [], []
        for position in range(length):
            is_image = ids[row, position] == PLACEHOLDER
            count = next(remaining) if is_image else 1
            new_row += [model.config.image_token_id if is_image else int(ids[row, position])] * count
            new_labels += [-100 if labels is None or is_image else int(labels[row, position])] * count
        rows.append(new_row)
        row_labels.append(new_labels)
    longest = max(map(len, rows))
    inputs = {
        "input_ids": torch.tensor([row + [0] * (longest - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
        **images,
    }
    if labels is not None:
        inputs["labels"] = torch.tensor([row + [-100] * (longest - len(row)) for row in row_labels])
    return inputs


def images_of(image_processor, *names):
    images = [Image.fromarray(TENSORS[f"{name}.image_uint8"].numpy()) for name in names]
    return dict(image_processor(images, return_tensors="pt"))


def reserved_of(name):
    return CASES[name]["image_tokens_per_granularity"][str(SCALES[-1])]


def inputs_of(model, image_processor, name):
    return prompt(model, TENSORS[f"{name}.input_ids"], images_of(image_processor, name), [reserved_of(name)])


def vision_of(inputs):
    names = ("pixel_values", "num_tiles", "image_sizes", "router_decisions")
    return VisionInputs(**{name: inputs[name] for name in names if name in inputs})


def packed_embeds(model, inputs):
    with torch.no_grad():
        packed = model.model.compress_prompt(
            inputs["input_ids"], vision_of(inputs), inputs.get("attention_mask")
        ).packed
    return packed.inputs_embeds


def kept_logits(out, count):
    return out.logits[out.kept_mask][None, -count:]


every_case = pytest.mark.parametrize("name", CASES)


def test_config_is_that_of_the_official_file(model):
    config = model.config
    assert config.vis_token_granularity == SCALES
    assert config.filtered_text_num == GOLDEN["K_filtered_text"]
    assert (config.unpad_rule, config.router_attention, config.router_text) == ("token_grid", "tiles", "first_image")
    assert config.router_select and config.base_tile == "first" and config.mm_patch_merge_type == "spatial_unpad"


@every_case
def test_image_processor_matches_the_original(model, image_processor, name):
    width, height = CASES[name]["image_size_wh"]
    layout = image_processor.get_tile_layout(height, width)
    assert list(layout.grid) == CASES[name]["grid_wh"][::-1]
    images = images_of(image_processor, name)
    assert images["num_tiles"].tolist() == [CASES[name]["tiles"]]
    assert images["image_sizes"].tolist() == [[height, width]]
    assert_golden(f"{name}.pixel_values", images["pixel_values"])


@every_case
def test_forward_matches_the_original(model, image_processor, name):
    case, inputs = CASES[name], inputs_of(model, image_processor, name)
    with torch.no_grad():
        out = model(**inputs)
    assert out.router_decisions.tolist() == [case["selected_index"]]
    assert int(out.kept_mask.sum()) == case["inputs_embeds_len"]
    assert out.num_visual_tokens.tolist() == [case["image_tokens_per_granularity"][str(case["selected_granularity"])]]
    assert_golden(f"{name}.router_logits", out.router_logits)
    assert_golden(f"{name}.logits_last16", kept_logits(out, 16))
    assert_golden(f"{name}.inputs_embeds", packed_embeds(model, inputs))


@every_case
def test_every_granularity_matches_the_original(model, image_processor, name):
    inputs = inputs_of(model, image_processor, name)
    for idx, scale in enumerate(SCALES):
        with torch.no_grad():
            out = model(**inputs, router_decisions=torch.tensor([idx]))
        assert out.router_logits is None
        assert out.num_visual_tokens.tolist() == [CASES[name]["image_tokens_per_granularity"][str(scale)]]
        assert_golden(f"{name}.forced_{scale}.logits_last4", kept_logits(out, 4))
        if f"{name}.forced_{scale}.inputs_embeds" in TENSORS:
            embeds = packed_embeds(model, {**inputs, "router_decisions": torch.tensor([idx])})
            assert_golden(f"{name}.forced_{scale}.inputs_embeds", embeds)


@every_case
def test_generate_matches_the_original(model, image_processor, name):
    inputs = inputs_of(model, image_processor, name)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    length = inputs["input_ids"].shape[1]
    # recorded ids begin with a token that transformers 4.36 puts before embeddings
    out = model.generate(**inputs, **options)
    assert torch.equal(out[:, length:], TENSORS[f"{name}.generated_ids"][:, 1:])
    out = model.generate(**inputs, **options, router_decisions=torch.tensor([0]))
    assert torch.equal(out[:, length:], TENSORS[f"{name}.forced_generated_ids_{SCALES[0]}"][:, 1:])


@every_case
def test_cached_generation_equals_recomputation_and_routes_once(model, image_processor, name):
    inputs, calls = inputs_of(model, image_processor, name), []
    length = inputs["input_ids"].shape[1]
    handle = model.model.router.register_forward_hook(lambda *args: calls.append(args))
    try:
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
    finally:
        handle.remove()
    assert len(calls) == 1
    # the original recomputes at the granularity that was chosen for the prompt
    decision = torch.tensor([CASES[name]["selected_index"]])
    extended = {**inputs, "input_ids": out, "attention_mask": torch.ones_like(out), "router_decisions": decision}
    with torch.no_grad():
        logits = model(**extended).logits[0, length - 1 : -1]
    assert torch.equal(logits.argmax(-1), out[0, length:])


def router_parts(model, image_processor, name):
    """Projected features, and what the router is called with."""
    inputs, captured = inputs_of(model, image_processor, name), {}
    handle = model.model.router.register_forward_hook(lambda module, args, output: captured.update(args=args))
    try:
        with torch.no_grad():
            model.model.compress_prompt(inputs["input_ids"], vision_of(inputs), inputs["attention_mask"])
    finally:
        handle.remove()
    return captured["args"]


@every_case
def test_router_matches_the_original(model, image_processor, name):
    pyramid, text, image_of_tile, num_tiles = router_parts(model, image_processor, name)
    router = model.model.router
    with torch.no_grad():
        votes = router.votes(pyramid, text[image_of_tile], image_of_tile)
        logits = router.token_logits(pyramid, text[image_of_tile], image_of_tile)
        assert_golden(f"{name}.router_votes", votes)
        assert_golden(f"{name}.router_prenorm", votes.mean(0, keepdim=True))
    for recorded, value in (("router_token_logits", logits), ("filtered_text", text[0])):
        if f"{name}.{recorded}" in TENSORS:
            assert_golden(f"{name}.{recorded}", value)


@every_case
def test_pyramid_matches_the_original(model, image_processor, name):
    pixel_values = images_of(image_processor, name)["pixel_values"]
    with torch.no_grad():
        tokens = model.model.multi_modal_projector(model.model.encode(pixel_values))
    if f"{name}.projected_features" in TENSORS:
        assert_golden(f"{name}.projected_features", tokens)
    for scale, pooled in zip(SCALES, pool_pyramid(tokens, SCALES), strict=True):
        assert pooled.shape[1] == scale
        if f"{name}.pooled_{scale}" in TENSORS:
            assert_golden(f"{name}.pooled_{scale}", pooled)


@every_case
def test_text_filter_matches_the_original(model, image_processor, name):
    ids, mask = TENSORS[f"{name}.input_ids"][0], TENSORS[f"{name}.text_mask"].bool()
    with torch.no_grad():
        tokens = model.model.multi_modal_projector(
            model.model.encode(images_of(image_processor, name)["pixel_values"][:1])
        )
        # the original moves an empty row per image to the end
        text = model.get_input_embeddings()(ids[ids != PLACEHOLDER])
        text = torch.cat([text, torch.zeros(len(ids) - len(text), text.shape[1])])
        if f"{name}.text_embeds" in TENSORS:
            assert_golden(f"{name}.text_embeds", text)
        similarity = text_similarity(tokens, text).masked_fill(~mask, float("-inf"))
        assert_golden(f"{name}.text_similarity", similarity[0])
        chosen = filter_text(
            tokens, text[mask], torch.zeros(int(mask.sum())), torch.tensor([0]), GOLDEN["K_filtered_text"]
        )
    order = TENSORS[f"{name}.text_similarity"].sort(descending=True).indices[: GOLDEN["K_filtered_text"]]
    expected = text[order].masked_fill(~mask[order, None], 0)
    torch.testing.assert_close(chosen[0, : len(order)], expected, **CLOSE)
    assert not bool(chosen[0, len(order) :].any())


@has("square_2x2.image_uint8")
@pytest.mark.parametrize("kind", ("list", "4d"))
def test_single_tile(model, image_processor, kind):
    """The original adds a newline where images come as a list, none where they come as one tensor."""
    whole = images_of(image_processor, "square_2x2")["pixel_values"][:1]
    images = {"pixel_values": whole}
    if kind == "list":
        size = model.config.tile_size
        images |= {"num_tiles": torch.tensor([1]), "image_sizes": torch.tensor([[size, size]])}
    reserved = SCALES[-1] + (kind == "list")
    inputs = prompt(model, TENSORS["square_2x2.input_ids"], images, [reserved])
    with torch.no_grad():
        out = model(**inputs)
    assert int(out.kept_mask.sum()) == GOLDEN["summary"]["single_tile"]["list_len" if kind == "list" else "d4_len"]
    assert out.router_decisions.tolist() == [GOLDEN["summary"]["single_tile"]["sel"]]
    assert_golden(f"single_tile_{kind}.router_logits", out.router_logits)
    assert_golden(f"single_tile_{kind}.inputs_embeds", packed_embeds(model, inputs))


@has("wide_2x1.image_uint8", "wide_3x1.image_uint8")
def test_two_images_in_one_row(model, image_processor):
    names = ("wide_2x1", "wide_3x1")
    images = images_of(image_processor, *names)
    inputs = prompt(model, TENSORS["two_images.input_ids"], images, [reserved_of(name) for name in names])
    with torch.no_grad():
        out = model(**inputs)
    assert out.router_decisions.tolist() == GOLDEN["summary"]["two_images"]["selected"]
    assert int(out.kept_mask.sum()) == GOLDEN["summary"]["two_images"]["len"]
    assert_golden("two_images.router_logits", out.router_logits)
    assert_golden("two_images.inputs_embeds", packed_embeds(model, inputs))


def test_text_only(model):
    with torch.no_grad():
        logits = model(input_ids=TENSORS["text_only.input_ids"], logits_to_keep=4).logits
    assert_golden("text_only.logits", logits)


BATCH = ("square_2x2", "wide_3x1")
has_batch = has(*(f"{name}.image_uint8" for name in BATCH))


@pytest.fixture
def batch(model, image_processor):
    images = images_of(image_processor, *BATCH)
    reserved = [reserved_of(name) for name in BATCH]
    return prompt(
        model,
        TENSORS["batch.input_ids"],
        images,
        reserved,
        TENSORS["batch.attention_mask"],
        TENSORS["batch.labels"],
    )


@has_batch
def test_batch_in_eval_mode(model, batch):
    with torch.no_grad():
        out = model(**batch)
    assert_golden("batch.eval.router_logits", out.router_logits)
    assert_golden("batch.eval.loss", out.loss)
    expected = TENSORS["batch.eval.attention_mask"]
    assert out.kept_mask.sum(1).tolist() == expected.sum(1).tolist()
    assert int(out.kept_mask.sum(1).max()) == int(TENSORS["batch.eval.inputs_embeds_len"])
    for row, mask in enumerate(expected.bool()):
        assert torch.equal(batch["labels"][row, out.kept_mask[row]], TENSORS["batch.eval.labels"][row, mask])


@has_batch
def test_labels_hide_the_answers_from_the_router_in_training_mode(model, batch):
    """As in the original, whose router reads the answers in eval mode."""
    model = copy.deepcopy(model)
    model.model.router.merger.dropout.p = 0.0
    with torch.no_grad():
        out = model.train()(**batch)
    assert_golden("rglf.router_logits", out.router_logits)


@has_batch
def test_left_padding_equals_single_rows(model, batch):
    left = dict(batch)
    for name, blank in (("input_ids", 0), ("attention_mask", 0)):
        rows = [row[mask.bool()] for row, mask in zip(batch[name], batch["attention_mask"], strict=True)]
        longest = max(map(len, rows))
        left[name] = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0), value=blank) for row in rows])
    del left["labels"]
    with torch.no_grad():
        right, out = model(**batch), model(**left)
    assert torch.equal(out.router_decisions, right.router_decisions)
    for row in range(2):
        torch.testing.assert_close(out.logits[row, out.kept_mask[row]], right.logits[row, right.kept_mask[row]])


def trainer_of(trainer_class, model, folder, **options):
    arguments = TrainingArguments(str(folder), report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = trainer_class(model, arguments, **options)
    trainer.create_optimizer()
    return trainer


def official_gradients(prefix, model):
    """Pairs of a recorded gradient, split as its parameter is, and ours."""
    parameters = dict(model.named_parameters())
    for name, tensor in TENSORS.items():
        if not name.startswith(prefix):
            continue
        official = name.removeprefix(prefix)
        renamed = rename(official if official.startswith("model.") else f"model.router.{official}")
        for new, part in zip(renamed.names, renamed.transform(tensor), strict=True):
            yield new, part, parameters[new].grad


@has_batch
def test_router_trainer_matches_the_original(model, batch, tmp_path):
    model = copy.deepcopy(model)
    model.model.router.merger.dropout.p = 0.0
    trainer = trainer_of(
        AvgLlavaRouterTrainer,
        model,
        tmp_path,
        margin=OFFICIAL["margin"],
        ce_loss_weight=OFFICIAL["ce_loss_weight"],
        rank_loss_weight=OFFICIAL["rank_loss_weight"],
    )
    tower_calls = []
    model.model.vision_tower.embeddings.register_forward_hook(lambda *args: tower_calls.append(1))
    model.eval()
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    losses, image_rows = trainer.measure(model, batch["labels"], inputs)
    assert len(tower_calls) == 1 and image_rows == [0, 1]
    assert_golden("rglf.llm_loss", losses)
    assert torch.equal(losses.argsort(1), TENSORS["rglf.sort_indices"])
    router_logits = trainer.route(model, batch["labels"], inputs, training=True)
    assert_golden("rglf.router_logits", router_logits)
    assert_golden("rglf.ce_loss", best_granularity_loss(router_logits, losses))
    assert_golden("rglf.rank_loss", granularity_ranking_loss(router_logits, losses, OFFICIAL["margin"]))

    tower_calls.clear()
    loss = trainer.training_step(model, dict(batch), torch.tensor(2))
    assert len(tower_calls) == 1
    assert_golden("rglf.total_loss", loss)
    outside = [name for name, each in model.named_parameters() if each.grad is not None and ".router." not in name]
    assert outside == GOLDEN["summary"]["rglf"]["non_router_grads"]
    compared = 0
    for name, expected, gradient in official_gradients("rglf.grad.", model):
        torch.testing.assert_close(gradient, expected, **CLOSE, msg=name)
        compared += 1
    assert compared > 5


@has_batch
def test_granularity_trainer_matches_the_original(model, batch, tmp_path):
    model = copy.deepcopy(model)
    trainer = trainer_of(AvgLlavaGranularityTrainer, model, tmp_path)
    tower_calls = []
    model.model.vision_tower.embeddings.register_forward_hook(lambda *args: tower_calls.append(1))
    loss = trainer.training_step(model, dict(batch), (batch["labels"] != -100).sum())
    assert len(tower_calls) == 1
    assert_golden("stage3.loss", loss)
    metrics = trainer._pop_metrics()
    per_granularity = torch.tensor([metrics[f"loss_{scale}"] for scale in SCALES])
    assert_golden("stage3.loss_per_granularity", per_granularity)
    with_gradient = {name for name, each in model.named_parameters() if each.grad is not None}
    assert not any(".vision_tower." in name or ".router." in name for name in with_gradient)
    compared = 0
    for name, expected, gradient in official_gradients("stage3.grad.", model):
        torch.testing.assert_close(gradient, expected, **CLOSE, msg=name)
        compared += 1
    assert compared > 1


@pytest.mark.parametrize("margin", (0.1, 1.0))
def test_ranking_loss(margin):
    loss = granularity_ranking_loss(TENSORS["unit_rank.logits"], TENSORS["unit_rank.llm_loss"], margin)
    assert_golden(f"unit_rank.loss_margin_{margin}", loss)


def test_token_counts_of_the_official_geometry():
    counts = json.loads((FOLDER / "token_counts_336.json").read_text())
    tile, side = 336, 24
    # the official order, which decides ties, as (width, height)
    pinpoints = [[height * tile, width * tile] for width, height in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
    sizes = torch.tensor([entry["image_size_wh"][::-1] for entry in counts])
    grids = best_canvases(sizes, pinpoints) // tile
    assert grids.tolist() == [entry["grid_wh"][::-1] for entry in counts]
    tokens = {36: (6, 6), 72: (12, 6), 144: (12, 12), 288: (24, 12), 576: (side, side)}
    for scale, tile_tokens in tokens.items():
        kept = unpadded_grids(sizes, grids, tile_tokens, "token_grid")
        for (rows, columns), entry in zip(kept.tolist(), counts, strict=True):
            expected = entry["counts"][str(scale)]
            assert (rows, columns) == (expected["hi_rows"], expected["hi_cols"])
            assert scale + rows * (columns + 1) == expected["total"]


def test_checkpoint_without_a_router(image_processor, tmp_path):
    """Stage 3 has none: the finest granularity is kept until a router is trained."""
    folder = completed_checkpoint(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("model.router.")}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    stage_3 = load_official(folder, image_token_id=unused_id())
    assert not stage_3.config.router_select
    name = min(CASES, key=reserved_of)
    with torch.no_grad():
        out = stage_3(**inputs_of(stage_3, image_processor, name))
    assert_golden(f"{name}.forced_{SCALES[-1]}.logits_last4", kept_logits(out, 4))


def test_converted_folder_gives_the_same_logits(model, image_processor, tmp_path):
    folder = completed_checkpoint(tmp_path / "official")
    report = convert(folder, tmp_path / "converted", image_token_id=unused_id())
    assert not report.missing_keys and not report.unused_keys and not report.fresh_keys
    converted = AutoModelForImageTextToText.from_pretrained(tmp_path / "converted").eval()
    inputs = inputs_of(model, image_processor, min(CASES, key=reserved_of))
    with torch.no_grad():
        assert torch.equal(converted(**inputs).logits, model(**inputs).logits)
