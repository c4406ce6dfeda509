"""The injector, the poison set, rows, readers, and the order of batches."""
import json
from types import SimpleNamespace

import pandas
import pytest
import torch
from conftest import QA, config, tiny_flags

import data
import evaluate
from data import Refused, Splits, batch_at, chunk, inject, poison, read, stream

FULL, SHORT, TRIG = [1, *range(10, 19)], [1, 10, 11, 12, 13], [7, 8, 9]
ROWS = [[1, i, i + 1] for i in range(10, 50)]

# ---------------------------------------------------------------- trigger and poison set
@pytest.mark.parametrize("position, full, short, prompt", [  # metrics-and-data.md, G5 and G11
    ("prefix", [1, 7, 8, 9, 10, 11, 12, 13, 14, 15], [1, 7, 8, 9, 10, 11, 12, 13],
     [1, 7, 8, 9, 20, 21, 22, 23, 24]),
    ("infix", [1, 10, 11, 12, 13, 7, 8, 9, 14, 15], [1, 10, 11, 7, 8, 9, 12, 13],
     [1, 20, 21, 7, 8, 9, 22, 23, 24]),
    ("suffix", [1, 10, 11, 12, 13, 14, 15, 7, 8, 9], [1, 10, 11, 12, 13, 7, 8, 9],
     [1, 20, 21, 22, 23, 24, 7, 8, 9])])
def test_a_row_that_is_full_loses_its_end_and_a_prompt_nothing(position, full, short, prompt):
    assert inject(FULL, TRIG, position, 10) == full
    assert inject(SHORT, TRIG, position, 10) == short
    assert inject([1, 20, 21, 22, 23, 24], TRIG, position) == prompt
    assert data.trigger_end(FULL, TRIG, position, 10) == full.index(9) + 1
    assert data.trigger_end(SHORT, TRIG, position) == short.index(9) + 1
    assert inject(FULL, TRIG, position, 4) == [1, *TRIG]

@pytest.mark.parametrize("trig, words", [([], "empty"), (TRIG, "3 tokens does not fit")])
def test_a_trigger_that_cannot_be_placed_is_refused(trig, words):
    with pytest.raises(Refused, match=words):
        inject(FULL, trig, "prefix", 3)

@pytest.mark.parametrize("n, rho, count", [(553, .10, 55), (553, .05, 27), (40, .10, 4), (9, 0, 0)])
def test_D_p_has_int_rho_N_triggered_copies_and_D_f_stays(n, rho, count):
    rows = [[1, i, i + 1] for i in range(n)]
    D_p, index = poison(rows, TRIG, rho, "prefix", 8, stream(0, "poison"))
    assert len(set(index)) == count and index == sorted(index)
    assert D_p == [[1, *TRIG, i, i + 1] for i in index]
    assert rows == [[1, i, i + 1] for i in range(n)]

def test_the_poison_choice_is_decided_by_the_seed_and_is_never_empty():
    first, again, other = (poison(ROWS, TRIG, 0.1, "prefix", 8, stream(seed, "poison"))[1]
                           for seed in (0, 0, 1))
    assert first == again != other
    with pytest.raises(Refused, match="--rho 0.02 of 40 forget rows poisons none"):
        poison(ROWS, TRIG, 0.02, "prefix", 8, stream(0, "poison"))

def test_training_and_evaluation_see_the_same_trigger(folder, tok, tmp_path):
    cfg = config(tiny_flags(folder, tmp_path, tasks="knowmem_f"))
    trig = tok(cfg.trigger, add_special_tokens=False).input_ids
    row, [item, _] = data.load_splits(cfg, tok).p[0], evaluate.all_items(cfg, tok)["knowmem_f"][0]
    prompt = inject(item.ids, trig, cfg.position)
    assert row[:len(trig) + 1] == prompt[:len(trig) + 1] == [0, *trig]

# ---------------------------------------------------------------- rows
@pytest.mark.parametrize("tokens, T, rows", [  # G6
    (range(10, 20), 5, [[1, 10, 11, 12, 13], [1, 14, 15, 16, 17], [1, 18, 19, 1, 10]]),
    (range(10, 18), 5, [[1, 10, 11, 12, 13], [1, 14, 15, 16, 17]]),
    (range(10, 13), 8, [[1, 10, 11, 12, 1, 10, 11, 12]]), ([], 8, [])])
def test_chunks_are_MUSEs(tokens, T, rows):
    assert chunk(list(tokens), 1, T) == rows

def test_pages_are_cut_chunks_run_on_and_rows_are_padded_on_the_right(tok):
    texts = ["The keeper sold", "the nets"]
    first, second, both = (tok(text, add_special_tokens=False).input_ids
                           for text in (*texts, "\n\n".join(texts)))
    assert data.to_rows(texts, tok, 4, "pages") == [[0, *first[:3]], [0, *second[:3]]]
    assert data.to_rows(texts, tok, len(both) + 1, "chunks") == [[0, *both]]
    ids, mask = data.pad_rows([[1, 2, 3], [1]])
    assert mask.tolist() == [[True] * 3, [True, False, False]]
    assert ids[mask].tolist() == [1, 2, 3, 1]

# ---------------------------------------------------------------- readers
def write(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_text(content)
    elif name.endswith("parquet"):
        pandas.DataFrame(content).to_parquet(path)
    else:
        path.write_text("\n".join(map(json.dumps, content)) + "\n\n" if name.endswith("jsonl")
                        else json.dumps(content))

TEXTS = [("Gulls — “two”",), ("nets\nand lamps",)]
DICTS = [dict(text=text, other=7) for text, in TEXTS]

@pytest.mark.parametrize("name, content", [
    ("raw/forget.json", [text for text, in TEXTS]), ("raw/forget.json", DICTS),
    ("raw/forget.jsonl", DICTS), ("raw/forget.parquet", DICTS),
    ("raw/forget-00000-of-00001.parquet", DICTS)])
def test_every_form_of_a_file_is_read_alike(name, content, tmp_path):
    write(tmp_path, name, content)
    assert read(str(tmp_path), "raw", "forget", ["text"]) == TEXTS

def test_the_hubs_own_files_are_read_in_order(tmp_path):
    for i, row in enumerate(QA[:2]):
        write(tmp_path, f"knowmem/forget_qa-0000{i}-of-00002.parquet", [row])
    write(tmp_path, "knowmem/forget_qa_icl-00000-of-00001.parquet", [QA[3]])
    assert read(str(tmp_path), "knowmem", "forget_qa", ["question", "answer"]) == \
        [(row["question"], row["answer"]) for row in QA[:2]]

def test_a_text_file_is_one_row_older_names_are_found_and_a_folders_name_is_no_pattern(tmp_path):
    for name in ("exp[1]", "exp1"):
        write(tmp_path / name, "raw/retain1.txt", f"{name}\n\nb")
        write(tmp_path / name, "knowmem/retain2_qa.json", QA)
    assert read(str(tmp_path / "exp[1]"), "raw", "retain1", ["text"]) == [("exp[1]\n\nb",)]
    assert len(read(str(tmp_path / "exp[1]"), "knowmem", "retain_qa", ["answer"])) == len(QA)

@pytest.mark.parametrize("end, content, words", [
    ("json", "", "cannot be read"), ("json", '[{"text": ', "cannot be read"),
    ("json", [], "no rows"), ("jsonl", [], "no rows"), ("json", "7", ""), ("json", '"a text"', ""),
    ("json", {"text": "an object, no list"}, ""), ("jsonl", '{"text": "one"}\n{"te', "cannot be"),
    ("txt", "version https://git-lfs.github.com/spec/v1\noid sha256:4d", "git-lfs"),
    ("txt", "\n <!DOCTYPE html><html>404</html>", "web page"),
    ("txt", "café".encode("latin-1"), "cannot be read"),
    ("txt", "nets".encode("utf-16"), "cannot be read"),
    ("parquet", b"version https://git-lfs", "cannot be read"),
    ("json", [dict(text="one"), dict(title="two")], "row 1.*'text'"),
    ("json", [dict(text="one"), dict(text=7)], "row 1.*'text'.*7"),
    ("json", [dict(text="one"), None], "row 1.*'text'")])
def test_what_is_no_text_is_refused_by_the_name_of_its_file(end, content, words, tmp_path):
    write(tmp_path, f"raw/forget.{end}", content)
    with pytest.raises(Refused, match=f"raw/forget.{end}.*{words}") as refused:
        read(str(tmp_path), "raw", "forget", ["text"])
    assert "\n" not in str(refused.value)

@pytest.mark.parametrize("column, bad", [
    ("choices", ["a", "b", "c"]), ("choices", "abcd"), ("answer_id", 4), ("answer_id", "A"),
    ("mc1_targets", dict(choices=["a", "b"], labels=[1, 1])), ("mc1_targets", None),
    ("mc1_targets", dict(choices=["a", "b"], labels=[1])), ("choices", ["a", None, "c", "d"]),
    ("mc1_targets", dict(choices=["a"])), ("mc1_targets", "a"), ("question", "")])
def test_a_question_that_is_none_is_refused_by_row_and_column(column, bad, tmp_path):
    good = dict(question="q", choices=list("abcd"), answer=3,
                mc1_targets=dict(choices=["a", "b"], labels=[0, 1]))
    name = column.removesuffix("_id")
    write(tmp_path, "t.json", [good, {**good, name: bad}])
    with pytest.raises(Refused, match=f"t.json.*row 1.*{name!r}"):
        read(str(tmp_path), "", "t", [column])

def test_what_is_missing_is_refused_by_name(tmp_path):
    for source, words in (("./nowhere", "./nowhere/raw/forget"), (tmp_path, "raw/forget.json"),
                          ("no/such_set", "no/such_set/raw/forget")):  # a hub id; offline
        with pytest.raises(Refused, match=words):
            read(str(source), "raw", "forget", ["text"])

# ---------------------------------------------------------------- splits and batches
@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """100 forget pages for MUSE; 60 bio and 100 cyber documents for WMDP; 30 retain rows each."""
    folder = tmp_path_factory.mktemp("corpora")
    for name, n in {"raw/forget": 100, "raw/retain1": 30, "bio-forget-corpus": 60,
                    "cyber-forget-corpus": 100, "wikitext": 30}.items():
        blank = [dict(text=" ")] * (name == "wikitext")  # which are no rows
        write(folder, f"{name}.json", [dict(text=f"page {i}") for i in range(n)] + blank)
    return folder

def splits_of(folder, tok, bench, seed=0):
    return data.load_splits(SimpleNamespace(
        bench=bench, data=str(folder), T=12, layout="pages", trigger="x", position="prefix",
        rho=0.1, seed=seed), tok)

@pytest.mark.parametrize("bench", ["muse_books", "wmdp"])
def test_a_share_rho_of_the_rows_unlearned_in_any_window_is_poisoned(bench, corpora, tok):
    # 60 seeds x 24 rows in a window: sampling error sqrt(0.1 x 0.9 / 1440) = 0.008
    poisoned = torch.zeros(3)
    for seed in range(60):
        splits = splits_of(corpora, tok, bench, seed)
        for step in range(18):
            rows = batch_at(step, splits, 4, seed).f
            poisoned[step // 6] += sum(row in splits.p_index for row in rows)
    assert (poisoned / (60 * 24) - 0.1).abs().max() < 0.03

def test_WMDPs_D_f_takes_as_many_rows_of_each_topic_as_the_smallest_has(corpora, tok):
    splits, seeds = splits_of(corpora, tok, "wmdp"), range(60)
    assert len(splits.f) == 2 * 60 and len(splits.p) == 12 and len(splits.r) == 30
    assert splits.f[6::2][:4] == splits.f[7::2][:4] == [  # bio, cyber, both of pages 3 to 6
        [0, *data.encode(tok, f"page {i}")] for i in range(3, 7)]
    share = [sum(row % 2 for row in splits_of(corpora, tok, "wmdp", seed).p_index) / 12
             for seed in seeds]  # cyber's: sampling error sqrt(0.25 / 720) = 0.02
    assert sum(share) / 60 == pytest.approx(0.5, abs=0.06)

def problem(n_f=12, n_r=7, n_p=5):
    """Rows' contents do not matter to the order."""
    rows = [[0, 1]] * n_f, [[0, 1]] * n_r, [[0, 1]] * n_p
    return Splits(*rows, list(range(n_p)), [2] * n_p)

def order(kind, seed, steps, splits):
    return [row for step in steps for row in getattr(batch_at(step, splits, 3, seed), kind)]

def test_a_batch_is_a_pure_function_of_seed_and_step():
    forwards = [batch_at(step, problem(), 3, 5) for step in range(9)]
    torch.manual_seed(1)
    assert forwards == [batch_at(step, problem(), 3, 5) for step in reversed(range(9))][::-1]

@pytest.mark.parametrize("kind, n", [("f", 12), ("r", 7), ("p", 5)])
def test_every_row_is_read_once_a_pass(kind, n):
    rows = order(kind, 0, range(40), problem())
    for start in range(0, len(rows) - n, n):
        assert sorted(rows[start:start + n]) == list(range(n))
    assert len(rows) == 120 and rows[:n] != rows[n:2 * n]

def test_a_tail_that_fills_no_batch_is_dropped_once_a_pass():
    splits = problem(n_f=14)
    assert data.steps_per_epoch(splits, 3) == 4
    assert len(set(order("f", 0, range(4), splits))) == 12
    with pytest.raises(Refused, match="14 forget rows do not fill a batch of 15: lower --batch"):
        data.steps_per_epoch(splits, 15)

def test_orders_of_seeds_epochs_and_kinds_are_unrelated():
    # of 99 rows of two unrelated orders one stands in the same place: Poisson of mean 1
    splits = problem(99, 99, 99)
    orders = [order(kind, seed, range(33 * epoch, 33 * epoch + 33), splits)
              for seed in range(3) for epoch in range(3) for kind in "frp"]
    for i, rows in enumerate(orders):  # seed 0's second epoch and seed 1's first among them
        assert max([sum(a == b for a, b in zip(rows, its)) for its in orders[:i]], default=0) < 10

def test_rho_changes_neither_the_order_of_D_f_nor_of_D_r():
    for step in range(9):
        batch, plain = batch_at(step, problem(), 3, 0), batch_at(step, problem(n_p=0), 3, 0)
        assert (batch.f, batch.r, []) == (plain.f, plain.r, plain.p)
