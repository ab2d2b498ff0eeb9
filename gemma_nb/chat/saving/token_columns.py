"""A reply's tokens as columns of a file and back.

The columns are those that `gemma_nb.chat.saving.columns` makes of many `TokenRecord`, without their
attention rows; here they are made of `Tokens`, which are columns already.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gemma_nb.chat.records import Alternative, TokenRecord
from gemma_nb.chat.saving.codec import Tables, expect, hints
from gemma_nb.chat.saving.columns import Columns, floats, from_columns, integers
from gemma_nb.chat.tokens import Tokens

_UNSAVED = "attention_row"


def write_tokens(tokens: Tokens, tables: Tables, name: str) -> Columns:
    """Columns of a reply's tokens, under `name`."""
    count = tokens.column("count")
    drawn = tokens.column("is_drawn")
    columns: Columns = {}
    for field, hint in hints(TokenRecord).items():
        if field == "alternatives":
            columns[f"{name}.{field}.count"] = integers(count)
            for part, kind in hints(Alternative).items():
                values = tokens.alternative(f"alternative_{part}")
                columns[f"{name}.{field}.{part}"] = _column(values, kind, tables)
        elif field == "key":
            columns[f"{name}.{field}.present"] = drawn.astype(np.uint8)
            for place, part in enumerate(("seed", "fold")):
                columns[f"{name}.{field}.{place}"] = integers(tokens.column(part)[drawn])
        elif field != _UNSAVED:
            columns[f"{name}.{field}"] = _column(tokens.column(field), hint, tables)
    return columns


def read_tokens(count: int, columns: Columns, tables: Tables, name: str) -> Tokens:
    """The tokens that `write_tokens` was given.

    Args:
      count: how many there are.
      columns: those of the file; more than are needed may be there.
      tables: of the same file.
      name: as `write_tokens` was given.

    Raises:
      ValueError: a column is missing, of another length, or refers to nothing.
    """
    found: dict[str, Any] = {_UNSAVED: [None] * count}
    held = hints(TokenRecord)
    prefix = f"{name}.alternatives"
    lacking = [
        field
        for field in held
        if field not in ("key", _UNSAVED)
        and f"{name}.{field}" not in columns
        and not any(key.startswith(f"{name}.{field}.") for key in columns)
    ]
    expect(not lacking, f"columns for {', '.join(lacking)}", ", ".join(columns), name)
    for field, hint in held.items():
        if field not in ("alternatives", "key", _UNSAVED):
            found[field] = from_columns(hint, count, columns, tables, f"{name}.{field}")
    found["count"] = counts = from_columns(int, count, columns, tables, f"{prefix}.count")
    expect(min(counts, default=0) >= 0, "lengths", "others", f"{prefix}.count")
    for part, hint in hints(Alternative).items():
        values = from_columns(hint, sum(counts), columns, tables, f"{prefix}.{part}")
        found[f"alternative_{part}"] = values
    keys = [None] * count
    if any(key.startswith(f"{name}.key.") for key in columns):
        keys = from_columns(held["key"], count, columns, tables, f"{name}.key")
    found["is_drawn"] = [key is not None for key in keys]
    for place, part in enumerate(("seed", "fold")):
        found[part] = [0 if key is None else key[place] for key in keys]
    return Tokens.of_columns(found)


def _column(values: np.ndarray, kind: Any, tables: Tables) -> np.ndarray:
    if kind is str:
        return integers([tables.string(value) for value in values.tolist()])
    return floats(values) if kind is float else integers(values)
