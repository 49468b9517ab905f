"""Your own records for training: read from files and data sets, checked, and made into batches."""

from .collator import VtcCollator
from .conversation import Conversation
from .records import BadRecord, ChatRecords, RecordError, load_records
from .tokenization import IGNORE_INDEX
from .videos import Video, read_video

__all__ = [
    "IGNORE_INDEX",
    "BadRecord",
    "ChatRecords",
    "Conversation",
    "RecordError",
    "Video",
    "VtcCollator",
    "load_records",
    "read_video",
]
