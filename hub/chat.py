"""The chat template of a Hugging Face folder: a Jinja program that writes prompts, run in Jinja's sandbox."""

import json
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from errors import UserError
from hub.weights import one_line, refuse

NAMES = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]  # a template may write them


class Template:
    """Prompts of a folder, equal to those of `transformers`; settings are its tokenizer_config.json."""

    def __init__(self, folder: Path, settings: dict[str, Any], names: dict[str, str]) -> None:
        self.folder, self.names = folder, names
        path, source = folder / "chat_template.jinja", settings.get("chat_template")
        if isinstance(source, list):  # several with names
            source = {each.get("name"): each.get("template") for each in source if isinstance(each, dict)}
        source = source.get("default") if isinstance(source, dict) else source
        try:
            source = path.read_text(encoding="utf-8") if path.is_file() else source
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not in UTF-8; download it again") from error
        refusals = {
            "no chat template": not isinstance(source, str),
            "several chat templates": not path.is_file() and (folder / "additional_chat_templates").exists(),
            "a chat template that looks into Python": "__" in str(source),
        }
        refuse(folder, refusals)
        self.program, variables = compile_template(folder, source)
        for name in sorted(variables & {*NAMES} - settings.keys()):
            raise UserError(f"the chat template of {folder} writes a {name}, which tokenizer_config.json does not name")

    def render(self, turns: list[tuple[str, str]]) -> str:
        """The prompt for the assistant's answer to turns of (role, text); thinking is off where the template asks."""
        messages = [{"role": role, "content": text} for role, text in turns]
        settings = {"tools": None, "documents": None, "add_generation_prompt": True, "enable_thinking": False}
        try:
            return self.program.render(messages=messages, **settings, **self.names)
        except Exception as error:  # a template may raise anything
            cause = one_line(error)
            raise UserError(f"the chat template of {self.folder} fails ({cause}); choose another model") from error


def compile_template(folder: Path, source: str) -> tuple[Any, set[str]]:
    """The program, and the names of the variables that it reads."""
    try:
        from jinja2 import TemplateError, meta, nodes
        from jinja2.ext import Extension
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise UserError('chat templates need jinja2; pip install -e ".[real]"') from error

    class Generation(Extension):
        """{% generation %} marks the assistant's text and changes nothing."""

        tags: ClassVar = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    world = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    world.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    world.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda pattern: datetime.now().strftime(pattern),
    }
    world.globals["dict"] = lambda *pairs, **named: dict(*pairs, **named)  # the class would be a way out of the sandbox
    try:
        return world.from_string(source), meta.find_undeclared_variables(world.parse(source))
    except TemplateError as error:
        cause = one_line(error)
        raise UserError(f"the chat template of {folder} is no template ({cause}); choose another model") from error
