"""Starts or resumes a training run, whose processes run under torchrun on one machine or on several."""

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slam_asr.artifacts import checkpoint
from slam_asr.artifacts.stage_record import Record, read_record, require_permission_to_replace
from slam_asr.cores import thread_limits
from slam_asr.errors import ConfigurationError, Stopped, UserError
from slam_asr.progress import log_line
from slam_asr.restart import PAUSES
from slam_asr.runtime.worker import FAILURE, PARENT, START
from slam_asr.storage import digest
from slam_asr.storage.cache import cache_folder

if TYPE_CHECKING:
    from torch.distributed.launcher.api import LaunchConfig

WAIT_FOR_RECORD = 600.0
"""Seconds that the other nodes wait for the first node's record after training."""
RENDEZVOUS = 1800
"""Seconds that a node waits for the other nodes, which may still be pulling images or downloading models."""

LAST_CHECKPOINT = ("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
"""torchrun's environment variable for the seconds that processes have for a last checkpoint after a signal,
and its value. A cluster's own grace period is usually shorter."""
STOPPING = (signal.SIGTERM, signal.SIGINT)
"""Signals after which the loop saves a checkpoint, and exits with the code 128 plus the signal's number."""
PROGRAM = "slam_asr.training.loop"
"""The module that each training process runs."""

TEMPORARY_CODES = (os.EX_TEMPFAIL, -signal.SIGABRT)
"""Exit codes of a training process after a failure that is usually temporary.

The training loop exits with the first code. The second is that of a process that NCCL's watchdog aborts
because another process does not answer.
"""

ALLOCATION = ("MALLOC_MMAP_THRESHOLD_", "4194304")
"""glibc's environment variable for the size in bytes from which a block gets pages of its own, and its value.

Such a block is returned to the system when it is freed. By default, glibc raises this threshold to as much as
32 MiB, and activations then leave holes in the heap. With glibc's default, training on a CPU needed 1.5 times
the memory and was no faster.
"""

NUMBER, RANK, ADDRESS, PORT = "PET_NNODES", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT"
"""torchrun's environment variables for the number of machines (nodes), this machine's rank, and the address
and port of the first machine. Kubeflow Trainer sets them in each node's pod; without it, set them by hand."""


@dataclass(frozen=True)
class Nodes:
    """The number of machines of a training run, and the rank of this machine."""

    number: int = 1
    rank: int = 0
    """Number of this machine, from 0."""
    address: str = "127.0.0.1"
    """Address of the first machine, to which the other machines connect."""
    port: int = 0
    """Port at that address."""

    @property
    def is_coordinator(self) -> bool:
        """Whether this machine writes the results."""
        return self.rank == 0


def nodes_from_environment(expected: int) -> Nodes:
    """Read the machines of the training run from torchrun's environment variables.

    Args:
        expected: number of machines in the recipe (`training.nodes`).

    Raises:
        ConfigurationError: the variables contradict the recipe, are incomplete, or are not valid.
    """
    variables = {name: os.environ.get(name, "") for name in (NUMBER, RANK, ADDRESS, PORT)}
    number = variables[NUMBER] or "1"
    if number == "1" and expected == 1:
        return Nodes()
    if number != str(expected):
        raise ConfigurationError(
            f"The recipe's training.nodes is {expected}, but {NUMBER} is {variables[NUMBER] or 'not set'} "
            f"here: start `slam-asr train` on {expected} machines with {NUMBER}={expected}, {RANK}, "
            f"{ADDRESS} and {PORT} set, as Kubeflow Trainer does, or set training.nodes to the number of "
            "machines."
        )
    missing = [name for name, value in variables.items() if not value]
    if missing:
        raise ConfigurationError(
            f"{NUMBER} is {number}, but {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not "
            "set: each machine needs its rank, counted from 0, and the address and port of the first machine."
        )
    try:
        nodes = Nodes(expected, int(variables[RANK]), variables[ADDRESS], int(variables[PORT]))
    except ValueError:
        raise ConfigurationError(
            f"{RANK} is {variables[RANK]!r} and {PORT} is {variables[PORT]!r}, but both must be integers."
        ) from None
    if not 0 <= nodes.rank < expected:
        raise ConfigurationError(
            f"{RANK} is {nodes.rank}, but with {expected} machines it must be from 0 to {expected - 1}."
        )
    return nodes


def train_as_worker_node(
    folder: str, inputs: dict[str, Any], nodes: Nodes, train_here: Callable[[Path], None], overwrite: bool
) -> Record:
    """Train on a machine other than the first, and wait for the record that the first machine writes.

    Args:
        folder: folder of the stage's results, perhaps in object storage.
        inputs: inputs of this training run.
        nodes: this machine's rank.
        train_here: function that trains on this machine; its argument is a local folder for results.
        overwrite: whether results of other inputs may be replaced.

    Returns:
        The record.

    Raises:
        UserError: this node's training failed; the folder holds results of other inputs, and `overwrite` is
            False; or the first node wrote no record within `WAIT_FOR_RECORD`.
    """
    done = read_record(folder)
    if done is not None and done.inputs == inputs:
        log_line(f"train: already there, nothing to do: {done.summary} ({folder})")
        return done
    if done is not None:
        require_permission_to_replace(folder, done, inputs, overwrite)
    work_folder = cache_folder() / "work" / f"{digest(folder)[:24]}-node-{nodes.rank}"
    work_folder.mkdir(parents=True, exist_ok=True)
    try:
        train_here(work_folder)
    finally:
        shutil.rmtree(work_folder, ignore_errors=True)
    deadline = time.monotonic() + WAIT_FOR_RECORD
    # With --overwrite, the record of other inputs remains until the first node replaces it.
    while (done := read_record(folder)) is None or done.inputs != inputs:
        if time.monotonic() > deadline:
            raise UserError(f"The first node has written no record in {folder}: see its log for the reason.")
        time.sleep(1.0)
    log_line(f"train: node {nodes.rank} of {nodes.number} is done; the first node wrote {folder}")
    return done


def launch_training(processes: int, folder: Path, nodes: Nodes, checkpoints: str) -> None:
    """Run this machine's processes of the training loop, under torchrun's launcher.

    After a failure that is usually temporary, such as a failure of a GPU's driver, a training run on one
    machine starts again from its latest checkpoint. It does so at most `len(PAUSES)` times in a row without a
    new checkpoint. A training run on several machines does not restart.

    Args:
        processes: number of processes on this machine.
        folder: local folder that contains `job.json`. A failing process writes its message there.
        nodes: this machine's rank, and the address at which the machines meet.
        checkpoints: folder of the checkpoints.

    Raises:
        Stopped: a signal stopped the training.
        UserError: a process failed. The message is the one that a failing process wrote, if any.
    """
    # glibc reads this variable when a process starts, so it applies only to the training processes.
    os.environ.setdefault(*ALLOCATION)
    os.environ.setdefault(*LAST_CHECKPOINT)
    os.environ.update(thread_limits(processes))
    here = f" on node {nodes.rank} of {nodes.number}" if nodes.number > 1 else ""
    log_line(f"starting {processes} training process{'es' * (processes > 1)}{here}")
    # torchrun starts the processes from this one, with this environment.
    os.environ[PARENT] = str(os.getpid())
    restarts, reached = 0, _latest_step(checkpoints)
    try:
        while failure := _launch_once(processes, folder, nodes, checkpoints):
            before, reached = reached, _latest_step(checkpoints)
            restarts = 0 if reached > before else restarts
            # Several machines would have to agree on a restart. A machine that has failed for another reason
            # does not come back, and the others would wait for it.
            if nodes.number > 1 or restarts == len(PAUSES):
                raise UserError(f"{failure}.")
            log_line(f"{failure}. In {PAUSES[restarts]:g} s, training starts again after step {reached}")
            time.sleep(PAUSES[restarts])
            restarts += 1
    finally:
        del os.environ[PARENT]


def _launch_once(processes: int, folder: Path, nodes: Nodes, checkpoints: str) -> str | None:
    """Run the processes to their end, as `launch_training` does.

    Returns:
        None; or, if a process failed but may succeed when it is started again, a sentence about this failure,
        without a full stop.

    Raises:
        Stopped: a signal stopped the training.
        UserError: a process failed.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    try:
        elastic_launch(_launch_config(processes, nodes), sys.executable)(
            "-u", "-m", START, PROGRAM, str(folder / "job.json")
        )
        return None
    except SignalException as error:
        raise Stopped(_stopped_message(error.sigval.name, checkpoints), 128 + error.sigval.value) from error
    except ChildFailedError as error:
        failure = folder / FAILURE
        if failure.is_file():
            raise UserError(failure.read_text(encoding="utf-8")) from error
        # When one process fails, the others lose their connection to it, and exit with one of
        # `TEMPORARY_CODES` or with 1. The smallest code nearly always belongs to the cause: the code of a
        # signal is negative, and 1 is less than EX_TEMPFAIL.
        code = min(failed.exitcode for failed in error.failures.values())
        # After a signal, the loop saves a last checkpoint and exits with this code.
        if code - 128 in STOPPING:
            raise Stopped(_stopped_message(signal.Signals(code - 128).name, checkpoints), code) from error
        if code == -9:
            raise UserError(
                "A training process was killed (signal 9), usually because the machine ran out of memory: "
                "lower training.positions_per_batch or training.processes."
            ) from error
        ended = f"A training process ended with code {code}; its own message is above"
        if code in TEMPORARY_CODES:
            return ended
        raise UserError(f"{ended}.") from error


def _latest_step(checkpoints: str) -> int:
    """Return the step of the latest checkpoint; 0 if none exists."""
    latest = checkpoint.find(checkpoints)
    return latest.step if latest else 0


def _launch_config(processes: int, nodes: Nodes) -> "LaunchConfig":
    """Return torchrun's settings for `processes` processes on each of the nodes."""
    from torch.distributed.launcher.api import LaunchConfig

    meeting: dict[str, Any]
    if nodes.number == 1:
        # Use an address, not a name: resolving `localhost` may need a resolver that a container does not
        # have. With port 0 the system picks a free port.
        meeting = {"rdzv_backend": "c10d", "rdzv_endpoint": "127.0.0.1:0", "local_addr": "127.0.0.1"}
    else:
        # With `static`, each machine sets its own rank. With `c10d`, torchrun would assign the ranks, and the
        # machine that writes the results might not be the one with the first process.
        endpoint, options = f"{nodes.address}:{nodes.port}", {"rank": nodes.rank, "timeout": RENDEZVOUS}
        meeting = {"rdzv_backend": "static", "rdzv_endpoint": endpoint, "rdzv_configs": options}
    return LaunchConfig(
        run_id="slam-asr" if nodes.number > 1 else f"slam-asr-{os.getpid()}",
        min_nodes=nodes.number,
        max_nodes=nodes.number,
        nproc_per_node=processes,
        max_restarts=0,  # only `launch_training` knows which failures are temporary, and starts again
        monitor_interval=0.2,
        **meeting,
    )


def _stopped_message(signal_name: str, checkpoints: str) -> str:
    """Return the message about a stopped training: its latest checkpoint, and how to resume."""
    latest = checkpoint.find(checkpoints)
    state = f"after step {latest.step}, saved in {latest.folder}" if latest else "before the first checkpoint"
    return f"stopped by {signal_name} {state}; run the same command again to resume"


def require_same_training(folder: str, inputs: dict[str, Any], overwrite: bool) -> None:
    """Check that this training run can resume from the checkpoints in a folder, if there are any.

    Args:
        folder: folder of the checkpoints.
        inputs: inputs of this training run.
        overwrite: whether to remove the checkpoints of another training run instead of refusing.

    Raises:
        ConfigurationError: the checkpoints belong to another training run. The message names the keys that
            differ.
    """
    latest = checkpoint.find(folder)
    if latest is None:
        return
    differing = _differences(latest.inputs, inputs)
    if differing and not overwrite:
        shown = ", ".join(differing[:5])
        more = ", …" if len(differing) > 5 else ""
        number = "1 key differs" if len(differing) == 1 else f"{len(differing)} keys differ"
        raise ConfigurationError(
            f"{latest.folder} is a checkpoint of another training run ({number}: "
            f"{shown}{more}): choose another --output, or add --overwrite true to start again."
        )
    if differing:
        checkpoint.clear(folder)


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return `key before → now` for each input that differs.

    Inputs that may change when a training run resumes are left out.
    """
    flat_before, flat_now = flattened(before), flattened(now)
    harmless = {"recipe.training.validate_every", "recipe.training.patience"}
    if flat_now.get("recipe.projector.beginning.until"):
        # The beginning can end only at a validation.
        harmless.remove("recipe.training.validate_every")
    if flat_before.get("recipe.training.schedule") == flat_now.get("recipe.training.schedule") == "constant":
        # With a constant learning rate, the total number of steps does not affect the steps done so far.
        harmless |= {"recipe.training.max_steps", "recipe.training.epochs"}
    keys = sorted(
        k for k in flat_before | flat_now if flat_before.get(k) != flat_now.get(k) and k not in harmless
    )
    return [
        f"{key.removeprefix('recipe.')} {_shown(flat_before.get(key))} → {_shown(flat_now.get(key))}"
        for key in keys
    ]


def flattened(values: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Flatten nested dictionaries; keys are joined with dots."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flattened(value, f"{above}{key}.") if isinstance(value, dict) else {above + key: value}
    return flat


def _shown(value: object) -> str:
    """Return a value as text for a message. A text of more than 20 characters is cut to 12, with `…`."""
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 20 else text[:12] + "…"
