"""The benchmark of the two recurrences: our forms against each other and against other people's kernels."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import ceilings, floors, memory, scan_peers, specs, timing
from benchmarks.record import Record, is_wanted
from benchmarks.scan_peers import Peer
from hax_jax import ops
from hax_jax.ops import dispatch
from hax_jax.ops.selective_scan import IMPLEMENTATIONS as SELECTIVE_SCAN_FORMS
from hax_jax.ops.ssd import IMPLEMENTATIONS as SSD_FORMS

DIRECTIONS = ("forward", "forward_backward")
_SETS = 3


@dataclasses.dataclass(frozen=True)
class Options:
    """What a run measures: as `attention.Options`."""

    seconds: float = 540.0
    only: tuple[str, ...] = ()
    tiny: bool = False
    plan: timing.Plan = dataclasses.field(default_factory=timing.Plan)


@dataclasses.dataclass(frozen=True)
class _Op:
    """One recurrence: its forms and peers, its inputs, its floor."""

    name: str
    forms: tuple[str, ...]
    peers: list[Peer]
    shapes: tuple[Any, ...]
    call: Callable[..., Any]
    draw: Callable[..., tuple]
    floor: Callable[..., floors.Work]


def run(record: Record, options: Options) -> None:
    """Measures every shape with every form and every peer that is installed, until the time is up."""
    record.note(ceilings=ceilings.measure(options.tiny), memory_limit=memory.limit())
    operations, absent = _operations(options.tiny)
    record.note(absent=absent)
    for name, why in absent.items():
        print(f"not measured: {name} ({why})", flush=True)
    named = {f"{op.name}/{shape.name}": shape for op in operations for shape in op.shapes}
    record.note(shapes={name: dataclasses.asdict(shape) for name, shape in named.items()})
    left_out = []
    for direction in DIRECTIONS[::-1]:
        for op in operations:
            for shape in op.shapes:
                start = f"{op.name}/{shape.name}"
                wanted = [
                    who
                    for who in (*op.forms, *op.peers)
                    if is_wanted(f"{start}/{_name(who)}/{direction}", options.only)
                ]
                if record.elapsed > options.seconds:
                    left_out += [f"{start}/{_name(who)}/{direction}" for who in wanted]
                elif wanted:
                    _measure_shape(record, options.plan, op, shape, direction, wanted)
    record.note(left_out=left_out)


def _measure_shape(
    record: Record, plan: timing.Plan, op: _Op, shape: Any, direction: str, wanted: list[Any]
) -> None:
    """One shape in one direction: all contenders on the same numbers, outputs held against the first's."""
    inputs = [op.draw(jax.random.key(seed), shape) for seed in range(_SETS)]
    floor = op.floor(shape, backward=direction == DIRECTIONS[1]).report(record.session["ceilings"])
    first_output = None
    for who in wanted:
        identity = f"{op.name}/{shape.name}/{_name(who)}/{direction}"
        facts: dict[str, Any] = {
            "op": op.name,
            "shape": shape.name,
            "contender": _name(who),
            "direction": direction,
        }
        try:
            measured, output = _measure(plan, op, shape, direction, who, inputs)
            share = floor["seconds"] / measured["time"]["seconds"]
            facts |= measured | {"floor": floor, "share_of_floor": share}
            if first_output is None:
                first_output = output
            else:
                size = np.linalg.norm(first_output)
                facts["difference_to_first"] = float(np.linalg.norm(output - first_output) / size)
        except Exception as error:
            # One contender that cannot run a shape must not end the run; what it says is its result.
            facts["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        _say(record, record.add(identity, **facts))


def _measure(
    plan: timing.Plan, op: _Op, shape: Any, direction: str, who: Any, inputs: list[tuple]
) -> tuple[dict[str, Any], np.ndarray]:
    """What one contender takes, and its output for the first set of inputs."""
    if isinstance(who, Peer):
        sets = [who.prepare(*arrays) for arrays in inputs]
        call = getattr(who, direction)
        facts = {"time": timing.measure(call, sets, plan, who.wait)}
        result = call(*sets[0])
        return facts, who.output(result if direction == "forward" else result[0])
    call = functools.partial(op.call, shape, who, direction)
    compiled = jax.jit(call).lower(*inputs[0]).compile()
    planned = {"program": memory.of_program(compiled)}
    facts = {"time": timing.measure(compiled, inputs, plan), "memory": planned}
    result = compiled(*inputs[0])
    return facts, np.asarray(result if direction == "forward" else result[0], np.float32)


def _operations(tiny: bool) -> tuple[list[_Op], dict[str, str]]:
    scan_peers_there, absent = scan_peers.selective_scan_peers()
    ssd_peers_there, ssd_absent = scan_peers.ssd_peers()
    absent |= {f"{name} (ssd)": why for name, why in ssd_absent.items()}
    operations = [
        _Op(
            "selective_scan",
            _forms(SELECTIVE_SCAN_FORMS),
            scan_peers_there,
            specs.TINY_SELECTIVE_SCANS if tiny else specs.SELECTIVE_SCANS,
            _selective_scan,
            _selective_scan_inputs,
            floors.selective_scan,
        ),
        _Op(
            "ssd",
            _forms(SSD_FORMS),
            ssd_peers_there,
            specs.TINY_SSDS if tiny else specs.SSDS,
            _ssd,
            _ssd_inputs,
            floors.ssd,
        ),
    ]
    return operations, absent


def _forms(available: dict[str, Callable]) -> tuple[str, ...]:
    """The forms that run here, the fastest first."""
    cannot = {"reference"} if dispatch.missing_for_mosaic_gpu() is None else {"reference", "mosaic_gpu"}
    return tuple(name for name in available if name not in cannot)[::-1]


def _selective_scan(shape, implementation, direction, x, dt, A, B, C, dy):
    del shape

    def scan(x, dt, A, B, C):
        return ops.selective_scan(x, dt, A, B, C, implementation=implementation)[0]

    return _directed(scan, direction, x, dt, A, B, C, dy)


def _ssd(shape, implementation, direction, x, dt, A, B, C, dy):
    def scan(x, dt, A, B, C):
        return ops.ssd(x, dt, A, B, C, chunk_size=shape.chunk_size, implementation=implementation)[0]

    return _directed(scan, direction, x, dt, A, B, C, dy)


def _directed(scan, direction, x, dt, A, B, C, dy):
    if direction == DIRECTIONS[0]:
        return scan(x, dt, A, B, C)
    out, pull = jax.vjp(scan, x, dt, A, B, C)
    return out, *pull(dy.astype(out.dtype))


def _selective_scan_inputs(key: jax.Array, shape: specs.SelectiveScanShape) -> tuple:
    """x, dt, A, B, C and the gradient of y: bfloat16 but for A, what mamba_ssm's kernels take."""
    size = (shape.batch, shape.length)
    keys = jax.random.split(key, 5)
    wide, narrow = (*size, shape.channels), (*size, shape.state)
    x, dt, dy = (jax.random.normal(k, wide) for k in keys[:3])
    B, C = (jax.random.normal(k, narrow) for k in keys[3:])
    A = -jnp.tile(jnp.arange(1, shape.state + 1, dtype=jnp.float32), (shape.channels, 1))
    return _rounded(x, jax.nn.softplus(dt - 2), A, B, C, dy)


def _ssd_inputs(key: jax.Array, shape: specs.SSDShape) -> tuple:
    """As `_selective_scan_inputs`."""
    size = (shape.batch, shape.length)
    keys = jax.random.split(key, 5)
    x, dy = (jax.random.normal(k, (*size, shape.heads, shape.head_width)) for k in keys[:2])
    dt = jax.nn.softplus(jax.random.normal(keys[2], (*size, shape.heads)) - 2)
    B, C = (jax.random.normal(k, (*size, shape.groups, shape.state)) for k in keys[3:])
    A = -jnp.linspace(1.0, 16.0, shape.heads)
    return _rounded(x, dt, A, B, C, dy)


def _rounded(x, dt, A, B, C, dy):
    return (*(y.astype(jnp.bfloat16) for y in (x, dt)), A, *(y.astype(jnp.bfloat16) for y in (B, C, dy)))


def _name(who: Any) -> str:
    return who.name if isinstance(who, Peer) else who


def _say(record: Record, measured: dict[str, Any]) -> None:
    text = measured.get("error")
    if text is None:
        timed = measured["time"]
        text = f"{1e3 * timed['seconds']:.4g} ms, spread {100 * timed['spread']:.1f}%"
        text += f", {100 * measured['share_of_floor']:.1f}% of the floor's speed"
        if "difference_to_first" in measured:
            text += f", differs by {measured['difference_to_first']:.1e}"
    print(f"{record.elapsed:5.0f} s  {measured['id']}: {text}", flush=True)
