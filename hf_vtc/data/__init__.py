"""Your own records for training: read from files and data sets, checked, and made into batches."""

from .collator import IGNORE_INDEX, VtcCollator
from .conversation import Conversation
from .records import BadRecord, ChatRecords, RecordError, load_records

__all__ = [
    "IGNORE_INDEX",
    "BadRecord",
    "ChatRecords",
    "Conversation",
    "RecordError",
    "VtcCollator",
    "load_records",
]
