"""Hash orders and lifetimes: integers, equal to the reference to the last one, ties included."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hax_jax import ops
from hax_jax.ops import lanes_mosaic_gpu, pairs_mosaic_gpu, running_best_mosaic_gpu, sorting
from tests.ops import mosaic_interpreter
from tests.ops.cases import lengths, make_segments, rng, segmented

BATCH = 3


@lengths
@segmented
def test_bucket_orders_equal_the_reference(length, segmented):
    g = rng(5, length)
    segment_ids = make_segments(g, BATCH, length) if segmented else None
    fast, reference = (
        jax.jit(functools.partial(ops.bucket_orders, segment_ids=segment_ids, implementation=form))
        for form in ("xla", "reference")
    )
    for num_codes in (1, 4, 300):
        codes = [jnp.asarray(g.integers(0, num_codes, (BATCH, length)), jnp.int32) for _ in "qk"]
        for a, b in zip(fast(*codes), reference(*codes), strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_bucket_shows_its_most_recent_keys():
    """The rule over counts and orders against the sentence that defines it."""
    g = rng(6)
    length, size = 50, 3
    codes = [jnp.asarray(g.integers(0, 4, (1, length)), jnp.int32) for _ in "qk"]
    count, order = ops.bucket_orders(*codes)
    key_set = ops.KeySet((ops.HashBuckets(size, codes[0], count, codes[1], order),))
    visible = np.asarray(key_set.tile(jnp.arange(length), jnp.arange(length)))[0]
    query_code, key_code = (np.asarray(code)[0] for code in codes)
    for i in range(length):
        same = [j for j in range(i + 1) if key_code[j] == query_code[i]]
        assert set(np.flatnonzero(visible[i])) == set(same[-size:])


SCORES = {
    "random": lambda g, t: g.standard_normal((BATCH, t)),
    "ties": lambda g, t: g.integers(0, 3, (BATCH, t)),
    "equal": lambda g, t: np.zeros((BATCH, t)),
    "rising": lambda g, t: np.tile(np.arange(t), (BATCH, 1)),
    "falling": lambda g, t: np.tile(-np.arange(t), (BATCH, 1)),
    "signed zeros": lambda g, t: np.where(g.random((BATCH, t)) < 0.5, 0.0, -0.0),
}


@lengths
@segmented
@pytest.mark.parametrize("num_keys", [1, 4, 200])
def test_lifetimes_equal_the_reference(length, segmented, num_keys):
    g = rng(7, length)
    segment_ids = make_segments(g, BATCH, length) if segmented else None
    fast, reference = (lifetimes(num_keys, form, segment_ids) for form in ("xla", "reference"))
    for kind, make in SCORES.items():
        scores = jnp.asarray(make(g, length), jnp.float32)
        np.testing.assert_array_equal(fast(scores), reference(scores), err_msg=kind)


@functools.cache
def lifetimes_of_row(num_keys: int, form: str):
    return lifetimes(num_keys, form)


def lifetimes(num_keys: int, form: str, segment_ids=None):
    return jax.jit(lambda x: ops.key_lifetimes(x, num_keys, segment_ids=segment_ids, implementation=form))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=24, max_size=24), st.sampled_from([1, 2, 5]))
def test_a_query_sees_the_best_keys_of_its_prefix(scores, num_keys):
    """Both forms against the definition: the k best of the prefix, of equal ones the earlier."""
    for form in ("reference", "xla"):
        expiry = np.asarray(lifetimes_of_row(num_keys, form)(jnp.asarray([scores], jnp.float32)))[0]
        for i in range(len(scores)):
            best = sorted(range(i + 1), key=lambda j: (-scores[j], j))[:num_keys]
            assert {j for j in range(i + 1) if i < expiry[j]} == set(best)
        lifetimes = np.maximum(expiry - np.arange(len(scores)), 0)
        assert lifetimes.sum() <= num_keys * len(scores)


def test_bfloat16_scores_keep_the_tie_rule():
    scores = jnp.asarray(rng(8).standard_normal((2, 300)), jnp.bfloat16)
    assert len(np.unique(np.asarray(scores, np.float32))) < scores.size
    got = ops.key_lifetimes(scores, 8)
    np.testing.assert_array_equal(
        got, ops.key_lifetimes(scores.astype(jnp.float32), 8, implementation="reference")
    )


@pytest.mark.parametrize("op", ["lifetimes", "orders"])
def test_integer_ops_stay_linear_in_memory(op):
    """Doubling the length may at most double the temporaries; a t x k array of 64 keys would be larger."""

    def temporaries(length):
        vector = jax.ShapeDtypeStruct((1, length), jnp.float32 if op == "lifetimes" else jnp.int32)
        function = jax.jit(
            lambda x: ops.key_lifetimes(x, 64) if op == "lifetimes" else ops.bucket_orders(x, x)
        )
        return function.lower(vector).compile().memory_analysis().temp_size_in_bytes

    small, large = temporaries(32_768), temporaries(65_536)
    # One more pass for the one more bit of the positions.
    assert large <= 2.2 * small
    assert large < 4 * 64 * 65_536


def test_hash_codes():
    x = jnp.asarray([[[1.0, 2.0], [-1.0, 0.5], [0.0, 0.0]]])
    projection = jnp.asarray([[1.0, 0.0, -1.0], [0.0, 1.0, 0.0]])
    # Bits from the least significant: x0 > 0, x1 > 0, -x0 > 0; exactly 0 is no bit.
    np.testing.assert_array_equal(ops.sign_hash(x, projection), [[0b011, 0b110, 0]])
    np.testing.assert_array_equal(ops.argmax_hash(x, projection), [[1, 2, 0]])
    with pytest.raises(ValueError, match=r"must have 1\.\.31 columns, got 32; lower num_hash"):
        ops.sign_hash(jnp.ones((1, 1, 2)), jnp.ones((2, 32)))


def test_ranking_loss_leaves_out_invalid_keys():
    g = rng(9)
    scores, targets = (jnp.asarray(g.standard_normal((2, 6)), jnp.float32) for _ in "st")
    valid = jnp.asarray([[True] * 4 + [False] * 2] * 2)
    np.testing.assert_allclose(
        ops.ranking_loss(scores, targets, valid), ops.ranking_loss(scores[:, :4], targets[:, :4]), rtol=1e-6
    )
    assert ops.ranking_loss(scores, targets, jnp.zeros_like(valid)) == 0


def test_bad_calls_say_which_argument():
    scores = jnp.zeros((1, 4))
    with pytest.raises(ValueError, match="`num_keys` of key_lifetimes must be at least 1, got 0"):
        ops.key_lifetimes(scores, 0)
    with pytest.raises(ValueError, match="`implementation` of key_lifetimes must be None or one of"):
        ops.key_lifetimes(scores, 1, implementation="triton")


@pytest.mark.parametrize("radix", [False, True], ids=["rows", "radix"])
def test_long_rows_sort_as_short_ones_do(radix, monkeypatch):
    """The two sorts behind orders and lifetimes, on the same rows."""
    monkeypatch.setattr(sorting, "MIN_LENGTH_OF_RADIX", 0 if radix else 1 << 30)
    g = rng(8)
    length = 70
    segment_ids = make_segments(g, BATCH, length)
    codes = [jnp.asarray(g.integers(-3, 4, (BATCH, length)), jnp.int32) for _ in "qk"]
    scores = jnp.asarray(g.integers(-2, 3, (BATCH, length)) * 0.5, jnp.float32)
    for ids in (None, segment_ids):
        got, want = (
            (
                *ops.bucket_orders(*codes, segment_ids=ids, implementation=form),
                ops.key_lifetimes(scores, 3, segment_ids=ids, implementation=form),
            )
            for form in ("xla", "reference")
        )
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b)


def test_descending_keys_order_every_dtype():
    values = [3.0, 0.5, 0.0, -0.0, -1e-30, -2.0, -jnp.inf, jnp.inf, 1e30]
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        x = jnp.asarray(values, dtype)
        keys = np.asarray(sorting.descending(x))
        x = np.asarray(x, np.float64)
        np.testing.assert_array_equal(keys[:, None] < keys, x[:, None] > x)


@pytest.fixture
def interpreted(monkeypatch):
    mosaic_interpreter.install()
    for module in (pairs_mosaic_gpu, lanes_mosaic_gpu):
        monkeypatch.setattr(module, "interpret", mosaic_interpreter.SETTINGS)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("length", "segmented", "parts"), [(140, True, 8), (300, False, 2)], ids=["segments", "unequal parts"]
)
def test_interpreted_kernels_equal_the_reference(length, segmented, parts, monkeypatch):
    monkeypatch.setattr(pairs_mosaic_gpu, "MAX_PARTS", parts)
    assert_kernels_equal_the_reference(2, length, 4, segmented)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("batch", "length", "num_keys", "segmented"), [(1, 600, 5, False), (2, 333, 40, False), (2, 333, 4, True)]
)
def test_interpreted_kernels_for_long_rows_equal_the_reference(
    batch, length, num_keys, segmented, monkeypatch
):
    """Groups of two chunks, scanned four at a time, so that there are groups of groups."""
    monkeypatch.setattr(pairs_mosaic_gpu, "MAX_LENGTH", 0)
    monkeypatch.setattr(running_best_mosaic_gpu, "CHUNKS_OF_GROUP", 2)
    monkeypatch.setattr(running_best_mosaic_gpu, "GROUP", 2 * running_best_mosaic_gpu.CHUNK)
    monkeypatch.setattr(running_best_mosaic_gpu, "SCANNED", 2 * running_best_mosaic_gpu.LANES)
    g = rng(10, length)
    segment_ids = None
    if segmented:
        segment_ids = jnp.asarray(np.cumsum(g.random((batch, length)) < 0.02, axis=1), jnp.int32)
    # Ties, and a slope so that keys come and go all the time.
    scores = jnp.asarray(g.integers(-9, 9, (batch, length)) + np.arange(length) // 8, jnp.float32)
    (got, alive), (want, none) = (
        ops.key_lifetimes_and_alive(scores, num_keys, segment_ids=segment_ids, implementation=form)
        for form in ("mosaic_gpu", "reference")
    )
    assert none is None
    np.testing.assert_array_equal(got, want)
    # The batch as one list of positions, in which a row is at least one segment.
    ids = np.arange(batch)[:, None] * length + np.asarray(0 if segment_ids is None else segment_ids)
    ids = np.broadcast_to(ids, (batch, length)).reshape(-1)
    last_seen = (np.asarray(want) + length * np.arange(batch)[:, None]).reshape(-1)
    last_seen = np.minimum(last_seen, np.searchsorted(ids, ids, side="right"))
    again = running_best_mosaic_gpu.alive_at_chunks(jnp.asarray(last_seen, jnp.int32), num_keys)
    for found in (alive, again):
        for chunk, keys in enumerate(np.asarray(found)):
            begin = chunk * running_best_mosaic_gpu.CHUNK
            expected = np.flatnonzero(last_seen[:begin] > begin)
            np.testing.assert_array_equal(np.sort(keys[keys < ids.size]), expected)


def test_kernels_lower_for_hopper(monkeypatch):
    monkeypatch.setattr(ops.dispatch, "missing_for_mosaic_gpu", lambda: None)
    codes, scores = jnp.zeros((3, 1057), jnp.int32), jnp.zeros((3, 1057))
    for function, arguments, num_kernels in (
        (lambda x: ops.bucket_orders(x, x, implementation="mosaic_gpu"), codes, 1),
        (lambda x: ops.key_lifetimes(x, 32, implementation="mosaic_gpu"), scores, 1),
    ):
        text = jax.jit(function).trace(arguments).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("custom_call @mosaic_gpu") == num_kernels


@pytest.mark.parametrize(("length", "num_kernels"), [(16_384, 3), (1 << 20, 5)])
def test_kernels_for_long_rows_lower_for_hopper(length, num_kernels, monkeypatch):
    monkeypatch.setattr(ops.dispatch, "missing_for_mosaic_gpu", lambda: None)
    scores = jax.ShapeDtypeStruct((1, length), jnp.float32)
    traced = jax.jit(lambda x: ops.key_lifetimes(x, 32, implementation="mosaic_gpu")).trace(scores)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == num_kernels


def test_kernels_say_what_they_need():
    if not ops.dispatch.missing_for_mosaic_gpu():
        pytest.skip("there is a GPU that they can run on")
    with pytest.raises(
        ValueError, match="key_lifetimes cannot be 'mosaic_gpu' here: needs an NVIDIA Hopper GPU"
    ):
        ops.key_lifetimes(jnp.zeros((1, 4)), 2, implementation="mosaic_gpu")
    with pytest.raises(
        ValueError, match="bucket_orders cannot be 'mosaic_gpu' here: needs an NVIDIA Hopper GPU"
    ):
        ops.bucket_orders(*[jnp.zeros((1, 4), jnp.int32)] * 2, implementation="mosaic_gpu")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("batch", "length"), [(64, 1057), (3, 4096), (2, 1), (1, 20_000), (3, 5_001), (1, 262_147)]
)
@segmented
def test_kernels_equal_the_reference_on_a_gpu(batch, length, segmented):
    assert_kernels_equal_the_reference(batch, length, 32, segmented)


def assert_kernels_equal_the_reference(batch, length, num_keys, segmented):
    """Long rows against the sorts of 'xla': the reference would need all pairs at once."""
    form = "reference" if batch * length**2 <= 1 << 27 else "xla"
    g = rng(9, length)
    segment_ids = make_segments(g, batch, length) if segmented else None
    codes = [jnp.asarray(g.integers(0, 5, (batch, length)), jnp.int32) for _ in "qk"]
    scores = jnp.asarray(g.integers(-9, 9, (batch, length)), jnp.float32)
    got, want = (
        (
            *ops.bucket_orders(*codes, segment_ids=segment_ids, implementation=name),
            ops.key_lifetimes(scores, num_keys, segment_ids=segment_ids, implementation=name),
        )
        for name in ("mosaic_gpu", form)
    )
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)
