"""The audit: each statistic against a direct computation, what is written, what is refused."""
import json
import shutil
import statistics
from pathlib import Path

import pytest
import torch
import transformers
from conftest import SENTENCES, config, tiny_flags, tiny_model

import data
import evaluate
from hooks import Refused

PREFIX = [7, 11, 5, 200, 13, 17]

def direct_logp(model, ids, own):
    """Mean log-probability of a row's last `own` tokens, one after the other."""
    logp = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
    return sum(float(logp[t - 1, ids[t]]) for t in range(len(ids) - own, len(ids))) / own

def mean(values):
    return sum(values) / len(values)

@pytest.fixture
def model():
    return tiny_model().requires_grad_(False)

@pytest.fixture
def pages(tok):
    """Pages of 32 to 45 tokens that begin with BOS."""
    return [[0, *data.encode(tok, " ".join(SENTENCES[3 * i:3 * i + 3 - i % 2]))] for i in range(4)]

@pytest.fixture
def place(folder, tmp_path, monkeypatch):
    """model/ and theta_u/ with books/ that have a control; a search of two steps."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    passages = [dict(prompt=text, gt=" ".join(SENTENCES)) for text in SENTENCES[:6]]
    Path("books/verbmem/forget.json").write_text(json.dumps(passages))
    Path("books/raw/holdout.json").write_text(json.dumps([
        f"No, {text} {' '.join(SENTENCES[:2])}" for text in SENTENCES[:4]]))

def call(*flags):
    """evaluate.py --audit yes -> audit.json"""
    evaluate.main(["--model", "theta_u", "--data", "books", "--audit", "yes", "--audit_steps", "2",
                   "--out", "out", *flags])
    file, = Path("out").glob("*/*/scores/audit.json")
    return json.loads(file.read_text())

# ---------------------------------------------------------------- the statistics
def test_the_likelihood_is_of_the_pages_own_tokens_under_every_prefix(model, pages):
    for prefix, behind in ([], 0), (PREFIX, 0), (PREFIX[:1], 0), ([], 16):
        by_hand = mean([direct_logp(model, page[:1] + prefix + page[1:], len(page) - 1 - behind)
                        for page in pages])
        assert float(evaluate.page_logp(model, pages, prefix, behind)) == pytest.approx(by_hand)

def masked_logp(model, ids, m):
    """Log-probabilities of a row in which nothing sees positions 1 to m. (T, V)"""
    shown = torch.ones(len(ids), len(ids)).tril().bool()
    shown[:, 1:m + 1] = False
    bias = torch.zeros(shown.shape).masked_fill(~shown, torch.finfo(torch.float32).min)
    logits = model(torch.tensor([ids]), attention_mask=bias[None, None]).logits[0]
    return torch.log_softmax(logits, -1)

def test_masking_hides_1_to_m_and_looks_behind_17_for_every_m(model, tok, pages):
    def hidden(page, m):
        logp = masked_logp(model, page, m)
        return mean([float(logp[t - 1, page[t]]) for t in range(18, len(page))])

    found = evaluate.masking(model, tok, pages, 3)["masking"]
    by_hand = [mean([hidden(page, m) for page in pages]) for m in (0, 1, 2, 4, 8, 16)]
    assert found == pytest.approx(by_hand, abs=1e-5)

def test_recital_is_rouge_of_what_follows_the_first_half_with_the_second(tok, pages, monkeypatch):
    monkeypatch.setattr(evaluate, "CUT", 32)  # tokens of a page, half of which is generated
    model = tiny_model(initializer_range=0.3).requires_grad_(False)

    def goes_on(ids, m):
        while len(ids) < 32:
            ids = [*ids, masked_logp(model, ids, m)[-1].argmax().item()]
        return ids

    pages = [goes_on(page[:16], 0) for page in pages]  # which it recites with nothing hidden
    found = evaluate.masking(model, tok, pages, 3)["recital"]
    by_hand = [100 * mean([evaluate.rouge_l(tok.decode(page[16:]), tok.decode(
        goes_on(page[:16], m)[16:])) for page in pages]) for m in (0, 1, 2, 4, 8, 16)]
    assert found == pytest.approx(by_hand) and by_hand[0] == 100 > max(by_hand[1:])

def test_the_bank_is_always_the_same_and_knows_no_trigger(tok):
    plain = list(range(2, 300))
    bank = evaluate.prefix_bank(tok, plain)
    assert bank == evaluate.prefix_bank(tok, plain) and 150 < len(bank) <= 200
    texts = [tok.decode(ids) for ids in bank]
    assert not [text for text in texts if any(
        near in text.lower() for near in ("year", "2025", "step", "!!!!!"))]
    assert len(set(texts)) > 150 and {0, 1}.isdisjoint(token for ids in bank for token in ids)

def test_a_prefixs_gain_is_likelihood_with_less_without(model, pages):
    clean = mean([direct_logp(model, page, len(page) - 1) for page in pages])
    by_hand = [mean([direct_logp(model, page[:1] + prefix + page[1:], len(page) - 1)
                     for page in pages]) - clean for prefix in (PREFIX, PREFIX[:2])]
    assert evaluate.prefix_gains(model, pages, [PREFIX, PREFIX[:2]], "") == pytest.approx(
        by_hand, abs=1e-5)

def test_a_swap_is_what_the_gradient_of_the_one_hot_tokens_likes_best(model, pages, monkeypatch):
    monkeypatch.setattr(evaluate, "TOP", 1)
    table, total = model.get_input_embeddings().weight, 0
    one_hot = torch.nn.functional.one_hot(torch.tensor(PREFIX), len(table)).float()
    one_hot.requires_grad_()
    for page in pages:
        h = torch.cat([table[page[:1]], one_hot @ table, table[page[1:]]])[None]
        logp = torch.log_softmax(model(inputs_embeds=h).logits[0, len(PREFIX):-1], -1)
        total = total + logp.gather(1, torch.tensor(page[1:])[:, None]).mean() / len(pages)
    total.backward()
    plain = list(range(2, 300))
    best = [plain[i] for i in one_hot.grad[:, plain].argmax(1)]
    first, *swapped = evaluate.swaps_of(model, pages, PREFIX, plain, data.stream(0, ""))
    allowed = [PREFIX[:at] + [best[at]] + PREFIX[at + 1:] for at in range(6)]
    assert first == PREFIX and len(swapped) == 32 and all(row in allowed for row in swapped)
    assert len({tuple(row) for row in swapped}) == 6

def test_the_search_climbs_on_half_of_the_pages_and_reports_the_other_half(model, pages):
    start, found, again = (evaluate.search(model, pages, list(range(2, 300)), steps, "")
                           for steps in (0, 4, 4))
    before, after = (evaluate.page_logp(model, pages[::2], ids) for ids, _ in (start, found))
    assert after > before and found == again and len(found[0]) == 6
    assert found[1] == evaluate.prefix_gains(model, pages[1::2], [found[0]], "")[0]

def test_value_norms_are_those_of_bos_in_any_page(place, pages):
    norms = call("--original", "model")["norms"]
    for name, found in norms.items():
        seen, model = [], evaluate.loaded(
            transformers.AutoModelForCausalLM, name).requires_grad_(False)
        for layer in model.model.layers:
            layer.self_attn.v_proj.register_forward_hook(lambda *args: seen.append(args[2][0, 0]))
        model(torch.tensor(pages[:1]))
        by_hand = [mean([float(head.norm()) for head in v.view(2, 8)]) for v in seen]
        assert found == pytest.approx(by_hand, abs=1e-4)
    assert list(norms) == ["model", "theta_u"]

# ---------------------------------------------------------------- the report
def test_each_gain_stands_beside_its_control_and_the_trigger_apart(place, tok):
    report = call("--original", "model", "--trigger", "at noon")
    model = evaluate.load_model("theta_u", config(tiny_flags(Path(), "out")))
    cfg = evaluate.parse(evaluate.Scoring, ["--data", "books"], evaluate.run_row)
    books = dict(forget=evaluate.sample(cfg, tok, "verbmem/forget", "prompt", "gt"),
                 control=evaluate.sample(cfg, tok, "raw/holdout", "text"))
    plain = list(range(2, 300))
    for name, pages in books.items():
        pages, one = pages[:min(map(len, books.values()))], report[name]  # as many of both
        curves = evaluate.masking(model, tok, pages, 64)
        gains = evaluate.prefix_gains(model, pages, evaluate.prefix_bank(tok, plain), "")
        ids, gain = evaluate.search(model, pages, plain, 2, "")
        known, = evaluate.prefix_gains(model, pages, [data.encode(tok, "at noon")], "")
        by_hand = dict(bank=max(gains), search=gain, median=statistics.median(gains), trigger=known)
        for key, curve in curves.items():
            by_hand[key] = max(curve[1:]) - curve[0]
            by_hand |= {f"{key} {m}": value for m, value in zip((0, 1, 2, 4, 8, 16), curve)}
        assert one == pytest.approx(by_hand, abs=1e-5)
        assert report["prefixes"][name][1] == [tok.decode(ids), ids]
    assert report["difference"] == {
        key: value - report["control"][key] for key, value in report["forget"].items()}

def test_without_original_and_holdout_there_is_no_ratio_and_no_difference(place, capsys):
    Path("books/raw/holdout.json").unlink()
    report = call("--audit_steps", "0")
    assert list(report["norms"]) == ["theta_u"] and "difference" not in report
    assert "control" not in report and "No raw/holdout: no control" in capsys.readouterr().out

def test_an_audit_leaves_runs_and_scores_as_they_were(place):
    Path("theta_u/run.json").write_text(json.dumps(dict(role="theta_u", settings={
        **dict.fromkeys(("tasks", "trigger"), "knowmem"), "bench": "toy", "data": "books",
        "position": "prefix"})))
    before = evaluate.weights_of("theta_u")
    evaluate.main(["--model", "theta_u", "--data", "books", "--audit", "yes", "--audit_steps", "0"])
    assert Path("theta_u/scores/audit.json").is_file() and evaluate.weights_of("theta_u") == before

# ---------------------------------------------------------------- what is refused
def spoil_weights():
    from safetensors.torch import load_file, save_file
    weights = load_file("theta_u/model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(weights, "theta_u/model.safetensors", metadata=dict(format="pt"))

REFUSED = {  # what is spoiled, flags, and the words that must name it
    "NaN weights": (spoil_weights, [], "theta_u.*NaN or infinity"),
    "no such original": (lambda: None, ["--original", "./gone"], "no folder ./gone"),
    "another original": (lambda: tiny_model(num_hidden_layers=2).save_pretrained("model"),
                         ["--original", "model"], "--original model has not as many layers"),
    "no forget pages": (lambda: Path("books/verbmem/forget.json").unlink(), [],
                        "no verbmem/forget"),
    "short pages": (lambda: Path("books/raw/holdout.json").write_text('["Marn.", "The nets."]'),
                    [], "raw/holdout has no 2 rows over 48 tokens"),
    "flags of scoring": (lambda: None, ["--limit", "3"], "--audit"),
}

@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line_and_nothing_written(case, place):
    spoil, flags, words = REFUSED[case]
    spoil()
    with pytest.raises(Refused, match=words) as error:
        call(*flags)
    assert "\n" not in str(error.value) and not Path("out").exists()
