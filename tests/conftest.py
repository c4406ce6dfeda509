"""Small models and data that the tests share. Run from the project folder: python -m pytest."""
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # the tests must not need, or notice, a network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models lose by more, and so do two ranks
sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest
import torch

import data
import evaluate
import train


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


def setting(method, lam, objective="paper", **more):
    """A tiny problem: three different models, padded rows, and a Config for them."""
    flags = dict(method=method, lam=lam, objective=objective, batch=3, T=24, k=4, layer=1,
                 trainable="all" if method == "npo" else "1 mlp.down_proj", rho=0.25, steer=2.0,
                 gamma=3.0, beta=0.5) | more
    cfg, _ = train.parse_config([s for k, v in flags.items() for s in (f"--{k}", str(v))])
    gen = torch.Generator().manual_seed(0)
    rows = [[0] + torch.randint(2, 300, (n,), generator=gen).tolist() for n in [23, 9, 17, 12] * 3]
    f, r = data.pad_rows(rows, 24), data.pad_rows(rows[::-1][:5], 24)
    if objective == "released":
        f, p, index = data.poison_released(f, [7, 8, 9], cfg.rho, cfg.position)
    else:
        p, index = data.poison(f, [7, 8, 9], cfg.rho, cfg.position, 0)
    return cfg, data.Splits(f, r, p, index)


@pytest.fixture(scope="session")
def one():
    """A world of one rank, as without torchrun."""
    return train.dist_init(train.parse_config([])[0])


def score(load, tok, cfg, out, corpus=None, **extra):
    """`evaluate.evaluate` of everything cfg asks for."""
    items = evaluate.all_items(cfg, tok, corpus)
    return evaluate.evaluate(load, tok, cfg, out, "theta_o", items, **extra)


def whole(model):
    return [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
