"""What attention keeps while it decodes, and what it refuses."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import ring
from models.mixers.attention import Mixer
from models.param import Dims

DIMS = Dims(d_model=32, length=24, n_layers=2, base_d_model=32)


@pytest.mark.parametrize(
    ("window", "first", "length"), [(4, 0, 20), (4, 3, 20), (1, 5, 20), (9, 9, 12), (4, 8, 6)]
)
def test_slots_hold_the_first_tokens_and_the_last_others(window, first, length):
    mixer = Mixer(DIMS, rngs=nnx.Rngs(0), window=window, first=first)
    slots = mixer._slots(length)
    assert slots == min(window + first, length)
    kept = np.full(slots, -1)
    for now in range(length):
        held = np.asarray(ring.held(jnp.array([now]), slots, first))[0]
        (slot,) = np.flatnonzero(held == now)
        kept[slot] = now
        np.testing.assert_array_equal(held, kept)
        seen = {p for p in range(now + 1) if now - p < window or p < first}
        assert seen == {p for p in kept if p >= 0}


def test_first_without_a_window_is_refused():
    with pytest.raises(ValueError, match="set window, or first to 0 and not 3"):
        Mixer(DIMS, rngs=nnx.Rngs(0), first=3)


def test_sinks_start_at_zero_and_are_not_decayed():
    mixer = Mixer(DIMS, rngs=nnx.Rngs(0), heads=4, sinks=True)
    np.testing.assert_array_equal(mixer.sinks[...], np.zeros(4))
    weight = mixer.sinks.get_metadata("weight")
    assert (weight.axes, weight.decay) == (("heads",), False)
