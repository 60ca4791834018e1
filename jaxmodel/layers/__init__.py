"""Linen blocks made of ops, shared by the models."""

from jaxmodel import moved
from jaxmodel.layers import connect
from jaxmodel.layers.attention import Attention
from jaxmodel.layers.batch_norm import BatchNorm, GroupNorm
from jaxmodel.layers.conv import activation, conv, dense
from jaxmodel.layers.dropout import dropout
from jaxmodel.layers.encoder import ACTIVATIONS, BLOCK_AXES
from jaxmodel.layers.fuse import fuse, unfuse
from jaxmodel.layers.leaf import leaf
from jaxmodel.layers.linear import linear
from jaxmodel.layers.mlp import MLP
from jaxmodel.layers.moe import MoE
from jaxmodel.layers.norm import LayerNorm, RMSNorm
from jaxmodel.layers.repeat import init_layers, repeat

__all__ = [
    "ACTIVATIONS",
    "BLOCK_AXES",
    "MLP",
    "Attention",
    "BatchNorm",
    "GroupNorm",
    "LayerNorm",
    "MoE",
    "RMSNorm",
    "activation",
    "connect",
    "conv",
    "dense",
    "dropout",
    "fuse",
    "init_layers",
    "leaf",
    "linear",
    "repeat",
    "unfuse",
]

moved.attach(__name__)
