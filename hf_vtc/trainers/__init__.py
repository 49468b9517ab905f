"""Trainers, one per objective, and the objectives themselves as pure functions."""

from . import losses
from .base import Responses, VtcTrainer
from .vico import VicoConsistencyTrainer, VicoRouterTrainer

__all__ = ["Responses", "VicoConsistencyTrainer", "VicoRouterTrainer", "VtcTrainer", "losses"]
