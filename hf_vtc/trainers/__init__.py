"""Trainers, one per objective, and the objectives themselves as pure functions."""

from . import losses
from .avg_llava import AvgLlavaGranularityTrainer, AvgLlavaRouterTrainer
from .base import VtcTrainer
from .convllava import ConvllavaTrainer
from .llavolta import LlavoltaTrainer
from .responses import Responses
from .schedule import SCHEMES, Stage, stages_of
from .vico import VicoConsistencyTrainer, VicoRouterTrainer
from .vistog import VistogTrainer

__all__ = [
    "AvgLlavaGranularityTrainer",
    "AvgLlavaRouterTrainer",
    "ConvllavaTrainer",
    "LlavoltaTrainer",
    "Responses",
    "SCHEMES",
    "Stage",
    "VicoConsistencyTrainer",
    "VicoRouterTrainer",
    "VistogTrainer",
    "VtcTrainer",
    "losses",
    "stages_of",
]
