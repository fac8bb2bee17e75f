"""`python openai_script.py URL MODEL`: every endpoint through the openai library that is installed.

Written for 2.x and 3.x alike and without anything of this project, so that it runs in an
environment of its own. Prints the library's version when all was as expected.
"""

import sys
from typing import Any

import openai

TOOL: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def main(url: str, model: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
    asked: Any = [{"role": "user", "content": "What is the capital of France?"}]
    assert [m.id for m in client.models.list()] == [model] == [client.models.retrieve(model).id]
    whole = client.chat.completions.create(
        model=model, messages=asked, temperature=0, logprobs=True, top_logprobs=2
    )
    text = whole.choices[0].message.content
    assert text and "Paris" in text and whole.usage
    tokens = whole.choices[0].logprobs.content if whole.choices[0].logprobs else None
    assert tokens and len(tokens[0].top_logprobs) == 2 and tokens[0].logprob <= 0
    stream = client.chat.completions.create(
        model=model,
        messages=asked,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert chunks[-1].usage and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    several = client.chat.completions.create(
        model=model, messages=asked, n=2, seed=5, max_tokens=6, temperature=1
    )
    assert [choice.index for choice in several.choices] == [0, 1]
    called = client.chat.completions.create(
        model=model, messages=asked, tools=[TOOL], tool_choice="required", max_tokens=64, seed=1
    )
    calls: Any = called.choices[0].message.tool_calls
    assert calls and calls[0].function.name == "weather"
    raw = client.completions.create(model=model, prompt="One, two,", max_tokens=5, echo=True)
    assert raw.choices[0].text.startswith("One, two,")
    vectors = client.embeddings.create(model=model, input=["sand", "sea"]).data
    assert len(vectors) == 2 and abs(sum(x * x for x in vectors[0].embedding) - 1) < 1e-3
    for wrong, error in (
        ({"model": "no"}, openai.NotFoundError),
        ({"n": 0}, openai.BadRequestError),
    ):
        body: Any = {"model": model, "messages": asked, **wrong}
        try:
            client.chat.completions.create(**body)
        except error:
            continue
        raise AssertionError(f"{wrong} was accepted")
    print(f"openai {openai.__version__}: all as expected")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
