"""What MLflow has of a run that was killed, resumed and went back: each step once, as the run ended
up. On SQLite.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from jaxmodel.errors import InputError
from jaxmodel.report import training as page

mlflow = pytest.importorskip("mlflow")
pytestmark = pytest.mark.filterwarnings("default")  # those of MLflow and what it imports

CONFIG = {"verb": "train", "steps": 9, "resolved": {"model": 1}, "data": ["a" * 2000]}


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/runs.db")
    monkeypatch.chdir(tmp_path)  # where artefacts would lie
    yield tmp_path
    mlflow.end_run()


def rows(steps, of):
    return [
        {"step": step, "loss": of + step / 100, "heldout_loss": None, "bad": 0, "words": "x"}
        for step in steps
    ]


def seen(name="run"):
    """The one run of this name that is not deleted: its state, and the steps and losses that it
    has.
    """
    (run,) = mlflow.search_runs(filter_string=f"tags.jaxmodel_run = '{name}'", output_format="list")
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss")
    return run, sorted((one.step, one.value) for one in history)


def losses(steps, of):
    return [(row["step"], row["loss"]) for row in rows(steps, of)]


def test_a_run_as_it_is(store):
    with page.mlflow("run", CONFIG) as write:
        for row in rows(range(1, 4), 1.0):
            write(row)
    run, found = seen()
    assert (
        found == losses(range(1, 4), 1.0)
        and run.info.status == "FINISHED"
        and run.info.run_name == "run"
    )
    assert run.data.params["steps"] == "9" and set(run.data.params) == {"verb", "steps", "data"}
    assert set(run.data.metrics) == {"loss", "bad"}


KILLED = """
import os
from jaxmodel.report import training as page
with page.mlflow("run", {"steps": 9}) as write:
    for step in range(1, 8):
        write({"step": step, "loss": 1.0 + step / 100, "bad": 0})
    os._exit(9)
"""


def test_a_run_that_was_killed_resumed_and_went_back_has_each_step_once(store):
    done = subprocess.run(
        [sys.executable, "-c", KILLED],
        env={**os.environ},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 9, done.stderr
    assert seen()[0].info.status == "RUNNING"
    with page.mlflow(
        "run", {"steps": 12}
    ) as write:  # from the checkpoint of step 4, at another rate
        for row in [
            *rows(range(5, 11), 2.0),
            *rows(range(9, 13), 3.0),
        ]:  # and back from step 10 to 8
            write(row)
    run, found = seen()
    assert found == losses(range(1, 5), 1.0) + losses(range(5, 9), 2.0) + losses(range(9, 13), 3.0)
    assert run.info.status == "FINISHED" and run.data.params["steps"] == "12"
    with page.mlflow("run", {"steps": 12}) as write:  # from its end on, nothing is written anew
        for row in rows(range(13, 15), 3.0):
            write(row)
    again, found = seen()
    assert again.info.run_id == run.info.run_id and found[-2:] == losses((13, 14), 3.0)


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt, "KILLED"), (ValueError, "FAILED")]
)
def test_how_a_run_ended(error, status, store):
    with pytest.raises(error), page.mlflow("run", CONFIG) as write:
        write(rows([1], 1.0)[0])
        raise error
    assert seen()[0].info.status == status


def test_a_place_that_cannot_be_used_is_one_line(store, monkeypatch):
    for uri in (f"file:{store}/files", "nothing://at/all"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with pytest.raises(
            InputError, match="mlflow: .*, of MLFLOW_TRACKING_URI, cannot be used: "
        ) as told:
            page.mlflow("run", {}).__enter__()
        assert "\n" not in str(told.value)


def test_a_server_that_fails_does_not_end_the_run(store, monkeypatch, capsys):
    def down(*_, **__):
        raise mlflow.exceptions.MlflowException("no answer\nafter a while")

    with page.mlflow("run", CONFIG) as write:
        write(rows([1], 1.0)[0])
        monkeypatch.setattr(mlflow, "log_metrics", down)
        for row in rows([2, 3], 1.0):
            write(row)
    assert capsys.readouterr().err.splitlines()[-1:] == [
        "jaxmodel: mlflow: gets no more rows of this run: no answer"
    ]
    assert seen()[1] == losses([1], 1.0)
