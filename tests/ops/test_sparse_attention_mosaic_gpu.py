"""The Mosaic GPU kernels of sparse attention: interpreted and lowered on a CPU, in full on a GPU."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hax_jax import ops
from hax_jax.ops import lanes_mosaic_gpu
from hax_jax.ops.sparse_attention import chunks, mosaic_gpu, plan
from hax_jax.ops.sparse_attention.mosaic_gpu import TILE, building_blocks, carried_sums, dense
from tests.ops import mosaic_interpreter
from tests.ops.cases import (
    assert_close,
    make_segments,
    normal,
    poison_memory,
    relative_error,
    rng,
    with_gradients,
)
from tests.ops.test_sparse_attention import BATCH, SOURCES, make_key_set, run


def make_inputs(length, heads, n, e, dtype):
    g = rng(14, length)
    return tuple(normal(g, BATCH, length, heads, width, dtype=dtype) for width in (n, n, e))


def use(layout, monkeypatch):
    """Makes 'mosaic_gpu' use 'dense' tiles or 'chunks', whatever the length."""
    monkeypatch.setattr(mosaic_gpu, "MIN_LENGTH_OF_CHUNKS", 0 if layout == "chunks" else 1 << 30)


@pytest.fixture
def interpreted(monkeypatch):
    mosaic_interpreter.install()
    for module in (building_blocks, lanes_mosaic_gpu):
        monkeypatch.setattr(module, "interpret", mosaic_interpreter.SETTINGS)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("layout", "names", "length", "heads", "n", "e", "dtype", "segmented", "empty_rows"),
    [
        ("chunks", "hax", 40, 1, 16, 64, "bfloat16", False, "zero"),
        ("chunks", "hax", 40, 1, 8, 12, "float32", True, "zero"),
        ("chunks", "window", 40, 1, 16, 256, "float32", False, "zero"),
        # Three tiles; the second holds the end of one row and the beginning of the other.
        ("dense", "hax", 96, 1, 16, 64, "bfloat16", True, "zero"),
        ("dense", "all", 70, 2, 8, 140, "float32", False, "uniform"),
    ],
)
def test_interpreted_kernels_equal_the_reference(
    layout, names, length, heads, n, e, dtype, segmented, empty_rows, monkeypatch
):
    """Padded features, several blocks of values, segments, both dtypes, of what comes out too."""
    use(layout, monkeypatch)
    segment_ids = make_segments(rng(12), BATCH, length) if segmented else None
    key_set = make_key_set(SOURCES[names], length, segment_ids)
    inputs = make_inputs(length, heads, n, e, dtype)
    got, want = (
        run(inputs, key_set, segment_ids, form, empty_rows=empty_rows, dtype=dtype)
        for form in ("mosaic_gpu", "reference")
    )
    assert got[0].dtype == dtype
    assert_close(got, want, dtype)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("scores", ["falling", "random"])
def test_carried_gradients_are_added_up(scores):
    """Runs that go on for several blocks, and some that end in one; lists by the kernel and by a sort."""
    length, size = 20 * plan.CHUNK, 8
    g = rng(18)
    values = -np.arange(length) if scores == "falling" else g.standard_normal(length)
    expiry = ops.key_lifetimes(jnp.asarray(values, jnp.float32)[None], size, implementation="reference")
    source = ops.Lifetimes(size, expiry)
    listed, sorted_ = (
        plan.make_plan(source, None, (1, length), 32, alive) for alive in (TILE.alive_at_chunks, None)
    )
    np.testing.assert_array_equal(np.sort(listed.keys, axis=1), np.sort(sorted_.keys, axis=1))
    for laid_out in (listed, sorted_):
        rows = normal(g, 1, *laid_out.keys.shape, 128)
        got, (want,) = (
            carried_sums.sum_of_slots(laid_out, rows),
            chunks.XLA_TILE.sums(laid_out, (rows,), 64, 64),
        )
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.timeout(600)
def test_dense_tiles_with_nothing_visible_are_skipped(monkeypatch):
    """Windows shorter than a tile: the forward pass notes the diagonal and its neighbour, nothing else."""
    length, batch = 256, 1
    q, k, v = (normal(rng(16, index), batch, length, 1, 16, dtype=jnp.bfloat16) for index in range(3))
    v = jnp.pad(v, [(0, 0)] * 3 + [(0, 48)])
    key_set = ops.KeySet((ops.SlidingWindow(9),))
    *_, (by_query, by_key) = dense._forward(q, k, v, key_set, None, 0.2, "float32")[1]
    for tile in range(4):
        for visited, count in ((by_query[tile], tile + 1), (by_key[tile], 4 - tile)):
            np.testing.assert_array_equal(visited[:count], np.arange(count) <= 1)


def test_dense_tiles_end_where_segments_and_rows_do():
    """The tiles that a tile looks at, from the ids, against those that share a row and a segment."""
    for length, segmented in ((200, True), (130, False), (128, True), (1, True), (64, False)):
        ids = make_segments(rng(17), 3, length) // (40 if length == 200 else 1)
        ids = jnp.sort(ids, axis=1) if segmented else None
        laid_out = dense._lay_out(ops.KeySet((ops.Full(),)), ids, (3, length))
        group = np.arange(3)[:, None] * 10_000 + np.asarray(0 if ids is None else ids)
        group = np.broadcast_to(group, (3, length))
        group = np.pad(group.reshape(-1), (0, -group.size % 64), constant_values=-(10**9)).reshape(-1, 64)
        shared = (group[:, None, :, None] == group[None, :, None, :]).any((2, 3))
        tile = np.arange(len(group))
        furthest = [shared[t].argmax() for t in tile], [np.flatnonzero(shared[t])[-1] for t in tile]
        walks = laid_out.walks_of_queries, laid_out.walks_of_keys
        for (order, found), expected in zip(walks, furthest, strict=True):
            np.testing.assert_array_equal(found, expected)
            np.testing.assert_array_equal(np.sort(order), tile)
            if ids is None:
                # Nothing but rows ends a walk: no tile walks further than one before it in the order.
                assert (np.diff(np.abs(found - tile)[order]) <= 0).all()


@pytest.mark.parametrize(
    ("layout", "names", "n", "e", "dtype"),
    [
        ("chunks", "hax", 32, 128, "bfloat16"),
        ("chunks", "hax", 64, 64, "float32"),
        ("chunks", "window", 16, 1024, "bfloat16"),
        ("chunks", "sink", 128, 4096, "bfloat16"),
        ("chunks", "window", 128, 128, "float32"),
        ("dense", "hax", 32, 128, "bfloat16"),
        ("dense", "all", 64, 64, "float32"),
        ("dense", "full", 16, 1024, "bfloat16"),
        ("dense", "dilated", 128, 4096, "float32"),
    ],
)
def test_kernels_lower_for_hopper(layout, names, n, e, dtype, monkeypatch):
    """Layouts, shapes and shared memory, as far as they can be checked without a GPU."""
    # Made while None still means what this machine can run.
    key_set = make_key_set(SOURCES[names], 200, None)
    monkeypatch.setattr(ops.dispatch, "missing_for_mosaic_gpu", lambda: None)
    use(layout, monkeypatch)

    def loss(inputs):
        return ops.sparse_attention(*inputs, key_set, implementation="mosaic_gpu").sum()

    traced = jax.jit(jax.grad(loss)).trace(make_inputs(200, 2, n, e, dtype))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    # Forward, gradient of the queries, gradients of keys and values, for every source.
    assert len(re.findall("custom_call @mosaic_gpu", text)) >= 3


def test_calls_that_the_kernels_cannot_run(monkeypatch):
    length = 20
    inputs = make_inputs(length, 1, 8, 12, "float32")
    key_set = make_key_set(SOURCES["hax"], length, None)
    call = functools.partial(ops.sparse_attention, implementation="mosaic_gpu")
    if ops.dispatch.missing_for_mosaic_gpu():
        with pytest.raises(
            ValueError, match="sparse_attention cannot be 'mosaic_gpu' here: needs an NVIDIA Hopper GPU"
        ):
            call(*inputs, key_set)
    monkeypatch.setattr(ops.dispatch, "missing_for_mosaic_gpu", lambda: None)
    with pytest.raises(ValueError, match="all bfloat16 or all float32, got float32, float32, bfloat16"):
        call(*inputs[:2], inputs[2].astype(jnp.bfloat16), key_set)
    with pytest.raises(ValueError, match="at most 128 features, got 200"):
        call(*make_inputs(length, 1, 200, 12, "float32"), key_set)


GPU_CASES = [
    # layout, names, length, heads, n, e, dtype, segmented
    ("chunks", "hax", 1057, 1, 32, 128, "bfloat16", True),
    ("chunks", "hax", 1057, 1, 32, 128, "float32", True),
    ("chunks", "hash", 333, 2, 16, 256, "float32", False),
    ("chunks", "lifetimes", 129, 1, 64, 64, "bfloat16", False),
    ("chunks", "window", 3, 1, 128, 64, "float32", False),
    ("chunks", "sink", 4099, 1, 20, 100, "bfloat16", True),
    ("chunks", "hax", 200, 1, 128, 4096, "bfloat16", False),
    ("dense", "hax", 1057, 1, 32, 128, "bfloat16", True),
    ("dense", "hax", 1057, 1, 32, 128, "float32", False),
    ("dense", "all", 1057, 2, 64, 64, "bfloat16", True),
    ("dense", "full", 333, 2, 16, 256, "float32", False),
    ("dense", "dilated", 129, 1, 20, 100, "bfloat16", True),
    ("dense", "hash", 1, 1, 128, 64, "float32", False),
    ("dense", "lifetimes", 200, 1, 128, 4096, "float32", True),
    ("dense", "full", 2051, 1, 128, 320, "bfloat16", False),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("layout", "names", "length", "heads", "n", "e", "dtype", "segmented"), GPU_CASES)
def test_kernels_equal_the_reference_on_a_gpu(
    layout, names, length, heads, n, e, dtype, segmented, monkeypatch
):
    use(layout, monkeypatch)
    segment_ids = make_segments(rng(12), BATCH, length) if segmented else None
    key_set = make_key_set(SOURCES[names], length, segment_ids)
    inputs = make_inputs(length, heads, n, e, dtype)
    want = run(jax.tree.map(lambda x: x.astype(jnp.float32), inputs), key_set, segment_ids, "reference")
    poison_memory()
    got = run(inputs, key_set, segment_ids, "mosaic_gpu")
    assert_close(got, want, dtype)
    poison_memory()
    again = run(inputs, key_set, segment_ids, "mosaic_gpu")
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["random", "one bucket", "one key", "rising", "falling", "equal"])
def test_inputs_made_to_hurt_stay_exact_on_a_gpu(kind):
    """At 16,384 positions; against the XLA form, which the reference holds at lengths that it can."""
    length, size = 16_384, 32
    g = rng(15)
    codes = [jnp.asarray(g.integers(0, 256, (1, length)), jnp.int32) for _ in "qk"]
    scores = normal(g, 1, length)
    if kind == "one bucket":
        codes = [jnp.zeros_like(code) for code in codes]
    elif kind == "one key":
        codes = [jnp.zeros_like(codes[0]), jnp.where(jnp.arange(length) == 3, 0, 1)[None].astype(jnp.int32)]
        scores = scores.at[0, 3].set(100.0)
    elif kind in ("rising", "falling"):
        scores = jnp.arange(length, dtype=jnp.float32)[None] * (1 if kind == "rising" else -1)
    elif kind == "equal":
        scores = jnp.zeros_like(scores)
    count, order = ops.bucket_orders(*codes, num_codes=256)
    buckets = ops.HashBuckets(size, codes[0], count, codes[1], order, 256)
    lifetimes = ops.Lifetimes(size, *ops.key_lifetimes_and_alive(scores, size))
    key_set = ops.KeySet((buckets, lifetimes))
    inputs = tuple(normal(g, 1, length, 1, 64, dtype=jnp.bfloat16) for _ in "qkv")
    got = run(inputs, key_set, None, "mosaic_gpu")
    want = run(jax.tree.map(lambda x: x.astype(jnp.float32), inputs), key_set, None, "xla")
    assert_close(got, want, "bfloat16")


@pytest.mark.gpu
def test_tiles_of_kernels_and_of_xla_agree_on_a_gpu():
    """The two implementations of `chunks.Tile`, float32, to float32's rounding."""
    key_set = make_key_set(SOURCES["hax"], 500, None)
    inputs = make_inputs(500, 1, 32, 128, "float32")

    def attend(tile):
        arguments = (key_set, None, 0.2, False)
        return with_gradients(lambda x: chunks.sparse_attention(*x, *arguments, tile=tile), inputs)

    for a, b in zip(jax.tree.leaves(attend(TILE)), jax.tree.leaves(attend(chunks.XLA_TILE)), strict=True):
        assert relative_error(a, b) < 2e-6
