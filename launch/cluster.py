"""Which process of how many this is: from flags, or from the cluster that started it.

By hand, the same command on each of N machines with a folder that all see, I from 0 to N - 1 and
process 0 on the machine that --coordinator names:

    uv run train --config experiments/llama_1b.py --workdir /shared/run \\
        --coordinator=10.0.0.1:8476 --processes=N --process=I

SLURM, one task a host with all its devices, or one a GPU (--ntasks-per-node=8), nothing to add:

    srun --nodes=N --ntasks-per-node=1 uv run train --config ... --workdir /shared/run

A TPU pod slice, whose hosts ask its metadata server who they are:

    gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all --command \\
        "cd meshwork && uv run train --config ... --workdir /shared/run --coordinator=auto"

Open MPI and TPU slices on Kubernetes are recognised by their variables as SLURM is; an indexed job
of Kubernetes needs --coordinator=auto. The coordinator's port must be open between the hosts; it
is the only one that Meshwork and JAX's coordination use, beside those of the devices' network.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

from launch.port import split
from launch.roll import SECONDS
from launch.rollcall import Place
from launch.schema import Key

AUTO, ALONE = "auto", "alone"
FLAGS = {
    "coordinator": Key(
        str, None, True, (), "HOST:PORT of process 0; auto asks the cluster, alone forbids that"
    ),
    "processes": Key(int, None, True, (), "how many processes the run has, one a host"),
    "process": Key(int, None, True, (), "which of them this is, from 0"),
    "roll_call_seconds": Key(float, SECONDS, False, (), "how long they wait for each other"),
}
ABOUT = """\
On several hosts give each the same command with --coordinator=HOST:PORT --processes=N --process=I
and a --workdir that all see; under srun, mpirun and on TPU slices of Kubernetes that is known, and
--coordinator=auto asks other clusters (launch/cluster.py has the commands). They check that all
run the same, stop together, and a lost one is named: exit status 3, and the same command goes on.
MESHWORK_STALL_SECONDS is how long one may hang (default: 25 silent, 45 behind the others)."""
# Variables that only a task of several has: in a login shell or a batch script they are not set.
TASKS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
TOGETHER = ("coordinator", "processes", "process")


def find(flags: Any, environ: Mapping[str, str] = os.environ) -> Place | None:
    """Where this process stands; None where it is alone.

    flags: with the names of FLAGS. Without flags, only what says clearly that there are several
    tasks counts. May import jax, which knows the clusters. Raises ValueError.
    """
    if not flags.roll_call_seconds > 0:
        raise ValueError(
            f"--roll_call_seconds={flags.roll_call_seconds:g} leaves no time; give more than 0"
        )
    given = [name for name in TOGETHER if getattr(flags, name) is not None]
    if flags.coordinator in (AUTO, ALONE):
        if len(given) > 1:
            raise ValueError(
                f"--coordinator={flags.coordinator} decides alone; drop --{given[1]}, or give "
                "--coordinator=HOST:PORT"
            )
        return _ask(flags, environ) if flags.coordinator == AUTO else None
    if not given:
        return _ask(flags, environ) if several(environ) else None
    return _by_hand(flags, given)


def _by_hand(flags: Any, given: list[str]) -> Place | None:
    missing = [name for name in TOGETHER if name not in given]
    if missing:
        raise ValueError(
            f"--{given[0]} needs --{' and --'.join(missing)} beside it, on every host; give all "
            "three or none"
        )
    if flags.processes < 1:
        raise ValueError(f"--processes={flags.processes} are none; give at least 1")
    if not 0 <= flags.process < flags.processes:
        raise ValueError(
            f"--process={flags.process} of --processes={flags.processes} does not exist; count "
            "from 0"
        )
    host, port = split(flags.coordinator)
    if flags.processes == 1:
        return None
    return Place(host, port, flags.processes, flags.process, None, flags.roll_call_seconds)


def several(environ: Mapping[str, str]) -> bool:
    """Whether the environment says beyond doubt that this is one of several tasks."""
    counts = [environ.get(name, "") for name in TASKS]
    if any(count.isdecimal() and int(count) > 1 for count in counts):
        return True
    on_tpu = environ.get("JAX_PLATFORMS", "").startswith("tpu")
    return on_tpu and "," in environ.get("TPU_WORKER_HOSTNAMES", "")


def _ask(flags: Any, environ: Mapping[str, str]) -> Place | None:
    from jax._src.clusters import ClusterEnv  # there is no public way to what it knows

    by_hand = "give --coordinator=HOST:PORT --processes=N --process=I, or --coordinator=alone"
    try:
        address, count, index, devices = ClusterEnv.auto_detect_unset_distributed_params(
            environ.get("JAX_COORDINATOR_ADDRESS"), None, None, None, None,
            int(flags.roll_call_seconds),
        )  # fmt: skip
    except Exception as error:  # Of metadata servers, Kubernetes, MPI: any.
        raise ValueError(f"the cluster does not say who runs ({error}); {by_hand}") from None
    if address is None or count is None or index is None:
        raise ValueError(f"no cluster says who runs; {by_hand}")
    host, port = split(address)
    if count == 1:
        return None
    devices = None if devices is None or _has_all(environ) else tuple(devices)
    return Place(host, port, count, index, devices, flags.roll_call_seconds)


def _has_all(environ: Mapping[str, str]) -> bool:
    """Whether a task shall use every device that it sees; jax means one device for each task."""
    per_host = environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    one_here = re.fullmatch(r"1(\(x\d+\))?", per_host)
    one_here = one_here or environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    # srun --gpus-per-task=1 hides the others, and the one left is number 0.
    own = environ.get("CUDA_VISIBLE_DEVICES", "")
    return bool(one_here or (own and "," not in own) or "JAX_LOCAL_DEVICE_IDS" in environ)
