"""Training on several machines: who this one is among them, as torchrun's environment says.

Kubeflow Trainer sets these variables in each node's pod, as torchrun reads them; by hand they are set
the same way on each machine.
"""

import os
from dataclasses import dataclass

from slam_asr.errors import UserError

NUMBER, RANK, ADDRESS, PORT = "PET_NNODES", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT"


@dataclass(frozen=True)
class Nodes:
    """The machines of a training, and which of them this is."""

    number: int = 1
    rank: int = 0
    address: str = "127.0.0.1"
    port: int = 0

    @property
    def is_coordinator(self) -> bool:
        """Whether this one writes the results."""
        return self.rank == 0


def nodes_of_environment(wanted: int) -> Nodes:
    """This machine's place among `wanted`.

    Raises:
        UserError: the environment says otherwise, or half of it.
    """
    given = {name: os.environ.get(name, "") for name in (NUMBER, RANK, ADDRESS, PORT)}
    number = given[NUMBER] or "1"
    if number == "1" and wanted == 1:
        return Nodes()
    if number != str(wanted):
        raise UserError(
            f"The recipe's training.nodes is {wanted}, but {NUMBER} is {given[NUMBER] or 'not set'} here: start `slam-asr train` on {wanted} machines with "
            f"{NUMBER}={wanted}, {RANK}, {ADDRESS} and {PORT} set, as Kubeflow Trainer does, or set training.nodes to the number there is."
        )
    missing = [name for name, value in given.items() if not value]
    if missing:
        raise UserError(
            f"{NUMBER} is {number}, but {' and '.join(missing)} is not set: each machine needs its rank from 0 on, and address and port of the first."
        )
    try:
        nodes = Nodes(wanted, int(given[RANK]), given[ADDRESS], int(given[PORT]))
    except ValueError:
        raise UserError(
            f"{RANK} is {given[RANK]!r} and {PORT} is {given[PORT]!r}: both must be whole numbers."
        ) from None
    if not 0 <= nodes.rank < wanted:
        raise UserError(f"{RANK} is {nodes.rank}: with {wanted} machines it goes from 0 to {wanted - 1}.")
    return nodes
