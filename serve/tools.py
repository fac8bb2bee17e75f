"""Tools a model may call: how clients declare them, how the prompt shows them, what a call is.

The notation is Hermes': <tools> in the system message, <tool_call>{"name": …, "arguments": {…}}
</tool_call> in the answer, which SmolLM2, Qwen and others were trained on; it is written as plain
text, so every chat template carries it. A choice of "required" or of one function is held by a
grammar, so that such a call is always valid. Called by openai.py and admit.py; calls.py reads.
"""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from serve.formats import Part
from serve.grammar.terms import Grammar

OPEN, CLOSE = "<tool_call>", "</tool_call>"
ToolName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
CallId = Annotated[str, StringConstraints(min_length=1, max_length=256)]


class Function(Part):
    """parameters: a JSON schema of the arguments; without one there are none."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Part):
    type: Literal["function"]
    function: Function


class NamedFunction(Part):
    name: ToolName


class NamedTool(Part):
    type: Literal["function"]
    function: NamedFunction


class CalledFunction(Part):
    """arguments: JSON text, as the model wrote it."""

    name: ToolName
    arguments: str


class Called(Part):
    """A call in the history of a conversation."""

    id: CallId
    type: Literal["function"]
    function: CalledFunction


Tools = Annotated[list[Tool], Field(max_length=128)]
ToolChoice = Literal["none", "auto", "required"] | NamedTool


def written(calls: Sequence[Called]) -> str:
    """Calls as the model wrote them."""
    return "\n".join(_call_text(c.function.name, c.function.arguments) for c in calls)


def _call_text(name: str, arguments: str) -> str:
    return f'{OPEN}\n{{"name": {json.dumps(name)}, "arguments": {arguments}}}\n{CLOSE}'


def introduction(tools: Sequence[Tool]) -> str:
    """What the system message says of the tools."""
    listed = [
        json.dumps(
            {"type": "function", "function": tool.function.model_dump(exclude_none=True)},
            ensure_ascii=False,
        )
        for tool in tools
    ]
    return (
        "These functions can be called, each described by a JSON schema:\n<tools>\n"
        + "\n".join(listed)
        + "\n</tools>\nTo call one, answer with its name and arguments as JSON, like this:\n"
        + _call_text("function_name", '{"argument": "value"}')
    )


def with_tools(messages: list[dict[str, str]], tools: Sequence[Tool]) -> list[dict[str, str]]:
    """The conversation with the tools in its system message, which is made if there is none."""
    if not tools:
        return messages
    about = introduction(tools)
    if messages and messages[0]["role"] == "system":
        first = {**messages[0], "content": messages[0]["content"] + "\n\n" + about}
        return [first, *messages[1:]]
    return [{"role": "system", "content": about}, *messages]


def forced(tools: Sequence[Tool], choice: ToolChoice | None, parallel: bool) -> Grammar | None:
    """The form of an answer that has to be a call; None when the model may decide."""
    if isinstance(choice, NamedTool):
        tools, parallel = [t for t in tools if t.function.name == choice.function.name], False
    elif choice != "required":
        return None
    schema = json.dumps({"anyOf": [_call_schema(tool.function) for tool in tools]})
    call = f'call: "{OPEN}\\n" body "\\n{CLOSE}"'
    start = 'start: call ("\\n" call)*' if parallel else "start: call"
    return Grammar("ebnf", f"{start}\n{call}\nbody: %json {schema}\n")


def _call_schema(function: Function) -> dict[str, Any]:
    nothing = {"type": "object", "properties": {}, "additionalProperties": False}
    return {
        "type": "object",
        "properties": {
            "name": {"const": function.name},
            "arguments": function.parameters or nothing,
        },
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }
