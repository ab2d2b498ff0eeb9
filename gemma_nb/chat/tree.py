"""The conversation as a tree: every operation adds a branch or hides one, and loses none."""

from __future__ import annotations

import operator
from collections.abc import Iterator

from gemma_nb.chat.interventions import Unresolved
from gemma_nb.chat.node import Node
from gemma_nb.chat.records import TokenRecord
from gemma_nb.chat.turns import Context, Turn
from gemma_nb.indices import number
from gemma_nb.interventions import Interventions

_OUTLINED = 100  # turns that an outline has at most


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
      interventions: id of a reply -> the interventions that it was computed under, where these are
        others than the session's model has.
    """

    def __init__(self) -> None:
        self.root = Node()
        self.interventions: dict[int, Interventions | Unresolved] = {}
        self._by_id: dict[int, Node] = {}
        self._ids_given = 0
        # The active path.  Never changed, only replaced: other threads may be reading it; and held,
        # since each turn asks for it several times, and in a long conversation it is long.
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
        """Context of the last reply on the active path; None where none has one."""
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
        return self.find(turn).turns

    def reply(self, turn: Turn | int | None = None) -> Node:
        """The node of a reply; None for the last one that is shown.

        Raises:
          ValueError: there is no reply, or the turn is not one.
        """
        if turn is not None:
            node = self.find(turn)
            if node.role != "model":
                raise ValueError(f"expected a reply, got {node.turn!r}")
            return node
        for node in reversed(self._path):
            if node.role == "model":
                return node
        raise ValueError("there is no reply yet: send a message first")

    def token(self, at: TokenRecord | int, turn: Turn | int | None = None) -> tuple[Node, int]:
        """The place of a token: a reply's node, and the token's index in it.

        Siblings share tokens; then it is the one that is shown, or else the newest.

        Args:
          at: a token of any reply, or the event that told of it, or its index.
          turn: the reply, where it is not clear from `at`; None with an index: the last reply.

        Raises:
          ValueError: no such token or turn.
        """
        if not isinstance(at, TokenRecord):
            return self._token_at(at, turn)
        if turn is not None:
            nodes = [self.find(turn)]
        else:
            nodes = [*self._path[::-1], *sorted(self.nodes(), key=lambda node: -node.id)]
        held = [n for n in nodes if n.turn is not None and at.index < len(n.turn.tokens)]
        for is_it in (operator.is_, _is_same_choice):
            for node in held:
                if is_it(node.said.tokens[at.index], at):
                    return node, at.index
        raise ValueError(f"no reply of this conversation holds the token {at.piece!r} ({at.index})")

    def _token_at(self, at: int, turn: Turn | int | None) -> tuple[Node, int]:
        try:
            at = number(at, "at")
        except ValueError as error:
            raise TypeError(f"expected a token of a reply or its index, got {at!r:.60}") from error
        node = self.reply(turn)
        count = len(node.said.tokens)
        if not 0 <= at < count:
            raise ValueError(f"the reply has tokens 0 to {count - 1}, got {at}")
        return node, at

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

    def new_id(self) -> int:
        """An id for the next turn."""
        self._ids_given += 1
        return self._ids_given

    def adopt(self, other: ConversationTree) -> None:
        """Becomes what another tree is, whose nodes both have then."""
        self.root, self.interventions = other.root, other.interventions
        self._by_id, self._path = other._by_id, other._path
        self._ids_given = other.last_id

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


def _is_same_choice(a: TokenRecord, b: TokenRecord) -> bool:
    """Whether two records are of one choice; one may be the event that told of it."""
    fields = ("token_id", "position", "logprob", "entropy", "key")
    return all(getattr(a, name) == getattr(b, name) for name in fields)
