"""The conversation as a tree: regenerating or starting anew hides a branch, and loses none."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from gemma_nb.chat.events import Turn


@dataclasses.dataclass(eq=False)
class Node:
    """A turn and what followed it.

    Attributes:
      turn: None for the root only.
      parent: None for the root only.
      children: the turns that were tried after this one, in order.
      active: index into `children` of the branch that is shown; None shows none of them.
    """

    turn: Turn | None = None
    parent: Node | None = None
    children: list[Node] = dataclasses.field(default_factory=list)
    active: int | None = None


class ConversationTree:
    """All branches of a conversation; one path through them is active."""

    def __init__(self) -> None:
        self.root = Node()

    def path(self) -> list[Node]:
        """The active nodes from the first turn to the last."""
        nodes, node = [], self.root
        while node.active is not None:
            node = node.children[node.active]
            nodes.append(node)
        return nodes

    def path_to(self, turn: Turn) -> list[Turn]:
        """The turns from the first to `turn`, on whichever branch it is.

        Raises:
          ValueError: the turn is not in this conversation.
        """
        node = next((n for n in self._nodes() if n.turn is not None and n.turn.id == turn.id), None)
        if node is None:
            raise ValueError(f"{turn!r} is not a turn of this conversation")
        turns: list[Turn] = []
        while node is not None and node.turn is not None:
            turns.append(node.turn)
            node = node.parent
        return turns[::-1]

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The active path."""
        return tuple(node.turn for node in self.path() if node.turn is not None)

    @property
    def tip(self) -> Node:
        """The last active node (the root in an empty conversation)."""
        return (self.path() or [self.root])[-1]

    def add(self, parent: Node, turn: Turn) -> Node:
        """Appends `turn` after `parent` and makes it active."""
        node = Node(turn, parent)
        parent.children.append(node)
        parent.active = len(parent.children) - 1
        return node

    def __iter__(self) -> Iterator[Turn]:
        """Every turn of every branch, parents before children."""
        return (node.turn for node in self._nodes() if node.turn is not None)

    def _nodes(self) -> Iterator[Node]:
        stack = [self.root]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(reversed(node.children))
