"""Videos to patches and prompts: against the stock processors where they run, and against their formulas."""

import importlib

import numpy as np
import pytest
import torch
from factories import tiny_model, tiny_processor, video_processor
from PIL import Image
from qwen_models import BASES, model_of
from transformers import AutoProcessor
from transformers.video_utils import VideoMetadata

from hf_vtc.models.grids_vtc import patches_of, patches_of_frames
from hf_vtc.models.video_processing_vtc import Clip, VideoSettings
from hf_vtc.plot import filmstrip, overlay
from hf_vtc.plot.frames import frames_with_tokens

pytestmark = pytest.mark.window


@pytest.fixture(scope="module", params=BASES)
def base(request):
    return request.param


def settings_of(base, **fields):
    return VideoSettings(**{"base": base, "min_pixels": 128, "max_pixels": 2048} | fields)


def processor_of(base, method="llavolta", **fields):
    return video_processor(f"{method} on {base}", **fields)


def frames(num, size=(24, 16), seed=0):
    noise = torch.randint(
        256, (num, size[1], size[0], 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    return [Image.fromarray(each.numpy()) for each in noise]


# formulas of the sources, pinned


@pytest.mark.parametrize(
    ("total", "fps", "expected"),
    (
        # int(48 / 24 * 2) is 4
        (48, 24, [0, 16, 31, 47]),
        # at least `min_frames`
        (30, 30, [0, 10, 19, 29]),
        # at most as many as there are
        (3, 30, [0, 1, 2]),
        (100, 10, [0, 5, 10, 16, 21, 26, 31, 36, 42, 47, 52, 57, 63, 68, 73, 78, 83, 89, 94, 99]),
    ),
)
def test_frames_of_qwen3_vl(total, fps, expected):
    settings = settings_of("qwen3_vl", do_sample_frames=True, fps=2)
    assert settings.sampled(total, fps) == expected
    assert settings.asked({"do_sample_frames": False}).sampled(total, fps) == list(range(total))
    assert settings.asked({"num_frames": 2}).sampled(total, None) == [0, total - 1]


@pytest.mark.parametrize(
    ("total", "fps", "expected"),
    ((48, 24, [0, 12, 24, 36]), (30, 30, [0, 7, 15, 22]), (3, 30, [0, 1]), (7, 2, [0, 1, 2, 3, 4, 5])),
)
def test_frames_of_qwen2_5_vl(total, fps, expected):
    settings = settings_of("qwen2_5_vl", do_sample_frames=True, fps=2)
    assert settings.sampled(total, fps)[: len(expected)] == expected[: len(settings.sampled(total, fps))]
    assert len(settings.sampled(total, fps)) % 2 == 0
    with pytest.raises(ValueError, match="does not say how many"):
        settings.sampled(total, None)
    with pytest.raises(ValueError, match="`num_frames` cannot be 60"):
        settings.asked({"num_frames": 60}).sampled(48, fps)


def test_sizes_of_frames():
    # of all frames together, and counted in pairs where they are odd: 5 frames are 4, 7 are 8
    whole = settings_of("qwen3_vl", min_pixels=1, max_pixels=4 * 64 * 64)
    assert whole.frame_size(4, 64, 64, 32) == (64, 64)
    assert whole.frame_size(5, 64, 64, 32) == (64, 64)
    # sqrt(7 * 4096 / 16384) is 1.32, and 64 / 1.32 holds one side of 32
    assert whole.frame_size(7, 64, 64, 32) == (32, 32)
    grown = settings_of("qwen3_vl", min_pixels=4 * 64 * 64, max_pixels=10**6)
    assert grown.frame_size(4, 32, 32, 32) == (64, 64)
    # a side below a token is enlarged first
    assert whole.frame_size(2, 16, 20, 32) == (32, 32)
    # of one frame
    own = settings_of("qwen2_5_vl", min_pixels=1, max_pixels=64 * 64)
    assert [own.frame_size(num, 64, 64, 32) for num in (4, 100)] == [(64, 64)] * 2
    with pytest.raises(ValueError, match="at least 2 frames"):
        whole.frame_size(1, 64, 64, 32)


def test_times_of_patches():
    clip = Clip([0, 1, 2, 3, 4], [0, 16, 31, 47, 50], 24, 51)
    # the mean of the first and the last frame of a patch, whose last frame is repeated
    assert clip.times == [8 / 24, (31 / 24 + 47 / 24) / 2, 50 / 24]
    assert clip.seconds_between_patches == 2 / (5 / 51 * 24)
    assert Clip([0, 1], [0, 1], None, 2).times == [0.5 / 24]
    assert Clip([0, 1], [0, 1], None, 2).seconds_between_patches == 2 / 24


def test_patches_of_frames_are_those_of_the_source():
    pixels = np.random.default_rng(0).normal(size=(4, 3, 16, 24)).astype(np.float32)
    patches = patches_of_frames(pixels, 4, 2)
    assert patches.shape == (2 * 4 * 6, 3 * 2 * 16)
    # one by one: time, row and column of the token, row and column in it; of a patch colour, frame, row, column
    place = 0
    for time in range(2):
        for row in range(2):
            for column in range(3):
                for inner_row in range(2):
                    for inner_column in range(2):
                        top, left = (2 * row + inner_row) * 4, (2 * column + inner_column) * 4
                        own = pixels[2 * time : 2 * time + 2, :, top : top + 4, left : left + 4]
                        assert np.array_equal(patches[place], own.transpose(1, 0, 2, 3).ravel())
                        place += 1
    assert np.array_equal(patches_of(pixels[0], 4, 2), patches_of_frames(pixels[[0, 0]], 4, 2))


def stock_video_processor(base, **settings):
    pytest.importorskip("torchvision", reason="stock video processors need torchvision")
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    return {"qwen2_5_vl": Qwen2VLVideoProcessor, "qwen3_vl": Qwen3VLVideoProcessor}[base](**settings)


def gradients(num, size):
    """Frames without edges, at which resizing in one pass and in two would overshoot otherwise."""
    rows, columns = np.mgrid[: size[1], : size[0]]
    return [
        Image.fromarray(np.stack([3 * rows, 2 * columns, rows + columns + 9 * idx], axis=-1).astype(np.uint8))
        for idx in range(num)
    ]


@pytest.mark.parametrize(("num", "size"), ((4, (24, 16)), (5, (24, 16)), (5, (37, 50))))
def test_patches_are_those_of_the_stock_processor(base, num, size):
    processor, resizes = processor_of(base), size != (24, 16)
    video, images = (gradients if resizes else frames)(num, size), processor.image_processor
    stock = stock_video_processor(
        base,
        patch_size=4,
        merge_size=2,
        size={"shortest_edge": 128, "longest_edge": 2048},
        image_mean=images.image_mean,
        image_std=images.image_std,
        do_sample_frames=False,
    )
    expected = stock([np.stack([np.asarray(each) for each in video])], return_tensors="pt")
    inputs = processor(text="<|im_start|>", videos=video, return_tensors="pt")
    assert torch.equal(inputs["video_grid_thw"], expected["video_grid_thw"])
    # one divides by 255, the other multiplies; where frames are resized, Pillow and torchvision round by one level
    level = 1 / 255 / min(images.image_std)
    difference = (inputs["pixel_values_videos"] - expected["pixel_values_videos"]).abs()
    assert float(difference.max()) < (1.01 * level if resizes else 1e-6)


def test_sampling_and_sizes_are_those_of_the_stock_processor(base):
    stock = stock_video_processor(base)
    for total, fps in ((48, 24), (30, 30), (100, 10), (7, 2), (61, 29.97), (300, 30)):
        expected = stock.sample_frames(VideoMetadata(total_num_frames=total, fps=fps), fps=2)
        assert settings_of(base, do_sample_frames=True, fps=2).sampled(total, fps) == np.asarray(expected).tolist()
    resize = importlib.import_module(type(stock).__module__).smart_resize
    for num, height, width in ((4, 64, 64), (5, 70, 33), (7, 64, 128), (30, 480, 640), (3, 32, 40), (2, 1000, 40)):
        for limits in ({"min_pixels": 1, "max_pixels": 16384}, {"min_pixels": 10**5, "max_pixels": 10**6}):
            given = {"num_frames": num} if base == "qwen3_vl" else {}
            expected = resize(height=height, width=width, factor=32, **given, **limits)
            assert settings_of(base, **limits).frame_size(num, height, width, 32) == tuple(expected)


# prompts


def test_prompts_say_where_frames_are(base):
    processor, model = processor_of(base), model_of(base)
    metadata = {"fps": 2, "total_num_frames": 40, "frames_indices": [0, 10, 20, 30]}
    text = "a<img><|im_start|></img>b"
    inputs = processor(text=text, videos=frames(4), video_metadata=metadata, return_tensors="pt")
    assert inputs["video_grid_thw"].tolist() == [[2, 4, 6]] and inputs["pixel_values_videos"].shape == (48, 96)
    pads = "<|im_start|>" * 6
    if base == "qwen3_vl":
        expected = f"a<2.5 seconds><img>{pads}</img><12.5 seconds><img>{pads}</img>b"
        assert "second_per_grid_ts" not in inputs
    else:
        expected = f"a<img>{pads * 2}</img>b"
        # 4 of 40 frames at 2 per second are 0.2 per second
        assert torch.equal(inputs["second_per_grid_ts"], torch.tensor([10.0]))
    assert processor.decode(inputs["input_ids"][0]) == expected
    # without the tokens around it too
    alone = processor(text="a<|im_start|>b", videos=[frames(4)], video_metadata=[metadata], return_tensors="pt")
    assert torch.equal(alone["input_ids"], inputs["input_ids"])
    model.config.video_token_id = processor.video_token_id
    assert model.count_visual_tokens(**inputs, vtc_budget="full").tolist() == [12]
    types = processor(text=text, videos=frames(4), video_metadata=metadata, return_mm_token_type_ids=True)
    assert sum(np.equal(types["mm_token_type_ids"][0], 2)) == 12


def test_videos_come_in_many_forms(base):
    processor, video = processor_of(base), frames(4)
    array = np.stack([np.asarray(each) for each in video])
    forms = [
        video,
        [video],
        array,
        [array],
        torch.tensor(array).permute(0, 3, 1, 2),
        [[video]],
        array[None],
        list(array),
    ]
    given = [processor(text=["<|im_start|>"], videos=form, return_tensors="pt") for form in forms]
    for each in given:
        assert torch.equal(each["pixel_values_videos"], given[0]["pixel_values_videos"])
        assert torch.equal(each["input_ids"], given[0]["input_ids"])
    images = [Image.new("RGB", (24, 16), "red")]
    both = processor(
        text=["<IMG_CONTEXT>a<|im_start|>", "b", "<|im_start|>"],
        images=[images, [], []],
        videos=[[video], [], [video[:2]]],
        return_tensors="pt",
    )
    assert both["video_grid_thw"].tolist() == [[2, 4, 6], [1, 4, 6]] and both["image_grid_thw"].tolist() == [[1, 4, 6]]
    assert both["input_ids"].shape[0] == 3
    flat = processor(
        text=["<IMG_CONTEXT>a<|im_start|>", "b", "<|im_start|>"],
        images=images,
        videos=[video, video[:2]],
        return_tensors="pt",
    )
    assert torch.equal(flat["input_ids"], both["input_ids"])


def test_frames_are_sampled_where_the_settings_say(base):
    processor = processor_of(base, do_sample_frames=True, fps=2)
    inputs = processor(text="<|im_start|>", videos=frames(48), video_metadata={"fps": 24}, return_tensors="pt")
    assert inputs["video_grid_thw"][0, 0] == 2
    asked = processor(text="<|im_start|>", videos=frames(48), video_metadata={"fps": 24}, num_frames=8)
    assert asked["video_grid_thw"][0][0] == 4
    whole = processor(text="<|im_start|>", videos=frames(6), videos_kwargs={"do_sample_frames": False})
    assert whole["video_grid_thw"][0][0] == 3


@pytest.mark.parametrize(("method", "exact"), (("avg_llava", True), ("llavolta", False)))
def test_a_budget_writes_what_enters(base, method, exact):
    processor = processor_of(base)
    model = tiny_model(f"{method} on {base}", video_token_id=processor.video_token_id)
    processor.model_config = model.config
    given = {"text": ["<IMG_CONTEXT>?<|im_start|>!"], "images": [frames(1)[0]], "videos": [frames(4)]}
    given["return_tensors"] = "pt"
    whole, written = processor(**given), processor(**given, vtc_budget=[0.5, 8])
    kept = model.count_visual_tokens(**whole, vtc_budget=[0.5, 8])
    assert int(kept[1]) <= 8
    with torch.no_grad():
        out = model(**written, vtc_budget=[0.5, 8])
        assert out.num_visual_tokens.tolist() == kept.tolist()
        # what is written for a budget is what is packed at it
        expected = model(**whole, vtc_budget=[0.5, 8])
        torch.testing.assert_close(out.logits[0, -1], expected.logits[0, -1], rtol=0, atol=1e-5)
    num_written = sum(int((written["input_ids"] == token).sum()) for token in model.config.placeholder_ids)
    assert num_written == (int(kept.sum()) if exact else 6 + 12)
    with pytest.raises(ValueError, match="needs the same one here|needs the same `vtc_budget`"):
        model(**written, vtc_budget=1.0) if exact else model(**written | {"input_ids": written["input_ids"][:, 3:]})
    if method == "avg_llava":
        with pytest.raises(ValueError, match="decide from the pixels"):
            processor(**given, vtc_budget=[0.5, "auto"])
    model.config.frame_split = "change"
    with pytest.raises(ValueError, match="the model does alone"):
        processor(**given, vtc_budget=8)


def test_prompts_cannot_be_exact_where_scores_choose(base):
    processor = processor_of(base)
    processor.model_config = tiny_model(f"cdpruner on {base}", video_token_id=processor.video_token_id).config
    for given in ({"text": "<IMG_CONTEXT>", "images": frames(1)}, {"text": "<|im_start|>", "videos": frames(2)}):
        with pytest.raises(ValueError, match="only scores tell which stay"):
            processor(**given, vtc_budget=4)


def test_processors_are_saved_with_their_videos(base, tmp_path):
    processor = processor_of(base)
    processor.save_pretrained(tmp_path, save_code=False)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert again.video == processor.video
    for own in (processor, again):
        out = own(text="<|im_start|>", videos=frames(4), return_tensors="pt")
        assert out["pixel_values_videos"].shape == (48, 96)


def test_chats_show_videos(base):
    processor = processor_of(base)
    processor.chat_template = (
        "{% for m in messages %}{% for p in m.content %}{% if p.type == 'video' %}<img><|im_start|></img>"
        "{% else %}{{ p.text }}{% endif %}{% endfor %}{% endfor %}"
    )
    chat = [{"role": "user", "content": [{"type": "video", "video": frames(4)}, {"type": "text", "text": "what?"}]}]
    inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
    alone = processor(text="<img><|im_start|></img>what?", videos=frames(4), return_tensors="pt")
    assert torch.equal(inputs["input_ids"], alone["input_ids"])
    assert torch.equal(inputs["pixel_values_videos"], alone["pixel_values_videos"])


def test_videos_that_cannot_be_shown_are_refused(base, tmp_path):
    processor, video = processor_of(base), frames(4)
    cases = (
        ({"text": "a"}, video, "placeholders of videos"),
        ({"text": "<|im_start|>"}, None, "no `videos` were given"),
        ({"text": "<|im_start|>", "fps": 2}, None, "`fps` says how videos are shown"),
        ({"text": "<|im_start|>", "fps": None, "num_frames": 4}, None, "`num_frames` says how videos are shown"),
        ({"text": None}, video, "`videos` need `text`"),
        ({"text": "<|im_start|>"}, [*video, Image.new("RGB", (8, 8))], "must have one size"),
        ({"text": "<|im_start|>"}, "a.mp4", "read_video"),
        ({"text": "<|im_start|>", "video_metadata": [{}, {}]}, video, "one entry per video"),
        ({"text": "<|im_start|>", "video_metadata": {"fps": -1}}, video, "`fps` of video 0 must be positive"),
        ({"text": "<|im_start|>", "video_metadata": {"total_num_frames": 9}}, video, "speaks of 9 frames"),
        ({"text": "<|im_start|>", "video_metadata": {"rate": 9}}, video, "no argument `rate`"),
        ({"text": "<|im_start|>", "do_sample_frames": True}, video, "needs `fps` or `num_frames`"),
        ({"text": "<|im_start|>", "fps": 2, "num_frames": 2}, video, "Give one of them"),
        ({"text": "<|im_start|>", "vtc_budget": [4, 4]}, video, "1 images, 2 entries"),
    )
    for given, videos, reason in cases:
        with pytest.raises((ValueError, OSError), match=reason):
            processor(videos=videos, **given)
    (tmp_path / "a.mp4").write_bytes(b"no image")
    with pytest.raises(OSError, match="read_video"):
        processor(text="<|im_start|>", videos=[str(tmp_path / "a.mp4")])
    with pytest.raises(ValueError, match="`videos` and `audio` are not supported"):
        tiny_processor("vico")(text="a", videos=video)
    with pytest.raises(ValueError, match="`video` needs `tiling='patches'`"):
        tiny_processor("vico", video=settings_of(base).to_dict())
    for fields, name in (({"fps": 0}, "fps"), ({"min_frames": 0}, "min_frames"), ({"min_pixels": 0}, "min_pixels")):
        with pytest.raises(ValueError, match=name):
            settings_of(base, **fields)
    with pytest.raises(ValueError, match="no argument `speed`"):
        VideoSettings.from_dict({"base": base, "speed": 2})


# drawn


@pytest.mark.parametrize("method", ("llavolta", "avg_llava", "cdpruner"))
def test_filmstrips_show_what_is_left_of_each_frame(base, method):
    processor, video = processor_of(base), frames(10)
    model = tiny_model(f"{method} on {base}", video_token_id=processor.video_token_id)
    inputs = processor(text="a<|im_start|>b", videos=video, return_tensors="pt")
    with torch.no_grad():
        output = model(**inputs, vtc_budget=0.5)
    drawn = frames_with_tokens(video, output, inputs["input_ids"], processor, model.config)
    assert len(drawn) == 5 and len({each.tobytes() for each in drawn}) == 5
    strip = filmstrip(video, output, inputs["input_ids"], processor, config=model.config)
    # four side by side, and one below
    assert strip.width == sum(each.width for each in drawn[:4]) and strip.height == 2 * drawn[0].height
    with pytest.raises(ValueError, match="these 8 frames need"):
        filmstrip(video[:8], output, inputs["input_ids"], processor, config=model.config)
    both = processor(text="<IMG_CONTEXT>a<|im_start|>b", images=video[:1], videos=video, return_tensors="pt")
    with torch.no_grad():
        output = model(**both, vtc_budget=0.5)
    with pytest.raises(ValueError, match="a single video"):
        filmstrip(video, output, both["input_ids"], processor, config=model.config)
    if method == "avg_llava":
        with pytest.raises(ValueError, match="prompt with a video"):
            overlay(video[0], output, processor, config=model.config)
