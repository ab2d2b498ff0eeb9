"""Choice among the Orbax checkpoints of a folder: items of a step, steps of a manager.

    run/                     what a CheckpointManager is given
      100/                   a step, also "ckpt_00000100"
        _CHECKPOINT_METADATA
        commit_success.txt   it is whole; newer versions of Orbax write it, older ones rename
        default/             an item: a checkpoint of its own; others are "params" or "state"
        metrics/
      200.orbax-checkpoint-tmp/   a step that was not finished

Flax's older `save_checkpoint` keeps a checkpoint at once in "checkpoint_100".
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from gemma_nb.checkpoints import folders, orbax_tree
from gemma_nb.errors import CheckpointError

_STEP = re.compile(r"(?:(?P<prefix>.+)_)?(?P<number>\d+)")
_PLAIN_PREFIXES = (None, "checkpoint", "ckpt", "step")
_UNFINISHED = ".orbax-checkpoint-tmp"
_COMMITTED, _ABOUT = "commit_success.txt", "_CHECKPOINT_METADATA"
_USUAL_ITEMS = ("default", "params")


def find(folder: Path, step: int | None = None) -> Path | None:
    """The checkpoint in `folder`: itself, the only one below it, or of its last step.

    Archives have it one level down, and trainers keep the parameters in `default` or `params`, or
    a step in a folder of its own.

    Args:
      folder: that is looked into.
      step: of a `CheckpointManager`'s folder; None is the last that is whole.

    Returns:
      The folder of the arrays; None if there is none.

    Raises:
      CheckpointError: there are several, or no such step, or none that is whole.
    """
    if orbax_tree.is_checkpoint(folder):
        return folder
    unfinished, steps = _steps(folder)
    if steps or (unfinished and step is not None):
        return _item(_chosen(folder, step, steps, unfinished))
    if found := _item(folder):
        return found
    if unfinished:
        raise CheckpointError(
            f"{folder}: no step is whole, and {_listed(unfinished)} not finished; pass a folder of "
            "a training that has saved one"
        )
    return None


def step_of(path: Path) -> int | None:
    """The number of the step that a checkpoint is, or is an item of; None if it is neither."""
    numbers = [_number(folder.name) for folder in (path, path.parent)]
    return next((number for number in numbers if number is not None), None)


def own_name(path: Path) -> str:
    """The name of a checkpoint: no item of a step is called by its own name."""
    step = step_of(path)
    if step is not None:
        home = path.parent if _number(path.name) is not None else path.parents[1]
        return f"{home.name}-step{step}"
    return path.parent.name if path.name in _USUAL_ITEMS else path.name


def _chosen(folder: Path, step: int | None, steps: dict[int, Path], unfinished: list[Path]) -> Path:
    if step is None:
        return steps[max(steps)]
    if step in steps:
        return steps[step]
    problem = f"has no step {step}"
    if any(_number(path.name) == step for path in unfinished):
        problem = f"has step {step} not whole: it was not finished"
    there = ", ".join(map(str, sorted(steps)[-8:])) or "none"
    raise CheckpointError(f"{folder} {problem}; pass one of the steps that are ({there})")


def _steps(folder: Path) -> tuple[list[Path], dict[int, Path]]:
    """Unfinished steps, and the whole ones by number."""
    found: dict[str | None, dict[int, Path]] = {}
    unfinished = []
    for path in sorted(path for path in folder.iterdir() if path.is_dir()):
        if _UNFINISHED in path.name:
            unfinished.append(path)
            continue
        match = _STEP.fullmatch(path.name)
        if match and _is_step(path, match["prefix"]):
            found.setdefault(match["prefix"], {})[int(match["number"])] = path
    if len(found) > 1:
        every = [path.name for steps in found.values() for path in steps.values()]
        raise CheckpointError(
            f"{folder} holds the steps of several trainings, {', '.join(sorted(every)[:8])}; pass "
            "the path of one step"
        )
    steps = next(iter(found.values()), {})
    # Where a file says of any step that it is whole, one without was being written or copied.
    marked = any((path / _COMMITTED).exists() for path in steps.values())
    whole = {n: p for n, p in steps.items() if _is_whole(p, marked=marked)}
    unfinished += [path for number, path in steps.items() if number not in whole]
    return unfinished, whole


def _is_step(path: Path, prefix: str | None) -> bool:
    if orbax_tree.is_checkpoint(path):
        return prefix in _PLAIN_PREFIXES
    return (path / _ABOUT).exists() or bool(_items(path))


def _is_whole(path: Path, *, marked: bool) -> bool:
    if (path / _COMMITTED).exists():
        return True
    if marked:
        return False
    if (path / _ABOUT).exists():
        with contextlib.suppress(CheckpointError):
            about = folders.read_json(path, _ABOUT)
            if about.get("commit_timestamp_nsecs", 0) is None:
                return False
    return orbax_tree.is_checkpoint(path) or bool(_items(path))


def _items(folder: Path) -> list[Path]:
    below = (path for path in sorted(folder.iterdir()) if path.is_dir())
    return [
        path for path in below if _UNFINISHED not in path.name and orbax_tree.is_checkpoint(path)
    ]


def _item(folder: Path) -> Path | None:
    """The checkpoint of parameters among the items of a step, or in an archive."""
    if orbax_tree.is_checkpoint(folder):
        return folder
    items = _items(folder)
    if len(items) > 1:  # optimizers and data loaders have items of their own
        items = [path for path in items if orbax_tree.lists_a_model(path)] or items
    for name in _USUAL_ITEMS:
        if folder / name in items:
            return folder / name
    if len(items) > 1:
        raise CheckpointError(
            f"{folder} holds several checkpoints, {', '.join(p.name for p in items)}; pass the "
            "path of one of them"
        )
    return items[0] if items else None


def _number(name: str) -> int | None:
    match = _STEP.fullmatch(name.partition(_UNFINISHED)[0])
    return int(match["number"]) if match else None


def _listed(paths: list[Path]) -> str:
    names = [path.name for path in paths]
    return f"{', '.join(names[:4])} {'is' if len(names) == 1 else 'are'}"
