"""Which sentences ask a picture nothing specific: near misses of each kind, and what no inserted word may change."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from opsin.data.convert.caption_prompts import LONGEST, is_caption_prompt
from opsin.data.convert.vift_rule import Rule
from opsin.data.scenes import SceneConfig
from opsin.data.scenes.language import CAPTION_PROMPTS
from opsin.data.scenes.records import sample
from opsin.data.sentences import sentence_key

GENERIC = """
Describe the picture.
DESCRIBE   THE IMAGE!!!
"Describe this photo."
Please describe this image in detail.
Could you please describe the photo for me?
Can you describe the scene, please?
Briefly describe the image, please.
In one sentence, describe the image.
Describe image.
Describe it.
Describe both pictures.
Describe the two images in a few words.
Describe the following image as precisely as possible.
Describe the contents of this photograph.
Describe the scene in the photo.
Describe what you see in the image in one sentence.
Describe everything you can see.
Describe the image in as much detail as possible.
Describe the attached picture concisely but clearly in about 50 words.
Caption this image.
Summarise the scene.
Summarize the visual content of the image.
Write a caption.
Write a short caption.
Write a detailed description of the given picture.
Give a short, clear description of the following image.
Provide a brief and accurate description of the image.
Generate a one-sentence caption for the image.
What would be a good caption for this image?
How would you describe the picture?
What do you see?
What do you see in the picture?
What can you see here?
What is in the picture?
What's in this photo?
What’s in this photo?
What is shown in the image?
What can be seen in this picture?
What is happening in the scene?
What is going on here?
What does the image show?
What is this picture about?
Tell me what you see.
Tell me what is in the picture.
Can you tell me what this picture shows?
Tell me about this picture.
I would like you to describe this image.
Look at the picture.
Take a close look at the image and tell me what you see.
Look at the picture and describe it in detail.
""".strip().splitlines()

SPECIFIC = """
What is the man in the picture doing?
What is he doing in the picture?
Who is in the picture?
Where is the picture?
Why was the picture taken?
How many pictures are there?
Is this a picture?
Can you see the picture?
What is this?
What is it?
What is here?
Tell me what is here.
What is the picture?
What is the image quality?
What is the title of the picture?
What is the scene's location?
What colour is in the picture?
What objects are in the picture?
What is written in the picture?
What is missing in the picture?
What is unusual about this image?
What is wrong with the picture?
What is in the box?
What is in the top of the image?
What is in the picture behind the man?
What is on the picture frame?
What is shown on the screen?
What is happening to the man in the picture?
What do you see in the background?
What do you see on the table?
What can be seen through the window?
What does the sign in the picture show?
What does the image show about the weather?
Describe the man's shirt.
Describe the man in the picture.
Describe this man.
Describe the picture's colours.
Describe the picture of the dog.
Describe the first picture.
Describe one of the pictures.
Describe the differences between the pictures.
Describe the background.
Describe the left side of the image.
Describe the scene behind the man.
Describe the mood of the picture.
Describe the style of this image.
Describe the weather in the image.
Describe what the man sees in the picture.
Describe what is on the table in the picture.
Describe the picture in French.
Describe the picture as a poem.
Describe the image in one word.
Describe the image in two words.
Describe the picture and count the cars.
Describe the picture and tell me its colour.
Do not describe the picture.
Look at the picture and answer.
Look at the man and describe it.
Write a story about the picture.
Write a funny caption.
Write a caption for the car.
Write a caption for the image in German.
How would you describe the man's expression in the picture?
Tell me what you see on the left.
Tell me a story about the picture.
Tell me about the man.
Name everything you see in the picture that is red.
Give me the number.
the picture
Describe
Write
Please
What
""".strip().splitlines()

FOREIGN = (
    "not", "man", "man's", "colour", "red", "left", "behind", "why", "who", "where", "many", "text", "written", "doing",
    "price", "first", "except", "without", "of the car", "background", "story", "french", "if", "or", "its", "between",
)  # fmt: skip


@pytest.mark.parametrize("sentence", GENERIC)
def test_prompts(sentence: str) -> None:
    assert is_caption_prompt(sentence_key(sentence))


@pytest.mark.parametrize("sentence", SPECIFIC)
def test_near_misses(sentence: str) -> None:
    assert not is_caption_prompt(sentence_key(sentence))


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(GENERIC), st.integers(0, 30), st.sampled_from(FOREIGN))
@example("What is in the picture?", 1, "colour")
def test_no_prompt_has_room_for_a_word_of_a_question(sentence: str, place: int, word: str) -> None:
    words = sentence_key(sentence).split()
    words.insert(place % (len(words) + 1), word)
    assert not is_caption_prompt(" ".join(words))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(sorted({w for s in GENERIC for w in sentence_key(s).split()})), max_size=40))
def test_any_words_are_decided_at_once(words: list[str]) -> None:
    start = time.process_time()
    is_caption_prompt(" ".join(words))
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize(
    "key",
    [
        "describe the picture " + "in detail " * 17,
        "write a " + "short and " * 18,
        "write a " + "very short " * 17 + "x",
        "please " * 28,
        "all of the " * 18,
        "what do you see in " * 10,
        "x" * 10_000,
        "describe the picture" + " " * 10_000 + "of a dog",
        "",
    ],
)
def test_what_nearly_fits_costs_nothing(key: str) -> None:
    start = time.process_time()
    assert not is_caption_prompt(key)
    assert time.process_time() - start < 0.5
    assert LONGEST == 200


def test_scenes_have_prompts_where_they_caption_and_nowhere_else() -> None:
    config, rule = SceneConfig(caption_prompts=CAPTION_PROMPTS), Rule()
    for i in range(40):
        for stream, expected in (("caption", True), ("vqa", False)):
            turns = sample(config, 3, "train", i, stream)["conversations"]
            assert {rule.generic(turn["value"]) for turn in turns if turn["from"] == "human"} == {expected}
