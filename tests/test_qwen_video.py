"""Videos on Qwen3-VL and Qwen2.5-VL: as the stock models see them, as frames by hand, budgets, and what is refused."""

import pytest
import torch
from contract_samples import GREEDY
from factories import tiny_config, tiny_model, uncompressed
from qwen_models import BASES, batch_of_rows, layout_of, model_of, video_batch, video_row

from hf_vtc.models.grids_vtc import grid_positions
from hf_vtc.models.host_vtc import RELEASE
from hf_vtc.models.prompt_vtc import VisionInputs
from hf_vtc.models.videos_vtc import Videos

pytestmark = pytest.mark.window

METHODS = ("llavolta", "avg_llava", "cdpruner")
# windows of two frames, which stand for one setting more
SETTINGS = [
    *((method, {}) for method in METHODS),
    ("llavolta", {"compress_frames": 2, "compressor": "avgpool2d", "compress_stride": 8}),
]
VIDEOS = (("video",), ("video", "video"))
MIXED = (("video",), ("image", "video"), (), ("video", "image", "image"))


@pytest.fixture(scope="module", params=BASES)
def base(request):
    return request.param


def given_to_stock(model, batch):
    """What the stock model takes of a batch, told kinds of tokens where it asks for them."""
    ids, config, given = batch["input_ids"], model.config, dict(batch)
    if RELEASE >= (5, 0):
        given["mm_token_type_ids"] = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
    return given


def stock_logits(model, stock, batch):
    """Those of the stock model; where its releases disagree about places behind a video, with ours."""
    given = given_to_stock(model, batch)
    if model.config.grid_base == "qwen2_5_vl" and RELEASE >= (5, 0):
        given["position_ids"] = layout_of(model, batch).positions
    return stock(**given).logits


def grown(batch, token):
    """A batch of one row with one more token."""
    ids, mask = (
        torch.cat([batch[name], torch.tensor([[value]])], dim=1)
        for name, value in (("input_ids", token), ("attention_mask", 1))
    )
    return {**batch, "input_ids": ids, "attention_mask": mask}


# "full" is the stock model


@pytest.mark.parametrize("padding_side", ("left", "right"))
@torch.no_grad()
def test_full_is_the_stock_model_bit_for_bit(base, padding_side):
    model = model_of(base)
    stock = uncompressed(model)
    for seed, rows in enumerate((VIDEOS, (("image",), ("image", "image")), ((), ("video",)))):
        batch = video_batch(model, seed, rows, padding_side, seconds=1.0)
        real = batch["attention_mask"].bool()
        assert torch.equal(model(**batch, vtc_budget="full").logits[real], stock_logits(model, stock, batch)[real])
    # the stock tower sees images and videos one after the other, and sums over other numbers of rows round otherwise
    batch = video_batch(model, 5, MIXED, padding_side, seconds=1.0)
    real, expected = batch["attention_mask"].bool(), stock_logits(model, stock, batch)
    torch.testing.assert_close(model(**batch, vtc_budget="full").logits[real], expected[real], rtol=0, atol=2e-5)


@torch.no_grad()
def test_full_generates_the_ids_of_the_stock_model(base):
    model = model_of(base)
    stock = uncompressed(model)
    for seed in range(3):
        batch = video_batch(model, seed, [("video", "image")], seconds=1.0)
        answer = model.generate(**batch, vtc_budget="full", **GREEDY)[0, batch["input_ids"].shape[1] :].tolist()
        for token in answer:
            assert token == int(stock_logits(model, stock, batch)[0, -1].argmax())
            batch = grown(batch, token)
    batch = video_batch(model, 4, VIDEOS, seconds=1.0)
    if base == "qwen3_vl" or RELEASE < (5, 0):
        ids = stock.generate(**given_to_stock(model, batch), **GREEDY)
        assert torch.equal(model.generate(**batch, vtc_budget="full", **GREEDY), ids)
    beams = {"num_beams": 2, "max_new_tokens": 3, "do_sample": False}
    if base == "qwen3_vl" and RELEASE >= (5, 0):
        ids = stock.generate(**given_to_stock(model, batch), **beams)
        assert torch.equal(model.generate(**batch, vtc_budget="full", **beams), ids)


# positions


def test_positions_in_time_by_hand():
    """A video of 3 frames of 1 x 2 tokens, 0.6 seconds apart at 2 tokens per second, text, and an image of 1 x 1."""
    v, _ = True, False
    placeholders = torch.tensor([[_, v, v, v, v, v, v, _, v, _]])
    videos = Videos([1, 3], 1, torch.tensor([0.6]), placeholders & (torch.arange(10) < 8))
    order = torch.tensor([1, 2, 3, 0])
    grids = torch.tensor([[1, 2]] * 3 + [[1, 1]])
    times, steps = videos.steps_in_time(grids, order, 2)
    # 0, 1.2 and 2.4 positions, rounded down
    assert (times.tolist(), steps.tolist()) == ([0, 1, 2, 0], [0, 0, 3, 1])
    positions = grid_positions(placeholders, torch.ones(1, 10), grids, None, times, steps)[:, 0].tolist()
    assert positions == [
        [0, 1, 1, 2, 2, 3, 3, 4, 5, 6],
        [0, 1, 1, 1, 1, 1, 1, 4, 5, 6],
        [0, 1, 2, 1, 2, 1, 2, 4, 5, 6],
    ]


@pytest.mark.parametrize("padding_side", ("left", "right"))
def test_positions_are_those_of_the_stock_model(base, padding_side):
    model = model_of(base)
    # whole seconds, which every release agrees about
    batch = video_batch(model, 6, MIXED, padding_side, seconds=2.0)
    names = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts", "attention_mask", "mm_token_type_ids")
    given = {name: value for name, value in given_to_stock(model, batch).items() if name in names}
    expected, _ = uncompressed(model).model.get_rope_index(batch["input_ids"], **given)
    positions, real = layout_of(model, batch).positions, batch["attention_mask"].bool()
    if base == "qwen2_5_vl" and RELEASE >= (5, 0):
        # releases after 4.57 let text behind a video go on within its time: images and videos differ by where they
        # begin, and by nothing else
        config = model.config
        for token_id in config.placeholder_ids:
            for row in range(len(real)):
                mine, theirs = (each[:, row][:, batch["input_ids"][row] == token_id] for each in (positions, expected))
                assert torch.equal(mine.diff(dim=1)[0].clamp(max=0), theirs.diff(dim=1)[0].clamp(max=0))
        first = [row for row, items in enumerate(MIXED) if items[:1] == ("video",)]
        for row in first:
            length = int((batch["input_ids"][row] == config.video_token_id).nonzero()[-1]) + 1
            own = real[row].clone()
            own[length:] = False
            assert torch.equal(positions[:, row][:, own], expected[:, row][:, own])
        return
    assert torch.equal(positions[:, real], expected[:, real])


def test_a_second_of_another_length_moves_frames(base):
    model = model_of(base)
    if base == "qwen3_vl":
        batch = video_batch(model, 1)
        with pytest.raises(ValueError, match="`second_per_grid_ts` is of no use for qwen3_vl"):
            model(**batch, second_per_grid_ts=[1.0, 1.0])
        return
    batch = video_batch(model, 1, [("video",)])
    times = [layout_of(model, batch | {"second_per_grid_ts": [each]}).positions for each in (0.5, 1.0)]
    own = batch["input_ids"][0] == model.config.video_token_id
    start = times[0][0, 0, own].min()
    assert torch.equal(2 * (times[0][0, 0, own] - start), times[1][0, 0, own] - start)
    # nothing said is one second
    assert torch.equal(layout_of(model, batch).positions, times[1])


# compression: frames are images


def as_images(model, batch):
    """The same prompts, of which frames are images, at the places that a video has."""
    config, ids = model.config, batch["input_ids"]
    layout = layout_of(model, batch)
    grids = torch.nn.functional.pad(layout.sizes.image_sizes // config.vision_config.patch_size, (1, 0), value=1)
    vision = VisionInputs(**{name: batch.get(name) for name in VisionInputs.__dataclass_fields__})
    return {
        "input_ids": ids.masked_fill(ids == config.video_token_id, config.image_token_id),
        "attention_mask": batch["attention_mask"],
        "pixel_values": model.model._patches_of(vision, layout),
        "image_grid_thw": grids,
        "position_ids": layout.positions,
    }


def models():
    for method in METHODS:
        if method == "llavolta":
            for layer_idx in range(3):
                yield method, {"compress_layer_idx": layer_idx, "compressor": "avgpool2d", "compress_stride": 4}
            yield method, {"compress_layer_idx": 2, "compressor": "uniform", "compress_stride": 3}
        else:
            yield method, {}


@pytest.mark.parametrize(("method", "fields"), list(models()))
@torch.no_grad()
def test_frames_are_compressed_as_images_are(base, method, fields):
    model = tiny_model(f"{method} on {base}", **fields)
    batch = video_batch(model, 7, MIXED, seconds=0.5)
    images = as_images(model, batch)
    expected, out = model(**images), model(**batch)
    assert torch.equal(out.logits, expected.logits) and torch.equal(out.kept_mask, expected.kept_mask)
    frames = batch["video_grid_thw"][:, 0].tolist()
    # images first, then videos; in the prompts: a video, an image and a video, a video and two images
    kept = expected.num_visual_tokens.tolist()
    a, b, c = frames
    shown = [kept[:a], [kept[a]], kept[a + 1 :][:b], kept[a + 1 + b :][:c], *([each] for each in kept[-2:])]
    assert out.num_visual_tokens.tolist() == [sum(shown[idx]) for idx in (1, 4, 5, 0, 2, 3)]
    assert torch.equal(model.count_visual_tokens(**batch), out.num_visual_tokens)
    assert int(out.num_visual_tokens.sum()) < int(model.count_visual_tokens(**batch, vtc_budget="full").sum())


@pytest.mark.parametrize(("method", "fields"), SETTINGS)
@torch.no_grad()
def test_rows_with_videos_do_not_depend_on_others(base, method, fields):
    model = tiny_model(f"{method} on {base}", **fields)
    generator = torch.Generator().manual_seed(8)
    rows = [video_row(model, items, generator) for items in MIXED]
    for side in ("left", "right"):
        out = model(**batch_of_rows(model, rows, side, 0.5))
        for idx, row in enumerate(rows):
            alone = model(**batch_of_rows(model, [row], side, 0.5 if row.videos else None))
            kept, own = out.kept_mask[idx], alone.kept_mask
            own = torch.ones(1, len(row.ids), dtype=torch.bool) if own is None else own
            torch.testing.assert_close(out.logits[idx, kept], alone.logits[0, own[0]], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("method", "fields"), SETTINGS)
def test_generate_is_the_same_with_and_without_a_cache(base, method, fields):
    model = tiny_model(f"{method} on {base}", **fields)
    batch = video_batch(model, 9, MIXED, seconds=0.5)
    budget = {"vtc_budget": 0.5}
    if method == "cdpruner":
        with torch.no_grad():
            budget = {"router_decisions": model(**batch, **budget).router_decisions}
    out = model.generate(**batch, **budget, **GREEDY)
    assert torch.equal(out, model.generate(**batch, **budget, **GREEDY, use_cache=False))
    beams = model.generate(**batch, **budget, num_beams=2, num_return_sequences=2, max_new_tokens=3, do_sample=False)
    assert beams.shape[0] == 2 * len(MIXED)


@torch.no_grad()
def test_adjacent_images_and_videos(base):
    """Nothing but their own markers between items."""
    model = model_of(base)
    batch = video_batch(model, 10, [("video", "image", "video", "video")], seconds=1.0, text=0)
    expected = stock_logits(model, uncompressed(model), batch)
    torch.testing.assert_close(model(**batch, vtc_budget="full").logits, expected, rtol=0, atol=2e-5)


@torch.no_grad()
def test_prompts_of_embeddings_say_where_videos_are(base):
    model = model_of(base)
    batch = video_batch(model, 11, MIXED, seconds=1.0)
    expected = model(**batch).logits
    embeds = model.get_input_embeddings()(batch.pop("input_ids"))
    assert torch.equal(model(**batch, inputs_embeds=embeds).logits, expected)


# training


@pytest.mark.parametrize(("method", "fields"), SETTINGS)
def test_a_step_on_videos_reaches_every_part(base, method, fields):
    model = tiny_model(f"{method} on {base}", **fields).train()
    batch = video_batch(model, 12, [("video",), ("image",), ()], seconds=1.0)
    out = model(**batch, labels=batch["input_ids"])
    assert out.logits is None
    out.loss.backward()
    parts = ["model.vision_tower.merger", "model.vision_tower.blocks", "model.language_model.layers"]
    parts += ["model.vision_tower.deepstack_merger_list"] * (base == "qwen3_vl")
    for part in parts:
        assert any(
            each.grad is not None and bool(each.grad.abs().sum() > 0)
            for name, each in model.named_parameters()
            if name.startswith(part)
        ), part


def test_placeholders_of_videos_are_never_learned_or_written(base):
    model = model_of(base)
    batch = video_batch(model, 13, [("video",)], seconds=1.0)
    labels = batch["input_ids"]
    hidden = labels.masked_fill(labels == model.config.video_token_id, -100)
    with torch.no_grad():
        assert torch.equal(model(**batch, labels=labels).loss, model(**batch, labels=hidden).loss)
        model.lm_head.weight[model.config.video_token_id] = 100 * model.lm_head.weight.abs().max()
    out = model.generate(**batch, **GREEDY)
    assert not bool((out[:, labels.shape[1] :] == model.config.video_token_id).any())


# what is refused


def test_videos_that_do_not_fit_are_refused(base):
    model = model_of(base)
    batch = video_batch(model, 14, [("video",)])
    without = {name: value for name, value in batch.items() if name != "video_grid_thw"}
    with pytest.raises(ValueError, match="`video_grid_thw` must be patches of each video"):
        model(**without)
    with pytest.raises(ValueError, match="`pixel_values_videos` must have a row for each patch"):
        model(**batch | {"pixel_values_videos": batch["pixel_values_videos"][:-1]})
    with pytest.raises(ValueError, match="no `pixel_values_videos` were given"):
        model(batch["input_ids"])
    images = {"pixel_values": batch["pixel_values_videos"], "image_grid_thw": batch["video_grid_thw"]}
    with pytest.raises(ValueError, match="`image_grid_thw` of image 0 must be 1 and"):
        model(batch["input_ids"], **images)
    ids = batch["input_ids"]
    ids = ids.masked_fill(ids == model.config.video_token_id, model.config.image_token_id)
    with pytest.raises(ValueError, match="placeholders of images, but those given need 0"):
        model(**batch | {"input_ids": ids})
    with pytest.raises(ValueError, match="`second_per_grid_ts` is of no use without videos"):
        model(torch.tensor([[5, 6]]), pixel_values=torch.zeros(4, 96), second_per_grid_ts=[1.0])


def test_frames_that_text_sets_apart_are_refused_where_positions_tell_their_time():
    model = model_of("qwen2_5_vl")
    batch = video_batch(model, 15, [("video",)], seconds=1.0)
    ids = batch["input_ids"][0].tolist()
    frame = int(batch["video_grid_thw"][0, 1:].prod()) // 4
    first = ids.index(model.config.video_token_id)
    ids = ids[: first + frame] + [7] + ids[first + frame :]
    with pytest.raises(ValueError, match="text between the frames of a video"):
        model(torch.tensor([ids]), **{name: batch[name] for name in ("pixel_values_videos", "video_grid_thw")})


def test_models_that_take_no_videos_say_so():
    videos = {"pixel_values_videos": torch.zeros(8, 96), "video_grid_thw": torch.tensor([[2, 2, 2]])}
    for name in ("llavolta", "vico", "avg_llava"):
        with pytest.raises(ValueError, match="videos need a tower that sees grids"):
            tiny_model(name)(torch.tensor([[5, 6]]), **videos)
        with pytest.raises(ValueError, match="`video_token_id` is of no use"):
            tiny_config(name, video_token_id=5)
    model = tiny_model("llavolta on qwen3_vl", video_token_id=None)
    with pytest.raises(ValueError, match="need a `video_token_id`"):
        model(torch.tensor([[5, 301, 301, 6]]), **videos)
    with pytest.raises(ValueError, match="must differ"):
        tiny_config("llavolta on qwen3_vl", video_token_id=tiny_config("llavolta on qwen3_vl").image_token_id)
