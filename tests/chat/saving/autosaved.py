"""Checks of files that a session saves while it goes on."""

import gemma_nb as gnb
from gemma_nb.chat.saving import reader

SAMPLING = gnb.Sampling(seed=1, max_new_tokens=8)


def flush(chat):
    chat.keeper._autosave.flush()


def assert_saved(chat, path):
    saved = reader.read(path)
    assert list(saved.tree) == list(chat.tree)
    links = [(n.id, n.active, n.undone) for n in chat.tree.nodes()]
    assert [(n.id, n.active, n.undone) for n in saved.tree.nodes()] == links
    assert (saved.settings.sampling, saved.settings.system) == (chat.sampling, chat.system)
