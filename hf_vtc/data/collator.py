"""From chat records to padded training batches."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from transformers import ProcessorMixin

from .conversation import Conversation

# the label of everything that is not learned, as in torch and transformers
IGNORE_INDEX = -100
_PADDING_SIDES = ("left", "right")


class VtcCollator:
    """Turns chat records into a batch with labels, for any processor of hf_vtc and any chat template.

    Only what the assistant says is supervised, its end token included; prompts, placeholders and padding are -100. A
    conversation is tokenized turn by turn, cut where generation would start, so that the model learns to continue
    exactly the tokens that it will be given.

    Images are opened as they are named. Records of unknown origin come from `load_records`, which opens none outside
    of one folder.

    Args:
        processor (`VtcProcessor`): its chat template must grow: each further message only appends text.
        padding_side (`str`): `"right"` or `"left"`. The models do not mind.
        max_length (`int`, *optional*): most tokens of a row. A longer conversation loses its end, which may be in the
            middle of an answer, but text only: images are never cut or left out. A record whose last image ends
            beyond, or whose first answer begins beyond, is an error.

    Raises:
        ValueError: `padding_side` is neither, or `max_length` is not positive.
    """

    def __init__(self, processor: ProcessorMixin, padding_side: str = "right", max_length: int | None = None):
        if padding_side not in _PADDING_SIDES:
            raise ValueError(f"`padding_side` must be one of {', '.join(_PADDING_SIDES)}, got {padding_side!r}.")
        if max_length is not None and max_length < 1:
            raise ValueError(f"`max_length` counts tokens, must be positive or None, got {max_length}.")
        self.processor = processor
        self.padding_side = padding_side
        self.max_length = max_length

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
                raise ValueError(f"{_place(records, idx)}: {error}") from error
        images = [image for conversation in conversations for image in conversation.images]
        image_inputs = dict(self.processor.image_processor(images, return_tensors="pt")) if images else {}

        rows, first = [], 0
        for idx, conversation in enumerate(conversations):
            last = first + len(conversation.images)
            replacements = [self.processor.replace_image_token(image_inputs, image) for image in range(first, last)]
            try:
                rows.append(self._tokenize(conversation.messages, replacements))
            except ValueError as error:
                raise ValueError(f"{_place(records, idx)}: {error}") from error
            first = last
        return {**self._pad(rows), **image_inputs}

    def check(self, messages: list[dict[str, Any]], image_sizes: Sequence[tuple[int, int]]) -> None:
        """Raise the `ValueError` that a batch with this conversation would raise for its text and its length.

        Args:
            messages (`list[dict]`): of a `Conversation`.
            image_sizes (`Sequence[tuple[int, int]]`): (height, width) in pixels of its upright images.
        """
        inputs = {"image_sizes": image_sizes}
        self._tokenize(
            messages, [self.processor.replace_image_token(inputs, image) for image in range(len(image_sizes))]
        )

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
        labels = [IGNORE_INDEX if token == image_token_id else label for token, label in zip(ids, labels)]
        if self.max_length is not None and len(ids) > self.max_length:
            self._check_cut(ids, labels)
        return ids[: self.max_length], labels[: self.max_length]

    def _check_cut(self, ids: list[int], labels: list[int]) -> None:
        """Raise a `ValueError` if `max_length` would cut images, or everything that is supervised."""
        image_end = _up_to_last(self.processor.image_token_id, ids) if self.processor.image_token_id in ids else 0
        if image_end and self.processor.image_end_token is not None:
            image_end += 1
        if image_end > self.max_length:
            raise ValueError(
                f"`max_length` must not cut images, but the last one ends at token {image_end}, after the limit of "
                f"{self.max_length}. Raise it, let the image processor make fewer tiles, or leave the record out."
            )
        first = next(idx for idx, label in enumerate(labels) if label != IGNORE_INDEX)
        if first >= self.max_length:
            raise ValueError(
                f"`max_length` leaves nothing to learn: the first answer begins after {first} tokens, the limit is "
                f"{self.max_length}. Raise it, or leave the record out."
            )

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


def _place(records: Sequence[Any], idx: int) -> str:
    """Which record of a batch it is, and where that comes from if the record knows."""
    origin = records[idx].get("origin") if isinstance(records[idx], dict) else None
    return f"Record {idx} of the batch" + (f" ({origin})" if isinstance(origin, str) else "")


def _up_to_last(token_id: int, ids: list[int]) -> int:
    """Length of `ids` up to and including the last `token_id`, all of it if there is none."""
    return next((end for end in range(len(ids), 0, -1) if ids[end - 1] == token_id), len(ids))
