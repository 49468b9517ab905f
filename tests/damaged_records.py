"""Chat records that are right, and the ways in which records go wrong: one function for each."""

import base64
import io
import json
import os
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

# limits that some kinds of damage exceed and no good record does
MAX_LENGTH = 256
MAX_PIXELS = 100_000


class World(NamedTuple):
    """Where images are: `folder` is the image folder, `outside` holds what nobody may open."""

    folder: Path
    outside: Path


def make_world(root: Path) -> World:
    """Good images, damaged ones, links that lead out of the folder, and what they lead to."""
    folder, outside = root / "images", root / "outside"
    (folder / "sub").mkdir(parents=True)
    outside.mkdir()
    rng = np.random.default_rng(0)

    def picture(height: int, width: int) -> Image.Image:
        return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))

    picture(32, 32).save(folder / "square.png")
    picture(32, 64).save(folder / "sub" / "wide.jpg")
    picture(64, 32).convert("L").save(folder / "grey.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    picture(32, 64).save(folder / "turned.jpg", exif=turned)
    picture(32, 32).save(outside / "secret.png")
    picture(32, 32).save(outside / "decoy.png")

    os.symlink(outside / "secret.png", folder / "link.png")
    os.symlink(outside, folder / "linked")
    os.symlink("loop.png", folder / "loop.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("this is no image\n" * 20)
    (folder / "script.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n")
    jpeg = (folder / "sub" / "wide.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    png = (folder / "square.png").read_bytes()
    (folder / "truncated.png").write_bytes(png[: len(png) // 2])
    (folder / "flipped.png").write_bytes(png[:200] + bytes(255 - byte for byte in png[200:260]) + png[260:])
    (folder / "huge.png").write_bytes(_png_header(60_000, 60_000))
    Image.new("1", (400, 300)).save(folder / "large.png")
    return World(folder, outside)


def _png_header(height: int, width: int) -> bytes:
    """The beginning of a PNG file that claims to be large."""
    file = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", b"")):
        file += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return file


GOOD_IMAGES = ("square.png", "sub/wide.jpg", "grey.png", "turned.jpg")
WORDS = ("how", "many", "boxes", "there", "héllo", "数字", "one", "red?")


def good_record(rng: np.random.Generator) -> dict:
    """A record of up to two images and three turns, in one of four formats."""
    images = [str(rng.choice(GOOD_IMAGES)) for _ in range(rng.integers(0, 3))]
    return record_of(rng, str(rng.choice(FORMATS)), images, num_turns=int(rng.integers(1, 4)))


def record_of(rng: np.random.Generator, style: str, images: list[str], num_turns: int = 1) -> dict:
    turns = [(_text(rng), _text(rng)) for _ in range(num_turns)]
    system = _text(rng) if rng.random() < 0.3 else None
    return STYLES[style](images, turns, system)


def _text(rng: np.random.Generator) -> str:
    return " ".join(rng.choice(WORDS, size=rng.integers(1, 5)))


def _llava(images: list[str], turns: list[tuple[str, str]], system: str | None) -> dict:
    messages = [{"from": "system", "value": system}] if system else []
    for idx, (question, answer) in enumerate(turns):
        marks = "<image>\n" * len(images) if idx == 0 else ""
        messages += [{"from": "human", "value": marks + question}, {"from": "gpt", "value": answer}]
    record = {"id": "x", "conversations": messages}
    return record | ({"image": images[0] if len(images) == 1 else images} if images else {})


def _sharegpt(images: list[str], turns: list[tuple[str, str]], system: str | None) -> dict:
    record = _llava(images, turns, None)
    record.pop("image", None)
    return record | {"images": images, "system": system or ""}


def _openai(images: list[str], turns: list[tuple[str, str]], system: str | None) -> dict:
    messages = [{"role": "system", "content": system}] if system else []
    for idx, (question, answer) in enumerate(turns):
        parts = [{"type": "image_url", "image_url": {"url": image}} for image in (images if idx == 0 else [])]
        messages += [
            {"role": "user", "content": [*parts, {"type": "text", "text": question}]},
            {"role": "assistant", "content": answer},
        ]
    return {"messages": messages}


def _hub(images: list[str], turns: list[tuple[str, str]], system: str | None) -> dict:
    messages = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
    for idx, (question, answer) in enumerate(turns):
        parts = [{"type": "image", "text": None} for _ in (images if idx == 0 else [])]
        messages += [
            {"role": "user", "content": [*parts, {"type": "text", "text": question}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
    return {"messages": messages, "images": images}


STYLES = {"llava": _llava, "sharegpt": _sharegpt, "openai": _openai, "hub": _hub}
FORMATS = tuple(STYLES)


class Damage(NamedTuple):
    """A kind of damage: `make(rng)` gives a record or the bytes of a line, `reason` is what must be said of it."""

    make: object
    reason: str
    # headers do not show it
    in_pixels: bool = False
    # it depends on the tokens of the model
    needs_collator: bool = False


def line_of(record: object) -> bytes:
    return record if isinstance(record, bytes) else json.dumps(record).encode()


def _with_image(*names: str):
    return lambda rng: record_of(rng, str(rng.choice(FORMATS)), [str(rng.choice(names))])


def _in_messages(change, images: tuple[str, ...] = ()):
    """A record whose list of messages was changed in place."""

    def make(rng: np.random.Generator) -> dict:
        record = record_of(rng, "llava" if rng.random() < 0.5 else "openai", list(images), num_turns=2)
        key = "conversations" if "conversations" in record else "messages"
        words = ("from", "value") if key == "conversations" else ("role", "content")
        record[key] = [message for message in record[key] if message[words[0]] != "system"]
        change(record[key], *words)
        return record

    return make


def _set(index: int, field: int, value: object):
    """Overwrite the role (0) or the content (1) of a message."""

    def change(messages: list, *words: str) -> None:
        messages[index][words[field]] = value

    return _in_messages(change)


def _marked(index: int, **fields: object):
    """Give a message more fields."""
    return _in_messages(lambda messages, *words: messages[index].update(fields))


def _two_weights(rng: np.random.Generator) -> dict:
    messages = [("user", "what?", {}), ("assistant", "a box", {"weight": 0}), ("assistant", "a bowl", {})]
    return {"messages": [{"role": role, "content": content, **more} for role, content, more in messages]}


def _marker_in_an_answer(rng: np.random.Generator) -> dict:
    turns = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "it is <image>"}]
    return {"conversations": turns, "image": "square.png"}


def _all_weights_zero(messages: list, *words: str) -> None:
    for message in messages:
        message["weight"] = 0


def _with_field(name: str, value: object):
    return lambda rng: record_of(rng, str(rng.choice(FORMATS)), []) | {name: value}


def _detail(rng: np.random.Generator) -> dict:
    record = record_of(rng, "openai", ["square.png"])
    parts = next(message["content"] for message in record["messages"] if message["role"] == "user")
    parts[0]["image_url"]["detail"] = "low"
    return record


def _changed(change):
    """A record of one image in LLaVA's format, changed in place."""

    def make(rng: np.random.Generator) -> dict:
        record = record_of(rng, "llava", ["square.png"])
        change(record)
        return record

    return make


def _remarked(marks: str, images: list):
    def change(record: dict) -> None:
        human = next(message for message in record["conversations"] if message["from"] == "human")
        human["value"] = f"{marks}what?"
        record["image"] = images

    return _changed(change)


def _insert(index: int, role: str):
    def change(messages: list, *words: str) -> None:
        messages.insert(index, {words[0]: role, words[1]: "Be brief."})

    return _in_messages(change)


def _two_systems(rng: np.random.Generator) -> dict:
    record = record_of(rng, "llava", [])
    record["conversations"].insert(0, {"from": "system", "value": "One."})
    return record | {"system": "Two."}


def _surrogate(rng: np.random.Generator) -> bytes:
    return json.dumps(good_record(rng) | {"system": "be \ud83d brief"}).encode()


def _bad_utf8(rng: np.random.Generator) -> bytes:
    line = json.dumps(record_of(rng, "llava", []) | {"id": "PLACE"}).encode()
    return line.replace(b"PLACE", bytes(rng.integers(0x80, 0xC0, size=3, dtype=np.uint8)))


def _cut_line(rng: np.random.Generator) -> bytes:
    line = json.dumps(good_record(rng)).encode()
    return line[: rng.integers(1, len(line))]


def _data_uri(content: str):
    return lambda rng: record_of(rng, "openai", [f"data:image/png;base64,{content}"])


def _truncated_data_uri(rng: np.random.Generator) -> dict:
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(buffer, "PNG")
    return record_of(rng, "openai", ["data:image/png;base64," + base64.b64encode(buffer.getvalue()[:-200]).decode()])


def _two_image_fields(record: dict) -> None:
    record["images"] = ["square.png"]


def _long_prompt(rng: np.random.Generator) -> dict:
    return STYLES["llava"]([], [("why " * MAX_LENGTH, "because")], None)


def _many_images(rng: np.random.Generator) -> dict:
    return record_of(rng, "hub", ["square.png"] * (MAX_LENGTH // 16))


def _token_in_text(token: str):
    return lambda rng: STYLES["llava"]([], [(f"what is {token} here?", "a token")], None)


def damages(world: World) -> dict[str, Damage]:
    """Every kind of damage by name."""
    outside = world.outside
    return {
        "missing file": Damage(_with_image("nowhere.png", "sub/none.jpg"), "cannot be opened \\(No such file"),
        "path too long": Damage(_with_image("x" * 300 + ".png"), "cannot be opened"),
        "empty file name": Damage(_changed(lambda record: record.update(image="  ")), "has no image"),
        "empty entry": Damage(_changed(lambda record: record.update(image=[None])), "entry 0 is empty"),
        "image is a number": Damage(_changed(lambda record: record.update(image=[3.5])), "got float"),
        "two fields of images": Damage(_changed(_two_image_fields), "must have one of `images`, `image`"),
        "too few placeholders": Damage(_remarked("<image>\n", ["square.png"] * 2), "1 of 2 are left over"),
        "too many placeholders": Damage(_remarked("<image>\n<image>\n", ["square.png"]), "has no image"),
        "placeholder without image": Damage(_remarked("<image>\n", None), "has no image"),
        "empty question": Damage(_set(2, 1, ""), "Message 2 is empty"),
        "empty answer": Damage(_set(1, 1, ""), "Message 1 is empty"),
        "blank answer": Damage(_set(3, 1, " \n\t"), "Message 3 is empty"),
        "system prompt inside": Damage(_insert(2, "system"), "one system prompt, before all"),
        "two system prompts": Damage(_two_systems, "one system prompt, before all"),
        "unknown role": Damage(_set(1, 0, "tool"), "must be one of .*, got 'tool'"),
        "role of a function": Damage(_set(1, 0, "observation"), "must be one of .*, got 'observation'"),
        "role is missing": Damage(_set(0, 0, None), "got nothing"),
        "role is a number": Damage(_set(0, 0, 7), "got int"),
        "content is missing": Damage(_set(1, 1, None), "Message 1 has no content"),
        "content is a number": Damage(_set(1, 1, 42), "a string or a list of parts, got int"),
        "content is a mapping": Damage(_set(0, 1, {"text": "?"}), "a string or a list of parts, got dict"),
        "unknown part": Damage(_set(0, 1, [{"type": "video", "video": "a.mp4"}]), "got 'video'"),
        "part is no mapping": Damage(_set(0, 1, ["what?"]), "parts must be mappings .*, got str"),
        "part without text": Damage(_set(0, 1, [{"type": "text"}]), "Text must be a string, got nothing"),
        "message is no mapping": Damage(
            _in_messages(lambda messages, *words: messages.insert(1, "hello")), "Message 1 must be a mapping"
        ),
        "no message": Damage(lambda rng: {"messages": []}, "at least one message"),
        "messages are a string": Damage(lambda rng: {"messages": "hello"}, "must be a list .*, got str"),
        "neither format": Damage(lambda rng: {"text": "hello", "image": "square.png"}, "got neither"),
        "both formats": Damage(
            lambda rng: _llava([], [("a", "b")], None) | _openai([], [("a", "b")], None), "got both"
        ),
        "record is no mapping": Damage(lambda rng: [[1], "x", 3, None][rng.integers(4)], "A record must be a mapping"),
        "nothing to learn": Damage(
            _in_messages(lambda messages, *words: messages.__delitem__(slice(1, None))), "learn"
        ),
        "answer to nothing": Damage(
            _in_messages(lambda messages, *words: messages.__delitem__(slice(2, None)) or messages.pop(0)), "learn"
        ),
        "weight between": Damage(_marked(1, weight=0.5), "`weight` of message 1 must be 0 or 1"),
        "weight of a question": Damage(_marked(0, weight=1), "Message 0: only answers can be learned"),
        "weights that contradict": Damage(_marked(1, weight=1, loss=False), "`weight` and `loss` contradict"),
        "weights of one answer": Damage(_two_weights, "Message 2 continues the answer before it"),
        "no weight at all": Damage(_in_messages(_all_weights_zero), "every answer has weight 0"),
        "history mask that is no flag": Damage(_with_field("mask_history", "yes"), "`mask_history` must be 0 or 1"),
        "field of a message": Damage(_marked(1, reasoning_content="hm"), "Message 1 has a field 'reasoning_content'"),
        "calls of tools": Damage(_marked(1, tool_calls=[{"name": "f"}]), "'tool_calls', .*Tools are neither"),
        "tools": Damage(_with_field("tools", [{"name": "f"}]), "a field 'tools', .*Tools are neither shown"),
        "video": Damage(_with_field("video", "a.mp4"), "a field 'video', .*Only images can be shown"),
        "videos": Damage(_with_field("videos", ["a.mp4"]), "a field 'videos', .*Only images can be shown"),
        "sound": Damage(_with_field("audios", ["a.wav"]), "a field 'audios', .*Only images can be shown"),
        "preference": Damage(_with_field("rejected", "no"), "a field 'rejected', .*Preferences are not learned"),
        "images under another name": Damage(_with_field("image_path", "square.png"), "'image_path', .*`images`"),
        "unknown field": Damage(_with_field("score", 0.5), "a field 'score', which is neither read nor known"),
        "marker of a video": Damage(_set(0, 1, "<video>\nwhat?"), "'<video>', which stands for an image or another"),
        "marker of a sound": Damage(_set(0, 1, "what? <audio>"), "'<audio>', which stands for"),
        "marker of another model": Damage(_set(0, 1, "see <|image_pad|>"), "'<\\|image_pad\\|>', which stands for"),
        "numbered marker": Damage(_set(2, 1, "see <image_1>, what?"), "'<image_1>', which stands for"),
        "marker in capitals": Damage(_set(0, 1, "<Image> what?"), "'<Image>', which stands for"),
        "marker in an answer": Damage(_marker_in_an_answer, "Message 1: only messages of role `user` may show images"),
        "detail of an image": Damage(_detail, "asks for `detail` 'low'"),
        "pixels of a part": Damage(
            _set(0, 1, [{"type": "image", "image": "square.png", "max_pixels": 9}]), "not read"
        ),
        "prompt in plain text": Damage(lambda rng: {"prompt": "what?", "completion": "a box"}, "`prompt` is plain"),
        "texts without an answer": Damage(lambda rng: {"texts": [{"user": "what?"}]}, "`user` and `assistant` as str"),
        "instruction without output": Damage(lambda rng: {"instruction": "what?"}, "`instruction` and `output`"),
        "history of no pairs": Damage(
            lambda rng: {"query": "what?", "response": "a box", "history": ["hm"]}, "Entry 0 of `history` must be a"
        ),
        "image in an answer": Damage(
            _set(1, 1, [{"type": "image", "image": "square.png"}]), "only messages of role `user` may show images"
        ),
        "bad UTF-8": Damage(_bad_utf8, "must be valid UTF-8"),
        "lone surrogate": Damage(_surrogate, "must be valid UTF-8"),
        "cut line": Damage(_cut_line, "must be one JSON value"),
        "endless nesting": Damage(lambda rng: b'{"messages": ' + b"[" * 100_000, "must be one JSON value"),
        "absolute path": Damage(_with_image(str(outside / "decoy.png"), "/etc/hostname"), "inside of `image_folder`"),
        "path with ..": Damage(_with_image("../outside/decoy.png", "sub/../square.png"), "may not hold `..`"),
        "backslashes with ..": Damage(_with_image("..\\outside\\decoy.png"), "may not hold `..`"),
        "link to a file": Damage(_with_image("link.png"), "leads out of it"),
        "link to a folder": Damage(_with_image("linked/secret.png"), "leads out of it"),
        "link to itself": Damage(_with_image("loop.png"), "cannot be opened"),
        "null in the path": Damage(_with_image("square\0.png"), "null character"),
        "address": Damage(_with_image("http://127.0.0.1:9/a.png", "HTTPS://127.0.0.1:9/a.png"), "allow_urls=True"),
        "file address": Damage(_with_image(f"file://{outside}/decoy.png", "ftp://127.0.0.1/a.png"), "http address"),
        "folder": Damage(_with_image("sub"), "not an ordinary file"),
        "pipe": Damage(_with_image("pipe.png"), "not an ordinary file"),
        "empty file": Damage(_with_image("empty.png"), "'empty.png' cannot be read \\(no known"),
        "text file": Damage(_with_image("text.png"), "'text.png' cannot be read \\(no known"),
        "PostScript": Damage(_with_image("script.png"), "'script.png' cannot be read \\(no known"),
        "huge image": Damage(_with_image("huge.png"), "cannot be read \\(Image size"),
        "large image": Damage(_with_image("large.png"), "300 x 400 pixels .*more than `max_image_pixels`"),
        "damaged base64": Damage(_data_uri("@@@"), "damaged base64"),
        "base64 of text": Damage(_data_uri("aGVsbG8="), "cannot be read \\(no known"),
        "no base64": Damage(lambda rng: record_of(rng, "openai", ["data:image/png,abc"]), "data URI in base64"),
        "truncated JPEG": Damage(_with_image("truncated.jpg"), "'truncated.jpg' cannot be read", in_pixels=True),
        "truncated PNG": Damage(_with_image("truncated.png"), "'truncated.png' cannot be read", in_pixels=True),
        "flipped bits": Damage(_with_image("flipped.png"), "'flipped.png' cannot be read", in_pixels=True),
        "truncated base64": Damage(_truncated_data_uri, "cannot be read", in_pixels=True),
        "token of the model": Damage(_token_in_text("<IMG_CONTEXT>"), "holds '<IMG_CONTEXT>'", needs_collator=True),
        "end token in a text": Damage(_token_in_text("<|im_end|>"), "holds '<\\|im_end\\|>'", needs_collator=True),
        "images too long": Damage(_many_images, "must not cut images", needs_collator=True),
        "prompt too long": Damage(_long_prompt, "leaves nothing to learn", needs_collator=True),
    }
