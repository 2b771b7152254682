"""Targets of ROSS: what a token is made of, what changes a target's identity, and mistakes in one line."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from opsin.algorithms.ross.targets import Target, make_target
from opsin.algorithms.ross.targets.autoencoder import WEIGHTS
from opsin.data.scenes import SceneConfig, scene
from opsin.models.errors import UserError
from opsin.models.targets.base import fold, unfold

from frozen import dino, encoded, pictures

SMALL_BLOCKS = {
    "block_out_channels": [8, 8, 8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
FLUX = {
    **SMALL_BLOCKS, "latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159,
    "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip
SD = {**SMALL_BLOCKS, "latent_channels": 4, "scaling_factor": 0.18215}
VQ = {
    "block_out_channels": [8, 8, 8], "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3, "norm_num_groups": 4, "latent_channels": 3,
    "num_vq_embeddings": 32, "vq_embed_dim": 3,
}  # fmt: skip


# VAE -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "dim", "shift", "scale"), [(FLUX, 64, 0.1159, 0.3611), (SD, 16, 0.0, 0.18215)]
)
def test_vae_shifts_scales_and_folds_the_posterior(
    config: dict, dim: int, shift: float, scale: float
) -> None:
    target = make_target({"name": "vae", "config": config})
    only_mean = make_target({"name": "vae", "config": config, "posterior": "mean"})
    assert (target.cell, target.dim, target.moments_dim, only_mean.moments_dim) == (16, dim, 2 * dim, dim)
    x = pictures(2, 2, 3, 16)  # not square
    moments = encoded(target, x)
    assert moments.shape == (2, 6, 2 * dim) and moments.dtype == torch.float32
    posterior = target.vae.encode(x * 2 - 1).latent_dist  # type: ignore[attr-defined]
    mean = fold((posterior.mean - shift) * scale, 2)
    torch.testing.assert_close(moments[..., :dim], mean)
    torch.testing.assert_close(moments[..., dim:], fold(posterior.std * scale, 2))
    torch.testing.assert_close(encoded(only_mean, x), mean)
    # What is drawn is what the reference draws: sample the posterior, then shift and scale.
    noise = torch.randn(2, config["latent_channels"], 4, 6)
    drawn = target.draw(moments.flatten(0, 1), fold(noise, 2).flatten(0, 1))
    expected = fold((posterior.mean + posterior.std * noise - shift) * scale, 2).flatten(0, 1)
    torch.testing.assert_close(drawn, expected)
    assert target.draws and not only_mean.draws


def test_vae_decodes_what_it_encodes_and_carries_a_graph() -> None:
    target = make_target({"name": "vae", "config": FLUX, "posterior": "mean"})
    x = pictures(2, 2, 3, 16)
    tokens = encoded(target, x).requires_grad_()
    back = target.decode(tokens, (2, 3))
    assert back.shape == x.shape
    raw = target.vae.encode(x * 2 - 1).latent_dist.mean  # type: ignore[attr-defined]
    expected = target.vae.decode(raw).sample / 2 + 0.5  # type: ignore[attr-defined]
    torch.testing.assert_close(back, expected, atol=1e-4, rtol=1e-4)
    back.sum().backward()
    assert tokens.grad is not None and tokens.grad.abs().sum() > 0
    assert all(p.grad is None for p in target.vae.parameters())  # type: ignore[attr-defined]


def test_vae_with_means_and_deviations_by_channel() -> None:
    config = {**SD, "latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0]}
    target = make_target({"name": "vae", "config": config, "posterior": "mean", "fold": 1})
    x = pictures(1, 2, 2, 8)
    raw = target.vae.encode(x * 2 - 1).latent_dist.mean  # type: ignore[attr-defined]
    shift, std = (torch.tensor(config[k]).view(4, 1, 1) for k in ("latents_mean", "latents_std"))
    torch.testing.assert_close(encoded(target, x), fold((raw - shift) * 0.18215 / std, 1))


@pytest.mark.parametrize(
    ("name", "channels", "parameters"), [("flux", 16, 83_819_683), ("sd", 4, 83_653_863)]
)
def test_named_geometries_are_the_published_ones(name: str, channels: int, parameters: int) -> None:
    from diffusers import AutoencoderKL

    from opsin.algorithms.ross.targets.vae import GEOMETRIES

    with torch.device("meta"):
        vae = AutoencoderKL(**GEOMETRIES[name])
    assert vae.config.latent_channels == channels  # type: ignore[attr-defined]
    assert sum(p.numel() for p in vae.parameters()) == parameters


def test_vae_from_a_folder(tmp_path: Path) -> None:
    made = make_target({"name": "vae", "config": FLUX})
    made.vae.save_pretrained(tmp_path / "model" / "vae")  # type: ignore[attr-defined]
    loaded = make_target({"name": "vae", "path": str(tmp_path / "model"), "subfolder": "vae"})
    x = pictures(1, 1, 2, 16)
    assert torch.equal(encoded(loaded, x), encoded(made, x)) and loaded.identity == made.identity
    with pytest.raises(
        UserError, match=r"target\.path '.*': no config\.json there; set subfolder to one of vae"
    ):
        make_target({"name": "vae", "path": str(tmp_path / "model")})
    with pytest.raises(UserError, match="a AutoencoderKL, a VQModel is needed"):
        make_target({"name": "vq", "path": str(tmp_path / "model" / "vae")})
    file = tmp_path / "model" / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file({k: v for k, v in weights.items() if k != "encoder.conv_in.weight"}, file)
    with pytest.raises(UserError, match=r"target\.path .*encoder\.conv_in\.weight"):
        make_target({"name": "vae", "path": str(tmp_path / "model" / "vae")})
    torch.save(weights, file.with_suffix(".bin"))
    file.unlink()  # a pickle alone is not read
    with pytest.raises(UserError, match=r"algorithms\.ross\.target\.path .*cannot be loaded"):
        make_target({"name": "vae", "path": str(tmp_path / "model" / "vae")})


# VQ ------------------------------------------------------------------------------------------------------


def test_every_vq_latent_is_a_row_of_the_codebook() -> None:
    target = make_target({"name": "vq", "config": VQ, "scale": 2.0})
    assert (target.cell, target.dim, target.moments_dim) == (16, 48, 48)
    x = pictures(2, 2, 3, 16)
    tokens = encoded(target, x)
    latents = unfold(tokens, (2, 3), 4).permute(0, 2, 3, 1).reshape(-1, 3) / 2
    distance = (latents[:, None] - target.codebook[None]).square().sum(-1)  # type: ignore[attr-defined]
    assert float(distance.min(1).values.max()) == 0
    # and the nearest one to what the encoder said
    said = target.vq.encode(x * 2 - 1).latents.permute(0, 2, 3, 1).reshape(-1, 3)  # type: ignore[attr-defined]
    assert torch.equal(torch.cdist(said, target.codebook).argmin(1), distance.argmin(1))  # type: ignore[attr-defined]
    predicted = tokens.clone().requires_grad_()
    back = target.decode(predicted, (2, 3))
    expected = target.vq.decode(target.vq.encode(x * 2 - 1).latents).sample  # type: ignore[attr-defined]
    torch.testing.assert_close(back, expected / 2 + 0.5, atol=1e-5, rtol=1e-4)
    back.sum().backward()
    assert predicted.grad is not None and predicted.grad.abs().sum() > 0


@pytest.mark.parametrize(("levels", "folded"), [(2, 8), (4, 2), (5, 1)])
def test_vq_folds_to_sixteen_pixels(levels: int, folded: int) -> None:
    config = {
        **VQ, "block_out_channels": [8] * levels, "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }  # fmt: skip
    target = make_target({"name": "vq", "config": config})
    assert target.cell == 16 and target.dim == 3 * folded**2


# The auto-encoder that ships -----------------------------------------------------------------------------


def held_out(count: int = 64, seed: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures in [0, 1]; number of the object at each pixel."""
    shown = [scene(SceneConfig(), seed, "uniform", i) for i in range(count)]
    found = np.stack([np.asarray(s.picture) for s in shown])
    return torch.from_numpy(found).permute(0, 3, 1, 2).float() / 255, torch.from_numpy(
        np.stack([s.masks for s in shown])
    )


def psnr(error: torch.Tensor) -> float:
    return -10 * math.log10(float(error.square().mean()))


def test_the_shipped_autoencoder_draws_held_out_scenes() -> None:
    """Measured on these 64 scenes: 25.4 dB, 26.3 dB on objects; worst colour of an object .047 off."""
    target = make_target("autoencoder")
    assert (target.cell, target.dim, target.moments_dim) == (8, 16, 16)
    x, objects = held_out()
    tokens = encoded(target, x)
    assert tokens.shape == (64, 64, 16)
    # standardised over scenes; these are 64 of them
    assert tokens.mean((0, 1)).abs().max() < 0.15 and (tokens.std((0, 1)) - 1).abs().max() < 0.15
    error = target.decode(tokens, (8, 8)) - x
    assert psnr(error) > 24.5
    assert psnr(error.permute(0, 2, 3, 1)[objects > 0]) > 25.3
    off = [
        error[i][:, objects[i] == j].mean(1).abs().max()
        for i in range(64)
        for j in range(1, int(objects[i].max()) + 1)
        if (objects[i] == j).sum() > 10
    ]
    assert len(off) > 100 and max(off) < 0.1  # a green object is green: the palette's colours are .27 apart


def test_the_shipped_file_is_small_and_says_how_it_was_made() -> None:
    from safetensors import safe_open

    assert WEIGHTS.stat().st_size < 600_000
    with safe_open(WEIGHTS, "pt") as file:
        assert file.metadata() == {"made_by": "opsin data autoencoder --steps 1200 --seed 0"}
        kinds = {k: file.get_tensor(k).dtype for k in file.keys()}  # noqa: SIM118
    assert {k for k, v in kinds.items() if v == torch.float32} == {"mean", "std"}
    assert set(kinds.values()) == {torch.float32, torch.bfloat16}


def test_training_writes_a_file_that_the_target_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    from opsin.training import autoencoder

    monkeypatch.setattr(autoencoder, "_MEASURED", 192)
    quiet = Console(quiet=True)
    for name, steps, seed in (("a", 4, 1), ("b", 4, 1), ("c", 4, 2)):
        autoencoder.train_autoencoder(tmp_path / name, steps=steps, seed=seed, console=quiet, batch_size=4)
    a, b, c = (make_target({"name": "autoencoder", "weights": str(tmp_path / n)}) for n in "abc")
    assert a.identity == b.identity != c.identity != make_target("autoencoder").identity
    tokens = encoded(a, held_out(32)[0])
    assert tokens.mean((0, 1)).abs().max() < 0.3 and (tokens.std((0, 1)) - 1).abs().max() < 0.3


# What every frozen target owes ---------------------------------------------------------------------------


@pytest.fixture
def specs(tmp_path: Path) -> list[dict]:
    return [
        {"name": "vae", "config": FLUX},
        {"name": "vq", "config": VQ},
        {"name": "features", "path": dino(tmp_path)},
        {"name": "autoencoder"},
    ]


def test_frozen_targets_stay_frozen_and_move(specs: list[dict]) -> None:
    for spec in specs:
        target = make_target(spec)
        net = target.teacher.module  # type: ignore[attr-defined]
        assert not net.training and not any(p.requires_grad for p in net.parameters())
        assert not isinstance(target, torch.nn.Module)
        x = pictures(3, 2, 2, target.cell).requires_grad_()
        tokens = encoded(target, x)
        assert not tokens.requires_grad and tokens.dtype == torch.float32
        assert tokens.shape == (3, 4, target.moments_dim)
        assert target.to(torch.device("cpu")) is target
        sizes = [(2, 3), (1, 2), (2, 3)]
        views = [torch.rand(3, 20, 30), torch.rand(3, 9, 9), pictures(1, 2, 3, target.cell, seed=4)[0]]
        moments = target.moments(views, sizes)
        assert moments.shape == (14, target.moments_dim)
        torch.testing.assert_close(moments[8:], encoded(target, views[2][None])[0], atol=1e-5, rtol=1e-4)
        target.to(torch.device("meta"))
        assert {p.device.type for p in net.parameters()} == {"meta"}


@pytest.mark.gpu
def test_frozen_targets_on_a_gpu(specs: list[dict]) -> None:
    for spec in specs:
        here, there = make_target(spec), make_target(spec).to(torch.device("cuda"))
        x = pictures(2, 2, 3, here.cell)
        moved = encoded(there, x)
        assert moved.device.type == "cuda"
        # (an index of a codebook may flip where two codes are equally near)
        close = (encoded(here, x) - moved.cpu()).abs().amax(-1) < 1e-2
        assert close.float().mean() > 0.9
        if spec["name"] != "features":
            tokens = moved[..., : here.dim].requires_grad_()
            there.decode(tokens, (2, 3)).sum().backward()
        assert there.identity == here.identity


@pytest.mark.parametrize(
    ("spec", "changes"),
    [
        ({"name": "vae", "config": FLUX}, [{"posterior": "mean"}, {"fold": 1}, {"antialias": True}, {"dtype": "bfloat16"}, {"config": {**FLUX, "shift_factor": 0.1}}, {"config": SD}]),
        ({"name": "vq", "config": VQ}, [{"fold": 2}, {"scale": 2.0}, {"antialias": True}, {"config": {**VQ, "num_vq_embeddings": 16}}]),
        ({"name": "features", "timm": "test_vit", "weights": None}, [{"layer": 0}, {"normalise": "none"}, {"mean": [0, 0, 0]}, {"antialias": True}, {"timm": "test_vit2"}]),
        ({"name": "autoencoder"}, [{"fold": 2}, {"antialias": True}]),
    ],
)  # fmt: skip
def test_identity_says_what_made_the_target(spec: dict, changes: list[dict]) -> None:
    identity = make_target(spec).identity
    assert make_target(spec).identity == identity and "\n" not in identity
    others = [make_target({**spec, **change}).identity for change in changes]
    assert len({identity, *others}) == 1 + len(changes)


def test_only_the_encoders_weights_make_a_target() -> None:
    one, other = (make_target({"name": "vae", "config": FLUX}) for _ in range(2))
    with torch.no_grad():
        other.vae.decoder.conv_out.bias += 1  # type: ignore[attr-defined]
    assert one.identity == other.identity
    third = make_target({"name": "vae", "config": FLUX})
    with torch.no_grad():
        third.vae.encoder.conv_in.bias += 1  # type: ignore[attr-defined]
    assert third.identity != one.identity


def test_vae_in_bfloat16_is_near() -> None:
    exact = make_target({"name": "vae", "config": FLUX, "posterior": "mean"})
    rough = make_target({"name": "vae", "config": FLUX, "posterior": "mean", "dtype": "bfloat16"})
    x = pictures(1, 2, 2, 16)
    a, b = encoded(exact, x), encoded(rough, x)
    assert b.dtype == torch.float32 and 0 < (a - b).abs().max() < 0.1 * a.std() + 0.05
    assert rough.decode(b, (2, 2)).dtype == torch.float32


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("autoencodr", "algorithms.ross.target: unknown target 'autoencodr'; did you mean 'autoencoder'?"),
        ({"name": "vae", "pth": "x"}, "target.pth: unknown key; did you mean 'path'?"),
        ({"name": "autoencoder", "weigths": "x"}, "target.weigths: unknown key; did you mean 'weights'?"),
        ({"name": "features", "tim": "x"}, "target.tim: unknown key; did you mean 'timm'?"),
        ("vae", "target.path: one of path (black-forest-labs/FLUX.1-dev with subfolder vae) and config"),
        ("vq", "target.path: one of path"),
        ("features", "target.path: one of path"),
        ({"name": "vae", "path": "/no/such/folder"}, "target.path '/no/such/folder': no such folder"),
        ({"name": "vae", "path": "no/such-model"}, "target.path 'no/such-model': cannot be loaded"),
        ({"name": "vq", "path": "no/such-model", "subfolder": "vq"}, "target.path 'no/such-model', subfolder 'vq': cannot be loaded"),
        ({"name": "features", "path": "no/such-model"}, "target.path 'no/such-model': cannot be loaded"),
        ({"name": "features", "path": "./nowhere"}, "target.path './nowhere': no such folder"),
        ({"name": "vae", "config": "fluxx"}, "target.config: unknown 'fluxx'; did you mean 'flux'?"),
        ({"name": "vae", "config": {"latent_chanels": 3}}, "target.config.latent_chanels: unknown key; did you mean 'latent_channels'?"),
        ({"name": "vae", "config": {"norm_num_groups": 7}}, "target.config: AutoencoderKL refuses it"),
        ({"name": "vae", "config": FLUX, "posterior": "smaple"}, "target.posterior: unknown 'smaple'; did you mean 'sample'?"),
        ({"name": "vae", "config": FLUX, "fold": 0}, "target.fold: a whole number of at least 1, got 0"),
        ({"name": "vae", "config": FLUX, "dtype": "float16"}, "target.dtype: unknown 'float16'"),
        ({"name": "vq", "config": VQ, "scale": 0}, "target.scale: a number above 0"),
        ({"name": "features", "timm": "test_vitt", "weights": None}, "target.timm: timm knows no network 'test_vitt'; did you mean 'test_vit"),
        ({"name": "features", "timm": "test_vit", "weights": None, "layer": 99}, "target.layer: 99; there are 0 to"),
        ({"name": "features", "timm": "test_vit", "weights": "no.pth"}, "target.timm: test_vit: no weights file 'no.pth'"),
        ({"name": "features", "timm": "test_vit", "weights": None, "std": [1, 0, 1]}, "target.std: three numbers above 0"),
        ({"name": "features", "timm": "test_vit", "weights": None, "normalise": "tokens"}, "target.normalise: unknown 'tokens'; did you mean 'token'?"),
        ({"name": "autoencoder", "weights": "no.safetensors"}, "target.weights: no file 'no.safetensors'"),
        ({"name": "autoencoder", "weights": __file__}, "is not what 'opsin data autoencoder' writes"),
        ({"name": "autoencoder", "fold": 1.5}, "target.fold: a whole number"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(spec: str | dict, message: str) -> None:
    with pytest.raises(UserError) as raised:
        make_target(spec)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_pixels_are_a_target_too() -> None:
    target: Target = make_target({"name": "pixels", "cell": 8})
    x = pictures(1, 2, 3, 8)
    torch.testing.assert_close(target.decode(encoded(target, x), (2, 3)), x)
