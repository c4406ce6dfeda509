"""Figures' arrays against direct computations, tables against hand-made results, sweeps."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_model

import data
import evaluate
import hooks
import plots
import train

HERE = Path(__file__).parent.parent


def ids_of(B=4, T=24):
    return torch.randint(2, 300, (B, T), generator=torch.Generator().manual_seed(0))


def eager(model, ids, mask=None):
    """Attention maps of every layer, asked of transformers itself. -> L times (B, H, T, T)"""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(input_ids=ids, attention_mask=mask, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    return maps


# ---------------------------------------------------------------- hooks for the figures

@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_sink_strength_without_T_x_T_equals_eager(kind):
    model, ids = tiny_model(kind), ids_of()
    mask = torch.arange(24) < torch.tensor([24, 9, 17, 24])[:, None]  # padding on the right
    weight = mask.float()
    weight[:, 0] = 0
    direct = torch.stack([(a[..., :8] * (weight / weight.sum())[:, None, :, None]).sum((0, 2))
                          for a in eager(model, ids)])  # (L, H_q, 8)
    ours = hooks.sink_strength(model, ids, mask, keys=8, chunk=5)
    assert ours.shape == (3, 4, 8)
    assert torch.allclose(ours, direct, atol=1e-5)
    assert torch.allclose(ours[..., 0], hooks.sink_attention(model, ids, mask), atol=1e-5)


def test_attention_map_equals_eager_and_leaves_the_implementation_as_it_was():
    model, ids = tiny_model(), ids_of()
    model.set_attn_implementation("sdpa")
    ours = hooks.attention_map(model, ids, layer=-1, batch=3)
    assert model.config._attn_implementation == "sdpa"
    assert torch.allclose(ours, eager(model, ids)[-1].mean((0, 1)), atol=1e-6)
    assert torch.allclose(ours.sum(-1), torch.ones(24), atol=1e-5)


def generated(model, prompts, tok):
    return evaluate.generate(model, tok, prompts, 6, batch=len(prompts))


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_masking_nothing_equals_the_plain_model(kind, tok):
    model, ids = tiny_model(kind), ids_of()
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        for spec in ("", "500"):  # no spec; a position that no row has
            with hooks.mask_sinks(model, spec):
                assert torch.allclose(model(input_ids=ids).logits, plain, atol=1e-5)
    prompts = [row[:n].tolist() for row, n in zip(ids, (24, 9, 17, 12))]
    with hooks.mask_sinks(model, "500"):
        masked = generated(model, prompts, tok)
    assert masked == generated(model, prompts, tok)


@pytest.mark.parametrize("spec", ["0", "0-7", "1-8"])
def test_masked_sinks_equal_a_direct_eager_computation(spec):
    model, ids = tiny_model(), ids_of()
    first, last = int(spec[0]), int(spec[-1])
    bias = torch.zeros(24, 24)
    for i in range(24):
        for j in range(24):
            if j > i or (first <= j <= last < i):
                bias[i, j] = torch.finfo(torch.float32).min
    maps = eager(model, ids, bias.expand(4, 1, 24, 24))
    assert all(a[:, :, last + 1:, first:last + 1].abs().max() == 0 for a in maps)
    with torch.no_grad():
        direct = model(input_ids=ids, attention_mask=bias.expand(4, 1, 24, 24)).logits
        with hooks.mask_sinks(model, spec):
            ours = model(input_ids=ids).logits
        plain = model(input_ids=ids).logits
    assert torch.allclose(ours, direct, atol=1e-5)
    assert torch.allclose(ours[:, :last + 1], plain[:, :last + 1], atol=1e-5)
    assert not torch.allclose(ours[:, -1], plain[:, -1], atol=1e-4)
    assert not model.base_model._forward_pre_hooks


def test_masked_generation_with_cache_and_left_padding_equals_stepwise_forwards(tok):
    model, ids = tiny_model(), ids_of()
    prompts = [row[:n].tolist() for row, n in zip(ids, (24, 11, 17, 12))]
    with hooks.mask_sinks(model, "0-3"):
        batched = generated(model, prompts, tok)
        for prompt, text in zip(prompts, batched):
            row = list(prompt)
            for _ in range(6):  # greedy, without cache, without padding
                with torch.no_grad():
                    row.append(model(input_ids=torch.tensor([row])).logits[0, -1].argmax().item())
                if row[-1] == tok.eos_token_id:
                    break
            assert text == evaluate._decode(tok, [row[len(prompt):]])[0]


@pytest.mark.parametrize("spec", ["-1", "7-0", "first", "0,7"])
def test_malformed_positions_to_mask_are_named(spec):
    with pytest.raises(ValueError, match="positions to mask"):
        with hooks.mask_sinks(tiny_model(), spec):
            pass
