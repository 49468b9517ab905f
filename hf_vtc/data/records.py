"""Data sets of chat records, checked before the first step: what is wrong is named, and never dropped silently."""

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

from PIL import Image
from torch.utils.data import Dataset
from transformers.utils import logging

from .collator import VtcCollator
from .conversation import Conversation
from .images import ImageReader
from .sources import RecordError, Rows, named, open_source
from .videos import Video, metadata_of, video_of

logger = logging.get_logger(__name__)

# PIL's own limit, above which it warns
MAX_IMAGE_PIXELS = 89_478_485
POLICIES = ("raise", "skip")
_CHECKS = ("header", "pixels")
_PROGRESS = {
    "header": "Checking records",
    "pixels": "Checking records and decoding their images (check_images='header' leaves that out)",
}
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

    def __init__(
        self,
        sources: list[Rows],
        reader: ImageReader,
        check_images: str,
        collator: VtcCollator | None,
        ignore_fields: Collection[str] = (),
        needs_answer: bool = True,
        takes_videos: bool = False,
    ):
        self._sources, self._reader, self._check_images = sources, reader, check_images
        self._ignore_fields, self._needs_answer = frozenset(ignore_fields), needs_answer
        self._takes_videos = takes_videos
        # (source, row) of each usable record
        self._places: list[tuple[int, int]] = []
        self.errors: list[BadRecord] = []
        self._check(collator)

    def __len__(self) -> int:
        return len(self._places)

    def origin(self, idx: int) -> str:
        """Where a record comes from, as messages name it; no image is opened."""
        source_idx, row_idx = self._places[idx]
        source = self._sources[source_idx]
        return source.origin(row_idx, named(source[row_idx]))

    def __getitem__(self, idx: int) -> dict[str, Any]:
        """Read one record and decode its images.

        Raises:
            RecordError: an image is damaged in a way that its header does not show, or was changed since.
        """
        looked = self._look(self._places[idx], "pixels", keep=True)
        if looked.error is not None:
            remedy = "It was usable when the records were loaded: somebody changed it since."
            if self._check_images == "header":
                remedy = "`load_records(..., check_images='pixels')` finds such images before training."
            raise RecordError(f"{looked.origin}: {looked.error} {remedy}") from looked.error
        record = {"messages": looked.conversation.messages, "images": looked.images, "origin": looked.origin}
        return record | ({"videos": looked.videos} if looked.videos else {})

    def fields(self, idx: int) -> Mapping[str, Any]:
        """One record as it is written, with the fields that make no message."""
        source_idx, row_idx = self._places[idx]
        return self._sources[source_idx][row_idx]

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

    def _check(self, collator: VtcCollator | None) -> None:
        """Look at every record of the sources, and sort it into `_places` or `errors`."""
        places = [(idx, row) for idx, source in enumerate(self._sources) for row in range(len(source))]
        # a header is not enough where the collator must know the size of an image from an address
        depth = "size" if self._check_images == "header" and collator is not None else self._check_images
        room = None if collator is None else SharedCanvas(collator.processor.image_processor)
        # threads, since decoding and reading leave the interpreter free
        with (
            ThreadPoolExecutor(min(_NUM_THREADS, os.cpu_count() or 1)) as pool,
            # shown only if it takes long
            logging.tqdm(total=len(places), desc=_PROGRESS[self._check_images], delay=5) as progress,
        ):
            for chunk in _chunks(places):
                for place, looked in zip(chunk, pool.map(partial(self._look, depth=depth), chunk)):
                    try:
                        if looked.error is not None:
                            raise looked.error
                        if collator is not None:
                            # here and not in the threads, which tokenizers do not bear
                            collator.check(
                                looked.conversation.messages,
                                looked.sizes,
                                looked.video_shapes,
                                metadata_of(looked.videos),
                            )
                            room.add(looked.origin, looked.sizes)
                        self._places.append(place)
                    except ValueError as error:
                        self.errors.append(BadRecord(looked.origin, str(error)))
                    progress.update()
        if room is not None:
            refused = room.refused()
            self.errors += [BadRecord(room.origins[idx], reason) for idx, reason in sorted(refused.items())]
            self._places = [place for idx, place in enumerate(self._places) if idx not in refused]

    def _look(self, place: tuple[int, int], depth: str, keep: bool = False) -> "_Looked":
        """Read a record, and its images as deep as asked: `"header"`, `"size"` or `"pixels"`, which `keep` holds."""
        source_idx, row_idx = place
        source = self._sources[source_idx]
        looked = _Looked(source.origin(row_idx))
        try:
            record = source[row_idx]
            looked.origin = source.origin(row_idx, named(record))
            looked.conversation = Conversation.from_record(
                record, self._ignore_fields, self._needs_answer, self._takes_videos
            )
            if depth != "header":
                self._look_at_videos(looked, keep)
            for image in looked.conversation.images:
                if depth == "pixels":
                    decoded = self._reader.read(image)
                    looked.sizes.append((decoded.height, decoded.width))
                    looked.images += [decoded] if keep else []
                elif depth == "size":
                    looked.sizes.append(self._reader.size(image))
                else:
                    self._reader.check_header(image)
        except ValueError as error:
            looked.error = error
        return looked

    def _look_at_videos(self, looked: "_Looked", keep: bool) -> None:
        for source in looked.conversation.videos:
            video = video_of(source, self._reader)
            height, width = self._reader.size(video.frames[0])
            looked.video_shapes.append((len(video.frames), height, width))
            looked.videos.append(video if keep else Video([], video.metadata))


@dataclass
class _Looked:
    """What one look at a record found, or the error that it ended with."""

    origin: str
    conversation: Conversation | None = None
    sizes: list[tuple[int, int]] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)
    video_shapes: list[tuple[int, int, int]] = field(default_factory=list)
    videos: list[Video] = field(default_factory=list)
    error: ValueError | None = None


class SharedCanvas:
    """Finds records whose images no batch can hold together, where smaller images are padded to the largest.

    Args:
        image_processor (`VtcImageProcessor`): decides to which size images are padded.
    """

    def __init__(self, image_processor: Any):
        self.image_processor = image_processor
        self.origins: list[str] = []
        # (height, width) that the images of each record ask for, 0 for text
        self._canvases: list[tuple[int, int]] = []

    def add(self, origin: str, image_sizes: Sequence[tuple[int, int]]) -> None:
        """Note a record that was found good by itself."""
        self.origins.append(origin)
        self._canvases.append(self.image_processor.padded_size(image_sizes) if image_sizes else (0, 0))

    def refused(self) -> dict[int, str]:
        """Which records must go, by their number, so that any others can share a batch, and why."""
        heights, widths = (sorted(range(len(self.origins)), key=self._side(axis)) for axis in (0, 1))
        refused: dict[int, str] = {}
        while heights:
            tallest, widest = heights[-1], widths[-1]
            canvas = self._canvases[tallest][0], self._canvases[widest][1]
            try:
                self.image_processor.check_padded_size(*canvas)
                return refused
            except ValueError as error:
                # the longer one, next to which fewer others have room
                longer = tallest if canvas[0] >= canvas[1] else widest
                other = widest if longer == tallest else tallest
                refused[longer] = f"It cannot share a batch with {self.origins[other]}: {error}"
            heights, widths = ([idx for idx in order if idx != longer] for order in (heights, widths))
        return refused

    def _side(self, axis: int) -> Callable[[int], int]:
        return lambda idx: self._canvases[idx][axis]


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
    check_images: str = "pixels",
    collator: VtcCollator | None = None,
    ignore_fields: Collection[str] = (),
    needs_answer: bool = True,
    takes_videos: bool | None = None,
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
            counted in a warning at the end, and kept in `.errors` with file, line, index (from 0) and id.
        allow_urls (`bool`): whether images may be downloaded. Everyone who writes a record can then make this machine
            ask any address.
        max_image_pixels (`int`): height times width of the largest image that is decoded.
        check_images (`str`): `"pixels"`: decode every image once, so that no bad one is left; a bar shows the progress
            if it takes long. `"header"`: read the beginning only, and no address; damage further inside then stops
            training with an error that names the record, because replacing or leaving out a record in the midst of
            training would change the batches without a word.
        collator (`VtcCollator`, *optional*): records that it cannot make a row of are bad ones too: because a text
            holds a token of the model, images alone are longer than its `max_length`, or are so long and thin that a
            batch cannot hold them beside those of another record. It tokenizes each record once, and must know the
            size of every image, so that addresses are downloaded for it.
        ignore_fields (`Collection[str]`): fields of records that are not looked at. Without it a field is an error if
            it is neither read nor known to be harmless.
        needs_answer (`bool`): whether a record must hold an answer to learn, as training needs it and a question to
            evaluate does not.
        takes_videos (`bool`, *optional*): whether records may show videos. Files are decoded by PyAV
            (`pip install 'hf-vtc[video]'`), at 2 frames per second and at most 64 of a file; frames named as images
            need nothing. Default: whether `collator` takes them.

    Returns:
        A data set for `transformers.Trainer` and `torch.utils.data.DataLoader` with a `VtcCollator`; TRL takes its
        `to_dataset()`. Every process of a distributed run loads and checks for itself, and comes to the same result;
        large data is better decoded once before, by one process, and then loaded with `check_images="header"`.

    Raises:
        RecordError: there are bad records and none may be skipped, no record is left, or a file is damaged.
        ValueError: an argument is outside of its range.
    """
    if on_error not in POLICIES:
        raise ValueError(f"`on_error` must be one of {', '.join(POLICIES)}, got {on_error!r}.")
    if isinstance(ignore_fields, str):
        raise ValueError(f"`ignore_fields` must be a list of names, got the string {ignore_fields!r}.")
    if check_images not in _CHECKS:
        raise ValueError(f"`check_images` must be one of {', '.join(_CHECKS)}, got {check_images!r}.")
    sources, folder = open_source(source)
    reader = ImageReader(folder if image_folder is None else image_folder, allow_urls, max_image_pixels)
    if takes_videos is None:
        takes_videos = collator is not None and collator.takes_videos
    records = ChatRecords(sources, reader, check_images, collator, ignore_fields, needs_answer, takes_videos)
    _report(records, on_error)
    return records


def _report(records: ChatRecords, on_error: str) -> None:
    """Warn of bad records, or raise as `load_records` says."""
    total = len(records) + len(records.errors)
    if records.errors:
        found = f"{len(records.errors)} of {total} records cannot be used:{_listed(records.errors)}"
        if on_error == "raise":
            raise RecordError(f"{found}\nRepair them, or leave them out by `on_error='skip'`.")
        logger.warning(f"{found}\nThey are left out; `errors` of the data set has all of them.")
    if not len(records):
        raise RecordError(f"No usable record is left of {total}. At least one is needed.")


def _listed(errors: list[BadRecord]) -> str:
    lines = [f"\n  {error.origin}: {error.reason}" for error in errors[:_MOST_LISTED]]
    more = len(errors) - len(lines)
    return "".join(lines) + (f"\n  and {more} more" if more else "")
