"""Branches are hidden, never lost."""

import pytest

from gemma_nb.chat.events import Turn
from gemma_nb.chat.tree import ConversationTree


def test_the_active_path_follows_the_newest_branch():
    tree = ConversationTree()
    assert tree.turns == ()
    ask = tree.add(tree.root, Turn(1, "user", "Hi"))
    tree.add(ask, Turn(2, "model", "Hello"))
    tree.add(ask, Turn(3, "model", "Hey"))
    assert [turn.id for turn in tree.turns] == [1, 3]
    assert tree.tip.turn.id == 3
    assert [turn.id for turn in tree] == [1, 2, 3]


def test_a_turn_is_found_on_any_branch():
    tree = ConversationTree()
    ask = tree.add(tree.root, Turn(1, "user", "Hi"))
    hidden = Turn(2, "model", "Hello")
    tree.add(ask, hidden)
    tree.add(ask, Turn(3, "model", "Hey"))
    assert [turn.id for turn in tree.path_to(hidden)] == [1, 2]
    with pytest.raises(ValueError, match="not a turn of this conversation"):
        tree.path_to(Turn(9, "user", "elsewhere"))


def test_starting_over_hides_everything():
    tree = ConversationTree()
    tree.add(tree.root, Turn(1, "user", "Hi"))
    tree.root.active = None
    assert tree.turns == ()
    assert tree.tip is tree.root
    tree.add(tree.root, Turn(2, "user", "Hello"))
    assert [turn.id for turn in tree.turns] == [2]
    assert [turn.id for turn in tree] == [1, 2]
