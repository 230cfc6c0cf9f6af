"""The quick tests in other environments than the pinned one: ``make compat``.

``newest`` is the newest Python with the pinned versions; ``oldest`` is the oldest Python with every dependency at the
lowest version that pyproject.toml allows. An interpreter that is not on the machine is skipped, and nox says so.
"""

import re
from pathlib import Path

import nox

nox.options.error_on_missing_interpreters = False
nox.options.default_venv_backend = "venv"
PROJECT = nox.project.load_toml("pyproject.toml")["project"]


def quick_tests(session: nox.Session, constraints: Path) -> None:
    """Install with ``constraints`` and run the tests without the marker ``slow``."""
    session.install("--quiet", "--constraint", str(constraints), "torch")
    session.install("--quiet", "--constraint", str(constraints), "--editable", ".[dev]")
    session.run("python", "-m", "pytest", "-n", "2", "-m", "not slow", *session.posargs, env={"PYTHONPATH": ""})


@nox.session(python="3.13")
def newest(session: nox.Session) -> None:
    quick_tests(session, Path("constraints.txt"))


@nox.session(python="3.10")
def oldest(session: nox.Session) -> None:
    lowest = {re.split(r"[<>=;\[ ]", line)[0]: line.replace(">=", "==") for line in PROJECT["dependencies"]}
    path = Path(session.create_tmp()) / "floors.txt"
    path.write_text("\n".join(lowest.values()) + "\n", encoding="utf-8")
    quick_tests(session, path.resolve())


@nox.session
def wheel(session: nox.Session) -> None:
    """The built wheel, away from the source: ``make release``."""
    built = sorted(Path("dist").glob("*.whl"))[-1].resolve()
    session.install("--quiet", "--constraint", "constraints.txt", "torch")
    session.install("--quiet", "--constraint", "constraints.txt", f"{built}[dev]")
    tests = Path("tests").resolve()
    session.chdir(session.create_tmp())
    session.run("loftq", "--version")
    session.run(
        "python", "-m", "pytest", "-n", "2", "-m", "not slow", "-c", str(tests.parent / "pyproject.toml"), str(tests)
    )
