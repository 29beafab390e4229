"""The command line of `python -m pipelines`: its commands, the function of each, and their common parser."""

import importlib
import sys
from collections.abc import Sequence

from jsonargparse import ArgumentParser

from pipelines import processes
from slam_asr import options
from slam_asr.config.schema import nearest
from slam_asr.errors import UserError, exit_on_user_error
from slam_asr.options import Command, list_commands
from slam_asr.runtime.environment import prepare_environment

PROGRAM = "python -m pipelines"
COMMANDS = {
    "run": Command(
        "pipelines.run:run",
        "RECIPE",
        "run all steps on this machine, as processes or in Docker, through Kubeflow's local runner",
    ),
    "compile": Command(
        "pipelines.compile:compile_command", "[RECIPE]", "write the pipeline as YAML for Kubeflow Pipelines"
    ),
    "submit": Command(
        "pipelines.kubeflow.submit:submit",
        "RECIPE",
        "compile, upload and start a run in a cluster; --wait follows it",
    ),
    "status": Command(
        "pipelines.kubeflow.commands:status", "[RUN]", "show the steps of a run, or list the latest runs"
    ),
    "logs": Command("pipelines.kubeflow.commands:logs", "RUN", "show the logs of a run's steps"),
    "resume": Command(
        "pipelines.kubeflow.commands:resume",
        "RUN",
        "restart the unfinished steps of a failed or stopped run; --new starts another run like it",
    ),
    "stop": Command("pipelines.kubeflow.commands:stop", "RUN", "stop a run"),
    "open": Command("pipelines.kubeflow.commands:open_page", "RUN", "open a run's page in the dashboard"),
    "runs": Command(
        "pipelines.kubeflow.commands:runs", "", "list the latest runs; --mine and --recipe select some"
    ),
    "schedule create": Command(
        "pipelines.kubeflow.schedules:create", "RECIPE", "start runs in a cluster at the times of --cron"
    ),
    "schedule list": Command("pipelines.kubeflow.schedules:list_all", "", "list the schedules"),
    "schedule pause": Command("pipelines.kubeflow.schedules:pause", "NAME", "pause a schedule"),
    "schedule resume": Command("pipelines.kubeflow.schedules:resume", "NAME", "resume a schedule"),
    "schedule delete": Command("pipelines.kubeflow.schedules:delete", "NAME", "delete a schedule"),
    "doctor": Command(
        "pipelines.kubeflow.doctor:doctor",
        "",
        "check that a cluster has everything that a run needs; --run checks it from inside pods too",
    ),
}
"""All commands. The function takes the arguments after the command's name and returns the exit code.

Its module is imported only when the command runs, so that `--help` does not wait for kfp.
"""

USAGE = list_commands(
    PROGRAM,
    {
        "commands": {
            f"{name} {command.positionals}".strip(): command.summary for name, command in COMMANDS.items()
        }
    },
    "--model MODEL trains nothing, and evaluates MODEL on the recipe's test sets.",
    "--sweep FILE  trains every variation of the recipe that FILE lists, with the same features, and "
    "compares them.",
    f"{PROGRAM} COMMAND --help      the options of a command",
    f"{PROGRAM} run RECIPE --help   all options, with the recipe's values",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    Args:
        argv: the command's name and its arguments; None for those of this process.

    Returns:
        0 for success, 1 for a failure, 2 for an error that the user can fix, 130 if interrupted.
    """
    if argv is None:
        # Only for this process's own command line, because `prepare_environment` may restart the program.
        prepare_environment()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    with processes.interruptible(), exit_on_user_error():
        # Some commands have names of two words, such as `schedule list`.
        words = 2 if " ".join(arguments[:2]) in COMMANDS else 1
        command = " ".join(arguments[:words])
        if command not in COMMANDS:
            hint = nearest(command, list(COMMANDS)) or "."
            raise UserError(f"Unknown command {command}{hint} Commands: {', '.join(COMMANDS)}.")
        module, function = COMMANDS[command].function.split(":")
        return getattr(importlib.import_module(module), function)(arguments[words:])


def command_parser(command: str, description: str) -> ArgumentParser:
    """Return a parser for the options of `command`."""
    return options.command_parser(f"{PROGRAM} {command}", description, COMMANDS[command].positionals)
