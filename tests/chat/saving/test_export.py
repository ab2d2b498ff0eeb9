"""Conversations for other programs, and from them."""

import json

import pytest

import gemma_nb as gnb
from gemma_nb.errors import ConversationError, TextError

SAMPLING = gnb.Sampling(seed=1, max_new_tokens=6)
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi! *What* now?"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Farewell."},
]


@pytest.fixture
def chat(tiny_model):
    return gnb.ChatSession.from_messages(*tiny_model, MESSAGES, sampling=SAMPLING, template="gemma")


def test_messages_come_back(chat):
    assert chat.messages() == MESSAGES
    assert json.loads(chat.export("json")) == MESSAGES
    assert chat.system == "Be brief."
    assert [turn.role for turn in chat.turns] == ["user", "model", "user", "model"]
    assert chat.turns[-1].finish_reason == "edited"


def test_an_imported_conversation_goes_on(chat):
    reply = chat.chat("And now?")
    context = chat.tokenizer.decode(chat.tokens(reply)[: reply.tokens[0].position])
    assert "Be brief.\n\nHello" in context
    assert "Farewell." in context
    assert chat.messages()[:5] == MESSAGES
    assert chat.messages()[6] == {"role": "assistant", "content": reply.text}


def test_an_imported_message_gets_its_reply_on_request(tiny_model):
    listed = {"messages": MESSAGES[:2]}
    chat = gnb.ChatSession.from_messages(*tiny_model, listed, sampling=SAMPLING)
    assert [turn.role for turn in chat.turns] == ["user"]
    for say in (chat.chat, lambda text: chat.sample(text, n=1)):
        with pytest.raises(ValueError, match=r"has no reply yet: make one with chat\.regenerate"):
            say("Are you there?")
    assert len(chat.turns) == 1
    assert chat.regenerate().role == "model"
    assert len(chat.chat("And now?").tokens) > 0


def test_only_the_active_branch_is_exported(chat):
    chat.chat("And now?")
    chat.undo()
    assert chat.messages() == MESSAGES


def test_the_templates_own_system_text_is_not_exported(tiny_model):
    chat = gnb.ChatSession.from_messages(*tiny_model, MESSAGES[1:], template="transcript")
    assert chat.messages() == MESSAGES[1:]
    assert chat.system == chat.template.default_system


def test_a_system_text_of_ones_own_stands_before_the_imported_one(tiny_model):
    chat = gnb.ChatSession.from_messages(*tiny_model, MESSAGES, system="Sing.", template="gemma")
    assert chat.system == "Sing."


def test_imported_replies_get_their_evidence_on_request(tiny_model, score):
    chat = gnb.ChatSession.from_messages(*tiny_model, MESSAGES, evidence=True, template="gemma")
    reply = chat.turns[1]
    assert "".join(record.text for record in reply.tokens) == reply.text
    expected = score(chat.tokens(reply))
    for record in reply.tokens:
        row = expected[record.position - 1]
        assert record.logprob == pytest.approx(row[record.token_id], abs=2e-5)
        assert len(record.alternatives) == 10
    # What ends the turn is part of the evidence, and not of the context.
    assert reply.tokens[-1].piece == "<end_of_turn>"
    assert reply.ids == tuple(record.token_id for record in reply.tokens[:-1])
    chat.chat("Go on")


def test_markdown_reads_as_what_was_said(chat):
    chat.sampling = gnb.Sampling(seed=1, max_new_tokens=3)
    chat.chat("More")
    text = chat.export()
    assert text.startswith(
        "# Conversation with Gemma\n\n> Be brief.\n\n## User\n\nHello\n\n## Gemma\n\nHi!"
    )
    assert text.endswith("*The reply reached max_new_tokens (3).*\n")
    assert chat.export("markdown") == text


@pytest.mark.parametrize("name", ["talk.md", "talk.MARKDOWN", "talk.json"])
def test_a_path_says_which_format(chat, tmp_path, name):
    text = chat.export(tmp_path / name)
    assert (tmp_path / name).read_text(encoding="utf-8") == text
    assert chat.export(tmp_path / name) == text  # replaced
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_an_exported_file_can_be_imported(chat, tiny_model, tmp_path):
    path = tmp_path / "talk.json"
    chat.export(path)
    again = gnb.ChatSession.from_messages(*tiny_model, path, template="gemma")
    assert again.turns == chat.turns
    path.write_text(json.dumps({"model": "another", "messages": MESSAGES}), encoding="utf-8")
    assert gnb.ChatSession.from_messages(*tiny_model, str(path)).messages() == MESSAGES


def test_unknown_formats_are_refused_with_the_known_ones(chat):
    with pytest.raises(ValueError, match=r"'markdown', 'json' or a path that ends in \.md"):
        chat.export("talk.docx")
    with pytest.raises(ConversationError, match="cannot be written"):
        chat.export("/nowhere/at/all/talk.md")


def test_text_parts_are_joined(tiny_model):
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    listed = [{"role": "user", "content": parts, "name": "Ann"}]
    chat = gnb.ChatSession.from_messages(*tiny_model, listed)
    assert chat.turns[0].text == "Hello"


CHATGPT = {
    "title": "A talk",
    "current_node": "c",
    "mapping": {
        "root": {"id": "root", "message": None, "parent": None, "children": ["s"]},
        "s": {
            "message": {
                "author": {"role": "system"},
                "content": {"content_type": "text", "parts": [""]},
            },
            "parent": "root",
        },
        "a": {
            "message": {
                "id": "a",
                "author": {"role": "user", "name": None},
                "content": {"content_type": "text", "parts": ["Hello"]},
                "metadata": {"timestamp_": "absolute"},
            },
            "parent": "s",
        },
        "b": {
            "message": {
                "author": {"role": "assistant"},
                "content": {"content_type": "text", "parts": ["Another"]},
            },
            "parent": "a",
        },
        "c": {
            "message": {
                "author": {"role": "assistant"},
                "content": {"content_type": "text", "parts": ["Hi"]},
            },
            "parent": "a",
        },
    },
}


@pytest.mark.parametrize(
    "exported",
    [
        [
            {"id": 1, "role": "user", "content": "Hello", "timestamp": 1.5, "name": None},
            {
                "role": "assistant",
                "content": "Hi",
                "model": "gpt",
                "tool_calls": None,
                "function_call": None,
                "refusal": None,
                "audio": None,
                "annotations": [],
            },
        ],
        [
            {"role": "User", "content": [{"type": "input_text", "text": "Hello"}]},
            {"role": "MODEL", "parts": [{"text": "H"}, {"text": "i"}]},
        ],
        {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]},
        {"id": "x", "messages": [{"role": "user", "content": ["Hel", "lo"]}, *MESSAGES[9:]]},
        CHATGPT,
        [CHATGPT],
    ],
)
def test_messages_of_other_programs_are_read(tiny_model, tmp_path, exported):
    path = tmp_path / "talk.json"
    path.write_text(json.dumps(exported), encoding="utf-8")
    for source in (exported, path):
        chat = gnb.ChatSession.from_messages(*tiny_model, source)
        assert [turn.text for turn in chat.turns] == ["Hello", "Hi"][: len(chat.turns)]
        assert chat.system == chat.template.default_system


def test_several_system_messages_lead_together(tiny_model):
    listed = [{"role": "developer", "content": "Sing."}, *MESSAGES]
    assert gnb.ChatSession.from_messages(*tiny_model, listed).system == "Sing.\n\nBe brief."


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ([CHATGPT, CHATGPT], "this holds 2 conversations: pass one, such as"),
        ({"text": "Hello"}, "expected a list of messages"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "got one of type 'image_url': images and files are not read",
        ),
        ([{"role": "user", "content": "x", "images": ["aGk="]}], "got also images"),
        ([{"role": "user", "content": {"content_type": "code", "text": "x"}}], "of type 'code'"),
        ([{"role": None, "content": "x"}], "message 0: expected {"),
        ([{"role": ["user"], "content": "x"}], "message 0: expected a role of system"),
        (["Hello"], "message 0: expected {"),
        ([{"role": "tool", "content": "x"}], "message 0: expected a role of system"),
        ([{"role": "assistant", "content": "x"}], "message 0: expected the user"),
        ([MESSAGES[1], MESSAGES[1]], "message 1: expected the assistant, got 'user'"),
        ([MESSAGES[1], MESSAGES[0]], "message 1: a system message can only be the first"),
        ([{"role": "user", "content": None}], "message 0: expected text as its content"),
        ([{"role": "user", "content": [{"type": "image"}]}], "parts of type 'text' only"),
        ([{"role": "user", "content": "x", "tool_calls": [1]}], "got also tool_calls"),
    ],
)
def test_what_is_no_conversation_of_text_is_refused(tiny_model, tmp_path, listed, message):
    with pytest.raises(ValueError, match=message):
        gnb.ChatSession.from_messages(*tiny_model, listed)
    path = tmp_path / "talk.json"
    path.write_text(json.dumps(listed), encoding="utf-8")
    with pytest.raises(ConversationError, match=rf"talk\.json: .*{message}"):
        gnb.ChatSession.from_messages(*tiny_model, path)


def test_text_that_cannot_be_tokenized_is_refused(tiny_model):
    with pytest.raises(TextError, match="surrogate"):
        gnb.ChatSession.from_messages(*tiny_model, [{"role": "user", "content": "\ud800"}])


@pytest.mark.parametrize("content", ["{", '{"other": 1}', "[" * 100_000, '"text"'])
def test_files_of_something_else_are_refused(tiny_model, tmp_path, content):
    path = tmp_path / "talk.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConversationError, match=r"talk\.json"):
        gnb.ChatSession.from_messages(*tiny_model, path)
    with pytest.raises(ConversationError, match="there is no file"):
        gnb.ChatSession.from_messages(*tiny_model, tmp_path / "nowhere.json")
