"""Training on several machines (nodes): reads this machine's rank from torchrun's environment variables.

Kubeflow Trainer sets these variables in each node's pod. Without Kubeflow Trainer, set them by hand on each
machine.
"""

import os
from dataclasses import dataclass

from slam_asr.errors import ConfigurationError

NUMBER, RANK, ADDRESS, PORT = "PET_NNODES", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT"


@dataclass(frozen=True)
class Nodes:
    """The machines of a training, and the rank of this one."""

    number: int = 1
    rank: int = 0
    """Number of this machine, from 0."""
    address: str = "127.0.0.1"
    """Address of the first machine, to which the others connect."""
    port: int = 0
    """Port at that address."""

    @property
    def is_coordinator(self) -> bool:
        """Whether this machine writes the results."""
        return self.rank == 0


def nodes_from_environment(expected: int) -> Nodes:
    """Read this machine's rank among the `expected` machines of the recipe (`training.nodes`).

    Raises:
        ConfigurationError: the environment contradicts the recipe, or is incomplete.
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
            f"{NUMBER} is {number}, but {' and '.join(missing)} is not set: each machine needs its rank, "
            "counted from 0, and the address and port of the first machine."
        )
    try:
        nodes = Nodes(expected, int(variables[RANK]), variables[ADDRESS], int(variables[PORT]))
    except ValueError:
        raise ConfigurationError(
            f"{RANK} is {variables[RANK]!r} and {PORT} is {variables[PORT]!r}: both must be integers."
        ) from None
    if not 0 <= nodes.rank < expected:
        raise ConfigurationError(
            f"{RANK} is {nodes.rank}: with {expected} machines it must be 0 to {expected - 1}."
        )
    return nodes
