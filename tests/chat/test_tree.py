"""Branches are hidden, never lost."""

import pytest

from gemma_nb.chat.tree import ConversationTree
from gemma_nb.chat.turns import Turn


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
    tree.show_after(tree.root, None)
    assert tree.turns == ()
    assert tree.tip is tree.root
    tree.add(tree.root, Turn(2, "user", "Hello"))
    assert [turn.id for turn in tree.turns] == [2]
    assert [turn.id for turn in tree] == [1, 2]


def test_an_outline_shows_where_branches_part(make):
    chat = make()
    assert repr(chat.tree) == "<ConversationTree: 0 turns, of which 0 are shown (*)>"
    first = chat.chat("Hello\n there, " + "long " * 20)
    chat.fork(first.tokens[2], with_token="x")
    chat.chat("More")
    lines = repr(chat.tree).split("\n")
    assert lines[0] == "<ConversationTree: 5 turns, of which 4 are shown (*)>"
    assert lines[1].startswith("* 1 user: Hello there, long long")
    assert lines[1].endswith("...")
    assert lines[2].startswith("    2 model: ")
    assert lines[3].startswith("*   3 model: ")
    assert lines[3].endswith(" (fork of 2)")
    assert lines[4] == "*   4 user: More"
    assert lines[5].startswith("*   5 model: ")


def test_an_outline_of_many_turns_is_cut(make):
    tree = ConversationTree()
    for i in range(1, 151):
        tree.add(tree.tip, Turn(i, "user" if i % 2 else "model", "x"))
    lines = repr(tree).split("\n")
    assert lines[100] == "* 100 model: x"
    assert lines[101:] == ["  and 50 more"]
