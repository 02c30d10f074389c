"""Attention over key sets: every form against the reference, outputs and gradients, on the same key set."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hax_jax import ops
from hax_jax.ops import segments
from hax_jax.ops.sparse_attention import dense, plan, xla
from tests.ops.cases import (
    assert_close,
    forms_of,
    lengths,
    make_segments,
    normal,
    rng,
    with_gradients,
)

BATCH, SIZE = 2, 5
SOURCES = {
    "full": ("full",),
    "window": ("window",),
    "sink": ("sink",),
    "dilated": ("dilated",),
    "hash": ("hash",),
    "lifetimes": ("lifetimes",),
    "hax": ("hash", "lifetimes"),
    "all": ("window", "sink", "dilated", "hash", "lifetimes"),
}


def make_key_set(names, length: int, segment_ids) -> ops.KeySet:
    g = rng(10, length)
    position = segments.positions(segments.as_array(segment_ids, (BATCH, length)))
    # Many codes, so that some queries see nothing at all.
    query_code, key_code = (jnp.asarray(g.integers(0, 12, (BATCH, length)), jnp.int32) for _ in "qk")
    count, order = ops.bucket_orders(query_code, key_code, segment_ids=segment_ids)
    scores = normal(g, BATCH, length)
    sources = {
        "full": ops.Full(),
        "window": ops.SlidingWindow(SIZE),
        "sink": ops.Sink(SIZE, position),
        "dilated": ops.Dilated(7, position),
        "hash": ops.HashBuckets(SIZE, query_code, count, key_code, order),
        "lifetimes": ops.Lifetimes(SIZE, ops.key_lifetimes(scores, SIZE, segment_ids=segment_ids)),
    }
    return ops.KeySet(tuple(sources[name] for name in names))


def make_inputs(length: int, heads: int = 1, dtype=jnp.float32):
    g = rng(11, length)
    return (
        normal(g, BATCH, length, heads, 8, dtype=dtype),
        normal(g, BATCH, length, heads, 8, dtype=dtype),
        normal(g, BATCH, length, heads, 12, dtype=dtype),
    )


def run(inputs, key_set, segment_ids, form, **settings):
    return with_gradients(
        lambda x: ops.sparse_attention(*x, key_set, segment_ids=segment_ids, implementation=form, **settings),
        inputs,
    )


def make_case(name, length, segmented=False, heads=1):
    segment_ids = make_segments(rng(12), BATCH, length) if segmented else None
    return make_inputs(length, heads), make_key_set(SOURCES[name], length, segment_ids), segment_ids


@functools.cache
def reference(name, length, segmented=False, heads=1, **settings):
    """Of a case; it knows nothing of tiles."""
    return run(*make_case(name, length, segmented, heads), "reference", **settings)


@pytest.fixture(scope="class", params=["unrolled", "looped", "chunks"])
def small_tiles(request):
    """Tiles of 16 queries, so that short rows have many: dense ones, unrolled or as a loop, or chunks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense, "BLOCK_Q", 16)
        patch.setattr(dense, "MAX_UNROLLED", 100 if request.param == "unrolled" else 0)
        patch.setattr(plan, "CHUNK", 16)
        patch.setattr(xla, "MIN_LENGTH_OF_CHUNKS", 0 if request.param == "chunks" else 1 << 30)
        jax.clear_caches()
        yield
    jax.clear_caches()


# The kernels have tests of their own: test_sparse_attention_mosaic_gpu.py.
ALL_FORMS = tuple(form for form in forms_of("sparse_attention") if form != "mosaic_gpu")
FORMS = [form for form in ALL_FORMS if form != "reference"]


# Each source alone once, the unions with everything else varied: compiling is what these tests cost.
CASES = [
    *((name, False, "zero") for name in ("full", "window", "sink", "dilated", "lifetimes")),
    ("hash", True, "zero"),
    ("hash", False, "uniform"),
    ("hax", True, "zero"),
    ("all", True, "uniform"),
]


@pytest.mark.usefixtures("small_tiles")
class TestSmallTiles:
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize(("name", "segmented", "empty_rows"), CASES)
    def test_forms_equal_the_reference(self, form, name, segmented, empty_rows):
        got = run(*make_case(name, 63, segmented), form, empty_rows=empty_rows)
        assert_close(got, reference(name, 63, segmented, empty_rows=empty_rows))

    @pytest.mark.parametrize("form", FORMS)
    @lengths
    def test_lengths_heads_and_scale(self, form, length):
        got = run(*make_case("hax", length, heads=3), form, scale=0.7)
        assert_close(got, reference("hax", length, heads=3, scale=0.7))


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16(form):
    key_set = make_key_set(SOURCES["hax"], 130, None)
    inputs = make_inputs(130, dtype=jnp.bfloat16)
    got, want = (run(inputs, key_set, None, name) for name in (form, "reference"))
    assert got[0].dtype == jnp.float32 and got[1][0].dtype == jnp.bfloat16
    assert_close(got, want, "bfloat16")


@pytest.mark.parametrize("form", ALL_FORMS)
def test_rows_without_keys(form):
    """Zeros, with no gradient; or the mean of all values, later ones included, as the original has it."""
    length = 20
    key_set = ops.KeySet((ops.Dilated(6, jnp.arange(length, dtype=jnp.int32)[None]),))
    q, k, v = make_inputs(length)
    out, (d_q, _, _) = run((q, k, v), key_set, None, form)
    assert (out[:, :5] == 0).all() and (out[:, 5:] != 0).any()
    assert (d_q[:, :5] == 0).all() and np.isfinite(d_q).all()
    out, (d_q, _, _) = run((q, k, v), key_set, None, form, empty_rows="uniform")
    np.testing.assert_allclose(
        out[:, :5], jnp.broadcast_to(v.mean(1, keepdims=True), out[:, :5].shape), atol=1e-6
    )
    assert (d_q[:, :5] != 0).any()


@pytest.mark.parametrize("form", ALL_FORMS)
def test_what_is_not_visible_has_no_effect(form):
    """Hidden keys and values may be poison: no NaN may come through, forward or backward."""
    length = 40
    segment_ids = jnp.asarray(np.repeat([[0, 1]], BATCH, 0).repeat([25, 15], axis=1), jnp.int32)
    key_set = make_key_set(SOURCES["hax"], length, segment_ids)
    q, k, v = make_inputs(length)
    huge = (k.at[:, 25:].set(1e30), v.at[:, 25:].set(1e30))

    def first_segment(k, v):
        return ops.sparse_attention(q, k, v, key_set, segment_ids=segment_ids, implementation=form)[:, :25]

    np.testing.assert_array_equal(first_segment(*huge), first_segment(k, v))


def test_a_key_in_two_sources_counts_once():
    length = 30
    position = jnp.arange(length, dtype=jnp.int32)[None]
    inputs = make_inputs(length)
    once = ops.sparse_attention(*inputs, ops.KeySet((ops.Full(),)))
    twice = ops.sparse_attention(
        *inputs, ops.KeySet((ops.Full(), ops.SlidingWindow(9), ops.Sink(3, position)))
    )
    np.testing.assert_array_equal(once, twice)


def test_pairs_and_tiles_say_the_same():
    length = 33
    key_set = make_key_set(SOURCES["all"], length, None)
    index = jnp.arange(length, dtype=jnp.int32)
    tile = np.broadcast_to(key_set.tile(index, index), (BATCH, length, length))
    i, j = (jnp.asarray(rng(13, n).integers(0, length, (BATCH, 200)), jnp.int32) for n in (0, 1))
    pairs = key_set.pairs(i, j)
    np.testing.assert_array_equal(pairs, tile[np.arange(BATCH)[:, None], i, j])
    assert pairs.any() and not pairs.all()


@pytest.mark.parametrize("segmented", [False, True])
def test_hash_codes_are_sorted_once(segmented):
    """The orders of `bucket_orders` and the plan of the attention come from one sort."""
    shape = jax.ShapeDtypeStruct
    x, codes = shape((1, 3000, 1, 8), jnp.float32), shape((1, 3000), jnp.int32)

    def sorts(attend):
        def function(x, codes, ids):
            count, order = ops.bucket_orders(codes, codes, segment_ids=ids, implementation="xla")
            key_set = ops.KeySet((ops.HashBuckets(4, codes, count, codes, order),))
            out = ops.sparse_attention(x, x, x, key_set, segment_ids=ids, implementation="xla")
            return (count, out) if attend else count

        compiled = jax.jit(function).lower(x, codes, codes if segmented else None).compile()
        return compiled.as_text().count(" sort(")

    assert sorts(attend=True) == sorts(attend=False) > 0


def test_xla_memory_is_linear_in_the_length():
    """Forward and backward over 16,384 keys: doubling the length may at most double the temporaries."""

    def temporaries(length):
        shape = jax.ShapeDtypeStruct
        x, v = shape((1, length, 1, 16), jnp.float32), shape((1, length, 1, 32), jnp.float32)
        expiry = shape((1, length), jnp.int32)

        def loss(x, v, expiry):
            return ops.sparse_attention(
                x, x, v, ops.KeySet((ops.Lifetimes(8, expiry),)), implementation="xla"
            ).sum()

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x, v, expiry).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = temporaries(8_192), temporaries(16_384)
    assert large <= 2.2 * small
    # One t x t array of bytes would be more than twice this.
    assert large < 16_384**2 / 2


def test_bad_calls_say_which_argument():
    q, k, v = make_inputs(8)
    key_set = ops.KeySet((ops.Full(),))
    # Without the run-time shape checks of the tests, as a user has it.
    unchecked = inspect.unwrap(ops.sparse_attention)
    with pytest.raises(ValueError, match=r"`k` of sparse_attention must have shape \(b, t, h, n\)"):
        unchecked(q, k[:, :-1], v[:, :-1], key_set)
    with pytest.raises(ValueError, match="`empty_rows` of sparse_attention must be one of"):
        ops.sparse_attention(q, k, v, key_set, empty_rows="mean")
