"""Convolution, selective scan and SSD: every form against the reference, outputs, states and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hax_jax import ops
from tests.ops.cases import (
    assert_close,
    forms_of,
    make_segments,
    normal,
    rng,
    with_gradients,
)

BATCH = 2


def conv_inputs(length: int):
    g = rng(1, length)
    return {"x": normal(g, BATCH, length, 5), "weight": normal(g, 4, 5), "bias": normal(g, 5)}


def scan_inputs(length: int):
    g = rng(2, length)
    return {
        "x": normal(g, BATCH, length, 6),
        "dt": normal(g, BATCH, length, 6) - 1,
        "A": -jnp.exp(normal(g, 6, 3)),
        "B": normal(g, BATCH, length, 3),
        "C": normal(g, BATCH, length, 3),
        "D": normal(g, 6),
        "initial_state": normal(g, BATCH, 6, 3),
    }


def ssd_inputs(length: int):
    g = rng(3, length)
    return {
        "x": normal(g, BATCH, length, 4, 5),
        "dt": jax.nn.softplus(normal(g, BATCH, length, 4) - 1),
        "A": -jnp.exp(normal(g, 4)),
        "B": normal(g, BATCH, length, 2, 3),
        "C": normal(g, BATCH, length, 2, 3),
        "D": normal(g, 4),
        "initial_state": normal(g, BATCH, 4, 5, 3),
    }


OPS = {
    "causal_conv1d": (ops.causal_conv1d, conv_inputs, {}, forms_of("causal_conv1d")),
    "selective_scan": (
        ops.selective_scan,
        scan_inputs,
        {"chunk_size": 16, "softplus": True},
        forms_of("selective_scan"),
    ),
    "ssd": (ops.ssd, ssd_inputs, {"chunk_size": 16}, forms_of("ssd")),
}
FORMS = [(name, form) for name, spec in OPS.items() for form in spec[3] if form != "reference"]
forms = pytest.mark.parametrize(("name", "form"), FORMS)


@forms
@pytest.mark.parametrize(("length", "segmented"), [(1, False), (16, False), (37, False), (37, True)])
def test_forms_equal_the_reference(name, form, length, segmented):
    function, make_inputs, settings, _ = OPS[name]
    inputs = make_inputs(length)
    segment_ids = make_segments(rng(4, length), BATCH, length) if segmented else None

    def run(implementation):
        return with_gradients(
            lambda x: function(**x, segment_ids=segment_ids, implementation=implementation, **settings),
            inputs,
        )

    assert_close(run(form), run("reference"))


@pytest.mark.parametrize("name", OPS)
def test_segments_are_rows_of_their_own(name):
    """Two items in one row give what they give alone, and the last state is the last item's."""
    function, make_inputs, settings, implementations = OPS[name]
    inputs = make_inputs(40)
    timed = {key for key, x in inputs.items() if x.ndim > 2 and x.shape[1] == 40}
    inputs.pop("initial_state", None)
    segment_ids = jnp.asarray(np.repeat([[3, 1]], BATCH, 0).repeat([23, 17], axis=1), jnp.int32)
    for form in implementations:
        packed = function(**inputs, segment_ids=segment_ids, implementation=form, **settings)
        parts = [
            function(
                **{key: x[:, part] if key in timed else x for key, x in inputs.items()},
                implementation=form,
                **settings,
            )
            for part in (slice(0, 23), slice(23, 40))
        ]
        if name == "causal_conv1d":
            packed, parts = (packed, None), [(part, None) for part in parts]
        assert_close(packed[0], jnp.concatenate([part[0] for part in parts], axis=1))
        assert_close(packed[1], parts[1][1])


@pytest.mark.parametrize("name", ["selective_scan", "ssd"])
def test_a_row_can_be_cut_anywhere(name):
    """The state after the first part, handed to the second, continues as if nothing had happened."""
    function, make_inputs, settings, implementations = OPS[name]
    inputs = make_inputs(41)
    state = inputs.pop("initial_state")
    timed = {key for key, x in inputs.items() if x.ndim > 2 and x.shape[1] == 41}
    for form in implementations:
        whole = function(**inputs, initial_state=state, implementation=form, **settings)
        carried, pieces = state, []
        for part in (slice(0, 9), slice(9, 10), slice(10, 41)):
            piece = {key: x[:, part] if key in timed else x for key, x in inputs.items()}
            y, carried = function(**piece, initial_state=carried, implementation=form, **settings)
            pieces.append(y)
        assert_close((jnp.concatenate(pieces, axis=1), carried), whole)


@pytest.mark.parametrize("name", ["selective_scan", "ssd"])
def test_extreme_decays_stay_finite(name):
    """A time step so long that the state is forgotten at once must give neither NaN nor infinity."""
    function, make_inputs, settings, _ = OPS[name]
    inputs = make_inputs(33)
    inputs["dt"] = inputs["dt"].at[:, ::5].set(1e6)
    outputs, gradients = with_gradients(lambda x: function(**x, **settings), inputs)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((outputs, gradients)))


@pytest.mark.parametrize("name", OPS)
def test_bad_calls_say_which_argument(name):
    function, make_inputs, settings, _ = OPS[name]
    inputs = make_inputs(8)
    with pytest.raises(ValueError, match=rf"`implementation` of {name} .*'mosaic_gpu'"):
        function(**inputs, implementation="mosaic_gpu", **settings)
    with pytest.raises(ValueError, match=rf"`implementation` of {name} must be None or one of .*'fast'"):
        function(**inputs, implementation="fast", **settings)
