"""From the start of a process to its first token: `python -m tests.bench.startup NAME FOLDER`.

The child process prints when it had imported, loaded and made a token; `measure` starts it.
"""

from __future__ import annotations

import compileall
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.bench.names import HF_BF16, LLAMA, OURS
from tests.bench.worker import PATIENCE, REPO, bounded

if TYPE_CHECKING:
    from gemma_nb.model import GemmaTransformer
    from gemma_nb.text.tokenizer import Tokenizer

QUESTION = "What is the capital of France?"
MARKS = ("imported", "loaded", "first token")


def measure(name: str, folder: Path) -> dict[str, float]:
    """Seconds from the start of a fresh process to each of MARKS.

    Args:
      name: whose process: a name of `contestants`.
      folder: gemma_nb's cache folder (empty: a cold start); for others see `prepare`.

    Raises:
      subprocess.SubprocessError: the process failed, or took too long.
    """
    environment = {**os.environ, "GEMMA_NB_CACHE": str(folder)}
    # JAX would otherwise keep compiled programs where the user has it keep them.
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    # As whatever was installed is.
    compileall.compile_dir(REPO / "gemma_nb", quiet=1)
    command = [sys.executable, "-m", "tests.bench.startup", name, str(folder)]
    start = time.time()
    done = subprocess.run(
        command,
        env=environment,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPO,
        timeout=PATIENCE + 10,  # it has said by then where it was, see `main`
    )
    marks = json.loads(done.stdout.splitlines()[-1])
    return {mark: marks[mark] - start for mark in MARKS}


def prepare(name: str, model: GemmaTransformer, tokenizer: Tokenizer, folder: Path) -> None:
    """Puts into `folder` what a contestant other than ourselves starts from."""
    from gemma_nb.text.template import Message, resolve_template

    template = resolve_template("auto", model.info.tuning if model.info else "base")
    ids = template.encode(tokenizer, [Message("user", QUESTION)])
    (folder / "prompt.json").write_text(json.dumps(ids))
    if name == LLAMA:
        from tests.bench.rivals import joined_gguf

        joined_gguf(folder)
    elif name != OURS:
        import transformers

        from tests.bench.rivals import hugging_face

        transformers.utils.logging.disable_progress_bar()
        hugging_face(model, name).save_pretrained(folder)


def _ours(marks: dict[str, float]) -> None:
    import gemma_nb as gnb

    marks["imported"] = time.time()
    model, tokenizer = gnb.load("gemma3-270m", progress=False)
    marks["loaded"] = time.time()
    next(iter(gnb.ChatSession(model, tokenizer).stream(QUESTION)))


def _hugging_face(marks: dict[str, float], folder: Path, dtype: str) -> None:
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    marks["imported"] = time.time()
    model = transformers.Gemma3ForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    marks["loaded"] = time.time()
    # Ids, not text: the weights come without a tokenizer in their format.
    ids = torch.tensor([json.loads((folder / "prompt.json").read_text())])
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)


def _llama_cpp(marks: dict[str, float], folder: Path) -> None:
    import llama_cpp

    marks["imported"] = time.time()
    llama = llama_cpp.Llama(str(folder / "model.gguf"), n_ctx=1024, verbose=False)
    marks["loaded"] = time.time()
    next(llama.generate(json.loads((folder / "prompt.json").read_text()), temp=0.0))


def main(name: str, folder: Path) -> None:
    """Runs one process's part."""
    marks: dict[str, float] = {}
    with bounded():
        if name == OURS:
            _ours(marks)
        elif name == LLAMA:
            _llama_cpp(marks, folder)
        else:
            _hugging_face(marks, folder, "bfloat16" if name == HF_BF16 else "float32")
    marks["first token"] = time.time()
    print(json.dumps(marks))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
