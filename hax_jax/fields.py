"""Dataclass fields that know which values they accept, in words and as a test."""

import dataclasses
from collections.abc import Callable
from typing import Any


class ConfigError(ValueError):
    """A setting that cannot be used: which field, what was expected, what came, what to do."""

    def __init__(self, field: str, expected: str, got: Any, remedy: str):
        self.field, self.expected, self.got, self.remedy = field, expected, got, remedy
        super().__init__(f"`{field}` must be {expected}, got {got!r}; {remedy}")


def checked_field(default: Any, expected: str, check: Callable[[Any], bool]) -> Any:
    """A dataclass field that knows which values it accepts, in words and as a test."""
    return dataclasses.field(default=default, metadata={"expected": expected, "check": check})


def integer(default: int, low: int, high: int = 2**31 - 1) -> Any:
    def check(value):
        return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high

    return checked_field(default, f"an integer in {low}..{high}", check)


def number(default: float, low: float, high: float = float("inf"), open_low: bool = False) -> Any:
    def check(value):
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return (value > low if open_low else value >= low) and value <= high and abs(value) < float("inf")

    lower = f"> {low}" if open_low else f">= {low}"
    return checked_field(
        default, f"a finite number {lower}" + (f" and <= {high}" if high < float("inf") else ""), check
    )


def choice(default: str, choices: tuple[str, ...]) -> Any:
    return checked_field(
        default, "one of " + ", ".join(repr(c) for c in choices), lambda value: value in choices
    )


def text(default: str) -> Any:
    return checked_field(default, "a string", lambda value: isinstance(value, str) and "\0" not in value)


def numbers(default: str, kind: type, high: float) -> Any:
    """Up to 100 numbers >= 0 of a kind, int or float, separated by commas in a string that may be empty."""
    name = {int: "integers", float: "numbers"}[kind]

    def check(value):
        if not isinstance(value, str):
            return False
        try:
            found = as_numbers(value, kind)
        except ValueError:
            return False
        return all(0 <= x <= high for x in found) and len(set(found)) == len(found) <= 100

    return checked_field(
        default, f"up to 100 {name} in 0..{high:.10g}, all different, separated by commas, or empty", check
    )


def as_numbers(value: str, kind: type) -> list[Any]:
    """The numbers in such a string."""
    return [kind(part) for part in value.split(",")] if value else []


def flag(default: bool) -> Any:
    return checked_field(default, "True or False", lambda value: isinstance(value, bool))


@dataclasses.dataclass(frozen=True)
class Checked:
    """Base of the setting groups: checks each field when an instance is made."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if "check" in field.metadata:
                value = getattr(self, field.name)
                if not field.metadata["check"](value):
                    raise ConfigError(
                        f"{self.prefix}{field.name}",
                        field.metadata["expected"],
                        value,
                        f"the default is {field.default!r}",
                    )
        self.check_combinations()

    @property
    def prefix(self) -> str:
        """What precedes a field's name in an override such as `--config.model.sparse_keys=32`."""
        name = type(self).__name__
        return "" if name == "Experiment" else name.removesuffix("Config").lower() + "."

    def check_combinations(self) -> None:
        """Raises ConfigError where single fields are fine but do not go together."""
