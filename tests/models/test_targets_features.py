"""Features of frozen networks as targets: which tokens, which layer, which grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from opsin.models.errors import UserError
from opsin.models.targets import make_target as make_of
from opsin.models.targets.features import ReaderTarget, to_grid

from frozen import VIT, dino, encoded, pictures

KINDS = {"features": "opsin.models.targets.features:FeatureTarget"}
WHERE = "algorithms.method.target"
GREY: dict[str, Any] = {"mean": [0.5] * 3, "std": [0.5] * 3}


def make_target(spec: Any) -> Any:
    return make_of(spec, KINDS, WHERE)


def test_features_of_a_patch_follow_the_patch(tmp_path: Path) -> None:
    """Layer 0, the embeddings: before any attention a feature depends on its own patch only."""
    target = make_target({"name": "features", "path": dino(tmp_path), "layer": 0, "normalise": "none"})
    assert (target.cell, target.dim, target.fixed) == (8, 16, False)
    x = pictures(1, 3, 5, 8)
    y = x.clone()
    y[:, :, 8:16, 24:32] = 0.5  # row 1, column 3
    changed = (encoded(target, x) != encoded(target, y)).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == [1 * 5 + 3]


def test_features_are_the_networks_own_without_class_token(tmp_path: Path) -> None:
    path = dino(tmp_path)
    target = make_target({"name": "features", "path": path, "normalise": "none"})
    x = pictures(2, 4, 4, 8)
    seen = (x - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    net = Dinov2Model.from_pretrained(path).eval()
    with torch.no_grad():
        hidden = net(seen, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(encoded(target, x), hidden[:, 1:])
    tokens = encoded(make_target({"name": "features", "path": path}), x)
    torch.testing.assert_close(tokens, F.layer_norm(hidden[:, 1:], (16,)))


def test_clip_and_siglip_towers_take_any_grid(tmp_path: Path) -> None:
    torch.manual_seed(0)
    CLIPVisionModel(CLIPVisionConfig(**VIT)).save_pretrained(tmp_path / "clip")
    SiglipVisionModel(SiglipVisionConfig(**VIT)).save_pretrained(tmp_path / "siglip")
    text = {
        k: VIT[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    }
    CLIPModel(CLIPConfig(text_config={**text, "vocab_size": 9}, vision_config=VIT)).save_pretrained(tmp_path / "whole")  # fmt: skip
    for name in ("clip", "siglip", "whole"):
        target = make_target(
            {
                "name": "features",
                "path": str(tmp_path / name),
                "mean": [0.5] * 3,
                "std": [0.5] * 3,
                "layer": -2,
            }
        )
        assert (target.cell, target.fixed) == (8, False)
        tokens = encoded(target, pictures(2, 3, 5, 8))
        assert tokens.shape == (2, 15, 16) and tokens.isfinite().all()
        torch.testing.assert_close(tokens.mean(-1), torch.zeros(2, 15), atol=1e-5, rtol=0)
    with pytest.raises(UserError, match=r"target\.mean: the network has no image processor"):
        make_target({"name": "features", "path": str(tmp_path / "clip")})


def test_timm_towers(tmp_path: Path) -> None:
    import timm

    target = make_target({"name": "features", "timm": "test_vit", "weights": None, "normalise": "none"})
    assert (target.cell, target.dim, target.fixed) == (16, 64, False)
    net = timm.create_model("test_vit", pretrained=False, num_classes=0, dynamic_img_size=True)
    net.load_state_dict(target.reader.module.state_dict())
    x = pictures(1, 2, 3, 16)
    mean, std = (torch.tensor(net.pretrained_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        tokens = net.eval().forward_intermediates(
            (x - mean) / std, output_fmt="NLC", intermediates_only=True
        )[-1]
    torch.testing.assert_close(encoded(target, x), tokens)
    save_file(net.state_dict(), tmp_path / "vit.safetensors")
    loaded = make_target(
        {
            "name": "features",
            "timm": "test_vit",
            "weights": str(tmp_path / "vit.safetensors"),
            "normalise": "none",
        }
    )
    assert loaded.identity == target.identity
    cnn = make_target({"name": "features", "timm": "test_resnet", "weights": None, "layer": 2})
    assert encoded(cnn, pictures(1, 2, 3, cnn.cell)).shape == (1, 6, cnn.dim)


def test_a_tower_of_one_size_is_moved_to_the_grid() -> None:
    target = make_target(
        {"name": "features", "timm": "test_vit_relpos", "weights": None, "normalise": "none"}
    )
    assert target.fixed and target.reader.own == (160, 160)
    x = pictures(1, 10, 10, 16)
    own = encoded(target, x)
    torch.testing.assert_close(own, target._features(x).flatten(2).transpose(1, 2))
    assert encoded(target, pictures(2, 3, 5, 16)).shape == (2, 15, target.dim)


def test_features_cannot_be_decoded(tmp_path: Path) -> None:
    target = make_target({"name": "features", "path": dino(tmp_path)})
    with pytest.raises(UserError, match="FeatureTarget: this target cannot be turned back into a picture"):
        target.decode(torch.zeros(1, 4, 16), (2, 2))


def test_what_is_no_vision_transformer_is_refused(tmp_path: Path) -> None:
    text = LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9
    )
    LlamaForCausalLM(text).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"target\.path .*is no vision transformer"):
        make_target({"name": "features", "path": str(tmp_path)})
    layered = dino(tmp_path / "dino")
    with pytest.raises(UserError, match=r"target\.layer: 7; there are 0 to 2"):
        make_target({"name": "features", "path": layered, "layer": 7})


# What JARVIS asks for ------------------------------------------------------------------------------------

BACKBONES = {"Dinov2": 1, "Dinov2WithRegisters": 5, "DINOv3ViT": 5, "CLIPVision": 1, "SiglipVision": 0}
"""Class in transformers -> class and register tokens before its patches."""


def backbone(name: str, folder: Path, **more: Any) -> str:
    torch.manual_seed(0)
    options = {**VIT, "num_register_tokens": 4} if name in ("Dinov2WithRegisters", "DINOv3ViT") else VIT
    net = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**{**options, **more}))
    with torch.no_grad():  # norms that do something, position embeddings and registers that are not zero
        for parameter in net.parameters():
            if parameter.ndim == 1 or parameter.shape[0] == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    net.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", BACKBONES)
def test_the_last_layer_is_the_networks_own_output_without_prefix_tokens(name: str, tmp_path: Path) -> None:
    path = backbone(name, tmp_path)
    spec = {"name": "features", "path": path, "normalise": "none", **GREY}
    last, before = make_target({**spec, "layer": "last"}), make_target(spec)
    x = pictures(2, 4, 4, 8)
    net = getattr(transformers, f"{name}Model").from_pretrained(path).eval()
    with torch.no_grad():
        said = net(pixel_values=(x - 0.5) / 0.5, output_hidden_states=True)
    prefix = BACKBONES[name]
    assert said.last_hidden_state.shape == (2, prefix + 16, 16)
    torch.testing.assert_close(encoded(last, x), said.last_hidden_state[:, prefix:])
    torch.testing.assert_close(encoded(before, x), said.hidden_states[-1][:, prefix:])
    normed = not torch.allclose(encoded(last, x), encoded(before, x), atol=1e-3)
    assert normed == (name != "CLIPVision")  # CLIP's last_hidden_state is before its norm
    assert last.identity != before.identity and "layer=last" in last.identity
    # any grid, and pictures that no number of patches fills
    for target in (last, make_target({**spec, "layer": "last", "resize": "features"})):
        tokens = target.moments([torch.rand(3, 45, 30), torch.rand(3, 33, 33)], [(3, 5), (2, 2)])
        assert tokens.shape == (19, 16) and tokens.isfinite().all() and not target.fixed


@pytest.mark.parametrize("name", BACKBONES)
def test_a_teacher_stays_in_evaluation_mode(name: str, tmp_path: Path) -> None:
    path = backbone(name, tmp_path)
    target = make_target({"name": "features", "path": path, "layer": "last", **GREY})
    trained = torch.nn.Linear(2, 2)
    trained.teacher = target  # type: ignore[assignment]  # no module: `train` does not reach it
    x = pictures(1, 3, 4, 8)
    first = encoded(target, x)
    trained.train()
    assert not any(m.training for m in target.teacher.module.modules())
    assert torch.equal(encoded(target, x), first)
    assert not any(p.requires_grad for p in target.teacher.module.parameters())


def test_dinov3_would_draw_random_positions_in_training_mode(tmp_path: Path) -> None:
    """Why evaluation mode is forced: the reference trains on such targets."""
    target = make_target(
        {"name": "features", "path": backbone("DINOv3ViT", tmp_path), "layer": "last", **GREY}
    )
    x = pictures(1, 4, 4, 8)
    assert torch.equal(encoded(target, x), encoded(target, x))
    target.teacher.module.train()
    assert not torch.equal(encoded(target, x), encoded(target, x))


def test_the_last_layer_of_timm_networks_is_behind_the_norm() -> None:
    import timm

    spec = {"name": "features", "timm": "test_vit", "weights": None, "normalise": "none", "layer": "last"}
    target = make_target(spec)
    net = timm.create_model("test_vit", pretrained=False, num_classes=0, dynamic_img_size=True).eval()
    net.load_state_dict(target.reader.module.state_dict())
    x = pictures(1, 2, 3, 16)
    with torch.no_grad():
        wanted = net.forward_features((x - target.mean) / target.std)[:, net.num_prefix_tokens :]
    torch.testing.assert_close(encoded(target, x), wanted)
    cnn = make_target({**spec, "timm": "test_resnet"})
    assert encoded(cnn, pictures(1, 2, 3, cnn.cell)).shape == (1, 6, cnn.dim)
    # 45 x 50 pixels fill 2 x 3 patches of 16, the rest is left out; a CNN pads
    for which in ("test_vit", "test_resnet", "test_vit_relpos"):
        moved = make_target({**spec, "timm": which, "resize": "features"})
        assert moved.moments([torch.rand(3, 45, 50)], [(4, 5)]).shape == (20, moved.dim)


class MeanReader:
    """The mean colour of each patch: a network whose features are known by hand."""

    source, own, mean, std = "target.path 'mean'", (64, 64), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

    def __init__(self, patch: int):
        self.patch = patch
        self.module = torch.nn.Conv2d(3, 3, patch, patch, bias=False)
        self.module.weight.data = torch.eye(3)[:, :, None, None].expand(3, 3, patch, patch) / patch**2
        self.saw: list[tuple[int, ...]] = []

    def __call__(self, pixels: torch.Tensor, layer: int | str) -> torch.Tensor:
        self.saw.append(tuple(pixels.shape[-2:]))
        return self.module(pixels)


def mean_colours(patch: int, resize: str = "features", image_size: int | None = None) -> ReaderTarget:
    return ReaderTarget("toy", MeanReader(patch), "last", "none", None, None, False, resize, image_size, "float32")  # fmt: skip


def by_hand(values: torch.Tensor, count: int) -> torch.Tensor:
    """(n,) -> (count,): linear interpolation at the centres of cells, held at both ends."""
    place = ((torch.arange(count, dtype=torch.float64) + 0.5) * len(values) / count - 0.5).clamp(0, len(values) - 1)  # fmt: skip
    low = place.floor().long()
    high = (low + 1).clamp(max=len(values) - 1)
    return values[low] * (1 - (place - low)) + values[high] * (place - low)


def test_21x21_to_24x24_on_a_linear_ramp_is_bilinear() -> None:
    """Sheet 1.3: DINOv3's patches of 16 at 336 pixels, on the grid of CLIP's patches of 14."""
    target = mean_colours(16)
    x = torch.arange(336, dtype=torch.float64) / 336
    picture = torch.stack(torch.broadcast_tensors(x[None, :], x[:, None], x[None, :] * 0)).float()
    seen = target.moments([picture], [(24, 24)]).reshape(24, 24, 3).double()
    assert target.reader.saw[-1] == (336, 336)  # type: ignore[attr-defined]
    column = by_hand(x.reshape(21, 16).mean(1), 24)
    torch.testing.assert_close(seen[..., 0], column.expand(24, 24), atol=1e-5, rtol=0)
    torch.testing.assert_close(seen[..., 1], column[:, None].expand(24, 24), atol=1e-5, rtol=0)
    # Between the outermost centres the ramp stays a ramp: what patches of 14 pixels would have seen.
    torch.testing.assert_close(column[1:-1], x.reshape(24, 14).mean(1)[1:-1], atol=1e-9, rtol=0)
    ramp = torch.rand(1, 2, 21, 21)
    wanted = torch.stack([by_hand(row, 24) for row in ramp.flatten(0, 2).double()]).reshape(1, 2, 21, 24)
    wanted = torch.stack([by_hand(c, 24) for c in wanted.mT.flatten(0, 2)]).reshape(1, 2, 24, 24).mT
    torch.testing.assert_close(to_grid(ramp, (24, 24)).double(), wanted, atol=1e-6, rtol=0)


def test_a_twice_finer_grid_becomes_the_mean_of_its_2x2_cells() -> None:
    maps = torch.rand(2, 5, 48, 32)
    torch.testing.assert_close(to_grid(maps, (24, 16)), F.avg_pool2d(maps, 2))
    assert to_grid(maps, (48, 32)) is maps
    picture = torch.rand(3, 64, 64)
    fine, coarse = (mean_colours(patch).moments([picture], [(4, 4)]) for patch in (8, 16))
    torch.testing.assert_close(fine, coarse)


def test_pictures_go_in_as_they_are_or_at_a_given_size() -> None:
    for target, size in (
        (mean_colours(8), (20, 45)),
        (mean_colours(8, image_size=40), (40, 40)),
        (mean_colours(8, "pixels"), (24, 40)),
    ):
        assert target.moments([torch.rand(3, 20, 45)], [(3, 5)]).shape == (15, 3)
        assert target.reader.saw[-1] == size  # type: ignore[attr-defined]
    assert mean_colours(8).moments([torch.rand(3, 2, 20)], [(1, 1)]).shape == (1, 3)  # less than a patch
    names = {mean_colours(8, *more).identity for more in (("pixels",), ("features",), ("features", 40))}
    assert len(names) == 3


def test_bfloat16_is_near_and_another_target(tmp_path: Path) -> None:
    spec = {"name": "features", "path": dino(tmp_path), "layer": "last", "normalise": "none"}
    exact, rough = make_target(spec), make_target({**spec, "dtype": "bfloat16"})
    assert {p.dtype for p in rough.teacher.module.parameters()} == {torch.bfloat16}
    x = pictures(2, 3, 3, 8)
    with torch.autocast("cpu", torch.bfloat16):  # what trains around a teacher does not reach it
        a, b = encoded(exact, x), encoded(rough, x)
    assert torch.equal(a, encoded(exact, x))
    assert b.dtype == torch.float32 and 0 < float((a - b).abs().max()) < 0.1 * float(a.std())
    assert rough.identity != exact.identity and "dtype=bfloat16" in rough.identity


def test_identities_of_the_first_keywords_are_those_of_before() -> None:
    """Stored targets are found again by them."""
    target = make_target({"name": "features", "timm": "test_vit", "weights": None, "layer": 1})
    said, _, weights = target.identity.rpartition(" weights=")
    assert len(weights) == 12 and said == (
        "features VisionTransformer patch=16 layer=1 fixed=False normalise=token colours=0.5,0.5,0.5,0.5,0.5,0.5 "
        "antialias=False"
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"layer": "lst"}, "layer: a whole number, or last; got 'lst'"),
        ({"layer": True}, "layer: a whole number, or last; got True"),
        ({"resize": "feature"}, "resize: unknown 'feature'; did you mean 'features'?"),
        ({"image_size": 32}, "image_size: goes with resize: features"),
        ({"image_size": 8, "resize": "features"}, "image_size: 8 pixels; one patch has 16"),
        ({"image_size": "x", "resize": "features"}, "image_size: a whole number of at least 1, got 'x'"),
        ({"image_size": 32, "resize": "features", "timm": "test_vit_relpos"}, "image_size: 32; this network takes pictures of 160x160 only"),
        ({"dtype": "float16"}, "dtype: unknown 'float16'"),
    ],
)  # fmt: skip
def test_mistakes_in_new_keywords_are_one_line(more: dict, message: str) -> None:
    with pytest.raises(UserError) as raised:
        make_target({"name": "features", "timm": "test_vit", "weights": None, **more})
    assert str(raised.value).startswith(f"{WHERE}.{message}") and "\n" not in str(raised.value)
