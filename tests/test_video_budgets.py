"""One budget for a whole video: how it is split over frames, alone and in the models."""

import itertools

import pytest
import torch
from factories import tiny_config, tiny_model
from qwen_models import BASES, model_of, video_batch

from hf_vtc.models.videos_vtc import changes_of_frames, levels_of_frames

pytestmark = pytest.mark.window

# any count of a frame of 12 tokens; halves of it
ANY = range(12, 0, -1)
HALVES = (12, 6, 3)


@pytest.fixture(scope="module", params=BASES)
def base(request):
    return request.param


def counts_of(levels, chosen):
    return [levels[level] for level in chosen]


# the split by itself


@pytest.mark.parametrize(
    ("budget", "levels", "expected"),
    (
        ("full", HALVES, [12, 12, 12]),
        (0.5, HALVES, [6, 6, 6]),
        (1.0, ANY, [12, 12, 12]),
        # 17 tokens of 36 are 5 for each frame, with halves 3
        (17, ANY, [5, 5, 5]),
        (17, HALVES, [3, 3, 3]),
        (18, HALVES, [6, 6, 6]),
        (1000, HALVES, [12, 12, 12]),
        # a share such as 0.7 of 30 must give 21 although 0.7 * 30 is not exact in binary
        (0.7, range(10, 0, -1), [7, 7, 7]),
    ),
)
def test_uniform_splits(budget, levels, expected):
    assert counts_of(levels, levels_of_frames(budget, levels, 3)) == expected


@pytest.mark.parametrize(
    ("budget", "levels", "changes", "expected"),
    (
        # the first frame counts as the one that changes most: 3 of 3, 3, 1, 1 parts of what is above 1 each
        (20, ANY, [9.0, 3.0, 1.0, 1.0], [7, 7, 3, 3]),
        # nothing moves: as many of each
        (20, ANY, [0.0, 0.0, 0.0, 0.0], [5, 5, 5, 5]),
        # a frame that stands still keeps what a frame must; what rounding leaves goes to the first of equals
        (14, ANY, [0.0, 1.0, 0.0, 1.0], [5, 4, 1, 4]),
        # what is more than a frame has goes to the others
        (40, ANY, [0.0, 100.0, 1.0, 1.0], [12, 12, 8, 8]),
        # frames take steps, and what is left over goes to those that change most
        (24, HALVES, [0.0, 5.0, 1.0, 1.0], [12, 6, 3, 3]),
        ("full", HALVES, [0.0, 5.0, 1.0, 1.0], [12] * 4),
    ),
)
def test_splits_by_change(budget, levels, changes, expected):
    assert counts_of(levels, levels_of_frames(budget, levels, 4, changes)) == expected


def test_every_split_keeps_to_its_budget():
    generator = torch.Generator().manual_seed(0)
    for levels, num_frames in itertools.product((ANY, HALVES, (12, 12, 4, 4, 1)), (1, 2, 5)):
        for budget in range(num_frames * min(levels), num_frames * 12 + 3):
            changes = [None, torch.rand(num_frames, generator=generator).tolist(), [0.0] * num_frames]
            for own in changes:
                counts = counts_of(levels, levels_of_frames(budget, levels, num_frames, own))
                assert len(counts) == num_frames and sum(counts) <= budget
                if levels is ANY and own is not None and any(own[1:]):
                    # with any count nothing of a budget is left over
                    assert sum(counts) == min(budget, 12 * num_frames)
        with pytest.raises(ValueError, match=f"smallest admissible count is {num_frames * min(levels)}"):
            levels_of_frames(num_frames * min(levels) - 1, levels, num_frames)


def test_changes_by_hand():
    first, second = torch.zeros(4, 2), torch.ones(4, 2)
    second[0] = 5
    pixels = torch.cat([first, second, second, torch.full((8, 2), 7.0)])
    changes = changes_of_frames(pixels, torch.tensor([[3, 2, 2], [2, 2, 2]]))
    assert changes.tolist() == [0, 2, 0, 0, 0]


# in the models


@torch.no_grad()
def test_a_budget_is_that_of_a_whole_video(base):
    for method in ("llavolta", "avg_llava", "cdpruner"):
        model = tiny_model(f"{method} on {base}")
        batch = video_batch(model, 1, [("video",), ("image", "video"), ()], seconds=1.0)
        full = model.count_visual_tokens(**batch, vtc_budget="full")
        frames = [1, *batch["video_grid_thw"][:, 0].tolist()]
        for budget in (0.5, int(full.max()) // 2 + 5, [0.5, "full", 0.6], [int(full[0]), 0.5, "full"]):
            kept = model.count_visual_tokens(**batch, vtc_budget=budget)
            for own, most, whole, num_frames in zip(
                kept.tolist(), budget if isinstance(budget, list) else [budget] * 3, full.tolist(), frames
            ):
                allowed = whole if most == "full" else most * whole if isinstance(most, float) else most
                assert own <= allowed and own % num_frames == 0
                assert own == whole if most == "full" else own > 0
            out = model(**batch, vtc_budget=budget)
            assert torch.equal(out.num_visual_tokens, kept)
            assert int(out.num_visual_tokens.sum()) == len(out.image_hidden_states)
        with pytest.raises(ValueError, match="3 images, 2 entries"):
            model(**batch, vtc_budget=[0.5, 0.5])
        with pytest.raises(ValueError, match="for video 1 of"):
            model(**batch, vtc_budget=["full", 1, "full"])


@torch.no_grad()
def test_frames_that_change_get_more(base):
    model = tiny_model(f"cdpruner on {base}", frame_split="change")
    batch = video_batch(model, 2, [("video",)], seconds=1.0)
    num_frames = int(batch["video_grid_thw"][0, 0])
    own = batch["pixel_values_videos"].unflatten(0, (num_frames, -1))
    # all frames but the last one stand still
    own[1:-1] = own[0]
    budget = num_frames * own.shape[1] // 8
    out = model(**batch, vtc_budget=budget)
    assert out.num_visual_tokens.tolist() == [budget]
    ids, kept = batch["input_ids"][0], out.kept_mask[0]
    by_frame = kept[ids == model.config.video_token_id].unflatten(0, (num_frames, -1)).sum(1).tolist()
    assert by_frame[1:-1] == [1] * (num_frames - 2) and by_frame[0] > 1 and by_frame[-1] > 1
    model.config.frame_split = "uniform"
    out = model(**batch, vtc_budget=budget)
    by_frame = out.kept_mask[0][ids == model.config.video_token_id].unflatten(0, (num_frames, -1)).sum(1).tolist()
    assert by_frame == [budget // num_frames] * num_frames


@torch.no_grad()
def test_a_split_by_change_needs_pixels(base):
    model = model_of(base)
    batch = video_batch(model, 3, [("video",)], seconds=1.0)
    model.config.frame_split = "change"
    features = batch.pop("pixel_values_videos")
    with pytest.raises(ValueError, match="looks at `pixel_values_videos`"):
        model(**batch, image_features={"tokens": features[::4, :48]}, vtc_budget=0.5)
    with pytest.raises(ValueError, match="`frame_split` must be one of"):
        tiny_config(f"llavolta on {base}", frame_split="best")
    with pytest.raises(ValueError, match="`frame_split` is for videos"):
        tiny_config("llavolta", frame_split="change")
