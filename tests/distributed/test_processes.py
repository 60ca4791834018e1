"""Several processes on this machine: collectives that are right, moves, a lost rank, a stuck rank,
a notice to one of them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from jaxmodel.distributed import launch
from jaxmodel.errors import InputError

REPO = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """What `devices8` sets for its process too."""
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")]))
    )


def script(folder, program):
    """A file with this program, whose results go to `<folder>/<rank>.json`."""
    head = f"""
        import json, sys
        from jaxmodel.distributed import startup
        startup.initialize()
        import jax, numpy as np
        def write(result):
            open(f"{folder}/{{jax.process_index()}}.json", "w").write(json.dumps(result))
    """
    file = folder / "program.py"
    file.write_text(textwrap.dedent(head) + textwrap.dedent(program))
    return str(file)


def results(folder, processes):
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]


def test_collectives_of_two_processes_are_right(tmp_path):
    """jax#40830:

    `psum_scatter` of some MiB was silently wrong in a development version of JAX 0.12. Training
    relies on it.
    """
    program = """
        mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        where = jax.sharding.NamedSharding(mesh, jax.P("data"))


        def run(f):
            return jax.jit(
                jax.shard_map(
                    lambda a: f(a[0])[None],
                    mesh=mesh,
                    in_specs=jax.P("data"),
                    out_specs=jax.P("data"),
                )
            )


        scatter = run(lambda a: jax.lax.psum_scatter(a, "data", tiled=True))
        gather = run(lambda a: jax.lax.all_gather(a, "data", tiled=True))
        total = run(lambda a: jax.lax.psum(a, "data"))
        i, wrong = jax.process_index(), []
        for mib in (1, 2, 4, 8):  # of what one process sends to the other
            n = mib * 2**18
            whole = np.random.default_rng(mib).integers(-1000, 1000, (2, 2 * n)).astype(np.float32)
            x = jax.make_array_from_callback(whole.shape, where, lambda index: whole[index])
            for k in range(3):
                mine = lambda f: np.asarray(f(x).addressable_data(0))[0]
                wanted = {
                    "scatter": whole.sum(0)[i * n : (i + 1) * n],
                    "gather": whole.reshape(-1),
                    "total": whole.sum(0),
                }
                found = {"scatter": mine(scatter), "gather": mine(gather), "total": mine(total)}
                wrong += [
                    f"{name}, {mib} MiB"
                    for name in wanted
                    if not np.array_equal(found[name], wanted[name])
                ]
        write(wrong)
    """
    launch.launch([script(tmp_path, program)], processes=2, logs=tmp_path)
    assert results(tmp_path, 2) == [[], []]


def test_a_run_moves_between_one_device_a_mesh_and_two_processes():
    spec = importlib.util.spec_from_file_location("move", REPO / "experiments" / "move.py")
    move = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(move)
    entries, _ = move.numbers((("data=1", 1, 1), ("fsdp=2,tensor=2", 2, 2)), seed=0)
    values = {name: value for name, value, *_ in entries}
    assert values["restored states that are bit-equal to the saved ones"] == 1
    assert values["the token stream has one hash on every topology"] == 1
    assert values["largest relative difference of a loss to the single device's"] <= 1e-5


def train_command(folder, *more):
    text = folder / "text.txt"
    text.write_text(
        "\n\n".join(
            f"{i} is followed by {i + 1}, which is followed by {i + 2}." for i in range(900)
        )
    )
    sizes = [
        "--width",
        16,
        "--depth",
        1,
        "--heads",
        2,
        "--context",
        16,
        "--batch",
        12,
        "--vocab",
        257,
        "--eval-batches",
        1,
    ]
    command = [
        "train",
        "--data",
        text,
        "--heldout",
        text,
        *sizes,
        "--sample",
        "1",
        "--runs",
        folder / "runs",
        *more,
    ]
    return [sys.executable, "-m", "jaxmodel", *map(str, command)]


def wait_for(condition, what, seconds=120):
    limit = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < limit, f"{what} did not come within {seconds} s"
        time.sleep(0.1)
    return found


def ranks(folder):
    """Process id of each rank of a run that goes on."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            command = (place / "cmdline").read_bytes().decode()
            environ = (place / "environ").read_bytes().decode()
        except OSError:
            continue
        if (
            str(folder) in command
            and "resume" in command
            and (rank := re.search(r"JAX_PROCESS_ID=(\d+)", environ))
        ):
            found[int(rank[1])] = int(place.name)
    return found


def test_an_elastic_run_loses_a_process_and_gets_it_back(tmp_path):
    """One of two is killed; the other goes on alone on the same stream; later it is told to save,
    and both go on to the end.

    It is told soon: even on a quick machine it must not have come to its end, and on a slow one it
    may not have begun.
    """
    more = ["--steps", 400, "--save-every", 20, "--log-every", 20]
    more += ["--processes", 2, "--elastic", "--regrow", 3, "--json", tmp_path / "out.json"]
    with open(tmp_path / "said", "wb") as said:
        run = subprocess.Popen(train_command(tmp_path, *more), stderr=said, stdout=said)
        try:
            runs = tmp_path / "runs"
            wait_for(
                lambda: [p for p in runs.glob("*/checkpoints/step-000000020/manifest.json")],
                "a checkpoint",
            )
            os.kill(ranks(runs)[1], signal.SIGKILL)
            assert run.wait(240) == 0, (tmp_path / "said").read_text()
        finally:
            run.kill()
    text = (tmp_path / "said").read_text()
    assert (
        "rank 1 of 2 ended by SIGKILL: going on with 1" in text
        and "returning to 2 processes: the present 1 save and stop" in text
    )
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["steps"] == 400 and found["processes"] == 2
    alone = train_command(
        tmp_path, "--steps", 400, "--log-every", 20, "--json", tmp_path / "alone.json"
    )
    subprocess.run(alone, check=True, capture_output=True)
    want = json.loads((tmp_path / "alone.json").read_text())
    losses, wanted = ({row["step"]: row["loss"] for row in one["history"]} for one in (found, want))
    assert losses.keys() >= wanted.keys()
    np.testing.assert_allclose(
        [losses[step] for step in wanted], list(wanted.values()), rtol=2e-3
    )  # 400 steps apart in rounding
    np.testing.assert_allclose(losses[1], wanted[1], rtol=1e-5)
    ledger = found["ledger"]
    kinds = sum(value for name, value in ledger.items() if name not in ("wall", "goodput"))
    assert (
        kinds == pytest.approx(ledger["wall"], rel=5e-3)
        and ledger["lost"] > 0
        and ledger["down"] > 0
    )


def test_a_cluster_of_one_hears_a_signal_before_it_listens(tmp_path):
    """From the moment that it joins until the loop begins, JAX's own service takes SIGTERM: it is
    asked.
    """
    port = 20000 + (os.getpid() + 77) % 20000
    ready = tmp_path / "said"
    environ = {
        **os.environ,
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": "1",
        "JAX_PROCESS_ID": "0",
    }
    with open(ready, "wb") as said:
        command = train_command(tmp_path, "--steps", 1000000, "--json", tmp_path / "out.json")
        run = subprocess.Popen(command, env=environ, stderr=said, stdout=said)
        try:
            wait_for(lambda: b"tokenise" in ready.read_bytes(), "its first line")
            run.send_signal(signal.SIGTERM)
            assert run.wait(120) == 0, ready.read_text()
        finally:
            run.kill()
    assert json.loads((tmp_path / "out.json").read_text())["steps"] < 1000000


@pytest.mark.parametrize("how", ["killed", "stuck"])
def test_a_rank_that_is_gone_or_stuck_is_named_and_the_others_stop(how, tmp_path):
    """Without a launcher, as on a cluster."""
    (tmp_path / "one").mkdir()
    more = ("--steps", 100000, "--log-every", 20, *(("--watchdog", 8) if how == "stuck" else ()))
    port = 20000 + os.getpid() % 20000
    world = []
    logs = [(tmp_path / f"{rank}.log").open("wb") for rank in (0, 1)]
    try:
        for rank in (0, 1):
            environ = {
                **os.environ,
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": "2",
            }
            environ |= {"JAX_PROCESS_ID": str(rank), "JAX_NUM_CPU_DEVICES": "1"}
            world.append(
                subprocess.Popen(
                    train_command(tmp_path, *more),
                    env=environ,
                    stderr=logs[rank],
                    stdout=logs[rank],
                )
            )
        rows = lambda: [
            p for p in (tmp_path / "runs").glob("*/metrics.jsonl") if p.read_text().count("\n") > 2
        ]
        wait_for(rows, "three rows")
        time.sleep(3)  # each rank has told where it is
        world[1].send_signal(signal.SIGKILL if how == "killed" else signal.SIGSTOP)
        began = time.monotonic()
        code = world[0].wait(90)
        assert time.monotonic() - began < 60 and code != 0
    finally:
        for one in world:
            one.kill()
            one.wait()
        for log in logs:
            log.close()
    said = (tmp_path / "0.log").read_text()
    assert "rank 1 is gone or stuck: silent for" in said, said[-3000:]


def test_a_program_that_fails_is_named_with_its_last_words(tmp_path):
    program = """
        if jax.process_index() == 1:
            print("the last words", file=sys.stderr, flush=True)
            import os; os._exit(3)
        import time; time.sleep(600)
    """
    began = time.monotonic()
    said = r"rank 1 of 2 ended with code 3; the others were stopped; its last line: the last words"
    with pytest.raises(InputError, match=said):
        launch.launch([script(tmp_path, program)], processes=2, logs=tmp_path)
    assert time.monotonic() - began < 60


@pytest.mark.skipif(
    not (shutil.which("mpirun") and "MPITRAMPOLINE_LIB" in os.environ),
    reason="needs Open MPI and an MPIwrapper",
)
def test_by_mpi_as_by_gloo(tmp_path):
    """Started by `mpirun`, which is how they find each other; two axes, so that there are several
    groups of devices.
    """
    losses = {}
    for kind in ("mpi", "gloo"):
        more = (
            "--steps",
            5,
            "--log-every",
            1,
            "--mesh",
            "data=2,fsdp=2",
            "--json",
            tmp_path / f"{kind}.json",
        )
        root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        environ = {**os.environ, **root, "JAX_CPU_COLLECTIVES_IMPLEMENTATION": kind}
        command = ["mpirun", "-n", "4", "--oversubscribe", *train_command(tmp_path, *more)]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
        losses[kind] = [
            row["loss"] for row in json.loads((tmp_path / f"{kind}.json").read_text())["history"]
        ]
    assert len(losses["mpi"]) == 5
    np.testing.assert_allclose(losses["mpi"], losses["gloo"], rtol=1e-6)


def test_what_mpi_needs():
    """In a process of its own, since the number of devices is set before the first computation."""
    program = """
        import jax
        from jaxmodel.errors import InputError
        from jaxmodel.distributed import startup
        for devices in (1, 2):
            jax.config.update("jax_num_cpu_devices", devices)
            try:
                startup.initialize()
            except InputError as error:
                print(error)
    """
    environ = {name: value for name, value in os.environ.items() if name != "MPITRAMPOLINE_LIB"}
    environ |= {
        "JAX_COORDINATOR_ADDRESS": "127.0.0.1:1",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": "0",
    }
    environ |= {"JAX_CPU_COLLECTIVES_IMPLEMENTATION": "mpi"}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert first.startswith("MPITRAMPOLINE_LIB: not set") and second.startswith(
        "devices: 2 in each process given"
    )


def test_processes_that_do_not_divide_the_batch():
    with pytest.raises(
        InputError, match="batch: its rows cannot be divided among 5 processes of 2 devices"
    ):
        launch.launch([], processes=5, devices=2, logs=Path("."), fits=lambda n: 12 % (2 * n) == 0)
    assert threading.active_count() >= 1
