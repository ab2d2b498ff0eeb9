"""`CachedJit` within a process: what tells calls apart, and what is stored."""

from __future__ import annotations

import os
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from gemma_nb import executables, trust
from gemma_nb.cpu import quantise
from gemma_nb.executables import CachedJit, Kept
from tests.executables.processes import programs

pytestmark = pytest.mark.usefixtures("place")


def test_first_runs_together_are_waited_for_at_the_end(place, monkeypatch):
    """They overlap, and each is known to be tried until all of them have ended."""
    x = np.zeros(2, np.float32)
    for name in "ab":
        CachedJit(jnp.exp, name)(x)
    loaded = [CachedJit(jnp.exp, name) for name in "ab"]
    waited = []
    monkeypatch.setattr(jax, "block_until_ready", waited.append)
    with executables.tried_together():
        first = loaded[0](x)
        loaded[1](x)  # freed at once
        assert len(list(place.glob("*/*.tried"))) == 2
        assert not waited
    assert [[result is first for result in results] for results in waited] == [[True]]
    assert not list(place.glob("*/*.tried"))
    loaded[0](x)
    CachedJit(jnp.exp, "a")(x)
    assert len(waited) == 2  # a first run elsewhere is waited for by itself, and no second one


def test_a_program_that_was_refused_long_ago_is_kept_again(place):
    """Processes are also ended by somebody, in the midst of a first run."""
    x = np.zeros(2, np.float32)
    CachedJit(jnp.exp, "a")(x)
    [file] = programs(place)
    files = executables.files
    with files.trial(file):
        files._give_up_on_what_crashed(file.parent)  # another process starts meanwhile
        assert len(programs(place)) == 2
    assert programs(place) == [file]
    file.with_name(f"{file.name}.0123{files._TRIED}").touch()
    files._give_up_on_what_crashed(file.parent)
    assert files.is_refused(file)
    assert not file.exists()
    os.utime(files._refused(file), (0, 0))
    CachedJit(jnp.exp, "a")(x)
    assert file.exists()


def test_the_oldest_programs_are_dropped_beyond_the_limit(place, monkeypatch):
    x = np.zeros(2, np.float32)
    CachedJit(jnp.exp, "a")(x)
    [first] = programs(place)
    os.utime(first, (1, 1))
    monkeypatch.setenv("GEMMA_NB_CACHE_PROGRAMS_GB", "1e-9")
    CachedJit(jnp.exp, "b")(x)
    [second] = programs(place)
    assert second != first


def test_nothing_is_read_where_others_can_write(place, monkeypatch):
    monkeypatch.setattr(trust, "_warned", {place.parent})  # it was said before
    x = np.zeros(2, np.float32)
    CachedJit(jnp.exp, "a")(x)
    [file] = programs(place)
    loads = []
    monkeypatch.setattr(executables.files.pickle, "loads", loads.append)
    for path in (place.parent, place, file.parent, file):
        before = path.stat().st_mode
        path.chmod(before | 0o020)
        again = CachedJit(jnp.exp, "a")
        np.testing.assert_array_equal(again(x), [1, 1])
        path.chmod(before)
    assert loads == []


def test_shapes_and_static_arguments_tell_programs_apart(place):
    def add(x):
        return x + 1

    first, second = CachedJit(add, "a"), CachedJit(add, "b")
    for kept in (first, second):
        for count in (2, 3):
            x = np.zeros(count, np.float32)
            np.testing.assert_array_equal(kept(x), np.ones(count))
            kept(x)
        assert kept.count() == 2
    # Defined in a test, but what it is traced through is ours.
    assert len(programs(place)) == 4


def test_somebody_elses_module_is_not_kept(place):
    """Its code may change where its `repr` does not."""

    class Theirs(nn.Module):
        def __call__(self, x):
            return x + 1

    kept, x = CachedJit(jnp.cosh, Theirs()), np.zeros(2, np.float32)
    assert kept.program(x) is kept.jitted
    np.testing.assert_array_equal(kept(x), [1, 1])
    assert not place.exists()


def test_without_a_folder_or_arrays_it_is_the_jitted_function(place):
    kept = CachedJit(lambda x: x + 1)
    assert float(kept(1.0)) == 2
    jax.config.update("jax_compilation_cache_dir", str(place / "elsewhere"))
    assert executables.folder() is None
    assert float(kept(2.0)) == 3
    assert kept.count() == 1
    assert not place.exists()


def test_a_program_that_is_compiled_ahead_is_waited_for(place, monkeypatch):
    """Two threads that need one compile it once."""
    begun, go, traced = threading.Event(), threading.Event(), []

    def slow(x):
        traced.append(1)
        begun.set()
        go.wait(10)
        return x + 1

    kept, x = CachedJit(slow), np.zeros(2, np.float32)
    ahead = threading.Thread(target=kept.compile, args=(x,))
    ahead.start()
    assert begun.wait(10)
    found = []
    other = threading.Thread(target=lambda: found.append(kept(x)))
    other.start()
    go.set()
    ahead.join()
    other.join()
    np.testing.assert_array_equal(found[0], [1, 1])
    assert traced == [1]


def test_nothing_is_looked_up_while_arrays_are_traced(place):
    add = CachedJit(lambda x: x + 1)
    x = jnp.zeros(3)
    add(x)
    found = []
    jax.jit(lambda x: found.append(add.program(x)) or x)(x)
    assert found == [add.jitted]
    assert add.program(x) is not add.jitted
    rows = jnp.arange(6.0).reshape(3, 2)
    plain = quantise.quantise(rows)
    inside = jax.jit(quantise.quantise)(rows)
    for a, b in zip(plain, inside, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_what_cannot_be_written_is_left_to_jaxs_cache(place, monkeypatch):
    def refuse(compiled):
        raise NotImplementedError("no such thing")

    monkeypatch.setattr(executables.files.serialize_executable, "serialize", refuse)
    x = np.zeros(2, np.float32)
    np.testing.assert_array_equal(CachedJit(jnp.exp, "a")(x), [1, 1])
    assert [file.suffix for file in programs(place)] == [".refused"]
    again = CachedJit(jnp.exp, "a")
    assert again.program(x) is again.jitted


def test_all_programs_are_let_go(place):
    kept, x = CachedJit(jnp.sinh), np.zeros(2, np.float32)
    kept(x)
    assert kept.count() == 1
    executables.forget()
    assert kept.count() == 0
    np.testing.assert_array_equal(kept(x), [0, 0])


def test_calls_are_told_apart_by_shapes_dtypes_and_kinds_of_arrays(place):
    """In turns, too, as sessions of different sizes call it; and by numpy's arrays as by JAX's."""
    count, traced = CachedJit(lambda tree: traced.append(1) or tree["a"] + 1), []
    calls = [{"a": jnp.zeros(n, dtype)} for n in (1, 2) for dtype in ("float32", "int32")]
    for _ in range(3):
        for tree in calls:
            found = count(tree)
            assert (found.shape, found.dtype) == (tree["a"].shape, tree["a"].dtype)
    count({"a": np.zeros(1, np.float32)})
    assert len(traced) == count.count() == len(calls)
    count.compile({"a": jax.ShapeDtypeStruct((1,), np.dtype("float32"))})
    assert count.count() == len(calls)


def test_scripts_may_say_shapes(place):
    x = np.zeros(2, np.float32)
    np.testing.assert_array_equal(Kept(jnp.exp, "static")((2,), x), [1, 1])
    assert len(programs(place)) == 1
