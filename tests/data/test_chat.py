"""Chat templates: golden renderings, the role of every character, and the jinja form of the same."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from opsin.data.chat import (
    TEMPLATES,
    BadConversation,
    ChatTemplate,
    Segment,
    asked_alone,
    chat_template,
    exchanges,
    render,
)
from opsin.data.schema import Role
from opsin.models.errors import UserError

from zoo import tokenizer

S, M, I, U, A = Role.SYSTEM, Role.MARKER, Role.IMAGE, Role.INSTRUCTION, Role.RESPONSE  # noqa: E741
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
ONE = [("<image>\nWhat is it?", "A cube.")]
TWO = [("<image>\nWhat is it?", "A cube."), ("Sure?", "Yes")]


def text_of(segments: list[Segment]) -> str:
    return "".join(s.text for s in segments)


def characters(segments: list[Segment]) -> list[tuple[str, Role, int]]:
    return [(c, s.role, s.turn) for s in segments for c in s.text]


def spelt(*parts: tuple[str, Role, int]) -> list[tuple[str, Role, int]]:
    return [(c, role, turn) for text, role, turn in parts for c in text]


def test_vicuna() -> None:
    template = chat_template("vicuna_v1", "</s>")
    assert characters(render(None, TWO, template, "<image>")) == spelt(
        (SYSTEM, S, -1), (" ", M, -1),
        ("USER: ", M, 0), ("<image>", I, 0), ("\n", M, 0), ("What is it?", U, 0), (" ASSISTANT:", M, 0),
        (" A cube.", A, 0), ("</s>", A, 0),
        ("USER: ", M, 1), ("Sure?", U, 1), (" ASSISTANT:", M, 1), (" Yes", A, 1), ("</s>", A, 1),
    )  # fmt: skip


def test_chatml() -> None:
    template = chat_template("chatml", "</s>")
    assert characters(render("Be kind.", TWO, template, "<image>")) == spelt(
        ("<|im_start|>system\n", M, -1), ("Be kind.", S, -1), ("<|im_end|>\n", M, -1),
        ("<|im_start|>user\n", M, 0), ("<image>", I, 0), ("\n", M, 0), ("What is it?", U, 0),
        ("<|im_end|>\n<|im_start|>assistant\n", M, 0), ("A cube.<|im_end|>", A, 0), ("\n", M, 0),
        ("<|im_start|>user\n", M, 1), ("Sure?", U, 1), ("<|im_end|>\n<|im_start|>assistant\n", M, 1),
        ("Yes<|im_end|>", A, 1), ("\n", M, 1),
    )  # fmt: skip
    assert text_of(render(None, ONE, template, "<image>")).startswith("<|im_start|>user")


def test_plain_drops_the_words_of_the_user_and_the_system_prompt() -> None:
    template = chat_template("plain", "</s>")
    assert characters(render("Be kind.", ONE, template, "<image>")) == spelt(
        ("<image>", I, 0), ("A cube.\n", A, 0)
    )
    assert text_of(render(None, [("Describe <image> and <image>.", "x")], template, "<image>")) == (
        "<image><image>x\n"
    )
    assert text_of(render(None, ONE, template, "<image>", open_response=True)) == "<image>"


def test_an_open_response_is_what_training_rendered_up_to_the_answer() -> None:
    for name in TEMPLATES:
        template = chat_template(name, "</s>")
        closed = characters(render(None, TWO, template, "<image>"))
        opened = characters(render(None, TWO, template, "<image>", open_response=True))
        assert closed[: len(opened)] == opened
        # What follows is the answer and its end, every character of it learnt: it is what the model must write.
        rest = closed[len(opened) :]
        written = "".join(c for c, role, _ in rest if role == A)
        assert {role for _, role, _ in rest[: len(written)]} == {A}
        assert written.strip(" ") == f"Yes{template.assistant_end}"


@pytest.mark.parametrize(
    ("user", "parts"),
    [
        # One picture goes to the front, wherever it stood.
        ("<image>What?", [("<image>", I), ("\n", M), ("What?", U)]),
        ("What?\n<image>", [("<image>", I), ("\n", M), ("What?", U)]),
        ("See <image> here", [("<image>", I), ("\n", M), ("See  here", U)]),
        ("<image>", [("<image>", I), ("\n", M)]),
        # Several stay; white space beside them is formatting.
        (
            "<image>\n<image>\nWhat changed?",
            [("<image>", I), ("\n", M), ("<image>", I), ("\n", M), ("What changed?", U)],
        ),
        (
            "First <image> then\n<image> next",
            [
                ("First", U),
                (" ", M),
                ("<image>", I),
                (" ", M),
                ("then", U),
                ("\n", M),
                ("<image>", I),
                (" ", M),
                ("next", U),
            ],
        ),
        ("  no picture ", [("  no picture ", U)]),
    ],
)
def test_roles_around_pictures(user: str, parts: list[tuple[str, Role]]) -> None:
    bare = ChatTemplate("bare", "", ("", ""), ("", ""), "", "")
    rendered = characters(render(None, [(user, "")], bare, "<image>"))
    assert rendered == spelt(*((text, role, 0) for text, role in parts))


def test_numbering_starts_where_it_is_told() -> None:
    segments = render(None, TWO, chat_template("chatml", ""), "<image>", first_turn=3)
    assert {s.turn for s in segments} == {3, 4}


words = st.text(st.characters(exclude_characters="<{\\", codec="utf-8"), min_size=1, max_size=20)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(words, words), min_size=1, max_size=3), st.integers(0, 2), st.booleans())
def test_every_character_is_rendered_once_and_in_order(
    pairs: list[tuple[str, str]], images: int, opened: bool
) -> None:
    pairs = [("<image>\n" * images + pairs[0][0], pairs[0][1]), *pairs[1:]]
    for name in ("vicuna_v1", "chatml"):
        segments = render("Sys", pairs, chat_template(name, "</s>"), "<image>", open_response=opened)
        by_role = {
            (role, turn): "".join(s.text for s in segments if s.role == role and s.turn == turn)
            for role in Role
            for turn in range(-1, len(pairs))
        }
        assert by_role[S, -1] == "Sys"
        for turn, (user, answer) in enumerate(pairs):
            assert by_role[U, turn].strip() == user.replace("<image>", "").strip()
            learnt = by_role[A, turn]
            if opened and turn == len(pairs) - 1:
                assert learnt == ""
            else:
                assert learnt.removeprefix(" " if name == "vicuna_v1" else "").startswith(answer)


# jinja -----------------------------------------------------------------------------------------------------


def _messages(system: str | None, pairs: list[tuple[str, str]], opened: bool) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    for user, answer in pairs:
        pictures = [{"type": "image"}] * user.count("<image>")
        said = {"type": "text", "text": user.replace("<image>", "").strip()}
        messages.append({"role": "user", "content": [*pictures, said] if pictures else said["text"]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages[:-1] if opened else messages


@pytest.mark.parametrize("opened", [False, True], ids=["closed", "opened"])
@pytest.mark.parametrize("system", [None, "", "Be 'kind' \\ {now}.\n"], ids=["default", "empty", "given"])
@pytest.mark.parametrize(
    ("name", "images"),
    [(n, i) for n in sorted(TEMPLATES) for i in range(3) if (n, i) != ("plain", 0)],  # plain is for captions
)
def test_jinja_renders_the_same_text(name: str, images: int, system: str | None, opened: bool) -> None:
    template = chat_template(name, "</s>")
    hf: PreTrainedTokenizerFast = tokenizer()
    pairs = [("<image>\n" * images + 'What\'s "it"?', "A 'cube'."), ("Sure?\nReally?", "Yes \\n {{x}}")]
    for turns in (pairs[:1], pairs):
        theirs = hf.apply_chat_template(
            _messages(system, turns, opened),
            chat_template=template.jinja,
            tokenize=False,
            add_generation_prompt=opened,
        )
        assert theirs == text_of(render(system, turns, template, "<image>", open_response=opened))


def test_jinja_follows_a_system_prompt_of_ones_own() -> None:
    template = chat_template("chatml", "</s>", system_prompt="You're short.")
    theirs = tokenizer().apply_chat_template(
        [{"role": "user", "content": "Hi"}], chat_template=template.jinja, tokenize=False
    )
    assert theirs == "<|im_start|>system\nYou're short.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    without = chat_template("vicuna_v1", "</s>", system_prompt="")
    assert text_of(render(None, [("Hi", "Yo")], without, "")) == "USER: Hi ASSISTANT: Yo</s>"


# errors ----------------------------------------------------------------------------------------------------

H, G = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}


def test_exchanges_are_read() -> None:
    assert exchanges([H, G, H, G]) == (None, [("q", "a"), ("q", "a")])
    assert exchanges([{"from": "system", "value": "s"}, H, G]) == ("s", [("q", "a")])


@pytest.mark.parametrize(
    "conversation",
    [
        [],
        [H],
        [G, H],
        [H, H],
        [H, G, H],
        [{"from": "system", "value": "s"}],
        [{"from": "system"}, H, G],
        [H, G, {"from": "system", "value": "s"}, G],
        [H, {"from": "gpt"}],
        [{"from": "human", "value": None}, G],
        [{"value": "q"}, G],
        [["human", "q"], ["gpt", "a"]],
        None,
        "hello",
        {"from": "human", "value": "q"},
        [None, G],
    ],
)
def test_what_is_no_conversation_says_so(conversation: Any) -> None:
    with pytest.raises(BadConversation):
        exchanges(conversation)


def test_questions_asked_alone_have_the_pictures_in_front() -> None:
    assert asked_alone(["<image>\nA?", "B?"]) == ["<image>\nA?", "<image>\nB?"]
    assert asked_alone(["A?", "B?"]) == ["A?", "B?"]
    assert asked_alone(["<image><image> A?", "B?"]) == ["<image>\n<image>\nA?", "<image>\n<image>\nB?"]
    with pytest.raises(BadConversation, match="only the first"):
        asked_alone(["<image>\nA?", "<image>\nB?"])
    with pytest.raises(BadConversation, match="before or between"):
        asked_alone(["<image> is left of <image>, why?", "B?"])


def test_an_unknown_template_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'vicuna_v1'"):
        chat_template("vicuna", "")
