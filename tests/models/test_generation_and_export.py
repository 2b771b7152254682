"""Answers in batches and one by one, packed scoring and decoding; a folder that plain transformers loads."""

from __future__ import annotations

import copy
import io
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from opsin.data.batch import split_batch
from opsin.data.collate import VLMCollator
from opsin.data.prompts import prompts_of
from opsin.evaluation.adapter import VLMAdapter
from opsin.evaluation.packed import score
from opsin.models.anatomy import image_encoder_for
from opsin.models.errors import UserError
from opsin.models.export import HEADS, describe, export_model, load_model, load_processor
from opsin.models.geometry import PER_IMAGE_KEYS, PIXEL_KEY
from opsin.models.portable import make_portable, portable_names
from opsin.models.step import Step
from opsin.models.vlm import VisionLanguageModel
from opsin.training.finished import largest_difference
from opsin.training.stage_run import copy_model

import jobs
import methods
import zoo

SPECIALS = [zoo.tokenizer().convert_tokens_to_ids(token) for token in zoo.SPECIALS]
LONG = {"suppress_tokens": SPECIALS}  # a random model may end at once, or write tokens that have no text


@lru_cache
def collator(family: str) -> VLMCollator:
    return jobs.collator(zoo.build(family))


def loud(family: str) -> zoo.Built:
    """A model whose answers depend on what it reads: random weights of the usual size hardly do."""
    built = zoo.build(family)
    with torch.no_grad():
        for name, parameter in built.hf.named_parameters():
            if (
                any(p in name for p in ("language_model.layers", "text_model.layers", "merger"))
                and parameter.ndim > 1
            ):
                parameter *= 10
    return built


def fresh(family: str = "llava", **options: Any) -> VisionLanguageModel:
    built = loud(family)
    # A processor of one's own: exporting writes a chat template into it.
    return VisionLanguageModel(built.hf, copy.deepcopy(built.processor), **options).eval()


def unequal() -> list[dict[str, Any]]:
    """Prompts of very different lengths, with none, one and two pictures, chained and independent."""
    return [
        zoo.sample(0, turns=3),
        zoo.sample(1, images=0),
        zoo.sample(2, images=2, size=(40, 18)),
        zoo.sample(5, turns=3, independent=True, size=(18, 33)),
    ]


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("family", zoo.EVERY_FAMILY)
def test_answers_of_a_left_padded_batch_are_those_of_one_prompt_at_a_time(
    family: str, bidirectional: bool
) -> None:
    model = fresh(family, bidirectional_images=bidirectional)
    together, alone = (
        VLMAdapter(model, collator(family), max_new_tokens=8, batch_size=size).generate(unequal(), **LONG)
        for size in (16, 1)
    )
    assert together == alone
    assert [len(a) for a in together] == [3, 1, 1, 3] and len({t for a in together for t in a}) > 4


@pytest.mark.parametrize("family", zoo.EVERY_FAMILY)
def test_answers_are_those_of_plain_transformers(family: str) -> None:
    model = fresh(family)
    stock, encoder = loud(family).hf.eval(), collator(family).encoder
    for sample in unequal()[1:3]:
        (prompt,) = prompts_of(encoder, sample)
        batch = collator(family).layout([prompt.document])
        length = len(prompt.document)
        pixels = {k: batch[k] for k in (PIXEL_KEY, *PER_IMAGE_KEYS) if k in batch}
        types = model.anatomy.types(batch)
        pixels.update({key: value[:, :length] for key, value in types.items()})
        out = stock.generate(
            input_ids=batch["input_ids"][:, :length], attention_mask=batch["attention_mask"][:, :length],
            do_sample=False, max_new_tokens=8, pad_token_id=0, **pixels,
            suppress_tokens=SPECIALS, eos_token_id=encoder.tokenizer.eos_token_id,
        )  # fmt: skip
        expected = encoder.tokenizer.decode(out[0, length:], skip_special_tokens=True).strip()
        adapter = VLMAdapter(model, collator(family), max_new_tokens=8)
        assert adapter.generate([sample], **LONG) == [[expected]]


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("family", zoo.EVERY_FAMILY)
def test_the_packed_forward_passes_likeliest_first_token_is_the_one_generated(
    family: str, bidirectional: bool
) -> None:
    model, samples = fresh(family, bidirectional_images=bidirectional), unequal()
    micro = split_batch(collator(family)(samples), None, training=False)[0]
    logits = model.logits(micro).flatten(0, 1)[micro["label_rows"]]
    answers = micro["label_answer"]
    first = torch.cat([torch.ones(1, dtype=torch.bool), answers[1:] != answers[:-1]])
    logits[:, SPECIALS] = -torch.inf
    likeliest = zoo.tokenizer().batch_decode(logits[first].argmax(1)[:, None])
    generated = VLMAdapter(model, collator(family), max_new_tokens=1).generate(samples, **LONG)
    assert [t.strip() for t in likeliest] == [t for answer in generated for t in answer]


def test_packed_scores_are_the_verdicts_on_greedy_answers_all_through_a_training() -> None:
    model = VisionLanguageModel(zoo.build("llava").hf, zoo.build("llava").processor).train()
    samples = [zoo.sample(i, turns=1 + i % 3, independent=i % 2 == 1) for i in range(6)]
    (micro,) = split_batch(collator("llava")(samples), None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    seen = set()
    for step in range(81):
        if step % 20 == 0:
            verdicts = [s.right for s in score(model, collator("llava"), samples, batch_size=4)]
            answers = VLMAdapter(model, collator("llava"), max_new_tokens=16).generate(samples)
            gold = [[t["value"] for t in s["conversations"] if t["from"] == "gpt"] for s in samples]
            exact = [a == g for x, y in zip(answers, gold, strict=True) for a, g in zip(x, y, strict=True)]
            assert verdicts == exact
            seen.update(verdicts)
            assert model.training
        loss = model.loss(model.net(micro, Step(micro)), micro)["lm"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert seen == {True, False}


def export(folder: Path, **options: Any) -> tuple[VisionLanguageModel, Path]:
    model = fresh("llava", bidirectional_images=options.pop("bidirectional", False))
    head = methods.Read(4)
    model.net.auxiliary["mean_colour"] = head
    notes = {"chat_template": "vicuna_v1", "system_prompt": ""}
    jinja = collator("llava").encoder.template.jinja
    return model, export_model(model, folder / "out", chat_template=jinja, notes=notes, **options)


def assert_the_prompt_is_that_of_training(family: str, processor: Any) -> None:
    # The saved processor and its chat template make the very prompt that training made.
    sample = zoo.sample(2)
    (prompt,) = prompts_of(collator(family).encoder, sample)
    words = sample["conversations"][0]["value"].replace("<image>\n", "")
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": words}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    picture = Image.open(io.BytesIO(zoo.picture(2000)))
    inputs = processor(images=picture, text=text, return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == prompt.document.input_ids.tolist()
    ours = prompt.document.images[0].pixels["pixel_values"]
    assert torch.equal(inputs["pixel_values"].flatten(), ours.flatten())


def test_an_export_loads_in_plain_transformers_with_the_same_logits(tmp_path: Path) -> None:
    ours, folder = export(tmp_path)
    plain, report = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    processor = AutoProcessor.from_pretrained(folder)
    assert largest_difference(ours, plain, collator("llava"), unequal()) < 1e-4
    assert_the_prompt_is_that_of_training("llava", processor)
    assert describe(folder) == {
        "chat_template": "vicuna_v1", "system_prompt": "", "image_attention": "causal",
    }  # fmt: skip


@pytest.mark.parametrize("family", zoo.EVERY_FAMILY[1:])
def test_other_families_export_alike(family: str, tmp_path: Path) -> None:
    ours = fresh(family)
    processor = ours.processor
    if isinstance(processor, zoo.Parts):
        ours.processor = None
    jinja = collator(family).encoder.template.jinja
    folder = export_model(ours, tmp_path / "out", chat_template=jinja)
    plain = AutoModelForImageTextToText.from_pretrained(folder)
    ours.processor = processor
    assert largest_difference(ours, plain, collator(family), unequal()) < 1e-4
    if not isinstance(processor, zoo.Parts):  # the processor, too, makes the same of a picture
        loaded, config = load_processor(folder)
        assert_the_prompt_is_that_of_training(family, loaded)
        again = image_encoder_for(loaded, config)
        picture = Image.open(io.BytesIO(zoo.picture(7, (40, 18))))
        one, two = (e.encode(picture) for e in (again, collator(family).encoder.images))
        assert one.token_ids.tolist() == two.token_ids.tolist() and one.views == two.views
        assert all(torch.equal(one.pixels[k], two.pixels[k]) for k in two.pixels)


def test_heads_stay_only_where_training_goes_on(tmp_path: Path) -> None:
    ours, folder = export(tmp_path, heads=True)
    again = load_model(folder)
    assert set(again.saved_heads) == {"mean_colour"}
    assert torch.equal(again.saved_heads["mean_colour"]["line.weight"], ours.net.auxiliary["mean_colour"].line.weight)  # fmt: skip
    assert not len(again.net.auxiliary)
    copy_model(folder, tmp_path / "for use")
    assert not (tmp_path / "for use" / HEADS).exists() and not load_model(tmp_path / "for use").saved_heads
    _, without = export(tmp_path)  # replaces the folder whole
    assert not (without / HEADS).exists()
    for path in without.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert not any("mean_colour" in k or "auxiliary" in k for k in file.keys())  # noqa: SIM118


def test_a_model_with_bidirectional_images_says_so_and_load_model_restores_it(tmp_path: Path) -> None:
    ours, folder = export(tmp_path, bidirectional=True)
    assert describe(folder)["image_attention"] == "bidirectional"
    again = load_model(folder)
    assert again.net.bidirectional_images
    for sample in unequal():
        batch = collator("llava")([sample])
        assert torch.allclose(again.eval().logits(batch), ours.logits(batch), atol=1e-5)
    plain = AutoModelForImageTextToText.from_pretrained(folder)
    assert largest_difference(ours, plain, collator("llava"), unequal()) > 0.01
    answers = [
        VLMAdapter(m, collator("llava"), max_new_tokens=8).generate(unequal(), **LONG) for m in (ours, again)
    ]
    assert answers[0] == answers[1]
    # What the user asks for goes before what the folder says.
    assert not load_model(folder, bidirectional_images=False).net.bidirectional_images


def test_the_tokenizer_of_an_export_has_a_class_that_both_generations_of_transformers_know(
    tmp_path: Path,
) -> None:
    _, folder = export(tmp_path)
    saved = json.loads((folder / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (
        folder / "preprocessor_config.json"
    ).is_file()  # where transformers 4 looks for the image processor
    text = json.loads((folder / "config.json").read_text())["text_config"]
    assert text["rope_theta"] == 10000.0


def test_files_as_transformers_5_writes_them_are_completed_for_4(tmp_path: Path) -> None:
    rope = {"rope_theta": 5e5, "rope_type": "default", "mrope_section": [1, 1, 2]}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"rope_parameters": rope}, "rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}))  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "TokenizersBackend", "eos_token": "é"}))  # fmt: skip
    make_portable(tmp_path, zoo.build("llava").processor)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["text_config"]["rope_theta"] == 5e5 and config["rope_theta"] == 7.0
    assert config["text_config"]["rope_scaling"] == {"rope_type": "default", "mrope_section": [1, 1, 2]}
    assert config["text_config"]["rope_parameters"] == rope and "rope_scaling" not in config
    tokenizer = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert tokenizer == {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "é"}
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["size"] == {"shortest_edge": 16}
    before = (tmp_path / "config.json").read_text()
    make_portable(tmp_path, None)
    assert (tmp_path / "config.json").read_text() == before


def test_a_clip_towers_weights_have_the_names_of_transformers_4() -> None:
    hf = zoo.build("llava").hf
    flat = {k.replace("vision_tower.vision_model.", "vision_tower."): v for k, v in hf.state_dict().items()}
    nested = portable_names(flat, hf.config)
    assert "model.vision_tower.vision_model.embeddings.class_embedding" in nested
    assert portable_names(nested, hf.config) == nested and len(nested) == len(flat)
    other = AutoConfig.for_model("qwen2_5_vl")
    assert portable_names(flat, other) is flat


def test_an_export_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, folder = export(tmp_path)
    before = sorted(p.name for p in folder.iterdir())

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(type(model.processor), "save_pretrained", full)
    with pytest.raises(OSError, match="no space"):
        export_model(model, folder)
    assert sorted(p.name for p in folder.iterdir()) == before


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json", None])
def test_what_cannot_be_loaded_is_one_line(missing: str | None, tmp_path: Path) -> None:
    _, folder = export(tmp_path)
    if missing:
        (folder / missing).unlink()
    else:  # a tower's tensors are lost: they would stay random
        weights = load_file(folder / "model.safetensors")
        kept = {k: v for k, v in weights.items() if "vision_tower" not in k}
        save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError) as error:
        load_model(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    if missing is None:
        assert "would stay random" in str(error.value)
