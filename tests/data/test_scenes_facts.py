"""Facts against pixels: colours, boxes, visibility, depth, and what the eye must be able to tell apart."""

from __future__ import annotations

import colorsys
import io

import numpy as np
import pytest
from PIL import Image

from opsin.data.scenes import COLOURS, SHAPES, WORDS, SceneConfig, sample, scene
from opsin.data.scenes.layout import LEAST_VISIBLE, side_of
from opsin.data.scenes.sprites import board
from opsin.data.schema import unpack_images

HUES = {"red": 0, "orange": 29, "yellow": 51, "green": 127, "cyan": 187, "blue": 225, "purple": 276}
SIZES = (64, 160)


def named_colour(rgb: np.ndarray) -> str:
    """Colour name by hue alone: knows nothing of the generator's palette."""
    hue, saturation, _ = colorsys.rgb_to_hsv(*(rgb / 255))
    if saturation < 0.2:
        return "gray"
    return min(HUES, key=lambda name: min(abs(hue * 360 - HUES[name]), 360 - abs(hue * 360 - HUES[name])))


@pytest.fixture(scope="module", params=SIZES)
def scenes(request):
    config = SceneConfig(size=request.param, objects=(1, 4), charts=0.0)
    return [scene(config, 3, "uniform", i) for i in range(150)]


def test_boxes_and_counts_are_those_of_the_masks(scenes):
    for one in scenes:
        assert one.masks.shape == one.depth.shape == (one.size, one.size) == one.picture.size
        assert (one.masks.dtype, one.depth.dtype, one.picture.mode) == (np.uint8, np.float32, "RGB")
        assert set(np.unique(one.masks)) == set(range(len(one.objects) + 1))
        for i, thing in enumerate(one.objects):
            rows, columns = np.nonzero(one.masks == i + 1)
            assert thing.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert thing.visible == len(rows) >= LEAST_VISIBLE * thing.pixels


def test_mean_colour_in_the_mask_has_the_name(scenes):
    right = total = 0
    for one in scenes:
        pixels = np.asarray(one.picture, np.float64)
        for i, thing in enumerate(one.objects):
            right += named_colour(pixels[one.masks == i + 1].mean(0)) == thing.colour
            total += 1
    assert right == total > 200


def test_nearer_objects_cover_farther_ones(scenes):
    covered = 0
    for one in scenes:
        order = sorted(range(len(one.objects)), key=lambda i: one.objects[i].depth)
        means = [one.depth[one.masks == i + 1].mean() for i in order]
        assert means == sorted(means)
        nearest = one.objects[order[0]]
        assert nearest.visible == nearest.pixels
        covered += any(o.visible < o.pixels for o in one.objects)
        assert one.depth.min() >= 0 and one.depth.max() == 1  # the wall
        lower = [one.objects[i].y for i in order]
        assert lower == sorted(lower, reverse=True)
    assert covered > 20


def test_a_hidden_pixel_shows_the_object_in_front(scenes):
    """Where the sprite of a farther object would be, but its mask is not, a nearer object's mask is."""
    for one in scenes:
        for i, thing in enumerate(one.objects):
            missing = thing.pixels - thing.visible
            nearer = [j for j, o in enumerate(one.objects) if o.depth < thing.depth]
            left, top, side = thing.frame
            inside = np.isin(one.masks[top : top + side, left : left + side], [j + 1 for j in nearer])
            assert inside.sum() >= missing, i


def test_large_and_small_never_look_alike():
    for high in (1, 3, 6):
        config = SceneConfig(objects=(1, high))
        sides = {s: [side_of(config, s, d) for d in np.linspace(0.02, 0.72, 30)] for s in ("small", "large")}
        assert min(sides["large"]) > 1.2 * max(sides["small"])


def test_shapes_and_colours_differ_in_pixels():
    """Nearest neighbours among clean sprites: 32 objects at both sizes are told apart by their pixels."""
    from opsin.data.scenes.sprites import sprite

    for side in (12, 20):
        looks = {}
        for shape in SHAPES:
            for colour in COLOURS:
                image = Image.new("RGB", (side, side), (210, 208, 204))
                image.paste(sprite(shape, colour, side).image, (0, 0), sprite(shape, colour, side).image)
                looks[shape, colour] = np.asarray(image, np.float64)
        names = list(looks)
        for a in range(len(names)):
            for b in range(a):
                gap = np.sqrt(((looks[names[a]] - looks[names[b]]) ** 2).mean())
                assert gap > 12, (names[a], names[b], gap)


@pytest.mark.parametrize("size", [48, 64, 224, 336])
def test_signs_hang_above_all_objects(size):
    config = SceneConfig(size=size, sign=1.0, charts=0.0)
    for word in WORDS:
        assert board(word, size).width < size - 2
    lowest = max(board(word, size).height for word in WORDS) + max(1, round(0.03 * size))
    tops = [o.frame[1] for i in range(60) for o in scene(config, 1, "uniform", i).objects]
    assert min(tops) >= lowest - 1


def test_bars_are_as_high_as_their_values():
    config = SceneConfig(kinds=("chart",))
    for index in range(30):
        one = scene(config, 1, "uniform", index)
        pixels = np.asarray(one.picture, np.float64)
        heights = []
        for i, bar in enumerate(one.bars):
            x0, y0, x1, y1 = bar.box
            assert named_colour(pixels[one.masks == i + 1].mean(0)) == bar.colour
            assert (one.masks[y0:y1, x0:x1] == i + 1).all()
            heights.append((bar.value, y1 - y0))
        assert [h for _, h in sorted(heights)] == sorted(h for _, h in heights)
        assert len({h for _, h in heights}) == len(heights)


@pytest.mark.parametrize(("encoding", "error"), [("png", 0), ("jpeg", 6)])
def test_stored_picture_is_the_scene(encoding, error):
    config = SceneConfig(encoding=encoding)
    for index in range(10):
        (data,) = unpack_images(sample(config, 1, "train", index)["images"])
        stored = np.asarray(Image.open(io.BytesIO(data)), np.float64)
        assert (
            np.abs(stored - np.asarray(scene(config, 1, "train", index).picture, np.float64)).mean() <= error
        )
