"""A small Llama with random weights and its own tokenizer. Nothing is downloaded, and every run makes the same files.

The demonstration, the benchmarks and the tests use it. It needs torch, transformers and tokenizers, but not vLLM.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_adrenaline.system.folders import cache_folder
from vllm_adrenaline.workload.text import TEXT

# Part of the cache key: raise it when the files made from the same parameters change.
RECIPE = 1
HEAD_DIMS = (32, 64, 128)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """The sizes and the seed of a model: everything that decides what its files hold."""

    seed: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocab: int
    max_position: int

    @property
    def name(self) -> str:
        """Return a folder name that is unique: the main sizes, for people, and a digest of everything."""
        digest = hashlib.sha256(json.dumps([RECIPE, asdict(self), TEXT]).encode()).hexdigest()[:10]
        return f"llama-{self.layers}x{self.hidden}-h{self.heads}k{self.kv_heads}-{digest}"


def make_model(
    folder: Path | None = None,
    *,
    seed: int = 0,
    layers: int = 4,
    hidden: int = 256,
    heads: int = 8,
    kv_heads: int = 4,
    head_dim: int | None = None,
    inner: int | None = None,
    vocab: int = 2048,
    max_position: int = 4096,
) -> Path:
    """Return the path of the model with these sizes, and make it if it is not there.

    It is below `folder`, or in the user's cache for None. `inner` is the width of the MLP, by default three times
    `hidden`. Raises ValueError for sizes that no attention kernel or tokenizer can have.
    """
    head_dim = head_dim or hidden // heads
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"head_dim is {head_dim}; attention kernels need one of {HEAD_DIMS}")
    if heads % kv_heads:
        raise ValueError(f"{heads} heads cannot share {kv_heads} KV heads evenly")
    shape = Shape(seed, layers, hidden, heads, kv_heads, head_dim, inner or 3 * hidden, vocab, max_position)
    parent = folder or cache_folder("models")
    target = parent / shape.name
    if target.is_dir():
        return target
    parent.mkdir(parents=True, exist_ok=True)
    # Other processes see the whole folder or none: it is filled beside its place, then renamed.
    unfinished = Path(tempfile.mkdtemp(prefix=f".{shape.name}.", dir=parent))
    try:
        _write_tokenizer(unfinished, shape)
        _write_weights(unfinished, shape)
        unfinished.chmod(0o755)
        try:
            unfinished.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return target


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _write_tokenizer(folder: Path, shape: Shape) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    special = ["<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=shape.vocab,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT.splitlines(), trainer)
    # The text is too short for a large vocabulary; every id that the model can emit must still decode to something.
    missing = shape.vocab - tokenizer.get_vocab_size()
    if missing < 0:
        raise ValueError(f"vocab is {shape.vocab}; a byte-level tokenizer needs at least 261 tokens")
    tokenizer.add_tokens([f"~{number}" for number in range(missing)])
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": special[0],
            "eos_token": special[1],
            "pad_token": special[1],
            "model_max_length": shape.max_position,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
        },
    )


def _write_weights(folder: Path, shape: Shape) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.max_position,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        dtype="float32",
    )
    config.save_pretrained(folder)
    _write_json(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 1, "do_sample": False})
    random = torch.Generator().manual_seed(shape.seed)

    def linear(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        return torch.randn(rows, columns, generator=random) * (gain / math.sqrt(columns))

    hidden, q_size, kv_size = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    tensors = {
        # A quarter of the layers' own output: the next token then depends on the history, not on the last token alone.
        "model.embed_tokens.weight": torch.randn(shape.vocab, hidden, generator=random) * 0.25,
        "model.norm.weight": torch.ones(hidden),
        "lm_head.weight": linear(shape.vocab, hidden, 2.0),
    }
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        tensors |= {
            # Sharper than unit variance: attention that picks tokens shows a wrong history sooner than a flat average.
            f"{prefix}self_attn.q_proj.weight": linear(q_size, hidden, 2.0),
            f"{prefix}self_attn.k_proj.weight": linear(kv_size, hidden),
            f"{prefix}self_attn.v_proj.weight": linear(kv_size, hidden),
            f"{prefix}self_attn.o_proj.weight": linear(hidden, q_size),
            f"{prefix}mlp.gate_proj.weight": linear(shape.inner, hidden),
            f"{prefix}mlp.up_proj.weight": linear(shape.inner, hidden),
            f"{prefix}mlp.down_proj.weight": linear(hidden, shape.inner),
            f"{prefix}input_layernorm.weight": torch.ones(hidden),
            f"{prefix}post_attention_layernorm.weight": torch.ones(hidden),
        }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
