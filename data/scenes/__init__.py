"""Procedural scenes with exact facts: pictures, captions, questions, depth, masks, and telling splits.

>>> config = SceneConfig()
>>> record = sample(config, seed=17, split="train", index=0)
>>> scene(config, 17, "train", 0).picture.size
(64, 64)

What is asked and shown is listed in :mod:`.config`, what the splits are for in :mod:`.splits`, what a record
holds in :func:`sample`. Everything is a pure function of (config, seed, split, index, stream), so any part of
a dataset can be made anywhere, in any order.

Accuracy without looking, on ``uniform`` (the last two kinds: on ``text_skill``). The guesser gives the answer
that is most frequent in ``train`` for the question's exact words, else for its words without descriptions,
else for its kind; 6,000 pictures of ``train``, 4,000 of ``uniform``, seeds 17 and 18. Chance is 1 / 8 for a
colour, 1 / 4 for a shape, 1 / 2 for sizes, yes/no and comparisons, 1 / 14 for a sign; ``selection``,
``two_hop`` and ``chart`` mix answers of several sorts.

=============  ========  ====  ======
kind           grounded  thin  chance
=============  ========  ====  ======
colour         .13       .12   .13
shape          .26       .25   .25
size           .53       .51   .50
count          .32       .25   .25
exists         .49       .49   .50
selection      .28       .28   .29
comparison     .49       .51   .50
sign           .06       .06   .07
chart          .22       .22   .25
two_hop        .30       .31   .29
negated_count  .26       .26   .25
=============  ========  ====  ======

The same guesser has .59 / .70 (grounded / thin) on colours and .59 / .74 on shapes of ``train``, .06 / .00 on
``conflict``, .59 / 1.0 on ``aligned``, .47 to .53 on the three ``exists_*`` splits, and no ``minimal_pairs``
right.
"""

from __future__ import annotations

from .config import COLOURS, KINDS, SHAPES, SIZES, SPLITS, STREAMS, STYLES, SceneConfig
from .facts import Bar, SceneObject, Sign
from .language import CAPTION_PROMPTS, WORDS, template_sentences, vocabulary
from .picture import Scene
from .records import sample
from .splits import scene
from .world import World, build_world
from .write import write

__all__ = [
    "CAPTION_PROMPTS",
    "COLOURS",
    "KINDS",
    "SHAPES",
    "SIZES",
    "SPLITS",
    "STREAMS",
    "STYLES",
    "WORDS",
    "Bar",
    "Scene",
    "SceneConfig",
    "SceneObject",
    "Sign",
    "World",
    "build_world",
    "sample",
    "scene",
    "template_sentences",
    "vocabulary",
    "write",
]
