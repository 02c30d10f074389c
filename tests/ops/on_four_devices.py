"""What four simulated devices make of every op's kernels: python tests/ops/on_four_devices.py.

Prints JSON: for each op how far the divided form is from the whole one, outputs and gradients, how many
arrays are gathered for it, and the kernels (their operands' and results' types) as lowered for Hopper GPUs:
on four, and on one with a quarter of the batch.
"""

import importlib
import json
import pathlib
import re
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from hax_jax import ops
from hax_jax.ops import dispatch, segments
from hax_jax.training.sharding import make_mesh
from tests.ops.cases import make_segments, normal, relative_error, rng, with_gradients

BATCH, LENGTH, WIDTH, STATES, HEADS = 8, 32, 32, 16, 8
# The package hides its folders behind the functions of the same names.
FORMS = {
    name: importlib.import_module(f"hax_jax.ops.{name}").IMPLEMENTATIONS
    for name in (
        "causal_conv1d",
        "ssd",
        "selective_scan",
        "gated_rms_norm",
        "key_scores",
        "normed_running_sum",
        "sparse_attention",
        "lsh",
        "key_selection",
    )
}
KERNELS = {name: forms["mosaic_gpu"] for name, forms in FORMS.items()}


def call_attention(form, q, k, v, codes, scores, ids):
    """HAX's two sources and one of positions, whose array has no batch without segments."""
    count, order = ops.bucket_orders(codes, codes, segment_ids=ids, implementation=form)
    expiry = ops.key_lifetimes(scores, 3, segment_ids=ids, implementation=form)
    sources = (
        ops.HashBuckets(3, codes, count, codes, order),
        ops.Lifetimes(3, expiry),
        ops.Sink(2, segments.positions(jnp.zeros((1, q.shape[1]), jnp.int32))),
    )
    return ops.sparse_attention(
        *(x[:, :, None] for x in (q, k, v)), ops.KeySet(sources), segment_ids=ids, implementation=form
    )


def cases(batch: int):
    """By name: call(form, floats, integers), the floats, and the integers."""
    g = rng(3)
    # As many heads as rows, so that nothing is divided by its size alone.
    x, gate = (normal(g, batch, LENGTH, WIDTH) for _ in "xg")
    B, C = (normal(g, batch, LENGTH, STATES) for _ in "BC")
    heads = normal(g, batch, LENGTH, HEADS, 16)
    by_head, A = jax.nn.softplus(normal(g, batch, LENGTH, HEADS)), -jnp.exp(normal(g, HEADS))
    weight, bias, by_channel = normal(g, 4, WIDTH), normal(g, WIDTH), -jnp.exp(normal(g, WIDTH, STATES))
    ids = make_segments(g, batch, LENGTH)
    mask = jnp.asarray(g.random((batch, LENGTH)) < 0.8)
    codes = jnp.asarray(g.integers(0, 3, (batch, LENGTH)), jnp.int32)
    start = normal(g, batch, WIDTH, STATES)
    hidden = 2 * STATES
    shapes = ((hidden, hidden), (hidden,), (hidden, hidden), (hidden,), (hidden, 1), (1,))
    network = [normal(g, *shape) / 4 for shape in shapes]
    return {
        "causal_conv1d": (
            lambda form, f, i: ops.causal_conv1d(
                *f, segment_ids=i[0], mask=i[1], sizes=(WIDTH - 8, 8), implementation=form
            ),
            (x, weight, bias),
            (ids, mask),
        ),
        "ssd": (
            lambda form, f, i: ops.ssd(*f[:5], D=f[5], segment_ids=i[0], implementation=form),
            (heads, by_head, A, B[:, :, None], C[:, :, None], normal(g, HEADS)),
            (ids,),
        ),
        "selective_scan": (
            lambda form, f, i: ops.selective_scan(
                *f[:5], D=f[5], initial_state=f[6], segment_ids=i[0], softplus=True, implementation=form
            ),
            (x, gate, by_channel, B, C, bias, start),
            (ids,),
        ),
        "gated_rms_norm": (
            lambda form, f, i: ops.gated_rms_norm(*f, 1e-5, implementation=form),
            (x, gate, bias),
            (),
        ),
        "normed_running_sum": (
            lambda form, f, i: ops.normed_running_sum(*f, segment_ids=i[0], implementation=form),
            (B,),
            (ids,),
        ),
        "key_scores": (lambda form, f, i: ops.key_scores(*f, implementation=form), (B, C, *network), ()),
        "sparse_attention": (
            lambda form, f, i: call_attention(form, *f, *i),
            (B, C, x),
            (codes, x[..., 0], ids),
        ),
        "sparse_attention, one segment a row": (
            lambda form, f, i: call_attention(form, *f, *i, None),
            (B, C, x),
            (codes, x[..., 0]),
        ),
    }


def put(tree, batch: int):
    """On all devices: what has a batch divided, the rest repeated."""
    mesh = make_mesh()

    def place(x):
        spec = PartitionSpec("data") if x.shape[:2] == (batch, LENGTH) else PartitionSpec()
        return jax.device_put(x, NamedSharding(mesh, spec))

    return jax.tree.map(place, tree)


def compare(case, batch: int):
    """The largest error of outputs and gradients, from the same without a mesh, and the number of gathers."""
    call, floats, integers = case
    want = with_gradients(lambda f: call("mosaic_gpu", f, integers), floats)
    with jax.set_mesh(make_mesh()):
        floats, integers = put((floats, integers), batch)
        got = with_gradients(lambda f: call("mosaic_gpu", f, integers), floats)
        # The integers as arguments: constants would hide whether they are gathered.
        compiled = jax.jit(lambda f, i: call("mosaic_gpu", f, i)).lower(floats, integers).compile()
    errors = map(relative_error, *map(jax.tree.leaves, (got, want)))
    return max(errors), compiled.as_text().count("all-gather(")


def lowered(case):
    """The kernels of outputs and gradients as they would be compiled for a GPU."""
    call, floats, integers = case
    total = lambda f, i: sum(x.astype(jnp.float32).sum() for x in jax.tree.leaves(call("mosaic_gpu", f, i)))  # noqa: E731
    traced = jax.jit(jax.value_and_grad(total)).trace(floats, integers)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    return sorted(re.findall(r"custom_call @mosaic_gpu.* : (\(tensor.*)$", text, re.MULTILINE))


def main() -> None:
    """Compares, then lowers."""
    assert jax.device_count() == 4
    found = {}
    for forms in FORMS.values():
        # Kernels need a GPU; their references stand in for them: what divides them is the same.
        forms["mosaic_gpu"] = forms["reference"]
    for name, case in cases(BATCH).items():
        found[name] = dict(zip(("error", "gathers"), compare(case, BATCH), strict=True))
    for name, forms in FORMS.items():
        forms["mosaic_gpu"] = KERNELS[name]
    dispatch.missing_for_mosaic_gpu = lambda: None
    small, large = cases(BATCH // 4), cases(BATCH)
    for name in FORMS.keys() & large.keys():
        found[name]["on_one"] = lowered(small[name])
        with jax.set_mesh(make_mesh()):
            found[name]["on_four"] = lowered((large[name][0], *put(large[name][1:], BATCH)))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
