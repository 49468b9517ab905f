"""Records with videos whose frames are images, and tiny models and processors that take them."""

import json

import torch
from factories import tiny_pair
from PIL import Image
from test_data_videos import processor, turns
from test_video_processing import frames


def pair_of(method, base, **fields):
    """A tiny model and a processor with a template of chats, both of which take videos."""
    model, _ = tiny_pair(f"{method} on {base}", **fields)
    return model, processor(base)


def write_pair(method, base, folder):
    torch.manual_seed(0)
    model, own = pair_of(method, base)
    model.save_pretrained(folder, save_code=False)
    own.save_pretrained(folder, save_code=False)
    return folder


def clip(num, seed, fps=2):
    return {"frames": frames(num, seed=seed), "fps": fps}


def mixed_records():
    """One video, a longer one, an image and a video, an image, text, and two videos."""
    image = Image.new("RGB", (24, 16), "red")
    shown = (
        ("<video>\nwhat?", {"video": clip(4, 0)}),
        ("<video>\nwhat?", {"video": clip(6, 1)}),
        ("<image> then <video>\nwhat?", {"image": image, "video": clip(3, 2)}),
        ("<image>\nwhat?", {"image": image}),
        ("what?", {}),
        ("<video> or <video>\nwhat?", {"videos": [clip(3, 3), clip(2, 4)]}),
    )
    return [
        {"id": f"r{idx}", "conversations": turns(question), **media} for idx, (question, media) in enumerate(shown)
    ]


def write_records(folder, num=8):
    """Records of as many videos, their frames as files, and one more that shows a frame of the first one again."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for idx in range(num):
        names = [f"{idx}_{place}.png" for place in range(4)]
        for name, frame in zip(names, frames(4, seed=idx), strict=True):
            frame.save(folder / name)
        video = {"frames": names, "fps": 2}
        records.append({"id": f"v{idx}", "conversations": turns(answer=f"ton {idx}"), "video": video})
    Image.open(folder / "0_1.png").save(folder / "again.bmp")
    Image.new("RGB", (24, 16)).save(folder / "black.png")
    records.append({"id": "again", "conversations": turns(), "video": ["black.png", "again.bmp"]})
    (folder / "records.json").write_text(json.dumps(records), encoding="utf-8")
    return folder / "records.json"
