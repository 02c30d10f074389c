"""The only place that resolves `implementation`: a name to one function, never a quiet fallback."""

from collections.abc import Callable, Mapping

from hax_jax.ops import devices

NAMES = ("reference", "xla", "mosaic_gpu")


def resolve(
    op: str,
    implementation: str | None,
    available: Mapping[str, Callable],
    preferred: str = "xla",
    *,
    batched: tuple[int, ...] = (),
) -> Callable:
    """Returns the function that `implementation` names, or for None the op's own choice.

    Where a mesh is in force, kernels come divided over its devices (`devices.divided`).

    Args:
      op: the op's name, for the message.
      implementation: one of `NAMES`, or None.
      available: the op's implementations by name.
      preferred: what None means for this call; 'xla' runs anywhere.
      batched: which positional arguments of the function have the batch as their first axis.

    Raises:
      ValueError: the name is unknown, or the op has no such implementation.
    """
    if implementation is None:
        chosen = available[preferred]
        # What None stands for must run: a batch that does not divide is left to the compiler.
        return devices.divided(chosen, batched, available["xla"]) if preferred == "mosaic_gpu" else chosen
    if implementation not in NAMES:
        raise ValueError(
            f"`implementation` of {op} must be None or one of {', '.join(NAMES)}, got {implementation!r}"
        )
    if implementation not in available:
        raise ValueError(
            f"`implementation` of {op} must be one it has ({', '.join(available)}), got {implementation!r}; "
            "use None to let the op choose"
        )
    chosen = available[implementation]
    return devices.divided(chosen, batched) if implementation == "mosaic_gpu" else chosen


def missing_for_mosaic_gpu() -> str | None:
    """What the default device lacks to run the Mosaic GPU kernels, or None if it can run them."""
    device = devices.default_device()
    if device.platform != "gpu":
        return f"needs an NVIDIA Hopper GPU, got platform {device.platform!r}"
    capability = getattr(device, "compute_capability", "unknown")
    if capability != "9.0":
        return f"needs an NVIDIA Hopper GPU (compute capability 9.0), got {device.device_kind} ({capability})"
    return None


def check_mosaic_gpu(op: str, why_not: str | None, *, interpreted: bool = False) -> None:
    """Raises ValueError where 'mosaic_gpu' was asked for and cannot run the call.

    Args:
      op: the op's name, for the message.
      why_not: why the kernels cannot run the call, None if they can.
      interpreted: whether they run in Pallas' interpreter, on whatever device there is.
    """
    if reason := why_not or (None if interpreted else missing_for_mosaic_gpu()):
        raise ValueError(f"`implementation` of {op} cannot be 'mosaic_gpu' here: {reason}; use None or 'xla'")


def check_shape(op: str, argument: str, got: tuple[int, ...], expected: tuple[int, ...], legend: str) -> None:
    """Raises ValueError where a shape is not the expected one; `legend` names its letters."""
    if got != expected:
        raise ValueError(f"`{argument}` of {op} must have shape ({legend}) = {expected}, got {got}")


def best(why_not: str | None) -> str:
    """What None means for an op whose kernels are the fastest form wherever they run.

    On several devices without a mesh in force XLA would gather the inputs of a kernel and run all of it on
    each of them, so there the form that it can divide is preferred.

    Args:
      why_not: why the kernels cannot run the call, on one device's share of it, None if they can.
    """
    kernels = why_not is None and missing_for_mosaic_gpu() is None and devices.may_run_kernels()
    return "mosaic_gpu" if kernels else "xla"
