"""Videos on LLaVA-OneVision: as the stock model sees them, frames by hand, budgets, processor, and what is refused."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from contract_samples import GREEDY
from factories import tiny_config
from onevision_models import SIZES, TILE, onevision_tokenizer, picture, stock_images, stock_model
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    LlavaOnevisionForConditionalGeneration,
)

from hf_vtc.convert import convert, from_base
from hf_vtc.data import VtcCollator
from hf_vtc.models.grids_vtc import pooled_frames
from hf_vtc.models.video_processing_vtc import VideoSettings
from hf_vtc.plot import filmstrip

pytestmark = pytest.mark.window

FIELDS = {"llavolta": {"compress_layer_idx": 1, "compress_stride": 2}, "cdpruner": {}}
METHODS = tuple(FIELDS)
# of the tiny model: 4 x 4 tokens of a tile, 2 x 2 of a frame
FRAME = 4


@pytest.fixture(scope="module")
def stock():
    model = stock_model()
    with torch.no_grad():
        # answers with a placeholder could not be fed back
        model.lm_head.weight[model.config.video_token_id] = 0
    return model


@pytest.fixture(scope="module")
def folder(stock, tmp_path_factory):
    path = tmp_path_factory.mktemp("onevision_video")
    stock.generation_config = GenerationConfig(pad_token_id=0)
    stock.save_pretrained(path / "hf")
    onevision_tokenizer().save_pretrained(path / "hf")
    stock_images().save_pretrained(path / "hf")
    return path


@pytest.fixture(scope="module", params=METHODS)
def model(request, stock):
    return from_base(stock, request.param, **FIELDS[request.param])


def llavolta(stock, **fields):
    return from_base(stock, "llavolta", **FIELDS["llavolta"] | fields)


def batch_of(model, rows, seed=0, side="left", apart=False):
    """Inputs of rows, each a list of frames per video, with words around; `apart` is the stock model's form."""
    generator, token = torch.Generator().manual_seed(seed), model.config.video_token_id
    prompts = []
    for videos in rows:
        ids = [5, 6]
        for num_frames in videos:
            ids += [token] * (FRAME * num_frames + 1) + [7]
        prompts.append([*ids, 8 + len(prompts)])
    length = max(map(len, prompts))
    pads = [length - len(ids) for ids in prompts]
    left = side == "left"
    batch = {
        "input_ids": torch.tensor([[0] * n + ids if left else ids + [0] * n for n, ids in zip(pads, prompts)]),
        "attention_mask": torch.tensor(
            [[0] * n + [1] * len(ids) if left else [1] * len(ids) + [0] * n for n, ids in zip(pads, prompts)]
        ),
    }
    counts = [num_frames for videos in rows for num_frames in videos]
    if counts:
        batch["pixel_values_videos"] = torch.randn(sum(counts), 3, TILE, TILE, generator=generator)
    if counts and apart:
        batch["pixel_values_videos"] = batch["pixel_values_videos"].unflatten(0, (len(counts), counts[0]))
    elif counts:
        batch["video_grid_thw"] = torch.tensor([[num_frames, 1, 1] for num_frames in counts])
    return batch


# "full" is the stock model


@pytest.mark.parametrize("side", ("left", "right"))
@torch.no_grad()
def test_full_is_the_stock_model_bit_for_bit(model, stock, side):
    for seed, rows in enumerate((([3],), ([2], [2, 2]), ([], [2, 2]))):
        batch = batch_of(model, rows, seed, side, apart=True)
        expected, real = stock(**batch).logits, batch["attention_mask"].bool()
        assert torch.equal(model(**batch, vtc_budget="full").logits[real], expected[real])
        # frames of all videos, as our processor gives them
        joined = batch_of(model, rows, seed, side)
        assert torch.equal(model(**joined, vtc_budget="full").logits[real], expected[real])


@torch.no_grad()
def test_half_precision_rounds_as_the_stock_model(stock, folder):
    half = LlavaOnevisionForConditionalGeneration.from_pretrained(folder / "hf", dtype=torch.bfloat16).eval()
    model = from_base(half, "llavolta", **FIELDS["llavolta"])
    batch = batch_of(model, [[3]], apart=True)
    batch["pixel_values_videos"] = batch["pixel_values_videos"].bfloat16()
    assert torch.equal(model(**batch, vtc_budget="full").logits, half(**batch).logits)


def test_full_generates_the_ids_of_the_stock_model(model, stock):
    batch = batch_of(model, [[2], [2, 2]], 1, apart=True)
    for options in ({}, {"num_beams": 2}):
        given = GREEDY | options
        alone = batch_of(model, [[3]], 2, apart=True)
        assert torch.equal(model.generate(**alone, **given, vtc_budget="full"), stock.generate(**alone, **given))
    assert torch.equal(model.generate(**batch, **GREEDY, vtc_budget="full"), stock.generate(**batch, **GREEDY))


@torch.no_grad()
def test_frames_are_pooled_as_the_stock_model_pools_them(stock):
    tokens = torch.randn(3, 16, 5)
    assert torch.equal(pooled_frames(tokens, (4, 4), (2, 2)), stock.model.apply_pooling(tokens))
    published = tiny_config("llavolta on llava_onevision").vision_config.to_dict()
    published |= {"image_size": 384, "patch_size": 14}
    config = tiny_config("llavolta on llava_onevision", vision_config=published, image_grid_pinpoints=[[384, 384]])
    # 27 x 27 tokens of a tile
    assert config.token_grid == (27, 27) and config.frame_grid == (14, 14)


# compression


@torch.no_grad()
def logits_by_hand(model, batch, num_frames):
    """Logits `(K, V)` of a row with one video, whose frames are pooled one by one before a layer."""
    own, config, ids = model.model, model.config, batch["input_ids"][0]
    states = own.get_input_embeddings()(batch["input_ids"])
    tokens = own.multi_modal_projector(own.encode(batch["pixel_values_videos"]))
    tokens = pooled_frames(tokens, (4, 4), (2, 2)).flatten(0, 1)
    columns = (ids == config.video_token_id).nonzero().flatten().tolist()
    states[0, columns] = torch.cat([tokens, own.image_newline[None]])
    stride, positions = config.compress_stride, torch.arange(len(ids))[None]
    groups = [[column] for column in range(len(ids)) if column not in columns[:-1]]
    for frame in range(num_frames):
        cells = columns[frame * FRAME : (frame + 1) * FRAME]
        groups += [cells[first : first + stride] for first in range(0, FRAME - stride + 1, stride)]
    groups.sort()
    decoder = own.language_model
    for idx, layer in enumerate(decoder.layers):
        if idx == config.compress_layer_idx:
            states = torch.stack([states[:, members].mean(1) for members in groups], dim=1)
            positions = torch.tensor([[members[0] + (len(members) - 1) // 2 for members in groups]])
        states = layer(states, attention_mask=None, position_embeddings=decoder.rotary_emb(states, positions))
        states = states[0] if isinstance(states, tuple) else states
    return model.lm_head(decoder.norm(states))[0]


@pytest.mark.parametrize("layer_idx", (0, 1, 2))
@pytest.mark.parametrize("stride", (2, 3, 4))
def test_frames_are_pooled_by_hand(stock, layer_idx, stride):
    model = llavolta(stock, compress_layer_idx=layer_idx, compress_stride=stride)
    batch = batch_of(model, [[3]], 3)
    with torch.no_grad():
        out = model(**batch)
    expected = logits_by_hand(model, batch, 3)
    torch.testing.assert_close(out.logits[0, out.kept_mask[0]], expected, rtol=0, atol=5e-5)
    # the newline stays
    assert out.num_visual_tokens.tolist() == [3 * (FRAME // stride) + 1]


@torch.no_grad()
def test_rows_do_not_depend_on_others(model):
    rows = ([3], [], [1, 2], [2])
    for side in ("left", "right"):
        batch = batch_of(model, rows, 4, side)
        out, first = model(**batch, vtc_budget=0.6), 0
        for idx, videos in enumerate(rows):
            real = batch["attention_mask"][idx].bool()
            alone = {
                "input_ids": batch["input_ids"][idx, real][None],
                "attention_mask": torch.ones(1, int(real.sum())),
            }
            last = first + sum(videos)
            if videos:
                grids = torch.tensor([[num_frames, 1, 1] for num_frames in videos])
                alone |= {"pixel_values_videos": batch["pixel_values_videos"][first:last], "video_grid_thw": grids}
            own = model(**alone, vtc_budget=0.6)
            kept = slice(None) if own.kept_mask is None else own.kept_mask[0]
            found = out.logits[idx, out.kept_mask[idx]]
            torch.testing.assert_close(found, own.logits[0, kept], rtol=0, atol=1e-4)
            first = last


@pytest.mark.parametrize("layer_idx", (-1, 0, 1))
def test_generate_is_the_same_with_and_without_a_cache(stock, layer_idx):
    model = llavolta(stock, compress_layer_idx=layer_idx)
    batch = batch_of(model, [[3], [], [1, 2]], 5)
    out = model.generate(**batch, **GREEDY)
    assert torch.equal(out, model.generate(**batch, **GREEDY, use_cache=False))
    static = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(out, model.generate(**batch, **GREEDY, **static))
    beams = model.generate(**batch, **GREEDY, num_beams=2, num_return_sequences=2)
    assert beams.shape[0] == 6


@torch.no_grad()
def test_a_budget_is_split_over_frames(model):
    batch = batch_of(model, [[3], [2, 1]], 6)
    kept = {}
    for budget in ("full", 0.5, 7, [13, 0.6, "full"]):
        out = model(**batch, vtc_budget=budget)
        kept[str(budget)] = out.num_visual_tokens.tolist()
        assert torch.equal(model.count_visual_tokens(**batch, vtc_budget=budget), out.num_visual_tokens)
        placeholders = batch["input_ids"] == model.config.video_token_id
        assert int(out.kept_mask[placeholders].sum()) == int(out.num_visual_tokens.sum())
    # 6 of 13 are a newline and 5 for 3 frames, 4 of 9 the same and 3 for 2; of 7 for 2 frames 3 each can be left
    # where any number can
    any_number = model.config.model_type == "vtc_cdpruner"
    assert kept == {
        "full": [13, 9, 5],
        "0.5": [4, 3, 2],
        "7": [7, 7 if any_number else 5, 5],
        "[13, 0.6, 'full']": [13, 5, 5],
    }
    with pytest.raises(ValueError, match="smallest admissible count is 4 .reserved: 13."):
        model(**batch, vtc_budget=[3, "full", "full"])


@torch.no_grad()
def test_frames_that_change_get_more(stock):
    model = from_base(stock, "cdpruner", frame_split="change")
    batch = batch_of(model, [[4]], 7)
    batch["pixel_values_videos"][1:3] = batch["pixel_values_videos"][0]
    apart = {name: value for name, value in batch.items() if name != "video_grid_thw"}
    apart["pixel_values_videos"] = batch["pixel_values_videos"][None]
    for given in (batch, apart):
        out = model(**given, vtc_budget=9)
        columns = batch["input_ids"][0] == model.config.video_token_id
        by_frame = out.kept_mask[0, columns][:-1].unflatten(0, (4, FRAME)).sum(1).tolist()
        assert by_frame == [3, 1, 1, 3] and out.num_visual_tokens.tolist() == [9]


# beside images, from the processor


@pytest.fixture(scope="module", params=METHODS)
def converted(request, folder):
    """Ours and its processor, as `convert` writes them."""
    report = convert(folder / "hf", folder / request.param, request.param, **FIELDS[request.param])
    assert not report.missing_keys and not report.unused_keys and not any("ideo" in note for note in report.notes)
    model = AutoModelForImageTextToText.from_pretrained(folder / request.param).eval()
    return model, AutoProcessor.from_pretrained(folder / request.param)


def clip(num_frames, seed=0, size=(30, 40)):
    return [picture(*size, seed=100 * seed + idx) for idx in range(num_frames)]


def mixed(processor, **kwargs):
    """A video; an image alone and a video; two images around a video; text."""
    videos = [[clip(2)], [clip(2, 1)], [clip(2, 2)], []]
    images = [[], [picture(*SIZES[0])], [picture(*SIZES[1]), picture(*SIZES[3])], []]
    texts = ["<video> what", "<image> a <video>b", "<image><video><image> what", "what"]
    return processor(text=texts, images=images, videos=videos, return_tensors="pt", padding=True, **kwargs)


@torch.no_grad()
def test_images_and_videos_in_one_batch(converted, stock):
    model, processor = converted
    ours = mixed(processor)
    assert ours["num_tiles"].tolist() == [17, 1, 1] and ours["video_grid_thw"].tolist() == [[2, 1, 1]] * 3
    blocks = torch.zeros(3, 17, 3, TILE, TILE)
    for block, own in zip(blocks, ours["pixel_values"].split([17, 1, 1])):
        block[: len(own)] = own
    theirs = {name: ours[name] for name in ("input_ids", "attention_mask", "image_sizes")}
    theirs |= {"pixel_values": blocks, "batch_num_images": torch.tensor([1, 2])}
    theirs["pixel_values_videos"] = ours["pixel_values_videos"].unflatten(0, (3, 2))
    real, expected = ours["attention_mask"].bool(), stock(**theirs).logits
    # the stock tower sees images and videos one after the other
    for given in (ours, theirs):
        out = model(**given, vtc_budget="full")
        torch.testing.assert_close(out.logits[real], expected[real], rtol=0, atol=1e-4)
    counts = model.count_visual_tokens(**ours, vtc_budget=0.5)
    assert torch.equal(counts, model(**ours, vtc_budget=0.5).num_visual_tokens)
    # images first: half of each, and of 9 tokens a newline and as much of both frames as 4 allow
    full = model.count_visual_tokens(**ours, vtc_budget="full").tolist()
    assert counts.tolist() == [*(count // 2 for count in full[:3]), 3, 3, 3]


def test_values_of_frames_are_those_of_single_tiles(converted):
    _, processor = converted
    video = clip(3)
    inputs = processor(text="<video>", videos=video, return_tensors="pt")
    # an image beside others is padded to a square, which these are
    square = [frame.resize((40, 40)) for frame in video]
    given = processor(text="<video>", videos=square, return_tensors="pt")["pixel_values_videos"]
    tiles = processor(text="<image><image><image>", images=[square], return_tensors="pt")["pixel_values"]
    assert torch.equal(given, tiles)
    assert inputs["pixel_values_videos"].shape == (3, 3, TILE, TILE)
    assert int((inputs["input_ids"] == processor.video_token_id).sum()) == 3 * FRAME + 1


def test_the_processor_gives_what_that_of_the_base_gives(converted, folder):
    pytest.importorskip("torchvision", reason="transformers' processor of videos needs torchvision")
    from transformers import LlavaOnevisionVideoProcessor

    _, processor = converted
    stock = LlavaOnevisionVideoProcessor.from_pretrained(folder / "hf")
    # of the size of a tile, since Pillow and torchvision round otherwise when they resize
    video = clip(4, size=(TILE, TILE))
    array = np.stack([np.asarray(frame) for frame in video])
    ours = processor(text="<video>", videos=video, return_tensors="pt")["pixel_values_videos"]
    theirs = stock(list(torch.tensor(array).permute(0, 3, 1, 2)[None]), return_tensors="pt")["pixel_values_videos"]
    torch.testing.assert_close(ours, theirs[0], rtol=0, atol=1e-5)


def test_frames_are_sampled_where_the_settings_say(converted):
    _, processor = converted
    fields = {"text": "<video>", "videos": clip(12), "do_sample_frames": True}
    for more, expected in (
        ({"num_frames": 5}, 5),
        ({"fps": 2, "video_metadata": {"fps": 8}}, 3),
        ({"fps": 0.1, "video_metadata": {"fps": 8}}, 1),
    ):
        assert processor(**fields, **more)["video_grid_thw"][0][0] == expected
    settings = VideoSettings("llava_onevision", do_sample_frames=True, num_frames=5)
    assert settings.sampled(12, None) == [0, 2, 4, 7, 9]
    for more, reason in (
        ({}, "needs `fps` or `num_frames`"),
        ({"fps": 2}, "does not say how many"),
        ({"num_frames": 13}, "13 of a"),
    ):
        with pytest.raises(ValueError, match=reason):
            processor(**fields, **more)


@pytest.mark.parametrize("layer_idx", (-1, 1))
@torch.no_grad()
def test_prompts_for_a_budget(stock, folder, layer_idx):
    processor = AutoProcessor.from_pretrained(folder / "llavolta")
    model = llavolta(stock, compress_layer_idx=layer_idx)
    processor.model_config = model.config
    budget = [0.5, "full", 6, "full", 0.5, "auto"]
    whole, written = mixed(processor), mixed(processor, vtc_budget=budget)
    kept = model.count_visual_tokens(**whole, vtc_budget=budget)
    out, expected = model(**written, vtc_budget=budget), model(**whole, vtc_budget=budget)
    assert torch.equal(out.num_visual_tokens, kept)
    torch.testing.assert_close(out.logits[:, -1], expected.logits[:, -1], rtol=0, atol=1e-4)
    num_written, most = (
        int(torch.isin(each["input_ids"], torch.tensor(model.config.placeholder_ids)).sum())
        for each in (written, whole)
    )
    # before the sequence is built images are shorter in the prompt, too
    assert num_written == (int(kept.sum()) if layer_idx == -1 else most) and int(kept.sum()) < most
    with pytest.raises(ValueError, match="smallest admissible count is 3 "):
        mixed(processor, vtc_budget=["full"] * 5 + [2])


def test_records_with_videos_train(converted):
    model, processor = converted
    template = (
        "{% for m in messages %}{% for c in m.content %}{{ c.text if c.type == 'text' else '<video>' }}{% endfor %}"
    )
    processor.chat_template = template + "{% if m.role == 'assistant' %}.{% endif %}{% endfor %}"
    records = [
        {
            "messages": [{"role": "user", "content": "<video>\nWhat?"}, {"role": "assistant", "content": "it"}],
            "video": each,
        }
        for each in (clip(2), clip(3, 1))
    ]
    batch = VtcCollator(processor)(records)
    assert batch["video_grid_thw"].tolist() == [[2, 1, 1], [3, 1, 1]]
    trained = copy.deepcopy(model).train()
    trained(**batch).loss.backward()
    for name in ("vision_tower", "multi_modal_projector", "language_model", "image_newline"):
        grads = [each.grad for own, each in trained.model.named_parameters() if own.startswith(name)]
        assert any(grad is not None and bool(grad.abs().sum() > 0) for grad in grads), name


# what is refused


def test_videos_that_do_not_fit_are_refused(model):
    batch = batch_of(model, [[3]])
    apart = batch_of(model, [[3]], apart=True)
    pixels = batch["pixel_values_videos"]
    for given, reason in (
        (batch | {"video_grid_thw": torch.tensor([[2, 1, 1]])}, "must hold the frames of all videos"),
        (batch | {"video_grid_thw": torch.tensor([[3, 2, 2]])}, "`video_grid_thw` are frames, 1 and 1"),
        (batch | {"video_grid_thw": torch.tensor([3])}, "`video_grid_thw` must be"),
        (apart | {"pixel_values_videos": pixels}, r"must be \(videos, frames, 3, 32, 32\)"),
        (batch | {"pixel_values_videos": pixels[..., :16]}, r"got shape \(3, 3, 32, 16\)"),
        (batch | {"second_per_grid_ts": [1.0]}, "`second_per_grid_ts` is of no use"),
        (apart | {"pixel_values_videos": pixels[None, :2]}, "placeholders of videos, but those given need 9"),
    ):
        with pytest.raises(ValueError, match=reason):
            model(**given)
    ids = batch["input_ids"][0].tolist()
    with pytest.raises(ValueError, match="text between the frames of a video"):
        model(
            **batch | {"input_ids": torch.tensor([[*ids[: 2 + FRAME], 7, *ids[2 + FRAME :]]]), "attention_mask": None}
        )


def test_methods_without_videos_say_so(stock, folder):
    reason = "`pixel_values_videos` are of no use for vtc_avg_llava on siglip"
    model = from_base(stock, "avg_llava")
    with pytest.raises(ValueError, match=reason):
        model(torch.tensor([[5, 6]]), pixel_values_videos=torch.zeros(1, 2, 3, TILE, TILE))
    with pytest.raises(ValueError, match="`video_token_id` is of no use for vtc_avg_llava"):
        from_base(stock, "avg_llava", video_token_id=5)
    with pytest.raises(ValueError, match="`video_token_id` is of no use for vtc_cdpruner"):
        tiny_config("cdpruner on llava_next", video_token_id=5)
    with pytest.raises(ValueError, match=r"`compress_frames` \(2\) needs a tower that sees grids"):
        from_base(stock, "llavolta", compress_frames=2)
    report = convert(folder / "hf", folder / "avg_llava", "avg_llava")
    assert any("a prompt with a video is refused" in note for note in report.notes)
    with pytest.raises(ValueError, match="videos"):
        AutoProcessor.from_pretrained(folder / "avg_llava")(text="<video>", videos=clip(2))


@pytest.mark.parametrize(
    ("fields", "reason"),
    (
        ({"image_mean": [0.1, 0.1, 0.1]}, "`image_mean` of the video processor must be"),
        ({"size": {"height": 16, "width": 16}}, "`size` of the video processor must be"),
        ({"do_center_crop": True}, "`do_center_crop` of the video processor must be False"),
        ({"brightness": 2}, "`brightness` of the video processor is not known"),
    ),
    ids=str,
)
def test_settings_that_ours_has_not_leave_videos_refused(folder, tmp_path, fields, reason):
    shutil.copytree(folder / "hf", tmp_path / "hf")
    (tmp_path / "hf" / "video_preprocessor_config.json").write_text(
        json.dumps(
            {"size": {"height": TILE, "width": TILE}, "image_mean": [0.5] * 3, "image_std": [0.25, 0.5, 0.75]}
            | {"do_sample_frames": True, "num_frames": 2}
            | fields
        )
    )
    report = convert(tmp_path / "hf", tmp_path / "dst", "llavolta")
    assert any(reason in note for note in report.notes)
    with pytest.raises(ValueError, match="videos"):
        AutoProcessor.from_pretrained(tmp_path / "dst")(text="<video>", videos=clip(2))


def test_settings_that_do_not_belong_to_tiles_are_refused(converted):
    model, processor = converted
    for name, value in (("min_pixels", 4), ("max_pixels", 4), ("min_frames", 2), ("max_frames", 9)):
        with pytest.raises(ValueError, match=f"`{name}` of `video` is of no use for llava_onevision"):
            VideoSettings("llava_onevision", **{name: value})
    inputs = processor(text="<video>", videos=clip(2), return_tensors="pt")
    with torch.no_grad():
        output = model(**inputs)
    with pytest.raises(ValueError, match="A filmstrip draws grids"):
        filmstrip(clip(2), output, inputs["input_ids"], processor, config=model.config)
