"""What a script that ends in the middle of a reply leaves."""

import subprocess
import sys
from pathlib import Path

from gemma_nb.chat import readers
from gemma_nb.chat.saving import journal, reader

REPO = Path(__file__).parents[2]
_ENDS = """
import sys
import gemma_nb as gnb
from gemma_nb.text.tokenizer import Tokenizer
from tests.chat.saving.autosaving import model_for

tokenizer = Tokenizer.from_file(sys.argv[1])
model = model_for(tokenizer)
chat = gnb.ChatSession(model, tokenizer, template="none", cache_length=400, autosave=sys.argv[2])
chat.sampling = gnb.Sampling(seed=1)
stream = chat.stream("Hello")
for _ in range(3):
    print(next(stream).token_id)
"""


_ENDS_ELSEWHERE = """
import sys, threading, time
import gemma_nb as gnb
from gemma_nb.app import ChatApp
from gemma_nb.checkpoints.load import use_compilation_cache
from gemma_nb.text.tokenizer import Tokenizer
from tests.chat.saving.autosaving import model_for

use_compilation_cache()
tokenizer = Tokenizer.from_file(sys.argv[1])
model = model_for(tokenizer)
sampling = gnb.Sampling(seed=1, max_new_tokens=900, forbidden=(0, 1, 5))

def session(path):
    return gnb.ChatSession(
        *(model, tokenizer), template="none", cache_length=1024, autosave=path, sampling=sampling
    )

app = ChatApp(session(sys.argv[2]))
app.chat_panel.send_message("Hello")
own = session(sys.argv[3])
threading.Thread(target=own.chat, args=("Hello",), daemon=True).start()
for chat in (app.chat, own):
    while chat.partial is None or len(chat.partial.tokens) < 3:
        time.sleep(0.001)
sys.exit(3)
"""


def test_replies_on_other_threads_end_when_python_does(tiny_tokenizer, tmp_path):
    """An app's worker thread, and a daemon thread of the user's own."""
    tokenizer = tiny_tokenizer.save_model(tmp_path / "tokenizer.model")
    paths = [tmp_path / "app.gnb", tmp_path / "own.gnb"]
    run = [sys.executable, "-c", _ENDS_ELSEWHERE, *map(str, (tokenizer, *paths))]
    ended = subprocess.run(run, cwd=REPO, capture_output=True, text=True, check=False)
    assert ended.returncode == 3, ended.stderr
    for path in paths:
        assert not journal.path_of(path).exists()
        _, reply = reader.read(path).tree.turns
        assert reply.finish_reason == "cancelled"
        assert 3 <= len(reply.tokens) < 900


def test_a_reply_that_is_open_when_python_ends_is_saved(tiny_tokenizer, tmp_path):
    tokenizer, path = tiny_tokenizer.save_model(tmp_path / "tokenizer.model"), tmp_path / "talk.gnb"
    run = [sys.executable, "-c", _ENDS, str(tokenizer), str(path)]
    ended = subprocess.run(run, cwd=REPO, capture_output=True, text=True, check=True)
    assert "Exception ignored" not in ended.stderr
    _, reply = reader.read(path).tree.turns
    assert reply.finish_reason == "cancelled"
    read = [int(line) for line in ended.stdout.split()]
    assert [token.token_id for token in reply.tokens][:3] == read, "what was read is not there"


def test_a_reply_is_noted_only_while_it_is_made(make):
    """However it ends; what is noted would be ended, and waited for, at Python's end."""
    chat = make()
    for end in ("read to its end", "closed", "dropped", "stopped"):
        stream = chat.stream("Hello")
        next(stream)
        assert [noted.stream() for noted in readers._open] == [stream], end
        if end == "read to its end":
            assert list(stream)
        elif end == "closed":
            stream.close()
        elif end == "stopped":
            chat.stop()
        del stream
        assert readers._open == set(), end
