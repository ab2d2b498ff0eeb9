"""Interventions that replies were made under, where the session cannot compute with them."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Unresolved:
    """Interventions of which a class was not given when their conversation was loaded.

    Attributes:
      missing: names of the classes.
      stored: the interventions in the form that saving has read and writes again.
    """

    missing: tuple[str, ...]
    stored: object

    @property
    def remedy(self) -> str:
        """Advice how to have them."""
        given = ", ".join(self.missing)
        return f"load it with interventions=[{given}], the class of your own that it was made with"
