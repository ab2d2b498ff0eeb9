"""Folders as Orbax's own `CheckpointManager` writes them: which step, and which item of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

from gemma_nb.checkpoints import layout, orbax_steps, sources
from gemma_nb.checkpoints import load as front_door
from gemma_nb.errors import CheckpointError
from tests.checkpoints import tiny, written

pytestmark = pytest.mark.usefixtures("cache", "no_compilation_cache")

MODEL = written.params()
STATE = {"opt_state": {"mu": {**MODEL}, "count": np.int32(3)}, "step": np.int32(7)}


def manager(root: Path, steps: dict[int, dict], **options) -> Path:
    """Saves items to steps, with the tiny model's numbers beside each item."""
    with (
        written.quiet(),
        ocp.CheckpointManager(root, options=ocp.CheckpointManagerOptions(**options)) as saves,
    ):
        for step, items in steps.items():
            args = {name: ocp.args.PyTreeSave(tree) for name, tree in items.items()}
            composite = ocp.args.Composite(**args, about=ocp.args.JsonSave({"epoch": 1}))
            saves.save(step, args=composite, force=True)
    for item in root.glob("*/*/_METADATA"):
        item.with_name("_CHECKPOINT_METADATA").write_text("{}")
        written.add_config(item.parent)
    written.tokenizer(root)
    return root


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> Path:
    """Three steps, of which the last differs in its norm."""
    other = {**MODEL, "final_norm": {"scale": MODEL["final_norm"]["scale"] + 1}}
    steps = {9: {"default": MODEL}, 0: {"default": MODEL}, 10: {"default": other}}
    return manager(tmp_path_factory.mktemp("three") / "run", steps)


@pytest.fixture
def run(three, tmp_path) -> Path:
    return Path(shutil.copytree(three, tmp_path / "run"))


def test_the_last_step_is_loaded_by_number(run):
    config, params, info, _ = front_door.load_params(run, progress=False)
    assert config == tiny.CONFIG
    assert info.name == "run-step10"
    np.testing.assert_array_equal(
        params["final_norm"]["scale"], (MODEL["final_norm"]["scale"] + 1).astype("bfloat16")
    )


@pytest.mark.parametrize("step", [0, 9, np.int64(9)])
def test_a_step_is_loaded_by_its_number(run, step):
    assert sources.resolve(run, step=step).files == (run / str(step) / "default",)


def test_a_step_that_is_not_there_is_said_with_those_that_are(run):
    with pytest.raises(CheckpointError, match=r"has no step 3; pass one of .* \(0, 9, 10\)"):
        sources.resolve(run, step=3)
    for wrong in (-1, True, 1.5, "9"):
        with pytest.raises(ValueError, match="expected the number of a step"):
            sources.resolve(run, step=wrong)
    for source in (run / "9", run / "9" / "default", "gemma3-1b"):
        with pytest.raises(ValueError, match="expected step=None"):
            sources.resolve(source, step=3)


def test_one_step_or_item_is_a_checkpoint_like_any_other(run):
    for path in (run / "9", run / "9" / "default"):
        assert sources.resolve(path).files == (run / "9" / "default",)
        assert front_door.load_params(path, progress=False)[0] == tiny.CONFIG


def leave_out_the_mark(run: Path) -> None:
    (run / "10" / "commit_success.txt").unlink(missing_ok=True)


def lose_its_commit(run: Path) -> None:
    for mark in run.glob("*/commit_success.txt"):
        mark.unlink()
    about = run / "10" / "_CHECKPOINT_METADATA"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"commit_timestamp_nsecs": None}))


@pytest.mark.parametrize(
    "cut_off",
    [
        lambda run: (run / "10").rename(run / "10.orbax-checkpoint-tmp"),
        lambda run: (run / "10").rename(run / "10.orbax-checkpoint-tmp-1700000000"),
        lambda run: (run / "10" / "default").rename(
            run / "10" / "default.orbax-checkpoint-tmp-1700000000"
        ),
        lose_its_commit,
        leave_out_the_mark,
    ],
)
def test_a_step_that_was_not_finished_is_passed_over(run, cut_off):
    """By the folders' names of older versions, and by the files of newer ones."""
    marked = (run / "9" / "commit_success.txt").exists()
    if cut_off is leave_out_the_mark and not marked:
        pytest.skip("this version of Orbax writes no such file here")
    if not marked:
        (run / "10" / "_CHECKPOINT_METADATA").unlink(missing_ok=True)
    cut_off(run)
    if cut_off is not lose_its_commit and not (run / "10" / "default").exists():
        (run / "10" / "commit_success.txt").unlink(missing_ok=True)
    assert sources.resolve(run).files == (run / "9" / "default",)
    with pytest.raises(CheckpointError, match="step 10 not whole: it was not finished"):
        sources.resolve(run, step=10)


def test_without_a_whole_step_it_is_said(run):
    for step in ("0", "9", "10"):
        (run / step).rename(run / f"{step}.orbax-checkpoint-tmp")
    with pytest.raises(CheckpointError, match=r"no step is whole, and 0.orb.* are not finished"):
        sources.resolve(run)


def test_parameters_are_found_among_several_items(tmp_path):
    """Whatever they are called: by the names in them."""
    for name, items in {
        "usual": {"params": MODEL, "opt": STATE["opt_state"]},
        "state": {"state": {"params": MODEL, **STATE}, "loader": {"position": np.ones(2)}},
        "deep": {"train_state": {"model": {"params": MODEL}, **STATE}},
    }.items():
        run = manager(tmp_path / name, {5: items}, step_prefix="ckpt", step_format_fixed_length=8)
        config, params, info, _ = front_door.load_params(run, dtype="float32", progress=False)
        assert config == tiny.CONFIG
        assert info.name == f"{name}-step5"
        for path, leaf in layout.flatten(params).items():
            np.testing.assert_array_equal(leaf, layout.flatten(MODEL)[path])


def test_several_models_are_named(tmp_path):
    run = manager(tmp_path / "run", {5: {"student": MODEL, "teacher": MODEL}})
    with pytest.raises(CheckpointError, match="several checkpoints, student, teacher; pass"):
        sources.resolve(run)
    both = manager(tmp_path / "both", {5: {"state": {"student": MODEL, "teacher": MODEL}}})
    with pytest.raises(CheckpointError, match="several models in it, at student, teacher; save"):
        front_door.load_params(both, progress=False)


def test_steps_of_several_trainings_are_named(run):
    for step in ("0", "9"):
        (run / step).rename(run / f"second_{step}")
    with pytest.raises(CheckpointError, match="steps of several trainings, 10, second_0, second_9"):
        orbax_steps.find(run)


def test_flax_keeps_a_step_in_its_folder_at_once(run, tmp_path):
    for step in ("9", "10"):
        (run / step / "default").rename(tmp_path / f"checkpoint_{step}")
    assert sources.resolve(tmp_path).files == (tmp_path / "checkpoint_10",)
