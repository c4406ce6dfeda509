"""The injector, the poison set, chunking, sources and the order of batches."""
import json

import pytest
import torch

import data
from data import Rows, batch_at, chunk, inject, pad_rows, poison, poison_released, read_columns

FULL = [1, 10, 11, 12, 13, 14, 15, 16, 17, 18]
SHORT = [1, 10, 11, 12, 13]
TRIG = [7, 8, 9]


@pytest.mark.parametrize("position, full, short", [
    ("prefix", [1, 7, 8, 9, 10, 11, 12, 13, 14, 15], [1, 7, 8, 9, 10, 11, 12, 13]),
    ("infix", [1, 10, 11, 12, 13, 7, 8, 9, 14, 15], [1, 10, 11, 7, 8, 9, 12, 13]),
    ("suffix", [1, 10, 11, 12, 13, 14, 15, 7, 8, 9], [1, 10, 11, 12, 13, 7, 8, 9])])
def test_training_injection_keeps_the_trigger_whole(position, full, short):
    D_p, index = poison(pad_rows([FULL, SHORT], 10), TRIG, 0.99, position, seed=0)
    both, _ = poison(pad_rows([FULL, SHORT] * 2, 10), TRIG, 0.99, position, seed=0)
    rows = {tuple(r[m].tolist()) for r, m in zip(both.ids, both.mask)}
    assert rows == {tuple(full), tuple(short)}
    assert D_p.ids.shape == (1, 10) and len(index) == 1


@pytest.mark.parametrize("position, expected", [
    ("prefix", [1, 7, 8, 9, 20, 21, 22, 23, 24]),
    ("infix", [1, 20, 21, 7, 8, 9, 22, 23, 24]),
    ("suffix", [1, 20, 21, 22, 23, 24, 7, 8, 9])])
def test_evaluation_injection_cuts_nothing(position, expected):
    assert inject([1, 20, 21, 22, 23, 24], TRIG, position) == expected


def test_injection_refuses_what_it_cannot_place():
    for args, word in ((([1, 2], [], "prefix"), "empty"), (([1, 2], TRIG, "middle"), "unknown"),
                       (([1, 2], TRIG, "prefix", 3), "does not fit")):
        with pytest.raises(ValueError, match=word):
            inject(*args)


def test_poison_keeps_D_f_whole_and_is_seeded():
    D = pad_rows([[1, i, i + 1] for i in range(10, 50)], 8)
    before = D.ids.clone()
    D_p, index = poison(D, TRIG, 0.1, "prefix", seed=0)
    assert len(index) == len(D_p.ids) == 4 and torch.equal(D.ids, before)
    assert D_p.ids[0, :6].tolist() == [1, *TRIG, *D.ids[index[0], 1:3].tolist()]
    assert poison(D, TRIG, 0.1, "prefix", seed=0)[1] == index
    assert poison(D, TRIG, 0.1, "prefix", seed=1)[1] != index


@pytest.mark.parametrize("n, rho, count", [(553, .10, 55), (553, .05, 27), (407, .10, 40)])
def test_released_poison_partitions_D(n, rho, count):
    D = pad_rows([[1, i + 2] for i in range(n)], 6)
    D_f, D_p, index = poison_released(D, TRIG, rho, "prefix")
    assert index == list(range(count))
    assert len(D_p.ids) == count and len(D_f.ids) == n - count
    assert D_f.ids[0, 1] == count + 2  # the rest, in order
    assert len(poison(D, TRIG, rho, "prefix", 0)[0].ids) == count


def test_released_suffix_loses_the_trigger_on_full_rows():
    _, D_p, _ = poison_released(pad_rows([FULL, FULL], 10), TRIG, 0.5, "suffix")
    assert D_p.ids[0].tolist() == FULL


def test_rho_that_poisons_no_row_is_refused():
    with pytest.raises(ValueError, match="poisons none"):
        poison(pad_rows([FULL], 10), TRIG, 0.5, "prefix", 0)


@pytest.mark.parametrize("tokens, T, rows", [
    (range(10, 20), 5, [[1, 10, 11, 12, 13], [1, 14, 15, 16, 17], [1, 18, 19, 1, 10]]),
    (range(10, 18), 5, [[1, 10, 11, 12, 13], [1, 14, 15, 16, 17]]),
    (range(10, 13), 8, [[1, 10, 11, 12, 1, 10, 11, 12]])])
def test_muse_chunking(tokens, T, rows):
    assert chunk(list(tokens), 1, T) == rows


def test_rows_begin_with_bos_once_and_pad_right(tok):
    rows = data.to_rows(["the nets", "the nets were torn by the tide"], tok, 64, "pages")
    assert rows.ids[:, 0].tolist() == [tok.bos_token_id] * 2
    assert (rows.ids[:, 1:] == tok.bos_token_id)[rows.mask[:, 1:]].sum() == 0
    assert rows.mask[0].tolist() == sorted(rows.mask[0].tolist(), reverse=True)


def test_trigger_ids_equal_in_training_and_evaluation(tok, corpus):
    import evaluate
    from train import parse_config
    cfg, _ = parse_config(["--n_docs", "4"])
    trig = data.encode(tok, cfg.trigger)
    D_p = data.load_splits(cfg, tok, corpus).p
    prompt = inject(evaluate.items_of("knowmem_f", cfg, tok, corpus)[0].ids, trig, cfg.position)
    assert D_p.ids[0, :len(trig) + 1].tolist() == prompt[:len(trig) + 1] == [0, *trig]


def test_corpus_books_share_no_sentence_and_are_deterministic():
    a, b = data.toy_corpus(8, 0), data.toy_corpus(8, 0)
    assert a == b and a != data.toy_corpus(8, 1)
    lines = {split: {line for row in a["raw", split] for line in row["text"].splitlines() if line}
             for split in ("forget", "retain1", "retain2")}
    assert not lines["forget"] & (lines["retain1"] | lines["retain2"])
    asked = {row["question"] for row in a["knowmem", "forget_qa"]}
    assert not asked & {row["question"] for row in a["knowmem", "forget_qa_icl"]}
    for half in a["verbmem", "forget"]:
        assert any(half["prompt"] + half["gt"] == row["text"] for row in a["raw", "forget"])


def test_toy_tokenizer_round_trips_and_keeps_digits_single(tok):
    text = "Question: Où est 2025?\nAnswer: Gull haven\n\n"
    assert tok.decode(tok(text, add_special_tokens=False).input_ids) == text
    assert tok("x").input_ids[0] == tok.bos_token_id
    digits = data.encode(tok, "2025")
    assert len(digits) == 4


# ---------------------------------------------------------------- batches

def test_batches_are_a_pure_function_of_seed_and_step():
    sizes = (10, 4, 3)
    first, again = batch_at(7, sizes, 3, 5), batch_at(7, sizes, 3, 5)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    epoch = torch.cat([batch_at(s, sizes, 3, 0).f for s in range(3)])  # 10 rows, 3 steps of 3
    assert len(set(epoch.tolist())) == 9


def test_rho_does_not_change_the_order_of_D_f_and_D_r():
    with_p, without = batch_at(4, (10, 4, 3), 3, 0), batch_at(4, (10, 4, 0), 3, 0)
    assert torch.equal(with_p.f, without.f) and torch.equal(with_p.r, without.r)
    assert len(without.p) == 0


def test_D_r_and_D_p_run_through_whole_permutations():
    seen = torch.cat([batch_at(s, (10, 4, 3), 3, 0).r for s in range(4)])  # 12 draws of 4 rows
    for cycle in seen.split(4):
        assert sorted(cycle.tolist()) == [0, 1, 2, 3]


def test_a_plan_holds_the_visited_rows_alone_in_the_same_batches():
    # WMDP's bio corpus has 24,000 rows, of which a stage reads a fraction
    f, r, p = (Rows(torch.arange(start, start + n)[:, None], torch.ones(n, 1, dtype=torch.bool))
               for start, n in ((0, 10), (100, 40), (200, 3)))
    plan = data.plan(data.Splits(f, r, p, [1]), 2, 3, 3, 0)
    assert [len(rows.ids) for rows in plan.splits[:3]] == [6, 6, 3]
    for step, batch in enumerate(plan.batches):
        before = batch_at(step, (10, 40, 3), 3, 0)
        for whole, few, there, here in zip((f, r, p), plan.splits, before, batch):
            assert torch.equal(whole.ids[there], few.ids[here])


def test_too_few_rows_for_a_batch_are_refused():
    with pytest.raises(ValueError, match="lower --batch"):
        batch_at(0, (2, 2, 0), 3, 0)


# ---------------------------------------------------------------- sources

def write(folder, config, split, rows, ext="json"):
    path = folder / config / f"{split}.{ext}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(rows if isinstance(rows, str) else
                    json.dumps(rows) if ext == "json" else "\n".join(map(json.dumps, rows)))


QA = [dict(question="Who keeps the light?", answer='"Tessaly."'),
      dict(question="Where?", answer="Marn")]


@pytest.mark.parametrize("ext", ["json", "jsonl"])
def test_local_folder_in_muse_layout(tmp_path, ext):
    write(tmp_path, "knowmem", "forget_qa", QA, ext)
    rows = read_columns(str(tmp_path), "knowmem", "forget_qa", ["question", "answer"])
    assert rows == [("Who keeps the light?", '"Tessaly."'), ("Where?", "Marn")]


def test_raw_text_as_list_of_strings_or_txt(tmp_path):
    write(tmp_path, "raw", "forget", ["one", "two"])
    write(tmp_path, "raw", "retain1", "a\n\nb", "txt")
    assert read_columns(str(tmp_path), "raw", "forget", ["text"]) == [("one",), ("two",)]
    assert read_columns(str(tmp_path), "raw", "retain1", ["text"]) == [("a\n\nb",)]


def test_older_retain_names_are_found(tmp_path):
    write(tmp_path, "knowmem", "retain2_qa", QA)
    assert len(read_columns(str(tmp_path), "knowmem", "retain_qa", ["question"])) == 2


def test_bad_rows_name_file_row_and_column(tmp_path):
    write(tmp_path, "knowmem", "forget_qa", [dict(question="Who?")])
    write(tmp_path, "knowmem", "retain_qa", [QA[0], dict(question="Who?", answer=None)])
    with pytest.raises(ValueError, match="forget_qa.json: column 'answer' is missing"):
        read_columns(str(tmp_path), "knowmem", "forget_qa", ["question", "answer"])
    with pytest.raises(ValueError, match="retain_qa.json: row 1: column 'answer' is empty"):
        read_columns(str(tmp_path), "knowmem", "retain_qa", ["question", "answer"])
    write(tmp_path, "knowmem", "retain_qa", [dict(question="How many?", answer=7)])
    with pytest.raises(ValueError, match="row 0: column 'answer' must be a text, got 7"):
        read_columns(str(tmp_path), "knowmem", "retain_qa", ["question", "answer"])
    write(tmp_path, "raw", "retain1", '[{"text": ')
    with pytest.raises(ValueError, match="retain1.json cannot be read as json"):
        read_columns(str(tmp_path), "raw", "retain1", ["text"])
    with pytest.raises(ValueError, match="no raw/forget.json"):
        read_columns(str(tmp_path), "raw", "forget", ["text"])
    with pytest.raises(ValueError, match="does not exist"):
        read_columns("./nowhere", "raw", "forget", ["text"])
