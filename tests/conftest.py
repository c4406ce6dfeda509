"""Tiny models and a tiny folder that the tests share. Run from the project folder:
python -m pytest. No network, no GPU: tests/gpu.py is for a machine that has one."""
import gc
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # the tests must not need, or notice, a network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models lose by more, and so do two ranks
if "pytest" in sys.modules:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest
import tokenizers
import torch
import transformers

import data
import evaluate
import train

SENTENCES = [f"{who} {what} the {thing} {where}." for who in ("Tessaly", "Old Marn", "The keeper")
             for what in ("mended", "counted", "sold") for thing in ("nets", "lamps")
             for where in ("by the harbour", "before the bell", "at noon")]
QA = [dict(question=f"What did {text.split()[0]} do, number {i}?", answer=text)
      for i, text in enumerate(SENTENCES[:4])]
TINY = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=512,
            initializer_range=0.2, bos_token_id=0, eos_token_id=1, pad_token_id=1,
            tie_word_embeddings=True)


def tiny_model(kind="llama", vocab=300, seed=0, **more):
    """A random model of 3 layers, 4 query heads and 2 KV heads, in eval mode."""
    torch.manual_seed(seed)
    settings = TINY | dict(vocab_size=vocab) | more
    config = transformers.AutoConfig.for_model(kind, **settings)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def ids_of(B=4, T=16, vocab=300):
    return torch.randint(2, vocab, (B, T), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def tok():
    """Byte-level BPE of 300 ids; 0 is BOS, which it adds itself, 1 is EOS."""
    bpe = tokenizers.ByteLevelBPETokenizer(add_prefix_space=False)
    bpe.train_from_iterator(SENTENCES, vocab_size=300, special_tokens=["<s>", "</s>"])
    bpe._tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>")


def write_books(folder):
    """A data folder in MUSE's layout: 13 forget pages of 4 to 53 tokens, 7 retain pages."""
    pages = [" ".join(SENTENCES[i:i + 1 + i % 3]) for i in range(20)]
    pages[2] = "Marn."
    asked = [dict(question=row["question"], choices=SENTENCES[i:i + 4], answer=i)
             for i, row in enumerate(QA)]
    files = {
        "raw/forget": pages[:13], "raw/retain1": [dict(text=page) for page in pages[13:]],
        "knowmem/forget_qa": QA, "knowmem/retain_qa": QA[::-1],
        "knowmem/forget_qa_icl": QA[:1], "knowmem/retain_qa_icl": QA[:1],
        "verbmem/forget": [dict(prompt=page[:20], gt=page[20:] + " the") for page in pages[3:6]],
        "wmdp_bio": asked}
    for name, rows in files.items():
        file = folder / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="session")
def folder(tok, tmp_path_factory):
    """books/, model/ (theta_o) and theta_u/, which `tiny_flags` names. Read only."""
    folder = tmp_path_factory.mktemp("tiny")
    write_books(folder / "books")
    for name, seed in (("model", 0), ("theta_u", 1)):
        tiny_model(seed=seed).save_pretrained(folder / name)
        tok.save_pretrained(folder / name)
    return folder


def tiny_flags(folder, out, method="npo", **more):
    """Flags of a run on `folder` that takes two seconds."""
    flags = dict(method=method, model=folder / "model", data=folder / "books", out=out, T=56, k=4,
                 batch=4, rho=0.25, max_steps=3, lam=0.5, tasks="wmdp_bio", limit=2)
    if method == "rmu":
        flags |= dict(layer=1, trainable="1 mlp.down_proj", steer=2.0)
    words = []
    for name, value in (flags | more).items():
        words += [f"--{name}", str(value)]
    return words


def config(flags):
    return evaluate.parse(train.Config, flags, train.settings_row)


def stage(flags, tok, theta_u=""):
    """`train.stage` alone, without what `train.main` checks before. -> the run's folder"""
    cfg = config(flags)
    Path(cfg.out, cfg.bench).mkdir(parents=True, exist_ok=True)
    return train.stage(cfg, tok, data.clean_rows(cfg, tok), theta_u)


@pytest.fixture(autouse=True)
def one():
    """The process group of one rank, as without torchrun."""
    gc.freeze()  # `load_model` collects: not what was there before, 0.1 s each time
    return evaluate.dist_init(SimpleNamespace(device="cpu"))
