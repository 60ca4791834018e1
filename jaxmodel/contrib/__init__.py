"""What fewer people need: learning from unlabelled data, wrong labels, dictionaries of features. Nothing else imports it."""

from jaxmodel.contrib.confident import LabelReport, confident_learning
from jaxmodel.contrib.dictionary import count_active, revive, unit_dictionary
from jaxmodel.contrib.selfsupervised import (
    masked_patches,
    patch_error,
    pretext,
    restored,
    two_views,
    with_projection,
    without_projection,
)
from jaxmodel.contrib.semi import fixmatch, linear_ramp, mean_teacher, pseudo_label, pseudo_labels, sigmoid_ramp

__all__ = [
    "LabelReport",
    "confident_learning",
    "count_active",
    "fixmatch",
    "linear_ramp",
    "masked_patches",
    "mean_teacher",
    "patch_error",
    "pretext",
    "pseudo_label",
    "pseudo_labels",
    "restored",
    "revive",
    "sigmoid_ramp",
    "two_views",
    "unit_dictionary",
    "with_projection",
    "without_projection",
]
