"""Programs are found again by other processes by what they are made from, and nothing else."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from gemma_nb import executables
from tests.executables.processes import CODE, EXPECTED, programs, run

pytestmark = pytest.mark.usefixtures("place")


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
