"""One run as several processes: they meet, JAX connects them, and they end together.

Whatever ends one of them is told to the others, so that nobody is left waiting and each prints
what really happened. A process that is lost without a word is found by training/hosts.py.
"""

import contextlib
import hashlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from launch import provenance, rollcall, tunnel
from launch.files import ROOT, leaves
from launch.port import is_loopback
from launch.rollcall import Place
from launch.setup import explain
from training.hosts import Alone, Hosts, TogetherError, end
from training.liveness import Limits

# Of errors: the watchdog, which knows of a lost process, may speak first. JAX's own error about a
# stalled one comes before the watchdog is sure.
MOMENT, VERDICT = 1.0, 35.0
# The watchdog names who is lost within a minute; JAX, which only aborts, must come later.
NO_PROXY = "no_grpc_proxy"  # gRPC reads it in small letters
HEARTBEAT = 3600  # seconds
SHUTDOWN = 30  # seconds that JAX may take to let go of the others
EXIT = 60.0  # seconds after which a finished process ends whatever hangs in it
ROOMS = ("data", "inference", "launch", "models", "optim", "pallas_kernels", "parallel", "training")


@contextlib.contextmanager
def joined(
    place: Place | None, config: Mapping, own: Mapping, workdir: Path
) -> Iterator[Alone | Hosts]:
    """The processes of the run, from their roll call to their common end.

    config, own: the configuration and the flags that all must have alike. Of several processes,
    one that fails inside ends here, with the sentence that `launch.setup.explain` has for it.

    Raises PortError and RollCallError.
    """
    if place is None:
        yield Alone()
        return
    limits = Limits.of()
    hosts = rollcall.call(place, facts(dict(leaves(config)) | own), workdir, limits=limits)
    try:
        yield hosts
    except TogetherError:
        raise
    except BaseException as error:
        _part(hosts, error)
    else:
        hosts.finish()
        _let_go()


def facts(config: Mapping) -> dict[str, Mapping]:
    """What must be the same on every host, by section of launch.roll.FIXES."""
    packages = (*provenance.PACKAGES, "jaxlib", "numpy")
    return {
        "versions": provenance.versions(packages),
        "platforms": {"JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS")},
        "sources": sources(ROOT),
        "config": config,
    }


def sources(root: Path) -> dict[str, str]:
    """A digest of every source file that takes part in a run."""
    files = sorted(path for room in ROOMS for path in (root / room).rglob("*.py"))
    digest = lambda path: hashlib.blake2b(path.read_bytes(), digest_size=4).hexdigest()
    return {path.relative_to(root).as_posix(): digest(path) for path in files}


def connect(hosts: Hosts, place: Place, data: Any) -> None:
    """Makes the processes one for JAX, once all have the same data.

    Call it before any device is touched. Raises TogetherError for data that differs, and
    ValueError where JAX does not find its processes.
    """
    hosts.compare(
        {
            "the tokenizer's fingerprint": data.tokenizer.fingerprint(),
            "the corpus's fingerprint": data.fingerprint,
        }
    )
    hosts.at("starting")
    _quiet()
    local, bind = _addresses(place)
    try:
        jax.distributed.initialize(
            local,
            place.count,
            place.index,
            local_device_ids=place.devices,
            cluster_detection_method="deactivate",
            initialization_timeout=int(rollcall.SECONDS),
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=SHUTDOWN,
            coordinator_bind_address=bind,
        )
    except RuntimeError as error:
        what = str(error).partition("\n")[0]
        raise ValueError(
            f"JAX's processes did not find each other at {place.host}:{place.port} ({what}); see "
            "that the port stays free and open between the hosts"
        ) from error
    if jax.process_index() != place.index:
        raise ValueError(
            f"JAX calls this process {jax.process_index()} and it was started as {place.index}; "
            "number the processes as the devices' network does, or give --coordinator=auto"
        )
    if jax.process_count() != place.count:
        raise ValueError(
            f"JAX sees {jax.process_count()} processes and the run has {place.count}; start one on "
            "each host of the devices' network"
        )


def _addresses(place: Place) -> tuple[str, str]:
    """Where this process reaches JAX's service, and where process 0 offers it."""
    port, here = place.port, is_loopback(place.host)
    host = place.host if here and place.host != "localhost" else "127.0.0.1"
    host = f"[{host}]" if ":" in host else host
    bind = f"{host}:{port}" if here else f"[::]:{port}"
    return (f"{host}:{port}" if place.index == 0 else tunnel.start(place.host, port)), bind


def _quiet() -> None:
    # It would catch SIGTERM, which the loop agrees on with the other processes.
    jax.config.update("jax_enable_preemption_service", False)
    # gRPC only ever reaches for this machine here, which no proxy can find.
    jax.config.update("jax_check_proxy_envs", False)
    os.environ |= {NO_PROXY: "127.0.0.1,::1,localhost"}
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        # Gloo prints to C's standard output whom it has met.
        sys.stdout.flush()
        kept, nothing = os.dup(1), os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        os.close(nothing)
        sys.stdout = os.fdopen(kept, "w", encoding=sys.stdout.encoding)


def _let_go() -> None:
    """All have finished; what hangs from here on holds nobody up for more than a minute."""
    _after(EXIT, 0)
    if jax.distributed.is_initialized():
        with contextlib.suppress(RuntimeError):  # Everything is done and saved.
            jax.distributed.shutdown()


def _part(hosts: Hosts, error: BaseException) -> None:
    """Ends this process, and the others with what it says."""
    status, sentence = explain("train", error)
    of_jax = isinstance(error, jax.errors.JaxRuntimeError) and sentence is None
    time.sleep(VERDICT if of_jax else MOMENT)
    said = printed = sentence
    if sentence is None:
        said = traceback.format_exception_only(error)[-1].strip()
        printed = "".join(traceback.format_exception(error)).rstrip()
    said = said.removeprefix("train: ") or "it was interrupted"
    if hosts.part(status, said) and printed:
        print(printed, file=sys.stderr)
    _after(SHUTDOWN, status)
    sys.stdout.flush()
    sys.stderr.flush()
    end(status)  # What JAX does at an exit waits for the others.


def _after(seconds: float, status: int) -> None:
    timer = threading.Timer(seconds, os._exit, [status])
    timer.daemon = True
    timer.start()
