"""Ollama's TEMPLATE, filled in as Ollama fills it in, gives what the model's own chat template gives."""

from __future__ import annotations

import re

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from coordinator.publication import modelfile

BOS, EOS = "<s>", "</s>"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}" + CHATML
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
    " + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set s = '<<SYS>>\n' + messages[0]['content']"
    " + '\n<</SYS>>\n\n' %}{% set messages = messages[1:] %}{% else %}{% set s = '' %}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + (s if loop.first else '') + m['content']"
    " + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n'"
    " + m['content'] + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "default system": DEFAULT_SYSTEM, "llama 3": LLAMA3, "llama 2": LLAMA2, "gemma": GEMMA}


def rendered(template: str, messages: list[dict[str, str]]) -> str:
    text = (
        ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        .from_string(template)
        .render(messages=messages, add_generation_prompt=True, bos_token=BOS, eos_token=EOS)
    )
    return text.removeprefix(BOS)


def ollama(text: str, system: str, prompt: str, response: str = "") -> str:
    """What Ollama sends to the model: up to the response while it is awaited, all of it for a turn that is past."""
    (template,) = re.findall(r'TEMPLATE """(.*)"""', text, flags=re.S)
    branch = re.compile(r"{{ if \.System }}(.*?){{ else }}(.*?){{ end }}", re.S)
    filled = branch.sub(lambda found: found[1] if system else found[2], template)
    if not response:
        filled = filled.partition("{{ .Response }}")[0]
    for name, value in ((".System", system), (".Prompt", prompt), (".Response", response)):
        filled = filled.replace("{{ " + name + " }}", value)
    return filled


@pytest.mark.parametrize("name", TEMPLATES)
def test_template(name: str) -> None:
    template = TEMPLATES[name]
    text = modelfile.text("notes-q8_0.gguf", template=template, bos=BOS, eos=EOS)
    assert text.startswith("FROM ./notes-q8_0.gguf\n")
    user = {"role": "user", "content": "How are you?"}
    assert ollama(text, "", "How are you?") == rendered(template, [user])
    if name != "gemma":
        system = {"role": "system", "content": "Be short."}
        assert ollama(text, "Be short.", "How are you?") == rendered(template, [system, user])
    if name != "default system":  # a system message of its own stands before the first turn only
        talk = [user, {"role": "assistant", "content": "Well."}, {"role": "user", "content": "Good."}]
        own = " Well." if name == "llama 2" else "Well."  # that template leaves the space to the model
        both = ollama(text, "", "How are you?", own) + ollama(text, "", "Good.")
        assert both == rendered(template, talk)


def test_stop() -> None:
    assert 'PARAMETER stop "<|im_end|>"' in modelfile.text("x.gguf", template=CHATML)


@pytest.mark.parametrize(
    "template", ["", "{{ raise_exception('never') }}", "{% for m in", "{{ 'nothing of what was said' }}", "{{ 1 / 0 }}"]
)
def test_without_a_template_that_can_be_told_the_prompt_stands_alone(template: str) -> None:
    assert modelfile.text("x.gguf", template=template) == 'FROM ./x.gguf\nTEMPLATE """{{ .Prompt }}"""\n'


def test_braces_of_a_template_are_not_taken_for_ollamas() -> None:
    text = modelfile.text("x.gguf", template="{% for m in messages %}{{ '{{' + m['content'] + '}}' }}{% endfor %}")
    assert '{{ else }}{{ "{{" }}{{ end }}{{ .Prompt }}}}{{ .Response }}}}' in text
