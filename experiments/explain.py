"""Looks into a trained mamba2_hax: what its sparse attention sees, what it needs, and how far it carries.

    python experiments/explain.py WORKDIR [--out=results/explained/NAME.json]

Minutes on a laptop; the items are made on the spot. The file holds, for the best checkpoint of a run:

- `item`: one real item, and the keys that each source shows to each scored query;
- `offsets`: the share of scored queries that see the position so many places after their answer, and the
  weight that attention puts there, by layer and source;
- `kinds`: where attention looks, by kinds of tokens: mean weights of queries of a kind on keys of a kind;
- `buckets`: how many keys share a hash code in the largest tables;
- `ablations`: accuracy with branches taken out, and with other hash projections;
- `larger`: accuracy on tables larger than any in training, with the number of token ids never trained.

experiments/plot_explained.py draws it.

Exit status: 0 done, 1 no whole checkpoint, 2 bad input, said in one line.
"""

import dataclasses
import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import Any

# Works from a checkout that is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from experiments import results
from hax_jax.config import ConfigError, DataConfig
from hax_jax.data import make_split
from hax_jax.data.batch import Batch
from hax_jax.data.joint_recall import FIRST_VALUE, SEPARATOR, first_context, first_key
from hax_jax.layers.hax import BranchOutput, RoutingDraws
from hax_jax.ops import HashBuckets, KeySet
from hax_jax.training import Trained, TrainingError, environment, load, recall, score
from hax_jax.training.evaluate import Evaluator
from hax_jax.training.files import plain
from hax_jax.training.relabel import RelabeledSplit, check_fits
from hax_jax.training.sharding import make_mesh, put_replicated
from hax_jax.training.state import Purpose
from hax_jax.training.step import sequence_accuracy

FOLDER = results.CHECKOUT / results.FOLDER / "explained"
FIELDS = ("name", "step", "item", "offsets", "kinds", "buckets", "ablations", "larger")
KINDS = (
    "start",
    "separator",
    "told value",
    "told key",
    "told context",
    "asked value",
    "asked key",
    "asked context",
)
# The value's key, the value, and as far on as a convolution of four positions still holds it.
OFFSETS = (-1, 0, 1, 2, 3)
LARGER = ((16, 16), (17, 16), (20, 16), (32, 16), (16, 17), (16, 20), (20, 20), (32, 32))


def main(argv: Sequence[str]) -> int:
    """Runs the command line, program name first, and returns the exit status."""
    try:
        options = _options(argv)
        trained = load(options.workdir, say=lambda text: print(text, file=sys.stderr))
        if not trained.experiment.model.sources:
            raise ConfigError(
                "workdir", "a model with sparse attention", str(options.workdir), "name another"
            )
        result = explain(trained, options)
    except ConfigError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except (TrainingError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    command = shlex.join(["python", *argv[:1], "WORKDIR", *argv[2:]])
    found = environment.describe()
    where = {name: found[name] for name in ("device", "versions")} | environment.commit()
    header = {"format_version": results.FORMAT_VERSION, "name": trained.experiment.name, "command": command}
    out = options.out or FOLDER / f"{trained.experiment.name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(results.to_text(plain({**header, **where, "step": trained.step, **result})) + "\n")
    print(f"result: {out}")
    return 0


def _options(argv: Sequence[str]) -> Any:
    parser = results.Parser(__doc__)
    parser.add_argument("workdir", type=pathlib.Path, metavar="WORKDIR")
    parser.add_argument("--out", type=pathlib.Path, help="default results/explained/NAME.json")
    parser.add_argument("--n_context", type=int, default=8, help="of the item that is shown; default 8")
    parser.add_argument("--n_key", type=int, default=8, help="of the item that is shown; default 8")
    parser.add_argument("--items", type=int, default=24, help="items of each other measurement; default 24")
    parser.add_argument("--batch_size", type=int, default=8, help="items at once; default 8")
    return parser.parse_args(argv[1:])


def explain(trained: Trained, options: Any) -> dict[str, Any]:
    """All measurements of one model."""
    run = jax.jit(
        lambda batch: trained.model(batch.tokens, padding_mask=batch.padding_mask, key=jax.random.key(0))
    )
    task = dataclasses.replace(
        trained.experiment.data, eval_source="stream", train_source="stream", data_dir="", packing=0
    )
    shown = _batch(task, options.n_context, options.n_key, 1)
    largest = _batch(task, task.max_n_context, task.max_n_key, options.batch_size)
    output = run(largest)
    return {
        "sources": list(trained.experiment.model.sources),
        "item": item(run(shown), shown),
        "offsets": offsets(output, largest),
        "kinds": kinds(output, largest, task),
        "buckets": buckets(output, largest, trained.experiment.model.num_hash),
        "ablations": ablations(trained, task, options, output, largest),
        "larger": larger(trained, task, options),
    }


def item(output: Any, batch: Batch) -> dict[str, Any]:
    """The first item of a batch: its tokens, and what its scored queries see.

    `visible[layer][source][query]` lists key positions; queries stand in the order of `query`.
    """
    assert batch.scored is not None
    count = int(batch.n_context[0] * batch.n_key[0])
    queries = np.asarray(batch.scored.position[0, :count])
    right = np.asarray(output.logits[0, queries].argmax(-1) == batch.targets[0, queries])
    return {
        "n_context": int(batch.n_context[0]),
        "n_key": int(batch.n_key[0]),
        "tokens": batch.tokens[0].tolist(),
        "query": queries.tolist(),
        "answer": recall.answer_positions(batch)[0, :count].tolist(),
        "right": right.tolist(),
        "visible": [
            [[np.flatnonzero(row).tolist() for row in mask[0, queries]] for mask in masks]
            for masks in _masks(output)
        ],
    }


def offsets(output: Any, batch: Batch) -> dict[str, Any]:
    """Shares of scored queries that see the position at each offset from their answer; weights there.

    `visible[layer][source][offset]` and `weight[layer][offset]`, means over all scored queries.
    """
    assert batch.scored is not None
    asked = np.asarray(batch.scored.position)
    told = np.asarray(recall.answer_positions(batch))
    used = asked >= 0
    rows, queries = np.broadcast_to(np.arange(len(asked))[:, None], asked.shape)[used], asked[used]
    keys = [told[used] + offset for offset in OFFSETS]
    found: dict[str, Any] = {"visible": [], "weight": []}
    for layer, masks in zip(output.layers, _masks(output), strict=True):
        found["visible"].append(
            [[round(float(mask[rows, queries, key].mean()), 5) for key in keys] for mask in masks]
        )
        weights = _weights(layer.branch, np.logical_or.reduce(masks))
        found["weight"].append([round(float(weights[rows, queries, key].mean()), 5) for key in keys])
    sizes = {"n_context": int(batch.n_context[0]), "n_key": int(batch.n_key[0])}
    return {**sizes, "num_queries": int(used.sum()), "offset": list(OFFSETS), **found}


def kinds(output: Any, batch: Batch, task: DataConfig) -> dict[str, Any]:
    """Mean weights by kinds of tokens: `weight[layer][kind of query][kind of key]`, in the order of `kind`.

    'told' tokens stand before the separator, 'asked' ones after it.
    """
    member = np.eye(len(KINDS))[kind_numbers(batch, task)] * np.asarray(batch.padding_mask)[..., None]
    weight = []
    for layer, masks in zip(output.layers, _masks(output), strict=True):
        weights = _weights(layer.branch, np.logical_or.reduce(masks))
        total = np.einsum("btk,bts,bsl->kl", member, weights, member, optimize=True)
        weight.append(np.round(total / member.sum((0, 1))[:, None], 4).tolist())
    return {"kind": list(KINDS), "weight": weight}


def kind_numbers(batch: Batch, task: DataConfig) -> np.ndarray:
    """Which of `KINDS` each token is, (b, t); of no meaning at pads."""
    tokens, position = np.asarray(batch.tokens), np.arange(batch.tokens.shape[1])
    asked = (tokens == SEPARATOR).argmax(1)[:, None] < position
    first = np.searchsorted([FIRST_VALUE, first_key(task), first_context(task)], tokens, side="right")
    # 0 for the two marks; then values, keys and contexts, told ones first.
    return np.where(first == 0, np.where(tokens == SEPARATOR, 1, 0), 1 + first + 3 * asked)


def buckets(output: Any, batch: Batch, num_hash: int) -> list[dict[str, Any]]:
    """How full hash buckets are, layer by layer: the mean number of keys of the fullest, the next, and so on.

    `seen` is the mean number of keys that a scored query sees there; `empty` the share that sees none.
    """
    assert batch.scored is not None
    found = []
    asked = np.asarray(batch.scored.position)
    for layer in output.layers:
        for source in layer.branch.key_set.sources:
            if not isinstance(source, HashBuckets):
                continue
            codes, real = np.asarray(source.key_code), np.asarray(batch.padding_mask)
            counts = [
                np.bincount(row[mask], minlength=2**num_hash) for row, mask in zip(codes, real, strict=True)
            ]
            occupancy = np.sort(np.stack(counts), axis=1)[:, ::-1].mean(0)
            keys = np.take_along_axis(np.asarray(source.query_count), np.maximum(asked, 0), 1)[asked >= 0]
            found.append(
                {
                    "occupancy": [round(float(x), 2) for x in occupancy],
                    "seen": round(float(np.minimum(keys, source.size).mean()), 3),
                    "empty": round(float((keys == 0).mean()), 4),
                }
            )
    return found


def ablations(trained: Trained, task: DataConfig, options: Any, output: Any, batch: Batch) -> dict[str, Any]:
    """Accuracy over all table sizes of the training as it is, and with parts taken out or exchanged.

    `output`, what the model makes of `batch`, gives the means that stand in for branches.
    """
    scales = [name for name in trained.params if name.endswith("output_scale")]
    without = lambda names: {  # noqa: E731
        name: jnp.zeros_like(x) if name in names else x for name, x in trained.params.items()
    }
    drawn = {
        name: jax.random.normal(jax.random.key(1), x.shape, x.dtype)
        for name, x in trained.buffers.items()
        if name.endswith("projection")
    }
    forms: dict[str, dict[str, Any]] = {"as trained": {}}
    for index, name in enumerate(scales):
        forms[f"without the branch of layer {index + 1}"] = {"params": without([name])}
    forms["without both branches"] = {"params": without(scales)}
    if drawn:
        forms["other hash projections"] = {"buffers": {**trained.buffers, **drawn}}
    task = dataclasses.replace(task, n_eval_per_pair=1)
    mesh = make_mesh()
    size = -(-options.batch_size // mesh.size) * mesh.size
    # One program for all forms: only the arrays differ.
    evaluate = Evaluator(trained.structure, make_split(task, "test"), Purpose.TEST, task, size, mesh)
    key = put_replicated(mesh, jax.random.key(trained.experiment.seed))
    accuracy = {}
    for name, changes in forms.items():
        form = dataclasses.replace(trained, **changes)
        results_of_form = evaluate(put_replicated(mesh, form.params), put_replicated(mesh, form.buffers), key)
        assert results_of_form is not None
        accuracy[name] = round(results_of_form[0].accuracy, 5)
        _say(f"{name}: {100 * accuracy[name]:.2f}%")
    real = np.asarray(batch.padding_mask)
    means = [np.asarray(layer.branch.output, np.float32)[real].mean(0) for layer in output.layers]
    both = dict(enumerate(means))
    for name, vectors in {
        "a constant for the branch of layer 1": {0: means[0]},
        "constants for both branches": both,
    }.items():
        accuracy[name] = round(_accuracy_with(trained, vectors, task, options.batch_size), 5)
        _say(f"{name}: {100 * accuracy[name]:.2f}%")
    return {"num_items": task.num_pairs, "accuracy": accuracy}


class _Constant:
    """Stands in for a branch: adds the same vector at every position, whatever the input."""

    def __init__(self, vector: np.ndarray):
        self.vector = vector

    def draw(self, *_: Any) -> RoutingDraws:
        return RoutingDraws()

    def __call__(self, v: jax.Array, *_: Any, **__: Any) -> BranchOutput:
        same = jnp.broadcast_to(jnp.asarray(self.vector, v.dtype), v.shape)
        return BranchOutput(same, same, v, v, v, KeySet(()), jnp.zeros(()))


def _accuracy_with(
    trained: Trained, vectors: dict[int, np.ndarray], task: DataConfig, batch_size: int
) -> float:
    """Accuracy with constants in place of the branches of some layers, by their numbers."""

    @jax.jit
    def right(batch):
        model: Any = trained.model
        for index, vector in vectors.items():
            model.layers[index].mixer.hax = _Constant(vector)
        output = model(batch.tokens, padding_mask=batch.padding_mask, scored=batch.scored)
        return sequence_accuracy(output.logits, batch).sum()

    split = make_split(task, "test")
    batches = split.iterator(batch_size, repeat=False)
    return sum(float(right(split.materialize(raw))) for raw in batches) / task.num_pairs


def larger(trained: Trained, task: DataConfig, options: Any) -> list[dict[str, Any]]:
    """Accuracy on single table sizes from the largest of the training on; `never_trained` counts ids."""
    found = []
    for n_context, n_key in LARGER:
        data = dataclasses.replace(_sized(task, n_context, n_key), n_eval_per_pair=options.items)
        try:
            unseen = check_fits(data, task, trained.experiment.model.vocab_size)
        except ConfigError:
            continue
        result = score(trained, "test", data, min(options.batch_size, options.items))
        sizes = {"n_context": n_context, "n_key": n_key, "never_trained": unseen}
        accuracy = round(result.accuracy, 5)
        found.append(
            {
                **sizes,
                "accuracy": accuracy,
                "num_items": result.num_items,
                "positions": data.padded_length - 1,
            }
        )
        _say(f"{n_context} x {n_key}: {100 * accuracy:.2f}%, {unseen} ids never trained")
    return found


def _sized(task: DataConfig, n_context: int, n_key: int) -> DataConfig:
    """The task in tables of one size."""
    return dataclasses.replace(
        task, min_n_context=n_context, max_n_context=n_context, min_n_key=n_key, max_n_key=n_key
    )


def _batch(task: DataConfig, n_context: int, n_key: int, count: int) -> Batch:
    """Items of one table size, in the token ids of `task`."""
    data = dataclasses.replace(_sized(task, n_context, n_key), n_eval_per_pair=count)
    split = RelabeledSplit(make_split(data, "test"), data, task)
    return split.materialize(next(split.iterator(count, repeat=False)))


def keys_seen(trained: Trained, count: int = 8) -> list[dict[str, Any]]:
    """`buckets` of each layer that hashes, for `count` items of the largest tables."""
    task = trained.experiment.data
    batch = _batch(task, task.max_n_context, task.max_n_key, count)
    output = jax.jit(lambda batch: trained.model(batch.tokens, padding_mask=batch.padding_mask))(batch)
    return buckets(output, batch, trained.experiment.model.num_hash)


def _masks(output: Any) -> list[list[np.ndarray]]:
    """Whole matrices (b, t, s) of what each source of each layer shows."""
    positions = jnp.arange(output.layers[0].branch.queries.shape[1])
    return [
        [np.asarray(KeySet((source,)).tile(positions, positions)) for source in layer.branch.key_set.sources]
        for layer in output.layers
    ]


def _weights(branch: Any, mask: np.ndarray) -> np.ndarray:
    """The attention's weights (b, t, s)."""
    scores = np.einsum("btn,bsn->bts", *(np.asarray(x, np.float32) for x in (branch.queries, branch.keys)))
    weights = np.where(mask, np.exp(scores - scores.max(-1, keepdims=True, where=mask, initial=-1e30)), 0.0)
    return weights / np.maximum(weights.sum(-1, keepdims=True), 1e-30)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
