"""What a user points at: names, files, folders, caches of the hubs."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from gemma_nb.checkpoints import catalog, hub, layout, memory, sources
from gemma_nb.checkpoints import load as front_door
from gemma_nb.errors import CheckpointError
from tests.checkpoints import tiny, written

pytestmark = pytest.mark.usefixtures("cache", "no_compilation_cache")


@pytest.mark.parametrize(
    ("write", "expected"),
    [
        (written.orbax_flat, ("Orbax", ".")),
        (written.orbax_multimodal, ("Orbax", "tiny")),  # an archive, tokenizer beside the folder
        (written.orbax_trained, ("Orbax", "default")),
        (written.hugging_face, ("Hugging Face", ".")),
        (written.gguf_split, ("GGUF", "tiny-00001-of-00002.gguf")),
    ],
)
def test_a_folder_is_known_by_what_is_in_it(write, expected, tmp_path):
    folder = write(tmp_path / "x", written.params())
    source = sources.resolve(folder)
    assert (source.format, str(source.files[0].relative_to(folder))) == expected


def test_a_folder_with_one_gguf_file_is_that_file(tmp_path):
    file = written.gguf_file(tmp_path, written.params())
    assert sources.resolve(str(tmp_path)).files == (file,)
    shutil.copy(file, tmp_path / "another.gguf")
    with pytest.raises(CheckpointError, match=r"several models, another\.gguf, tiny\.gguf; pass"):
        sources.resolve(tmp_path)


def test_any_file_of_a_split_model_stands_for_all(tmp_path):
    written.gguf_split(tmp_path, written.params())
    second = sources.resolve(tmp_path / "tiny-00002-of-00002.gguf")
    assert [file.name[5:10] for file in second.files] == ["00001", "00002"]
    wrong = tmp_path / "tiny-00003-of-00002.gguf"
    wrong.write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="expected a number from 00001 to 00002"):
        sources.resolve(wrong)


def test_several_orbax_checkpoints_in_a_folder_are_named(tmp_path):
    for name in ("2b", "7b"):
        written.orbax_flat(tmp_path / name, written.params())
    with pytest.raises(CheckpointError, match="several checkpoints, 2b, 7b; pass the path of one"):
        sources.resolve(tmp_path)


def test_a_released_name_is_looked_up_at_the_hubs(tmp_path, monkeypatch):
    """With its revision; what is known about the model wins over what the folder says."""
    folder = written.hugging_face(tmp_path, written.params())
    asked = []
    monkeypatch.setattr(
        hub, "locate", lambda name, revision=None: asked.append((name, revision)) or folder
    )
    info = front_door.load_params("gemma3-1b-it", revision="abc", progress=False)[2]
    assert asked == [("gemma3-1b-it", "abc")]
    assert info == dataclasses.replace(catalog.MODELS["gemma3-1b-it"], source=str(folder))


def test_links_of_the_hugging_face_cache_are_followed(tmp_path):
    """snapshots/<commit>/<file> -> blobs/<hash>, as huggingface_hub lays them out."""
    home = tmp_path / "models--google--gemma-3-270m"
    folder = home / "snapshots" / "abc"
    written.hugging_face(folder, written.params())
    (home / "blobs").mkdir()
    for i, file in enumerate(sorted(folder.iterdir())):
        shutil.move(file, home / "blobs" / str(i))
        file.symlink_to(Path("..", "..", "blobs", str(i)))
    assert front_door.load_params(folder, progress=False)[0] == tiny.CONFIG
    secret = tmp_path / "secret"
    shutil.move(home / "blobs" / "0", secret)
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(secret)
    with pytest.raises(CheckpointError, match=r"config\.json leads out of its folder"):
        front_door.load_params(folder, progress=False)


def test_what_cannot_fit_is_refused_unless_forced(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: 1000)
    for write in (written.hugging_face, written.orbax_flat, written.gguf_file):
        path = write(tmp_path / write.__name__, written.params())
        with pytest.raises(CheckpointError, match="force=True"):
            front_door.load_params(path, progress=False)
        assert front_door.load_params(path, force=True, progress=False)[0] == tiny.CONFIG


def test_instruction_tuned_folders_are_told_by_their_template_or_name(tmp_path):
    params = written.params()
    for name, content in {
        "chat_template.jinja": "{{ '<start_of_turn>user' }}",
        "tokenizer_config.json": '{"chat_template": "<start_of_turn>"}',
        "chat_template.json": '{"chat_template": "<start_of_turn>"}',
    }.items():
        folder = written.hugging_face(tmp_path / name, params)
        assert front_door.load_params(folder, progress=False)[2].tuning == "base"
        (folder / name).write_text(content)
        assert front_door.load_params(folder, progress=False)[2].tuning == "instruction"
    for name, tuning in {
        "gemma3-tiny-it": "instruction",
        "2b_it": "instruction",
        "item": "base",
    }.items():
        folder = written.orbax_flat(tmp_path / name, params)
        assert front_door.load_params(folder, progress=False)[2].tuning == tuning


def test_each_parameter_goes_where_the_mesh_says(tmp_path):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("model",))
    for write in (written.hugging_face, written.gguf_file):
        path = write(tmp_path / write.__name__, written.params())
        params = front_door.load_params(path, mesh=mesh, progress=False)[1]
        for leaf in layout.flatten(params).values():
            assert isinstance(leaf.sharding, jax.sharding.NamedSharding)
            assert leaf.sharding.mesh.axis_names == ("model",)
