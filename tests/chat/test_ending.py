"""What a script that ends in the middle of a reply leaves."""

import subprocess
import sys
from pathlib import Path

from gemma_nb.chat import restore

REPO = Path(__file__).parents[2]
_ENDS = """
import sys
import gemma_nb as gnb
from gemma_nb.text.tokenizer import Tokenizer
from tests.chat.autosaving import model_for

tokenizer = Tokenizer.from_file(sys.argv[1])
model = model_for(tokenizer)
chat = gnb.ChatSession(model, tokenizer, template="none", cache_length=400, autosave=sys.argv[2])
chat.sampling = gnb.Sampling(seed=1)
stream = chat.stream("Hello")
for _ in range(3):
    print(next(stream).token_id)
"""


def test_a_reply_that_is_open_when_python_ends_is_saved(tiny_tokenizer, tmp_path):
    tokenizer, path = tiny_tokenizer.save_model(tmp_path / "tokenizer.model"), tmp_path / "talk.gnb"
    run = [sys.executable, "-c", _ENDS, str(tokenizer), str(path)]
    ended = subprocess.run(run, cwd=REPO, capture_output=True, text=True, check=True)
    assert "Exception ignored" not in ended.stderr
    _, reply = restore.read(path).tree.turns
    assert reply.finish_reason == "cancelled"
    read = [int(line) for line in ended.stdout.split()]
    assert [token.token_id for token in reply.tokens][:3] == read, "what was read is not there"
