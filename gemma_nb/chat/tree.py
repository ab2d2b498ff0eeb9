"""The conversation as a tree: every operation adds a branch or hides one, and loses none."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from gemma_nb.chat.interventions import Unresolved
from gemma_nb.chat.turns import Context, Role, Turn
from gemma_nb.indices import number
from gemma_nb.interventions import Interventions

_OUTLINED = 100  # turns that an outline has at most


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

    What changes `active` and `undone` is the tree, which knows the active path.
    """

    turn: Turn | None = None
    parent: Node | None = None
    children: list[Node] = dataclasses.field(default_factory=list)
    active: int | None = None
    undone: int | None = None

    def __post_init__(self) -> None:
        # No field, since it is not saved.
        self.depth: int = 0 if self.parent is None else self.parent.depth + 1

    @property
    def id(self) -> int:
        """The turn's id; 0 for the root."""
        return 0 if self.turn is None else self.turn.id

    @property
    def role(self) -> Role | None:
        """Who speaks; None for the root."""
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


def _outlined(node: Node) -> str:
    """A turn in a line."""
    turn = node.turn
    assert turn is not None
    text = " ".join(turn.text.split())
    text = text if len(text) <= 60 else f"{text[:57]}..."
    source = turn.origin
    came = f" ({source.kind} of {source.turn})" if source is not None else ""
    return f"{turn.id} {turn.role}: {text}{came}"


class ConversationTree:
    """All branches of a conversation; one path through them is active.

    Attributes:
      root: what comes before the first turn.
      under: id of a reply -> the interventions that it was computed under, where these are others
        than the session's model has.
    """

    def __init__(self) -> None:
        self.root = Node()
        self.under: dict[int, Interventions | Unresolved] = {}
        self._by_id: dict[int, Node] = {}
        # The active path.  Never changed, only replaced: other threads may be reading it; and kept,
        # since each turn looks at it several times, and in a long conversation it is long.
        self._path: list[Node] = []

    def __repr__(self) -> str:
        """An outline, deeper where branches part; what is shown has a star."""
        shown = {node.id for node in self.path()}
        lines = [f"<ConversationTree: {len(self)} turns, of which {len(shown)} are shown (*)>"]
        left = [(node, 0) for node in reversed(self.root.children)]
        while left and len(lines) <= _OUTLINED:
            node, depth = left.pop()
            star = "*" if node.id in shown else " "
            lines.append(f"{star} {'  ' * depth}{_outlined(node)}")
            depth += len(node.children) > 1
            left += [(child, depth) for child in reversed(node.children)]
        if len(lines) <= len(self):
            lines.append(f"  and {len(self) - len(lines) + 1} more")
        return "\n".join(lines)

    # --- looking --------------------------------------------------------------------------------

    def path(self) -> list[Node]:
        """The active nodes from the first turn to the last."""
        return list(self._path)

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The active path."""
        return tuple([node.turn for node in self._path if node.turn is not None])

    @property
    def tip(self) -> Node:
        """The last active node (the root in an empty conversation)."""
        path = self._path
        return path[-1] if path else self.root

    @property
    def context(self) -> Context | None:
        """Of the last reply on the active path; None where none has one."""
        turns = (node.turn for node in reversed(self._path))
        return next((turn.context for turn in turns if turn is not None and turn.context), None)

    def find(self, turn: Turn | int) -> Node:
        """The node of a turn, or of its id, on whichever branch it is.

        Raises:
          ValueError: the turn is not in this conversation.
        """
        node = self._by_id.get(turn.id if hasattr(turn, "id") else number(turn, "turn"))
        if node is None:
            raise ValueError(f"{turn!r} is not a turn of this conversation")
        return node

    def path_to(self, turn: Turn | int) -> list[Turn]:
        """The turns from the first to `turn`, on whichever branch it is.

        Raises:
          ValueError: the turn is not in this conversation.
        """
        return [node.turn for node in self.find(turn).path() if node.turn is not None]

    def siblings(self, turn: Turn | int) -> tuple[Turn, ...]:
        """The turns tried in the same place, `turn` included, in the order they were made.

        Raises:
          ValueError: the turn is not in this conversation.
        """
        parent = self.find(turn).parent
        assert parent is not None
        return tuple(node.turn for node in parent.children if node.turn is not None)

    @property
    def branches(self) -> tuple[Turn, ...]:
        """The last turn of every branch, hidden ones included."""
        return tuple(n.turn for n in self.nodes() if n.turn is not None and not n.children)

    def nodes(self) -> Iterator[Node]:
        """Every node of every branch, the root first, parents before children."""
        stack = [self.root]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(reversed(node.children))

    def __iter__(self) -> Iterator[Turn]:
        """Every turn of every branch, parents before children."""
        return (node.turn for node in self.nodes() if node.turn is not None)

    def __len__(self) -> int:
        """Number of turns, of all branches."""
        return len(self._by_id)

    @property
    def last_id(self) -> int:
        """The largest id given to a turn so far; 0 in an empty tree."""
        return max(self._by_id, default=0)

    # --- changing -------------------------------------------------------------------------------

    def add(self, parent: Node, turn: Turn) -> Node:
        """Appends `turn` after `parent` and shows it.

        Raises:
          ValueError: its id is taken.
        """
        node = self.attach(parent, turn)
        self.select(node)
        return node

    def attach(self, parent: Node, turn: Turn) -> Node:
        """Appends `turn` after `parent`, and shows what was shown before.

        Raises:
          ValueError: its id is taken.
        """
        if turn.id in self._by_id or turn.id < 1:
            raise ValueError(f"a turn's id must be new and at least 1, got {turn.id}")
        node = Node(turn, parent)
        parent.children.append(node)
        self._by_id[turn.id] = node
        return node

    def select(self, node: Node) -> None:
        """Shows `node`, and what was last shown after it."""
        last = node
        while not self._is_shown(node):
            assert node.parent is not None
            node.parent.active, node.parent.undone = node.index, None
            node = node.parent
        if node is not last:
            self._follow(node)

    def show_after(self, node: Node, index: int | None) -> None:
        """Shows another child after `node`, or none, wherever that is."""
        node.active = index
        if self._is_shown(node):
            self._follow(node)

    def hide_after(self, node: Node) -> None:
        """Shows nothing after `node`; `redo` takes that back."""
        if node.active is not None:
            node.undone = node.active
            self.show_after(node, None)

    def _is_shown(self, node: Node) -> bool:
        """Whether a node is on the active path; the root is before it."""
        path, depth = self._path, node.depth
        return depth == 0 or (depth <= len(path) and path[depth - 1] is node)

    def _follow(self, node: Node) -> None:
        """Finds out what is shown after a node that is."""
        path = self._path[: node.depth]
        while (shown := node.shown) is not None:
            path.append(shown)
            node = shown
        self._path = path

    def undo(self) -> tuple[Turn, ...]:
        """Hides the last message and what was replied; returns the turns that were hidden.

        Raises:
          ValueError: nothing is shown.
        """
        path = self.path()
        asked = [node for node in path if node.turn is not None and node.turn.role == "user"]
        if not asked:
            raise ValueError("there is nothing to undo: the conversation is empty")
        parent = asked[-1].parent
        assert parent is not None
        self.hide_after(parent)
        return tuple(n.turn for n in path[path.index(asked[-1]) :] if n.turn is not None)

    def redo(self) -> tuple[Turn, ...]:
        """Shows what the last `undo` hid; returns the turns that are shown again.

        Raises:
          ValueError: nothing was undone, or something else was said since.
        """
        tip = self.tip
        if tip.undone is None:
            raise ValueError("there is nothing to redo: use select() to show another branch")
        self.select(tip.children[tip.undone])
        return self.turns[tip.depth :]
