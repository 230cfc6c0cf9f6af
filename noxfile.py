"""The quick tests in other environments than the pinned one: ``make compat``.

``newest`` is the newest Python with the pinned versions; ``oldest`` is the oldest Python with every dependency at the
lowest version that pyproject.toml allows. An interpreter that is not on the machine is skipped, and nox says so.
"""

import os
import re
from pathlib import Path

import nox

nox.options.error_on_missing_interpreters = False
nox.options.default_venv_backend = "venv"
PROJECT = nox.project.load_toml("pyproject.toml")["project"]
# of releases that were the newest when they warned of what came after them
OF_OLD_RELEASES = tuple(f"-Wignore::{kind}Warning" for kind in ("Deprecation", "Future", "Resource"))


def quick_tests(session: nox.Session, *options: str) -> None:
    """Run the tests without the marker ``slow``, against what is installed."""
    workers = os.environ.get("WORKERS", "2").strip()
    command = ("python", "-m", "pytest", "-n", workers, "-m", "not slow", *options, *session.posargs)
    session.run(*command, env={"PYTHONPATH": ""})


def install(session: nox.Session, constraints: Path, *project: str) -> None:
    """Torch first: it decides which NumPy, Triton and CUDA libraries fit; from most indexes it brings CUDA's."""
    for what in (["torch"], project):
        session.install("--quiet", "--constraint", str(constraints), *what)


@nox.session(python="3.13")
def newest(session: nox.Session) -> None:
    install(session, Path("constraints.txt"), "--editable", ".[dev]")
    quick_tests(session)


@nox.session(python="3.10")
def oldest(session: nox.Session) -> None:
    lowest = {re.split(r"[<>=;\[ ]", line)[0]: line.replace(">=", "==") for line in PROJECT["dependencies"]}
    path = Path(session.create_tmp()) / "floors.txt"
    path.write_text("\n".join(lowest.values()) + "\n", encoding="utf-8")
    install(session, path.resolve(), "--editable", ".[dev]")
    quick_tests(session, *OF_OLD_RELEASES)


@nox.session(default=False)
def wheel(session: nox.Session) -> None:
    """The built wheel, away from the source: ``make release``."""
    (built,) = Path("dist").glob("*.whl")
    install(session, Path("constraints.txt"), f"{built.resolve()}[dev]")
    tests = Path("tests").resolve()
    session.chdir(session.create_tmp())
    session.run("loftq", "--version")
    quick_tests(session, "-c", str(tests.parent / "pyproject.toml"), str(tests))
