"""From chat records to padded training batches."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import ProcessorMixin

from .conversation import Conversation
from .sources import named
from .tokenization import IGNORE_INDEX, ConversationTokenizer
from .videos import Video, metadata_of, video_of

_PADDING_SIDES = ("left", "right")


class VtcCollator:
    """Turns chat records into a batch with labels, for any processor of hf_vtc and any chat template.

    A row holds the ids that `processor.apply_chat_template(messages, tokenize=True)` gives. Only what the assistant
    says is supervised, its end token included; prompts, placeholders and padding are -100, see
    `ConversationTokenizer`. What the model learns to continue are exactly the tokens that it will be given.

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
        if "check_sizes" not in dir(processor.image_processor):
            raise ValueError(
                f"`processor` must be a `VtcProcessor`, got {type(processor).__name__}. With a processor of "
                "transformers, give the trainer a collator that calls it, and labels; the models take what it returns."
            )
        self.processor = processor
        self._tokenizer = ConversationTokenizer(processor)
        self.padding_side = padding_side
        self.max_length = max_length

    def __call__(self, records: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Make a batch.

        Args:
            records (`Sequence[dict]`): see `Conversation.from_record`; rows without an image are fine.

        Returns:
            `input_ids`, `attention_mask`, `labels` `(B, L)`, and if any record has an image what the image processor
            gives for all of them in prompt order: `pixel_values`, `num_tiles`, `image_sizes`. With a processor that
            takes videos, those of records too: `pixel_values_videos`, `video_grid_thw`, `second_per_grid_ts`.

        Raises:
            ValueError: a record cannot be read; the message says which.
        """
        conversations, rows_of_images, video_inputs, of_videos = [], [], [], []
        for idx, record in enumerate(records):
            try:
                conversations.append(Conversation.from_record(record, takes_videos=self.takes_videos))
                rows_of_images.append(self._loaded(conversations[-1].images))
                videos = [video_of(each) for each in conversations[-1].videos]
                inputs, written = self._shown_videos(videos) if videos else (None, [])
                video_inputs += [] if inputs is None else [inputs]
                of_videos.append(written)
            except (ValueError, OSError) as error:
                raise ValueError(f"{_place(records, idx)}: {error}") from error
        image_inputs = {}
        if any(rows_of_images):
            # by rows, since a base may cut an image otherwise beside others
            image_inputs = dict(self.processor.image_processor(rows_of_images, return_tensors="pt"))
        names = video_inputs[0] if video_inputs else ()
        image_inputs |= {name: torch.cat([torch.as_tensor(each[name]) for each in video_inputs]) for name in names}

        rows, first = [], 0
        for idx, conversation in enumerate(conversations):
            last = first + len(conversation.images)
            replacements = [self.processor.replace_image_token(image_inputs, image) for image in range(first, last)]
            try:
                rows.append(self._row(conversation.messages, replacements, of_videos[idx]))
            except ValueError as error:
                raise ValueError(f"{_place(records, idx)}: {error}") from error
            first = last
        return {**self._pad(rows), **image_inputs}

    @property
    def takes_videos(self) -> bool:
        """Whether records may show videos."""
        return self.processor.video is not None

    def _shown_videos(self, videos: Sequence[Video]) -> tuple[dict[str, Any], list[str]]:
        return self.processor.videos_and_placeholders(
            [video.frames for video in videos], video_metadata=metadata_of(videos)
        )

    def check(
        self,
        messages: list[dict[str, Any]],
        image_sizes: Sequence[tuple[int, int]],
        video_shapes: Sequence[tuple[int, int, int]] = (),
        video_metadata: Sequence[dict[str, Any]] = (),
    ) -> None:
        """Raise the `ValueError` that a batch with this conversation would raise for its text, length or image sizes.

        Args:
            messages (`list[dict]`): of a `Conversation`.
            image_sizes (`Sequence[tuple[int, int]]`): (height, width) in pixels of its upright images.
            video_shapes (`Sequence[tuple[int, int, int]]`): (frames, height, width) of its videos.
            video_metadata (`Sequence[dict]`): what is said of each, as the processor takes it.
        """
        images = self.processor.image_processor
        images.check_sizes(image_sizes)
        tiles = [images.get_tile_layout(*size, len(image_sizes) == 1).num_tiles for size in image_sizes]
        inputs = {"image_sizes": image_sizes, "num_tiles": tiles}
        replacements = [self.processor.replace_image_token(inputs, image) for image in range(len(image_sizes))]
        of_videos = []
        if video_shapes:
            _, _, of_videos = self.processor.written_videos(video_shapes, video_metadata=list(video_metadata))
        self._row(messages, replacements, of_videos)

    def _loaded(self, images: list[Any]) -> list[Image.Image]:
        """The images of one record, upright and in RGB, of sizes that the image processor takes."""
        loaded = self.processor.image_processor.fetch_images(images)
        self.processor.image_processor.check_sizes([(image.height, image.width) for image in loaded])
        return loaded

    def _row(
        self, messages: list[dict[str, Any]], replacements: list[str], of_videos: Sequence[str] = ()
    ) -> tuple[list[int], list[int]]:
        """Token ids and labels of one conversation, cut to `max_length`."""
        ids, labels = self._tokenizer(messages, replacements, of_videos)
        if self.max_length is not None and len(ids) > self.max_length:
            self._check_cut(ids, labels)
        return ids[: self.max_length], labels[: self.max_length]

    def _check_cut(self, ids: list[int], labels: list[int]) -> None:
        """Raise a `ValueError` if `max_length` would cut images, or everything that is supervised."""
        images = [idx for idx, token in enumerate(ids) if token == self.processor.image_token_id]
        image_end = images[-1] + 1 if images else 0
        if image_end and self.processor.image_end_token is not None:
            image_end += 1
        if self.takes_videos:
            # and the token behind it
            ends = (idx + 2 for idx, token in enumerate(ids) if token == self.processor.video_token_id)
            image_end = max(image_end, *ends, 0)
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
    record = records[idx] if isinstance(records[idx], dict) else {}
    origin = record.get("origin") if isinstance(record.get("origin"), str) else named(record)
    return f"Record {idx} of the batch" + (f" ({origin})" if origin else "")
