"""Compiled programs are found again by what they are made from, and by nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from gemma_nb import executables, trust
from gemma_nb.cpu import quantise
from gemma_nb.executables import CachedJit, Kept
from gemma_nb.sampling.compile_ahead import COMPILING

pytestmark = pytest.mark.usefixtures("place")

# In a process of its own: what it computed, how often it traced, and what it left in the folder.
CODE = """
import json, sys, threading
import jax
import jax.numpy as jnp
import numpy as np
from gemma_nb import executables
from gemma_nb.checkpoints.load import use_compilation_cache
from gemma_nb.cpu import products

use_compilation_cache()
exec(sys.argv[1])
executables.begin_prefetch("a model")
traced = []

def double(tree, x):
    traced.append(1)
    return {"y": products.product(x, tree["w"]) * 2}, x + 1

double = executables.CachedJit(double, "static", donate_argnums=1)
tree, x = {"w": jnp.arange(6.0).reshape(3, 2)}, jnp.ones((2, 2))
y, after = double(tree, x)
executables.end_prefetch()
print(json.dumps([y["y"].tolist(), after.tolist(), len(traced), x.is_deleted()]))
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty cache folder, which is in use."""
    # What other tests have begun to compile on another thread would be kept there.
    for thread in threading.enumerate():
        if thread.name == COMPILING:
            thread.join()
    monkeypatch.setenv("GEMMA_NB_CACHE", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "jax"))
    yield tmp_path / "programs"
    jax.config.update("jax_compilation_cache_dir", before)


def programs(place):
    return sorted(place.glob("*/[!.s]*"))


def run(place, extra="", code=CODE):
    left = "JAX_DISABLE_MOST_OPTIMIZATIONS"
    kept = {k: v for k, v in os.environ.items() if not k.startswith("JAX_") or k == left}
    environment = kept | {"GEMMA_NB_CACHE": str(place.parent)}
    command = [sys.executable, "-c", code, extra]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


EXPECTED = [[[2.0, 10.0, 18.0]] * 2, [[2.0, 2.0]] * 2]


def test_a_second_process_computes_the_same_without_tracing(place):
    found = [run(place) for _ in range(3)]
    # The third has loaded it ahead.
    assert found == [[*EXPECTED, 1, True], *[[*EXPECTED, 0, True]] * 2]
    [file] = programs(place)
    assert json.loads(next(place.glob("*/start-*")).read_text()) == [file.name]


# A chat's first token: how often anything was lowered on the way.
FIRST_TOKEN = """
import json
import jax
import gemma_nb as gnb
import tests.tiny
from gemma_nb.checkpoints.load import use_compilation_cache

use_compilation_cache()
tokenizer = tests.tiny.tokenizer()
model = tests.tiny.model(tokenizer.vocab_size)
lowered = []

def note(event, seconds, **about):
    if event.endswith("jaxpr_to_mlir_module_duration"):
        lowered.append(event)

jax.monitoring.register_event_duration_secs_listener(note)
events = gnb.ChatSession(model, tokenizer, sampling=gnb.Sampling(seed=1)).stream("Hello!")
next(events)
print(json.dumps(len(lowered)))
events.close()
"""


def test_a_second_start_lowers_nothing(place):
    """Not even the small things: the first that is lowered takes a third of a second."""
    assert run(place, code=FIRST_TOKEN) > 0
    assert run(place, code=FIRST_TOKEN) == 0


@pytest.mark.parametrize(
    "extra",
    [
        "jax.config.update('jax_enable_x64', True)",
        "jax.config.update('jax_default_matmul_precision', 'highest')",
        "jax.config.update('jax_disable_most_optimizations', False)",
        "products.FEW = 1",
    ],
)
def test_what_would_be_traced_otherwise_is_another_program(place, extra):
    run(place)
    assert run(place, extra)[2] == 1
    assert len(programs(place)) == 2
    assert run(place)[2] == 0


def test_what_somebody_has_put_in_its_place_is_used_and_not_kept(place):
    """A function from a notebook may change without its source being known."""
    run(place)
    extra = "products.times_rows = products.product = lambda x, rows, **_: x @ rows.T + 1"
    assert run(place, extra)[:3] == [[[4.0, 12.0, 20.0]] * 2, EXPECTED[1], 1]
    assert len(programs(place)) == 1


def test_a_damaged_file_is_replaced(place):
    run(place)
    [file] = programs(place)
    whole = file.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], bytes(len(whole))):
        file.write_bytes(damaged)
        assert run(place) == [*EXPECTED, 1, True]
        assert run(place) == [*EXPECTED, 0, True]


# What ends the process as soon as a program from a file runs, as an instruction does that the
# processor has not.
CRASH = """
from gemma_nb.executables import files
files.serialize_executable.deserialize_and_load = lambda *_: lambda *_: os._exit(132)
"""


def test_a_program_that_crashed_is_not_tried_again(place):
    run(place)
    [file] = programs(place)
    with pytest.raises(subprocess.CalledProcessError) as died:
        run(place, CRASH, code=f"import os\n{CODE}")
    assert died.value.returncode == 132
    [marker] = place.glob("*/*.tried")
    assert marker.name.startswith(file.name)
    assert run(place) == [*EXPECTED, 1, True]
    assert [path.suffix for path in programs(place)] == [".refused"]
    assert not executables.files.load(file)


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


def test_a_crash_among_first_runs_together_is_remembered(place):
    run(place)
    [file] = programs(place)
    together = CODE.replace(
        "y, after = double(", "with executables.tried_together(): y, after = double("
    )
    with pytest.raises(subprocess.CalledProcessError):
        run(place, CRASH, code=f"import os\n{together}")
    [marker] = place.glob("*/*.tried")
    assert marker.name.startswith(file.name)


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


def test_what_was_loaded_from_jaxs_cache_is_not_written_anew(place):
    """XLA runs it, but cannot write it whole: in the process after that functions are missing."""
    run(place)
    [file] = programs(place)
    file.unlink()
    assert run(place) == [*EXPECTED, 1, True]
    assert run(place) == [*EXPECTED, 0, True]


def test_a_program_that_has_run_is_kept_whole(place):
    """Once it has sorted, XLA cannot write it any more."""
    code = CODE.replace('products.product(x, tree["w"]) * 2', "-jnp.sort(-x)")
    assert [run(place, code=code)[2] for _ in range(2)] == [1, 0]


def test_other_versions_are_cleared_away_but_the_last_few(place):
    for i in range(6):
        old = place / (str(i) * 64)
        old.mkdir(parents=True)
        (old / "step").write_bytes(b"x")
        os.utime(old, (i, i))
    (place / "a user's").mkdir()
    run(place)
    left = {folder.name[:2] for folder in place.iterdir()}
    assert {"a ", "33", "44", "55"} <= left
    assert len(left) == 5


def test_a_folder_that_cannot_be_written_to_does_no_harm(place):
    place.parent.mkdir(exist_ok=True)
    place.write_bytes(b"a file")
    assert run(place) == [*EXPECTED, 1, True]


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
