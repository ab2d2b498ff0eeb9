"""Models on several devices: how they are split, and that they compute the same."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

import gemma_nb as gnb
from gemma_nb import placement
from tests.checkpoints import written

REPO = Path(__file__).parents[1]


def mesh(**axes: int) -> Mesh:
    """A mesh of these axes without the devices that it would need."""
    device = jax.devices()[0]
    return Mesh(np.full(tuple(axes.values()), device), tuple(axes))


# what a mesh may be


def test_none_and_a_single_device_need_no_mesh():
    assert placement.resolve(None) is None
    assert jax.device_count() == 1
    assert placement.resolve("auto") is None
    assert placement.shardings(gnb.presets.GEMMA3_270M, None) == {}
    assert placement.shardings(gnb.presets.GEMMA3_270M, "auto") == {}


@pytest.mark.parametrize("wrong", ["all", 8, ("model",)])
def test_what_is_no_mesh_is_refused(wrong):
    with pytest.raises(ValueError, match=r'expected a jax.sharding.Mesh, "auto" or None'):
        placement.resolve(wrong)


def test_the_axes_of_a_mesh_say_what_they_split():
    with pytest.raises(ValueError, match=r"the mesh axis 'x'; the axes are heads, model,"):
        placement.resolve(mesh(batch=1, x=1))
    assert placement.resolve(mesh(x=1)).axis_names == ("model",)  # a single axis can only be that
    assert placement.resolve(mesh(batch=1)).axis_names == ("batch",)


def test_explicit_axes_are_left_to_the_compiler():
    explicit = Mesh(np.array(jax.devices()), ("model",), axis_types=(AxisType.Explicit,))
    assert placement.resolve(explicit).axis_types == (AxisType.Auto,)


# how parameters are split


@pytest.mark.parametrize(
    ("dims", "shape", "axes", "expected"),
    [
        (("N", "D", "H"), (8, 64, 32), {"model": 8}, ("model", None, None)),
        (("N", "D", "H"), (8, 64, 32), {"heads": 2, "feed_forward": 4}, ("heads", None, None)),
        (("gate_up", "F", "D"), (2, 64, 32), {"heads": 2, "feed_forward": 4},
         (None, "feed_forward", None)),
        (("V", "D"), (64, 32), {"vocabulary": 2, "model": 4}, ("vocabulary", None)),
        (("V", "D"), (64, 32), {"batch": 4}, (None, None)),
        # Four heads cannot be split over eight devices: what they read is.
        (("N", "D", "H"), (4, 64, 32), {"model": 8}, (None, "model", None)),
        (("kv", "K", "D", "H"), (2, 1, 64, 32), {"model": 8}, (None, None, "model", None)),
        (("N", "D", "H"), (4, 60, 32), {"model": 8}, (None, None, None)),  # nothing is even
        (("D",), (64,), {"model": 8}, (None,)),  # the norms are everywhere
        (("B",), (6,), {"batch": 2, "model": 4}, ("batch",)),
        (("B",), (5,), {"data": 2, "model": 4}, (None,)),
    ],
)  # fmt: skip
def test_axes_are_split_evenly_or_not_at_all(dims, shape, axes, expected):
    assert placement.partition(dims, shape, mesh(**axes)) == PartitionSpec(*expected)


@pytest.mark.parametrize("name", list(gnb.presets.PRESETS))
def test_every_released_size_is_split_evenly(name):
    """Each device holds its share: all but the norms, which are a few thousandths at most."""
    config = gnb.presets.by_name(name)
    leaves = jax.tree_util.tree_leaves_with_path(gnb.GemmaTransformer.from_config(config).params)
    shapes = {tuple(key.key for key in path): leaf.shape for path, leaf in leaves}
    where = placement.shardings(config, mesh(model=8))
    held = sum(np.prod(where[path].shard_shape(shape)) for path, shape in shapes.items())
    assert 1 <= held * 8 / config.num_params() < 1.01


def test_a_model_on_one_device_has_no_mesh(tiny_model):
    model, _ = tiny_model
    assert model.mesh is None
    assert model.place(None).params is model.params
    assert model.place("auto").params is model.params


def test_what_is_not_of_the_text_model_is_everywhere(tiny_model):
    model, _ = tiny_model
    params = {"vision_encoder": {"kernel": np.zeros((8, 8))}}
    placed = placement.place(params, model.config, mesh(model=1))
    assert placed["vision_encoder"]["kernel"].sharding.spec == PartitionSpec()


# eight simulated devices, in a process of their own


@pytest.fixture(scope="module")
def eight_devices():
    """What tests/on_eight_devices.py reports."""
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    program = [sys.executable, "-W", "error", "-m", "tests.on_eight_devices"]
    done = subprocess.run(
        program, cwd=REPO, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


CASES = [
    ("many heads", "auto"),
    ("many heads", "batch and model"),
    ("many heads", "heads and feed_forward"),
    ("one key-value head", "auto"),
]


@pytest.mark.parametrize(("model", "name"), CASES)
def test_eight_devices_compute_what_one_does(eight_devices, model, name):
    result = eight_devices[model][name]
    assert result["devices"] == 8
    assert result["logits error"] < 1e-5
    assert result["reply"] == eight_devices[model]["one device"]
    assert len(set(result["reply"])) > 3  # a reply that says something about the model


@pytest.mark.parametrize(("model", "name"), CASES)
def test_each_device_holds_its_share_of_params_and_cache(eight_devices, model, name):
    result = eight_devices[model][name]
    ways = {"auto": 8, "batch and model": 4, "heads and feed_forward": 2}[name]
    for held in ("params", "decoding weights"):
        shares = np.array(result[held])
        assert len(shares) == 8
        assert shares.max() == shares.min()
        # The embedding belongs to neither heads nor feed-forward.
        limit = 1.0 if name == "heads and feed_forward" else 1.1 / ways
        assert shares.max() <= limit * result["bytes"]
    assert result["cache"] == [1 / ways] * 8
    assert result["cache of the model"] == [1 / ways] * 8


def test_a_checkpoint_is_read_onto_the_mesh(eight_devices):
    """`gnb.load` sends each device its part only, and the model then computes the same."""
    result = eight_devices["loaded"]
    assert result["mesh"] == {"model": 8}
    assert result["largest part"] <= 1 / 8
    assert result["logits error"] < 1e-5
    assert result["trace error"] < 1e-5


# two processes with four devices each, as on two hosts


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory):
    """What both processes of tests/on_two_hosts.py report."""
    folder = tmp_path_factory.mktemp("hosts")
    written.hugging_face(folder / "hf", written.params())
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "GEMMA_NB_CACHE": str(folder / "cache"),
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = [sys.executable, "-m", "tests.on_two_hosts"]
    hosts = [
        subprocess.Popen(
            [*program, str(process), str(port), str(folder)],
            cwd=REPO,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(2)
    ]
    try:
        printed = [host.communicate(timeout=600)[0] for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    assert [host.returncode for host in hosts] == [0, 0], "\n".join(printed)
    # The transport between the processes reports on the same stream.
    return [json.loads(next(x for x in out.splitlines() if x[:1] == "{")) for out in printed]


def test_two_hosts_share_a_model_and_both_get_the_whole_reply(two_hosts, eight_devices):
    for host in two_hosts:
        assert host["devices"] == [8, 4]
        assert host["rows here"] == host["rows"] / 2
        assert host["reply"] == eight_devices["many heads"]["one device"]
        assert host["logits"] == pytest.approx(eight_devices["many heads"]["logits"], rel=1e-5)
        assert host["loaded"] == pytest.approx(eight_devices["loaded"]["logits"], rel=1e-5)
