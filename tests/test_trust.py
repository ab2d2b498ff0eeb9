"""Folders and files that others can have written to: nothing is run from there.

What has to hold is what OpenSSH asks of `authorized_keys` (StrictModes): the file and every folder
on the way to it belong to the user or to root, and nobody else can write to them.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gemma_nb import trust

pytestmark = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="modes say nothing on Windows")


@pytest.fixture
def own(tmp_path) -> Path:
    """A cache folder with a part, and a file in it, that nobody else can write to."""
    part = tmp_path / "above" / "own" / "part"
    part.mkdir(parents=True, mode=0o755)
    for folder in (part, *part.parents[:2]):
        folder.chmod(0o755)
    (part / "file").write_bytes(b"ours")
    (part / "file").chmod(0o644)
    return part.parent


def give_away(path: Path, monkeypatch) -> None:
    """Makes a path somebody else's: as root in fact, otherwise by being somebody else."""
    if os.geteuid() == 0:
        os.chown(path, 65534, 65534)
        return
    real = os.lstat(path).st_uid
    monkeypatch.setattr(os, "geteuid", lambda: real + 1)


def test_what_is_ours_alone_is_trusted(own):
    assert trust.distrust(own / "part", own) == ""
    assert trust.read(own / "part" / "file") == b"ours"
    assert trust.distrust(own / "not there yet", own) == ""
    own.chmod(0o777)
    assert trust.distrust(own / "not" / "there", own) == f"others can write to {own}"


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o757, 0o1777, 0o722])
@pytest.mark.parametrize("which", ["own", "own/part"])
def test_a_folder_that_others_can_write_to_is_not(own, which, mode):
    (own.parent / which).chmod(mode)
    assert trust.distrust(own / "part", own) == f"others can write to {own.parent / which}"


@pytest.mark.parametrize("which", ["", "own", "own/part"])
def test_a_folder_that_belongs_to_somebody_else_is_not(own, which, monkeypatch):
    give_away(own.parent / which, monkeypatch)
    assert "belongs to" in trust.distrust(own / "part", own)


def test_a_folder_above_may_be_writable_where_others_cannot_move_what_is_in_it(own, monkeypatch):
    """As `/tmp` is, and as the homes are that only their user's own group can write to."""
    own.parent.chmod(0o777)
    assert trust.distrust(own / "part", own) == f"others can write to {own.parent}"
    own.parent.chmod(0o1777)
    assert trust.distrust(own / "part", own) == ""
    for alone in (True, False):
        monkeypatch.setattr(trust, "_is_group_of_one", lambda gid, alone=alone: alone)
        own.parent.chmod(0o775)
        assert (trust.distrust(own / "part", own) == "") is alone


def test_a_group_of_one_has_nobody_else_in_it(monkeypatch):
    import grp
    import pwd

    me = pwd.struct_passwd(("me", "x", os.geteuid(), 7, "", "", ""))
    other = pwd.struct_passwd(("other", "x", 70_000, 8, "", "", ""))
    members: dict[int, list[str]] = {7: ["me"], 8: [], 9: ["other"], 10: ["of a directory service"]}
    monkeypatch.setattr(pwd, "getpwall", lambda: [me, other])
    monkeypatch.setattr(
        grp, "getgrgid", lambda gid: grp.struct_group(("g", "x", gid, members[gid]))
    )
    assert [trust._is_group_of_one(gid) for gid in (7, 8, 9, 10, 11)] == [True, *[False] * 4]
    monkeypatch.setattr(pwd, "getpwall", lambda: [other])
    assert not trust._is_group_of_one(7)  # whoever lists us may have left out others, too


@pytest.mark.parametrize("relative", [False, True])
def test_links_count_as_what_they_lead_through_and_to(own, tmp_path, relative):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    elsewhere.chmod(0o755)
    target = Path("..", "..", "elsewhere") if relative else elsewhere
    (own / "linked").symlink_to(target)
    (own / "twice").symlink_to(own / "linked")
    assert trust.distrust(own / "twice", own) == ""
    elsewhere.chmod(0o775)
    assert trust.distrust(own / "twice", own) == f"others can write to {elsewhere}"
    (own / "a").symlink_to(own / "a")
    assert "cannot be looked into" in trust.distrust(own / "a", own)


def test_a_link_of_somebody_elses_is_not_followed(own, monkeypatch):
    (own / "linked").symlink_to(own / "part")
    if os.geteuid() != 0:
        pytest.skip("only root can give a link away")
    os.chown(own / "linked", 65534, 65534, follow_symlinks=False)
    assert "linked belongs to" in trust.distrust(own / "linked", own)


@pytest.mark.parametrize("kind", ["group", "all", "other", "link", "pipe"])
def test_a_file_that_others_can_have_written_is_not_read(own, kind, monkeypatch):
    file = own / "part" / "file"
    if kind == "other":
        give_away(file, monkeypatch)
    elif kind in ("link", "pipe"):
        file.rename(own / "file")
        file.symlink_to(own / "file") if kind == "link" else os.mkfifo(file)
    else:
        file.chmod(0o664 if kind == "group" else 0o646)
    with pytest.raises(trust.UntrustedError):
        trust.read(file)


def test_it_is_said_once(own):
    own.chmod(0o777)
    with pytest.warns(RuntimeWarning, match=r"own are not used: others can write to .*GEMMA_NB_C"):
        assert trust.warn_of(own / "part", own)
    assert trust.warn_of(own / "another", own)
