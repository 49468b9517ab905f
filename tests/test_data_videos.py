"""Records with videos: frames that are images, files, the batches and labels that they become, and what is refused."""

import copy
import json
import sys

import numpy as np
import pytest
import torch
from factories import tiny_model, tiny_processor
from peft import get_peft_model
from PIL import Image
from test_video_processing import frames, processor_of
from transformers import TrainingArguments

from hf_vtc.data import Conversation, RecordError, Video, VtcCollator, load_records, read_video
from hf_vtc.lora import default_lora_config
from hf_vtc.trainers import LlavoltaTrainer
from hf_vtc.trainers.avg_llava import AvgLlavaGranularityTrainer, AvgLlavaRouterTrainer
from hf_vtc.trainers.schedule import Stage

BASES = ("qwen3_vl", "qwen2_5_vl")
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{% for p in m.content %}{% if p.type == 'video' %}<img><|im_start|></img>"
    "{% elif p.type == 'image' %}<IMG_CONTEXT>{% else %}{{ p.text }}{% endif %}{% endfor %}"
    "{% if m.role == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# the same, marking what the model writes
MARKED = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}{% for p in m.content %}"
    "{{ p.text }}{% endfor %}<|im_end|>{% endgeneration %}{% else %}{% for p in m.content %}{% if p.type == 'video' %}"
    "<img><|im_start|></img>{% elif p.type == 'image' %}<IMG_CONTEXT>{% else %}{{ p.text }}{% endif %}{% endfor %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module", params=BASES)
def base(request):
    return request.param


def processor(base, template=TEMPLATE):
    own = processor_of(base)
    own.chat_template = template
    return own


def turns(question="<video>\nwhat?", answer="red"):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def record(**fields):
    return {"conversations": turns(), "video": {"frames": frames(4), "fps": 2}} | fields


def parts_of(conversation):
    return [part["type"] for part in conversation.messages[0]["content"]]


# records


def test_places_of_videos():
    video = frames(2)
    for fields, types, videos in (
        ({"video": video}, ["video", "text"], [video]),
        (
            {"videos": [video, "b.mp4"], "video": None, "conversations": turns("<video>a<video>b")},
            ["video", "text"] * 2,
            [video, "b.mp4"],
        ),
        (
            {"videos": [video, video], "video": None, "conversations": turns("what?")},
            ["video", "video", "text"],
            [video, video],
        ),
        ({"video": "a.mp4", "conversations": turns("what <video>")}, ["video", "text"], ["a.mp4"]),
        (
            {"video": video, "image": "i.png", "conversations": turns("a<image>b<video>c")},
            ["text", "image", "text", "video", "text"],
            [video],
        ),
    ):
        conversation = Conversation.from_record(record(**fields), takes_videos=True)
        assert parts_of(conversation) == types and conversation.videos == videos
    parts = [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "what?"}]
    chat = [{"role": "user", "content": parts}, {"role": "assistant", "content": "red"}]
    conversation = Conversation.from_record({"messages": chat}, takes_videos=True)
    assert (parts_of(conversation), conversation.videos) == (["video", "text"], ["a.mp4"])


def test_records_of_videos_that_are_wrong():
    for fields, reason in (
        ({"video": None}, "has no video"),
        ({"videos": ["a.mp4", ""], "video": None}, "entry 1 is empty"),
        ({"videos": "a.mp4", "video": None}, "must be a list of videos"),
        ({"videos": ["a.mp4"]}, "must have one of `videos`, `video`"),
        ({"videos": ["a.mp4", "b.mp4"], "video": None}, "1 of 2 are left over"),
        ({"conversations": turns("a", "<video>")}, "only messages of role `user`"),
        ({"conversations": turns("<audio> what?")}, "'<audio>'"),
    ):
        with pytest.raises(ValueError, match=reason):
            Conversation.from_record(record(**fields), takes_videos=True)
    with pytest.raises(ValueError, match="'<video>', which stands for"):
        Conversation.from_record(record(video=None))
    with pytest.raises(ValueError, match="a field 'video'.*Only images can be shown"):
        Conversation.from_record(record(conversations=turns("what?")))


# batches


@pytest.mark.parametrize("template", (TEMPLATE, MARKED))
def test_collated_records_are_what_the_processor_gives(base, template):
    own = processor(base, template)
    image = Image.new("RGB", (24, 16), "red")
    records = [
        record(),
        {"conversations": turns("what?", "blue"), "image": image},
        record(videos=[Video(frames(3), {"fps": 1}), frames(2)], video=None, conversations=turns("<video>a<video>b")),
    ]
    batch = VtcCollator(own, padding_side="left")(records)
    assert batch["video_grid_thw"].tolist() == [[2, 4, 6], [2, 4, 6], [1, 4, 6]]
    videos, metadata = [frames(4)], {"fps": 2}
    messages = Conversation.from_record(records[0], takes_videos=True).messages
    chat = [messages[0], {"role": "assistant", "content": [{"type": "text", "text": "red"}]}]
    alone = own.apply_chat_template(chat, tokenize=False)
    expected = own(text=alone, videos=videos, video_metadata=metadata, return_tensors="pt")
    real = batch["attention_mask"][0].bool()
    assert torch.equal(batch["input_ids"][0, real], expected["input_ids"][0])
    assert torch.equal(batch["pixel_values_videos"][:48], expected["pixel_values_videos"])
    assert ("second_per_grid_ts" in batch) == (base == "qwen2_5_vl")
    for row, answer in zip(batch["labels"], ("red", "blue", "red")):
        assert own.tokenizer.decode(row[row >= 0]) == f"{answer}<|im_end|>"
    with pytest.raises(ValueError, match="`max_length` must not cut images"):
        VtcCollator(own, max_length=16)(records[:1])
    with pytest.raises(ValueError, match="Record 0 of the batch.*Only images can be shown"):
        VtcCollator(tiny_processor("vico"))([record(conversations=turns("what?"))])


def written(folder, records):
    for idx, frame in enumerate(frames(4)):
        frame.save(folder / f"{idx}.png")
    (folder / "records.json").write_text(json.dumps(records))
    return folder / "records.json"


def test_records_of_files(base, tmp_path):
    names = [f"{idx}.png" for idx in range(4)]
    good = {"conversations": turns(), "video": {"frames": names, "fps": 2}}
    collator = VtcCollator(processor(base))
    source = written(tmp_path, [good, good | {"video": names[:2]}])
    for check in ("pixels", "header"):
        records = load_records(source, collator=collator, check_images=check)
        assert len(records) == 2 and [len(each["videos"][0].frames) for each in records] == [4, 2]
        batch = collator([records[0], records[1]])
        expected = collator([record(), record(video=frames(4)[:2])])
        assert batch.keys() == expected.keys() and all(torch.equal(batch[name], expected[name]) for name in batch)
    bad = (
        ([good | {"video": ["0.png", "../x.png"]}], "inside of `image_folder`"),
        ([good | {"video": ["0.png", "none.png"]}], "cannot be opened"),
        ([good | {"video": {"frames": names, "speed": 2}}], "'speed', which is not read"),
        ([good | {"video": {"fps": 2}}], "needs `frames` or the `path`"),
        ([good | {"video": 7}], "must be a path, a list of frames or a mapping"),
    )
    for records, reason in bad:
        with pytest.raises(RecordError, match=reason):
            load_records(written(tmp_path, records), collator=collator)
    with pytest.raises(RecordError, match="a field 'video'"):
        load_records(written(tmp_path, [good | {"conversations": turns("what?")}]))


# files of videos


def test_files_need_a_library(monkeypatch, tmp_path, base):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"pip install 'hf-vtc\[video\]'"):
        read_video(tmp_path / "a.mp4")
    source = written(tmp_path, [{"conversations": turns(), "video": "a.mp4"}])
    with pytest.raises(ImportError, match="PyAV"):
        load_records(source, collator=VtcCollator(processor(base)))


def video_file(path, num=30, rate=10):
    av = pytest.importorskip("av", reason="files of videos are decoded by PyAV, the extra `video`")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for idx in range(num):
            picture = np.full((32, 32, 3), 8 * idx, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_files_are_decoded(base, tmp_path):
    path = video_file(tmp_path / "a.mp4")
    video = read_video(path)
    # 3 seconds at 2 per second
    assert video.metadata == {"fps": 10.0, "total_num_frames": 30, "frames_indices": [0, 6, 12, 17, 23, 29]}
    levels = [float(np.asarray(frame).mean()) for frame in video.frames]
    assert np.allclose(levels, [8 * idx for idx in video.metadata["frames_indices"]], atol=4)
    assert read_video(path, fps=1, max_frames=2).metadata["frames_indices"] == [0, 29]
    own = processor(base)
    records = load_records(
        written(tmp_path, [{"conversations": turns(), "video": "a.mp4"}]), collator=VtcCollator(own)
    )
    batch = VtcCollator(own)([records[0]])
    assert batch["video_grid_thw"][0, 0] == 3
    if base == "qwen3_vl":
        assert "<0.3 seconds>" in own.tokenizer.decode(batch["input_ids"][0])


def test_hostile_files_are_refused(tmp_path):
    path = video_file(tmp_path / "a.mp4")
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(path.read_bytes()[:200])
    playlist = tmp_path / "list.m3u8"
    playlist.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{path}\n#EXT-X-ENDLIST\n")
    script = tmp_path / "list.mp4"
    script.write_text(f"ffconcat version 1.0\nfile '{path}'\n")
    for file in (damaged, playlist, script, tmp_path, tmp_path / "none.mp4"):
        with pytest.raises(ValueError, match="cannot be decoded"):
            read_video(file)
    with pytest.raises(ValueError, match="more than 100"):
        read_video(path, max_pixels=100)


# training


def training(tmp_path, **fields):
    return TrainingArguments(
        tmp_path,
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        remove_unused_columns=False,
        save_strategy="no",
        **fields,
    )


def test_a_step_with_lora_on_videos_moves_what_it_should(base, tmp_path):
    own = processor(base)
    model = tiny_model(f"llavolta on {base}", video_token_id=own.video_token_id)
    adapted = get_peft_model(copy.deepcopy(model), default_lora_config(model, r=2))
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    LlavoltaTrainer(
        adapted,
        training(tmp_path),
        stages=[Stage(1, 4, 1.0)],
        train_dataset=[record(), record(), record(conversations=turns("what?"), video=frames(2)), record()],
        data_collator=VtcCollator(own),
    ).train()
    moved = {name for name, value in adapted.state_dict().items() if not torch.equal(value, before[name])}
    assert any("merger" in name for name in moved) and any("language_model" in name for name in moved)
    assert all("lora_" in name or "modules_to_save" in name for name in moved)


@pytest.mark.parametrize("trainer", (AvgLlavaGranularityTrainer, AvgLlavaRouterTrainer))
def test_granularities_and_router_learn_from_videos(base, trainer, tmp_path):
    own = processor(base)
    model = tiny_model(f"avg_llava on {base}", video_token_id=own.video_token_id)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    image = {"conversations": turns("what?", "blue"), "image": Image.new("RGB", (24, 16), "red")}
    trainer(
        model, training(tmp_path), train_dataset=[record(), image, record(), record()], data_collator=VtcCollator(own)
    ).train()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and all(("router" in name) == (trainer is AvgLlavaRouterTrainer) for name in moved)
