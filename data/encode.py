"""One stored sample -> one document of tokens, each of which knows its role, turn and sentence.

The text is rendered once and tokenised once with offsets; roles and sentences come from character spans.
A sample that cannot be used is refused with a reason, never half used.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from PIL import Image

from ..models.errors import UserError
from ..models.geometry import EncodedImage, ImageEncoder
from .chat import BadConversation, ChatTemplate, Segment, asked_alone, exchanges, render
from .patch_targets import attach
from .pieces import Piece, common_trunk, expand, joined, tokenise
from .schema import IMAGE_MARK, stable_hash, unpack_images


class Status(IntEnum):
    """Why a sample is blank in its batch (``sample_status``); 0: it is used."""

    USED = 0
    BAD_CONVERSATION = 1
    IMAGE_COUNT = 2
    UNREADABLE_IMAGE = 3
    EMPTY_ANSWER = 4
    TOO_LONG = 5
    REFUSED = 6
    PADDING = 7
    """No sample: it fills the last batch of an epoch, and is not counted."""


class Rejected(Exception):
    """A sample cannot be used."""

    def __init__(self, status: Status, detail: str):
        super().__init__(f"{status.name.lower()}: {detail}")
        self.status = status
        self.detail = detail


@dataclass
class Document:
    """One sample as tokens. n tokens, all arrays (n,) unless said.

    Attributes:
        input_ids: int64.
        roles: int8, :class:`~opsin.data.schema.Role`.
        turn_ids: int16, exchange the token belongs to; -1 before the first.
        branch_ids: int16, 0 for what all share; 1.. for independent questions about the same picture.
        image_ids: int16, ordinal of the picture in this document; -1 for text.
        sentence_ids: int64, stable hash of the instruction sentence the token lies in; 0: none.
        position_ids: int64, (n,) or (3, n).
        images: the pictures, in order; ``image_starts[i]`` is the index of picture i's first token.
        uid: stable sample id, 1 .. 2**63 - 1.
        visit: how often this sample was served before.
        truncated_turns: exchanges that did not fit and were left out whole.
    """

    input_ids: np.ndarray
    roles: np.ndarray
    turn_ids: np.ndarray
    branch_ids: np.ndarray
    image_ids: np.ndarray
    sentence_ids: np.ndarray
    position_ids: np.ndarray
    images: list[EncodedImage]
    image_starts: list[int]
    uid: int
    visit: int = 0
    truncated_turns: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)


class ConversationEncoder:
    """Turns stored samples into documents. Picklable: it lives in data-loader workers.

    Args:
        tokenizer: a fast Hugging Face tokenizer (offsets are needed).
        images: the family's image encoder.
        template: chat template, filled in for the tokenizer.
        max_seq_len: longest document in tokens; whole exchanges are dropped from the end to fit.
        turns: ``meta`` (as the sample's ``meta.turns`` says, else chained), ``chained`` or ``independent``.

    Raises:
        UserError: the tokenizer has no offsets, or does not know the image token.
    """

    def __init__(
        self,
        tokenizer: Any,
        images: ImageEncoder,
        template: ChatTemplate,
        *,
        max_seq_len: int = 2048,
        turns: str = "meta",
    ):
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(f"{type(tokenizer).__name__} has no character offsets: load the fast tokenizer")
        if turns not in ("meta", "chained", "independent"):
            raise UserError(f"turns '{turns}': use meta, chained or independent")
        probe = tokenizer(images.placeholder, add_special_tokens=False)["input_ids"]
        if probe.count(images.image_token_id) != 1:
            raise UserError(
                f"the tokenizer splits the image token {images.placeholder!r} into {len(probe)} pieces; "
                f"add it as a special token with id {images.image_token_id}"
            )
        self.tokenizer = tokenizer
        self.images = images
        self.template = template
        self.max_seq_len = max_seq_len
        self.turns = turns

    def __call__(self, sample: Mapping[str, Any], visit: int = 0) -> Document:
        """Encode one sample (columns of ``schema.COLUMNS``).

        Raises:
            Rejected: the sample cannot be used; ``status`` and ``detail`` say why.
            UserError: its stored targets are not those of its pictures and this model.
        """
        try:
            system, pairs = exchanges(sample["conversations"])
        except BadConversation as error:
            raise Rejected(Status.BAD_CONVERSATION, str(error)) from error
        for turn, (_, answer) in enumerate(pairs):
            if not answer.strip():
                raise Rejected(Status.EMPTY_ANSWER, f"exchange {turn} has no answer")
        pictures = self.pictures(sample, pairs)
        uid = sample.get("uid") or stable_hash(sample["id"])
        if len(pairs) > 1 and self.independent(sample):
            try:
                questions = asked_alone([user for user, _ in pairs])
            except BadConversation as error:
                raise Rejected(Status.BAD_CONVERSATION, str(error)) from error
            alone = [(question, answer) for question, (_, answer) in zip(questions, pairs, strict=True)]
            return self._independent(system, alone, pictures, uid, visit)
        return self._chained(system, pairs, pictures, uid, visit)

    def independent(self, sample: Mapping[str, Any]) -> bool:
        """Whether the exchanges of a sample are questions that do not build on each other."""
        if self.turns == "meta":
            meta = sample.get("meta")
            return isinstance(meta, Mapping) and meta.get("turns") == "independent"
        return self.turns == "independent"

    def prompt(self, system: str | None, pairs: list[tuple[str, str]], sample: Mapping[str, Any]) -> Document:
        """Exchanges whose last response is left open, for generation; the pictures are the sample's.

        Raises:
            Rejected: the pictures do not fit the text, or the prompt is longer than ``max_seq_len``.
        """
        shown = self.pictures(sample, pairs)
        segments = render(system, pairs, self.template, self.images.placeholder, open_response=True)
        piece = self.tokenise(segments, shown)
        if len(piece.ids) > self.max_seq_len:
            raise Rejected(
                Status.TOO_LONG, f"the prompt has {len(piece.ids)} tokens, more than {self.max_seq_len}"
            )
        return self.branched(piece, (), shown, 1)

    def pictures(self, sample: Mapping[str, Any], pairs: Sequence[tuple[str, str]]) -> list[EncodedImage]:
        """Decode and process; the first pictures are enough where the last exchanges are left out.

        Raises:
            Rejected: they do not fit the marks in the text, or one cannot be read.
        """
        marks = sum(user.count(IMAGE_MARK) for user, _ in pairs)
        try:
            encoded = unpack_images(sample["images"])
        except ValueError as error:
            raise Rejected(Status.UNREADABLE_IMAGE, str(error)) from error
        total = sum(
            t.get("value", "").count(IMAGE_MARK) for t in sample["conversations"] if t.get("from") == "human"
        )
        if total != len(encoded) or any(IMAGE_MARK in answer for _, answer in pairs):
            raise Rejected(
                Status.IMAGE_COUNT, f"{total} image marks in the questions, {len(encoded)} pictures"
            )
        images = []
        for i, data in enumerate(encoded[:marks]):
            try:
                with Image.open(io.BytesIO(data)) as picture:
                    images.append(self.images.encode(picture.convert("RGB")))
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                raise Rejected(Status.UNREADABLE_IMAGE, f"picture {i}: {error}") from error
        attach(sample, encoded, images)
        return images

    def _chained(
        self,
        system: str | None,
        pairs: list[tuple[str, str]],
        images: list[EncodedImage],
        uid: int,
        visit: int,
    ) -> Document:
        kept = len(pairs)
        while kept:
            shown = images[: sum(user.count(IMAGE_MARK) for user, _ in pairs[:kept])]
            piece = self.tokenise(render(system, pairs[:kept], self.template, self.images.placeholder), shown)
            if len(piece.ids) <= self.max_seq_len:
                return self.branched(piece, (), shown, uid, visit, len(pairs) - kept)
            # Each exchange has a known number of tokens: go straight to the number of exchanges that fit.
            ends = np.searchsorted(np.maximum.accumulate(piece.turns), np.arange(kept), side="right")
            kept = min(kept - 1, int((ends <= self.max_seq_len).sum()))
        raise Rejected(Status.TOO_LONG, f"the first exchange alone has more than {self.max_seq_len} tokens")

    def _independent(
        self,
        system: str | None,
        pairs: list[tuple[str, str]],
        images: list[EncodedImage],
        uid: int,
        visit: int,
    ) -> Document:
        """Questions that share the picture: one trunk, one branch a question, each as if it stood alone."""
        pieces = []
        for turn, pair in enumerate(pairs):
            segments = render(system, [pair], self.template, self.images.placeholder, first_turn=turn)
            pieces.append(self.tokenise(segments, images))
        trunk = common_trunk(pieces)
        shared = pieces[0].cut(slice(0, trunk))
        shared.turns, shared.starts = np.full(trunk, -1, dtype=np.int16), pieces[0].starts
        branches, length = [], trunk
        for piece in pieces:
            branch = piece.cut(slice(trunk, None))
            if length + len(branch.ids) > self.max_seq_len:
                break
            branches.append(branch)
            length += len(branch.ids)
        if not branches:
            raise Rejected(
                Status.TOO_LONG, f"the first exchange alone has more than {self.max_seq_len} tokens"
            )
        return self.branched(shared, branches, images, uid, visit, len(pairs) - len(branches))

    def branched(
        self,
        trunk: Piece,
        branches: Sequence[Piece],
        images: list[EncodedImage],
        uid: int,
        visit: int = 0,
        truncated: int = 0,
    ) -> Document:
        """A document of a trunk that holds the pictures and of branches, each as if it followed the trunk alone."""
        whole = joined([trunk, *branches])
        lengths = [len(b.ids) for b in branches]
        positions = self.images.positions(trunk.images, images)
        following = int(positions.max(initial=-1)) + 1
        after = following + np.concatenate([np.arange(0), *(np.arange(n) for n in lengths)])
        tail = after if positions.ndim == 1 else np.broadcast_to(after, (positions.shape[0], len(after)))
        return Document(
            input_ids=whole.ids,
            roles=whole.roles,
            turn_ids=whole.turns,
            branch_ids=np.repeat(np.arange(len(branches) + 1), [len(trunk.ids), *lengths]).astype(np.int16),
            image_ids=whole.images,
            sentence_ids=whole.sentences,
            position_ids=np.concatenate([positions, tail], axis=-1),
            images=images,
            image_starts=trunk.starts,
            uid=int(uid),
            visit=visit,
            truncated_turns=truncated,
        )

    def tokenise(self, segments: Sequence[Segment], images: Sequence[EncodedImage]) -> Piece:
        """Rendered segments as tokens, pictures put in.

        Raises:
            Rejected: the text has another number of image tokens than there are pictures.
        """
        piece = tokenise(self.tokenizer, self.images.image_token_id, segments)
        if int((piece.images == 0).sum()) != len(images):
            raise Rejected(Status.IMAGE_COUNT, "the text itself contains the model's image token")
        return expand(piece, images, self.images.image_token_id)
