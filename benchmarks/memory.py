"""How much memory a program needs, as its compiler planned it and as the device counted it."""

from typing import Any

import jax


def of_program(compiled: jax.stages.Compiled) -> dict[str, int] | None:
    """Bytes of a compiled program; None where the compiler does not say.

    `peak` is all that is alive at once at most: arguments, outputs (less what takes over an argument's
    memory) and temporaries.
    """
    plan = compiled.memory_analysis()
    if plan is None:
        return None
    parts = {
        "arguments": plan.argument_size_in_bytes,
        "outputs": plan.output_size_in_bytes,
        "aliased": plan.alias_size_in_bytes,
        "temporaries": plan.temp_size_in_bytes,
    }
    peak = parts["arguments"] + parts["outputs"] - parts["aliased"] + parts["temporaries"]
    return {"peak": peak, **parts}


def of_device() -> dict[str, int] | None:
    """Bytes in use, and the most ever in use in this process; None on a CPU, which does not count."""
    stats = jax.devices()[0].memory_stats()
    if not stats:
        return None
    return {"in_use": stats["bytes_in_use"], "peak": stats["peak_bytes_in_use"]}


def limit() -> int | None:
    """Bytes that this process may use on the device; None where that is not known."""
    stats: dict[str, Any] = jax.devices()[0].memory_stats() or {}
    return stats.get("bytes_limit")
