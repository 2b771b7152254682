"""Which letter an answer names: the table of forms, and what is no answer."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsin.evaluation.scorers import make
from opsin.evaluation.scorers.letters import options_of, read_letter
from opsin.models.errors import UserError

OPTIONS = ("dog", "cat", "hot dog", "2")

FORMS = {
    # alone, in any decoration
    "A": "A",
    "a": "A",
    "(b)": "B",
    "(B)": "B",
    "B.": "B",
    "[D]": "D",
    '"B"': "B",
    " C \n": "C",
    "**C**": "C",
    "`d`": "D",
    r"\boxed{D}": "D",
    r"\(\boxed{B}\)": "B",
    "Ｂ": "B",
    "（B）": "B",
    # stated
    "The answer is B": "B",
    "The answer is (b).": "B",
    "The answer is: 'C'": "C",
    "Answer: B": "B",
    "ANSWER: B": "B",
    "**Answer:** B": "B",
    "Answer:\nC": "C",
    "Final answer - D": "D",
    "<answer>B</answer>": "B",
    "The answer should be D.": "D",
    "The correct answer is option (c).": "C",
    "the answer is b because it is": "B",
    "The answer is B, and a dog too": "B",
    "Option A is wrong, so the answer is B": "B",
    "My answer is B. A is the dog.": "B",
    # the only letter named
    "It is a dog, so B": "B",
    "A dog is shown, so B": "B",
    "I would pick B": "B",
    "I think it's A": "A",
    "A because it barks": "A",
    "A is the answer": "A",
    "Option B": "B",
    "option b": "B",
    "b. cat": "B",
    "b) cat": "B",
    "C: hot dog": "C",
    "(a) A dog": "A",
    "A 2": "A",
    "B B": "B",
    "Not A but B": "B",
    "A is wrong, so B": "B",
    "B is correct because A isn't": "B",
    "Vitamin E, so B": "B",
    "答案是B": "B",
    # the text of an option
    "dog": "A",
    "Dog.": "A",
    "A dog": "A",
    "the cat": "B",
    "It is a cat.": "B",
    "The answer is a dog": "A",
    "Hot  dog": "C",
    "2": "D",
}

NO_ANSWER = (
    "",
    " ",
    "banana",
    "E",  # the question has four options
    "The answer is E",
    "A seems right but the answer is E",
    "A or B",
    "A and B",
    "either (a) or (b)",
    "The answer is A or B.",
    "The answer is A, B.",
    "Answer: A. No, answer: B",
    "A. dog\nB. cat\nC. hot dog",
    "The answer is not A.",
    "It cannot be A",
    "neither A nor B",
    "the answer isn't B",
    "The answer is a big dog",  # an article, and no option's text
    "It shows a cat",  # only mentions one
    "A dog on a mat",
    "T-shirt",
    "It's Plan B-52",
    "None of the above",
    "12",
    "?!",
)


@pytest.mark.parametrize(("text", "letter"), FORMS.items())
def test_forms_of_a_letter(text: str, letter: str) -> None:
    assert read_letter(text, 4, OPTIONS) == letter


@pytest.mark.parametrize("text", NO_ANSWER)
def test_what_is_no_answer(text: str) -> None:
    assert read_letter(text, 4, OPTIONS) is None


def test_more_options_have_more_letters_and_a_letter_goes_before_an_options_text() -> None:
    assert [read_letter("E", n) for n in (4, 5, 26)] == [None, "E", "E"]
    assert read_letter("I see Z", 26) == "Z" and read_letter("I", 26) == "I"
    # Which letter is shown? (A) B (B) A
    assert read_letter("A", 2, ("B", "A")) == "A" and read_letter("The answer is B", 2, ("B", "A")) == "B"
    assert read_letter("cat", 2, ("cat", "Cat.")) is None  # two options say so


@given(
    count=st.integers(1, 26),
    data=st.data(),
    form=st.sampled_from(["{}", "({})", "{}.", "**{}**", "The answer is {}.", "Answer: {}", "Answer: ({})", "It is so, hence {}"]),
)  # fmt: skip
def test_every_letter_is_read_in_every_form(count: int, data: st.DataObject, form: str) -> None:
    letter = chr(ord("A") + data.draw(st.integers(0, count - 1)))
    assert read_letter(form.format(letter), count) == letter


@given(text=st.text(max_size=40), count=st.integers(1, 26))
def test_a_reading_is_a_letter_of_the_question(text: str, count: int) -> None:
    found = read_letter(text, count, [f"option {i}" for i in range(count)])
    assert found is None or found in [chr(ord("A") + i) for i in range(count)]


def question(
    gold: str, output: str, choices: tuple[str, ...] = ("A", "B"), number: int = 0, **more: Any
) -> dict[str, Any]:
    record = {"suite": "s", "id": str(number), "kind": "all", "gold": gold, "output": output}
    return {**record, "choices": list(choices), "meta": {}, **more}


def test_choices_are_labels_or_texts() -> None:
    assert options_of(question("A", "", ("A", "B", "C"))) == (3, ())
    assert options_of(question("A", "", ("(a)", "(b)"))) == (2, ())
    assert options_of(question("A", "", ("cat", "dog"))) == (2, ("cat", "dog"))
    labelled = question("A", "", ("A", "B"), meta={"options": ["cat", "dog"]})
    assert options_of(labelled) == (2, ("cat", "dog"))
    assert options_of(question("A", "", (), meta={"options": ["cat", "dog"]})) == (2, ("cat", "dog"))
    for broken in (
        question("A", "", ()),
        question("A", "", ("A", "B", "C"), meta={"options": ["cat", "dog"]}),
    ):
        with pytest.raises(UserError, match=r"suite s, 0: needs 1 to 26 options"):
            options_of(broken)


def test_gold_may_be_decorated_or_an_options_text() -> None:
    letter = make("letter")
    for gold in ("B", "b", "(b)", "B.", "dog", "Dog."):
        (marked,), _ = letter.score([question(gold, "(b)", ("cat", "dog"))])
        assert marked["parsed"] == "B" and marked["right"] and marked["gold"] == gold
    for gold in ("C", "bird", ""):
        with pytest.raises(UserError, match=f"gold '{gold}' is none of its 2 options"):
            letter.score([question(gold, "A", ("cat", "dog"))])


def test_accuracy_chance_and_majority_by_kind() -> None:
    two, four = ("A", "B"), ("A", "B", "C", "D")
    records = [
        question("A", "A", two, 0, kind="two"),
        question("A", "B", two, 1, kind="two"),
        question("B", "banana", two, 2, kind="two"),
        question("(d)", "The answer is D", four, 3, kind="four"),
    ]
    _, scores = make("letter").score(records)
    values = {name: measure.value for name, measure in scores.measures.items()}
    assert values == {"accuracy": 0.5, "chance": (0.5 * 3 + 0.25) / 4, "majority": 0.5, "unparsed": 0.25}
    assert scores.measures["accuracy"].standard_error == pytest.approx(0.25)
    assert {kind: row["accuracy"].value for kind, row in scores.by_kind.items()} == {
        "two": pytest.approx(1 / 3),
        "four": 1.0,
    }
    assert scores.by_kind["two"]["majority"].value == pytest.approx(2 / 3)
    assert scores.as_dict()["scorer"] == "letter/1"
