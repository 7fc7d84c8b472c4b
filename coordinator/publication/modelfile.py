"""An Ollama Modelfile for a merged GGUF.

Ollama knows only some chat templates by sight, and writes the others off. So the GGUF's own template is rendered once
with stand-ins for what people say, and what stands around them becomes Ollama's TEMPLATE.

Source: ollama, docs/modelfile.mdx and docs/template.mdx.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

_SYSTEM, _PROMPT, _RESPONSE = "\ue000system\ue000", "\ue000prompt\ue000", "\ue000response\ue000"


class TemplateParts(NamedTuple):
    """What a chat template writes around a system message, a prompt and a response."""

    with_system: tuple[str, str] | None  # before the system message, and between it and the prompt
    before: str  # before the prompt, where there is no system message
    between: str  # between the prompt and the response
    after: str  # after the response, when the talk goes on


def text(gguf: str, *, template: str = "", bos: str = "", eos: str = "") -> str:
    """A Modelfile for the file `gguf` beside it, with the chat template that the model has, if it can be told."""
    lines = [f"FROM ./{gguf}"]
    turns = _turns(template, bos, eos) if template else None
    if turns is None:
        go = "{{ .Prompt }}"  # a model that continues text
    else:
        start = _escaped(turns.before)
        if turns.with_system is not None:
            opening, middle = turns.with_system
            start = (
                "{{ if .System }}"
                + f"{_escaped(opening)}{{{{ .System }}}}{_escaped(middle)}"
                + "{{ else }}"
                + f"{start}"
                + "{{ end }}"
            )
        go = start + "{{ .Prompt }}" + _escaped(turns.between) + "{{ .Response }}" + _escaped(turns.after)
        if stop := turns.after.strip():
            lines.append(f"PARAMETER stop {_quoted(stop.splitlines()[0])}")
    lines.insert(1, f'TEMPLATE """{go}"""')
    return "\n".join(lines) + "\n"


def _turns(template: str, bos: str, eos: str) -> TemplateParts | None:
    """None when the template does not say things in the order that people say them."""
    prompt, system = {"role": "user", "content": _PROMPT}, {"role": "system", "content": _SYSTEM}
    response = {"role": "assistant", "content": _RESPONSE}
    try:
        alone = _rendered(template, [prompt], bos, eos)
        talk = _rendered(template, [prompt, response, prompt], bos, eos)
    except Exception:  # templates are programs, and may fail as they like
        return None
    if alone.count(_PROMPT) != 1 or talk.count(_PROMPT) != 2 or talk.count(_RESPONSE) != 1 or '"""' in talk:
        return None
    before, between = alone.split(_PROMPT)
    after = talk.split(_RESPONSE)[1].split(_PROMPT)[0]
    # What follows a response is what closes it and what opens the next prompt.
    after = after.removesuffix(before)
    return TemplateParts(_around_system(template, [system, prompt], bos, eos, between), before, between, after)


def _around_system(
    template: str, messages: list[dict[str, str]], bos: str, eos: str, between: str
) -> tuple[str, str] | None:
    try:
        whole = _rendered(template, messages, bos, eos)
    except Exception:
        return None
    if whole.count(_SYSTEM) != 1 or whole.count(_PROMPT) != 1 or not whole.endswith(_PROMPT + between):
        return None
    opening, rest = whole.split(_SYSTEM)
    return opening, rest.split(_PROMPT)[0]


def _rendered(template: str, messages: list[dict[str, str]], bos: str, eos: str) -> str:
    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    functions: dict[str, Any] = {"raise_exception": refuse, "strftime_now": lambda form: ""}
    written = environment.from_string(template).render(
        messages=messages, add_generation_prompt=True, bos_token=bos, eos_token=eos, **functions
    )
    return written.removeprefix(bos) if bos else written  # llama.cpp adds it


def _escaped(literal: str) -> str:
    return literal.replace("{{", '{{ "{{" }}')


def _quoted(value: str) -> str:
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
