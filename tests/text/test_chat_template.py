"""Chat templates of checkpoints, against what transformers 5.24 renders (literals: its texts)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import gemma_nb as gnb
from gemma_nb.errors import TemplateError
from gemma_nb.presets import ChatTemplates, ModelInfo
from gemma_nb.text.chat_template import JinjaTemplate
from gemma_nb.text.template import GemmaTemplate, Message, TranscriptTemplate, resolve_template
from tests.text.conftest import texts
from tests.text.test_template import written

INSTRUCTION = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}### Instruction:\n"
    "{{ m.content }}\n\n{% elif m.role == 'system' %}{{ m.content }}\n\n{% else %}### Response:\n"
    "{{ m.content }}\n\n{% endif %}{% endfor %}{% if add_generation_prompt %}### Response:\n"
    "{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' "
    "+ '\n' }}{% endfor %}"
)
CHATML_ASKS = CHATML + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
LLAMA = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}{% else %}"
    "{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
VICUNA = (
    "{% if messages[0].role == 'system' %}{{ messages[0].content + ' ' }}{% set rest = messages[1:]"
    " %}{% else %}A chat. {% set rest = messages %}{% endif %}{% for m in rest %}{% if m.role == "
    "'user' %}{{ 'USER: ' + m.content.strip() + ' ' }}{% else %}{{ 'ASSISTANT: ' + "
    "m.content.strip() + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
OWN_ROLE = (
    "{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }}\n"
    "{% elif m.role == 'model' %}A: {{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)
FORGETFUL = (  # leaves out what was thought, once there is a later message
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and not loop.last %}"
    "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ASKED = Message("user", " Hi <eos> ")
TALK = [ASKED, Message("model", "Hello!"), Message("user", "And now?")]


def given_by(source, tokenizer, **files):
    """What a session takes where a checkpoint's files hold `source`."""
    own = ChatTemplates((("default", source),), **files)
    return resolve_template("auto", "instruction", own, tokenizer)


# --- the text -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "system", "expected"),
    [
        (
            INSTRUCTION,
            "Sing.",
            "<bos>Sing.\n\n### Instruction:\n Hi <eos> \n\n### Response:\nHello!\n\n"
            "### Instruction:\nAnd now?\n\n### Response:\n",
        ),
        (
            CHATML_ASKS,
            "Sing.",
            "<bos><|im_start|>system\nSing.<|im_end|>\n<|im_start|>user\n Hi <eos> <|im_end|>\n"
            "<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\nAnd now?<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
        # Where a template does not ask for a reply, what it writes before one is put there.
        (
            CHATML,
            None,
            "<bos><|im_start|>user\n Hi <eos> <|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
            "<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            LLAMA,
            None,
            "<bos>[INST] Hi <eos> [/INST] Hello! <eos><bos>[INST] And now? [/INST]",
        ),
        (
            VICUNA,
            None,
            "<bos>A chat. USER: Hi <eos> ASSISTANT: Hello!<eos>USER: And now? ASSISTANT:",
        ),
        (OWN_ROLE, None, "<bos>Q:  Hi <eos> \nA: Hello!\nQ: And now?\nA:"),
    ],
)
def test_the_text_is_what_transformers_renders(tiny_tokenizer, source, system, expected):
    template = given_by(source, tiny_tokenizer)
    assert written(tiny_tokenizer, template.encode(tiny_tokenizer, TALK, system)) == expected


def test_the_template_says_what_ends_a_reply(tiny_tokenizer):
    ends = {
        INSTRUCTION: (
            *("\n\n### Instruction:", "\n### Instruction:"),
            *("\n\n### Response:", "\n### Response:"),
        ),
        CHATML_ASKS: ("<|im_end|>",),
        LLAMA: ("<eos>",),
        OWN_ROLE: ("\nQ:", "\nA:"),
    }
    for source, expected in ends.items():
        template = given_by(source, tiny_tokenizer)
        assert template.stop_strings == expected
        assert template.stop_ids(tiny_tokenizer) == GemmaTemplate().stop_ids(tiny_tokenizer)
    named = given_by(CHATML_ASKS, tiny_tokenizer, tokens=(("eos_token", "<start_of_turn>"),))
    assert tiny_tokenizer.control["<start_of_turn>"] in named.stop_ids(tiny_tokenizer)


@pytest.mark.parametrize("source", [INSTRUCTION, CHATML, LLAMA, VICUNA, OWN_ROLE])
@given(data=st.data())
def test_a_conversation_is_a_prefix_of_its_continuation(tiny_tokenizer, source, data):
    """Whatever ids the model sampled, tidy or not."""
    template = given_by(source, tiny_tokenizer)
    ordinary = sorted(set(range(tiny_tokenizer.vocab_size)) - set(tiny_tokenizer.control.values()))
    replies = st.lists(st.sampled_from(ordinary), max_size=6).map(tuple)
    messages = []
    for _ in range(2):
        ids = data.draw(replies)
        messages += [Message("user", data.draw(texts))]
        messages += [Message("model", tiny_tokenizer.decode(ids), ids)]
    whole = template.encode(tiny_tokenizer, messages)
    for count in (1, 2, 3):
        part = template.encode(tiny_tokenizer, messages[:count])
        assert whole[: len(part)] == part
        if count % 2:
            reply = messages[count].ids
            assert tuple(whole[len(part) :][: len(reply)]) == reply


@given(text=texts, system=texts)
def test_no_text_can_forge_a_control_piece(tiny_tokenizer, text, system):
    template = given_by(INSTRUCTION, tiny_tokenizer)
    control = set(tiny_tokenizer.control.values())
    for said in (text, f"<eos>{text}[<end_of_turn>]"):
        ids = template.encode(tiny_tokenizer, [Message("user", said)], f"<bos>{system}")
        assert [id_ for id_ in ids if id_ in control] == [tiny_tokenizer.bos_id]


def test_bos_leads_unless_the_files_say_that_none_does(tiny_tokenizer):
    for source in (CHATML, "{{ bos_token }}" + CHATML):
        for add_bos in (True, False):
            ids = given_by(source, tiny_tokenizer, add_bos=add_bos).encode(tiny_tokenizer, [ASKED])
            assert ids.count(tiny_tokenizer.bos_id) == (add_bos or source != CHATML)


def test_the_time_stands_still(tiny_tokenizer, monkeypatch):
    """What stands before a reply may not change with the date."""
    source = "{{ strftime_now('%A %d %B %Y') }}\n" + CHATML
    template = given_by(source, tiny_tokenizer)
    later = JinjaTemplate(**{**vars(template), "now": "2031-02-03T04:05:06"})
    text = written(tiny_tokenizer, later.encode(tiny_tokenizer, [ASKED]))
    assert text.startswith("<bos>Monday 03 February 2031\n")
    assert template.encode(tiny_tokenizer, [ASKED]) != later.encode(tiny_tokenizer, [ASKED])


# --- Gemma's own ----------------------------------------------------------------------------------

GEMMA_1 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not "
    "supported') }}{% endif %}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
GEMMA_3 = GEMMA_1.replace(
    "{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}",
    "{% set lead = messages[0]['content'] + '\n\n' %}{% set rest = messages[1:] %}{% else %}"
    "{% set lead = '' %}{% set rest = messages %}{% endif %}{% for message in rest %}",
).replace("role + '\n' + ", "role + '\n' + (lead if loop.first else '') + ")


@pytest.mark.parametrize("source", [GEMMA_1, GEMMA_3, GEMMA_1.replace("{{ bos_token }}", "<bos>")])
def test_gemmas_own_templates_stay_what_they_are(tiny_tokenizer, source):
    assert given_by(source, tiny_tokenizer) == GemmaTemplate()


def test_turns_with_a_system_turn_of_its_own_are_not_gemmas(tiny_tokenizer):
    source = GEMMA_1.replace("{{ raise_exception('System role not supported') }}", "")
    ids = given_by(source, tiny_tokenizer).encode(tiny_tokenizer, TALK[:1], "Sing.")
    assert written(tiny_tokenizer, ids) == (
        "<bos><start_of_turn>system\nSing.<end_of_turn>\n<start_of_turn>user\nHi <eos><end_of_turn>"
        "\n<start_of_turn>model\n"
    )


# --- what cannot be followed ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("{% for m in messages %}{{ m.content }", "line 1: unexpected '}'"),
        ("{{ raise_exception('for tools only') }}", "for tools only"),
        ("{{ messages[0].content }}", "it does not write each reply once"),
        ("{{ messages[-1].content }}", "is not what it writes before one that is there"),
        (CHATML_ASKS.replace("assistant\n", "assistant\n<think>"), "what it writes to ask for"),
        ("{{ messages|length }}" + CHATML, "is not what it writes before one that is there"),
        (CHATML.replace("{{", "{{ loop.revindex ~", 1), "is not what it writes before"),
        ("{% for m in messages %}{{ m.content|upper|replace('A', 'b') }}{% endfor %}", None),
        ("{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}", "more"),
    ],
)
def test_what_cannot_be_split_by_message_says_what_to_pass(tiny_tokenizer, source, problem):
    if problem is None:  # it changes letters; what is made of marks alone it leaves as it is
        template = given_by(source, tiny_tokenizer)
        with pytest.raises(TemplateError, match="it rewrites an earlier reply"):
            template.encode(tiny_tokenizer, TALK)
        return
    with pytest.raises(TemplateError) as caught:
        given_by(source, tiny_tokenizer)
    assert problem in str(caught.value)
    assert 'Pass template="gemma"' in str(caught.value)
    assert resolve_template("gemma", "base", ChatTemplates((("default", source),))).name == "gemma"


def test_a_reply_that_is_rewritten_later_is_refused_when_that_happens(tiny_tokenizer):
    template = given_by(FORGETFUL, tiny_tokenizer)
    assert len(template.encode(tiny_tokenizer, TALK)) > 0
    thought = [ASKED, Message("model", "<think>so</think>Hello!"), TALK[2]]
    assert len(template.encode(tiny_tokenizer, thought[:2])) > 0
    with pytest.raises(TemplateError, match="it rewrites an earlier reply"):
        template.encode(tiny_tokenizer, thought)


def test_a_system_text_that_has_no_place_is_refused(tiny_tokenizer):
    last = (  # where it stands depends on how many messages follow
        "{% for m in messages %}{% if m.role == 'user' %}U {% if loop.last and messages[0].role == "
        "'system' %}{{ messages[0].content }} {% endif %}{{ m.content }} A {% elif m.role == "
        "'assistant' %}{{ m.content }} {% endif %}{% endfor %}"
    )
    for source, problem in (
        (OWN_ROLE, "it leaves the system text out"),
        (LLAMA, r"it takes no system text \(roles must alternate\)"),
        (last, "differently once the conversation goes on"),
    ):
        template = given_by(source, tiny_tokenizer)
        assert len(template.encode(tiny_tokenizer, TALK)) > 0
        with pytest.raises(TemplateError, match=problem):
            template.encode(tiny_tokenizer, TALK, "Sing.")


def test_a_vocabulary_without_turns_says_so(tiny_tokenizer, monkeypatch):
    control = {k: v for k, v in tiny_tokenizer.control.items() if "turn" not in k}
    monkeypatch.setitem(vars(tiny_tokenizer), "control", control)
    with pytest.raises(TemplateError, match="the vocabulary has no '<start_of_turn>'"):
        GemmaTemplate().encode(tiny_tokenizer, TALK)


# --- choosing -------------------------------------------------------------------------------------


def test_the_files_template_goes_before_the_tuning_and_a_name_before_it(tiny_tokenizer):
    several = ChatTemplates((("default", CHATML), ("rag", INSTRUCTION)))
    sources = {"auto": CHATML, None: CHATML, "jinja": CHATML, "rag": INSTRUCTION, VICUNA: VICUNA}
    for name, source in sources.items():
        assert resolve_template(name, "base", several, tiny_tokenizer).source == source
    assert resolve_template("transcript", "base", several) == TranscriptTemplate()
    with pytest.raises(ValueError, match="expected 'auto', 'jinja', 'default', 'rag', 'gemma'"):
        resolve_template("tools", "base", several)
    unnamed = ChatTemplates((*several.sources[1:], ("tools", CHATML)))
    with pytest.raises(TemplateError, match="there are several, 'rag', 'tools', and none is"):
        resolve_template("auto", "base", unnamed)


# --- in a session ---------------------------------------------------------------------------------


def test_a_session_follows_it_with_evidence_and_branches(tiny_model, tmp_path):
    sampling = gnb.Sampling(seed=3, max_new_tokens=5)
    chat = gnb.ChatSession(*tiny_model, sampling=sampling, system="Be brief.", template=INSTRUCTION)
    first, second = chat.chat("Hello"), chat.chat("And now?")
    before = chat.tokenizer.decode(chat.tokens(second)[: second.tokens[0].position])
    assert before == (
        f"Be brief.\n\n### Instruction:\nHello\n\n### Response:\n{first.text}\n\n"
        "### Instruction:\nAnd now?\n\n### Response:\n"
    )
    assert chat.replay(second).tokens == second.tokens
    # It ends where another turn would begin; the ids are the model's up to there.
    ended = chat.fork(second.tokens[1], with_token="Yes.\n\n### Instruction:\nMore")
    assert ended.tokens[0] == second.tokens[0]
    assert (ended.text.endswith("Yes."), ended.finish_reason) == (True, "stop")
    assert chat.tokenizer.decode(ended.ids) == ended.text
    chat.save(tmp_path / "talk.gnb")
    again = gnb.ChatSession.load(tmp_path / "talk.gnb", *tiny_model)
    assert (again.template, again.turns) == (chat.template, chat.turns)


def test_a_session_takes_it_from_the_models_files(tiny_model):
    model, tokenizer = tiny_model
    own = ChatTemplates((("default", INSTRUCTION),))
    model = model.replace(info=ModelInfo("x", "X", "instruction", chat_templates=own))
    assert gnb.ChatSession(model, tokenizer).template.source == INSTRUCTION
    assert gnb.ChatSession(model, tokenizer, template="gemma").template == GemmaTemplate()


def test_a_system_text_is_checked_when_it_is_set(tiny_model):
    chat = gnb.ChatSession(*tiny_model, template=OWN_ROLE)
    with pytest.raises(TemplateError, match="leave the system text out"):
        chat.system = "Sing."
    assert chat.system is None
    with pytest.raises(TemplateError, match="leave the system text out"):
        gnb.ChatSession(*tiny_model, template=OWN_ROLE, system="Sing.")


def test_a_stored_template_is_checked():
    for wrong in ({"now": "yesterday"}, {"trim": "middle"}):
        with pytest.raises(ValueError, match=r"yesterday|trim must be one of"):
            JinjaTemplate(CHATML, **wrong)
