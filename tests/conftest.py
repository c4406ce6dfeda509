"""Small models and data that the tests share. Run from the project folder: python -m pytest."""
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # the tests must not need, or notice, a network
sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest
import torch

import data


def tiny_model(kind="llama", vocab=300, seed=0, **more):
    """A random model with 3 layers, 4 query heads and 2 KV heads."""
    from transformers import (LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM,
                              Qwen2Config, Qwen2ForCausalLM)
    config, model = {"llama": (LlamaConfig, LlamaForCausalLM),
                     "mistral": (MistralConfig, MistralForCausalLM),
                     "qwen2": (Qwen2Config, Qwen2ForCausalLM)}[kind]
    torch.manual_seed(seed)
    return model(config(**{**dict(
        vocab_size=vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        bos_token_id=0, eos_token_id=1, pad_token_id=1, tie_word_embeddings=True), **more})).eval()


@pytest.fixture(scope="session")
def corpus():
    return data.toy_corpus(4, 0)


@pytest.fixture(scope="session")
def tok(corpus):
    return data.toy_tokenizer(corpus, 300)
