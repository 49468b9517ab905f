"""AVG-LLaVA on an InternVL base: tiles one after the other, the thumbnail last, no newlines."""

import pytest
import torch
from avg_llava_samples import SCALES, router_logits
from factories import (
    _TEXT,
    _VISION,
    stock_inputs,
)
from transformers import InternVLConfig, InternVLForConditionalGeneration

from hf_vtc.convert import from_base
from hf_vtc.models.ops_vtc import pool_pyramid


def internvl(seed=0):
    torch.manual_seed(seed)
    config = InternVLConfig(
        vision_config=dict(_VISION), text_config=dict(_TEXT), image_token_id=271, downsample_ratio=0.5
    )
    base = InternVLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=2 * parameter[0].numel() ** -0.5)
    return base


@pytest.fixture(scope="module")
def flat():
    """AVG-LLaVA on an InternVL base: tiles one after the other, the thumbnail last, no newlines."""
    torch.manual_seed(0)
    return from_base(internvl(), "avg_llava", router_select=True, filtered_text_num=8, router_num_heads=4)


def flat_batch(config, tiles=(3, 1, 4), with_counts=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for num_tiles in tiles:
        text = torch.randint(1, 200, (12,), generator=generator).tolist()
        rows.append(text[:5] + [config.image_token_id] * (16 * num_tiles) + text[5:])
    longest = max(map(len, rows))
    batch = {
        "input_ids": torch.tensor([[0] * (longest - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
        "pixel_values": torch.randn(sum(tiles), 3, 32, 32, generator=generator),
    }
    return {**batch, "num_tiles": torch.tensor(tiles)} if with_counts else batch


def test_internvl_base_becomes_flat(flat):
    config = flat.config
    assert config.vis_token_granularity == SCALES and config.granularity_grids[1] == (2, 1)
    assert config.mm_patch_merge_type == "flat" and config.base_tile == "last"
    assert flat.model.image_newline is None
    batch = flat_batch(config)
    for idx, scale in enumerate(SCALES):
        decisions = torch.full((3,), idx)
        assert flat.count_visual_tokens(**batch, router_decisions=decisions).tolist() == [
            scale * tiles for tiles in (3, 1, 4)
        ]
    base = internvl()
    with torch.no_grad():
        assert torch.equal(flat(**batch, vtc_budget="full").logits, base(**stock_inputs(base, batch)).logits)


def test_flat_tokens_are_the_pooled_tiles_in_order(flat):
    batch = flat_batch(flat.config)
    with torch.no_grad():
        out = flat(**batch, router_decisions=torch.tensor([2, 4, 0]))
        tokens = flat.model.multi_modal_projector(flat.model.encode(batch["pixel_values"]))
    pyramid = pool_pyramid(tokens, SCALES)
    expected = [pyramid[2][:3], pyramid[4][3:4], pyramid[0][4:]]
    assert torch.equal(out.image_hidden_states, torch.cat([part.flatten(0, 1) for part in expected]))


def test_flat_compares_text_with_the_thumbnail(flat):
    seen = []
    handle = flat.model.router.register_forward_hook(lambda module, args, output: seen.append(args[1]))
    batch = flat_batch(flat.config, tiles=(3,))
    try:
        router_logits(flat, batch)
        changed = {**batch, "pixel_values": batch["pixel_values"].clone()}
        changed["pixel_values"][:2] = 0
        router_logits(flat, changed)
        changed["pixel_values"][2] = 0
        router_logits(flat, changed)
    finally:
        handle.remove()
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])


def test_num_tiles_can_be_left_out(flat):
    batch = flat_batch(flat.config)
    without = flat_batch(flat.config, with_counts=False)
    with torch.no_grad():
        expected, out = flat(**batch), flat(**without)
    assert torch.equal(out.logits, expected.logits)
    assert torch.equal(out.router_logits, expected.router_logits)
    assert torch.equal(out.num_visual_tokens, expected.num_visual_tokens)


def test_a_router_in_training_mode_speaks_whatever_is_asked(flat):
    batch = flat_batch(flat.config)
    flat.model.router.train()
    try:
        out = flat(**batch, router_decisions=torch.zeros(3, dtype=torch.long))
    finally:
        flat.model.router.eval()
    assert out.router_logits.requires_grad and out.router_decisions.tolist() == [0, 0, 0]
