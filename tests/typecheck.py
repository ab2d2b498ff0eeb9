"""What shape annotations are checked with, see conftest."""

from __future__ import annotations

from typing import Any

import beartype

# As type checkers read annotations: an int will do where a float is asked for.
_CONF = beartype.BeartypeConf(is_pep484_tower=True)


def checked(thing: Any) -> Any:
    """`thing`, a function or class, whose calls fail where they break its annotations."""
    return beartype.beartype(thing, conf=_CONF)
