"""The kernels of a compiled program's text: what is launched how often, and the bytes that each one moves."""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping

# Instructions that start nothing on the device.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "opt-barrier"),
    *("after-all", "add-dependency", "partition-id"),
}
# A kernel that reads an input through one of these alone reads no more of it than comes out.
_PICKING = frozenset(("slice", "dynamic-slice", "gather"))
_BITS = {"pred": 8, "token": 0, "opaque": 0}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")
_SHAPE = re.compile(r"([a-z]+\d*[a-z\d]*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|\w+_computation)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program: `name = shape opcode(operands), attributes`."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def called(self) -> tuple[str, ...]:
        """The computations that it runs."""
        names = [name for found in _CALLED.findall(self.attributes) for name in found if name]
        return tuple(name.strip(" %") for several in names for name in several.split(","))


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Launches of one instruction: `count` of them in a turn of the loop, `bytes` each."""

    name: str
    opcode: str
    shape: str
    count: int
    bytes: int

    @property
    def seconds(self) -> float:
        """What they take together by count: the larger of 1.8 us and 1.3 us + bytes at 3.2 TB/s, each."""
        return self.count * max(1.8e-6, 1.3e-6 + self.bytes / 3.2e12)


Program = Mapping[str, Mapping[str, Instruction]]


def of_loop(hlo: str) -> list[Kernel]:
    """The kernels of one turn of the program's longest loop; of all of it where it has none."""
    program, entry = read(hlo)
    bodies = [one.called[0] for body in program.values() for one in body.values() if one.opcode == "while"]
    turns = [list(_launched(program, body, 1)) for body in bodies]
    return max(turns, key=len, default=[]) or list(_launched(program, entry, 1))


def read(hlo: str) -> tuple[Program, str]:
    """Instructions by name of every computation by name, and the name of the one that is run."""
    program: dict[str, dict[str, Instruction]] = {}
    entry = ""
    body: dict[str, Instruction] = {}
    for line in hlo.splitlines():
        if match := _INSTRUCTION.match(line):
            one = _instruction(match[2], match[3], bool(match[1]))
            body[one.name] = one
        elif match := _COMPUTATION.match(line):
            body = program.setdefault(match[2], {})
            entry = match[2] if match[1] else entry
    return program, entry


def _instruction(name: str, text: str, is_root: bool) -> Instruction:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    shape, rest = text[:end], text[end:].lstrip()
    begin = rest.index("(")
    end = _closing(rest, begin)
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[begin:end]))
    return Instruction(name, shape, rest[:begin], operands, rest[end + 1 :], is_root)


def _closing(text: str, begin: int) -> int:
    """Where the bracket closes that opens at `begin`."""
    depth = 0
    for place in range(begin, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if not depth:
            return place
    raise ValueError(f"a bracket of the program stays open: {text[:80]}")


def _launched(program: Program, name: str, times: int) -> Iterator[Kernel]:
    body = program[name]
    for one in body.values():
        if one.opcode in _FREE or one.opcode.endswith("-done"):
            continue
        if one.opcode == "while":
            trips = _TRIPS.search(one.attributes)
            yield from _launched(program, one.called[-1], times * (int(trips[1]) if trips else 1))
        elif one.opcode in ("call", "async-start"):
            yield from _launched(program, one.called[0], times)
        elif one.opcode == "conditional":
            branches = [list(_launched(program, branch, times)) for branch in one.called]
            yield from max(branches, key=len)
        else:
            yield Kernel(one.name, one.opcode, one.shape, times, _bytes_moved(program, body, one))


def _bytes_moved(program: Program, body: Mapping[str, Instruction], one: Instruction) -> int:
    inputs = [body[operand] for operand in one.operands]
    if one.opcode != "fusion":
        picked = one.opcode in _PICKING
        read = size(one.shape) if picked else sum(size(operand.shape) for operand in inputs)
        return size(one.shape) + read
    fused = program[one.called[0]].values()
    taken = [_bytes_read(inner, fused) for inner in fused if inner.opcode == "parameter"]
    return size(one.shape) + sum(taken)


def _bytes_read(parameter: Instruction, fused: Iterable[Instruction]) -> int:
    """Of an input of a fusion: all of it, or what is picked where nothing else is done with it."""
    users = [inner for inner in fused if parameter.name in inner.operands]
    picking = all(inner.opcode in _PICKING and inner.operands[0] == parameter.name for inner in users)
    whole = size(parameter.shape)
    return min(whole, sum(size(inner.shape) for inner in users)) if users and picking else whole


def size(shape: str) -> int:
    """Bytes of a shape as it is written, a tuple's all together."""
    total = 0
    for dtype, dims in _SHAPE.findall(re.sub(r"/\*.*?\*/|\{.*?\}", "", shape)):
        bits = _BITS.get(dtype)
        if bits is None:
            bits = int(re.sub(r"^[a-z]+(\d+).*$", r"\1", dtype))
        total += math.prod(int(dim) for dim in dims.split(",") if dim) * bits // 8
    return total
