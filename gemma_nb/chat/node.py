"""A place in a conversation's tree."""

from __future__ import annotations

import dataclasses

from gemma_nb.chat.turns import Role, Turn


@dataclasses.dataclass(eq=False)
class Node:
    """A turn and what followed it.

    Attributes:
      turn: None for the root only.
      parent: None for the root only.
      children: the turns that were tried after this one, in the order in which they were made.
      active: index into `children` of the branch that is shown; None shows none of them.
      undone: index of the child that `undo` hid and `redo` shows again; None where there is none.
      depth: turns up to and including this one; 0 for the root.

    Only the tree changes `active` and `undone`: it knows the active path.
    """

    turn: Turn | None = None
    parent: Node | None = None
    children: list[Node] = dataclasses.field(default_factory=list)
    active: int | None = None
    undone: int | None = None
    depth: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.depth = 0 if self.parent is None else self.parent.depth + 1

    @property
    def said(self) -> Turn:
        """The turn; of any node but the root."""
        assert self.turn is not None
        return self.turn

    @property
    def asked(self) -> Node:
        """The node before this one, which a reply replies to; of any node but the root."""
        assert self.parent is not None
        return self.parent

    @property
    def turns(self) -> list[Turn]:
        """All turns up to and including this one."""
        return [node.said for node in self.path()]

    @property
    def id(self) -> int:
        """The turn's id; 0 for the root."""
        return 0 if self.turn is None else self.turn.id

    @property
    def role(self) -> Role | None:
        """The speaker; None for the root."""
        return None if self.turn is None else self.turn.role

    @property
    def index(self) -> int:
        """Its place among its siblings."""
        return 0 if self.parent is None else self.parent.children.index(self)

    @property
    def shown(self) -> Node | None:
        """The child that is shown."""
        return None if self.active is None else self.children[self.active]

    @property
    def newest(self) -> Node | None:
        """The child that was made last."""
        return self.children[-1] if self.children else None

    def path(self) -> list[Node]:
        """The nodes from the first turn to this one, without the root."""
        nodes, node = [], self
        while node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]

    def __repr__(self) -> str:
        return f"<Node {self.id}: {len(self.children)} children, active {self.active}>"
