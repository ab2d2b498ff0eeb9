"""One set of random weights of the tiny model, written in every format that is read."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import orbax.checkpoint as ocp
from safetensors.numpy import save_file

from gemma_nb.checkpoints import layout, orbax
from gemma_nb.text.tokenizer import Tokenizer
from tests.checkpoints import tiny

HF_CONFIG: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "vocab_size": tiny.CONFIG.num_embed,
    "hidden_size": tiny.CONFIG.embed_dim,
    "intermediate_size": tiny.CONFIG.hidden_dim,
    "num_hidden_layers": tiny.CONFIG.num_layers,
    "num_attention_heads": tiny.CONFIG.num_heads,
    "num_key_value_heads": tiny.CONFIG.num_kv_heads,
    "head_dim": tiny.CONFIG.head_dim,
    "query_pre_attn_scalar": 32,
    "sliding_window": 16,
    "sliding_window_pattern": 6,
    "max_position_embeddings": tiny.CONFIG.max_context,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "hidden_activation": "gelu_pytorch_tanh",
}


def params(dtype: Any = np.float32) -> dict[str, Any]:
    """The official tree; scales have few digits, so that 1 + scale - 1 is the scale again."""
    rng = np.random.default_rng(7)

    def value(leaf: layout.Leaf) -> np.ndarray:
        raw = rng.normal(size=leaf.shape).astype(dtype)
        return np.round(raw * 64) / np.float32(64) if leaf.is_norm else raw

    return layout.nest(
        (leaf.path, value(leaf).astype(dtype)) for leaf in layout.leaves(tiny.CONFIG)
    )


def tokenizer(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Tokenizer.from_gguf(tiny.vocabulary()).save_model(folder / "tokenizer.model")


@contextlib.contextmanager
def quiet():
    """Without what Orbax logs as warnings while it saves."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    yield
    logging.getLogger("absl").setLevel(logging.WARNING)


def save_tree(tree: Mapping[str, Any], path: Path) -> None:
    with quiet(), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), tree)
        checkpointer.wait_until_finished()


def add_config(folder: Path) -> None:
    """As `save_params` stores it: shapes do not tell the tiny model's windows."""
    from gemma_nb.checkpoints import infer

    about = json.loads((folder / "_CHECKPOINT_METADATA").read_text())
    about["custom_metadata"] = {"gemma_nb": {"config": infer.to_json(tiny.CONFIG)}}
    (folder / "_CHECKPOINT_METADATA").write_text(json.dumps(about))


# --- formats --------------------------------------------------------------------------------------


def orbax_saved(folder: Path, tree: Mapping[str, Any]) -> Path:
    path = orbax.save_params(tree, tiny.CONFIG, folder)
    tokenizer(path)
    return path


def orbax_flat(folder: Path, tree: Mapping[str, Any]) -> Path:
    """As the first Gemmas were released: names with slashes, `mlp/linear` -> `w`."""
    save_tree(layout.released(tree), folder)
    add_config(folder)
    tokenizer(folder)
    return folder


def orbax_nested(folder: Path, tree: Mapping[str, Any]) -> Path:
    save_tree(tree, folder)
    add_config(folder)
    tokenizer(folder)
    return folder


def orbax_multimodal(folder: Path, tree: Mapping[str, Any]) -> Path:
    """With the vision encoder and its way into the embedding, in an archive of its own."""
    image = np.ones((3, 4), np.float32)
    flat = {
        **layout.released(tree),
        "SigLiPFromPatches_0/siglip_encoder/Transformer/encoderblock_0/MlpBlock_0/Dense_0": {
            "kernel": image
        },
        "transformer/embedder/mm_input_projection": {"w": image},
        "transformer/embedder/mm_soft_embedding_norm": {"scale": image[0]},
    }
    save_tree(flat, folder / "tiny")
    add_config(folder / "tiny")
    tokenizer(folder)
    return folder


def orbax_trained(folder: Path, tree: Mapping[str, Any]) -> Path:
    """What a trainer keeps: parameters, optimizer and step, in `default`."""
    state = {"params": tree, "opt_state": {"mu": np.ones(3)}, "step": np.int32(7)}
    save_tree({**state, "collections": {}}, folder / "default")
    add_config(folder / "default")
    tokenizer(folder)
    return folder


def orbax_zarr(folder: Path, tree: Mapping[str, Any]) -> Path:
    """A folder per array, as before Orbax kept all in one database."""
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
    with quiet(), ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(folder.absolute(), args=ocp.args.PyTreeSave(layout.released(tree)))
    add_config(folder)
    tokenizer(folder)
    return folder


def hugging_face(
    folder: Path,
    tree: Mapping[str, Any],
    *,
    shards: int = 2,
    rename: Callable[[str], str] = str,
    extra: Mapping[str, np.ndarray] | None = None,
    config: Mapping[str, Any] = HF_CONFIG,
) -> Path:
    """A folder as `save_pretrained` writes it, with an index unless there is one file."""
    tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {
        rename(n): np.ascontiguousarray(a) for n, a in layout.to_hf(tree, tiny.CONFIG).items()
    }
    tensors |= extra or {}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    where = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        names = list(tensors)[i::shards]
        save_file({name: tensors[name] for name in names}, folder / file, {"format": "pt"})
        where |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def hugging_face_multimodal(
    folder: Path, tree: Mapping[str, Any], *, new_names: bool = False
) -> Path:
    """Gemma3ForConditionalGeneration: text names inside, images beside, padded vocabulary."""

    def rename(name: str) -> str:
        if new_names:
            return name.replace("model.", "model.language_model.", 1)
        return f"language_model.{name}"

    before = "model." if new_names else ""
    image = np.ones((4, 3), np.float32)
    embedding = tree["embedder"]["input_embedding"]
    padded = np.concatenate([embedding, np.zeros((64, embedding.shape[1]), embedding.dtype)])
    extra = {
        f"{before}vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight": image,
        f"{before}multi_modal_projector.mm_input_projection_weight": image,
        rename("model.embed_tokens.weight"): padded,
    }
    text = {**HF_CONFIG, "vocab_size": len(padded)}
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": text,
        "vision_config": {"model_type": "siglip_vision_model"},
    }
    return hugging_face(folder, tree, rename=rename, extra=extra, config=config)


def gguf_file(folder: Path, tree: Mapping[str, Any], *, quantize: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    arrays = layout.to_gguf(tree, tiny.CONFIG)
    arrays = {name: np.ascontiguousarray(a, np.float32) for name, a in arrays.items()}
    return tiny.write(folder / "tiny.gguf", arrays=arrays, quantize=quantize)


def gguf_split(
    folder: Path, tree: Mapping[str, Any], *, changes: Mapping[int, Mapping[str, int]] | None = None
) -> Path:
    """Two files with a header each; `changes` replaces split fields of one of them."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = layout.to_gguf(tree, tiny.CONFIG)
    arrays = {name: np.ascontiguousarray(a, np.float32) for name, a in arrays.items()}
    names = list(arrays)
    for i, chosen in enumerate((names[:5], names[5:])):
        path = folder / f"tiny-{i + 1:05}-of-00002.gguf"
        fields = {"split.no": i, "split.count": 2, "split.tensors.count": len(names)}
        fields |= (changes or {}).get(i, {})
        if i == 0:
            own = {name: arrays[name] for name in chosen}
            tiny.write(path, fields={**tiny.FIELDS, **fields}, arrays=own)
            continue
        writer = gguf.GGUFWriter(path, "gemma3")
        for key, value in fields.items():
            writer.add_uint32(key, value)
        for name in chosen:
            writer.add_tensor(name, arrays[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return folder


LOSSLESS: dict[str, Callable[[Path, Mapping[str, Any]], Path]] = {
    "Orbax as saved": orbax_saved,
    "Orbax flat": orbax_flat,
    "Orbax nested": orbax_nested,
    "Orbax of a multimodal model": orbax_multimodal,
    "Orbax of a trainer": orbax_trained,
    "Orbax without a database": orbax_zarr,
    "safetensors in shards": hugging_face,
    "safetensors in one file": lambda folder, tree: hugging_face(folder, tree, shards=1),
    "safetensors of a multimodal model": hugging_face_multimodal,
    "safetensors of a multimodal model, new names": lambda folder, tree: hugging_face_multimodal(
        folder, tree, new_names=True
    ),
    "GGUF": gguf_file,
    "GGUF split": gguf_split,
}
