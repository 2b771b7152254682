"""Who may look at whom: per-token data and the one predicate over them.

:func:`rule` is the predicate. It is a monotone formula (no "not") of a few elementary statements about a query and
a key, :class:`Atoms`: the key does not come later, both belong to one document, and so on. What the atoms are
about is left open: about two tokens, the formula is the attention mask; about two blocks of tokens (some pair of
them may fulfil it; all pairs must), it is FlexAttention's block mask. No form can therefore disagree with another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Visibility:
    """Per-token data from which :func:`rule` decides. Every tensor is (B, L); small dtypes are faster.

    Attributes:
        valid: bool, False for padding.
        document: int, documents packed into one row do not see each other. None: one a row.
        branch: int, 0 for a document's trunk; branches (independent questions) see trunk and themselves. None
            exactly where ``document`` is: there are none.
        image: int, ordinal of the image within its row, -1 for text.
        bidirectional: bool, image tokens with True see all tokens of their own image; None: all causal.
        closed: bool, queries that see nothing but, within their scope, ``context`` tokens and tokens that
            share one of their group bits, and ``preceding`` tokens; not even themselves, unless one of these
            says so. Whoever fills it leaves each closed query something to see: a softmax over nothing is
            NaN. Padding is never closed. None: no such queries. Needs ``context`` and ``group_bits``.
        context: bool, tokens that closed queries of the same scope see.
        group_bits: int, groups a token belongs to, one bit each (of int64 all but the sign's). uint8 where eight
            are enough: with int64 a dense mask takes several times as long.
        hidden: bool, image tokens that no open query sees (closed queries go by ``context`` and groups).
        scope: int, what closed queries see through ``context`` and groups shares their scope (one picture may
            have two views, each masked on its own); -1: none. None: the image ordinal.
        preceding: bool, tokens that closed queries see besides where they come first (``k <= q``), whatever
            their scope: the text before a picture. None: none.
        position: int, where a token is in its document, a branch going on after the trunk. None: its place in the row.
        window: what comes first is seen only if it is fewer positions away than this; a bidirectional image and
            ``context`` and groups of closed queries are seen whole. None: however far away.
    """

    valid: torch.Tensor
    document: torch.Tensor | None
    branch: torch.Tensor | None
    image: torch.Tensor
    bidirectional: torch.Tensor | None = None
    closed: torch.Tensor | None = None
    context: torch.Tensor | None = None
    group_bits: torch.Tensor | None = None
    hidden: torch.Tensor | None = None
    scope: torch.Tensor | None = None
    preceding: torch.Tensor | None = None
    position: torch.Tensor | None = None
    window: int | None = None

    def with_terms(self, **terms: Any) -> Visibility:
        """The same, with some of the optional fields set."""
        return replace(self, **terms)

    def to(self, device: torch.device) -> Visibility:
        """The same on another device."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{n: v.to(device) for n, v in moved.items() if isinstance(v, torch.Tensor)})


# Flags of a pair: a flag is up where the query asks for it and the key offers it.
CAUSAL = 1  # open query, key not hidden: seen where it does not come later
PRECEDING = 2  # closed query, preceding key: the same
ITSELF = 4  # open query: sees itself, whatever else holds
NOT_LATER = CAUSAL | PRECEDING

NOT_ASKED, NOT_OFFERED = -1, -2
"""Ordinals of no image, of queries and of keys: never the same."""


@dataclass(frozen=True)
class Tokens:
    """What :func:`rule` wants to know of each token in one role, query or key; all (B, L).

    Attributes:
        flags: uint8, what a query asks for, or what a key offers.
        document, branch: int; None where there is one document a row and no branch.
        off_trunk: int like ``branch``: all bits in branches, none in a trunk.
        image: int; ``NOT_ASKED`` for queries that are not bidirectional, ``NOT_OFFERED`` for keys that no such query
            sees, so that one comparison says it all. None where no query is bidirectional.
        scope: int; None where no query is closed.
        groups: int, bits, the last one for context: all closed queries have it, and context keys. No bit at all for
            queries that go by no groups, and for padded keys. None like ``scope``.
        reach: int, a key's position, or the last position that is too far away for a query. None: none is.
    """

    flags: torch.Tensor
    document: torch.Tensor | None
    branch: torch.Tensor | None
    off_trunk: torch.Tensor | None
    image: torch.Tensor | None
    scope: torch.Tensor | None
    groups: torch.Tensor | None
    reach: torch.Tensor | None = None

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Tokens:
        """The same with each tensor changed."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {k: None if value is None else change(value) for k, value in own.items()}
        return Tokens(**changed)


def _flags(up: dict[int, torch.Tensor]) -> torch.Tensor:
    """uint8 of which each flag is set where its (B, L) bool says so."""
    return torch.stack([where.to(torch.uint8) * flag for flag, where in up.items()]).sum(0, dtype=torch.uint8)


def _narrow(ordinal: torch.Tensor) -> torch.Tensor:
    """Ordinals fit in 32 bits; what is made of them is as large as a mask."""
    return ordinal.int() if ordinal.dtype == torch.int64 else ordinal


_WIDER = {torch.uint8: torch.int16, torch.int16: torch.int32}
"""An integer with a bit to spare."""


def _with_context(groups: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """Groups with one bit more, up where ``context`` is: of the next wider integer, the sign's of one of 64 bits."""
    bit = -(1 << 63) if groups.dtype == torch.int64 else 1 << 8 * groups.element_size()
    wider = _WIDER.get(groups.dtype, torch.int64)
    return groups.to(wider) | torch.where(context, bit, 0).to(wider)


def queries_and_keys(see: Visibility) -> tuple[Tokens, Tokens]:
    """Every token as query and as key. All that concerns one token is decided here, at the cost of O(B * L)."""
    asking = offered = document = branch = off_trunk = None
    if see.document is not None and see.branch is not None:
        document, branch = _narrow(see.document), _narrow(see.branch)
        off_trunk = -(branch != 0).to(branch.dtype)
    scope = of_queries = of_keys = None
    everywhere = torch.ones_like(see.valid)
    opened = everywhere if see.closed is None else ~see.closed
    shown = see.valid if see.hidden is None else see.valid & ~see.hidden
    asks, offers = {CAUSAL: opened, ITSELF: opened}, {CAUSAL: shown, ITSELF: everywhere}
    if see.bidirectional is not None:
        image = _narrow(see.image)
        asking = torch.where(opened & see.bidirectional & (image >= 0), image, NOT_ASKED)
        offered = torch.where(shown & (image >= 0), image, NOT_OFFERED)
    if see.closed is not None:
        assert see.context is not None and see.group_bits is not None, "closed needs context and group_bits"
        scope = _narrow(see.image if see.scope is None else see.scope)
        scoped = see.closed & (scope >= 0)
        of_queries = _with_context(see.group_bits, everywhere).masked_fill(~scoped, 0)
        of_keys = _with_context(see.group_bits, see.context).masked_fill(~see.valid, 0)
        if see.preceding is not None:
            asks[PRECEDING], offers[PRECEDING] = see.closed, see.valid & see.preceding
    beyond = position = None
    if see.window is not None:
        if see.position is None:
            position = torch.arange(see.valid.shape[1], dtype=torch.int32, device=see.valid.device)
            position = position.expand(see.valid.shape)
        else:
            position = _narrow(see.position)
        beyond = position - see.window
    return (
        Tokens(_flags(asks), document, branch, off_trunk, asking, scope, of_queries, beyond),
        Tokens(_flags(offers), document, branch, off_trunk, offered, scope, of_keys, position),
    )


@dataclass(frozen=True)
class Atoms:
    """Elementary statements about a query and a key (or two blocks); shapes broadcast against each other.

    Attributes:
        flags: uint8, flags that the query asks for and the key offers.
        place: uint8, flags that hold where the two are: ``NOT_LATER`` where the key does not come later and is within
            the query's window, ``ITSELF`` where they are one token.
        together: bool, one document, and the key in its trunk or in the query's branch; None: always.
        image: bool, a bidirectional query and a key of its image; None as in :class:`Tokens`.
        scope: bool, both have the same; None as in :class:`Tokens`.
        group: bool, both belong to one group, or a closed query meets context; None like ``scope``.
    """

    flags: torch.Tensor
    place: torch.Tensor
    together: torch.Tensor | None
    image: torch.Tensor | None
    scope: torch.Tensor | None
    group: torch.Tensor | None


def rule(atoms: Atoms) -> torch.Tensor:
    """Whether the query may attend to the key: the predicate.

    Packed documents follow their own causal order; images may be bidirectional; closed queries are those of
    a masked-prediction method (JARVIS fact sheet, section 3.3, is one filling of these fields). Every other
    token, padding too, may always look at itself, so that no softmax runs over nothing.

    It must stay monotone in its atoms: block masks rest on that. Each operation here writes one more tensor of the
    mask's size, which is what making a mask costs.
    """
    near = atoms.flags & atoms.place
    seen = near.bool() if atoms.together is None else (near & NOT_LATER).bool()
    if atoms.image is not None:
        seen = seen | atoms.image
    if atoms.scope is not None:
        assert atoms.group is not None
        seen = seen | (atoms.scope & atoms.group)
    if atoms.together is not None:
        seen = (seen & atoms.together) | (near & ITSELF).bool()
    return seen


def places(not_later: torch.Tensor, itself: torch.Tensor) -> torch.Tensor:
    """``Atoms.place`` of two bools."""
    return not_later.to(torch.uint8) * NOT_LATER | itself.to(torch.uint8) * ITSELF


def of_tokens(query: Tokens, key: Tokens, q: torch.Tensor, k: torch.Tensor) -> Atoms:
    """The atoms about single tokens at positions ``q`` and ``k``; everything broadcasts against each other.

    Equality is written with "xor": with a broadcast side it is several times faster than ``==`` on a CPU. There,
    too, a key before its query makes the faster operation.
    """

    def both(key: torch.Tensor | None, query: torch.Tensor | None, as_one: bool) -> torch.Tensor | None:
        if key is None or query is None:
            return None
        return ~(key ^ query).bool() if as_one else (key & query).bool()

    together = None
    if key.document is not None and key.off_trunk is not None:
        assert query.document is not None and key.branch is not None and query.branch is not None
        together = ~((key.document ^ query.document) | ((key.branch ^ query.branch) & key.off_trunk)).bool()
    not_later = k <= q
    if key.reach is not None and query.reach is not None:
        not_later = not_later & (key.reach > query.reach)
    return Atoms(
        flags=key.flags & query.flags,
        place=places(not_later, q == k),
        together=together,
        image=both(key.image, query.image, as_one=True),
        scope=both(key.scope, query.scope, as_one=True),
        group=both(key.groups, query.groups, as_one=False),
    )
