"""Limits of what other people's files may take: one home, raised in one way."""

from __future__ import annotations

import dataclasses

import pytest

from jaxmodel import limits
from jaxmodel.errors import InputError


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(limits, "_now", None)


def test_the_environment_and_python_raise_them(monkeypatch):
    monkeypatch.setenv(limits.VARIABLE, "pixels=2e8, template_seconds=60")
    assert limits.limits() == dataclasses.replace(
        limits.Limits(), pixels=2e8, template_seconds=60.0
    )
    assert limits.allow(json_bytes=2**30).pixels == 2e8 and limits.limits().json_bytes == 2**30


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("pixel=3", "JAXMODEL_LIMITS: 'pixel' is not known; .*pixels"),
        ("pixels", "JAXMODEL_LIMITS: 'pixels' given; allowed: NAME=NUMBER"),
        ("pixels=many", "JAXMODEL_LIMITS: pixels=many given; allowed: a number above 0"),
        ("pixels=nan", "pixels=nan given"),
    ],
)
def test_wrong_ones_are_named(given, says, monkeypatch):
    monkeypatch.setenv(limits.VARIABLE, given)
    with pytest.raises(InputError, match=says):
        limits.limits()
