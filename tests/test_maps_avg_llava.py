"""Maps of tiles: the pyramid, canvases, what is unpadded, and the order of joined tokens."""

import pytest
import torch
import torch.nn.functional as F
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import unpad_image

from hf_vtc.models.grids_vtc import pooled_grid
from hf_vtc.models.ops_vtc import pool_pyramid
from hf_vtc.models.tiling_vtc import anyres_layout, best_canvases, joined_order, unpadded_grids

PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


def random_sizes(count=2000, longest=1500):
    sizes = torch.randint(30, longest, (count, 2), generator=torch.Generator().manual_seed(0))
    # and sizes at which the float arithmetic has to truncate a whole number
    return torch.cat([sizes, torch.tensor([[60, 60], [100, 100], [336, 336], [672, 672], [100, 300], [7 * 48, 49]])])


def test_pool_pyramid_by_hand():
    grid = torch.arange(16.0).reshape(1, 16, 1)
    pooled = pool_pyramid(grid, [16, 8, 4, 2, 1])
    assert pooled[0] is grid
    # columns are halved first
    assert pooled[1].flatten().tolist() == [0.5, 2.5, 4.5, 6.5, 8.5, 10.5, 12.5, 14.5]
    assert pooled[2].flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert pooled[3].flatten().tolist() == [3.5, 11.5]
    assert pooled[4].flatten().tolist() == [7.5]


def test_pool_pyramid_equals_halving_step_by_step():
    features = torch.randn(3, 24 * 24, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    maps = features.transpose(1, 2).unflatten(2, (24, 24))
    pooled = pool_pyramid(features, [576, 288, 144, 72, 36])
    for step, expected_tokens in enumerate(pooled):
        torch.testing.assert_close(maps.flatten(2).transpose(1, 2), expected_tokens)
        maps = F.avg_pool2d(maps, (1, 2) if step % 2 == 0 else (2, 1))


@pytest.mark.parametrize("side, scale", ((4, 3), (4, 0), (4, 32), (5, 12), (6, 3), (4, -4)))
def test_unreachable_scales_raise(side, scale):
    with pytest.raises(ValueError, match=f"granularity of {scale} "):
        pooled_grid(side, scale)


def test_best_canvases_are_those_of_transformers():
    sizes = random_sizes()
    expected = [select_best_resolution(tuple(size), [list(pair) for pair in PINPOINTS]) for size in sizes.tolist()]
    assert best_canvases(sizes, PINPOINTS).tolist() == [list(pair) for pair in expected]


def test_canvas_of_a_small_square_is_the_first_pinpoint():
    for pinpoints in (PINPOINTS, PINPOINTS[1::-1] + PINPOINTS[2:]):
        assert best_canvases(torch.tensor([[60, 60]]), pinpoints).tolist() == [list(pinpoints[0])]
        assert anyres_layout(60, 60, 336, pinpoints).grid == tuple(side // 336 for side in pinpoints[0])


def test_true_aspect_is_what_transformers_unpads():
    sizes = random_sizes()
    grids = best_canvases(sizes, PINPOINTS) // 336
    kept = unpadded_grids(sizes, grids, (24, 24), "true_aspect")
    for size, grid, rows_columns in zip(sizes, grids.tolist(), kept.tolist(), strict=True):
        unpadded = unpad_image(torch.empty(1, 24 * grid[0], 24 * grid[1]), size)
        assert list(unpadded.shape[1:]) == rows_columns


@pytest.mark.parametrize("tokens", ((24, 24), (24, 12), (12, 12), (12, 6), (6, 6)))
def test_token_grid_is_the_rule_of_the_paper_code(tokens):
    sizes = random_sizes()
    grids = best_canvases(sizes, PINPOINTS) // 336
    kept = unpadded_grids(sizes, grids, tokens, "token_grid")
    for (height, width), grid, found in zip(sizes.tolist(), grids.tolist(), kept.tolist(), strict=True):
        rows, columns = grid[0] * tokens[0], grid[1] * tokens[1]
        if width / height > columns / rows:
            rows -= (rows - int(height * (columns / width))) // 2 * 2
        else:
            columns -= (columns - int(width * (rows / height))) // 2 * 2
        assert found == [rows, columns]


def test_true_aspect_keeps_what_the_token_grid_cuts_away():
    size, grid = torch.tensor([[672, 672]]), torch.tensor([[2, 2]])
    assert unpadded_grids(size, grid, (24, 12), "token_grid").tolist() == [[24, 24]]
    assert unpadded_grids(size, grid, (24, 12), "true_aspect").tolist() == [[48, 24]]


def test_joined_order_by_hand():
    # two tiles side by side, 2 x 2 tokens each, of whose map the middle 2 columns stay
    order = joined_order((1, 2), (2, 2), (2, 2))
    assert order.tolist() == [0, 1, 2, 3, 5, 8, -1, 7, 10, -1]
    assert joined_order((2, 1), (1, 1), (2, 1)).tolist() == [0, 1, -1, 2, -1]
