"""One record, in any of the usual formats, to messages as chat templates take them.

The formats differ in names only: LLaVA and ShareGPT write `conversations` of `from` and `value`, OpenAI and Hugging
Face `messages` of `role` and `content`. Where an image stands in the text is marked by `<image>` or by a content part.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# stands for an image in plain text, as in the data of LLaVA and all that follow it
IMAGE_MARKER = "<image>"

# what the formats call the three roles that chat templates know
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
# where a content part may carry its image: HF chats and OpenAI messages
_IMAGE_KEYS = ("image", "image_url", "url", "path", "base64")
# where a record may carry its images: HF data sets and ShareGPT, LLaVA, HF image folders
_IMAGES_KEYS = ("images", "image", "file_name")


@dataclass
class Conversation:
    """One record as chat templates take it: `messages` with bare image parts, and their `images` in order."""

    messages: list[dict[str, Any]]
    images: list[Any]

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Conversation":
        """Read and check one record; nothing is opened.

        - `messages` or `conversations`: a list of `role` and `content`, or of `from` and `value`. Roles are `system`
          (at most one, first, also as a field `system` of the record), then `user` (`human`) and `assistant` (`gpt`)
          in turn, the user first, with at least one answer. No message is empty, and only users show images.
        - A content is a string, in which each `<image>` stands for an image, or a list of parts of type `text`,
          `image` (HF) or `image_url` (OpenAI), which may carry their images.
        - `images`, `image` or `file_name`: one image or a list, for those places of the text that carry none. If the
          text has no place for any, they come before the text of the first user message.

        A single `<image>` at the end of a message goes to its front, as in LLaVA's own loader; others stay where they
        are. Other fields are ignored, and so are those that are None, with which tables fill gaps.

        Raises:
            ValueError: the record breaks one of these rules; the message says which.
        """
        if not isinstance(record, Mapping):
            raise ValueError(f"A record must be a mapping with `messages` or `conversations`, got {_kind(record)}.")
        given = _images_of(record)
        messages, images, left = [], [], iter(given)
        for idx, (role, content) in enumerate(_messages_of(record)):
            try:
                messages.append({"role": role, "content": _content(content, left, images)})
            except ValueError as error:
                raise ValueError(f"Message {idx}: {error}") from error
        surplus = len(list(left))
        if surplus and not images and any(message["role"] == "user" for message in messages):
            _put_first(messages, surplus)
            images, surplus = given, 0
        _check_turns(messages)
        if surplus:
            raise ValueError(
                f"`images` must hold one image per `{IMAGE_MARKER}` or image part, but {surplus} of {len(given)} are "
                "left over. Mark in the text where each belongs."
            )
        return cls(messages, images)


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__


def _images_of(record: Mapping[str, Any]) -> list[Any]:
    """The images that a record carries outside of its text."""
    filled = [key for key in _IMAGES_KEYS if record.get(key) is not None]
    if not filled:
        return []
    if len(filled) > 1:
        raise ValueError(f"A record must have one of `{'`, `'.join(_IMAGES_KEYS)}`, got `{'` and `'.join(filled)}`.")
    images = record[filled[0]]
    images = list(images) if isinstance(images, (list, tuple)) else [images]
    for idx, image in enumerate(images):
        if image is None or isinstance(image, str) and not image.strip():
            raise ValueError(f"`{filled[0]}` must name an image, but entry {idx} is empty. Remove it, or fill it in.")
    return images


def _messages_of(record: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Role and content of each message, in the words of chat templates."""
    filled = [key for key in ("messages", "conversations") if record.get(key) is not None]
    if len(filled) != 1:
        raise ValueError(
            f"A record must have either `messages` or `conversations`, got {'both' if filled else 'neither'}."
        )
    messages = record[filled[0]]
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(f"`{filled[0]}` must be a list of at least one message, got {_kind(messages)}.")
    system = record.get("system")
    # an empty field is how tables say that there is none
    if system:
        yield "system", system
    for idx, message in enumerate(messages, start=1 if system else 0):
        if not isinstance(message, Mapping):
            raise ValueError(f"Message {idx} must be a mapping of `role` and `content`, got {_kind(message)}.")
        role, content = (
            next((message[key] for key in keys if message.get(key) is not None), None)
            for keys in (("role", "from"), ("content", "value"))
        )
        if not isinstance(role, str) or role not in _ROLES:
            shown = repr(role) if isinstance(role, str) else _kind(role)
            raise ValueError(f"Message {idx}: the role must be one of {', '.join(_ROLES)}, got {shown}.")
        if content is None:
            raise ValueError(f"Message {idx} has no content. Give `content` or `value`, or remove the message.")
        yield _ROLES[role], content


def _content(content: Any, left: Iterator[Any], images: list[Any]) -> str | list[dict[str, Any]]:
    """The content of a message without its images, which go to `images`; those that it lacks come from `left`."""
    if isinstance(content, str):
        parts = _marked_parts(_text(content))
        if parts is None:
            return content
    elif isinstance(content, (list, tuple)):
        parts = content
    else:
        raise ValueError(f"The content must be a string or a list of parts, got {_kind(content)}.")
    return [_bare_part(part, left, images) for part in parts]


def _text(text: Any) -> str:
    if not isinstance(text, str):
        raise ValueError(f"Text must be a string, got {_kind(text)}.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"Text must be valid UTF-8, but character {error.start} of it comes from bytes that are not. Save the "
            "data again in UTF-8."
        ) from None
    return text


def _marked_parts(text: str) -> list[dict[str, Any]] | None:
    """Text and images of a string with markers, None if it has none."""
    if IMAGE_MARKER not in text:
        return None
    if text.count(IMAGE_MARKER) == 1 and text.rstrip().endswith(IMAGE_MARKER):
        text = f"{IMAGE_MARKER}\n{text.replace(IMAGE_MARKER, '').strip()}"
    first, *others = text.split(IMAGE_MARKER)
    parts = [{"type": "text", "text": first}]
    for piece in others:
        # the line break after an image is written by the chat template
        parts += [{"type": "image"}, {"type": "text", "text": piece.removeprefix("\n")}]
    return [part for part in parts if part["type"] == "image" or part["text"]]


def _bare_part(part: Any, left: Iterator[Any], images: list[Any]) -> dict[str, Any]:
    if not isinstance(part, Mapping):
        raise ValueError(f"Content parts must be mappings with a `type`, got {_kind(part)}.")
    kind = part.get("type")
    if kind == "text":
        return {"type": "text", "text": _text(part.get("text"))}
    if kind not in ("image", "image_url"):
        raise ValueError(f"Content parts must be of type `text`, `image` or `image_url`, got {kind!r}.")
    # data sets that are stored as tables fill the keys that a part lacks with None
    key = next((key for key in _IMAGE_KEYS if part.get(key) is not None), None)
    source = next(left, None) if key is None else part[key]
    if isinstance(source, Mapping) and source.get("url") is not None:
        source = source["url"]
    if key == "base64" and isinstance(source, str) and not source.startswith("data:"):
        source = f"data:image;base64,{source}"
    if source is None or isinstance(source, str) and not source.strip():
        raise ValueError(
            f"An image part or `{IMAGE_MARKER}` has no image. Put it in the part, or add it to `images` of the record."
        )
    images.append(source)
    return {"type": "image"}


def _put_first(messages: list[dict[str, Any]], num_images: int) -> None:
    user = next(message for message in messages if message["role"] == "user")
    content = user["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    user["content"] = [{"type": "image"} for _ in range(num_images)] + parts


def _check_turns(messages: list[dict[str, Any]]) -> None:
    expected = "user"
    for idx, message in enumerate(messages):
        role, content = message["role"], message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        has_image = any(part["type"] == "image" for part in parts)
        if has_image and role != "user":
            raise ValueError(f"Message {idx}: only messages of role `user` may show images, not those of `{role}`.")
        if not has_image and not any(part["text"].strip() for part in parts):
            raise ValueError(f"Message {idx} is empty. Remove its turn from the record.")
        if role == "system":
            if idx > 0:
                raise ValueError(f"Message {idx}: there may be one system prompt, before all other messages.")
        elif role != expected:
            raise ValueError(
                f"Message {idx} must have the role `{expected}`, got `{role}`: after the system prompt, user and "
                "assistant take turns, and the user begins. Join or remove messages."
            )
        else:
            expected = "assistant" if role == "user" else "user"
    if all(message["role"] != "assistant" for message in messages):
        raise ValueError("`messages` hold nothing to learn, since no message has the role `assistant`. Add one.")
