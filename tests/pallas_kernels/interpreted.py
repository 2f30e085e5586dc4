"""The CPU interpreters of TPU and GPU kernels, with their race detectors."""

import contextlib
import unittest.mock

import jax
from jax.sharding import AbstractDevice, AbstractMesh

KINDS = {"tpu": ("TPU v5p", 1), "gpu": ("NVIDIA H200", 132)}


@contextlib.contextmanager
def interpreted(platform: str, shape=(), names=(), **mesh):
    """Kernels of 'tpu' or 'gpu' run on the CPU here; fails at the end if one of them raced.

    shape, names, mesh: of a mesh whose devices are to be of that platform; none by default.
    """
    kind, cores = KINDS[platform]
    device = AbstractDevice(device_kind=kind, num_cores=cores, platform=platform)
    abstract = AbstractMesh(shape, names, abstract_device=device, **mesh)
    with _detected(platform) as states, jax.sharding.use_abstract_mesh(abstract):
        yield
    assert not any(state.races_found for state in states), "a kernel races, as printed above"
    assert states, "no kernel ran"


@contextlib.contextmanager
def _detected(platform: str):
    """Yields the race detector's state of every kernel that is called: JAX keeps only the last."""
    module, state, mode, reset = _tpu() if platform == "tpu" else _gpu()
    states, make = [], getattr(module, state)
    record = lambda *args, **kwargs: states.append(make(*args, **kwargs)) or states[-1]
    with unittest.mock.patch.object(module, state, record), mode:
        try:
            yield states
        except BaseException:
            reset()
            raise


def _tpu():
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as module
    from jax.experimental.pallas import tpu

    mode = tpu.force_tpu_interpret_mode(tpu.InterpretParams(detect_races=True))
    return module, "RaceDetectionState", mode, tpu.reset_tpu_interpret_mode_state


def _gpu():
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks as module
    from jax.experimental.pallas import mosaic_gpu

    mode = mosaic_gpu.force_gpu_interpret_mode(mosaic_gpu.InterpretGPUParams(detect_races=True))
    return module, "GPURaceDetectionState", mode, module.reset_gpu_interpret_mode_state
