"""`opsin data inspect`: sizes, lengths, template sentences, and tokens as a model reads them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from opsin.data.schema import COLUMNS, Role
from opsin.data.sentences import SIDECAR
from opsin.models.export import export_model
from opsin.models.vlm import VisionLanguageModel
from opsin.training.inspect_data import COLOURS, coloured, histogram, summary

import jobs
import runs
import zoo

pytestmark = pytest.mark.usefixtures("own_cache")


def text(shown: Any) -> str:
    console = Console(width=120, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(shown)
    return console.export_text()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 samples of the zoo: one template sentence, one sample whose answer is empty."""
    from streaming import MDSWriter

    out = tmp_path_factory.mktemp("data") / "mds"
    with MDSWriter(out=str(out), columns=COLUMNS, hashes=["sha1"]) as mds:
        for i in range(60):
            sample = zoo.sample(i, images=i % 3, turns=1 + i % 2)
            for turn in sample["conversations"][::2]:
                turn["value"] += " Use a single word."
            if i == 7:
                sample["conversations"][1]["value"] = " "
            mds.write(sample)
    return out


def test_tokens_have_the_colours_of_their_roles() -> None:
    encoder = jobs.collator(zoo.build("llava")).encoder
    sample = zoo.sample(3, images=2)
    document = encoder(sample)
    shown = coloured(document, encoder.tokenizer, encoder.images.image_token_id)
    by_colour: dict[str, str] = {}
    for span in shown.spans:
        by_colour[str(span.style)] = by_colour.get(str(span.style), "") + shown.plain[span.start : span.end]
    assert by_colour[COLOURS[Role.IMAGE]].count("[<image> x 16]") == 2
    assert "What colour is the" in by_colour[COLOURS[Role.INSTRUCTION]]
    assert sample["conversations"][1]["value"] in by_colour[COLOURS[Role.RESPONSE]]
    assert "USER:" in by_colour[COLOURS[Role.MARKER]]
    assert sum(span.end - span.start for span in shown.spans) == len(shown.plain)


def test_lengths_as_a_histogram() -> None:
    lengths = [3] * 50 + [7] * 25 + [99]
    assert summary(lengths, "tokens") == "tokens a sample: half have 3 to 7, median 3, longest 99"
    lines = text(histogram(lengths)).splitlines()
    assert lines[0].split() == ["0-9", "█" * 40, "75"]
    assert lines[-1].split() == ["90-99", "█", "1"] and len(lines) == 10
    assert summary([], "words") == "no sample has words"


def test_the_command(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, said, _ = runs.typed(monkeypatch, capsys, "inspect", str(data), "--samples", "1")
    assert code == 0 and "60 samples in 1 shards; of the first 60: 1.00 pictures and 1.50 exchanges" in said
    assert "words a sample: half have" in said and "human: What colour is the" in said
    assert re.search(r"template sentences of the first 60 samples: 1 in \d+ user turns", said)
    assert "use a single word" in said
    built = zoo.build("llava")
    model = tmp_path / "model"
    export_model(VisionLanguageModel(built.hf, built.processor), model, notes={"chat_template": "chatml"})
    typed = ("inspect", str(data), "--samples", "2", "--model", str(model))
    code, said, _ = runs.typed(monkeypatch, capsys, *typed)
    assert code == 0 and "tokens a sample: half have" in said and "roles: system  marker  image" in said
    assert "[<image> x 16]" in said and "<|im_start|>user" in said
    assert "cannot be used by this model: 1 empty_answer" in said
    code, said, _ = runs.typed(monkeypatch, capsys, *typed, "--chat-template", "vicuna_v1")
    assert code == 0 and "USER:" in said
    code, _, said = runs.typed(monkeypatch, capsys, *typed, "--chat-template", "vicunna_v1")
    assert code == 2 and "did you mean 'vicuna_v1'" in said
    code, _, said = runs.typed(
        monkeypatch, capsys, "inspect", str(data), "--model", str(tmp_path / "nothing")
    )
    assert code == 2 and "no run folder, no model folder" in said
    assert not (data / SIDECAR).exists()  # it only looks
