"""Models of the shapes of large ones, with random weights, made on the GPU: nothing is downloaded."""

from __future__ import annotations

import torch
import transformers
from tokenizers import Tokenizer, models
from transformers import DeepseekV3Config, LlamaConfig, MiniMaxM2Config, PreTrainedTokenizerFast

CONFIGS = {
    "llama-3-8b": LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, vocab_size=128256, max_position_embeddings=8192,
        tie_word_embeddings=False,
    ),
    # the first layer dense, as the first three of the model are, the others with all their 256 experts
    "deepseek-v3, 4 layers": DeepseekV3Config(
        num_hidden_layers=4, first_k_dense_replace=1, max_position_embeddings=163840,
    ),
    "minimax-m2, 4 layers": MiniMaxM2Config(
        num_hidden_layers=4, max_position_embeddings=196608,
    ),
}  # fmt: skip


def build(name: str, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    """Return the model in evaluation mode on the GPU; weights are normal with a deviation of 0.02."""
    config = CONFIGS[name]
    model_class = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        # the constructors' own initialisation is kept off: it runs on every expert, and some of it in float32
        with torch.device("cuda"), transformers.initialization.no_init_weights():
            model = model_class(config)
    finally:
        torch.set_default_dtype(before)
    for key, tensor in model.named_parameters():
        torch.nn.init.ones_(tensor) if "norm" in key else torch.nn.init.normal_(tensor, std=0.02)
    for key, tensor in model.named_buffers():
        if key.endswith("e_score_correction_bias"):
            tensor.zero_()
    return model.eval().requires_grad_(False)


def build_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer with a word for each id, so that turning ids into text costs what it does in service."""
    words = {f"w{index}": index for index in range(vocab_size)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), eos_token="w1"
    )
