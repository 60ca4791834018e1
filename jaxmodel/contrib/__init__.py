"""Tools for fewer users: unlabelled data, wrong labels, dictionaries of features, lottery tickets.

No other package imports this one.
"""

from jaxmodel.contrib.confident import confident_learning
from jaxmodel.contrib.dictionary import count_active, revive, unit_dictionary
from jaxmodel.contrib.lottery import lottery
from jaxmodel.contrib.selfsupervised import (
    masked_patches,
    pretext,
    with_projection,
    without_projection,
)
from jaxmodel.contrib.semi import fixmatch, mean_teacher, pseudo_label, sigmoid_ramp

__all__ = [
    "confident_learning",
    "count_active",
    "fixmatch",
    "lottery",
    "masked_patches",
    "mean_teacher",
    "pretext",
    "pseudo_label",
    "revive",
    "sigmoid_ramp",
    "unit_dictionary",
    "with_projection",
    "without_projection",
]
