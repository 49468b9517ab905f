"""Records that are kept aside: whole images, chosen by what they show and by a seed, and written down."""

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from os import cpu_count
from pathlib import Path
from typing import Any

from ..data.records import ChatRecords
from ..data.videos import telling_frames
from .folder import write_whole

# images of this many records are held in memory at a time
_NUM_THREADS = 8
# begins the digest of a record without an image
_TEXT = "text:"
# records that are kept aside at most, unless a number is given: thousands of questions settle a point of accuracy
_DEFAULT_SHARE, _DEFAULT_MOST = 0.1, 1000


@dataclass(frozen=True)
class Split:
    """Which records train and which are kept aside.

    Args:
        seed (`int`): of the choice.
        num_training (`int`): records that train.
        held_out (`list[str]`): where the others come from, as messages name records.
        left_out (`list[str]`): records that cannot be used, and neither train nor are kept aside.
        images (`list[str]`): SHA-256 of the pixels of the images that are kept aside, and of the frames that tell
            which videos are.
    """

    seed: int
    num_training: int
    held_out: list[str]
    left_out: list[str]
    images: list[str]

    def training_indices(self, records: ChatRecords) -> list[int]:
        """Which records of the same data train.

        Raises:
            RuntimeError: the data is not what was split.
        """
        aside = {*self.held_out, *self.left_out}
        found = [idx for idx in range(len(records)) if records.origin(idx) not in aside]
        if len(found) != self.num_training:
            raise RuntimeError(
                f"The data has {len(found)} records to train on, but had {self.num_training} when it was split. Give "
                "the data as it was, or another `output`."
            )
        return found

    def save(self, file: Path) -> None:
        write_whole(file, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, file: Path) -> "Split":
        return cls(**json.loads(file.read_text(encoding="utf-8")))


def check_held_out(held_out: float | int | None) -> None:
    """Raise a ValueError for what is neither a share nor a number of records."""
    fits = held_out is None or (held_out >= 0 and (held_out < 1 or held_out == int(held_out)))
    if not fits:
        raise ValueError(
            f"`held_out` must be a share of the records below 1, or a whole number of them, got {held_out}. 0 keeps "
            "none aside."
        )


def split_records(records: ChatRecords, held_out: float | int | None, seed: int) -> Split:
    """Choose what is kept aside.

    Records that show the same image belong together, however they name it: what counts are its pixels. So do records
    whose videos share a frame, but for those of one colour. Text alone always trains, since no budget changes its
    answer. Whether a record is kept aside depends on the seed and on what
    it shows, hardly on the other records: added data moves few of the others.

    Args:
        records ([`ChatRecords`]): all records.
        held_out (`float` or `int`, *optional*): share of the records, or their number. Default: a tenth, at most 1000.
        seed (`int`): of the choice.

    Raises:
        ValueError: there are no two images or videos that could be parted.
    """
    with ThreadPoolExecutor(min(_NUM_THREADS, cpu_count() or 1)) as pool:
        digests = list(pool.map(lambda idx: _digests(records[idx]), range(len(records))))
    groups = _groups_of(digests)
    wanted = _number(held_out, len(records))
    pictured = [group for group in groups if not group.startswith(_TEXT)]
    if wanted and len(set(pictured)) < 2:
        raise ValueError(
            "`held_out` keeps whole images and videos aside, but there are no two that could be parted, one to train "
            "on and one to ask about. Set it to 0, which leaves the evaluation out."
        )
    chosen = _choose(pictured, wanted, seed)
    aside = [idx for idx, group in enumerate(groups) if group in chosen]
    return Split(
        seed=seed,
        num_training=len(records) - len(aside),
        held_out=[records.origin(idx) for idx in aside],
        left_out=[error.origin for error in records.errors],
        images=sorted({digest for idx in aside for digest in digests[idx]}),
    )


def write_held_out(records: ChatRecords, split: Split, file: Path) -> None:
    """The records that are kept aside, as a data file; paths of images start where they did."""
    aside = set(split.held_out)
    chosen = (records.fields(idx) for idx in range(len(records)) if records.origin(idx) in aside)
    write_whole(file, "".join(json.dumps(_as_json(record)) + "\n" for record in chosen))


def image_digest(image: Any) -> str:
    """SHA-256 of the pixels of an upright RGB image, and of its size."""
    return hashlib.sha256(f"{image.width}x{image.height}:".encode() + image.tobytes()).hexdigest()


def _digests(record: Mapping[str, Any]) -> list[str]:
    """What a record shows; of text alone, a mark and where it is from."""
    frames = [frame for video in record.get("videos", []) for frame in telling_frames(video)]
    return [image_digest(picture) for picture in (*record["images"], *frames)] or [_TEXT + record["origin"]]


def _groups_of(digests: Sequence[Sequence[str]]) -> list[str]:
    """A name for each record that it shares with those that show one of its images, directly or through others."""
    parent: dict[str, str] = {}

    def root(digest: str) -> str:
        while parent.setdefault(digest, digest) != digest:
            parent[digest] = parent[parent[digest]]
            digest = parent[digest]
        return digest

    for shown in digests:
        for other in shown[1:]:
            first, second = sorted((root(shown[0]), root(other)))
            parent[second] = first
    return [root(shown[0]) for shown in digests]


def _number(held_out: float | int | None, num_records: int) -> int:
    if held_out is None:
        return min(max(1, round(_DEFAULT_SHARE * num_records)), _DEFAULT_MOST)
    if held_out == 0:
        return 0
    return max(1, round(held_out * num_records)) if held_out < 1 else min(int(held_out), num_records - 1)


def _choose(groups: Sequence[str], wanted: int, seed: int) -> set[str]:
    """Groups of `wanted` records together or fewer, but at least one group and never all of them."""
    if not wanted:
        return set()
    sizes = Counter(groups)
    *order, _ = sorted(sizes, key=lambda group: hashlib.sha256(f"{seed}:{group}".encode()).digest())
    chosen, left = set(), wanted
    for group in order:
        if sizes[group] <= left:
            chosen.add(group)
            left -= sizes[group]
    return chosen or {min(order, key=lambda group: sizes[group])}


def _as_json(value: Any) -> Any:
    """A record without bytes, which become data URIs where they are images."""
    if isinstance(value, Mapping):
        if isinstance(value.get("bytes"), bytes):
            return _as_json(value["bytes"])
        return {name: _as_json(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(each) for each in value]
    if isinstance(value, bytes):
        return f"data:image;base64,{base64.b64encode(value).decode()}"
    return value
