"""Joining several processes to one run, by explicit settings or those found in the environment.

The settings of TPU pods, Slurm, Open MPI and Kubernetes are recognised.
"""

from __future__ import annotations

import atexit
import dataclasses
import os
import sys
from collections.abc import Mapping
from typing import Any, Literal, NoReturn

import jax

from jaxmodel.errors import InputError

HEARTBEAT = 30
"""Seconds after which the coordinator declares a silent process dead and all others end.

JAX's own default is 100.
"""


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The settings by which a process finds the others.

    Attributes:
      kind: "explicit", "environment", "slurm", "openmpi", "kubernetes" or "tpu".
      coordinator: `host:port` of process 0; None if JAX detects it (Slurm, Open MPI, TPU).
      processes: number of processes; None if JAX detects it.
      process: index of this process; None if JAX detects it.
    """

    kind: str
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None


def detect(
    environ: Mapping[str, str],
    *,
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
) -> Cluster | None:
    """Return the cluster that this process belongs to, or None for one process alone.

    Explicit arguments come first, then `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and
    `JAX_PROCESS_ID` (or `JOB_COMPLETION_INDEX`, which Kubernetes sets in indexed jobs), then the
    variables of Slurm, Open MPI or a TPU pod.

    Raises:
      InputError: only some of the three settings are given.

    >>> environ = {"JAX_COORDINATOR_ADDRESS": "trainer-0:1234", "JAX_NUM_PROCESSES": "4"}
    >>> detect({**environ, "JOB_COMPLETION_INDEX": "2"})
    Cluster(kind='kubernetes', coordinator='trainer-0:1234', processes=4, process=2)
    >>> detect({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16", "SLURM_PROCID": "3"}).kind
    'slurm'
    >>> names = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")
    >>> [detect({name: "h0:8476,h1:8476"}).kind for name in names]
    ['tpu', 'tpu']
    >>> detect({"TPU_WORKER_HOSTNAMES": "h0", "MEGASCALE_NUM_SLICES": "2"}).kind
    'tpu'
    >>> detect({"TPU_WORKER_HOSTNAMES": "h0"}) is detect({}) is None
    True
    """
    said = {"coordinator": coordinator, "processes": processes, "process": process}
    if any(value is not None for value in said.values()):
        return _whole("explicit", coordinator, processes, process)
    if "JAX_COORDINATOR_ADDRESS" in environ:
        kind = "environment" if "JAX_PROCESS_ID" in environ else "kubernetes"
        index = environ.get("JAX_PROCESS_ID", environ.get("JOB_COMPLETION_INDEX"))
        return _whole(
            kind,
            environ["JAX_COORDINATOR_ADDRESS"],
            _number(environ.get("JAX_NUM_PROCESSES")),
            _number(index),
        )
    if "SLURM_JOB_ID" in environ and "SLURM_PROCID" in environ:
        return Cluster("slurm") if (_number(environ.get("SLURM_NTASKS")) or 1) > 1 else None
    if "OMPI_COMM_WORLD_SIZE" in environ:
        return Cluster("openmpi") if (_number(environ["OMPI_COMM_WORLD_SIZE"]) or 1) > 1 else None
    hosts = (
        environ.get(name, "").split(",")
        for name in ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")
    )
    if (
        any(len(names) > 1 for names in hosts)
        or (_number(environ.get("MEGASCALE_NUM_SLICES")) or 1) > 1
    ):
        return Cluster("tpu")
    return None


def on_tpu_machine() -> bool:
    """Return whether this is a Google machine with usable TPU chips, which JAX can query."""
    if "tpu" not in (jax.config.jax_platforms or "tpu"):
        return False
    # It answers at once if there are no chips. There is no public function for it.
    from jax._src.clusters import (
        cloud_tpu_cluster,
    )

    return any(
        kind.is_env_present()
        for kind in (cloud_tpu_cluster.GceTpuCluster, cloud_tpu_cluster.GkeTpuCluster)
    )


def initialize(
    cluster: Cluster | None = None,
    *,
    heartbeat: int = HEARTBEAT,
    timeout: int = 300,
    collectives: Literal["gloo", "mpi"] | None = None,
) -> Cluster | None:
    """Join the other processes of the run; do nothing if there are none.

    Call it before the first computation.

    Args:
      cluster: the settings; default: those of the environment.
      heartbeat: see `HEARTBEAT`.
      timeout: seconds to wait for the others.
      collectives: for CPU clusters, gloo (over TCP, part of JAX) or mpi (which loads the MPIwrapper
        named by `MPITRAMPOLINE_LIB`); default: `JAX_CPU_COLLECTIVES_IMPLEMENTATION`, else gloo.

    Returns:
      The cluster that was joined, or None.

    Raises:
      InputError: the others did not join in time; with MPI, a missing MPIwrapper, or several
        devices in a process.
    """
    cluster = (
        detect(os.environ) or (Cluster("tpu") if on_tpu_machine() else None)
        if cluster is None
        else cluster
    )
    if cluster is None:
        return None
    if collectives is not None:
        jax.config.update("jax_cpu_collectives_implementation", collectives)
    if jax.config.jax_cpu_collectives_implementation == "mpi":
        if (devices := jax.config.jax_num_cpu_devices) > 1:
            raise InputError(
                f"devices: {devices} in each process given; allowed with MPI: 1 (or gloo)"
            )
        # without this check the process would end here with a message from C
        if "MPITRAMPOLINE_LIB" not in os.environ:
            raise InputError(
                "MPITRAMPOLINE_LIB: not set; MPI needs it to name a libmpiwrapper.so, see "
                "docs/design.md"
            )
        jax.config.update("jax_cpu_enable_async_dispatch", False)  # see `sharding.make_mesh`
    try:
        jax.distributed.initialize(
            cluster.coordinator,
            cluster.processes,
            cluster.process,
            heartbeat_timeout_seconds=heartbeat,
            initialization_timeout=timeout,
            # so that a process that fails does not wait five minutes for those that cannot come
            shutdown_timeout_seconds=heartbeat,
        )
    except RuntimeError as error:
        raise InputError(
            f"distributed: {cluster} could not be joined: {' '.join(str(error).split())[:300]}"
        ) from None
    return cluster


def coordinator() -> Any:
    """Return the client of JAX's coordination service, or None for one process alone.

    It has barriers and a key-value store.
    """
    if jax.process_count() == 1:
        return None
    from jax._src import distributed  # there is no public function for it

    return distributed.global_state.client


def by_mpi() -> bool:
    """Return whether this process is one of several that communicate by MPI."""
    return (
        jax.distributed.is_initialized() and jax.config.jax_cpu_collectives_implementation == "mpi"
    )


def leave(code: int) -> NoReturn:
    """End this process after collectives by MPI, without the usual clean-up.

    At a usual exit XLA would free what MPI has already closed, and MPI would abort.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _whole(
    kind: str, coordinator: str | None, processes: int | None, process: int | None
) -> Cluster:
    if coordinator is None or processes is None or process is None:
        raise InputError(
            f"distributed: coordinator {coordinator}, processes {processes}, process {process} "
            f"given; all three are needed "
            "(in the environment JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID)"
        )
    if not 0 <= process < processes:
        raise InputError(
            f"distributed: process {process} of {processes} given; allowed: 0 to {processes - 1}"
        )
    return Cluster(kind, coordinator, processes, process)


def _number(text: str | None) -> int | None:
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        raise InputError(f"distributed: {text!r} is not a whole number") from None
