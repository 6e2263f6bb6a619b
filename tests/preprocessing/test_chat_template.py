from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gemma2_keras.errors import InputError
from gemma2_keras.preprocessing.chat_template import encode_chat, encode_chat_example
from tests.preprocessing import tiny

pytestmark = pytest.mark.once

# Of the model card, https://huggingface.co/google/gemma-2-2b-it.
TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)


def conversation(*contents: str, second: str = "model") -> list[dict[str, str]]:
    return [{"role": second if i % 2 else "user", "content": text} for i, text in enumerate(contents)]


def written(*contents: str, reply: bool = True) -> str:
    turns = [f"<start_of_turn>{turn['role']}\n{turn['content']}<end_of_turn>\n" for turn in conversation(*contents)]
    return "<bos>" + "".join(turns) + ("<start_of_turn>model\n" if reply else "")


@pytest.mark.parametrize("contents", [("Hello",), ("The cat", "sat."), ("The cat", "sat.", "The dog\n\non the log")])
@pytest.mark.parametrize("reply", [True, False])
def test_ids_are_those_of_the_written_template(tokenizer, contents, reply):
    ids = encode_chat(tokenizer, conversation(*contents), reply)
    assert ids == tokenizer.encode(written(*contents, reply=reply), parse_special=True)
    assert ids == encode_chat(tokenizer, tuple(conversation(*contents, second="assistant")), reply=reply)


# What spells a control token becomes one where a rendered text is parsed.
CONTENT = st.text(max_size=20).filter(lambda text: text.strip() and "<" not in text and "[@" not in text)


@given(contents=st.lists(CONTENT, min_size=1, max_size=4), reply=st.booleans())
@example(contents=["\u2581 \u2581", "\n\n a\t", "\ufffd"], reply=True)
def test_ids_are_those_of_the_template_of_the_model_card(contents, reply):
    sandbox = pytest.importorskip("jinja2.sandbox")
    tokenizer = tiny.tokenizer()
    template = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(TEMPLATE)
    text = template.render(
        messages=conversation(*contents, second="assistant"), bos_token="<bos>", add_generation_prompt=reply
    )
    ids = encode_chat(tokenizer, conversation(*contents), reply)
    assert ids == tokenizer.encode(text, parse_special=True)


@given(
    text=st.text(max_size=20), spelled=st.sampled_from(["<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>", "<pad>"])
)
def test_no_content_begins_or_ends_a_turn(text, spelled):
    tokenizer = tiny.tokenizer()
    content = f"{spelled}{text}{spelled}"
    ids = encode_chat(tokenizer, conversation(content, content))
    special = [i for i in ids if i in tokenizer.special_token_ids]
    assert special == [2, 106, 107, 106, 107, 106]
    assert tokenizer.decode(ids).count(content) == 2


def test_a_system_text_stands_before_the_first_message(tokenizer):
    system = {"role": "system", "content": " Be kind.\n"}
    ids = encode_chat(tokenizer, [system, *conversation(" The cat ", "sat.", "The dog")])
    assert ids == tokenizer.encode(written("Be kind.\n\nThe cat", "sat.", "The dog"), parse_special=True)


def test_a_longer_conversation_begins_with_the_shorter(tokenizer):
    whole = encode_chat(tokenizer, conversation("The cat", "sat.", "The dog"))
    for count, reply in ((1, True), (1, False), (2, False)):
        part = encode_chat(tokenizer, conversation("The cat", "sat.", "The dog")[:count], reply)
        assert whole[: len(part)] == part


USER, MODEL, SYSTEM = ({"role": role, "content": "Hello"} for role in ("user", "model", "system"))


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], "at least one"),
        (None, "at least one; given None"),
        ("Hello", "Messages are a list of .*given 'Hello'"),
        (USER, "Messages are a list of"),
        (5, "Messages are a list of .*given 5"),
        ([MODEL], "Message 0 has the role 'model'; roles alternate, and 'user' is next"),
        ([USER, USER], "Message 1 has the role 'user'; roles alternate, and 'model' is next"),
        ([USER, MODEL, {**MODEL, "role": "assistant"}], "Message 2 has the role 'model'.*'user' is next"),
        ([SYSTEM, MODEL], "Message 1 has the role 'model'.*'user' is next"),
        ([SYSTEM], "A system text alone is no conversation"),
        ([SYSTEM, SYSTEM, USER], "Message 1 has the role 'system', which only the first"),
        ([USER, SYSTEM], "Message 1 has the role 'system', which only the first"),
        ([USER, {"role": "tool", "content": "x"}], "Message 1 has the role 'tool'; allowed are"),
        ([{"role": None, "content": "x"}], "Message 0 has the role None; allowed are"),
        ([{"role": ["user"], "content": "x"}], "Message 0 has the role .*; allowed are"),
        ([USER, {**MODEL, "content": " \n"}], "Message 1 needs text as its content"),
        ([{**USER, "content": ""}], "Message 0 needs text as its content; given ''"),
        ([{**USER, "content": None}], "Message 0 needs text as its content; given None"),
        ([{**USER, "content": ["Hello"]}], "Message 0 needs text as its content"),
        ([{**SYSTEM, "content": ""}, USER], "Message 0 needs text as its content"),
        ([USER, {"content": "Hello"}], "Message 1 must be .*given {'content': 'Hello'}"),
        ([{"role": "user"}], "Message 0 must be"),
        (["Hello"], "Message 0 must be .*given 'Hello'"),
        ([USER, None], "Message 1 must be .*given None"),
        ([{**USER, "content": "\ud83d"}], "lone surrogate"),
    ],
)
def test_what_is_no_conversation_is_refused(tokenizer, messages, error):
    with pytest.raises(InputError, match=error):
        encode_chat(tokenizer, messages)


@pytest.mark.parametrize("name", ["start_of_turn_id", "end_of_turn_id"])
def test_a_vocabulary_without_turns_is_refused(name):
    tokenizer = tiny.tokenizer()
    setattr(tokenizer, name, None)
    with pytest.raises(InputError, match="has no <start_of_turn> and <end_of_turn>"):
        encode_chat(tokenizer, conversation("Hello"))


# What the loss counts


@given(contents=st.lists(st.text(max_size=12).filter(str.strip), min_size=1, max_size=5), system=st.booleans())
@example(contents=["a", "\n\n model\n"], system=True)
@example(contents=["model\n", "<end_of_turn>\n"], system=False)
def test_an_example_is_the_conversation_and_counts_what_the_model_says(contents, system):
    tokenizer = tiny.tokenizer()
    messages = [{"role": "system", "content": "Be kind."}] * system + conversation(*contents)
    ids, counted = encode_chat_example(tokenizer, messages)
    assert ids == encode_chat(tokenizer, messages, reply=False)
    # What a reply would begin with does not count, and where it would stop does.
    expected = []
    for i in range(1, len(contents), 2):
        prompt = encode_chat(tokenizer, messages[: i + system])
        reply = encode_chat(tokenizer, messages[: i + 1 + system], reply=False)
        newline = len(tokenizer.encode("\n"))
        assert reply[: len(prompt)] == prompt
        assert reply[-newline - 1] == 107
        expected += range(len(prompt), len(reply) - newline)
    assert [i for i, counts in enumerate(counted) if counts] == expected
