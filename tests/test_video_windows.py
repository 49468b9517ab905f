"""LLaVolta's windows over several frames of a video: rows by hand, counts, budgets, prompts, and what is refused."""

import pytest
import torch
from contract_samples import GREEDY
from factories import tiny_config, tiny_model, uncompressed
from qwen_models import BASES, batch_of_rows, layout_of, video_batch, video_row
from test_qwen_bases import windows_by_hand
from test_video_processing import frames, processor_of
from transformers import AutoModelForImageTextToText, TrainingArguments

from hf_vtc.models.grids_vtc import grid_windows
from hf_vtc.models.modeling_compressors_llavolta import shorten
from hf_vtc.models.packing_vtc import Span
from hf_vtc.models.videos_vtc import levels_of_frames
from hf_vtc.plot.frames import frames_with_tokens
from hf_vtc.trainers import LlavoltaTrainer
from hf_vtc.trainers.schedule import Stage

pytestmark = pytest.mark.window

MIXED = (("video",), ("image", "video"), (), ("video", "image", "image"))
# (compressor, tokens that become one, frames in which they lie)
WINDOWS = (("avgpool1d", 2, 2), ("avgpool1d", 6, 3), ("avgpool2d", 8, 2), ("avgpool2d", 4, 4))


@pytest.fixture(scope="module", params=BASES)
def base(request):
    return request.param


def model_of(base, layer_idx=1, window=WINDOWS[0], **fields):
    compressor, stride, num_frames = window
    fields |= {"compressor": compressor, "compress_stride": stride, "compress_frames": num_frames}
    return tiny_model(f"llavolta on {base}", compress_layer_idx=layer_idx, **fields)


def features_of(stock, kind, pixels, grid):
    """Visual tokens of an image or a video in the stock model, and rows of each deeper layer."""
    given = stock.model.get_video_features if kind == "video" else stock.model.get_image_features
    found = given(pixels, torch.tensor([grid]))
    found = found if isinstance(found, tuple) else (found.pooler_output, found.get("deepstack_features"))
    tokens, deeper = found if isinstance(found[0], (tuple, list)) else (found, None)
    return torch.cat(list(tokens)), [torch.cat(each) if isinstance(each, tuple) else each for each in deeper or ()]


def groups_by_hand(config, ids, grids):
    """Columns that become one each, in the order of the columns in which they stand: the first of the last frame."""
    groups, first = [], {}
    visual = {token_id: (ids == token_id).nonzero().flatten().tolist() for token_id in config.placeholder_ids}
    text = [[column] for column in range(len(ids)) if int(ids[column]) not in visual]
    for kind, (num_frames, rows, columns) in grids:
        token_id = config.video_token_id if kind == "video" else config.image_token_id
        start, size = first.get(token_id, 0), rows * columns
        first[token_id] = start + num_frames * size
        own = visual[token_id][start : first[token_id]]
        cut = [own[frame * size : (frame + 1) * size] for frame in range(num_frames)]
        for begin in range(0, num_frames, config.compress_frames):
            shared = cut[begin : begin + config.compress_frames]
            stride = config.compress_stride // config.compress_frames
            for members in windows_by_hand((rows, columns), config.compressor, stride):
                groups.append((shared[-1][members[0]], [frame[member] for frame in shared for member in members]))
    return [members for _, members in sorted([*groups, *((each[0], each) for each in text)])]


@torch.no_grad()
def logits_by_hand(model, row, seconds):
    """Logits `(K, V)` of a `VideoRow`: layer by layer, pooled before one of them, rows added behind."""
    own, config, stock = model.model, model.config, uncompressed(model)
    batch = batch_of_rows(model, [row], seconds=seconds if row.videos else None)
    ids, states = batch["input_ids"][0], own.get_input_embeddings()(batch["input_ids"])
    merge, num_deeper = config.vision_config.spatial_merge_size, 2 * (config.grid_base == "qwen3_vl")
    rows, grids = torch.zeros(num_deeper, *states.shape), []
    for kind, shown, token_id in (
        ("image", row.images, config.image_token_id),
        ("video", row.videos, config.video_token_id),
    ):
        found = [features_of(stock, kind, *each) for each in shown]
        if found:
            states[0, ids == token_id] = torch.cat([tokens for tokens, _ in found])
            for idx in range(num_deeper):
                rows[idx, 0, ids == token_id] = torch.cat([deeper[idx] for _, deeper in found])
        grids += [(kind, (grid[0], grid[1] // merge, grid[2] // merge)) for _, grid in shown]
    positions = torch.arange(len(ids)).expand(3, 1, -1) if not grids else layout_of(model, batch).positions
    decoder = own.language_model
    for idx, layer in enumerate(decoder.layers):
        if idx == config.compress_layer_idx:
            groups = groups_by_hand(config, ids, grids)
            states = torch.stack([states[:, members].mean(1) for members in groups], dim=1)
            rows = torch.stack([rows[:, :, members].mean(2) for members in groups], dim=2)
            positions = torch.stack([positions[..., members].sum(-1) // len(members) for members in groups], dim=-1)
        states = layer(states, attention_mask=None, position_embeddings=decoder.rotary_emb(states, positions))
        states = states[0] if isinstance(states, tuple) else states
        if idx < len(rows):
            states = states + rows[idx]
    return model.lm_head(decoder.norm(states))[0]


def rows_of(model, seed):
    generator = torch.Generator().manual_seed(seed)
    return [video_row(model, items, generator) for items in MIXED]


# against rows by hand


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("layer_idx", (0, 1, 2))
def test_rows_equal_rows_by_hand(base, layer_idx, window):
    model = model_of(base, layer_idx, window)
    rows = rows_of(model, 1)
    assert {frame % window[2] == 0 for row in rows for _, (frame, _, _) in row.videos} == {True, False}
    for side in ("left", "right"):
        with torch.no_grad():
            out = model(**batch_of_rows(model, rows, side, 0.5))
        for idx, row in enumerate(rows):
            expected = logits_by_hand(model, row, 0.5)
            torch.testing.assert_close(out.logits[idx, out.kept_mask[idx]], expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("layer_idx", (0, 1, 2))
def test_generate_continues_rows_by_hand(base, layer_idx):
    model = model_of(base, layer_idx, ("avgpool2d", 8, 2))
    rows = rows_of(model, 2)[:3]
    batch = batch_of_rows(model, rows, "left", 0.5)
    out = model.generate(**batch, **GREEDY)
    assert torch.equal(out, model.generate(**batch, **GREEDY, use_cache=False))
    static = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(out, model.generate(**batch, **GREEDY, **static))
    for idx, row in enumerate(rows):
        for token in out[idx, batch["input_ids"].shape[1] :].tolist():
            assert token == int(logits_by_hand(model, row, 0.5)[-1].argmax())
            row.ids.append(token)


def test_tokens_stand_in_the_last_frame_of_their_window(base):
    model = model_of(base, 1, ("avgpool1d", 2, 2))
    batch = video_batch(model, 3, [("video",)], seconds=1.0)
    num_frames = int(batch["video_grid_thw"][0, 0])
    with torch.no_grad():
        kept = model(**batch).kept_mask[0]
    own = batch["input_ids"][0] == model.config.video_token_id
    by_frame = kept[own].unflatten(0, (num_frames, -1))
    last = [idx % 2 == 1 or idx == num_frames - 1 for idx in range(num_frames)]
    assert by_frame.all(1).tolist() == last and by_frame.any(1).tolist() == last
    # the text between frames stays
    assert bool(kept[~own].all())


@torch.no_grad()
def test_text_before_a_token_does_not_know_what_it_is_made_of(base):
    """Another last frame leaves all before it as it was."""
    model = model_of(base, 1, ("avgpool2d", 8, 2))
    batch = video_batch(model, 4, [("video",)], seconds=1.0)
    num_frames, *sides = batch["video_grid_thw"][0].tolist()
    other = batch | {"pixel_values_videos": batch["pixel_values_videos"].clone()}
    other["pixel_values_videos"][-sides[0] * sides[1] :] = 1.0
    out, changed = model(**batch), model(**other)
    columns = (batch["input_ids"][0] == model.config.video_token_id).nonzero().flatten()
    # the last frame of the last window but one ends what does not change
    begin = columns[(num_frames - 1) * (len(columns) // num_frames)]
    assert torch.equal(out.logits[0, :begin], changed.logits[0, :begin])
    assert not torch.equal(out.logits[0, -1], changed.logits[0, -1])


def test_windows_of_frames_by_hand():
    """Two frames of 1 x 3 tokens with other states between, in windows of 1 x 2, and a frame alone behind them."""
    members, widths = grid_windows(3, 3, 1, 2, 2)
    assert members.tolist() == [0, 1, 3, 4, 2, 5] and widths.tolist() == [4, 2]
    spans = [Span(0, 1, 3, 2, 3, 0), Span(0, 6, 3, 2, 3, 2), Span(0, 10, 3, 2, 3, 1)]
    states = torch.arange(13.0)[:, None] ** 2
    shortened = shorten(states, spans, "avgpool1d", 1)
    assert shortened.num_kept == [0, 2, 2] and shortened.host_slots.tolist() == [6, 8, 10, 12]
    means = [(1 + 4 + 36 + 49) / 4, (9 + 64) / 2, (100 + 121) / 2, 144]
    assert shortened.take(states, shortened.host_slots).flatten().tolist() == means
    places = shortened.moved(torch.arange(13).expand(2, -1))
    # (1 + 2 + 6 + 7) / 4, (3 + 8) / 2 and (10 + 11) / 2, rounded down
    assert places[0, [6, 8, 10, 12]].tolist() == [4, 5, 10, 12]


# counts and budgets


@torch.no_grad()
def test_counts_and_budgets_agree(base):
    model = model_of(base, 1, ("avgpool1d", 4, 2))
    batch = video_batch(model, 5, MIXED, seconds=1.0)
    merge = model.config.vision_config.spatial_merge_size
    grids = torch.cat([batch["image_grid_thw"], batch["video_grid_thw"]]).tolist()
    counts = [(frames, rows // merge, columns // merge) for frames, rows, columns in grids]
    by_two = [-(-frames // 2) * rows * -(-columns // 2) for frames, rows, columns in counts]
    by_place = [-(-frames // 2) * rows * columns for frames, rows, columns in counts]
    whole = [frames * rows * columns for frames, rows, columns in counts]
    cases = [(None, by_two), ("full", whole), (by_place, by_place), (by_two, by_two), (1.0, whole)]
    # a token less than all of a video is a window more
    cases.append(([n - 1 if frames > 1 else n for n, (frames, _, _) in zip(whole, counts)], by_place))
    for budget, expected in cases:
        out = model(**batch, vtc_budget=budget)
        assert out.num_visual_tokens.tolist() == expected
        assert model.count_visual_tokens(**batch, vtc_budget=budget).tolist() == expected
        placeholders = torch.isin(batch["input_ids"], torch.tensor(model.config.placeholder_ids))
        assert int(out.kept_mask[placeholders].sum()) == sum(expected) == len(out.image_hidden_states)
    fewest = [-(-frames // 2) * rows for frames, rows, _ in counts]
    assert model.count_visual_tokens(**batch, vtc_budget=fewest).tolist() == fewest
    with pytest.raises(ValueError, match=f"smallest admissible count is {fewest[-1]} "):
        model(**batch, vtc_budget=[*fewest[:-1], fewest[-1] - 1])


def test_a_split_over_windows_by_hand():
    levels = (12, 12, 6, 3)
    # 5 frames are 3 windows
    for budget, level in ((60, 0), (59, 1), (36, 1), (35, 2), (18, 2), (17, 3), (9, 3), (0.5, 2), (0.6, 1)):
        assert levels_of_frames(budget, levels, 5, joined=2) == [level] * 5
    with pytest.raises(ValueError, match="smallest admissible count is 9 "):
        levels_of_frames(8, levels, 5, joined=2)


@torch.no_grad()
def test_no_stride_is_no_window(base):
    model = model_of(base, 1, ("avgpool2d", 1, 2))
    plain = model_of(base, 1, ("avgpool2d", 1, 1))
    batch = video_batch(model, 6, MIXED, seconds=1.0)
    out = model(**batch)
    assert torch.equal(out.logits, plain(**batch).logits)
    assert torch.equal(out.num_visual_tokens, model.count_visual_tokens(**batch, vtc_budget="full"))
    nowhere = model_of(base, 3, ("avgpool2d", 8, 2))
    assert torch.equal(nowhere(**batch).num_visual_tokens, out.num_visual_tokens)


@torch.no_grad()
def test_images_have_the_window_of_one_frame(base):
    model, plain = model_of(base, 1, ("avgpool2d", 8, 2)), model_of(base, 1, ("avgpool2d", 4, 1))
    batch = video_batch(model, 7, [("image",), ("image", "image"), ()])
    assert torch.equal(model(**batch).logits, plain(**batch).logits)
    assert torch.equal(model(**batch, vtc_budget=0.5).logits, plain(**batch, vtc_budget=0.5).logits)


# prompts, files, drawings, training


@torch.no_grad()
def test_prompts_for_a_budget(base):
    processor = processor_of(base)
    model = model_of(base, 1, ("avgpool2d", 8, 2), video_token_id=processor.video_token_id)
    processor.model_config = model.config
    given = {"text": ["<IMG_CONTEXT>?<|im_start|>!"], "images": [frames(1)[0]], "videos": [frames(6)]}
    given["return_tensors"] = "pt"
    whole, written = processor(**given), processor(**given, vtc_budget=[0.5, 0.67])
    # what enters are all tokens, which get fewer inside
    assert torch.equal(whole["input_ids"], written["input_ids"])
    kept = model(**written, vtc_budget=[0.5, 0.67]).num_visual_tokens
    # three frames are two windows, here of one token of each frame
    by_place = 2 * int(whole["video_grid_thw"][0, 1:].prod()) // 4
    assert kept.tolist() == model.count_visual_tokens(**whole, vtc_budget=[0.5, 0.67]).tolist() == [2, by_place]
    reason = "of 3 frames, but the smallest admissible count is 2 "
    with pytest.raises(ValueError, match=reason):
        processor(**given, vtc_budget=[6, 1])
    with pytest.raises(ValueError, match=reason):
        model(**whole, vtc_budget=[6, 1])


def test_the_setting_is_saved(base, tmp_path):
    model = model_of(base, 2, ("avgpool2d", 8, 2))
    model.save_pretrained(tmp_path, save_code=False)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert again.config.compress_frames == 2
    batch = video_batch(model, 8, MIXED, seconds=1.0)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, again(**batch).logits)


def test_filmstrips_draw_every_frame_of_a_window(base):
    processor, video = processor_of(base), frames(10)
    model = model_of(base, 1, ("avgpool2d", 8, 2), video_token_id=processor.video_token_id)
    inputs = processor(text="a<|im_start|>b", videos=video, return_tensors="pt")
    for budget in (None, 0.5, "full"):
        with torch.no_grad():
            output = model(**inputs, vtc_budget=budget)
        drawn = frames_with_tokens(video, output, inputs["input_ids"], processor, model.config)
        assert len(drawn) == 5 and len({each.tobytes() for each in drawn}) == 5


def test_stages_of_training_keep_the_frames(base, tmp_path):
    model = model_of(base, 1, ("avgpool1d", 4, 2))
    samples = []
    for seed in range(4):
        batch = video_batch(model, 20 + seed, [("video",)], seconds=1.0)
        samples.append(batch | {"labels": batch["input_ids"].clone()})
    arguments = TrainingArguments(
        tmp_path, max_steps=4, per_device_train_batch_size=1, report_to="none", use_cpu=True, save_strategy="no"
    )
    arguments.remove_unused_columns = False
    own = {"train_dataset": samples, "data_collator": lambda batch: batch[0]}
    trainer = LlavoltaTrainer(model, arguments, stages=[Stage(1, 8, 0.25), Stage(2, 2, 0.5), Stage(0, 1, 0.25)], **own)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer.train()
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    batch = {name: value for name, value in samples[0].items() if name != "labels"}
    # the last stage compresses nothing
    full = model.count_visual_tokens(**batch, vtc_budget="full")
    assert torch.equal(model.count_visual_tokens(**batch), full)
    with pytest.raises(ValueError, match="a multiple of `compress_frames`"):
        LlavoltaTrainer(model, arguments, stages=[Stage(1, 3, 1.0)], **own)


# what is refused


def test_fields_that_do_not_fit_are_refused(base):
    name = f"llavolta on {base}"
    for fields, reason in (
        ({"compress_frames": 0}, "at least 1"),
        ({"compress_frames": 3}, "`compress_stride` must be 1 or a multiple of `compress_frames`"),
        (
            {"compress_frames": 2, "compressor": "uniform"},
            "means of windows, one of avgpool1d, avgpool2d, got 'uniform'",
        ),
        (
            {"compress_frames": 2, "compressor": "avgpool2d", "compress_stride": 4},
            r"`compress_frames` \(2\) times a sq",
        ),
        ({"compress_frames": 2, "video_token_id": None}, "is for videos, which need a `video_token_id`"),
        ({"compress_frames": 2, "frame_split": "change"}, "gives each frame tokens of its own"),
    ):
        with pytest.raises(ValueError, match=reason):
            tiny_config(name, **fields)
    with pytest.raises(ValueError, match="is for videos"):
        tiny_config("llavolta", compress_frames=2)


def test_videos_that_others_share_or_interrupt_are_refused():
    """Prompts that no processor writes, of a base whose frames text sets apart."""
    model = model_of("qwen3_vl", 1, ("avgpool1d", 2, 2))
    batch = video_batch(model, 9, [("video", "image")])
    ids, config = batch["input_ids"][0].tolist(), model.config
    num_frames, size = int(batch["video_grid_thw"][0, 0]), int(batch["video_grid_thw"][0, 1:].prod()) // 4
    image = [config.image_token_id] * ids.count(config.image_token_id)
    frames = [[7] + [config.video_token_id] * size for _ in range(num_frames)]
    pixels = {name: value for name, value in batch.items() if name not in ("input_ids", "attention_mask")}
    between = torch.tensor([[*frames[0], 7, *image, *sum(frames[1:], []), 7]])
    with pytest.raises(ValueError, match="Sample 0 shows another picture between the frames of video 0"):
        model(between, **pixels)
    config.compress_frames = 1
    with torch.no_grad():
        model(between, **pixels)
    first, second = [*frames[0], 7, *image, 7], [*sum(frames[1:], []), 7]
    length = max(len(first), len(second))
    rows = torch.tensor([row + [7] * (length - len(row)) for row in (first, second)])
    with pytest.raises(ValueError, match=r"The frames of video 0 stand in samples \[0, 1\]"):
        model(rows, **pixels)
