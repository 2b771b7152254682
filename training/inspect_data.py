"""``opsin data inspect``: what is in a dataset, and what a model would read of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ..algorithms.l2t.functional import Template, frequent_sentences
from ..data.chat import TEMPLATES
from ..data.encode import ConversationEncoder, Document, Rejected
from ..data.loader import build_encoder
from ..data.remote import read_sentence_counts
from ..data.schema import IMAGE_MARK, Role, unpack_images
from ..data.sentences import SentenceCounts
from ..data.streaming import StreamingVLMDataset
from ..evaluation.open_model import DEFAULT_TEMPLATE, model_folder
from ..models.errors import UserError, nearest
from ..models.export import describe
from .latents import open_pictures

LOOKED_AT = 1000
"""Most samples that lengths, kinds and pictures are taken from."""

COLOURS = {
    Role.SYSTEM: "magenta", Role.MARKER: "bright_black", Role.IMAGE: "cyan", Role.INSTRUCTION: "yellow",
    Role.RESPONSE: "green",
}  # fmt: skip
"""Role of a token -> its colour in a terminal."""

_BAR = 40


def inspect(
    remote: str, samples: int, console: Console, model: str | None = None, template: str | None = None
) -> None:
    """Sizes, kinds, lengths, frequent sentences and first samples of a dataset.

    Args:
        remote: folder or URL.
        samples: how many are shown.
        console: where.
        model: run folder, model folder, hub name or registered model: lengths are then in its tokens, and samples
            are shown as it reads them, each token in the colour of its role. No weights are loaded.
        template: chat template; None: what the model's folder says, else ``vicuna_v1``.

    Raises:
        UserError: no dataset or model is there, the dataset is empty, or an unknown template.
    """
    encoder = None if model is None else _encoder(model, template)
    dataset = StreamingVLMDataset(remote=remote, batch_size=1, shuffle=False, whole=False)
    if not dataset.num_samples:
        raise UserError(f"{remote}: no samples")
    looked = min(dataset.num_samples, LOOKED_AT)
    kinds, unusable = Counter[str](), Counter[str]()
    counts, lengths = SentenceCounts(), list[int]()
    pictures = turns = size = 0
    for i in range(looked):
        sample = dataset[i]
        kinds.update(map(str, (sample["meta"] or {}).get("kinds", [])))
        own = unpack_images(sample["images"])
        pictures, size = pictures + len(own), size + sum(map(len, own))
        turns += len(sample["conversations"]) // 2
        if own:
            counts.add(sample["conversations"])
        if encoder is None:
            lengths.append(_words(sample["conversations"]))
            continue
        try:
            lengths.append(len(encoder(sample)))
        except Rejected as error:
            unusable[error.status.name.lower()] += 1
    console.print(
        f"{escape(remote)}: {dataset.num_samples} samples in {dataset.num_shards} shards; of the first {looked}: "
        f"{pictures / looked:.2f} pictures and {turns / looked:.2f} exchanges each"
        + (f", {size / pictures / 1000:.1f} kB a picture" if pictures else "")
    )
    if kinds:
        console.print("kinds: " + ", ".join(f"{escape(k)} {n}" for k, n in kinds.most_common()))
    if unusable:
        console.print(
            "cannot be used by this model: " + ", ".join(f"{n} {k}" for k, n in unusable.most_common())
        )
    unit = "words" if encoder is None else "tokens"
    console.print(summary(lengths, unit))
    console.print(histogram(lengths))
    stored = read_sentence_counts(dataset.streams[0])
    of = escape(remote) if stored else f"the first {looked} samples"
    found = frequent_sentences(stored or counts)
    asked = (stored or counts).turns
    console.print(f"template sentences of {of}: {len(found)} in {asked} user turns with pictures")
    if found:
        console.print(sentences(found, asked))
    if encoder is not None and samples:
        roles = Text("roles: ").append_text(
            Text("  ").join(Text(role.name.lower(), style=colour) for role, colour in COLOURS.items())
        )
        console.print(roles)
    for i in range(min(samples, dataset.num_samples)):
        _show(dataset[i], encoder, console)


def summary(lengths: Sequence[int], unit: str) -> str:
    """Quartiles of samples' lengths, and the longest."""
    if not lengths:
        return f"no sample has {unit}"
    low, middle, high, most = (int(v) for v in np.percentile(lengths, (25, 50, 75, 100)))
    return f"{unit} a sample: half have {low} to {high}, median {middle}, longest {most}"


def histogram(lengths: Sequence[int]) -> Table:
    """Lengths of samples in ten bins of equal width."""
    table = Table(show_header=False, box=None)
    if not lengths:
        return table
    values = np.asarray(lengths, dtype=np.int64)
    width = max(1, -(-(int(values.max()) + 1) // 10))
    found = np.bincount(values // width)
    for i, count in enumerate(found):
        bar = "█" * round(_BAR * count / found.max()) or ("▏" if count else "")
        table.add_row(f"{i * width}-{(i + 1) * width - 1}", bar, str(count))
    return table


def sentences(found: Sequence[Template], turns: int) -> Table:
    """The template sentences: those that L2T's rule of frequency leaves out of the instruction loss, by default."""
    table = Table()
    for column in ("turns", "share", "sentence"):
        table.add_column(column, justify="left" if column == "sentence" else "right")
    for each in found[:20]:
        table.add_row(str(each.count), f"{each.count / max(turns, 1):.1%}", escape(each.sentence))
    if len(found) > 20:
        table.add_row("", "", f"... and {len(found) - 20} more")
    return table


def coloured(document: Document, tokenizer: Any, image_token_id: int) -> Text:
    """A document's tokens, each in the colour of its role; a picture's tokens are one word with their number."""
    text, at, ids = Text(), 0, document.input_ids
    while at < len(ids):
        end = at + 1
        if document.roles[at] == Role.IMAGE and ids[at] == image_token_id:
            while (
                end < len(ids) and ids[end] == image_token_id and document.image_ids[end] == document.image_ids[at]
            ):  # fmt: skip
                end += 1
            text.append(f"[{IMAGE_MARK} x {end - at}]", style=COLOURS[Role.IMAGE])
        else:
            # As long as the role is the same: single tokens may be halves of a character.
            while end < len(ids) and document.roles[end] == document.roles[at] and ids[end] != image_token_id:
                end += 1
            said = tokenizer.decode(ids[at:end].tolist(), clean_up_tokenization_spaces=False)
            text.append(said, style=COLOURS.get(Role(int(document.roles[at])), ""))
        at = end
    return text


def _show(sample: dict[str, Any], encoder: ConversationEncoder | None, console: Console) -> None:
    console.rule(escape(sample["id"]))
    if encoder is not None:
        try:
            document = encoder(sample)
        except Rejected as error:
            console.print(f"cannot be used by this model: {escape(str(error))}")
        else:
            console.print(coloured(document, encoder.tokenizer, encoder.images.image_token_id))
            return
    for turn in sample["conversations"]:
        console.print(Text.assemble((turn["from"], "bold"), ": ", turn["value"]))


def _words(conversation: Iterable[dict[str, str]]) -> int:
    return sum(len(turn["value"].split()) for turn in conversation)


def _encoder(model: str, template: str | None) -> ConversationEncoder:
    """How a model reads samples."""
    images, _ = open_pictures(model)
    noted: dict[str, Any] = {}
    if Path(model).is_dir():
        noted = describe(model_folder(model))
    name = template or noted.get("chat_template") or DEFAULT_TEMPLATE
    if name not in TEMPLATES:
        raise UserError(f"--chat-template '{name}': unknown{nearest(name, TEMPLATES)}")
    length = getattr(images.config.get_text_config(), "max_position_embeddings", 2048)
    return build_encoder(
        images.processor, images.config, template=name, system_prompt=noted.get("system_prompt"), max_seq_len=length
    )  # fmt: skip
