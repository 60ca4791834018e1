"""The ledger: every instant in one category, over restarts too; what was computed in vain is lost,
not compute.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxmodel.distributed.ledger import CATEGORIES, GoodputRecorder
from jaxmodel.errors import InputError


class Clock:
    """Time that moves when it is told to."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now

    def pass_(self, seconds):
        self.now += seconds


def steps(ledger, clock, first, last, save_every=10):
    for i in range(first, last):
        with ledger.spend("data"):
            clock.pass_(0.1)
        with ledger.spend("compile" if i == first else "compute"):
            clock.pass_(3.0 if i == first else 1.0)
        ledger.at(i + 1)
        if (i + 1) % save_every == 0:
            with ledger.spend("checkpoint"):
                clock.pass_(0.5)
                ledger.at(i + 1, saved=True)


def test_the_categories_sum_to_the_wall_clock_over_five_restarts(tmp_path):
    clock = Clock()
    file = tmp_path / "ledger.jsonl"
    step = 0
    began = 1000.0
    for life in range(6):
        ledger = GoodputRecorder(file, clock)
        clock.pass_(2.0)
        if life:
            ledger.restored(step)
        steps(ledger, clock, step, step + 17)
        step = (step + 17) // 10 * 10
        if life < 5:  # killed without a word, and started again later
            clock.pass_(0.3)
            clock.pass_(60.0)
    found = ledger.summary()
    wall = clock() - began
    assert found["wall"] == pytest.approx(wall)
    assert sum(found[name] for name in CATEGORIES if name in found) == pytest.approx(wall, rel=5e-3)
    assert found["down"] >= 5 * 60
    assert found["lost"] > 0 and found["goodput"] == pytest.approx(found["compute"] / wall)


def test_steps_behind_the_checkpoint_are_lost(tmp_path):
    clock = Clock()
    file = tmp_path / "ledger.jsonl"
    ledger = GoodputRecorder(file, clock)
    steps(ledger, clock, 0, 14)  # saved at 10: four steps, each of 1.1 s, in vain
    ledger.close()
    again = GoodputRecorder(file, clock)
    again.restored(10)
    steps(again, clock, 10, 20)
    found = again.summary()
    assert found["lost"] == pytest.approx(4 * 1.1)
    assert found["compute"] == pytest.approx(9 + 9) and found["compile"] == pytest.approx(6)
    assert found["checkpoint"] == pytest.approx(1.0)


def test_without_a_checkpoint_all_is_lost(tmp_path):
    clock = Clock()
    file = tmp_path / "ledger.jsonl"
    ledger = GoodputRecorder(file, clock)
    steps(ledger, clock, 0, 8)
    ledger.close()
    again = GoodputRecorder(file, clock)
    assert "lost" not in again.summary()  # it may still find one
    steps(again, clock, 0, 8)
    found = again.summary()
    assert found["lost"] == pytest.approx(7 + 0.8 + 3) and found["compute"] == pytest.approx(7)


def test_a_line_that_was_cut_off_is_none(tmp_path):
    clock = Clock()
    file = tmp_path / "ledger.jsonl"
    ledger = GoodputRecorder(file, clock)
    steps(ledger, clock, 0, 3)
    ledger.close()
    file.write_text(file.read_text() + '{"life": 0, "ti')
    assert GoodputRecorder(file, clock).summary()["compute"] == pytest.approx(2.0)


def test_nested_categories_interrupt_each_other():
    clock = Clock()
    ledger = GoodputRecorder(clock=clock)
    with ledger.spend("compute"):
        clock.pass_(1.0)
        with ledger.spend("data"):
            clock.pass_(2.0)
        clock.pass_(4.0)
    found = ledger.summary()
    assert (found["compute"], found["data"], found["wall"]) == (5.0, 2.0, 7.0)


def test_an_unknown_category():
    with pytest.raises(
        InputError, match="category: 'computing' is not known; allowed: .*nearest: compute"
    ):
        GoodputRecorder().enter("computing")


def test_a_process_began_before_it_says_so():
    code = """
import time
first = time.time()
time.sleep(0.5)
from jaxmodel.distributed import process_began
print(first, process_began())
"""
    before = time.time()
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    first, began = map(float, told.split())
    assert before - 0.05 <= began <= first + 0.05 or not Path("/proc/self/stat").exists()
    now = time.time()
    assert GoodputRecorder(began=now - 7.0).summary()["start"] == pytest.approx(7.0, abs=0.5)


def test_a_process_that_resumes_its_own_run_counts_no_time_twice(tmp_path):
    clock = Clock()
    file = tmp_path / "ledger.jsonl"
    began = clock()
    for step in (0, 10):
        clock.pass_(2.0)
        ledger = GoodputRecorder(
            file, clock, began=began
        )  # both times it says when the process began
        steps(ledger, clock, step, step + 10)
        ledger.close()
        clock.pass_(3.0)
    found = ledger.summary()
    assert sum(found[name] for name in CATEGORIES if name in found) == pytest.approx(found["wall"])
    assert found["wall"] == pytest.approx(clock() - began)
