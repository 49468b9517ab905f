"""AVG-LLaVA on Qwen3-VL and Qwen2.5-VL: windows, exact prompts, the router by hand, conversion, training and tools."""

import copy

import pytest
import torch
import torch.nn.functional as F
from factories import row_of, stock_inputs, tiny_config, tiny_model, tiny_processor, uncompressed
from PIL import Image
from qwen_models import BASES, batch_of, model_of
from transformers import TrainingArguments

from hf_vtc import bench, estimate
from hf_vtc.convert import from_base
from hf_vtc.lora import compressor_modules
from hf_vtc.methods import record_of
from hf_vtc.methods.drawing import Kept
from hf_vtc.models import modeling_router_avg_llava
from hf_vtc.models.modeling_router_avg_llava import RouterLayer
from hf_vtc.trainers import AvgLlavaGranularityTrainer, AvgLlavaRouterTrainer

pytestmark = pytest.mark.window

# of LLaVolta before the first layer, by the granularity that makes the same windows
SAME_WINDOWS = {0: ("avgpool2d", 16), 2: ("avgpool2d", 4), 3: ("avgpool1d", 2)}


@pytest.fixture(scope="module", params=BASES)
def base(request):
    return request.param


def own_model(base, **fields):
    return tiny_model(f"avg_llava on {base}", **fields)


@pytest.mark.parametrize(("lengths", "num_calls"), [([5, 5, 5], 1), ([5, 3, 5], 3), ([4], 1)], ids=str)
def test_attention_stays_within_images(monkeypatch, lengths, num_calls):
    """As of each image alone, those of one length in one call; four axes, without which torch fuses nothing."""
    torch.manual_seed(0)
    layer = RouterLayer(16, 4, 0.0, across_tiles=False).double().eval()
    states, attend, axes = torch.randn(sum(lengths), 16).double(), F.scaled_dot_product_attention, []
    with torch.no_grad():
        alone = torch.cat([layer.attend(rows[None], torch.zeros(1))[0] for rows in states.split(lengths)])
        monkeypatch.setattr(
            modeling_router_avg_llava.F,
            "scaled_dot_product_attention",
            lambda query, *rest, **named: axes.append(query.ndim) or attend(query, *rest, **named),
        )
        together = layer.attend_in_images(states, lengths)
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
    assert axes == [4] * num_calls


@pytest.mark.parametrize("granularity_idx", SAME_WINDOWS)
def test_granularities_are_windows_of_the_grid(base, granularity_idx):
    """LLaVolta on these bases is compared with rows by hand; of the same weights and windows it must give the same."""
    compressor, stride = SAME_WINDOWS[granularity_idx]
    pooling = model_of(base, 0, compressor, stride)
    model = own_model(base)
    model.load_state_dict(pooling.state_dict(), strict=False)
    for seed, side in ((2, "left"), (3, "right")):
        batch = batch_of(model, seed, images_per_row=[2, 0, 1], padding_side=side)
        with torch.no_grad():
            expected = pooling(**batch)
            out = model(**batch, router_decisions=torch.full((3,), granularity_idx))
        assert torch.equal(out.num_visual_tokens, expected.num_visual_tokens)
        assert torch.equal(out.kept_mask, expected.kept_mask)
        torch.testing.assert_close(out.logits, expected.logits, rtol=0, atol=1e-5)


def test_counts_of_a_grid_halve_columns_first():
    config = tiny_config("avg_llava on qwen3_vl")
    sizes = config.sizes_of(None, torch.tensor([[5, 6], [1, 1]]) * config.token_stride)
    assert config.levels(sizes) == [(30, 15, 9, 6, 4), (1, 1, 1, 1, 1)]
    assert config.vis_token_granularity == [1, 2, 4, 8, 16]
    for fields, name in (({"router_attention": "tiles"}, "router_attention"), ({"vis_token_granularity": [3]}, "3")):
        with pytest.raises(ValueError, match=name):
            tiny_config("avg_llava on qwen3_vl", **fields)


@pytest.mark.parametrize("budget", (0.5, 2))
def test_exact_prompts_give_what_default_ones_give_at_their_budget(base, budget):
    model, processor = own_model(base), tiny_processor(f"avg_llava on {base}")
    processor.model_config = model.config
    pictures = [Image.new("RGB", size, "red") for size in ((40, 24), (17, 50))]
    inputs = {"images": pictures, "text": ["a<IMG_CONTEXT>b<IMG_CONTEXT>?"], "return_tensors": "pt"}
    exact, whole = processor(**inputs, vtc_budget=budget), processor(**inputs)
    with torch.no_grad():
        expected, out = model(**whole, vtc_budget=budget), model(**exact, vtc_budget=budget)
    assert out.num_visual_tokens.tolist() == expected.num_visual_tokens.tolist() and bool(out.kept_mask.all())
    torch.testing.assert_close(out.logits[0], expected.logits[0, expected.kept_mask[0]], rtol=0, atol=1e-5)
    options = {"vtc_budget": budget, "max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    new = [model.generate(**each, **options)[0, -4:].tolist() for each in (exact, whole)]
    assert new[0] == new[1]


@torch.no_grad()
def test_the_router_by_hand(base):
    """One image alone, token by token; and the same among others."""
    model = own_model(base)
    batch = batch_of(model, 4, images_per_row=[1, 2])
    row = row_of(batch, 0)
    router, config = model.model.router, model.config
    merge = config.vision_config.spatial_merge_size
    rows, columns = (row["image_grid_thw"][0, 1:] // merge).tolist()
    tokens = model.model.get_image_features(row["pixel_values"], image_grid_thw=row["image_grid_thw"]).pooler_output[0]
    embeds = model.get_input_embeddings()(row["input_ids"][row["input_ids"] != config.image_token_id])
    likeness = F.cosine_similarity(tokens[:, None], embeds[None], dim=-1).mean(0)
    best = likeness.argsort(descending=True)[: config.filtered_text_num]
    text = torch.zeros(config.filtered_text_num, embeds.shape[1])
    text[: len(best)] = embeds[best]
    maps, pyramid = tokens.T.unflatten(1, (rows, columns)), []
    for high, wide in ((4, 4), (2, 4), (2, 2), (1, 2), (1, 1)):
        small = F.avg_pool2d(maps[None], (high, wide), ceil_mode=True)[0]
        pyramid.append(small.flatten(1).T)
    states = torch.cat([*pyramid, text])
    attended = router.merger.attend(states[None], None)[0]
    states = router.merger.norm_1(states + attended)
    states = router.merger.norm_2(states + router.merger.linear_2(router.merger.linear_1(states).relu()))
    logits = router.linear_2(router.act(router.linear_1(states)))
    parts = [each.mean(0) for each in logits[: -len(text)].split([len(each) for each in pyramid])]
    votes = sum(weight * part for weight, part in zip(router.voter[:, 0], [*parts, *logits[-len(text) :]]))
    expected = router.norm(votes)
    assert router.voter.numel() == 5 + config.filtered_text_num
    torch.testing.assert_close(model(**row).router_logits[0], expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(model(**batch).router_logits[0], expected, rtol=0, atol=1e-4)


def test_from_base_adds_a_router_and_changes_nothing_else(base):
    stock = uncompressed(model_of(base))
    model = from_base(stock, "avg_llava", filtered_text_num=8, router_num_heads=4)
    assert not model.config.router_select
    batch = batch_of(model, 8, images_per_row=[2, 1], padding_side="left")
    with torch.no_grad():
        expected = stock(**stock_inputs(stock, batch)).logits
        assert torch.equal(model(**batch).logits, expected)
    own = {name for name, _ in model.named_parameters() if ".router." not in name}
    assert len(own) == len(list(stock.named_parameters()))


def arguments_of(folder, **fields):
    defaults = {"max_steps": 2}
    return TrainingArguments(
        folder,
        **{**defaults, **fields},
        per_device_train_batch_size=1,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        remove_unused_columns=False,
        save_strategy="no",
    )


@pytest.mark.parametrize("trainer", (AvgLlavaGranularityTrainer, AvgLlavaRouterTrainer))
def test_stages_train_what_they_are_for(base, trainer, tmp_path):
    model = own_model(base)
    samples = []
    for seed in range(2):
        row = dict(row_of(batch_of(model, 20 + seed, images_per_row=[1]), 0))
        labels = row["input_ids"].clone()
        labels[:, :-3] = -100
        samples.append(row | {"labels": labels})
    before = copy.deepcopy(model.state_dict())
    trainer(model, arguments_of(tmp_path), train_dataset=samples, data_collator=lambda batch: batch[0]).train()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    if trainer is AvgLlavaRouterTrainer:
        assert moved and all(".router." in name for name in moved)
        return
    in_tower = {name for name in moved if "vision_tower" in name}
    assert in_tower and all("merger" in name for name in in_tower) and not any(".router." in name for name in moved)
    assert any("language_model" in name for name in moved)


def test_gradients_of_all_granularities_are_those_of_their_mean(base, tmp_path):
    """One pass for each granularity on features of one run of the tower, against one graph of all of them."""
    row = dict(row_of(batch_of(own_model(base), 30, images_per_row=[1]), 0))
    row["labels"] = row["input_ids"].masked_fill(row["input_ids"] == own_model(base).config.image_token_id, -100)
    # Trainer of 4.57 and 5.0 counts a first label too, which nothing predicts
    row["labels"][:, 0] = -100
    plain = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "max_steps": 1}
    model, together = own_model(base), own_model(base)
    arguments = arguments_of(tmp_path, **plain)
    AvgLlavaGranularityTrainer(model, arguments, train_dataset=[row], data_collator=lambda batch: batch[0]).train()
    trainer = AvgLlavaGranularityTrainer(together, arguments, train_dataset=[row])
    trainer.compute_loss(together.train(), dict(row)).backward()
    merger = "model.vision_tower.merger"
    pairs = zip(model.get_submodule(merger).parameters(), together.get_submodule(merger).parameters())
    for trained, parameter in pairs:
        moved = parameter.detach() - arguments.learning_rate * parameter.grad
        torch.testing.assert_close(trained.detach(), moved, rtol=0, atol=1e-6)


def test_tools_reach(base):
    model, processor = own_model(base), tiny_processor(f"avg_llava on {base}")
    picture = Image.new("RGB", (40, 24), "red")
    inputs = processor(images=[picture], text=["<IMG_CONTEXT>?"], return_tensors="pt")
    found = estimate(model, image_size=(24, 40), vtc_budget=0.5, image_processor=processor.image_processor)
    with torch.no_grad():
        output = model(**inputs, vtc_budget=0.5)
    assert [found.num_kept] == output.num_visual_tokens.tolist()
    assert bench(model, inputs, vtc_budget=0.5, repeats=1, warmup=0).num_kept == [found.num_kept]
    layout = processor.image_processor.get_tile_layout(24, 40)
    cells = record_of(model.config).draw(Kept(layout, output, model.config, 0, None, None)).tiles[0].cells
    assert cells.shape == layout.token_grid and len(set(cells.flatten())) == found.num_kept
    assert compressor_modules(model.config)[-1] == "model.router"
