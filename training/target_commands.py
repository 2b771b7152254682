"""``opsin data autoencoder`` and ``opsin data audit-target``: make a target of reconstruction, look into one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console


def target_commands(app: typer.Typer) -> None:
    """Add both commands to ``opsin data``."""
    app.command("autoencoder")(autoencoder)
    app.command("audit-target")(audit_target)


def autoencoder(
    out: Annotated[Path, typer.Option(help="safetensors file to write.")],
    steps: Annotated[int, typer.Option(min=1)] = 1200,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Train the auto-encoder of scenes whose latents ROSS reconstructs (how the shipped weights were made)."""
    from .autoencoder import train_autoencoder
    from .run_folder import refuse_unwritable

    refuse_unwritable(out.parent, f"--out {out}")  # before a minute of training
    train_autoencoder(out, steps=steps, seed=seed, console=Console(stderr=True))


def audit_target(
    name: Annotated[str, typer.Argument(help="autoencoder, pixels, vae, vq or features.")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="Keyword of the target: key=value.")] = None,
    size: Annotated[int, typer.Option(help="Side of the scenes in pixels.")] = 64,
    scenes: Annotated[int, typer.Option(min=100, help="Scenes that the probe is fitted on.")] = 4000,
    held_out: Annotated[int, typer.Option(min=100, help="Further scenes that it is scored on.")] = 1000,
    window: Annotated[int, typer.Option(help="Side in tokens of what the probe sees.")] = 3,
) -> None:
    """Read objects' colour and size off a target by a linear probe: does it hold what questions ask about?"""
    from omegaconf import OmegaConf

    from ..algorithms.ross.targets import make_target
    from ..evaluation.target_audit import PASS, as_table, audit, audited_scenes

    settings: Any = OmegaConf.to_container(OmegaConf.from_dotlist(set_ or []))
    target = make_target({"name": name, **settings})
    rows = audit(target, scenes=scenes, held_out=held_out, config=audited_scenes(size), window=window)
    Console().print(as_table(rows, target.identity))
    passed = all(row.passed for row in rows)
    print("passed" if passed else f"not passed: {PASS} is needed of both")
