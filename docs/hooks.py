"""What the site takes from the repository as it is: its own pages outside docs/, decisions, public names, and help."""

import ast
import functools
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = {  # page of the site: file of the repository
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "security.md": "SECURITY.md",
    "paper.md": "recipes/paper/README.md",
    "examples/train_trainer.md": "examples/train_trainer.py",
    "examples/train_sft.md": "examples/train_sft.py",
    "examples/sst2.md": "recipes/examples/sst2.yaml",
    "examples/compare-sst2.md": "recipes/examples/compare-sst2.yaml",
}
LANGUAGES = {".py": "python", ".yaml": "yaml"}
HISTORY = ("changelog.md", "decisions/", "experiments.md")  # what they say was true once
log = logging.getLogger("mkdocs.hooks")


def decisions() -> dict[str, str]:
    """Page -> title of every decision, in order."""
    found = sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md"))
    return {f"decisions/{file.name}": _title(file.read_text(encoding="utf-8")) for file in found}


def _title(text: str) -> str:
    return text.partition("\n")[0].removeprefix("# ")


def on_config(config: Any) -> Any:
    """Every decision stands in the navigation, below their index."""
    for tab in config.nav:
        for entry in next(iter(tab.values())):
            if isinstance(entry, dict) and "Decisions" in entry:
                entry["Decisions"] += [{title: page} for page, title in decisions().items()]
    return config


def on_files(files: Files, config: Any) -> Files:
    for page, source in OUTSIDE.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        if language := LANGUAGES.get(Path(source).suffix):
            text = f"# {source}\n\n```{language}\n{text}```\n"
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(text: str, page: Any, config: Any, files: Files) -> str:
    """Links as the site has them, and the lists that are made of the repository."""
    source = OUTSIDE.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    text = re.sub(r"\]\((?!\w+:|#)([^)#\s]+)", lambda m: f"]({_link(m[1], source, page.file.src_uri)}", text)
    if not page.file.src_uri.startswith(HISTORY):
        _check_commands(text, page.file.src_uri)
    text = text.replace("<!-- decisions -->", "\n".join(f"- [{t}]({p[10:]})" for p, t in decisions().items()))
    text = text.replace("<!-- calls -->", _references(str.islower))
    text = text.replace("<!-- classes -->", _references(lambda name: not name.islower()))
    return text.replace("<!-- help -->", _help()) if "<!-- help -->" in text else text


def _link(target: str, source: str, page: str) -> str:
    """A link of a file of the repository, as seen from its page of the site."""
    file = os.path.normpath(os.path.join(os.path.dirname(source), target))
    pages = {repository: site for site, repository in OUTSIDE.items()}
    place = pages.get(file) or (file.removeprefix("docs/") if file.startswith("docs/") else None)
    return os.path.relpath(place, os.path.dirname(page) or ".") if place else target


def _run(*arguments: str) -> str:
    """What ``loftq`` prints, without colors or boxes."""
    plain = {**os.environ, "TYPER_USE_RICH": "0", "COLUMNS": "88", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "loftq", *arguments]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=plain, check=True)
    return run.stdout.replace("python -m loftq", "loftq").strip()


def _references(wanted: Any) -> str:
    """A directive for mkdocstrings for every public name: ``loftq.__all__`` decides."""
    tree = ast.parse((ROOT / "src" / "loftq" / "__init__.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return "\n\n".join(f"::: loftq.{name}" for name in ast.literal_eval(node.value) if wanted(name))
    raise SystemExit("src/loftq/__init__.py has no __all__")


@functools.cache
def _verbs() -> dict[str, str]:
    """Verb -> its help, in the order of the command line."""
    verbs = re.findall(r"^  ([a-z]\S*)", _run("--help").partition("Commands:")[2], re.MULTILINE)
    return {verb: _run(verb, "--help") for verb in verbs}


def _check_commands(text: str, page: str) -> None:
    """Every command of a page names a verb and options that there are."""
    for verb, rest in re.findall(r"\bloftq ([a-z]+) ((?:[^\n`#\\]|\\\n)*)", "\n".join(_codes(text))):
        if verb not in _verbs():
            log.warning(f"{page}: there is no command `loftq {verb}`")
        for option in re.findall(r"(?<!\S)--?[a-z][a-z0-9-]*", rest):
            if not re.search(rf"(?<!\S){option}\b(?!-)", _verbs().get(verb, option)):
                log.warning(f"{page}: `loftq {verb}` has no option {option}")


def _codes(text: str) -> list[str]:
    """What stands in code: blocks without a language, and between backticks."""
    blocks = re.findall(r"^```\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [*blocks, *re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)]


def _help() -> str:
    """The help of every verb: what the command line prints, as text and lists."""
    return "\n\n".join(f"## loftq {verb}\n\n{_markdown(text)}" for verb, text in _verbs().items())


def _markdown(text: str) -> str:
    """Help without columns: a line that begins an entry has two spaces before it, what continues one has more."""
    about, *sections = re.split(r"^(?=[A-Z]\w+:$)", text, flags=re.MULTILINE)
    usage, _, what = about.partition("\n")
    parts = [f"`{usage.removeprefix('Usage: ')}`", _escaped(" ".join(what.split()))]
    for section in sections:
        title, _, entries = section.partition("\n")
        lines = []
        for entry in re.split(r"^  (?=\S)", entries, flags=re.MULTILINE)[1:]:
            name, _, told = re.sub(r"\s{2,}|\n", "  ", entry.strip()).partition("  ")
            lines.append(f"- `{name}`: {_escaped(' '.join(told.split()))}")
        parts += [f"**{title}**", "\n".join(lines)]
    return "\n\n".join(parts)


def _escaped(text: str) -> str:
    return re.sub(r"([*_<])", r"\\\1", text)
