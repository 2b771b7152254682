"""The environment of a process of a job: what launchers set, made whole, and refused where it contradicts itself.

Composer, Streaming and PyTorch read ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``LOCAL_WORLD_SIZE``, ``NODE_RANK``,
``MASTER_ADDR`` and ``MASTER_PORT``. ``composer`` sets all of them; ``torchrun`` says ``GROUP_RANK`` for ``NODE_RANK``.
"""

from __future__ import annotations

from collections.abc import MutableMapping

from ..models.errors import UserError

NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
MEETING = ("MASTER_ADDR", "MASTER_PORT")


def complete_environment(environment: MutableMapping[str, str]) -> None:
    """Fill in what the launcher left out; a process that nothing launched is left alone.

    Raises:
        UserError: a part of it is missing or contradicts another, so that ranks would wait for each other or train apart;
            or Slurm started several tasks that know nothing of each other.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "WORLD_SIZE" not in environment and "RANK" not in environment:
        if tasks.isdecimal() and int(tasks) > 1:
            raise UserError(
                f"environment: srun started {tasks} tasks, but neither RANK nor WORLD_SIZE is set, so each would do all of the "
                "work alone; start them with yamls/cluster/slurm.sh (docs/cluster.md)"
            )
        return
    if environment.get("WORLD_SIZE") == "1" and "MASTER_ADDR" not in environment:
        return  # one process; Composer fills in the rest
    missing = [name for name in (*NUMBERS, *MEETING) if not environment.get(name)]
    if missing:
        raise UserError(
            f"environment: {missing[0]} is not set beside WORLD_SIZE or RANK; use a launcher (composer -n 8 ..., torchrun "
            "--nproc-per-node 8 ...), or set all that docs/cluster.md names"
        )
    for name in NUMBERS:
        if not environment[name].isdecimal():
            raise UserError(f"environment: {name}={environment[name]}: expected a whole number, 0 or more")
    rank, world, local, here = (int(environment[name]) for name in NUMBERS)
    if rank >= world:
        raise UserError(f"environment: RANK={rank} is none of WORLD_SIZE={world} ranks (0 to {world - 1})")
    if local >= here:
        raise UserError(
            f"environment: LOCAL_RANK={local} is none of LOCAL_WORLD_SIZE={here} ranks of this node"
        )
    if here > world:
        raise UserError(
            f"environment: LOCAL_WORLD_SIZE={here} ranks of this node are more than WORLD_SIZE={world}"
        )
    # All launchers number ranks node by node.
    node = environment.setdefault("NODE_RANK", environment.get("GROUP_RANK") or str(rank // here))
    if not node.isdecimal() or (world % here == 0 and int(node) >= world // here):
        raise UserError(
            f"environment: NODE_RANK={node} is none of {world // here} nodes of {here} ranks (WORLD_SIZE={world})"
        )
