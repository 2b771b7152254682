"""The auto-encoders that a study of ROSS's targets trains for itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from opsin.algorithms.ross.targets import make_target
from opsin.training.autoencoder import _batch
from opsin.training.study import part_autoencoders as parts
from opsin.training.study.part_kinds import SCENE_SEED

TARGETS = {
    "kl_autoencoder": {"name": "vae", "posterior": "sample"},
    "vq_autoencoder": {"name": "vq", "fold": 2},
}
QUIET = Console(quiet=True)


@pytest.fixture(scope="module", params=sorted(TARGETS))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "MEASURED", 64)
        parts.KINDS[request.param](folder, QUIET, steps=8, batch_size=4)
    assert torch.equal(torch.get_rng_state(), before)  # what a study draws elsewhere does not depend on it
    return request.param, folder


def test_what_is_trained_is_a_target_of_ross(made: tuple[str, Path]) -> None:
    kind, folder = made
    target = make_target({**TARGETS[kind], "path": str(folder)})
    pictures = _batch(parts._PICTURES, SCENE_SEED, 5000, 64)[0] / 2 + 0.5
    found = target.encode(pictures, (8, 8))
    assert target.cell == 8 and target.dim == 32 and found.shape == (64, 64, target.moments_dim)
    latents = target.draw(found, torch.randn(64, 64, 32) if target.draws else None)
    # Of size 1, as the noise that denoising begins with; these scenes are not those that it was measured on.
    assert float(latents.mean()) == pytest.approx(0, abs=0.2) and float(latents.std()) == pytest.approx(
        1, abs=0.1
    )
    drawn = target.decode(latents, (8, 8))
    assert drawn.shape == pictures.shape and bool(drawn.isfinite().all())


def test_the_same_seed_gives_the_same_weights(
    made: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, folder = made
    monkeypatch.setattr(parts, "MEASURED", 64)
    parts.KINDS[kind](tmp_path, QUIET, steps=8, batch_size=4)
    for file in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (tmp_path / file).read_bytes() == (folder / file).read_bytes()


def test_standardised_code_vectors_draw_the_same_pictures() -> None:
    from diffusers import VQModel  # type: ignore[attr-defined]

    torch.manual_seed(0)
    vq: Any = VQModel(**parts._shape(8), num_vq_embeddings=32).eval()
    pictures = _batch(parts._PICTURES, 0, 0, 4)[0]
    with torch.no_grad():
        parts._lay(vq, vq.encode(pictures).latents, torch.zeros(32, dtype=torch.bool))
        vectors, _, (_, _, chosen) = vq.quantize(vq.encode(pictures).latents)
        drawn = parts.decode(vq, vectors)
        mean = vectors.mean(dim=(0, 2, 3), keepdim=True)
        moved = (vectors - mean) / (vectors - mean).std()
        parts.standardise(vq, vectors)
        torch.testing.assert_close(parts.decode(vq, moved), drawn, atol=1e-4, rtol=1e-4)
        after, _, (_, _, now) = vq.quantize(vq.encode(pictures).latents)
    # Walls give vectors that are almost alike, so of two the other may be the nearest now.
    assert len(chosen.unique()) > 8 and float((now == chosen).float().mean()) > 0.9
    assert float(after.std()) == pytest.approx(1, abs=0.02)
    assert float(after.mean(dim=(0, 2, 3)).abs().max()) < 0.02


def test_vectors_that_are_kept_stay_where_they_are() -> None:
    from diffusers import VQModel  # type: ignore[attr-defined]

    torch.manual_seed(0)
    vq: Any = VQModel(**parts._shape(8), num_vq_embeddings=6)
    before = vq.quantize.embedding.weight.clone()
    latents, kept = torch.randn(2, 8, 4, 4), torch.arange(6) < 4
    parts._lay(vq, latents, kept)
    book = vq.quantize.embedding.weight
    there = latents.movedim(1, -1).flatten(0, -2)
    assert torch.equal(book[:4], before[:4])
    assert all(bool((there == one).all(-1).any()) for one in book[4:]) and not torch.equal(book[4], book[5])


def test_it_learns_to_draw_through_the_quantiser() -> None:
    from diffusers import VQModel  # type: ignore[attr-defined]

    torch.manual_seed(0)
    vq: Any = VQModel(**parts._shape(8), num_vq_embeddings=64)
    pictures, objects = _batch(parts._PICTURES, 0, 0, 4)
    parts._lay(vq, vq.encode(pictures).latents, torch.zeros(64, dtype=torch.bool))
    optimizer = torch.optim.AdamW(vq.parameters(), lr=2e-3)
    losses = []
    for _ in range(25):
        vectors, nearness, _ = vq.quantize(vq.encode(pictures).latents)
        drawn = parts.distance(parts.decode(vq, vectors), pictures, 1 + parts.OBJECTS * objects)
        losses.append(float(drawn))
        optimizer.zero_grad()
        (drawn + nearness).backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
