"""From chat records to padded training batches."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import ProcessorMixin

# the label of everything that is not learned, as in torch and transformers
IGNORE_INDEX = -100
# where a content part may carry its image: HF chats and OpenAI messages
_IMAGE_KEYS = ("image", "image_url", "url", "path", "base64")
_PADDING_SIDES = ("left", "right")


@dataclass
class Conversation:
    """One record as chat templates take it: `messages` with bare image parts, and their `images` in order."""

    messages: list[dict[str, Any]]
    images: list[Any]

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Conversation":
        """Read `messages`, and `images` for those image parts that carry none.

        Args:
            record (`dict`): `messages`, each with `role` and `content`: a string, or parts of type `text`, `image`
                (HF) or `image_url` (OpenAI). `images` (*optional*): PIL images, paths, URLs or data URIs. If no part
                is an image, they come before the text of the first user message.

        Raises:
            ValueError: image parts and images do not match, or a part has another type.
        """
        given = list(record.get("images") or [])
        messages, images, left = [], [], iter(given)
        for message in record["messages"]:
            content = message["content"]
            if not isinstance(content, str):
                content = [_bare_part(part, left, images) for part in content]
            messages.append({"role": message["role"], "content": content})
        if given and not images:
            _put_first(messages, len(given))
            return cls(messages, given)
        surplus = len(list(left))
        if surplus:
            raise ValueError(
                f"`images` must hold one image per image part, but {surplus} of {len(given)} are left over. Give each "
                "a part `{'type': 'image'}` where it belongs in the text."
            )
        return cls(messages, images)


def _bare_part(part: dict[str, Any], left: Any, images: list[Any]) -> dict[str, Any]:
    if part["type"] == "text":
        return {"type": "text", "text": part["text"]}
    if part["type"] not in ("image", "image_url"):
        raise ValueError(f"Content parts must be of type `text`, `image` or `image_url`, got {part['type']!r}.")
    # data sets that are stored as tables fill the keys that a part lacks with None
    source = next((part[key] for key in _IMAGE_KEYS if part.get(key) is not None), None)
    if isinstance(source, dict):
        source = source["url"]
    if source is None:
        source = next(left, None)
    if source is None:
        raise ValueError("An image part has no image. Put it in the part, or add it to `images` of the record.")
    images.append(source)
    return {"type": "image"}


def _put_first(messages: list[dict[str, Any]], num_images: int) -> None:
    user = next((message for message in messages if message["role"] == "user"), None)
    if user is None:
        raise ValueError("`images` need a message with role `user` that they belong to, but the record has none.")
    content = user["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    user["content"] = [{"type": "image"} for _ in range(num_images)] + parts


class VtcCollator:
    """Turns chat records into a batch with labels, for any processor of hf_vtc and any chat template.

    Only what the assistant says is supervised, its end token included; prompts, placeholders and padding are -100. A
    conversation is tokenized turn by turn, cut where generation would start, so that the model learns to continue
    exactly the tokens that it will be given.

    Args:
        processor (`VtcProcessor`): its chat template must grow: each further message only appends text.
        padding_side (`str`): `"right"` or `"left"`. The models do not mind.

    Raises:
        ValueError: `padding_side` is neither.
    """

    def __init__(self, processor: ProcessorMixin, padding_side: str = "right"):
        if padding_side not in _PADDING_SIDES:
            raise ValueError(f"`padding_side` must be one of {', '.join(_PADDING_SIDES)}, got {padding_side!r}.")
        self.processor = processor
        self.padding_side = padding_side

    def __call__(self, records: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Make a batch.

        Args:
            records (`Sequence[dict]`): see `Conversation.from_record`; rows without an image are fine.

        Returns:
            `input_ids`, `attention_mask`, `labels` `(B, L)`, and if any record has an image what the image processor
            gives for all of them in prompt order: `pixel_values`, `num_tiles`, `image_sizes`.

        Raises:
            ValueError: a record cannot be read; the message says which.
        """
        conversations = []
        for idx, record in enumerate(records):
            try:
                conversations.append(Conversation.from_record(record))
            except ValueError as error:
                raise ValueError(f"Record {idx} of the batch: {error}") from error
        images = [image for conversation in conversations for image in conversation.images]
        image_inputs = dict(self.processor.image_processor(images, return_tensors="pt")) if images else {}

        rows, first = [], 0
        for idx, conversation in enumerate(conversations):
            last = first + len(conversation.images)
            replacements = [self.processor.replace_image_token(image_inputs, image) for image in range(first, last)]
            try:
                rows.append(self._tokenize(conversation.messages, replacements))
            except ValueError as error:
                raise ValueError(f"Record {idx} of the batch: {error}") from error
            first = last
        return {**self._pad(rows), **image_inputs}

    def _tokenize(self, messages: list[dict[str, Any]], replacements: list[str]) -> tuple[list[int], list[int]]:
        """Token ids and labels of one conversation, with `replacements` in place of its image placeholders."""
        tokenizer = self.processor.tokenizer
        pieces = self._pieces(messages)
        placeholders = sum(piece.count(self.processor.image_token) for piece, _ in pieces)
        if placeholders != len(replacements):
            raise ValueError(
                f"The chat template wrote {placeholders} times {self.processor.image_token} for {len(replacements)} "
                "images. Remove the token from the texts, or correct the template."
            )
        ids, labels, following = [], [], iter(replacements)
        for piece, supervised in pieces:
            expanded = re.sub(re.escape(self.processor.image_token), lambda _: next(following), piece)
            piece_ids = tokenizer(expanded, add_special_tokens=False)["input_ids"]
            num_supervised = _up_to_last(tokenizer.eos_token_id, piece_ids) if supervised else 0
            ids += piece_ids
            labels += piece_ids[:num_supervised] + [IGNORE_INDEX] * (len(piece_ids) - num_supervised)
        image_token_id = self.processor.image_token_id
        return ids, [IGNORE_INDEX if token == image_token_id else label for token, label in zip(ids, labels)]

    def _pieces(self, messages: list[dict[str, Any]]) -> list[tuple[str, bool]]:
        """The rendered conversation, cut into prompts and answers: `(text, whether it is supervised)`."""
        pieces, done = [], ""
        for idx, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._render(messages[:idx], add_generation_prompt=True)
            whole = self._render(messages[: idx + 1])
            if not (prompt.startswith(done) and whole.startswith(prompt)):
                raise ValueError(
                    f"The chat template must only append text for each further message, but message {idx} changes "
                    "what came before it. Use a template that leaves earlier turns alone."
                )
            pieces += [(prompt[len(done) :], False), (whole[len(prompt) :], True)]
            done = whole
        if not pieces:
            raise ValueError("`messages` hold nothing to learn, since no message has the role `assistant`. Add one.")
        whole = self._render(messages)
        return [*pieces, (whole[len(done) :], False)] if len(whole) > len(done) else pieces

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        return self.processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def _pad(self, rows: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
        length = max(len(ids) for ids, _ in rows)
        fills = {"input_ids": self.processor.tokenizer.pad_token_id, "attention_mask": 0, "labels": IGNORE_INDEX}
        batch = {name: torch.full((len(rows), length), fill) for name, fill in fills.items()}
        for row, (ids, labels) in enumerate(rows):
            where = slice(length - len(ids), None) if self.padding_side == "left" else slice(len(ids))
            batch["input_ids"][row, where] = torch.tensor(ids)
            batch["attention_mask"][row, where] = 1
            batch["labels"][row, where] = torch.tensor(labels)
        return batch


def _up_to_last(token_id: int, ids: list[int]) -> int:
    """Length of `ids` up to and including the last `token_id`, all of it if there is none."""
    return next((end for end in range(len(ids), 0, -1) if ids[end - 1] == token_id), len(ids))
