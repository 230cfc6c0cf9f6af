"""Our docstrings as the site wants them: examples as code, and references to public names as links."""

import re
from typing import Any

import griffe

REFERENCE = re.compile(r":\w+:`~?([\w.]+)`")


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            text = re.sub(r"^(Raises|Returns): ", r"**\1:** ", text, flags=re.MULTILINE)
            obj.docstring.value = REFERENCE.sub(lambda match: self.link(match[1]), text)

    def link(self, name: str) -> str:
        """The name, and a link where the reference has it: ``[x][loftq.x]`` would not be strict about others."""
        public = name.rpartition(".")[2]
        return f'<autoref identifier="loftq.{public}" optional><code>{name}</code></autoref>'
