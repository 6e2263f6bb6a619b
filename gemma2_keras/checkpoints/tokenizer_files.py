"""The tokenizer's files that transformers reads, made from the SentencePiece model without that library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gemma2_keras.checkpoints.saving import write_json
from gemma2_keras.checkpoints.tokenizer_json import TOKENIZER_JSON_FILE, describe_tokenizer
from gemma2_keras.checkpoints.transformers import TOKENIZER_FILE

TOKENIZER_CONFIG_FILE = "tokenizer_config.json"

# Turns and roles as Gemma 2 was taught them. Its weights know no system role; a system message comes before the first
# user message, as in our own conversations.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] | trim + '\n\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + (system if loop.first else '') + message['content'] | trim "
    "+ '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def write_tokenizer(folder: Path, tokenizer: Any) -> None:
    """Write `tokenizer.model`, `tokenizer.json` and `tokenizer_config.json`.

    With them transformers gives the ids that `tokenizer.encode(text, parse_special=True)` gives, with `<bos>` before,
    for any text without U+2581, the character that stands for a space.

    Args:
        folder: an existing folder.
        tokenizer: a `Gemma2Tokenizer`.
    """
    (folder / TOKENIZER_FILE).write_bytes(tokenizer.proto)
    text = json.dumps(describe_tokenizer(tokenizer), ensure_ascii=False, separators=(",", ":"))
    (folder / TOKENIZER_JSON_FILE).write_text(text, encoding="utf-8")
    pieces = {"pad": tokenizer.pad_token_id, "eos": tokenizer.end_token_id, "bos": tokenizer.start_token_id}
    config = {f"{name}_token": tokenizer.id_to_token(i) for name, i in pieces.items()}
    config |= {
        "tokenizer_class": "GemmaTokenizer",
        "unk_token": tokenizer.id_to_token(tokenizer.unk_token_id),
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.start_of_turn_id is not None and tokenizer.end_of_turn_id is not None:
        config["chat_template"] = CHAT_TEMPLATE
    write_json(folder / TOKENIZER_CONFIG_FILE, config)
