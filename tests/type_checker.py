"""The run-time type checker of the test suite."""

import beartype

# An int may stand where a float is asked for, as static type checkers have it.
check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
