"""One sample -> one document: every token knows what it is, whatever the text, template, family and length."""

from __future__ import annotations

import copy
import io
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from opsin.data.chat import TEMPLATES, ChatTemplate, chat_template
from opsin.data.encode import ConversationEncoder, Document, Rejected, Status
from opsin.data.schema import Role, pack_images, stable_hash
from opsin.data.sentences import sentence_id
from opsin.models.anatomy import image_encoder_for
from opsin.models.errors import UserError
from opsin.models.tiny import word_tokenizer

import jobs
import zoo


@lru_cache
def built(family: str) -> zoo.Built:
    return zoo.build(family)


@lru_cache
def spaced_tokenizer(kind: str) -> Any:
    """Tokenizers as they are out there, by what they do to spaces and ends."""
    fast = copy.deepcopy(zoo.tokenizer())
    raw, bos, eos = fast._tokenizer, ("<s>", fast.bos_token_id), ("</s>", fast.eos_token_id)
    if kind == "bos":  # Llama
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    elif kind == "bos and eos":
        raw.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[bos, eos])
    elif kind == "trimmed offsets":  # RoBERTa
        raw.post_processor = processors.ByteLevel(trim_offsets=True)
    elif kind == "characters":  # every space is a token of its own, as Llama's before a digit
        letters = {c: i for i, c in enumerate("".join(map(chr, range(32, 127))) + "\n")}
        raw = Tokenizer(models.WordLevel(letters, unk_token="?"))
        raw.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
        raw.decoder = decoders.Fuse()
        raw.add_special_tokens([t for t in zoo.SPECIALS if t != "<image>"])
        raw.add_special_tokens(["<image>"])
        fast = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", pad_token="<pad>")
    return fast


def encoder(
    template: str | ChatTemplate = "vicuna_v1", family: str = "llava", tokenizer: Any = None, **options: Any
) -> ConversationEncoder:
    model = built(family)
    processor, config = model.processor, model.hf.config
    if tokenizer is not None:
        config = copy.copy(config)
        config.image_token_index = config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
        processor = copy.copy(processor)
        processor.tokenizer = tokenizer
    tokenizer = processor.tokenizer
    if isinstance(template, str):
        template = chat_template(template, tokenizer.eos_token)
    return ConversationEncoder(tokenizer, image_encoder_for(processor, config), template, **options)


def stored(
    *pairs: tuple[str, str], images: int = 0, system: str | None = None, independent: bool = False
) -> dict:
    turns = [{"from": "system", "value": system}] if system is not None else []
    for user, answer in pairs:
        turns += [{"from": "human", "value": user}, {"from": "gpt", "value": answer}]
    return {
        "id": "s",
        "conversations": turns,
        "images": pack_images([zoo.picture(i, (20 + 8 * i, 16)) for i in range(images)]),
        "meta": {"turns": "independent"} if independent else {},
    }


def said(document: Document, tokenizer: Any, role: Role, turn: int) -> str:
    chosen = (document.roles == role) & (document.turn_ids == turn)
    return tokenizer.decode(document.input_ids[chosen].tolist(), clean_up_tokenization_spaces=False)


def holds(document: Document, sample: dict, encode: ConversationEncoder) -> None:
    """T3 of the L2T sheet: decoded by role and turn, the tokens give back what was said; and counts add up."""
    turns = [t for t in sample["conversations"] if t["from"] != "system"]
    for turn, (human, gpt) in enumerate(zip(turns[::2], turns[1::2], strict=True)):
        words = human["value"].replace("<image>", "").strip()
        if not encode.template.plain:
            assert said(document, encode.tokenizer, Role.INSTRUCTION, turn).strip() == words
        learnt = said(document, encode.tokenizer, Role.RESPONSE, turn)
        assert learnt.strip(" ") == (gpt["value"] + encode.template.assistant_end).strip(" ")
    pictures = [len(i.token_ids) for i in document.images]
    assert int((document.roles == Role.IMAGE).sum()) == sum(pictures)
    assert np.array_equal(document.roles == Role.IMAGE, document.input_ids == encode.images.image_token_id)
    for ordinal, start in enumerate(document.image_starts):
        span = np.flatnonzero(document.image_ids == ordinal)
        assert span.tolist() == list(range(start, start + pictures[ordinal]))
    assert (document.image_ids >= 0).sum() == sum(pictures)
    # Sentences lie in instructions and nowhere else.
    assert not document.sentence_ids[document.roles != Role.INSTRUCTION].any()
    lengths = {len(getattr(document, k)) for k in ("roles", "turn_ids", "branch_ids", "sentence_ids")}
    assert lengths == {len(document)} == {document.position_ids.shape[-1]}


PAIRS = [
    ("What colour is it?\nAnswer briefly.", "Red."),
    ("Größe? 🦊🦊 \u200d", "12 cm 🎉\n    indented"),
    ("3?", "4"),
]


@pytest.mark.parametrize("turns", [1, 3])
@pytest.mark.parametrize("images", [0, 1, 2])
@pytest.mark.parametrize("template", sorted(TEMPLATES))
def test_t3_chained(template: str, images: int, turns: int) -> None:
    pairs = [("<image>\n" * images + PAIRS[0][0], PAIRS[0][1]), *PAIRS[1:turns]]
    for family in zoo.FAMILIES:
        encode = encoder(template, family)
        sample = stored(*pairs, images=images)
        document = encode(sample)
        holds(document, sample, encode)
        assert not document.branch_ids.any()
        assert len(document.images) == images


@pytest.mark.parametrize("images", [0, 1, 2])
@pytest.mark.parametrize("template", sorted(TEMPLATES))
def test_t3_independent(template: str, images: int) -> None:
    pairs = [("<image>\n" * images + PAIRS[0][0], PAIRS[0][1]), *PAIRS[1:]]
    for family in zoo.FAMILIES:
        encode = encoder(template, family)
        sample = stored(*pairs, images=images, independent=True)
        document = encode(sample)
        holds(document, sample, encode)
        assert set(document.branch_ids) - {0} == {1, 2, 3}  # (a plain text has nothing to share)


@pytest.mark.parametrize("kind", ["bos", "bos and eos", "trimmed offsets", "characters"])
@pytest.mark.parametrize("template", ["vicuna_v1", "chatml"])
def test_t3_with_other_tokenizers(template: str, kind: str) -> None:
    encode = encoder(template, tokenizer=spaced_tokenizer(kind))
    sample = stored(
        ("<image>\nHow many?", "2"), ("Why     so?", "if x:\n    y  "), images=1, system="Be kind."
    )
    document = encode(sample)
    holds(document, sample, encode)
    assert (document.input_ids == encode.tokenizer.bos_token_id).sum() == ("bos" in kind)
    if "bos" in kind:
        assert (document.roles[0], document.turn_ids[0]) == (Role.MARKER, -1)


words = st.text(st.characters(exclude_characters="<|", codec="utf-8"), min_size=1, max_size=16)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(words, words.filter(lambda a: a.strip())), min_size=1, max_size=3),
    st.sampled_from(sorted(TEMPLATES)),
    st.booleans(),
)
def test_t3_with_any_text(pairs: list[tuple[str, str]], template: str, independent: bool) -> None:
    encode = encoder(template)
    document = encode(stored(*pairs, independent=independent))
    for turn, (user, answer) in enumerate(pairs):
        if template != "plain":
            assert said(document, encode.tokenizer, Role.INSTRUCTION, turn).split() == user.split()
        learnt = said(document, encode.tokenizer, Role.RESPONSE, turn)
        assert learnt.split() == (answer + encode.template.assistant_end).split()


@pytest.mark.parametrize("kind", ["byte pairs", "bos", "bos and eos", "trimmed offsets", "characters"])
@pytest.mark.parametrize("template", ["vicuna_v1", "chatml"])
def test_a_prompt_and_what_is_learnt_behind_it_make_the_training_text(template: str, kind: str) -> None:
    # Else the model would be asked in another way than it was taught.
    encode = encoder(template, tokenizer=None if kind == "byte pairs" else spaced_tokenizer(kind))
    for answer in ("2", "Red.", "[0.1, 2]", "(a)"):
        sample = stored(("<image>\nHow many?", "x"), ("And now?", answer), images=1)
        document = encode(sample)
        pairs = [("<image>\nHow many?", "x"), ("And now?", answer)]
        prompt = encode.prompt(None, pairs, sample)
        assert document.input_ids[: len(prompt)].tolist() == prompt.input_ids.tolist()
        rest = document.roles[len(prompt) :]
        learnt = int((rest == Role.RESPONSE).sum())
        assert set(rest[:learnt]) == {Role.RESPONSE}
        text = encode.tokenizer.decode(document.input_ids[len(prompt) :][:learnt].tolist())
        assert text.strip(" ") == answer + encode.template.assistant_end


def test_a_token_that_straddles_two_roles_is_not_learnt() -> None:
    # "wor" of the user and "ds" of the template make one word; so do "an" and "swer" of marker and answer.
    tokenizer = word_tokenizer(["words", "answer", "a", "end"])
    straddling = ChatTemplate("s", "", ("", ""), ("", "ds"), " an", " end")
    encode = encoder(straddling, tokenizer=tokenizer)
    document = encode(stored(("a wor", "swer a")))
    tokens = tokenizer.convert_ids_to_tokens(document.input_ids.tolist())
    roles = [Role(r).name for r in document.roles]
    assert list(zip(tokens, roles, strict=True)) == [
        ("a", "INSTRUCTION"),
        ("▁words", "MARKER"),
        ("▁answer", "MARKER"),
        ("▁a", "RESPONSE"),
        ("▁end", "RESPONSE"),
    ]
    assert document.sentence_ids[1] == 0


def test_tokens_carry_the_sentence_they_lie_in() -> None:
    encode = encoder()
    document = encode(stored(("<image>\nWhat is it? Answer briefly.", "Red"), images=1))
    for key in ("what is it", "answer briefly"):
        chosen = document.input_ids[document.sentence_ids == sentence_id(key)]
        assert encode.tokenizer.decode(chosen.tolist()).strip().rstrip("?.").casefold() == key


# Pictures, positions, branches -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", zoo.FAMILIES)
@pytest.mark.parametrize("images", [0, 1, 2])
def test_independent_questions_are_each_as_if_asked_alone(family: str, images: int) -> None:
    encode = encoder("vicuna_v1", family)
    marks = "<image>\n" * images
    sample = stored((marks + "What is it?", "A cube."), *PAIRS[1:], images=images, independent=True)
    document = encode(sample)
    trunk = document.branch_ids == 0
    assert document.branch_ids.tolist() == sorted(document.branch_ids)
    assert set(document.turn_ids[trunk]) == {-1}
    for turn, (user, answer) in enumerate([("What is it?", "A cube."), *PAIRS[1:]]):
        alone = encode(stored((marks + user, answer), images=images))
        mine = trunk | (document.branch_ids == turn + 1)
        assert document.input_ids[mine].tolist() == alone.input_ids.tolist()
        assert np.array_equal(document.position_ids[..., mine], alone.position_ids)
        assert document.roles[mine].tolist() == alone.roles.tolist()
        assert document.sentence_ids[mine].tolist() == alone.sentence_ids.tolist()
        assert set(document.turn_ids[document.branch_ids == turn + 1]) == {turn}
        words = (alone.roles == Role.INSTRUCTION) | (alone.roles == Role.RESPONSE)
        assert not words[: int(trunk.sum())].any()  # words of a question are never shared


def test_independent_pictures_stand_in_the_trunk_whatever_lies_between_them() -> None:
    encode = encoder()
    document = encode(
        stored(("<image><image>  What changed?", "x"), ("Why?", "y"), images=2, independent=True)
    )
    assert (document.image_ids[document.branch_ids > 0] == -1).all()
    assert document.image_ids.max() == 1
    with pytest.raises(Rejected, match="before or between"):
        encode(stored(("<image> or <image>, which?", "x"), ("Why?", "y"), images=2, independent=True))


@pytest.mark.parametrize(
    ("setting", "meta", "branched"),
    [
        ("meta", {"turns": "independent"}, True),
        ("meta", {"turns": "chained"}, False),
        ("meta", {}, False),
        ("meta", None, False),
        ("meta", [1], False),
        ("chained", {"turns": "independent"}, False),
        ("independent", {}, True),
    ],
)
def test_who_decides_about_turns(setting: str, meta: Any, branched: bool) -> None:
    encode = encoder(turns=setting)
    sample = {**stored(("A?", "a"), ("B?", "b")), "meta": meta}
    assert bool(encode(sample).branch_ids.any()) == branched == encode.independent(sample)


def test_positions_of_a_document_count_from_zero() -> None:
    document = encoder()(stored(("<image>\nHi", "Yo"), images=1))
    assert document.position_ids.tolist() == list(range(len(document)))


# Length ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
@pytest.mark.parametrize("independent", [False, True], ids=["chained", "independent"])
def test_truncation_leaves_out_whole_exchanges(family: str, independent: bool) -> None:
    full = encoder("chatml", family)
    # A picture in a later turn, too, where that is allowed.
    later = "Sure?" if independent else "<image>\nAnd this?"
    pairs = [("<image>\nWhat is it?", "A red cube."), (later, "Yes, it is."), ("3?", "4 5 6")]
    images = 1 if independent else 2
    whole = full(stored(*pairs, images=images, independent=independent))
    by_turns = []
    for kept in (1, 2, 3):
        shown = sum(user.count("<image>") for user, _ in pairs[:kept])
        by_turns.append(full(stored(*pairs[:kept], images=shown, independent=independent)))
    branched = [d if d.branch_ids.any() or not independent else None for d in by_turns]
    for limit in range(20, len(whole) + 1):
        encode = encoder("chatml", family, max_seq_len=limit)
        try:
            document = encode(stored(*pairs, images=images, independent=independent))
        except Rejected as rejected:
            assert rejected.status == Status.TOO_LONG
            assert limit < len(by_turns[0])
            continue
        assert len(document) <= limit
        kept = len(pairs) - document.truncated_turns
        assert set(document.turn_ids) - {-1} == set(range(kept))
        assert kept == sum(len(d) <= limit for d in by_turns)  # never more left out than need be
        if branched[kept - 1] is not None:
            assert document.input_ids.tolist() == branched[kept - 1].input_ids.tolist()
        pictures = sum(len(i.token_ids) for i in document.images)
        assert (document.image_ids >= 0).sum() == pictures
        assert len(document.images) == sum(user.count("<image>") for user, _ in pairs[:kept])
    assert document.truncated_turns == 0


def test_a_prompt_that_is_too_long_is_refused() -> None:
    encode = encoder(max_seq_len=30)
    with pytest.raises(Rejected, match="the prompt has"):
        encode.prompt(None, [("Hi", "")], stored(("Hi", "x")))


# Refusals --------------------------------------------------------------------------------------------------


def _with(images: list[bytes], *pairs: tuple[str, str]) -> dict:
    return {**stored(*pairs), "images": pack_images(images)}


PNG = zoo.picture(0)
REFUSED: dict[str, tuple[Any, Status]] = {
    "no answer at the end": (
        {**stored(("a", "b")), "conversations": [{"from": "human", "value": "a"}]},
        Status.BAD_CONVERSATION,
    ),
    "no list": ({**stored(("a", "b")), "conversations": None}, Status.BAD_CONVERSATION),
    "empty": ({**stored(("a", "b")), "conversations": []}, Status.BAD_CONVERSATION),
    "empty answer": (stored(("a", "b"), ("c", " \n")), Status.EMPTY_ANSWER),
    "picture too few": (_with([], ("<image>\nWhat?", "x")), Status.IMAGE_COUNT),
    "picture too many": (_with([PNG, PNG], ("<image>\nWhat?", "x")), Status.IMAGE_COUNT),
    "picture without a mark": (_with([PNG], ("What?", "x")), Status.IMAGE_COUNT),
    "mark in an answer": (_with([PNG], ("What?", "An <image>")), Status.IMAGE_COUNT),
    "mark in an answer, count right": (_with([PNG], ("<image>", "An <image>")), Status.IMAGE_COUNT),
    "mark in the system prompt": (
        {**_with([PNG], ("<image>", "x")), "conversations": stored(("<image>", "x"), system="An <image>")["conversations"]},
        Status.IMAGE_COUNT,
    ),
    "not a picture": (_with([b"hello"], ("<image>", "x")), Status.UNREADABLE_IMAGE),
    "half a picture": (_with([PNG[: len(PNG) // 2]], ("<image>", "x")), Status.UNREADABLE_IMAGE),
    "no bytes": (_with([b""], ("<image>", "x")), Status.UNREADABLE_IMAGE),
    "bad pack": ({**stored(("<image>", "x")), "images": b"\x01"}, Status.UNREADABLE_IMAGE),
    "too long": (stored(("word " * 200, "x")), Status.TOO_LONG),
    "independent with later pictures": (
        {**_with([PNG, PNG], ("<image>a", "x"), ("<image>b", "y")), "meta": {"turns": "independent"}},
        Status.BAD_CONVERSATION,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_cannot_be_used_is_refused_with_a_reason(case: str) -> None:
    sample, status = REFUSED[case]
    with pytest.raises(Rejected) as caught:
        encoder(max_seq_len=200)(sample)
    assert caught.value.status == status
    assert str(caught.value).startswith(status.name.lower() + ": ")


@pytest.mark.parametrize("text", ["What is <|image_pad|>?", "<|vision_start|><|image_pad|><|vision_end|>"])
def test_a_familys_own_image_token_in_a_users_text_is_refused(text: str) -> None:
    encode = encoder("chatml", "qwen2_5_vl")
    for sample in (stored((text, "x")), stored(("<image>\n" + text, "x"), images=1), stored(("Hi", text))):
        with pytest.raises(Rejected, match="image token") as caught:
            encode(sample)
        assert caught.value.status == Status.IMAGE_COUNT
    # ... and another family's is only text.
    assert encoder("chatml", "llava")(stored((text, "x")))


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["PNG", "JPEG", "WEBP"]),
    st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=6),
    st.floats(0.3, 1),
)
def test_damaged_pictures_are_used_or_refused_and_nothing_else(
    kind: str, changes: list[tuple[float, int]], kept: float
) -> None:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(PNG)).save(buffer, kind)
    data = bytearray(buffer.getvalue())
    for place, value in changes:
        data[int(place * len(data))] = value
    try:
        encoder()(_with([bytes(data[: int(kept * len(data))])], ("<image>\nWhat?", "x")))
    except Rejected as rejected:
        assert rejected.status == Status.UNREADABLE_IMAGE


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "LA"])
def test_pictures_of_other_modes_become_rgb(mode: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 16), (250, 10, 10)).convert(mode).save(buffer, "TIFF" if mode == "CMYK" else "PNG")
    document = encoder()(_with([buffer.getvalue()], ("<image>", "x")))
    assert tuple(document.images[0].pixels["pixel_values"].shape) == (1, 3, 16, 16)


def test_ids() -> None:
    encode = encoder()
    sample = stored(("Hi", "x"))
    assert encode(sample).uid == stable_hash("s")
    assert encode({**sample, "uid": 12}, visit=3).uid == 12
    assert encode({**sample, "uid": 12}, visit=3).visit == 3


def test_unfit_tokenizers_are_refused_in_one_line() -> None:
    model = built("llava")
    images = image_encoder_for(model.processor, model.hf.config)
    template = chat_template("plain", "")
    slow = type("SlowTokenizer", (), {"is_fast": False})()
    with pytest.raises(UserError, match="SlowTokenizer has no character offsets"):
        ConversationEncoder(slow, images, template)
    ignorant = word_tokenizer(["a"])  # knows <image>, under another id
    with pytest.raises(UserError, match="add it as a special token with id"):
        ConversationEncoder(ignorant, images, template)
    with pytest.raises(UserError, match="turns 'both'"):
        encoder(turns="both")


def test_jobs_and_training_build_the_same_encoder() -> None:
    from opsin.data.loader import build_encoder

    model = built("llava")
    sample = zoo.sample(1, turns=2)
    ours = build_encoder(model.processor, model.hf.config, template="chatml", max_seq_len=400)
    assert (
        ours(sample).input_ids.tolist() == jobs.collator(model, "chatml").encoder(sample).input_ids.tolist()
    )
