"""One record, in any of the usual formats, to messages as chat templates take them.

Where an image stands in the text is marked by `<image>` or by a content part.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from .formats import IMAGES_FIELDS, VIDEOS_FIELDS, Message, kind_of, messages_of

# stands for an image in plain text, as in the data of LLaVA and all that follow it
IMAGE_MARKER = "<image>"
# the same for a video, of models that take them
VIDEO_MARKER = "<video>"
_MARKERS = {IMAGE_MARKER: "image", VIDEO_MARKER: "video"}
# what stands for an image, a video or a sound in the data and prompts of others; no prose writes it
_FOREIGN_MARKERS = re.compile(
    r"<\|[^|<>\s]*(?:image|img|video|audio|vision|media)[^|<>\s]*\|>"
    r"|<(?:image|img|video|audio)[ _-]?(?:pad|placeholder|token|start|end|here|context|soft_token|\d+)>"
    r"|</image>|<imagehere>|<fake_token_around_image>|<(?:start|end)_of_image>|<ref-object>|<bbox>"
    r"|\[IMG(?:_BREAK|_END)\]"
    # our own marker, spelled otherwise
    r"|<(?!(?-i:image>))image>",
    re.IGNORECASE,
)
# these are also names of HTML elements and BBCode: they stand for a medium where a message begins or ends with them
_ELEMENT = r"(?:<(?:video|audio|speech|sound|img)>|\[IMG\])"
_FOREIGN_AT_AN_END = re.compile(rf"^\s*{_ELEMENT}|{_ELEMENT}\s*$")
# where a content part may carry its image: HF chats and OpenAI messages
_IMAGE_KEYS = ("image", "image_url", "url", "path", "base64")
# where a content part may carry its video
_VIDEO_KEYS = ("video", "path")
# keys of a mapping that is an image: tables, and OpenAI messages
_KEYS_OF_IMAGES = ("bytes", "path", "url", "detail")


@dataclass
class Conversation:
    """One record as chat templates take it: `messages` with bare image parts, and their `images` in order.

    An answer that is not to be learned has `weight` 0. `videos` are those of bare video parts.
    """

    messages: list[dict[str, Any]]
    images: list[Any]
    videos: list[Any] = field(default_factory=list)

    @classmethod
    def from_record(
        cls,
        record: Mapping[str, Any],
        ignore_fields: Collection[str] = (),
        needs_answer: bool = True,
        takes_videos: bool = False,
    ) -> "Conversation":
        """Read and check one record; nothing is opened.

        - Messages in one of these formats: `messages` or `conversations`, a list of `role` and `content`, or of `from`
          and `value`; `prompt` and `completion`, both lists of messages, of which only the completion is learned;
          `texts`, a list of `user` and `assistant`; `instruction` (with `input`) and `output`; `query` and `response`.
          The last two may have a `history`, a list of pairs of question and answer.
        - Roles are `system` (or `developer`; at most one, first, also as a field `system` of the record), then `user`
          (`human`) and `assistant` (`gpt`) in turn. Consecutive messages of one role are joined by a line break. An
          answer before the first question is left out, as in LLaVA's own loader. No message is empty, and only users
          show images.
        - A content is a string or a list of parts of type `text`, `image` (HF) or `image_url` (OpenAI), which may
          carry their images. Each `<image>` in a text stands for an image. Other spellings of placeholders, and those
          of other media, are refused.
        - `images`, `image` or `file_name`: one image or a list, for those places of the text that carry none. If the
          text has no place for any, they come before the text of the first user message. An empty string is no image.
        - With `takes_videos`, videos as images: each `<video>` in a text and each part of type `video` stands for one,
          and `videos`, a list, or `video`, a single one, carry them: a path of a file, a list of frames, which are
          images, or a mapping of `path` or `frames` and their `fps`. If the text has no place for any, they come
          first.
        - An answer whose `weight`, `loss` or `loss_mask` is 0 or false is shown but not learned; with `mask_history`
          true only the last one is learned. At least one must be, unless `needs_answer` is false.

        A single `<image>` at the end of a message goes to its front, as in LLaVA's own loader; others stay where they
        are. Fields that only describe a record (`formats.HARMLESS_FIELDS`) are ignored, and so are empty ones, with
        which tables fill gaps. All others are refused by name.

        Args:
            record (`Mapping`): the record.
            ignore_fields (`Collection[str]`): more fields of records that are ignored.
            needs_answer (`bool`): whether there must be something to learn; a question alone can be evaluated.
            takes_videos (`bool`): whether the model takes videos; else they are refused.

        Raises:
            ValueError: the record breaks one of these rules; the message says which.
        """
        if not isinstance(record, Mapping):
            raise ValueError(f"A record must be a mapping with `messages` or `conversations`, got {kind_of(record)}.")
        shown = {"image": _Shown(_images_of(record, ignore_fields))}
        if takes_videos:
            shown["video"] = _Shown(_videos_of(record, ignore_fields))
            ignore_fields = {*ignore_fields, *VIDEOS_FIELDS}
        read = []
        for idx, message in enumerate(messages_of(record, ignore_fields)):
            try:
                _refuse_foreign_markers(message, takes_videos)
                read.append(message._replace(content=_content(message.content, shown)))
            except ValueError as error:
                raise ValueError(f"Message {idx}: {error}") from error
        _check_messages(read)
        read = _in_turn(read, needs_answer)
        for kind, media in shown.items():
            surplus = len(list(media.left))
            if surplus and not media.found and read:
                first = next(idx for idx, message in enumerate(read) if message.role == "user")
                parts = [{"type": kind} for _ in range(surplus)] + _parts(read[first].content)
                read[first] = read[first]._replace(content=parts)
                media.found, surplus = media.given, 0
            if surplus:
                raise ValueError(
                    f"`{kind}s` must hold one {kind} per `<{kind}>` or {kind} part, but {surplus} of "
                    f"{len(media.given)} are left over. Mark in the text where each belongs."
                )
        return cls([_as_dict(message) for message in read], *(media.found for media in shown.values()))


class _Shown:
    """Images or videos of a record: those outside of its text, what is left of them, and all in prompt order."""

    def __init__(self, given: list[Any]):
        self.given, self.left, self.found = given, iter(given), []


def _as_dict(message: Message) -> dict[str, Any]:
    masked = message.role == "assistant" and not message.learned
    return {"role": message.role, "content": message.content, **({"weight": 0} if masked else {})}


def _images_of(record: Mapping[str, Any], ignore_fields: Collection[str]) -> list[Any]:
    """The images that a record carries outside of its text."""
    given = {key: record.get(key) for key in IMAGES_FIELDS if key not in ignore_fields}
    filled = [key for key, value in given.items() if not _is_no_image(value)]
    if not filled:
        return []
    if len(filled) > 1:
        raise ValueError(f"A record must have one of `{'`, `'.join(IMAGES_FIELDS)}`, got `{'` and `'.join(filled)}`.")
    images = record[filled[0]]
    images = list(images) if isinstance(images, (list, tuple)) else [images]
    for idx, image in enumerate(images):
        if _is_no_image(image):
            raise ValueError(f"`{filled[0]}` must name an image, but entry {idx} is empty. Remove it, or fill it in.")
        _refuse_more_keys(image, f"Entry {idx} of `{filled[0]}`")
    return images


def _videos_of(record: Mapping[str, Any], ignore_fields: Collection[str]) -> list[Any]:
    """The videos that a record carries outside of its text."""
    given = {key: record.get(key) for key in VIDEOS_FIELDS if key not in ignore_fields}
    filled = [key for key, value in given.items() if not _is_no_image(value) and not _is_empty(value)]
    if len(filled) > 1:
        raise ValueError(f"A record must have one of `{'`, `'.join(VIDEOS_FIELDS)}`, got `{'` and `'.join(filled)}`.")
    if not filled:
        return []
    value = given[filled[0]]
    if filled == ["video"]:
        return [value]
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"`videos` must be a list of videos, got {kind_of(value)}. Name a single one `video`.")
    for idx, video in enumerate(value):
        if _is_no_image(video) or _is_empty(video):
            raise ValueError(f"`videos` must name a video, but entry {idx} is empty. Remove it, or fill it in.")
    return list(value)


def _is_empty(value: Any) -> bool:
    return isinstance(value, (list, tuple, Mapping)) and len(value) == 0


def _is_no_image(value: Any) -> bool:
    return value is None or isinstance(value, str) and not value.strip()


def _refuse_more_keys(image: Any, owner: str) -> None:
    """Raise if a mapping that stands for an image says more of it than where it is."""
    if not isinstance(image, Mapping):
        return
    more = [key for key, value in image.items() if value is not None and key not in _KEYS_OF_IMAGES]
    if more:
        raise ValueError(f"{owner} has {more[0]!r} beside its image, which is not read. Remove it.")
    if image.get("detail") not in (None, "auto", "high"):
        raise ValueError(
            f"{owner} asks for `detail` {image['detail']!r}, but every image is shown as the image processor says. "
            "Remove it."
        )


def _refuse_foreign_markers(message: Message, takes_videos: bool) -> None:
    """Raise if a question holds what stands for an image or another medium elsewhere, but would be text here."""
    if message.role == "assistant":
        return
    contents = message.content if isinstance(message.content, (list, tuple)) else [message.content]
    for part in contents:
        text = part.get("text") if isinstance(part, Mapping) else part
        if takes_videos and isinstance(text, str):
            text = text.replace(VIDEO_MARKER, "")
        found = isinstance(text, str) and (_FOREIGN_MARKERS.search(text) or _FOREIGN_AT_AN_END.search(text))
        if found:
            raise ValueError(
                f"The text holds {found[0].strip()!r}, which stands for an image or another medium elsewhere, and "
                f"would be text here. Write `{IMAGE_MARKER}` for an image; other media cannot be shown."
            )


def _content(content: Any, shown: Mapping[str, _Shown]) -> str | list[dict[str, Any]]:
    """The content of a message without its images and videos, which go to those that are `shown`."""
    if isinstance(content, str):
        parts = _marked_parts(_text(content), shown)
        return content if parts is None else [_bare_part(part, shown) for part in parts]
    if not isinstance(content, (list, tuple)):
        raise ValueError(f"The content must be a string or a list of parts, got {kind_of(content)}.")
    bare = []
    for part in content:
        is_text = isinstance(part, Mapping) and part.get("type") == "text"
        marked = _marked_parts(_text(part.get("text")), shown) if is_text else None
        if marked is not None:
            _refuse_more_of_part(part)
        bare += [_bare_part(each, shown) for each in (marked or [part])]
    return bare


def _text(text: Any) -> str:
    if not isinstance(text, str):
        raise ValueError(f"Text must be a string, got {kind_of(text)}.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"Text must be valid UTF-8, but character {error.start} of it comes from bytes that are not. Save the "
            "data again in UTF-8."
        ) from None
    return text


def _marked_parts(text: str, kinds: Collection[str]) -> list[dict[str, Any]] | None:
    """Text, images and videos of a string with markers of these kinds, None if it has none."""
    markers = [marker for marker, kind in _MARKERS.items() if kind in kinds]
    found = re.findall("|".join(markers), text)
    if not found:
        return None
    if len(found) == 1 and text.rstrip().endswith(found[0]):
        text = f"{found[0]}\n{text.replace(found[0], '').strip()}"
    first, *others = re.split(f"({'|'.join(markers)})", text)
    parts = [{"type": "text", "text": first}]
    for marker, piece in zip(others[::2], others[1::2]):
        # the line break after an image is written by the chat template
        parts += [{"type": _MARKERS[marker]}, {"type": "text", "text": piece.removeprefix("\n")}]
    return [part for part in parts if part["type"] != "text" or part["text"]]


def _refuse_more_of_part(part: Mapping[str, Any], *known: str) -> None:
    more = [key for key, value in part.items() if value is not None and key not in ("type", "text", *known)]
    if more:
        raise ValueError(f"A part of type {part['type']!r} has {more[0]!r}, which is not read. Remove it.")


def _bare_part(part: Any, shown: Mapping[str, _Shown]) -> dict[str, Any]:
    if not isinstance(part, Mapping):
        raise ValueError(f"Content parts must be mappings with a `type`, got {kind_of(part)}.")
    kind = part.get("type")
    if kind == "text":
        _refuse_more_of_part(part)
        return {"type": "text", "text": _text(part.get("text"))}
    if kind == "video" and "video" in shown:
        return _bare_video(part, shown["video"])
    if kind not in ("image", "image_url"):
        raise ValueError(
            f"Content parts must be of type `text`, `image` or `image_url`, got {kind!r}. Other media cannot be shown."
        )
    _refuse_more_of_part(part, *_IMAGE_KEYS, "detail")
    _refuse_more_keys({"detail": part.get("detail")}, "The image part")
    # data sets that are stored as tables fill the keys that a part lacks with None
    given = [key for key in _IMAGE_KEYS if part.get(key) is not None]
    if len(given) > 1:
        raise ValueError(f"An image part must have one image, got `{'` and `'.join(given)}`.")
    source = part[given[0]] if given else next(shown["image"].left, None)
    _refuse_more_keys(source, "The image part")
    if isinstance(source, Mapping) and source.get("url") is not None:
        source = source["url"]
    if given == ["base64"] and isinstance(source, str) and not source.startswith("data:"):
        source = f"data:image;base64,{source}"
    if _is_no_image(source):
        raise ValueError(
            f"An image part or `{IMAGE_MARKER}` has no image. Put it in the part, or add it to `images` of the record."
        )
    shown["image"].found.append(source)
    return {"type": "image"}


def _bare_video(part: Mapping[str, Any], videos: _Shown) -> dict[str, Any]:
    _refuse_more_of_part(part, *_VIDEO_KEYS)
    given = [key for key in _VIDEO_KEYS if part.get(key) is not None]
    if len(given) > 1:
        raise ValueError(f"A video part must have one video, got `{'` and `'.join(given)}`.")
    source = part[given[0]] if given else next(videos.left, None)
    if _is_no_image(source) or _is_empty(source):
        raise ValueError(
            f"A video part or `{VIDEO_MARKER}` has no video. Put it in the part, or add it to `videos` of the record."
        )
    videos.found.append(source)
    return {"type": "video"}


def _parts(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _check_messages(messages: list[Message]) -> None:
    """Raise if a message is empty, or shows or says what its role may not."""
    for idx, message in enumerate(messages):
        parts = _parts(message.content)
        has_image = any(part["type"] != "text" for part in parts)
        if has_image and message.role != "user":
            raise ValueError(
                f"Message {idx}: only messages of role `user` may show images, not those of `{message.role}`."
            )
        if not has_image and not any(part["text"].strip() for part in parts if part["type"] == "text"):
            raise ValueError(f"Message {idx} is empty. Remove its turn from the record.")
        if message.role == "system" and idx > 0:
            raise ValueError(f"Message {idx}: there may be one system prompt, before all other messages.")


def _in_turn(messages: list[Message], needs_answer: bool) -> list[Message]:
    """The messages with those of one role joined, and without an answer to nothing.

    Raises:
        ValueError: answers would be joined of which some are learned and some are not, or nothing is learned although
            `needs_answer`.
    """
    joined: list[Message] = []
    for idx, message in enumerate(messages):
        if message.role == "assistant" and all(before.role == "system" for before in joined):
            continue
        if not joined or joined[-1].role != message.role:
            joined.append(message)
            continue
        if joined[-1].learned != message.learned:
            raise ValueError(
                f"Message {idx} continues the answer before it, but one of them is learned and the other is not. Give "
                "both the same weight."
            )
        joined[-1] = message._replace(content=_joined(joined[-1].content, message.content))
    answers = [message for message in joined if message.role == "assistant"]
    if not answers and needs_answer:
        raise ValueError(
            "`messages` hold nothing to learn, since no message has the role `assistant` and a question before it. "
            "Add one."
        )
    if needs_answer and not any(message.learned for message in answers):
        raise ValueError("The messages hold nothing to learn, since every answer has weight 0. Leave the record out.")
    return joined


def _joined(content: str | list, more: str | list) -> str | list:
    if isinstance(content, str) and isinstance(more, str):
        return f"{content}\n{more}"
    first, second = _parts(content), _parts(more)
    # the chat template writes the line break after an image
    between = [{"type": "text", "text": "\n"}] if first[-1]["type"] == "text" else []
    return [*first, *between, *second]
