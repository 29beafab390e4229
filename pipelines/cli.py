"""The command line of `python -m pipelines`: which command is which function, and what they share."""

import importlib
import sys
from collections.abc import Sequence

from jsonargparse import ArgumentParser

from pipelines import processes
from slam_asr.configuration import nearest
from slam_asr.errors import UserError, exit_on_user_error

COMMANDS = {
    "run": "pipelines.run:run",
    "compile": "pipelines.compile:compile_command",
    "submit": "pipelines.kubeflow.commands:submit",
    "status": "pipelines.kubeflow.commands:status",
    "logs": "pipelines.kubeflow.commands:logs",
    "resume": "pipelines.kubeflow.commands:resume",
    "doctor": "pipelines.kubeflow.doctor:doctor",
}
"""Each command's function: it takes the arguments behind the command's name and gives the exit code. Imported when it is called."""

USAGE = """usage: python -m pipelines run RECIPE [--model MODEL | --sweep FILE] [--corpus PATH] [--output DIR] [--store PATH] [--only STAGE] [--runner docker ...] [--SECTION.KEY VALUE ...]
       python -m pipelines compile [RECIPE] [--model MODEL | --sweep FILE [--parallel N]] [--cluster PROFILE] [--images TEMPLATE|FILE] [--corpus s3://…] [--store s3://…] [--output DIR|FILE.yaml] [--SECTION.KEY VALUE ...]
       python -m pipelines submit RECIPE --corpus s3://… [--model MODEL | --sweep FILE [--parallel N]] [--cluster PROFILE] [--endpoint URL] [--namespace NAME] [--images TEMPLATE|FILE] [--store s3://…] [--experiment NAME] [--run-name NAME] [--wait] [--SECTION.KEY VALUE ...]
       python -m pipelines status [RUN] [--wait] [--cluster PROFILE] [--endpoint URL] [--namespace NAME]
       python -m pipelines logs RUN [--step STEP] [--follow] [--cluster PROFILE] [--endpoint URL] [--namespace NAME]
       python -m pipelines resume RUN [--wait] [--cluster PROFILE] [--endpoint URL] [--namespace NAME]
       python -m pipelines doctor [--cluster PROFILE] [--endpoint URL] [--namespace NAME] [--images TEMPLATE|FILE]

  run       train, convert and measure on this machine, as processes or in Docker, through Kubeflow's local runner
  compile   write the YAML to submit to Kubeflow Pipelines
  submit    compile, upload and start a run in a cluster; --wait follows it
  status    a run's steps, or the latest runs
  logs      the lines of a run's steps
  resume    a failed run again, from the steps that failed
  doctor    whether a cluster has all that a run needs

--model MODEL trains nothing: the model is measured on the recipe's test sets.
--sweep FILE  trains every variation of the recipe that FILE names, over the same features, and compares them.
python -m pipelines run RECIPE --help   all options, with the recipe's values
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is 0, 1 (a defect), 2 (the user's to mend) or 130 (interrupted)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    with processes.interruptible(), exit_on_user_error():
        if arguments[0] not in COMMANDS:
            hint = nearest(arguments[0], list(COMMANDS)) or "."
            raise UserError(f"There is no command {arguments[0]}{hint} Commands: {', '.join(COMMANDS)}.")
        module, function = COMMANDS[arguments[0]].split(":")
        return getattr(importlib.import_module(module), function)(arguments[1:])


def command_parser(command: str, description: str) -> ArgumentParser:
    """A parser for the options of `command`, with its line of the usage."""
    usage = next(line for line in USAGE.splitlines() if f"pipelines {command} " in line)
    return ArgumentParser(
        prog=f"python -m pipelines {command}",
        usage=usage.removeprefix("usage:").strip(),
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
    )
