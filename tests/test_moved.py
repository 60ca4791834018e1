"""Names that have moved are found where they were, with a warning that says where they are."""

from __future__ import annotations

import dataclasses
import importlib

import jax
import numpy as np
import pytest

from jaxmodel import hub, moved, ops, train
from jaxmodel.cli.words import checked
from jaxmodel.models import llama
from jaxmodel.train import flops

OLD = [
    (package, home, old, new or old)
    for package, homes in moved._MOVED.items()
    for home, names in homes.items()
    for old, _, new in (name.partition("=") for name in names.split())
]


def test_every_old_name_is_the_new_one():
    assert len(OLD) > 100
    for package, home, name, now in OLD:
        says = rf"{package}\.{name} is jaxmodel\.{home}\.{now} now"
        with pytest.warns(DeprecationWarning, match=says):
            old = getattr(importlib.import_module(f"jaxmodel.{package}"), name)
        assert old is getattr(importlib.import_module(f"jaxmodel.{home}"), now)
        assert name not in importlib.import_module(f"jaxmodel.{package}").__all__


def test_old_fields_of_a_config_still_work():
    with pytest.warns(DeprecationWarning, match="TrainConfig: clip is max_grad_norm now"):
        config = train.TrainConfig(clip=2.0, steps=7)
    assert config == train.TrainConfig(max_grad_norm=2.0, steps=7)
    with pytest.warns(DeprecationWarning, match=r"TrainConfig.clip is max_grad_norm now"):
        assert config.clip == 2.0
    fields = {field.name for field in dataclasses.fields(config)}
    assert set(moved.CONFIG.values()) <= fields and not set(moved.CONFIG) & fields
    with pytest.warns(DeprecationWarning, match="warmup is warmup_steps now"):
        assert dataclasses.replace(config, warmup=3).warmup_steps == 3
    assert checked(["train", "--drop-every", "3"]) == ["train", "--step-size=3"]


def test_old_fields_of_a_policy_still_work(tmp_path):
    with pytest.warns(DeprecationWarning, match="Policy: compute is compute_dtype now"):
        policy = ops.Policy(compute="bfloat16")
    assert policy == ops.Policy(compute_dtype="bfloat16")
    model = llama.model(llama.SIZES["tiny"], policy)
    hub.Bundle(model, model.init(jax.random.key(0))).save_pretrained(tmp_path / "old")
    path = tmp_path / "old" / "jaxmodel.json"
    path.write_text(path.read_text().replace("compute_dtype", "compute"))  # as it was written once
    assert hub.from_pretrained(tmp_path / "old").model.policy == policy


def test_what_was_never_there_is_not_found():
    for package in moved._MOVED:
        with pytest.raises(AttributeError, match="nowhere"):
            importlib.import_module(f"jaxmodel.{package}").nowhere  # noqa: B018


def test_operations_from_shapes_alone():
    params = {"up": {"kernel": np.ones((4, 8), np.float32)}, "norm": np.ones(4, np.float32)}
    with pytest.warns(DeprecationWarning, match="takes the model first"):
        assert flops.per_token(params, 16, 0) == 6 * 32
