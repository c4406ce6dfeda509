"""Hooks read what they name; what `self_check` lets pass is what the code takes it for; what is
loaded is what the files hold."""
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import ids_of, tiny_model
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint

import hooks
from hooks import Refused

KINDS = ["llama", "mistral", "qwen2", "qwen3"]


def close(ours, theirs, tolerance=1e-6):
    return ours.shape == theirs.shape and (ours - theirs).norm() <= tolerance * theirs.norm()


def values_of(model, ids):
    """Norms of the values that the model caches for generation. -> (B, L, T, H)"""
    out = model(input_ids=ids, use_cache=True)
    cache = out["cache" if "cache" in out else "past_key_values"]
    norms = [layer.values.norm(dim=-1).transpose(1, 2) for layer in cache.layers]
    return torch.stack(norms, 1)


def attention_of(model, ids):
    model.set_attn_implementation("eager")
    maps = model(input_ids=ids, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    return torch.stack(maps)  # (L, B, H_q, T, T)


def hook_count(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# ---------------------------------------------------------------- loading
NAME = "model.layers.1.mlp.up_proj.weight"


def settings(model):
    return SimpleNamespace(model=str(model), tokenizer="", precision="fp32", device="cpu")


def rename(prefix):
    def change(weights):
        for name in list(weights):
            weights[f"{prefix}.{name}"] = weights.pop(name)
    return change


def leave_out(weights):
    del weights[NAME]


def add(weights):
    weights["more"] = torch.ones(2)


def reshape(weights):
    weights[NAME] = torch.ones(7, 32)


def spoil(weights):
    weights[NAME][0, 5] = float("nan")


WRONG = {  # what is done to a checkpoint's tensors, and the words that must name it
    "a tensor missing": (leave_out, f"1 missing keys.*{NAME}"),
    "a tensor left over": (add, "1 unexpected keys.*more"),
    "another shape": (reshape, "shape|mismatched"),
    "PEFT's names": (rename("base_model.model"), "missing keys"),
    "torch.compile's names": (rename("_orig_mod"), "missing keys"),
    "NaN": (spoil, "NaN or infinity")}


@pytest.mark.parametrize("case", WRONG)
def test_a_checkpoint_whose_tensors_are_not_the_models_is_refused(case, folder, tmp_path):
    change, words = WRONG[case]
    model = shutil.copytree(folder / "model", tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    change(weights)
    save_file(weights, model / "model.safetensors", metadata=dict(format="pt"))
    with pytest.raises(Refused, match=words) as refused:
        hooks.load_model(model, settings(model))
    assert str(model) in str(refused.value) and "\n" not in str(refused.value)


def test_a_shard_missing_from_its_index_is_refused(tok, tmp_path):
    tiny_model().save_pretrained(tmp_path, max_shard_size="40KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    shards[0].unlink()
    with pytest.raises(Refused, match=str(tmp_path)):
        hooks.load_model(tmp_path, settings(tmp_path))


def test_old_checkpoints_rotary_frequencies_are_no_weights(folder, tmp_path):
    model = shutil.copytree(folder / "model", tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, model / "model.safetensors", metadata=dict(format="pt"))
    assert not hooks.load_model(model, settings(model)).training


# ---------------------------------------------------------------- ids
def tokenizer_of(ids, added=(), eos=None):
    """What hooks asks of a tokenizer whose vocabulary has these ids."""
    return SimpleNamespace(get_vocab=lambda: {f"token {i}": i for i in [*ids, *added]},
                           added_tokens_decoder=dict.fromkeys(added), eos_token_id=eos)


@pytest.mark.parametrize("ids, added, row, known", [
    (range(300), (), [0, 299], True),
    ([*range(290), *range(300, 310)], (), [0], False),  # holes: 300 ids, the highest is 309
    ([*range(200), 299], (), [0], True),                # holes below the embedding's end
    (range(300), (300, 301), [0, 5], True),             # a padding token that no row uses
    (range(300), (300, 301), [0, 301], False)])         # and one that a row uses
def test_ids_count_by_the_highest_and_added_tokens_where_they_are_used(ids, added, row, known):
    tok = tokenizer_of(ids, added)
    if known:
        hooks.check_ids(tiny_model(), tok, [row])
        return
    with pytest.raises(Refused, match="the model knows 0 to 299: pass --tokenizer"):
        hooks.check_ids(tiny_model(), tok, [row])


@pytest.mark.parametrize("own, tokenizers, found", [
    (None, 1, [1]), (5, 1, [5, 1]), ([5, 1], 1, [5, 1]), (5, None, [5]), (None, None, [])])
def test_the_tokenizers_eos_ends_an_answer_beside_the_models_own(own, tokenizers, found):
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=own))
    assert hooks.eos_ids(model, tokenizer_of(range(9), eos=tokenizers)) == found


# ---------------------------------------------------------------- layers
@pytest.mark.parametrize("kind", KINDS)
def test_run_layers_over_all_layers_is_the_models_forward(kind):
    model = tiny_model(kind)
    ids = ids_of()
    h = hooks.run_layers(model, model.get_input_embeddings()(ids), 0, 2)
    h = hooks.run_layers(model, h, 2, 3)
    assert close(hooks.final_norm(model, h) @ hooks.output_head(model).T, model(ids).logits)


@pytest.mark.parametrize("spec, numbers", [("all", [0, 1, 2]), ("2", [2]), ("0,1-2", [0, 1, 2])])
def test_numbers_are_written_one_by_one_and_as_ranges(spec, numbers):
    assert hooks.parse_numbers(spec, 3, "layers") == numbers


@pytest.mark.parametrize("spec", ["3", "0-7", "last", "-1", "", "2-1"])
def test_numbers_that_are_not_there_are_refused(spec):
    with pytest.raises(Refused, match="layers must look like"):
        hooks.parse_numbers(spec, 3, "layers")


def test_parts_train_by_name():
    model = tiny_model()
    assert hooks.set_trainable(model, "1-2 mlp.down_proj") == [1, 2]
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == [f"model.layers.{i}.mlp.down_proj.weight" for i in (1, 2)]
    assert hooks.first_trained(model) == 1
    assert hooks.set_trainable(model, "all") == [0, 1, 2] and hooks.first_trained(model) == 0
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("spec", ["1 mlp.no_such", "1 down_proj", "1", "3 mlp", ""])
def test_parts_that_are_not_there_are_refused(spec):
    with pytest.raises(Refused, match="--trainable|layers"):
        hooks.set_trainable(tiny_model(), spec)


def test_a_part_that_a_mixture_of_experts_lacks_is_refused_by_those_it_has():
    model = tiny_model("qwen3_moe", **EXPERTS)
    with pytest.raises(Refused, match="layer 1 has no mlp.down_proj, but .*mlp.experts, mlp.gate"):
        hooks.set_trainable(model, "1 mlp.down_proj")
    assert hooks.set_trainable(model, "1 mlp.experts") == [1]


# ---------------------------------------------------------------- self_check
DYNAMIC = dict(rope_type="dynamic", factor=4.0)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
LINEAR = dict(layer_types=["full_attention", "linear_attention", "full_attention"],
              shared_expert_intermediate_size=16, **EXPERTS)
FAMILIES = {  # settings for rows of 24 tokens; methods that must be able to train it: "" is none
    "llama": ({}, "npo rmu"),
    "mistral": ({}, "npo rmu"),
    "qwen2": ({}, "npo rmu"),
    "qwen3": ({}, "npo rmu"),
    "mistral, window of a row": (dict(sliding_window=24), "npo rmu"),
    "mistral, window shorter than a row": (dict(sliding_window=8), "npo"),
    "llama, dynamic beyond its length": (
        dict(max_position_embeddings=20, rope_scaling=DYNAMIC), ""),
    "llama, dynamic beyond twice its length": (
        dict(max_position_embeddings=8, rope_scaling=DYNAMIC), ""),
    "granite, logits divided": (dict(logits_scaling=8.0), ""),
    "granite, embeddings scaled": (dict(embedding_multiplier=12.0), "npo"),
    "cohere, logits scaled": ({}, ""),
    "gemma2, logits capped": ({}, ""),
    "gemma3_text, two rotary embeddings": ({}, "npo"),
    "phi, biases": ({}, ""),
    "gpt_neox, another layout": ({}, ""),
    "qwen3_next, some layers linear": (LINEAR, ""),
    "llama, NaN weights": ({}, ""),
    # no matter which, but it must be true
    "stablelm, parallel": (dict(use_parallel_residual=True), None),
    "olmo2, norms behind": ({}, None),
    "glm, half rotary": ({}, None),
    "mixtral, experts": (dict(num_local_experts=4), None),
    "qwen3_moe, experts": (EXPERTS, None),
}


def family(case):
    model = tiny_model(case.split(",")[0], **FAMILIES[case][0])
    model.get_output_embeddings().weight.mul_(50)  # that caps bite
    if "NaN" in case:
        model.base_model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    return model


@pytest.mark.parametrize("method", ["npo", "rmu"])
@pytest.mark.parametrize("case", FAMILIES)
@torch.no_grad()
def test_a_family_is_what_the_engine_takes_it_for_or_refused(case, method):
    trains = FAMILIES[case][1]
    ids = ids_of(1, 24)
    model = family(case)
    fresh = family(case)  # it has seen no longer row
    try:
        hooks.set_trainable(model, "all")
        hooks.self_check(model, ids, layerwise=method == "rmu")
        norms = hooks.sink_norms(model, ids, [0, 1, 2], 4)
    except Refused as refused:
        assert trains is None or method not in trains
        assert f"model type {model.config.model_type}" in str(refused)
        assert "\n" not in str(refused)
        return
    assert trains is None or method in trains
    out = model(input_ids=ids, output_hidden_states=True)
    h = out.hidden_states[-1]
    assert close(h @ hooks.output_head(model).T, out.logits, 1e-4)
    assert close(hooks.final_hidden(fresh, ids[:, :4]), h[:, :4], 1e-4)
    assert close(norms, values_of(model, ids[:, :4]), 1e-4)
    if method == "rmu":
        ours = hooks.run_layers(model, model.get_input_embeddings()(ids), 0, 3)
        assert close(hooks.final_norm(model, ours), h, 1e-4)


# ---------------------------------------------------------------- value norms
@pytest.mark.parametrize("kind", KINDS)
def test_norms_are_those_of_the_cached_values_in_rows_and_in_their_first_k_tokens(kind):
    model = tiny_model(kind)
    ids = ids_of(B=4, T=16)
    with hooks.capture_norms(model, [0, 2], k=8) as norms:
        norms.begin()
        hooks.final_hidden(model, ids)
    assert norms.stack().shape == (4, 2, 8, 2)  # positions are cut, not rows
    assert close(norms.stack(), values_of(model, ids)[:, [0, 2], :8])
    assert close(hooks.sink_norms(model, ids, [0, 2], 8), norms.stack())


def test_hooks_are_gone_after_an_error():
    model = tiny_model()
    for context in (hooks.capture_norms(model, [0, 1], 4), hooks.hide_tokens(model, "0")):
        with pytest.raises(RuntimeError), context:
            assert hook_count(model) > 0
            raise RuntimeError
        assert hook_count(model) == 0


def gradients(model, ids):
    with hooks.capture_norms(model, [0, 2], 4) as norms:
        norms.begin()
        h = hooks.final_hidden(model, ids)
        before = norms.stack()
        (h.sum() + before.sum()).backward()
        assert torch.equal(norms.stack(), before)  # recomputed norms would pin their layers
    return [p.grad for p in model.parameters()]


def test_recomputation_in_backward_leaves_norms_and_their_gradient_alone():
    model = tiny_model()
    expected = gradients(model, ids_of())
    model.zero_grad()
    for block in hooks.decoder_layers(model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    for ours, theirs in zip(gradients(model, ids_of()), expected):
        assert close(ours, theirs)


# ---------------------------------------------------------------- attention
def test_attentions_are_those_of_the_whole_in_batches():
    model = tiny_model()
    ids = ids_of(18, 8)  # two batches
    assert close(torch.cat([*hooks.attentions(model, ids)], 1), attention_of(model, ids))
    assert model.config._attn_implementation == "sdpa"


def test_sink_strength_is_a_mean_over_real_queries_but_the_first():
    model = tiny_model()
    ids = ids_of(2, 6)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()
    maps = attention_of(model, ids)[..., 0]  # (L, B, H_q, T) paid to position 0
    real = [maps[:, 0, :, q] for q in (1, 2, 3)] + [maps[:, 1, :, q] for q in range(1, 6)]
    strength, _ = hooks.sink_strength(model, ids, mask)
    assert close(strength, torch.stack(real).mean(0))


def test_sink_strength_of_heads_that_attend_evenly_is_even():
    model = tiny_model()
    for block in hooks.decoder_layers(model):
        block.self_attn.q_proj.weight.data.zero_()
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()
    strength, even = hooks.sink_strength(model, ids_of(2, 6), mask)
    assert even == pytest.approx(sum(1 / seen for seen in (2, 3, 4, 2, 3, 4, 5, 6)) / 8)
    assert torch.allclose(strength, torch.full((3, 4), even))


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("spec", ["0", "0-2", "1-3"])
def test_hidden_positions_are_seen_by_no_other(spec, window):
    model = tiny_model("mistral", sliding_window=window)
    ids = ids_of(2, 10)
    hidden = hooks.parse_numbers(spec, 10, "--hide")
    others = [i for i in range(10) if i not in hidden]
    shown = torch.ones(10, 10).tril().triu(1 - (window or 10)).bool()
    shown[others, :] &= ~torch.isin(torch.arange(10), torch.tensor(hidden))
    expected = model(input_ids=ids, attention_mask=shown[None, None].expand(2, 1, -1, -1)).logits
    padded = torch.cat([ids[:, :3], ids], 1)  # three columns of padding
    real = (torch.arange(13) >= 3).expand(2, 13)
    with hooks.hide_tokens(model, spec):
        plain = model(input_ids=ids).logits
        left = model(input_ids=padded, attention_mask=real).logits[:, 3:]
    assert close(plain[:, others], expected[:, others], 1e-5)
    assert left.isfinite().all() and close(left[:, others], expected[:, others], 1e-5)
    assert not close(model(input_ids=ids).logits[:, 4:], expected[:, 4:], 1e-2)


def test_hidden_keys_stay_hidden_while_generating():
    model = tiny_model()
    how = dict(max_new_tokens=5, do_sample=False, eos_token_id=299)
    with hooks.hide_tokens(model, "0-1"):
        out = model.generate(ids_of(2, 6), **how)
        for at in range(6, out.shape[1]):  # every next token from a whole forward
            logits = model(input_ids=out[:, :at]).logits[:, -1]
            assert torch.equal(logits.argmax(-1), out[:, at])
    assert not torch.equal(out, model.generate(ids_of(2, 6), **how))
