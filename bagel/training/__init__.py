"""Training of the whole model and of its autoencoder, for research at any size.

samples (items -> segments) -> batch (packed, with noise) -> masks (attention) -> trainer; stream and data bring the
samples, state keeps the checkpoints, distributed spreads all of it over processes.
"""

from bagel.training.batch import Batch, collate, noised, on_device
from bagel.training.config import TrainConfig
from bagel.training.data import Conversations, Editing, TextToImage
from bagel.training.samples import (
    Dropout,
    FramesItem,
    ItemMaker,
    LatentItem,
    Rules,
    TextItem,
    ViTItem,
    build,
)
from bagel.training.stream import BrokenRowError, Data, Generated, Source, Stream
from bagel.training.trainer import Trainer
from bagel.training.weights import freeze, fresh_model, gen_from_und, initialise, part_of

__all__ = [
    "Batch",
    "BrokenRowError",
    "Conversations",
    "Data",
    "Dropout",
    "Editing",
    "FramesItem",
    "Generated",
    "ItemMaker",
    "LatentItem",
    "Rules",
    "Source",
    "Stream",
    "TextItem",
    "TextToImage",
    "TrainConfig",
    "Trainer",
    "ViTItem",
    "build",
    "collate",
    "freeze",
    "fresh_model",
    "gen_from_und",
    "initialise",
    "noised",
    "on_device",
    "part_of",
]
