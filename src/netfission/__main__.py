"""`python -m netfission` is the command `netfission`."""

from netfission.cli import run_process

run_process()
