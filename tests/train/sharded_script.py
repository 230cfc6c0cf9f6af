"""A user's script in one of several CPU processes where accelerate believes in GPUs."""

import runpy
import sys


def script(path: str) -> None:
    import believing  # in a process of the script's own: it changes accelerate

    believing.begin()
    runpy.run_path(path, run_name="__main__")


if __name__ == "__main__":
    script(sys.argv[1])
