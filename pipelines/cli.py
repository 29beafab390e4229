"""The command line of `python -m pipelines`: its commands, the function of each, and their common parser."""

import importlib
import sys
from collections.abc import Sequence

from jsonargparse import ArgumentParser

from pipelines import processes
from slam_asr.config.schema import nearest, new_parser
from slam_asr.errors import UserError, exit_on_user_error

COMMANDS = {
    "run": "pipelines.run:run",
    "compile": "pipelines.compile:compile_command",
    "submit": "pipelines.kubeflow.commands:submit",
    "status": "pipelines.kubeflow.commands:status",
    "logs": "pipelines.kubeflow.commands:logs",
    "resume": "pipelines.kubeflow.commands:resume",
    "stop": "pipelines.kubeflow.commands:stop",
    "open": "pipelines.kubeflow.commands:open_page",
    "runs": "pipelines.kubeflow.commands:runs",
    "doctor": "pipelines.kubeflow.doctor:doctor",
}
"""The function of each command, as `module:function`.

It takes the arguments after the command's name and returns the exit code. Its module is imported only when
the command runs, so that `--help` does not wait for kfp.
"""

_VARIANT = "[--model MODEL | --sweep FILE [--parallel N]]"
_CONNECTION = "[--cluster PROFILE] [--endpoint URL] [--namespace NAME]"
SYNOPSES = {
    "run": "RECIPE [--model MODEL | --sweep FILE] [--corpus PATH] [--output DIR] [--store PATH] "
    "[--only STAGE] [--runner docker ...] [--SECTION.KEY VALUE ...]",
    "compile": f"[RECIPE] {_VARIANT} [--cluster PROFILE] [--images TEMPLATE|FILE] "
    "[--corpus s3://…] [--store s3://…] [--output DIR|FILE.yaml] [--SECTION.KEY VALUE ...]",
    "submit": f"RECIPE --corpus s3://… {_VARIANT} {_CONNECTION} [--images TEMPLATE|FILE] "
    "[--store s3://…] [--experiment NAME] [--run-name NAME] [--wait] [--SECTION.KEY VALUE ...]",
    "status": f"[RUN] [--wait] {_CONNECTION}",
    "logs": f"RUN [--step STEP] [--follow] [--all] {_CONNECTION}",
    "resume": f"RUN [--wait] {_CONNECTION}",
    "stop": f"RUN {_CONNECTION}",
    "open": f"RUN {_CONNECTION}",
    "runs": f"[--mine] [--recipe RECIPE] [--count N] {_CONNECTION}",
    "doctor": f"{_CONNECTION} [--images TEMPLATE|FILE] [--run [--nodes N] [--patience SECONDS]]",
}
"""The arguments of each command, for its usage line."""

_USAGE_LINES = [f"python -m pipelines {command} {synopsis}" for command, synopsis in SYNOPSES.items()]
USAGE = (
    "usage: "
    + "\n       ".join(_USAGE_LINES)
    + """

  run       run all steps on this machine, as processes or in Docker, through Kubeflow's local runner
  compile   write the pipeline as YAML for Kubeflow Pipelines
  submit    compile, upload and start a run in a cluster; --wait follows it
  status    show the steps of a run, or list the latest runs
  logs      show the logs of a run's steps
  resume    restart a failed run from the steps that failed
  stop      stop a run
  open      open a run's page in the dashboard
  runs      list the latest runs, your own or those of a recipe
  doctor    check that a cluster has everything that a run needs; --run checks it from inside pods too

--model MODEL trains nothing, and evaluates the model on the recipe's test sets.
--sweep FILE  trains every variation of the recipe that FILE lists, with the same features, and compares them.
python -m pipelines run RECIPE --help   all options, with the recipe's values
"""
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    Args:
        argv: the command's name and its arguments; None for those of this process.

    Returns:
        0 for success, 1 for a failure, 2 for an error that the user can fix, 130 if interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    with processes.interruptible(), exit_on_user_error():
        if arguments[0] not in COMMANDS:
            hint = nearest(arguments[0], list(COMMANDS)) or "."
            raise UserError(f"Unknown command {arguments[0]}{hint} Commands: {', '.join(COMMANDS)}.")
        module, function = COMMANDS[arguments[0]].split(":")
        return getattr(importlib.import_module(module), function)(arguments[1:])


def command_parser(command: str, description: str) -> ArgumentParser:
    """Return a parser for the options of `command`, whose usage line is the command's synopsis."""
    return new_parser(
        prog=f"python -m pipelines {command}",
        usage=f"python -m pipelines {command} {SYNOPSES[command]}",
        description=description,
        # Errors are raised, so that `parse_options` can turn each of them into one sentence.
        exit_on_error=False,
        allow_abbrev=False,
    )
