"""What a record says, in any of the usual formats: its messages in order. Every field is read, or refused by name.

LLaVA and ShareGPT write `conversations` of `from` and `value`; OpenAI, Hugging Face and ms-swift `messages` of `role`
and `content`; TRL `prompt` and `completion`; The Cauldron, Docmatix and FineVision `texts` of `user` and `assistant`;
alpaca as LLaMA-Factory reads it `instruction`, `input` and `output`; ms-swift also `query` and `response`.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

# what the formats call the three roles that chat templates know
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
# where a record may carry its images: HF data sets and ShareGPT, LLaVA, HF image folders
IMAGES_FIELDS = ("images", "image", "file_name")
# where a record may carry its videos, for models that take them
VIDEOS_FIELDS = ("videos", "video")
# the field that tells a format -> the fields that belong to it
_FORMATS = {
    "messages": (),
    "conversations": (),
    "prompt": ("completion",),
    "texts": (),
    "instruction": ("input", "output", "history"),
    "query": ("response", "history"),
}
# read whatever the format; `origin` is written by `load_records`
_COMMON_FIELDS = ("system", "mask_history", "origin", *IMAGES_FIELDS)
# they say where a record comes from, or describe it: nothing that is learned or shown changes with them
HARMLESS_FIELDS = frozenset(
    """
    id _id idx index uid uuid sample_id question_id image_id conversation_id source sources dataset dataset_name
    data_source subset split category categories task task_type topic subject domain tags license lang language
    url timestamp date created_at metadata meta model model_name generator parallel_tool_calls difficulty
    height width width_list height_list choice_list
    relevance_ratings relevance_min visual_dependency_ratings visual_dependency_min
    image_correspondence_ratings image_correspondence_min formatting_ratings formatting_min
    """.split()
)
_HARMLESS_OF_MESSAGES = frozenset(("id", "idx", "uuid", "timestamp", "source", "formatted"))
# whether an answer is learned: OpenAI, ms-swift, UI-TARS
_MARKS = ("weight", "loss", "loss_mask")
_ONLY_IMAGES = "Only images can be shown: give the frames of a video as `images`, or leave the record out."
_ONLY_CHATS = "Tools are neither shown nor learned: leave the record out, or write calls and results as messages."
_ADVICE = {
    **dict.fromkeys(("video", "videos", "audio", "audios", "speech", "sound"), _ONLY_IMAGES),
    **dict.fromkeys(("tools", "functions", "tool_calls", "function_call", "tool_call_id"), _ONLY_CHATS),
    **dict.fromkeys(
        ("chosen", "rejected", "rejected_response", "rejected_messages", "label", "kto_tag"),
        "Preferences are not learned here: give the answer to learn as a message.",
    ),
    **dict.fromkeys(
        ("image_path", "image_paths", "image_url", "img", "img_path", "picture", "pictures", "path"),
        "Images belong into `images` or `image`.",
    ),
    "objects": "Boxes are not written into texts: do that before.",
}
_OTHER_ADVICE = "Remove the field, or say by `load_records(..., ignore_fields=...)` that it does not matter."


class Message(NamedTuple):
    """Role in the words of chat templates, content as given, and whether an answer is learned."""

    role: str
    content: Any
    learned: bool = True


def messages_of(record: Mapping[str, Any], ignore_fields: Collection[str] = ()) -> Iterator[Message]:
    """The messages of a record.

    Args:
        record (`Mapping`): in one of the formats.
        ignore_fields (`Collection[str]`): fields that are not looked at.

    Raises:
        ValueError: the record is in none of the formats or in several, or has a field that is neither read nor known
            to be harmless.
    """
    given = [field for field in _FORMATS if record.get(field) is not None and field not in ignore_fields]
    filled = [field for field in given if _is_filled(record[field])] or given
    if len(filled) != 1:
        got = f"both `{'` and `'.join(filled)}`" if filled else "neither"
        raise ValueError(
            f"A record must have one of `{'`, `'.join(_FORMATS)}`, got {got}. Write it in one of the formats, or "
            "leave out what is not meant by `load_records(..., ignore_fields=...)`."
        )
    known = {*filled, *_FORMATS[filled[0]], *_COMMON_FIELDS, *HARMLESS_FIELDS, *ignore_fields}
    _refuse_unknown(record, known, "The record")
    system = record.get("system")
    # an empty field is how tables say that there is none
    if system:
        yield Message("system", system)
    last_only = _flag(record.get("mask_history"), "`mask_history`") is True
    messages = list(_READERS[filled[0]](record, 1 if system else 0))
    last = max((idx for idx, message in enumerate(messages) if message.role == "assistant"), default=0)
    for idx, message in enumerate(messages):
        yield message._replace(learned=message.learned and (idx == last or not last_only))


def _is_filled(value: Any) -> bool:
    return not (value is None or isinstance(value, (str, list, tuple, Mapping)) and len(value) == 0)


def _refuse_unknown(fields: Mapping[str, Any], known: Collection[str], owner: str) -> None:
    for field, value in fields.items():
        if field not in known and _is_filled(value):
            advice = _ADVICE.get(field, _OTHER_ADVICE if owner == "The record" else "Remove it.")
            raise ValueError(
                f"{owner} has a field {field!r}, which is neither read nor known to be harmless. {advice}"
            )


def _flag(value: Any, name: str) -> bool | None:
    """A field that is on or off; None if it is not given."""
    if value is None:
        return None
    if not isinstance(value, (bool, int, float)) or value not in (0, 1):
        raise ValueError(f"{name} must be 0 or 1, false or true, got {value!r}. Nothing between can be learned.")
    return bool(value)


def _listed(value: Any, field: str) -> list | tuple:
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(f"`{field}` must be a list of at least one message, got {kind_of(value)}.")
    return value


def _message(message: Any, idx: int, learned: bool = True) -> Message:
    """One message of `messages`, `conversations`, `prompt` or `completion`; `learned` if it does not say itself."""
    if not isinstance(message, Mapping):
        raise ValueError(f"Message {idx} must be a mapping of `role` and `content`, got {kind_of(message)}.")
    _refuse_unknown(message, {"role", "from", "content", "value", *_MARKS, *_HARMLESS_OF_MESSAGES}, f"Message {idx}")
    role, content = (
        next((message[key] for key in keys if message.get(key) is not None), None)
        for keys in (("role", "from"), ("content", "value"))
    )
    if not isinstance(role, str) or role not in ROLES:
        shown = repr(role) if isinstance(role, str) else kind_of(role)
        raise ValueError(f"Message {idx}: the role must be one of {', '.join(ROLES)}, got {shown}.")
    if content is None:
        raise ValueError(f"Message {idx} has no content. Give `content` or `value`, or remove the message.")
    marks = {name: _flag(message.get(name), f"`{name}` of message {idx}") for name in _MARKS}
    given = {name: mark for name, mark in marks.items() if mark is not None}
    if len(set(given.values())) > 1:
        raise ValueError(f"Message {idx}: `{'` and `'.join(given)}` contradict each other. Give one of them.")
    if ROLES[role] != "assistant" and any(given.values()):
        raise ValueError(f"Message {idx}: only answers can be learned, but `{next(iter(given))}` asks for it.")
    return Message(ROLES[role], content, next(iter(given.values()), learned))


def _of_messages(field: str) -> Any:
    return lambda record, first: (
        _message(message, idx) for idx, message in enumerate(_listed(record[field], field), start=first)
    )


def _of_prompt(record: Mapping[str, Any], first: int) -> Iterator[Message]:
    # as in TRL, answers of the prompt are shown and not learned
    for field, learned in (("prompt", False), ("completion", True)):
        value = record.get(field)
        if isinstance(value, str):
            raise ValueError(
                f"`{field}` is plain text, which is not learned here. Give `prompt` and `completion` as lists of "
                "messages."
            )
        for message in _listed(value, field):
            yield _message(message, first, learned)
            first += 1


def _of_texts(record: Mapping[str, Any], first: int) -> Iterator[Message]:
    for idx, turn in enumerate(_listed(record["texts"], "texts")):
        if not isinstance(turn, Mapping):
            raise ValueError(f"`texts` must hold mappings of `user` and `assistant`, got {kind_of(turn)}.")
        _refuse_unknown(turn, {"user", "assistant", *_HARMLESS_OF_MESSAGES}, f"Entry {idx} of `texts`")
        yield from _turn(turn.get("user"), turn.get("assistant"), f"Entry {idx} of `texts`", "`user` and `assistant`")


def _of_history(record: Mapping[str, Any]) -> Iterator[Message]:
    history = record.get("history")
    for idx, turn in enumerate(_listed(history, "history") if _is_filled(history) else ()):
        if not isinstance(turn, (list, tuple)) or len(turn) != 2:
            raise ValueError(f"Entry {idx} of `history` must be a pair of question and answer, got {kind_of(turn)}.")
        yield from _turn(*turn, f"Entry {idx} of `history`", "a question and an answer")


def _of_instruction(record: Mapping[str, Any], first: int) -> Iterator[Message]:
    yield from _of_history(record)
    question, more = record["instruction"], record.get("input")
    if _is_filled(more):
        if not isinstance(question, str) or not isinstance(more, str):
            raise ValueError(f"`instruction` and `input` must be strings, got {kind_of(question)}, {kind_of(more)}.")
        question = f"{question}\n{more}"
    yield from _turn(question, record.get("output"), "The record", "`instruction` and `output`")


def _of_query(record: Mapping[str, Any], first: int) -> Iterator[Message]:
    yield from _of_history(record)
    yield from _turn(record["query"], record.get("response"), "The record", "`query` and `response`")


def _turn(question: Any, answer: Any, owner: str, names: str) -> Iterator[Message]:
    for role, content in (("user", question), ("assistant", answer)):
        if not isinstance(content, str):
            raise ValueError(f"{owner} must have {names} as strings, got {kind_of(content)}.")
        yield Message(role, content)


_READERS = {
    "messages": _of_messages("messages"),
    "conversations": _of_messages("conversations"),
    "prompt": _of_prompt,
    "texts": _of_texts,
    "instruction": _of_instruction,
    "query": _of_query,
}


def kind_of(value: Any) -> str:
    """What a value is, for messages."""
    return "nothing" if value is None else type(value).__name__
