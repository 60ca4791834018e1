"""Transforms: what concerns several leaves at once, before methods compress each alone."""

from jaxmodel.compress.transforms.drop_layers import DropLayers
from jaxmodel.compress.transforms.rotate import Rotate
from jaxmodel.compress.transforms.scale import Awq, Smooth
from jaxmodel.compress.transforms.shrink import Shrink, Slice
from jaxmodel.compress.transforms.transform import Transform, transformed

__all__ = ["Awq", "DropLayers", "Rotate", "Shrink", "Slice", "Smooth", "Transform", "transformed"]
