"""``opsin checkpoint ...``: between the two forms of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

checkpoint_app = typer.Typer(no_args_is_help=True, help=__doc__)


@checkpoint_app.command("convert")
def convert_checkpoint(
    source: Annotated[
        Path, typer.Argument(help="A file ….pt, the folder of a sharded one, or a link to one.")
    ],
    to: Annotated[Path, typer.Argument(help="The other form; must not exist.")],
) -> None:
    """Turn a sharded checkpoint (FSDP2) into a whole one (one process, DDP), or the reverse; the same to the bit.

    Runs do this by themselves when they go on under another layout; this is for keeping one.
    """
    from . import compat
    from .checkpoints import convert, summary

    compat.apply()
    form = convert(source, to)
    typer.echo(f"{to}: {form}; {summary(to)}")
