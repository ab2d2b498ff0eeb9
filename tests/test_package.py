"""What `import gemma_nb` promises: the public names, and that it is cheap."""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import gemma_nb

REPO = Path(__file__).parents[1]
PUBLIC = {
    "__version__",
    "load",
    "list_models",
    "GemmaTransformer",
    "GemmaInputs",
    "TransformerConfig",
    "presets",
    "nn",
    "ChatSession",
    "Sampling",
    "Capture",
    "Trace",
    "trace",
    "list_sites",
    *("logit_lens", "token_statistics", "residual_norms", "direct_logit_attribution"),
    *("attention_rollout", "value_weighted_attention", "token_attribution"),
    *("head_statistics", "head_scores"),
    *("AblateHeads", "AblateMLP", "EditNeuron", "ForceToken", "KnockOut", "Patch"),
    *("ReplaceAttention", "ScaleHeads", "Steer", "steering_vector"),
    *("activation_patching", "LogitDifference", "Logit", "top_activations"),
    *("SparseAutoencoder", "Transcoder"),
    "plots",
    "ChatApp",
    "widgets",
    "errors",
    "CheckpointError",
}
HEAVY = {
    *("jax", "jaxlib", "flax", "orbax", "numpy", "xarray", "pandas", "matplotlib"),
    *("ipywidgets", "anywidget", "IPython", "sentencepiece", "gguf", "torch", "transformers"),
}


def python(program: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    ).stdout


def test_public_names_are_the_documented_ones():
    assert set(gemma_nb.__all__) == PUBLIC
    assert set(dir(gemma_nb)) == PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_name_resolves_and_stays(name):
    value = getattr(gemma_nb, name)
    assert value is not None
    assert getattr(gemma_nb, name) is value


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'gemma_nb' has no attribute 'lode'"):
        _ = gemma_nb.lode


def test_type_checkers_see_every_public_name():
    """The TYPE_CHECKING imports of `__init__` repeat its lazy table, from the same modules."""
    tree = ast.parse((REPO / "gemma_nb" / "__init__.py").read_text(encoding="utf-8"))
    seen = {
        name.name: node.module
        for branch in tree.body
        if isinstance(branch, ast.If)
        for node in branch.body
        if isinstance(node, ast.ImportFrom)
        for name in node.names
    }
    lazy = {
        name: home.removesuffix(f".{name}") if home == f"gemma_nb.{name}" else home
        for name, home in gemma_nb._PUBLIC.items()
    }
    assert seen == lazy


def test_import_pulls_in_nothing_heavy():
    loaded = python("import sys, gemma_nb; print(*sys.modules)").split()
    assert "gemma_nb" in loaded
    assert not HEAVY & {name.partition(".")[0] for name in loaded}


def test_import_takes_well_under_half_a_second():
    program = (
        # Of the processor: others may be using it, too.
        "import time; start = time.process_time(); import gemma_nb; "
        "print(time.process_time() - start)"
    )
    assert min(float(python(program)) for _ in range(3)) < 0.1


def test_each_room_can_be_imported_first():
    """No import cycle hides behind the order in which modules happen to be imported."""
    rooms = (
        "chat.session",
        "checkpoints.load",
        "interp.trace",
        "loading",
        "model",
        "text.template",
    )
    for room in rooms:
        python(f"import gemma_nb.{room}")


def test_version_is_that_of_the_distribution_and_of_the_changelog():
    assert importlib.metadata.version("gemma_nb") == gemma_nb.__version__
    assert f"## [{gemma_nb.__version__}]" in (REPO / "CHANGELOG.md").read_text(encoding="utf-8")


def test_distribution_is_typed_licensed_and_has_its_command():
    assert (REPO / "gemma_nb" / "py.typed").exists()
    licence = (REPO / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in licence
    assert "END OF TERMS AND CONDITIONS" in licence
    metadata = importlib.metadata.metadata("gemma_nb")
    assert metadata["License-Expression"] == "Apache-2.0"
    scripts = importlib.metadata.entry_points(group="console_scripts", name="gemma-nb")
    assert [script.value for script in scripts] == ["gemma_nb.cli:main"]
