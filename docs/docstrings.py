"""Our docstrings as the site wants them: examples as code, and references to public names as links."""

import importlib
import re
from typing import Any

import griffe

from loftq import options

REFERENCE = re.compile(r":\w+:`~?([\w.]+)`")


class Docstrings(griffe.Extension):
    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Calls that take ``**options: Unpack[GROUP]`` name every option, as they do where they are imported."""
        for parameter in func.parameters:  # as they are, not where they are from
            if row := re.search(r"\bdefault\(.(\w+).\)", str(parameter.default)):
                value = options.default(row[1])
                parameter.default = value if "int(" in str(parameter.default) else repr(value)
        taken = next((p for p in func.parameters if str(p.annotation).startswith("Unpack[")), None)
        if taken is None or func.docstring is None:
            return
        module = importlib.import_module(func.module.path)  # it has imported the group, from wherever that is
        group = getattr(module, str(taken.annotation)[len("Unpack[") : -1])
        func.docstring.value = options.described(func.docstring.value, group)
        named = [p for p in func.parameters if p is not taken]
        func.parameters = griffe.Parameters(*named, *(self.parameter(*row) for row in options.rows(group).items()))

    def parameter(self, name: str, row: tuple[Any, options.Option]) -> griffe.Parameter:
        kind, option = row
        shown = f"{getattr(kind, '__name__', kind)}".replace("pathlib.", "")
        annotation = f"{shown} | None" if option.left_out is None else shown
        return griffe.Parameter(
            name, annotation=annotation, kind=griffe.ParameterKind.keyword_only, default=repr(option.left_out)
        )

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            text = re.sub(r"^(Raises|Returns): ", r"**\1:** ", text, flags=re.MULTILINE)
            obj.docstring.value = REFERENCE.sub(lambda match: self.link(match[1]), text)

    def link(self, name: str) -> str:
        """The name, and a link where the reference has it: ``[x][loftq.x]`` would not be strict about others."""
        public = name.rpartition(".")[2]
        return f'<autoref identifier="loftq.{public}" optional><code>{name}</code></autoref>'
