"""Where a process stands, from flags or from what clusters set; a laptop is never asked to wait."""

import types

import pytest

from launch import cluster
from launch.cluster import find, several
from launch.rollcall import Place

SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "node[07-09]",
    "SLURM_NTASKS": "3",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_TASKS_PER_NODE": "1(x3)",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}
OMPI = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_VERSION": "4.1.6",
    "OMPI_MCA_orte_hnp_uri": "16777216.0;tcp://10.96.0.1,10.148.0.1:34911",
}
OTHER = (
    "JAX_COORDINATOR_ADDRESS",
    "JAX_LOCAL_DEVICE_IDS",
    "KUBERNETES_SERVICE_HOST",
    "CUDA_VISIBLE_DEVICES",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
)
TPU = {"JAX_PLATFORMS": "tpu,cpu", "TPU_WORKER_HOSTNAMES": "localhost,b,c,d", "TPU_WORKER_ID": "3"}


@pytest.fixture
def environ(monkeypatch):
    """environ(variables): those of the process, which jax reads too."""
    for name in (*SLURM, *OMPI, *TPU, *OTHER):
        monkeypatch.delenv(name, raising=False)

    def change(variables):
        for name, text in variables.items():
            monkeypatch.setenv(name, text)
        return dict(variables)

    return change


def flags(**given):
    defaults = {name: key.default for name, key in cluster.FLAGS.items()}
    return types.SimpleNamespace(**(defaults | given))


def by_hand(**changes):
    given = dict(coordinator="10.0.0.1:80", processes=4, process=3)
    return flags(**(given | changes))


def test_three_flags_say_all():
    assert find(by_hand(), {}) == Place("10.0.0.1", 80, 4, 3, None, 120.0)
    assert find(by_hand(roll_call_seconds=5.0), SLURM).seconds == 5.0
    assert find(by_hand(processes=1, process=0), {}) is None


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (by_hand(process=None), "--coordinator needs --process beside it"),
        (by_hand(coordinator=None, process=None), "--processes needs --coordinator and --process "),
        (by_hand(process=4), "--process=4 of --processes=4 does not exist; count from 0"),
        (by_hand(process=-1), "--process=-1 of "),
        (by_hand(processes=0, process=0), "--processes=0 are none; give at least 1"),
        (by_hand(coordinator="host"), "--coordinator=host is not HOST:PORT"),
        (by_hand(coordinator="auto"), "--coordinator=auto decides alone; drop --processes"),
        (
            flags(coordinator="alone", process=1),
            "--coordinator=alone decides alone; drop --process",
        ),
        (flags(roll_call_seconds=0.0), "--roll_call_seconds=0 leaves no time; give more than 0"),
    ],
)
def test_flags_that_do_not_fit(given, text):
    with pytest.raises(ValueError, match="^" + text):
        find(given, {})


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        SLURM | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
        {"OMPI_COMM_WORLD_SIZE": "1"},
        TPU | {"JAX_PLATFORMS": "cpu"},
        TPU | {"TPU_WORKER_HOSTNAMES": "localhost"},
    ],
    ids=["nothing", "batch script", "one task", "a pod", "one rank", "TPU unused", "one host"],
)
def test_one_process_is_alone(environ, variables):
    assert find(flags(), environ(variables)) is None


@pytest.mark.parametrize("given", [{}, {"coordinator": "auto"}])
def test_tasks_of_slurm(environ, given):
    """The port follows from the number of the job: 61440 + 4097 % 4096."""
    assert find(flags(**given), environ(SLURM)) == Place("node07", 61441, 3, 2, None, 120.0)


@pytest.mark.parametrize(
    ("variables", "devices"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "2"}, (1,)),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x4),1"}, (1,)),
        ({"SLURM_STEP_TASKS_PER_NODE": "1"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "2", "CUDA_VISIBLE_DEVICES": "0"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "2", "CUDA_VISIBLE_DEVICES": "0,1"}, (1,)),
        ({"SLURM_STEP_TASKS_PER_NODE": "2", "JAX_LOCAL_DEVICE_IDS": "0"}, None),
    ],
)
def test_tasks_that_share_a_host_share_its_devices(environ, variables, devices):
    found = find(flags(), environ(SLURM | {"SLURM_LOCALID": "1"} | variables))
    assert found.devices == devices


def test_tasks_of_open_mpi(environ):
    found = find(flags(), environ(OMPI))
    assert (found.host, found.count, found.index, found.devices) == ("10.96.0.1", 2, 1, (1,))


def test_hosts_of_a_tpu_slice(environ, monkeypatch):
    """Of one slice: the metadata server, which is asked in vain here, knows of no other."""
    tpu = "jax._src.clusters.cloud_tpu_cluster.get_tpu_env_value_from_metadata"
    monkeypatch.setattr(tpu, lambda key: None)
    for module in ("cluster", "cloud_tpu_cluster"):
        monkeypatch.setattr(f"jax._src.clusters.{module}.running_in_cloud_tpu_vm", True)
    assert find(flags(), environ(TPU)) == Place("localhost", 8482, 4, 3, None, 120.0)


def test_a_cluster_can_be_overruled(environ):
    variables = environ(SLURM)
    assert several(variables)
    assert find(flags(coordinator="alone"), variables) is None
    assert find(by_hand(), variables).host == "10.0.0.1"
    variables |= environ({"JAX_COORDINATOR_ADDRESS": "other:99"})
    assert find(flags(), variables) == Place("other", 99, 3, 2, None, 120.0)


def test_a_cluster_that_is_silent_or_contradicts_itself(environ):
    with pytest.raises(ValueError, match=r"^no cluster says who runs; give --coordinator=HOST"):
        find(flags(coordinator="auto"), environ({}))
    broken = environ(OMPI | {"OMPI_VERSION": "5.0.0"})
    with pytest.raises(ValueError, match=r"^the cluster does not say who runs \(.*mpi4py"):
        find(flags(), broken)
