"""Chat templates render the characters that transformers renders, or refuse with a sentence."""

from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from models.chat_template import ChatTemplate

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief. <b>&</b>"},
    {"role": "user", "content": "  naïve “quotes” 😀\n"},
    {"role": "assistant", "content": "ok", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
TEMPLATES = {
    "trimmed blocks": "{% for m in messages %}\n  {% if m.role == 'user' %}\n{{ m.content }}\n"
    "  {% endif %}\n{% endfor %}\n",
    "json": "{{ messages | tojson }} {{ tools | tojson(indent=2) }}",
    "loop controls": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
    "{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% endfor %}",
    "date": "{{ strftime_now('%Y') }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% endfor %}{{ ns.n }}",
    "prompt": "{{ bos_token }}{% if add_generation_prompt %}go{% endif %}{{ eos_token }}",
    "nothing given": "{% if documents is none %}no{% endif %}{% if tools is none %}no{% endif %}",
    "methods": "{{ messages[0]['content'].split('.')[0].upper() | trim }}{{ messages[2].gone }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_renders_as_transformers(name: str, tools: Any):
    texts = {"bos_token": "<s>", "eos_token": "</s>"}
    for prompt in (True, False):
        (wanted,), _ = render_jinja_template(
            [MESSAGES], tools, None, TEMPLATES[name], add_generation_prompt=prompt, **texts
        )
        ours = ChatTemplate(TEMPLATES[name], texts, source="here")
        assert ours.render(MESSAGES, tools=tools, add_generation_prompt=prompt) == wanted


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "refuses these messages"),
        ("{{ missing.field }}", "missing"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely"),
    ],
)
def test_refusals_are_sentences(template: str, words: str):
    with pytest.raises(ValueError, match=words):
        ChatTemplate(template, {}, source="here").render(MESSAGES)


def test_a_broken_template_names_its_file():
    with pytest.raises(ValueError, match="here: the chat template is not valid jinja"):
        ChatTemplate("{% if %}", {}, source="here")


def test_rendering_leaves_the_messages_alone():
    before = [dict(message) for message in MESSAGES]
    ChatTemplate(TEMPLATES["json"], {}, source="here").render(MESSAGES)
    assert before == MESSAGES
