"""Names that have moved are found where they were, with a warning that says where they are."""

from __future__ import annotations

import importlib

import pytest

from jaxmodel import moved

OLD = [
    (pkg, home, name)
    for pkg, homes in moved._MOVED.items()
    for home, names in homes.items()
    for name in names.split()
]


def test_every_old_name_is_the_new_one():
    assert len(OLD) > 100
    for package, home, name in OLD:
        with pytest.warns(
            DeprecationWarning, match=rf"{package}\.{name} is jaxmodel\.{home}\.{name} now"
        ):
            old = getattr(importlib.import_module(f"jaxmodel.{package}"), name)
        assert old is getattr(importlib.import_module(f"jaxmodel.{home}"), name)
        assert name not in importlib.import_module(f"jaxmodel.{package}").__all__


def test_what_was_never_there_is_not_found():
    for package in moved._MOVED:
        with pytest.raises(AttributeError, match="nowhere"):
            importlib.import_module(f"jaxmodel.{package}").nowhere  # noqa: B018
