"""The names of mesh axes and of logical axes, the one vocabulary in which placement is spoken of.

A *mesh axis* is a direction in the grid of devices. A *logical axis* is what a dimension of an array means to the
model (`heads`, `mlp`). This module knows only the words: it builds no mesh, assigns nothing and imports nothing of jax.
The members are strings, so that they can stand directly in `jax.sharding.Mesh` and `PartitionSpec`.
"""

from __future__ import annotations

import enum


class MeshAxis(enum.StrEnum):
    """A direction in the grid of devices, listed from the slowest links to the fastest."""

    DATA = "data"  # Replicas of the model; each serves or trains on other requests.
    STAGE = "stage"  # Pipeline stages: consecutive layers on consecutive devices.
    EXPERT = "expert"  # Experts of a mixture, tokens exchanged all-to-all.
    CONTEXT = "context"  # Positions of one long sequence.
    TENSOR = "tensor"  # Heads and MLP columns; an all-reduce or reduce-scatter in every layer.


class LogicalAxis(enum.StrEnum):
    """What a dimension of a parameter or activation means to the model."""

    VOCAB = "vocab"  # Token ids.
    EMBED = "embed"  # Model width D.
    HEADS = "heads"  # Query heads N.
    KV_HEADS = "kv_heads"  # Key and value heads K.
    HEAD_DIM = "head_dim"  # Width of one head H.
    MLP = "mlp"  # Width of the MLP F.
    LAYERS = "layers"  # Stacked layers L.
    EXPERTS = "experts"  # Experts E.


MESH_AXES: tuple[MeshAxis, ...] = tuple(MeshAxis)
LOGICAL_AXES: tuple[LogicalAxis, ...] = tuple(LogicalAxis)
