"""`VtcProcessor`: reserved placeholders, chats, batches, errors, and folders that every version loads."""

import json

import numpy as np
import pytest
import torch
from factories import tiny_processor, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils.hub import PushToHubMixin

import hf_vtc.models  # noqa: F401 - registers the Auto classes
from hf_vtc.auto import REMOTE_CODE_FROM_FOLDER
from hf_vtc.models.image_processing_vtc import VtcImageProcessor
from hf_vtc.models.processing_vtc import VtcProcessor

IMAGE = "<IMG_CONTEXT>"
GENERATION = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}


def image_of(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def ask(*parts) -> dict:
    """A user's message of images and strings."""
    return {
        "role": "user",
        "content": [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}
            for part in parts
        ],
    }


def answer(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def runs(ids: list[int], token_id: int) -> list[int]:
    """Lengths of the runs of one token."""
    lengths, inside = [], False
    for token in ids:
        if token == token_id:
            if not inside:
                lengths.append(0)
            lengths[-1] += 1
        inside = token == token_id
    return lengths


@pytest.mark.window
@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), max_size=3), min_size=1, max_size=3),
    tiling=st.sampled_from(["dynamic", "single", "pad"]),
    max_tiles=st.integers(1, 6),
)
def test_placeholders_are_what_the_tiles_reserve(rows, tiling, max_tiles):
    processor = tiny_processor(tiling=tiling, size=8, max_tiles=max_tiles, image_seq_length=5)
    images = [[image_of(*size) for size in row] for row in rows]
    out = processor(text=["q " + IMAGE * len(row) + " a" for row in rows], images=images, return_tensors="pt")
    sizes = [list(size) for row in rows for size in row]
    layouts = [processor.image_processor.get_tile_layout(*size) for size in sizes]
    reserved = [layout.num_tiles * 5 for layout in layouts]
    found = [length for ids in out["input_ids"].tolist() for length in runs(ids, processor.image_token_id)]
    counted = processor._get_num_multimodal_tokens(image_sizes=sizes)
    assert found == reserved == counted.num_image_tokens
    assert counted.num_image_patches == [layout.num_tiles for layout in layouts]
    if sizes:
        assert len(out["pixel_values"]) == sum(layout.num_tiles for layout in layouts)
        assert out["image_sizes"].tolist() == sizes
        assert "num_tiles" not in out
        processor.return_layout = True
        again = processor(text=["q " + IMAGE * len(row) + " a" for row in rows], images=images)
        assert ("num_tiles" in again) == (tiling == "dynamic")
    else:
        assert "pixel_values" not in out


@pytest.mark.window
def test_prompt_is_expanded_between_the_wrappers():
    processor = tiny_processor()
    out = processor(text=f"a{IMAGE}b", images=image_of(32, 32))
    assert processor.decode(out["input_ids"][0]) == "a<img>" + IMAGE * 16 + "</img>b"
    bare = tiny_processor(image_start_token=None, image_end_token=None)
    out = bare(text=f"a{IMAGE}b", images=image_of(32, 32))
    assert bare.decode(out["input_ids"][0]) == "a" + IMAGE * 16 + "b"


@pytest.mark.window
def test_chat_template_writes_chatml_in_content_order():
    processor = tiny_processor()
    messages = [
        {"role": "system", "content": "Be brief."},
        ask(image_of(8, 8), "and", image_of(8, 8), "differ how?"),
        answer("In size."),
        ask("And", image_of(8, 8)),
    ]
    text = (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        f"<|im_start|>user\n{IMAGE}\nand{IMAGE}\ndiffer how?<|im_end|>\n"
        "<|im_start|>assistant\nIn size.<|im_end|>\n"
        f"<|im_start|>user\nAnd{IMAGE}\n<|im_end|>\n"
    )
    assert processor.apply_chat_template(messages) == text
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == text + "<|im_start|>assistant\n"
    with pytest.raises(Exception, match="must be of type text or image"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "speech", "speech": "a"}]}])


@pytest.mark.window
def test_chat_with_every_source_of_images_equals_the_prompt(tmp_path):
    processor = tiny_processor()
    image = image_of(40, 70)
    file = tmp_path / "image.png"
    image.save(file)
    expected = processor(
        text=f"<|im_start|>user\n{IMAGE}\nwhat?<|im_end|>\n<|im_start|>assistant\n", images=image, return_tensors="pt"
    )
    sources = (
        {"type": "image", "image": image},
        {"type": "image", "path": str(file)},
        {"type": "image", "url": file.as_uri()},
        {"type": "image_url", "image_url": {"url": str(file)}},
    )
    for source in sources:
        messages = [{"role": "user", "content": [source, {"type": "text", "text": "what?"}]}]
        out = processor.apply_chat_template(messages, **GENERATION)
        assert out.keys() == expected.keys()
        assert all(torch.equal(out[name], expected[name]) for name in expected)


@pytest.mark.window
def test_batch_of_chats_is_padded_left_and_equals_its_rows():
    processor = tiny_processor()
    chats = [
        [ask(image_of(30, 60), "one?")],
        [{"role": "user", "content": "no image, string content"}],
        [ask(image_of(60, 30), image_of(9, 9), "two?"), answer("yes"), ask("sure?")],
    ]
    batch = processor.apply_chat_template(chats, **GENERATION)
    assert set(batch) == {"input_ids", "attention_mask", "pixel_values", "image_sizes"}
    assert batch["image_sizes"].tolist() == [[30, 60], [60, 30], [9, 9]]
    tiles = batch["pixel_values"]
    for row, chat in enumerate(chats):
        single = processor.apply_chat_template(chat, **GENERATION)
        length = single["input_ids"].shape[1]
        assert torch.equal(batch["input_ids"][row, -length:], single["input_ids"][0])
        assert batch["attention_mask"][row].tolist() == [0] * (batch["input_ids"].shape[1] - length) + [1] * length
        taken = len(single.get("pixel_values", ()))
        if taken:
            assert torch.equal(tiles[:taken], single["pixel_values"])
        tiles = tiles[taken:]
    assert len(tiles) == 0


@pytest.mark.window
@pytest.mark.parametrize("return_tensors", ["pt", None])
def test_assistant_mask_marks_what_the_model_writes(return_tensors):
    processor = tiny_processor()
    chats = [
        [
            ask(image_of(30, 60), "where is the thing?"),
            answer("there"),
            ask("and", image_of(9, 9)),
            answer("in the other"),
        ],
        [ask("hello"), answer("again")],
    ]
    out = processor.apply_chat_template(
        chats, tokenize=True, return_dict=True, return_tensors=return_tensors, return_assistant_tokens_mask=True
    )
    assert "offset_mapping" not in out and "text_replacement_offsets" not in out
    written = [
        processor.decode([token for token, mask in zip(ids, masks) if mask])
        for ids, masks in zip(torch.as_tensor(out["input_ids"]), torch.as_tensor(out["assistant_masks"]))
    ]
    assert written == ["there<|im_end|>in the other<|im_end|>", "again<|im_end|>"]


@pytest.mark.window
def test_continue_final_message():
    processor = tiny_processor()
    messages = [ask(image_of(9, 9), "count"), answer("one, two")]
    text = processor.apply_chat_template(messages, continue_final_message=True)
    assert text.endswith("<|im_start|>assistant\none, two")
    out = processor.apply_chat_template(
        messages, continue_final_message=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert processor.decode(out["input_ids"][0]).endswith("<|im_start|>assistant\none, two")


@pytest.mark.window
def test_messages_of_the_caller_are_left_alone():
    processor = tiny_processor()
    message = {"role": "user", "content": "text"}
    part = {"type": "image_url", "image_url": {"url": "nowhere"}}
    processor.apply_chat_template([message, {"role": "user", "content": [part]}])
    assert message == {"role": "user", "content": "text"}
    assert part == {"type": "image_url", "image_url": {"url": "nowhere"}}


@pytest.mark.window
@pytest.mark.parametrize(
    ("text", "counts", "words"),
    [
        ("no placeholder", 1, "Sample 0 has 0 image placeholders .* but 1 images"),
        (f"{IMAGE}", None, "Sample 0 has 1 image placeholders .* but 0 images"),
        (f"{IMAGE}{IMAGE}", 1, "Sample 0 has 2 image placeholders .* but 1 images"),
        (["a", f"b{IMAGE}"], None, "Sample 1 has 1 image placeholders .* but 0 images"),
        (["a", f"b{IMAGE}"], [1, 0], "Sample 0 has 0 image placeholders .* but 1 images"),
        ([f"a{IMAGE}", f"b{IMAGE}"], [1, 2], "Sample 1 has 1 image placeholders .* but 2 images"),
        ([f"a{IMAGE}", f"b{IMAGE}"], 3, r"\[1, 1\] image placeholders .*, 2 together, but 3 images"),
        (["a", "b"], 1, r"\[0, 0\] image placeholders .*, 0 together, but 1 images"),
        ([f"a{IMAGE}"], [1, 1], "one list per sample, got 2 for 1"),
        ([[1, 2]], None, "Decode token ids"),
        (None, None, "got neither"),
    ],
)
def test_mismatch_of_text_and_images_is_named(text, counts, words):
    rows = {None: None}.get(counts) if not isinstance(counts, list) else [[image_of(9, 9)] * count for count in counts]
    images = [image_of(9, 9)] * counts if isinstance(counts, int) else rows
    with pytest.raises(ValueError, match=words):
        tiny_processor()(text=text, images=images)


@pytest.mark.window
def test_flat_images_are_given_to_the_samples_in_order():
    processor = tiny_processor()
    images = [image_of(20, 20 + 30 * index) for index in range(3)]
    text = [f"{IMAGE}x{IMAGE}", f"{IMAGE}"]
    flat, nested = processor(text=text, images=images), processor(text=text, images=[images[:2], images[2:]])
    assert flat["input_ids"] == nested["input_ids"]
    assert np.array_equal(flat["pixel_values"], nested["pixel_values"])


@pytest.mark.window
def test_images_alone_and_text_alone():
    processor = tiny_processor()
    assert set(processor(images=image_of(9, 9))) == {"pixel_values", "image_sizes", "num_tiles"}
    assert set(processor(text="a", images=[])) == {"input_ids", "attention_mask"}
    assert set(processor(text=["a", "b"], images=[[], []])) == {"input_ids", "attention_mask"}
    assert set(processor(text="a", return_token_type_ids=True)) == {"input_ids", "attention_mask"}


@pytest.mark.window
def test_truncation_of_placeholders_is_refused():
    with pytest.raises(ValueError, match="Mismatch"):
        tiny_processor()(text=IMAGE, images=image_of(9, 9), truncation=True, max_length=8)


@pytest.mark.window
def test_mm_token_type_ids_mark_the_placeholders():
    processor = tiny_processor()
    out = processor(text=[f"a{IMAGE}", "b"], images=image_of(9, 9), return_mm_token_type_ids=True, return_tensors="pt")
    assert torch.equal(out["mm_token_type_ids"] == 1, out["input_ids"] == processor.image_token_id)
    assert "mm_token_type_ids" not in processor(text="a")


@pytest.mark.window
def test_image_fields_can_be_overridden_per_call():
    processor = tiny_processor()
    image = image_of(32, 64)
    assert runs(processor(text=IMAGE, images=image)["input_ids"][0], processor.image_token_id) == [48]
    for call in ({"max_tiles": 1}, {"images_kwargs": {"max_tiles": 1}}):
        out = processor(text=IMAGE, images=image, **call)
        assert runs(out["input_ids"][0], processor.image_token_id) == [16]
        assert len(out["pixel_values"]) == 1
    assert processor._get_num_multimodal_tokens(image_sizes=[[32, 64]], max_tiles=1).num_image_tokens == [16]
    out = processor.apply_chat_template([ask(image, "a")], **GENERATION, processor_kwargs={"max_tiles": 1})
    assert len(out["pixel_values"]) == 1


@pytest.mark.window
def test_input_data_format_reaches_the_images():
    processor = tiny_processor()
    pixels = np.zeros((3, 40, 3), np.uint8)
    for call in ({"input_data_format": "channels_first"}, {"images_kwargs": {"input_data_format": "channels_first"}}):
        assert processor(text=IMAGE, images=pixels, **call)["image_sizes"].tolist() == [[40, 3]]
    assert processor(text=IMAGE, images=pixels)["image_sizes"].tolist() == [[3, 40]]


@pytest.mark.window
def test_padding_side_can_be_changed_for_training():
    processor = tiny_processor()
    assert processor(text=["a", "abc"])["attention_mask"] == [[0, 0, 1], [1, 1, 1]]
    processor.tokenizer.padding_side = "right"
    assert processor(text=["a", "abc"])["attention_mask"] == [[1, 0, 0], [1, 1, 1]]
    assert processor(text=["a", "abc"], padding=False)["attention_mask"] == [[1], [1, 1, 1]]


@pytest.mark.window
def test_post_process_image_text_to_text_drops_special_tokens():
    processor = tiny_processor()
    out = processor(text=f"{IMAGE}the end<|im_end|>", images=image_of(9, 9), return_tensors="pt")
    assert processor.post_process_image_text_to_text(out["input_ids"]) == ["the end"]


@pytest.mark.window
def test_wrong_fields_are_refused():
    with pytest.raises(ValueError, match="<image>.*resize the model's embeddings"):
        tiny_processor(image_token="<image>")
    with pytest.raises(ValueError, match="`image_end_token`"):
        tiny_processor(image_end_token="</image>")
    with pytest.raises(ValueError, match="`image_seq_length`"):
        tiny_processor(image_seq_length=0)
    with pytest.raises(ValueError, match="`count_rule`"):
        tiny_processor(count_rule="guess")
    with pytest.raises(ValueError, match="frames"):
        tiny_processor()(text="a", videos=[np.zeros((2, 4, 4, 3))])


def test_tokenizer_without_padding_token_pads_with_its_end_token():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    processor = VtcProcessor(VtcImageProcessor(size=32), tokenizer)
    out = processor(text=["a", "ab"])
    assert out["input_ids"][0][0] == tokenizer.eos_token_id


@pytest.mark.window
def test_save_pretrained_and_load(tmp_path):
    processor = tiny_processor(max_tiles=3, image_seq_length=7, image_end_token=None)
    processor.save_pretrained(tmp_path, save_code=False)
    files = {file.name for file in tmp_path.iterdir()}
    assert {"processor_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"} <= files
    assert not any(name.endswith(".py") for name in files)
    assert "auto_map" not in (tmp_path / "processor_config.json").read_text()

    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is VtcProcessor and type(loaded.image_processor) is VtcImageProcessor
    for name in (
        "image_seq_length",
        "image_token",
        "image_start_token",
        "image_end_token",
        "count_rule",
        "chat_template",
    ):
        assert getattr(loaded, name) == getattr(processor, name)
    assert loaded.image_processor.to_dict() == processor.image_processor.to_dict()
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is VtcImageProcessor

    chats = [[ask(image_of(30, 60), "one?")], [ask("the other, é")]]
    ours, theirs = processor.apply_chat_template(chats, **GENERATION), loaded.apply_chat_template(chats, **GENERATION)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    # what another version of transformers would not read is not there, and generation is prepared
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not isinstance(config.get("extra_special_tokens"), list)
    assert set(config["additional_special_tokens"]) == {"<|im_start|>", "<img>", "</img>", "<IMG_CONTEXT>"}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.padding_side == "left" and set(tokenizer("a")) == {"input_ids", "attention_mask"}
    assert tokenizer.decode(tokenizer("<img>a</img>")["input_ids"], skip_special_tokens=True) == "a"


@pytest.mark.window
def test_save_pretrained_copies_the_code_that_the_folder_names(tmp_path):
    processor = tiny_processor()
    processor.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "processor_config.json").read_text())
    image_map = {"AutoImageProcessor": "image_processing_vtc.VtcImageProcessor"}
    assert config["auto_map"] == {"AutoProcessor": "processing_vtc.VtcProcessor", **image_map}
    assert config["image_processor"]["auto_map"] == image_map
    files = {file.name for file in tmp_path.iterdir()}
    assert {"processing_vtc.py", "image_processing_vtc.py", "host_processor_vtc.py"} <= files
    # saving again without code after loading from a folder with code leaves no key behind
    AutoProcessor.from_pretrained(tmp_path).save_pretrained(tmp_path / "again", save_code=False)
    assert "auto_map" not in (tmp_path / "again" / "processor_config.json").read_text()
    assert not list((tmp_path / "again").glob("*.py"))


@pytest.mark.window
@pytest.mark.slow
@pytest.mark.skipif(not REMOTE_CODE_FROM_FOLDER, reason="remote code from a local folder needs transformers >= 5.11")
def test_trust_remote_code_in_a_process_without_the_package(tmp_path, run_python):
    tiny_processor().save_pretrained(tmp_path / "folder")
    image_of(30, 60).save(tmp_path / "image.png")
    script = """
import sys
import torch
from transformers import AutoProcessor
from transformers.models.auto.image_processing_auto import AutoImageProcessor
folder, image, out = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
assert type(AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)).__name__ == "VtcImageProcessor"
messages = [{"role": "user", "content": [{"type": "image", "path": image}, {"type": "text", "text": "a"}]}]
features = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
torch.save(dict(features), out)
# a remotely loaded processor carries its code on
processor.save_pretrained(folder + "-again")
AutoProcessor.from_pretrained(folder + "-again", trust_remote_code=True)
"""
    printed_to = tmp_path / "out.pt"
    run_python(script, tmp_path / "folder", tmp_path / "image.png", printed_to)
    ours = tiny_processor().apply_chat_template(
        [ask(image_of(30, 60), "a")], tokenize=True, return_dict=True, return_tensors="pt"
    )
    theirs = torch.load(printed_to)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.window
def test_several_chat_templates_survive_saving(tmp_path):
    templates = {"default": "{{ messages[0]['role'] }}", "short": "s"}
    processor = VtcProcessor(VtcImageProcessor(), tiny_tokenizer(), chat_template=templates)
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert loaded.chat_template == templates
    assert loaded.apply_chat_template([answer("a")], chat_template="short") == "s"
    assert loaded.apply_chat_template([answer("a")]) == "assistant"
    outside = VtcProcessor(VtcImageProcessor(), tiny_tokenizer(), chat_template={"../outside": "s"})
    with pytest.raises(ValueError, match="file name"):
        outside.save_pretrained(tmp_path)


@pytest.mark.window
@pytest.mark.parametrize("save_code", [True, False])
def test_push_to_hub_uploads_the_saved_folder(tmp_path, monkeypatch, save_code):
    uploads = []

    def push_to_hub(self, repo_id, **kwargs):
        self.save_pretrained(tmp_path / "upload", max_shard_size="5GB")
        uploads.append((repo_id, kwargs))

    monkeypatch.setattr(VtcProcessor, "push_to_hub", push_to_hub)
    assert issubclass(VtcProcessor, PushToHubMixin)
    tiny_processor().save_pretrained(
        tmp_path / "mine", push_to_hub=True, save_code=save_code, repo_id="me/mine", token="secret"
    )
    assert uploads == [("me/mine", {"token": "secret"})]
    saved, uploaded = ({file.name for file in (tmp_path / name).iterdir()} for name in ("mine", "upload"))
    assert saved == uploaded
    assert ("processing_vtc.py" in uploaded) == save_code
