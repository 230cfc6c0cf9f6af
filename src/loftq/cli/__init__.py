"""The command line: a verb is a signature, a call and a print."""

from loftq.cli import calibration, checkpoints, exports, frozen, planning, runs  # they register their verbs
from loftq.cli.app import app
from loftq.cli.entry import main
