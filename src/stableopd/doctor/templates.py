"""Whether student and teacher read a conversation alike: chat templates, thinking modes, leading tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from stableopd.doctor.findings import Finding
from stableopd.doctor.sides import Side, short
from stableopd.types import Example

_USER = {"role": "user", "content": "probe-question"}
_SYSTEM = {"role": "system", "content": "probe-system"}
_ASSISTANT = {"role": "assistant", "content": "probe-answer"}
_SWITCHES = ("enable_thinking", "thinking")


def is_chat(tokenizer: Any, examples: Sequence[Example], template_kwargs: Mapping[str, Any]) -> bool:
    """Whether most prompts were rendered by the chat template, told by how they end (or begin, where there is no
    generation prompt)."""
    if not tokenizer.chat_template or not examples:
        return False
    rendered = _render(tokenizer, [_USER], template_kwargs)
    if isinstance(rendered, Exception):
        return False
    head, _, tail = rendered.partition(_USER["content"])
    if not head.strip() and not tail.strip():
        return False
    marks = [example.prompt.endswith(tail) if tail.strip() else example.prompt.startswith(head) for example in examples]
    return sum(marks) * 2 > len(marks)


def template_findings(student: Side, template_kwargs: Mapping[str, Any], *, chat: bool) -> Iterator[Finding]:
    """What is wrong with the student's own chat template, where prompts are chats."""
    tokenizer = student.tokenizer
    assert tokenizer is not None
    if not chat:
        return
    if not tokenizer.chat_template:
        yield Finding(
            check="chat_template",
            danger="fatal",
            summary="prompts are chats and the student has no chat template",
            evidence="tokenizer.chat_template is not set",
            remedy="give prompts as plain text, or save the teacher's chat template with the student's tokenizer if "
            "the student knows its turn markers",
        )
        return
    rendered = _render(tokenizer, [_USER], template_kwargs)
    if isinstance(rendered, Exception):
        yield Finding(
            check="chat_template",
            danger="fatal",
            summary="the student's chat template cannot be rendered",
            evidence=f"{type(rendered).__name__}: {rendered}",
            remedy="correct tokenizer.chat_template, or data.chat_template_kwargs",
        )
        return
    yield from _generation_prompt(student, rendered, template_kwargs)


def _generation_prompt(student: Side, rendered: str, template_kwargs: Mapping[str, Any]) -> Iterator[Finding]:
    """A template without one leaves it to the student to open its own turn; where none is needed, none is missed."""
    without = _render(student.tokenizer, [_USER], template_kwargs, generation_prompt=False)
    answered = _render(student.tokenizer, [_USER, _ASSISTANT], template_kwargs, generation_prompt=False)
    if rendered != without or isinstance(answered, Exception) or not answered.startswith(rendered):
        return
    opening = answered[len(rendered) :].partition(_ASSISTANT["content"])[0]
    if opening.strip():
        yield Finding(
            check="generation_prompt",
            danger="problem",
            summary="the student's chat template does not open the assistant's turn: rollouts begin with its header",
            evidence=f"add_generation_prompt changes nothing, yet an answer comes behind {short(opening)}",
            remedy="add to the template: {% if add_generation_prompt %}" + repr(opening)[1:-1] + "{% endif %}",
        )


def pair_template_findings(
    student: Side, teacher: Side, template_kwargs: Mapping[str, Any], *, chat: bool
) -> Iterator[Finding]:
    """Where the teacher would have rendered the same conversation otherwise than the student does."""
    assert student.tokenizer is not None
    assert teacher.tokenizer is not None
    if not chat:
        if teacher.tokenizer.chat_template and not student.tokenizer.chat_template:
            yield Finding(
                check="chat_template",
                danger="note",
                summary=f"the {teacher.name} has a chat template, and prompts are plain text",
                evidence="the student has none",
                remedy=f"nothing if the {teacher.name} also answers plain text well; doctor without --quick tells",
            )
        return
    if not student.tokenizer.chat_template:
        return
    if not teacher.tokenizer.chat_template:
        yield Finding(
            check="chat_template",
            danger="problem",
            summary=f"prompts are chats and the {teacher.name} has no chat template: it may not know turns at all",
            evidence=f"turns as the student writes them: {_shown(student, [_USER], template_kwargs)}",
            remedy=f"take a {teacher.name} that was trained on chats, or give prompts as plain text",
        )
        return
    yield from _same_rendering(student, teacher, template_kwargs)
    yield from _thinking(student, teacher, template_kwargs)


def _same_rendering(student: Side, teacher: Side, template_kwargs: Mapping[str, Any]) -> Iterator[Finding]:
    with_system = [_SYSTEM, _USER]
    several = [_USER, _ASSISTANT, _USER]
    differ = {
        name: not _alike(student, teacher, messages, template_kwargs)
        for name, messages in (("with", with_system), ("without", [_USER]), ("several", several))
    }
    if not any(differ.values()):
        return
    only_default = differ["without"] and not differ["with"]
    messages = with_system if differ["with"] else [_USER] if differ["without"] else several
    evidence = f"{_shown(student, messages, template_kwargs)} / {_shown(teacher, messages, template_kwargs)}"
    if only_default:
        yield Finding(
            check="chat_template",
            danger="note",
            summary=f"without a system message, student and {teacher.name} put in different ones of their own",
            evidence=evidence,
            remedy=f"begin each prompt with a system message, best the one that the {teacher.name} was trained with",
        )
    elif differ["without"]:
        yield Finding(
            check="chat_template",
            danger="problem",
            summary=f"student and {teacher.name} render the same conversation differently",
            evidence=evidence,
            remedy=f"give the student the {teacher.name}'s chat template (chat_template.jinja), or a student and a "
            "teacher that were trained on the same one",
        )
    else:
        what = "a system message" if differ["with"] else "earlier turns"
        yield Finding(
            check="chat_template",
            danger="note",
            summary=f"student and {teacher.name} render {what} differently",
            evidence=evidence,
            remedy=f"nothing if no prompt has {what}; else give the student the {teacher.name}'s chat template",
        )


def _alike(student: Side, teacher: Side, messages: list[dict[str, str]], template_kwargs: Mapping[str, Any]) -> bool:
    mine = _render(student.tokenizer, messages, template_kwargs)
    theirs = _render(teacher.tokenizer, messages, template_kwargs)
    if isinstance(mine, Exception) or isinstance(theirs, Exception):
        return isinstance(mine, Exception) == isinstance(theirs, Exception)
    return mine == theirs


def _thinking(student: Side, teacher: Side, template_kwargs: Mapping[str, Any]) -> Iterator[Finding]:
    """A switch of the template that nothing decides; its own default then does."""
    switches = {side.name: _switch(side, template_kwargs) for side in (student, teacher)}
    with_switch = [name for name, switch in switches.items() if switch]
    if not with_switch:
        return
    switch = next(switch for switch in switches.values() if switch)
    evidence = f"the chat template of the {' and the '.join(with_switch)} depends on {switch}"
    remedy = f"decide it: data.chat_template_kwargs={{{switch}: false}} (or true, with a budget for the thinking)"
    if len(with_switch) == 1:
        yield Finding(
            check="thinking_mode",
            danger="problem",
            summary=f"the {with_switch[0]} has a thinking mode that is left to its default, the other side has none",
            evidence=evidence,
            remedy=remedy,
        )
    else:
        yield Finding(
            check="thinking_mode",
            danger="note",
            summary="the thinking mode is left to the chat template's default",
            evidence=evidence,
            remedy=remedy,
        )


def _switch(side: Side, template_kwargs: Mapping[str, Any]) -> str | None:
    for name in _SWITCHES:
        if name in template_kwargs:
            continue
        on = _render(side.tokenizer, [_USER], {**template_kwargs, name: True})
        off = _render(side.tokenizer, [_USER], {**template_kwargs, name: False})
        if not isinstance(on, Exception) and not isinstance(off, Exception) and on != off:
            return name
    return None


def _render(
    tokenizer: Any,
    messages: list[dict[str, str]],
    template_kwargs: Mapping[str, Any],
    *,
    generation_prompt: bool = True,
) -> str | Exception:
    """The conversation as text; the error where the template refuses it."""
    try:
        return str(
            tokenizer.apply_chat_template(
                messages, add_generation_prompt=generation_prompt, tokenize=False, **template_kwargs
            )
        )
    except (TemplateError, ValueError, TypeError) as error:
        return error


def _shown(side: Side, messages: list[dict[str, str]], template_kwargs: Mapping[str, Any]) -> str:
    rendered = _render(side.tokenizer, messages, template_kwargs)
    return f"refused ({rendered})" if isinstance(rendered, Exception) else short(rendered)


# ------------------------------------------------------------------------------------ leading tokens


def bos_findings(student: Side, teachers: Sequence[Side], examples: Sequence[Example]) -> Iterator[Finding]:
    """A begin-of-sequence token that prompts have twice, or that a teacher expects and they lack."""
    assert student.tokenizer is not None
    bos = student.tokenizer.bos_token_id
    if not examples:
        return
    doubled = [example for example in examples if bos is not None and example.prompt_ids[:2] == (bos, bos)]
    if doubled:
        yield Finding(
            check="bos",
            danger="problem",
            summary=f"{len(doubled)} of {len(examples)} prompts begin with the begin token twice",
            evidence=f"{student.named([bos])} at {short(doubled[0].prompt, 60)}",
            remedy="take the begin token out of the prompts' text, or out of the chat template: one is put there for "
            "them",
            figures={"bos_doubled": len(doubled) / len(examples)},
        )
    for teacher in teachers:
        expected = _own_leading(teacher)
        if expected is None:
            continue
        bare = sum(example.prompt_ids[:1] != (expected,) for example in examples)
        if bare * 2 > len(examples):
            yield Finding(
                check="bos",
                danger="problem",
                summary=f"the {teacher.name} expects every text to begin with a token that {bare} of {len(examples)} "
                "prompts lack",
                evidence=f"the {teacher.name}'s tokenizer puts {teacher.named([expected])} first; the first prompt "
                f"begins with {student.named(examples[0].prompt_ids[:1])}",
                remedy="let the student's tokenizer put it there too (add_bos_token, or the post-processor of its "
                "tokenizer.json), or begin each prompt with it",
            )


def _own_leading(side: Side) -> int | None:
    """The begin token, if this side's tokenizer puts it before a text of its own accord."""
    assert side.tokenizer is not None
    bos = side.tokenizer.bos_token_id
    if bos is None:
        return None
    try:
        ids = side.tokenizer("1", verbose=False)["input_ids"]
    except Exception:  # tokenizers raises nothing more specific for a text it cannot encode
        return None
    return int(bos) if ids and ids[0] == bos else None
