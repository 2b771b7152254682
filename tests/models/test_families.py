"""Each family beside stock transformers: the same pixels, tokens, logits; and which token shows which part."""

from __future__ import annotations

import copy
import io
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from opsin.data.batch import split_batch
from opsin.data.chat import exchanges, render
from opsin.data.collate import VLMCollator
from opsin.data.schema import Role, pack_images
from opsin.models.anatomy import families, image_encoder_for
from opsin.models.errors import UserError
from opsin.models.geometry import PER_IMAGE_KEYS, PIXEL_KEY, EncodedImage, resize_and_crop_box
from opsin.models.step import Step
from opsin.models.vlm import VisionLanguageModel

import jobs
import zoo

QUICK = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
SIZES = st.tuples(st.integers(9, 70), st.integers(9, 70))


@lru_cache
def built(family: str) -> zoo.Built:
    return zoo.build(family)


@lru_cache
def model(family: str) -> VisionLanguageModel:
    made = VisionLanguageModel(built(family).hf, built(family).processor)
    return made.eval()


@lru_cache
def collator(family: str) -> VLMCollator:
    return jobs.collator(built(family), pad_to_multiple_of=1)


def encode(family: str, picture: Image.Image) -> EncodedImage:
    return image_encoder_for(built(family).processor, built(family).hf.config).encode(picture)


def ramp(width: int, height: int) -> Image.Image:
    """Red rises from left to right, green from top to bottom: a colour says where it was."""
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    return Image.fromarray((np.stack([x, y, np.full_like(x, 0.5)], axis=-1) * 255).astype(np.uint8))


def rendered(family: str, sample: dict[str, Any]) -> str:
    encoder = collator(family).encoder
    system, pairs = exchanges(sample["conversations"])
    return "".join(s.text for s in render(system, pairs, encoder.template, encoder.images.placeholder))


def pixels_of(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: batch[k] for k in (PIXEL_KEY, *PER_IMAGE_KEYS) if k in batch}


QWEN = ("qwen2_vl", "qwen2_5_vl")
SPAN = {"qwen2_vl": 8, "qwen2_5_vl": 8, "idefics3": 8, "smolvlm": 8, "internvl": 8, "gemma3": 8}
"""Pixels along what one visual token shows, where patches are merged; else 4."""
TILED = ("idefics3", "smolvlm", "internvl")
"""Each tile is a view."""


@pytest.mark.parametrize("family", [f for f in zoo.EVERY_FAMILY if f not in (*QWEN, "smolvlm")])
@QUICK
@given(sizes=st.lists(SIZES, min_size=1, max_size=3), seed=st.integers(0, 99))
def test_pixels_and_tokens_are_those_of_the_stock_processor(
    family: str, sizes: list[tuple[int, int]], seed: int
) -> None:
    sample = zoo.sample(seed, images=len(sizes))
    sample["images"] = pack_images([zoo.picture(seed + i, size) for i, size in enumerate(sizes)])
    pictures = [Image.open(io.BytesIO(zoo.picture(seed + i, s))).convert("RGB") for i, s in enumerate(sizes)]
    processor, encoder = built(family).processor, collator(family).encoder.images
    # The stock processor writes wrapper tokens itself.
    stock = processor(
        images=pictures, text=[rendered(family, sample).replace(encoder.placeholder, encoder.mark)],
        return_tensors="pt", add_special_tokens=False,
    )  # fmt: skip
    ours = collator(family)([sample])
    assert int(ours["sample_status"].sum()) == 0
    assert ours["input_ids"].tolist() == stock["input_ids"].tolist()
    for key, value in pixels_of(ours).items():
        same = value.shape == stock[key].shape
        # Idefics3 lays the tiles of a sample side by side, Opsin those of a batch one under the other.
        assert same or (family in TILED and value.flatten(0, 1).shape == stock[key].flatten(0, 1).shape)
        assert torch.equal(value.flatten(), stock[key].flatten()), key


@QUICK
@given(sizes=st.lists(SIZES, min_size=1, max_size=2), seed=st.integers(0, 99), cut=st.booleans())
def test_smolvlms_pixels_and_tokens_are_those_of_its_image_processor_and_prompt(
    sizes: list[tuple[int, int]], seed: int, cut: bool
) -> None:
    from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

    made = zoo.build("smolvlm")
    made.processor.image_processor.do_image_splitting = cut
    sample = zoo.sample(seed, images=len(sizes))
    sample["images"] = pack_images([zoo.picture(seed + i, size) for i, size in enumerate(sizes)])
    pictures = [Image.open(io.BytesIO(zoo.picture(seed + i, s))).convert("RGB") for i, s in enumerate(sizes)]
    stock = made.processor.image_processor([pictures], return_tensors="pt", return_row_col_info=True)
    ours = jobs.collator(made, pad_to_multiple_of=1)([sample])
    assert torch.equal(ours[PIXEL_KEY].flatten(), stock[PIXEL_KEY].flatten())
    before, *after = rendered("smolvlm", sample).split("<image>")
    for rows, columns, words in zip(stock["rows"][0], stock["cols"][0], after, strict=True):
        before += get_image_prompt_string(
            rows, columns, 16, image_token="<image>",
            fake_token_around_image="<fake_token_around_image>", global_image_token="<global-img>",
        ) + words  # fmt: skip
    assert ours["input_ids"][0].tolist() == zoo.tokenizer()(before, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("family", QWEN)
@QUICK
@given(sizes=st.lists(SIZES, min_size=1, max_size=3), seed=st.integers(0, 99))
def test_qwens_pixels_and_tokens_are_those_of_its_image_processor(
    family: str, sizes: list[tuple[int, int]], seed: int
) -> None:
    sample = zoo.sample(seed, images=len(sizes))
    sample["images"] = pack_images([zoo.picture(seed + i, size) for i, size in enumerate(sizes)])
    pictures = [Image.open(io.BytesIO(zoo.picture(seed + i, s))).convert("RGB") for i, s in enumerate(sizes)]
    images = built(family).processor.image_processor
    stock = images(images=pictures, return_tensors="pt")
    ours = collator(family)([sample])
    for key, value in pixels_of(ours).items():
        assert torch.equal(value, stock[key]), key
    # One token for 2 x 2 patches, between vision-start and vision-end, as Qwen2_5_VLProcessor writes them.
    text = rendered(family, sample)
    for thw in stock["image_grid_thw"].tolist():
        text = text.replace("<|image_pad|>", "<X>" * (thw[0] * thw[1] * thw[2] // 4), 1)
    ids = zoo.tokenizer()(text.replace("<X>", "<|image_pad|>"), add_special_tokens=False)["input_ids"]
    assert ours["input_ids"][0].tolist() == ids
    assert text.count("<|vision_start|><X>") == text.count("<X><|vision_end|>") == len(sizes)


@pytest.mark.parametrize("family", zoo.EVERY_FAMILY)
def test_forward_gives_the_stock_models_numbers(family: str) -> None:
    samples = [zoo.sample(i, images=n, turns=t, size=s) for i, (n, t, s) in enumerate(
        [(1, 2, (20, 16)), (2, 1, (40, 18)), (0, 1, (9, 9)), (1, 3, (17, 50))]
    )]  # fmt: skip
    batch = collator(family)(samples)
    types = model(family).anatomy.types(batch)
    with torch.no_grad():
        stock = built(family).hf(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            labels=batch["labels"],
            **pixels_of(batch),
            **types,
        )
        (micro,) = split_batch(batch, None)
        out = model(family).net(micro, Step(micro))
    ours = model(family).logits(batch)
    real = batch["attention_mask"].bool()
    scale = max(1.0, float(stock.logits[real].abs().max()))
    assert torch.allclose(ours[real], stock.logits[real], atol=1e-5 * scale)
    loss = model(family).loss(out, micro)["lm"]
    assert torch.allclose(loss, stock.loss, atol=1e-5)
    expected = torch.nn.functional.cross_entropy(
        stock.logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none"
    )[batch["labels"][:, 1:] != -100]
    assert torch.allclose(out["nll"], expected, atol=1e-5)


@pytest.mark.parametrize("family", zoo.EVERY_FAMILY)
def test_a_text_only_batch_gives_the_stock_models_loss_and_runs_the_idle_tower(family: str) -> None:
    batch = collator(family)([zoo.sample(1, images=0), zoo.sample(2, images=0, turns=2)])
    (micro,) = split_batch(batch, None)
    with torch.no_grad():
        stock = built(family).hf(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]
        )
    out = model(family).net(micro, Step(micro))
    assert float(out["zero"]) == 0 and out["zero"].requires_grad
    assert torch.allclose(model(family).loss(out, micro)["lm"], stock.loss, atol=1e-5)


@pytest.mark.parametrize("family", zoo.EVERY_FAMILY)
@QUICK
@given(size=SIZES)
def test_as_many_features_as_image_tokens(family: str, size: tuple[int, int]) -> None:
    encoded = encode(family, ramp(*size))
    with torch.no_grad():
        features = model(family).anatomy.image_features(built(family).hf, encoded.pixels)
    visual = encoded.token_ids == collator(family).encoder.images.image_token_id
    assert len(features) == int(visual.sum())
    assert bool(visual.all()) or family in ("idefics3", "smolvlm")


@pytest.mark.parametrize("family", zoo.EVERY_FAMILY)
@QUICK
@given(sizes=st.lists(SIZES, min_size=1, max_size=2))
def test_every_patch_has_one_token_and_newlines_have_none(family: str, sizes: list[tuple[int, int]]) -> None:
    sample = zoo.sample(3, images=len(sizes))
    sample["images"] = pack_images([zoo.picture(i, size) for i, size in enumerate(sizes)])
    (part,) = split_batch(collator(family)([zoo.sample(1, images=0), sample]), None)
    positions = part["patch_position"]
    assert len(positions.unique()) == len(positions) == int(part["view_grid"].prod(1).sum())
    roles = part["roles"].flatten()
    assert bool((roles[positions] == Role.IMAGE).all())
    assert bool((part["image_ids"].flatten()[positions] >= 0).all())
    assert bool(((part["image_ids"] >= 0) == (part["roles"] == Role.IMAGE)).all())
    # What is no patch: one newline a row of the mosaic in LLaVA-NeXT and LLaVA-OneVision, nothing elsewhere.
    mosaics = part["view_grid"][1::2, 0].sum() if family in ("llava_next", "llava_onevision") else 0
    assert int((roles == Role.IMAGE).sum()) - len(positions) == int(mosaics)
    for view, (rows, columns) in enumerate(part["view_grid"].tolist()):
        mine = part["patch_view"] == view
        assert part["patch_row"][mine].tolist() == [r for r in range(rows) for _ in range(columns)]
        assert part["patch_column"][mine].tolist() == list(range(columns)) * rows
        first = positions[mine][0]
        assert (positions[mine] - first).tolist() == [
            r * int(part["view_stride"][view]) + c for r in range(rows) for c in range(columns)
        ]


@pytest.mark.parametrize("family", zoo.EVERY_FAMILY)
@QUICK
@given(size=SIZES)
def test_grid_and_box_say_where_in_the_picture_a_patch_was(family: str, size: tuple[int, int]) -> None:
    encoded = encode(family, ramp(*size))
    views = model(family).pictures(encoded.pixels)
    assert len(views) == len(encoded.views)
    for view, shown in zip(encoded.views, views, strict=True):
        (rows, columns), (left, top, right, bottom) = view.grid, view.box
        patch = SPAN.get(family, 4)
        assert shown.shape == (3, rows * patch, columns * patch)
        assert 0 <= float(shown.min()) <= float(shown.max()) <= 1
        mean = shown.unflatten(2, (columns, patch)).unflatten(1, (rows, patch)).mean((2, 4))
        x = left + (right - left) * (torch.arange(columns) + 0.5) / columns
        y = top + (bottom - top) * (torch.arange(rows) + 0.5) / rows
        # Patches wholly inside the picture. Boxes are exact: what is left is rounding to 8-bit colours.
        half = ((right - left) / columns / 2, (bottom - top) / rows / 2)
        inside = ((x - half[0] > 0) & (x + half[0] < 1))[None] & ((y - half[1] > 0) & (y + half[1] < 1))[
            :, None
        ]
        assert _most(mean[0] - x[None], inside) < 0.01
        assert _most(mean[1] - y[:, None], inside) < 0.01


@pytest.mark.parametrize("family", zoo.EVERY_FAMILY)
@settings(max_examples=8, deadline=None)
@given(size=SIZES)
def test_the_other_kind_of_image_processor_gives_the_same_views(family: str, size: tuple[int, int]) -> None:
    """NumPy's beside torchvision's: they round differently, and nothing else."""
    stock = built(family).processor.image_processor
    name = type(stock).__name__
    other = getattr(transformers, f"{name}Pil", None) or getattr(transformers, f"{name}Fast")
    assert other is not type(stock)
    processor = copy.copy(built(family).processor)
    processor.image_processor = other(
        **{k: v for k, v in stock.to_dict().items() if k in KEPT and v is not None}
    )
    one, two = (
        image_encoder_for(p, built(family).hf.config).encode(ramp(*size))
        for p in (built(family).processor, processor)
    )
    assert one.token_ids.tolist() == two.token_ids.tolist() and one.views == two.views
    assert one.pixel_rows == two.pixel_rows and one.pixels.keys() == two.pixels.keys()
    for key, value in one.pixels.items():
        assert value.shape == two.pixels[key].shape, key
    shown = (
        model(family).anatomy.pictures(e.pixels, p)
        for e, p in ((one, built(family).processor), (two, processor))
    )
    for a, b in zip(*shown, strict=True):
        assert float((a - b).abs().mean()) < 0.02


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_pixels_beyond_a_tiles_last_whole_patch_are_seen_by_none(family: str) -> None:
    """A tower of 18 pixels in patches of 4, as SigLIP has 384 in patches of 14."""
    made = getattr(zoo, family)(18)
    encoded = image_encoder_for(made.processor, made.hf.config).encode(ramp(36, 18))
    anatomy = VisionLanguageModel(made.hf, made.processor).anatomy
    assert len(anatomy.image_features(made.hf, encoded.pixels)) == len(encoded.token_ids) == 16 + 4 * 9
    whole, mosaic = encoded.views
    assert whole.box == pytest.approx((0, 0, 16 / 18, 16 / 18))
    assert mosaic.grid == (4, 8) and mosaic.box == pytest.approx((0, 0, 34 / 36, 16 / 18))
    _, shown = anatomy.pictures(encoded.pixels, made.processor)
    assert shown.shape == (3, 16, 32)
    red = shown[0].unflatten(1, (8, 4)).mean((0, 2))
    centres = torch.tensor([tile * 18 + 4 * column + 2 for tile in range(2) for column in range(4)]) / 36
    assert torch.allclose(red, centres, atol=0.005)


@pytest.mark.parametrize("size", [(13, 16), (16, 11), (12, 9), (21, 13), (13, 21), (17, 19)])
@pytest.mark.parametrize("kind", ["CLIPImageProcessor", "CLIPImageProcessorFast"])
def test_the_box_is_exact_where_the_crop_pads(kind: str, size: tuple[int, int]) -> None:
    processor = getattr(pytest.importorskip("transformers"), kind)(
        do_resize=False, crop_size={"height": 16, "width": 16}, image_mean=[0] * 3, image_std=[1] * 3
    )
    # Whole steps of 8 bits, so that the picture's own pixels are found again exactly.
    x, y = np.meshgrid(np.arange(size[0]) + 1, np.arange(size[1]) + 1)
    picture = Image.fromarray(np.stack([x, y, x], axis=-1).astype(np.uint8))
    red, green, _ = processor(images=[picture], return_tensors="pt")["pixel_values"][0] * 255
    left, top, right, bottom, height, width = resize_and_crop_box(processor, *size)
    assert (height, width) == (16, 16)
    at_x = left * size[0] + torch.arange(16) + 1
    at_y = top * size[1] + torch.arange(16) + 1
    inside = (at_x > 0.5) & (at_x < size[0] + 0.5) & ((at_y > 0.5) & (at_y < size[1] + 0.5))[:, None]
    assert torch.allclose(red, (at_x * inside).float(), atol=1e-3)
    assert torch.allclose(green, (at_y[:, None] * inside).float(), atol=1e-3)
    assert (right - left) * size[0] == pytest.approx(16) and (bottom - top) * size[1] == pytest.approx(16)


def test_tiles_of_another_size_than_the_towers_are_refused() -> None:
    made = zoo.build("idefics3")
    made.processor.image_processor.max_image_size = {"longest_edge": 16}
    with pytest.raises(
        UserError, match="tiles of 16x16 pixels, the model takes 32x32: set its max_image_size"
    ):
        image_encoder_for(made.processor, made.hf.config).encode(ramp(40, 40))


def test_gemmas_pan_and_scan_is_refused() -> None:
    made = zoo.build("gemma3")
    made.processor.image_processor.do_pan_and_scan = True
    with pytest.raises(UserError, match="do_pan_and_scan of Gemma 3's image processor is not supported"):
        image_encoder_for(made.processor, made.hf.config)


def test_a_picture_without_a_patch_in_the_mosaic_is_refused() -> None:
    with pytest.raises(ValueError, match="96x8 pixels is so long and thin"):
        encode("llava_next", ramp(96, 8))


def _most(difference: torch.Tensor, inside: torch.Tensor) -> float:
    return float(difference.abs()[inside].max()) if bool(inside.any()) else 0.0


KEPT = (
    "size", "crop_size", "patch_size", "merge_size", "temporal_patch_size", "min_pixels", "max_pixels", "max_image_size",
    "do_image_splitting", "image_grid_pinpoints", "crop_to_patches", "min_patches", "max_patches", "do_convert_rgb",
)  # fmt: skip
"""Settings of the zoo's image processors."""


EXACT = [
    ("llava", (16, 16)), ("llava_next", (32, 24)), ("llava_next", (32, 32)), ("llava_onevision", (32, 16)),
    ("qwen2_5_vl", (32, 24)), ("qwen2_vl", (32, 24)), ("internvl", (32, 32)), ("internvl", (64, 32)),
    ("gemma3", (32, 32)), ("idefics3", (64, 64)), ("idefics3", (64, 32)), ("smolvlm", (32, 64)),
]  # fmt: skip
"""Pictures of sizes at which no pixel is resampled, but for thumbnails."""


@pytest.mark.parametrize(("family", "size"), EXACT)
def test_a_changed_patch_changes_the_token_at_its_row_and_column_alone(
    family: str, size: tuple[int, int]
) -> None:
    """With attention switched off in the tower, a feature depends on its own patch only."""
    fresh = zoo.build(family)
    for name, parameter in fresh.hf.named_parameters():
        attends = "out_proj" in name or "attn.proj" in name or "attention.projection_layer" in name
        if attends and ("vision" in name or "visual" in name):
            torch.nn.init.zeros_(parameter)
    made = VisionLanguageModel(fresh.hf, fresh.processor).eval()
    encoder = image_encoder_for(fresh.processor, fresh.hf.config)
    grey = np.full((size[1], size[0], 3), 90, np.uint8)
    patch = SPAN.get(family, 4)
    before = encoder.encode(Image.fromarray(grey))
    visual = np.flatnonzero(before.token_ids == encoder.image_token_id)
    # Views that show the picture pixel by pixel: its mosaic, or the tiles; the thumbnail shows everything.
    exact = {
        i: view
        for i, view in enumerate(before.views)
        if round((view.box[2] - view.box[0]) * size[0]) == view.grid[1] * patch
        and round((view.box[3] - view.box[1]) * size[1]) == view.grid[0] * patch
    }
    assert sum(view.patches for view in exact.values()) == size[0] * size[1] // patch**2
    owner = {}
    for view in exact.values():
        first = round(view.box[1] * size[1] / patch), round(view.box[0] * size[0] / patch)
        for r in range(view.grid[0]):
            for c in range(view.grid[1]):
                owner[first[0] + r, first[1] + c] = view.start + r * view.stride + c
    rows, columns = size[1] // patch, size[0] // patch
    with torch.no_grad():
        reference = made.anatomy.image_features(fresh.hf, before.pixels)
        for row, column in {(0, 0), (1, 2), (rows // 2, columns // 2), (rows - 1, columns - 1)}:
            changed = grey.copy()
            changed[row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] = (250, 10, 40)
            after = made.anatomy.image_features(fresh.hf, encoder.encode(Image.fromarray(changed)).pixels)
            different = (after - reference).abs().amax(1) > 1e-6
            tokens = visual[different.numpy()].tolist()
            assert [t for t in tokens if t in set(owner.values())] == [owner[row, column]]


@pytest.mark.parametrize("family", zoo.EVERY_FAMILY)
def test_pictures_of_a_batch_come_in_the_order_of_its_views(family: str) -> None:
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    sizes = [(40, 18), (16, 16), (18, 33)]
    encoded = []
    for colour, size in zip(colours, sizes, strict=True):
        buffer = io.BytesIO()
        Image.new("RGB", size, colour).save(buffer, "PNG")
        encoded.append(buffer.getvalue())
    two, one = zoo.sample(1, images=2), zoo.sample(2, images=1)
    two["images"], one["images"] = pack_images(encoded[:2]), pack_images(encoded[2:])
    (micro,) = split_batch(collator(family)([two, zoo.sample(3, images=0), one]), None)
    pictures = model(family).pictures(micro)
    assert len(pictures) == len(micro["view_row"])
    of = (micro["view_row"] + micro["view_image"]).tolist()  # 0 and 1 in the first row, 0 in the third
    assert of == sorted(of) and set(of) == {0, 1, 2}
    for i, shown in enumerate(pictures):
        grid = micro["view_grid"][i].tolist()
        assert shown.shape[1] * grid[1] == shown.shape[2] * grid[0]
        middle = shown[:, shown.shape[1] // 2, shown.shape[2] // 2] * 255
        assert torch.allclose(middle, torch.tensor(colours[of[i]]).float(), atol=3)


@pytest.mark.parametrize("family", zoo.EVERY_FAMILY)
def test_every_parameter_belongs_to_its_part(family: str) -> None:
    anatomy = model(family).anatomy
    parts = {name: anatomy.part_of(name) for name, _ in built(family).hf.named_parameters()}
    assert set(parts.values()) == {"vision_tower", "mm_projector", "language_model"}
    for name, part in parts.items():
        projector = any(p in name for p in ("multi_modal_projector", "connector", "merger", "image_newline"))
        tower = any(t in name for t in ("vision_tower", "vision_model", "visual")) and not projector
        assert part == ("mm_projector" if projector else "vision_tower" if tower else "language_model"), name


def test_an_unknown_family_names_the_nearest() -> None:
    class Config:
        model_type = "lava"

    assert set(zoo.EVERY_FAMILY) == {f for f in families() if not f.startswith("opsin_")}
    with pytest.raises(UserError, match="no anatomy for model type 'lava'; did you mean 'llava'"):
        image_encoder_for(None, Config())
