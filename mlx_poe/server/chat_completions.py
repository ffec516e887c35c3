"""`POST /v1/chat/completions`.

- in: a request's fields
- out: a prompt of messages with its options, and the response's choices: texts and tool calls
"""

from __future__ import annotations

import uuid
from typing import Any

from mlx_poe.generation.reply_form import with_usual_penalty
from mlx_poe.generation.responses import GenerationResponse
from mlx_poe.generation.tools import ToolCallParser
from mlx_poe.loading.tokenizer import Tokenizer
from mlx_poe.server.catalog import Served
from mlx_poe.server.error_bodies import refused
from mlx_poe.server.fields import Fields, shown
from mlx_poe.server.logprobs import chat_logprobs, stages_of
from mlx_poe.server.openai_messages import read_messages
from mlx_poe.server.response_frame import ResponseFrame
from mlx_poe.server.shared_fields import Options, read_options

DEFAULT_MAX_TOKENS = 512
MAX_TOP_LOGPROBS = 20


def read_chat(body: Fields, served: Served, tokenizer: Tokenizer) -> ChatResponse:
    """Parse a request. ApiError for anything that cannot be honored."""
    if not served.info.chats:
        message = (
            f"{served.name} is a base model, which continues texts and was not trained to chat: "
            "use /v1/completions, or one of the models that /v1/models lists with chat: true"
        )
        raise refused("model", message)
    options = read_options(body, served, default_max_tokens=DEFAULT_MAX_TOKENS)
    if options.max_tokens == 0:
        raise refused("max_tokens", "0 is not at least 1")
    top = body.whole("top_logprobs", 0, MAX_TOP_LOGPROBS)
    if body.flag("logprobs"):
        options.top_logprobs = top or 0
    elif top is not None:
        raise refused("top_logprobs", "it needs logprobs: true")
    options.prompts = [read_messages(body)]
    body.only("modalities", ["text"])
    body.ignore(["parallel_tool_calls"])  # a reply has one call at most
    _read_form(body, options)
    tools = _read_tools(body, options)
    body.done()
    options.decoding = with_usual_penalty(options.decoding, specialist=True)
    return ChatResponse(options, tokenizer, tools)


def _read_form(body: Fields, options: Options) -> None:
    """Turn `response_format` into the option that enforces it."""
    form = body.object("response_format")
    if form is None:
        return
    kind = form.required("type", form.text)
    if kind == "json_schema":
        about = form.required("json_schema", form.object)
        about.text("name")
        about.text("description")
        about.flag("strict")  # a schema is enforced, or refused, either way
        schema = about.required("schema", about.object)
        options.decoding["json_schema"] = schema.values
        about.done()
    elif kind == "json_object":
        options.decoding["json_schema"] = {}
    elif kind != "text":
        message = f"{shown(kind)} is not one of text, json_object, json_schema"
        raise refused("response_format.type", message)
    form.done()


def _read_tools(body: Fields, options: Options) -> bool:
    """Read `tools` and `tool_choice`. Returns whether there are any tools."""
    tools = []
    for tool in body.objects("tools"):
        tool.only("type", "function")
        function = tool.required("function", tool.object)
        name = function.required("name", function.text)
        function.text("description")
        function.object("parameters")
        function.flag("strict")  # arguments fit their schema, or it is refused, either way
        function.done()
        tool.done()
        shape = {k: v for k, v in function.values.items() if k != "strict"}
        tools.append({"name": name, **shape})
    choice = body.take("tool_choice")
    if isinstance(choice, dict):
        named = Fields(choice, "tool_choice")
        named.only("type", "function")
        function = named.required("function", named.object)
        choice = function.required("name", function.text)
        function.done()
        named.done()
        if choice not in [tool["name"] for tool in tools]:
            raise refused("tool_choice", f"there is no function {shown(choice)} among the tools")
    elif choice not in (None, "none", "auto", "required"):
        raise refused("tool_choice", f"{shown(choice)} is not auto, required or none")
    if not tools:
        if choice not in (None, "none", "auto"):
            raise refused("tool_choice", "it needs tools")
        return False
    options.decoding |= {"tools": tools, "tool_choice": choice or "auto"}
    return True


class ChatResponse(ResponseFrame):
    """Chat completions; a call in a reply's text becomes `tool_calls`."""

    prefix, whole_object = "chatcmpl", "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, options: Options, tokenizer: Tokenizer, tools: bool):
        super().__init__(options, tokenizer)
        self._parsers = [ToolCallParser() if tools else None for _ in self.choices]

    def opening(self, index: int) -> list[dict[str, Any]]:
        return [self._delta(index, {"role": "assistant", "content": ""}, [])]

    def deltas(
        self, index: int, response: GenerationResponse, tokens: list[GenerationResponse]
    ) -> list[dict[str, Any]]:
        """Text as it comes; a call once it is complete, its name and then its arguments."""
        text, call = self._read(index, response.text, bool(response.finish_reason))
        found = []
        wanted = self.options.top_logprobs is not None or self.options.token_stages
        if text or (tokens and wanted):
            found.append(self._delta(index, {"content": text}, tokens))
        if call:
            head = {**call, "function": {**call["function"], "arguments": ""}}
            rest = {"index": 0, "function": {"arguments": call["function"]["arguments"]}}
            found.append(self._delta(index, {"tool_calls": [{"index": 0, **head}]}, []))
            found.append(self._delta(index, {"tool_calls": [rest]}, []))
        if response.finish_reason:
            reason = "tool_calls" if call else response.finish_reason
            found.append(self._delta(index, {}, [], reason))
        return found

    def choice(self, index: int) -> dict[str, Any]:
        choice = self.choices[index]
        text, call = self._read(index, choice.text, over=True)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        reason = choice.responses[-1].finish_reason
        if call:
            message |= {"content": text or None, "tool_calls": [call]}
            reason = "tool_calls"
        about = self._about(choice.tokens)
        return {"index": index, "message": message, **about, "finish_reason": reason}

    def _read(self, index: int, text: str, over: bool) -> tuple[str, dict[str, Any] | None]:
        """The part of a reply's next text that is not part of a call, and at the end the call, if
        any.

        A call that was cut off counts neither as a call nor as text.
        """
        parser = self._parsers[index]
        if parser is None:
            return text, None
        text = parser.feed(text)
        if not over:
            return text, None
        text += parser.finish()
        call_id = f"call_{uuid.uuid4().hex[:24]}"
        return text, parser.call.message(call_id) if parser.call else None

    def _delta(
        self, index: int, delta: dict[str, Any], tokens: list, reason: str | None = None
    ) -> dict[str, Any]:
        return {"index": index, "delta": delta, **self._about(tokens), "finish_reason": reason}

    def _about(self, tokens: list) -> dict[str, Any]:
        """The details about tokens that the request asked for."""
        about: dict[str, Any] = {"logprobs": None}
        count = self.options.top_logprobs
        if count is not None:
            about["logprobs"] = chat_logprobs(self.tokenizer, tokens, count)
        if self.options.token_stages:
            about["token_stages"] = stages_of(self.tokenizer, tokens)
        return about
