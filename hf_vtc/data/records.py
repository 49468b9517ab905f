"""Data sets of chat records, checked before the first step: what is wrong is named, and never dropped silently."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

from torch.utils.data import Dataset
from transformers.utils import logging

from .collator import VtcCollator
from .conversation import Conversation
from .images import ImageReader
from .sources import RecordError, Rows, open_source

logger = logging.get_logger(__name__)

# PIL's own limit, above which it warns
MAX_IMAGE_PIXELS = 89_478_485
_POLICIES = ("raise", "skip")
_CHECKS = ("header", "pixels")
# records that are checked together, and bad ones that a message lists
_CHUNK = 1024
_MOST_LISTED = 10
_NUM_THREADS = 8


class BadRecord(NamedTuple):
    """A record that was left out: where it is, and what is wrong with it."""

    origin: str
    reason: str


class ChatRecords(Dataset):
    """Map-style data set of the usable records of some sources, made by `load_records`.

    An item has `messages` and `images` as chat templates and processors take them, the images decoded when it is
    asked for, and `origin`, where the record comes from. `errors` lists what was left out.
    """

    def __init__(self, sources: list[Rows], reader: ImageReader, check_images: str, collator: VtcCollator | None):
        self._sources, self._reader, self._check_images = sources, reader, check_images
        # (source, row) of each usable record
        self._places: list[tuple[int, int]] = []
        self.errors: list[BadRecord] = []
        self._check(collator)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, idx: int) -> dict[str, Any]:
        """Read one record and decode its images.

        Raises:
            RecordError: an image is damaged in a way that its header does not show, or was changed since.
        """
        place = self._places[idx]
        try:
            conversation = self._conversation(place)
            images = [self._reader.read(image) for image in conversation.images]
        except ValueError as error:
            remedy = "It was usable when the records were loaded: somebody changed it since."
            if self._check_images == "header":
                remedy = "`load_records(..., check_images='pixels')` finds such images before training."
            raise RecordError(f"{self._origin(place)}: {error} {remedy}") from error
        return {"messages": conversation.messages, "images": images, "origin": self._origin(place)}

    def to_dataset(self) -> Any:
        """The records as a `datasets.Dataset`, the only kind that TRL takes.

        Images are still decoded one record at a time. Train it with `remove_unused_columns=False`, since the columns
        come into being when a row is read.

        Raises:
            ImportError: `datasets` is not installed.
        """
        try:
            import datasets
        except ImportError as error:
            raise ImportError("`to_dataset` needs datasets: `pip install datasets`.") from error
        return datasets.Dataset.from_dict({"index": range(len(self))}).with_transform(self._columns)

    def _columns(self, batch: dict[str, list[int]]) -> dict[str, list]:
        items = [self[idx] for idx in batch["index"]]
        return {name: [item[name] for item in items] for name in ("messages", "images", "origin")}

    def _conversation(self, place: tuple[int, int]) -> Conversation:
        source_idx, row_idx = place
        return Conversation.from_record(self._sources[source_idx][row_idx])

    def _origin(self, place: tuple[int, int]) -> str:
        source_idx, row_idx = place
        return self._sources[source_idx].origin(row_idx)

    def _check(self, collator: VtcCollator | None) -> None:
        """Look at every record of the sources, and sort it into `_places` or `errors`."""
        places = [(idx, row) for idx, source in enumerate(self._sources) for row in range(len(source))]
        need_sizes = collator is not None
        # threads, since decoding and reading leave the interpreter free
        with (
            ThreadPoolExecutor(min(_NUM_THREADS, os.cpu_count() or 1)) as pool,
            # shown only if it takes long
            logging.tqdm(total=len(places), desc="Checking records", delay=5) as progress,
        ):
            for chunk in _chunks(places):
                for place, looked in zip(chunk, pool.map(partial(self._look, need_sizes=need_sizes), chunk)):
                    try:
                        if isinstance(looked, ValueError):
                            raise looked
                        if collator is not None:
                            # here and not in the threads, which tokenizers do not bear
                            collator.check(*looked)
                        self._places.append(place)
                    except ValueError as error:
                        self.errors.append(BadRecord(self._origin(place), str(error)))
                progress.update(len(chunk))

    def _look(
        self, place: tuple[int, int], need_sizes: bool
    ) -> tuple[list[dict[str, Any]], list[tuple[int, int]]] | ValueError:
        """Messages of a record and, if needed, the sizes of its images; or what is wrong with it."""
        try:
            conversation = self._conversation(place)
            sizes = []
            for image in conversation.images:
                if self._check_images == "pixels":
                    decoded = self._reader.read(image)
                    sizes.append((decoded.height, decoded.width))
                elif need_sizes:
                    sizes.append(self._reader.size(image))
                else:
                    self._reader.check_header(image)
        except ValueError as error:
            return error
        return conversation.messages, sizes


def _chunks(places: list) -> Iterator[list]:
    remaining = iter(places)
    while chunk := list(islice(remaining, _CHUNK)):
        yield chunk


def load_records(
    source: Any,
    image_folder: str | os.PathLike | None = None,
    on_error: str = "raise",
    allow_urls: bool = False,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    check_images: str | None = None,
    collator: VtcCollator | None = None,
) -> ChatRecords:
    """Read chat records of any usual format, and check every one of them before training begins.

    Formats of a record: see `Conversation.from_record`. A `.json` file is a list of records, or one record per line
    like a `.jsonl` file. A file that cannot be parsed as a whole is always an error.

    Args:
        source: a `.json`, `.jsonl` or `.parquet` file, a folder of such files, a `datasets.Dataset` (one split), or a
            sequence of records. Parquet files are held in memory; larger ones are better loaded by `datasets`.
        image_folder (`str` or `os.PathLike`, *optional*): where paths of images start. No file outside of it is
            opened: paths with `..`, absolute ones and links that lead out of it make a record a bad one. Default: the
            folder of the data file; records from memory may then hold no paths.
        on_error (`str`): `"raise"`: bad records are an error, which lists the first ten. `"skip"`: they are left out,
            counted in a warning at the end, and kept in `.errors` of the result with file and line.
        allow_urls (`bool`): whether images may be downloaded. Everyone who writes a record can then make this machine
            ask any address.
        max_image_pixels (`int`): height times width of the largest image that is decoded.
        check_images (`str`, *optional*): `"pixels"`: decode every image once, so that no bad one is left. `"header"`:
            read the beginning only, and no address; damage further inside then stops training with an error that
            names the record, because replacing or leaving out a record in the midst of training would change the
            batches without a word. Default: `"pixels"` if bad records are skipped, else `"header"`.
        collator (`VtcCollator`, *optional*): records that it cannot make a row of, for one because images alone are
            longer than its `max_length`, are bad ones too. It tokenizes each record once, and must know the size of
            every image, so that addresses are downloaded for it.

    Returns:
        A data set for `transformers.Trainer` and `torch.utils.data.DataLoader` with a `VtcCollator`; TRL takes its
        `to_dataset()`. Every process of a distributed run loads and checks for itself, and comes to the same result.

    Raises:
        RecordError: there are bad records and none may be skipped, no record is left, or a file is damaged.
        ValueError: an argument is outside of its range.
    """
    if on_error not in _POLICIES:
        raise ValueError(f"`on_error` must be one of {', '.join(_POLICIES)}, got {on_error!r}.")
    if check_images is None:
        check_images = "pixels" if on_error == "skip" else "header"
    if check_images not in _CHECKS:
        raise ValueError(f"`check_images` must be one of {', '.join(_CHECKS)}, got {check_images!r}.")
    sources, folder = open_source(source)
    reader = ImageReader(folder if image_folder is None else image_folder, allow_urls, max_image_pixels)
    records = ChatRecords(sources, reader, check_images, collator)

    total = len(records) + len(records.errors)
    if records.errors:
        found = f"{len(records.errors)} of {total} records cannot be used:{_listed(records.errors)}"
        if on_error == "raise":
            raise RecordError(f"{found}\nRepair them, or leave them out by `on_error='skip'`.")
        logger.warning(f"{found}\nThey are left out; `errors` of the data set has all of them.")
    if not len(records):
        raise RecordError(f"No usable record is left of {total}. Training needs at least one.")
    return records


def _listed(errors: list[BadRecord]) -> str:
    lines = [f"\n  {error.origin}: {error.reason}" for error in errors[:_MOST_LISTED]]
    more = len(errors) - len(lines)
    return "".join(lines) + (f"\n  and {more} more" if more else "")
