"""Sentences that ask a picture nothing specific: "Describe the picture.", "What do you see?", "Write a caption."

ViFT trains perception on captions alone, so a question about something *in* the picture must never pass for a prompt. A
sentence is one only if all of it fits a pattern: every word has its place in a closed vocabulary, in which the only thing
that can be described is the picture itself. What is missed costs a caption, and the user sees the sentence in the report
(``--prompts`` takes more of them); what passes wrongly would teach an answer to a question.

Source: ViFT (arXiv 2502.11427) trains on captions and text-only instructions; which sentences are prompts is not given there.
These patterns are Opsin's own, and of English alone.
"""

from __future__ import annotations

import re

LONGEST = 200
"""A longer sentence is no prompt; it also bounds what a pattern has to look through."""

_NUMBER = r"(?:two|three|four|five|six|\d+)"
_THING = r"(?:image|picture|photo|photograph|snapshot|scene)s?"
_GIVEN = r"(?:given|provided|attached|following|above|shown|displayed|presented|whole|entire|complete)"
_WHICH = rf"(?:(?:the|this|that|these|those|both|each|every|all|all of the|all of these|all the|all these) (?:{_GIVEN} )?(?:{_NUMBER} )?)"
_ONE = rf"{_WHICH}{_THING}(?: (?:above|below|here|{_GIVEN}))?"
# "the scene in the photo" is the photo; "the scene behind the man" is a part of it.
_PICTURE = (
    rf"(?:{_ONE}|(?:{_GIVEN} )?(?:image|picture|photo)|the scene (?:(?:shown|depicted) )?(?:in|of) {_ONE})"
)
_IN = rf"(?:(?:in|on|within) {_PICTURE}|here)"

_HOW = (
    r"(?:briefly|shortly|concisely|succinctly|accurately|precisely|thoroughly|carefully|closely|comprehensively|extensively"
    r"|clearly|vividly|simply|fully|completely|objectively|faithfully)"
)
_HOW = rf"(?:{_HOW}(?: (?:and|but|yet) {_HOW})?)"
_KIND = (
    r"(?:short|brief|concise|succinct|terse|compact|long|detailed|thorough|complete|comprehensive|extensive|rich|vivid|clear"
    r"|simple|accurate|precise|faithful|factual|objective|full|good|fitting|suitable|general|descriptive|informative|plain"
    r"|one-sentence|single-sentence|one-line|in-depth)"
)
_KINDS = rf"(?:(?:very )?{_KIND}(?: (?:and|but|yet))? )*"
_LENGTH = (
    rf"(?:(?:(?:just|only|about|around|at most|no more than) )?(?:(?:a|one|a single|a few|a couple of|several|some|{_NUMBER}) "
    rf"{_KINDS}(?:sentences?|paragraphs?|lines?|phrases?)|(?:a few|several|some|few|\d{{2,}}) {_KINDS}words))"
)
_MANNER = (
    r"(?:in (?:(?:some|more|great|greater|full|rich|vivid|fine|much) )?details?"
    r"|in as much detail as (?:possible|you can)|with (?:as many|as much|many|rich|all) details?(?: as (?:possible|you can))?"
    rf"|(?:in|with|using) {_LENGTH}"
    r"|in (?:your own|plain|simple) words"
    rf"|in a {_KINDS}(?:manner|way)"
    rf"|as (?:{_HOW}|{_KIND}) as (?:possible|you can)"
    rf"|{_HOW}|for me)"
)
_MANNERS = rf"(?: (?:and )?{_MANNER}){{0,3}}"

_STATE = r"(?:shown|depicted|displayed|pictured|portrayed|presented|visible|there|happening|going on|to be seen|taking place)"
_SHOWS = r"(?:shows?|depicts?|contains?|portrays?|displays?|presents?)"
# What can be seen, as the object of "describe", "tell me" ...
_SEEN = (
    rf"(?:(?:what|everything|everything that|all|all that|anything|whatever) (?:you(?: can)? (?:see|observe)|can be seen|is visible)"
    rf"(?: {_IN})?"
    rf"|what(?: is|'s) (?:{_STATE} )?{_IN}(?<!\bis here)(?<!'s here)"
    rf"|what {_PICTURE} (?:{_SHOWS}|is about|is showing))"
)
_CONTENT = rf"(?:the (?:(?:visual|overall|main|whole) )?contents?(?: of| in) {_PICTURE})"
_OBJECT = rf"(?:{_PICTURE}|{_CONTENT}|{_SEEN}|it|this)"

_DESCRIBE = rf"(?:{_MANNER} )?(?:describe|caption|summari[sz]e|depict) {_OBJECT}"
_WRITE = (
    r"(?:write|give|provide|create|compose|generate|produce|make|offer|share|formulate|add|suggest)(?: me| us)?(?: with)? "
    rf"(?:(?:a|an|one|the|your) )?{_KINDS}(?:captions?|descriptions?|summary|overview|account)"
    rf"(?: (?:of|for|about|to) {_OBJECT})?"
)
_TELL = rf"(?:tell|show) (?:me|us) (?:{_SEEN}|about {_PICTURE})|(?:say|report|state) {_SEEN}"
_LOOK = rf"(?:take a (?:close |careful )?look|look(?: {_HOW})?) at {_PICTURE}"
_ORDER = rf"(?:{_LOOK} and )?(?:{_DESCRIBE}|{_WRITE}|{_TELL}){_MANNERS}"

_ASK = (
    rf"what (?:do|can|could) (?:you|we|i) (?:see|observe)(?: {_IN})?"
    rf"|what can be seen(?: {_IN})?"
    rf"|what(?: is|'s) (?:in|on|within) {_PICTURE}"
    rf"|what(?: is|'s) {_STATE} {_IN}"
    rf"|what (?:do|does) {_PICTURE} (?:show|depict|contain|portray|display|present)"
    rf"|what(?: is|'s) {_PICTURE} (?:about|showing)"
    rf"|what (?:is|would be) (?:a|the) {_KINDS}(?:caption|description)(?: (?:of|for) {_PICTURE})?"
    rf"|how would you (?:{_HOW} )?(?:describe|caption|summari[sz]e) {_PICTURE}"
)
_POLITE = (
    r"(?:please |kindly |(?:can|could|would|will) you (?:please |kindly )?"
    r"|i (?:want|need|would like) you to |i'd like you to )"
)
_PROMPT = re.compile(rf"(?:{_POLITE}?(?:{_ORDER}|{_LOOK}(?: {_HOW})?)|(?:{_ASK}){_MANNERS})(?: please)?")

PATTERN_SOURCE = _PROMPT.pattern
"""What decides; it names the built-in prompts where a job is compared with an earlier one."""


def is_caption_prompt(key: str) -> bool:
    """Whether a sentence asks a picture nothing specific.

    Args:
        key: as :func:`opsin.data.sentences.sentence_key` makes it: casefolded, white space collapsed, no closing
            punctuation. The empty key is no prompt: it is no sentence.
    """
    if len(key) > LONGEST:
        return False
    plain = " ".join(key.replace("’", "'").replace(",", " ").lstrip("\"'“‘*-–( ").split())
    return _PROMPT.fullmatch(plain) is not None
