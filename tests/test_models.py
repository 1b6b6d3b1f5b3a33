"Models and texts that are named nowhere: small random ones of many families, with tokenizers of every kind."
import random
from pathlib import Path

import pytest
import torch

from sae_nb.acts import Stream, read_rows
from sae_nb.core import UserError
from sae_nb.lm import load_lm
from sae_nb.metrics import measure
from sae_nb.runs import RunConfig, run
from sae_nb.sae import SAE
from sae_nb.text import load_text, windows

DATA = Path(__file__).parents[2] / "shared" / "data"
D, LAYERS, VOCAB = 16, 3, 320


def model(family):
    "A small random model of that family."
    import transformers as t
    size = dict(vocab_size=VOCAB, hidden_size=D, num_hidden_layers=LAYERS, num_attention_heads=2)
    llama = size | dict(intermediate_size=48, num_key_value_heads=1, max_position_embeddings=128)
    gemma = llama | dict(head_dim=8)
    kind, config = {
        "gpt2": ("GPT2LMHead", t.GPT2Config(vocab_size=VOCAB, n_embd=D, n_layer=LAYERS, n_head=2, n_positions=128)),
        "gpt_neo": ("GPTNeoFor", t.GPTNeoConfig(vocab_size=VOCAB, hidden_size=D, num_layers=LAYERS, num_heads=2, attention_types=[[["global", "local", "global"], 1]], max_position_embeddings=128)),
        "gpt_neox": ("GPTNeoXFor", t.GPTNeoXConfig(**size, intermediate_size=48, max_position_embeddings=128)),
        "gpt_neox_serial": ("GPTNeoXFor", t.GPTNeoXConfig(**size, intermediate_size=48, max_position_embeddings=128, use_parallel_residual=False)),
        "llama": ("LlamaFor", t.LlamaConfig(**llama)), "mistral": ("MistralFor", t.MistralConfig(**llama, sliding_window=32)),
        "gemma": ("GemmaFor", t.GemmaConfig(**gemma)), "gemma2": ("Gemma2For", t.Gemma2Config(**gemma, sliding_window=32)),
        "gemma3": ("Gemma3For", t.Gemma3TextConfig(**gemma, sliding_window=32)),
        "qwen2": ("Qwen2For", t.Qwen2Config(**llama)), "qwen3": ("Qwen3For", t.Qwen3Config(**llama, head_dim=8)),
        "opt": ("OPTFor", t.OPTConfig(**size, ffn_dim=48, word_embed_proj_dim=D, max_position_embeddings=128)),
        "phi": ("PhiFor", t.PhiConfig(**size, intermediate_size=48, max_position_embeddings=128)),
    }[family]
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"): setattr(config, name, None if name == "pad_token_id" else 1)
    torch.manual_seed(0)
    name = kind.replace("LMHead", "LMHeadModel") if kind.endswith("LMHead") else kind + "CausalLM"
    made = getattr(t, name)(config)
    for p in made.parameters():
        if p.ndim > 1: p.data.normal_(0, .15)
    return made


def tokenizer(special):
    "A small byte-level BPE tokenizer; `special` names its special tokens by role."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", *sorted(set(special.values()))], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tok.train_from_iterator([prose()], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tok, **special)


def prose(words=4_000):
    g = random.Random(0)
    return " ".join(g.choice("the a fox dog river jumped over slept under, and. or quick lazy brown".split()) for _ in range(words))


SPECIAL = {"bos and eos": dict(bos_token="<s>", eos_token="</s>"), "eos only": dict(eos_token="<|end|>"), "bos only": dict(bos_token="<s>"),
           "one for all": dict(bos_token="<|end|>", eos_token="<|end|>", pad_token="<|end|>"), "cls and sep": dict(cls_token="[CLS]", sep_token="[SEP]"), "none": {}}
FAMILIES = ["gpt2", "gpt_neo", "gpt_neox", "gpt_neox_serial", "llama", "mistral", "gemma", "gemma2", "gemma3", "qwen2", "qwen3", "phi", "opt"]
PARALLEL = {"gpt_neox", "phi"}   # attention and MLP read the same input
BLOCKS = {"gpt2": "transformer.h", "gpt_neo": "transformer.h", "gpt_neox": "gpt_neox.layers", "gpt_neox_serial": "gpt_neox.layers", "opt": "model.decoder.layers"}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    "Gives the folder of a family and a kind of tokenizer, made when first asked for."
    made = {}
    def get(family, special="bos and eos"):
        if (family, special) not in made:
            made[family, special] = path = tmp_path_factory.mktemp("lm")
            model(family).save_pretrained(path); tokenizer(SPECIAL[special]).save_pretrained(path)
        return str(made[family, special])
    return get


@pytest.fixture(scope="session")
def load(folder):
    loaded = {}
    def get(family, special="bos and eos", dtype="float32"):
        if (family, special, dtype) not in loaded: loaded[family, special, dtype] = load_lm(folder(family, special), "cpu", dtype)
        return loaded[family, special, dtype]
    return get


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text(prose(), encoding="utf-8")
    return str(path)


IDS = torch.randint(2, 300, (2, 12), generator=torch.Generator().manual_seed(0))
every_family = pytest.mark.parametrize("family", FAMILIES)
known_blocks = every_family


# --- sites -------------------------------------------------------------------------------------------

@every_family
def test_a_saved_folder_is_the_model_that_was_saved(load, family):
    "Same logits as the model in memory; the tokenizer reads and writes its own text."
    lm = load(family)
    with torch.no_grad(): torch.testing.assert_close(lm.logits(IDS), model(family).eval()(IDS).logits)
    ids = lm.tokenizer("the fox slept", add_special_tokens=False)["input_ids"]
    assert lm.tokenizer.decode(ids) == "the fox slept" and 1 < len(ids) < 14 and lm.context == 128


@known_blocks
def test_the_parts_of_a_block_add_up(load, family):
    "pre + attention + MLP = post; the next block starts where this one ends; and the middle lies between."
    lm = load(family)
    read = lambda site: lm.read(IDS, site)
    for l in range(LAYERS):
        torch.testing.assert_close(read(f"resid_pre.{l}") + read(f"attn_out.{l}") + read(f"mlp_out.{l}"), read(f"resid_post.{l}"), rtol=1e-5, atol=1e-5)
        if l: torch.testing.assert_close(read(f"resid_pre.{l}"), read(f"resid_post.{l - 1}"), rtol=0, atol=0)
        if family in PARALLEL:
            with pytest.raises(UserError, match="middle"): read(f"resid_mid.{l}")
        else: torch.testing.assert_close(read(f"resid_mid.{l}"), read(f"resid_pre.{l}") + read(f"attn_out.{l}"), rtol=1e-5, atol=1e-5)
    assert read("attn_out.1").abs().max() > 1e-3 and read("mlp_out.1").abs().max() > 1e-3
    assert read("mlp_hidden.1").shape[-1] == {"gpt2": 64, "gpt_neo": 64}.get(family, 48) and lm.width("resid_post.0") == D


@known_blocks
def test_three_spellings_name_one_place(load, family):
    lm = load(family)
    ours = lm.read(IDS, "resid_post.1")
    for name in ("blocks.1.hook_resid_post", BLOCKS.get(family, "model.layers") + ".1"):
        assert str(lm.site(name)) == "resid_post.1" and torch.equal(lm.read(IDS, name), ours)


SITES = ["resid_pre.1", "resid_mid.1", "resid_post.1", "attn_out.1", "mlp_out.1", "mlp_hidden.1"]

@pytest.mark.parametrize("site", SITES)
@known_blocks
def test_replacing_by_the_same_changes_nothing_and_by_another_does(load, family, site):
    if family in PARALLEL and site.startswith("resid_mid"): return
    lm, clean, seen = load(family), load(family).logits(IDS), []
    same = lm.logits(IDS, site, lambda x: (seen.append(x), x)[1])
    torch.testing.assert_close(same, clean, rtol=1e-5, atol=1e-5)
    assert len(seen) == 1 and torch.equal(seen[0], lm.read(IDS, site))
    other = lm.logits(IDS, site, torch.zeros_like)
    assert other.isfinite().all() and (other - clean).abs().max() > 1e-3
    assert torch.equal(lm.logits(IDS), clean)   # nothing stays behind


@known_blocks
def test_a_replaced_middle_reaches_both_ways_on(load, family):
    "What stands in the middle is seen by the MLP and carried by the residual."
    if family in PARALLEL: return
    lm, new = load(family), torch.randn(2, 12, D)
    caught = {}
    with torch.no_grad():
        handle = lm.blocks[1].register_forward_hook(lambda m, a, out: caught.update(post=out[0] if isinstance(out, tuple) else out))
        writes = lm.logits(IDS, "resid_mid.1", lambda x: new)
        handle.remove()
    mlp = []
    lm.logits(IDS, "resid_mid.1", lambda x: new)
    with lm.watching("resid_mid.1", lambda x: new), lm.watching("mlp_out.1", lambda x: mlp.append(x)): lm.model(IDS)
    torch.testing.assert_close(caught["post"], new + mlp[0], rtol=1e-4, atol=1e-5)
    assert writes.isfinite().all()


@every_family
def test_any_module_is_a_site_by_its_path(load, family):
    "The path of a block reads what a hook of our own sees, and replacing works there."
    lm, path, caught = load(family), BLOCKS.get(family, "model.layers") + ".1", []
    handle = lm.model.get_submodule(path).register_forward_hook(lambda m, a, out: caught.append(out[0] if isinstance(out, tuple) else out))
    clean = lm.logits(IDS); handle.remove()
    assert torch.equal(lm.read(IDS, path), caught[0])
    torch.testing.assert_close(lm.logits(IDS, path, lambda x: x), clean)
    assert (lm.logits(IDS, path, torch.zeros_like) - clean).abs().max() > 1e-3


@every_family
def test_reading_stops_at_the_site(load, family):
    "No later block, and no output layer, is computed."
    lm, path = load(family), BLOCKS.get(family, "model.layers")
    ran, blocks = [], lm.model.get_submodule(path)
    handles = [b.register_forward_pre_hook(lambda m, a, i=i: ran.append(i)) for i, b in enumerate(blocks)]
    handles.append(lm.model.get_output_embeddings().register_forward_pre_hook(lambda m, a: ran.append("head")))
    lm.read(IDS, f"{path}.1"); assert ran == [0, 1]
    ran.clear(); lm.logits(IDS); assert ran == [0, 1, 2, "head"]
    for h in handles: h.remove()


@every_family
def test_bfloat16_is_read_and_replaced(load, family):
    lm, path = load(family, dtype="bfloat16"), BLOCKS.get(family, "model.layers") + ".1"
    rows = lm.read(IDS, path)
    assert rows.dtype == lm.dtype == torch.bfloat16
    torch.testing.assert_close(rows.float(), load(family).read(IDS, path), rtol=.1, atol=.1)
    assert torch.equal(lm.logits(IDS, path, lambda x: x.float()), lm.logits(IDS))


@every_family
def test_a_layer_that_is_not_there_gets_a_sentence(load, family):
    for site in (f"resid_post.{LAYERS}", "nothing.here", BLOCKS.get(family, "model.layers") + ".7"):
        with pytest.raises(UserError) as e: load(family).site(site)
        assert "\n" not in str(e.value) and site in str(e.value)


# --- the whole way -----------------------------------------------------------------------------------

def tiny_run(lm_name, text, site, out, **kw):
    "Train for some steps, measure, and give the metrics."
    cfg = RunConfig(**{**dict(lm=lm_name, text=text, site=site, n=32, k=4, tokens=1_500, batch=256, context=24, dtype="float32", device="cpu"), **kw})
    lm = load_lm(cfg.lm, "cpu", cfg.dtype)
    steps = list(run(cfg, out, lm=lm))
    return steps, measure(SAE.load(out), lm, load_text(text), site, cfg.context, 500)


@every_family
def test_it_trains_on_every_family(folder, text, tmp_path, family):
    steps, m = tiny_run(folder(family), text, BLOCKS.get(family, "model.layers") + ".1", tmp_path / "run")
    assert steps[-1].nmse < steps[0].nmse and 0 < m.nmse < 1 and m.kl > 0 and m.eval_tokens >= 500


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_it_trains_with_every_tokenizer(folder, text, tmp_path, family, special):
    "Special tokens open windows and are never rows, where there are any."
    steps, m = tiny_run(folder(family, special), text, "resid_post.1", tmp_path / "run")
    assert steps[-1].nmse < steps[0].nmse and m.eval_tokens >= 500
    lm, roles = load_lm(folder(family, special), "cpu", "float32"), SPECIAL[special]
    w = next(windows(load_text(text).documents(), lm.tokenizer, 24, 16))
    opens = roles.get("bos_token") or roles.get("cls_token")
    if opens: assert (w.ids[:, 0] == lm.tokenizer.convert_tokens_to_ids(opens)).all() and not w.keep[:, 0].any()
    else: assert w.keep[:, 0].any() and len({*w.ids[:, 0].tolist()}) > 1
    assert torch.equal(w.keep, ~torch.isin(w.ids, torch.tensor(lm.tokenizer.all_special_ids, dtype=torch.long)))
    assert w.ids.shape == (16, 24) and (~w.keep).any() == bool(lm.tokenizer.all_special_ids)   # transformers gives some families special tokens of its own
    assert len(read_rows(lm, w, "resid_post.1")) == int(w.keep.sum())


@pytest.mark.skipif(not (DATA / "stories260K").is_dir(), reason="the shared TinyStories model is not on this machine")
def test_a_real_llama_and_its_text(tmp_path):
    name, text = str(DATA / "stories260K"), str(DATA / "tinystories_1000.txt")
    lm = load_lm(name, "cpu", "float32")
    w = next(windows(load_text(text).documents(held_out=True), lm.tokenizer, 64, 8))
    rows = lm.read(w.ids, "resid_post.3")
    assert rows.shape == (8, 64, 64) and rows.isfinite().all()
    steps, m = tiny_run(name, text, "resid_post.3", tmp_path / "run", n=128, k=8, tokens=10_000, context=64)
    assert m.ce_clean < 3 and steps[-1].nmse < .7 * steps[0].nmse and m.ce_clean < m.ce_spliced < m.ce_zero


# --- texts -------------------------------------------------------------------------------------------

def seen(text, lm, held_out=False, context=24):
    "What the windows of a text decode to, special tokens left out."
    ids = [w.ids[w.keep] for w in windows(text.documents(held_out), lm.tokenizer, context, 1)]   # a window may cut a character, so all at once
    return lm.tokenizer.decode(torch.cat(ids).tolist(), clean_up_tokenization_spaces=False)


def documents(text): return sorted(d.text for side in (False, True) for d in text.documents(side))


WORLD = "日本語の文章です。🦊 jumped over 🐕‍🦺 — naïve café, Ελληνικά, עברית, हिन्दी 🎉🎉 "

@pytest.mark.parametrize("kind, content", [("emoji and CJK", WORLD * 150), ("lines", (WORLD + "\n") * 150), ("no newline, no space", "長" * 6000),
                                           ("one word", "x" * 9000), ("windows lines", "the fox\r\nslept\r\n" * 600), ("with a mark", "a \ufeff" + prose()), ("with NUL", "a\0b " * 2000)])
def test_any_utf8_text_trains(folder, load, tmp_path, kind, content):
    "Nothing of the text is lost or doubled, both sides of the split have some, and a run works."
    path = tmp_path / "text.weird"
    path.write_bytes(content.encode("utf-8"))
    text = load_text(str(path))
    docs = [d.text for d in text.read()]
    same_lines = content.replace("\r\n", "\n")
    assert "".join(docs) in (content, same_lines) and len(docs) >= 10
    sides = [sum(len(d.text) for d in text.documents(side)) for side in (False, True)]
    assert 0.02 < sides[1] / sum(sides) < .3
    whole, got = "".join(d.text for d in text.documents()), seen(text, load("llama"))
    assert len(got) > .9 * len(whole) and got[:200] == whole[:200]
    steps, m = tiny_run(folder("llama"), str(path), "resid_post.1", tmp_path / "run", tokens=600)
    assert steps[-1].step == 3 and m.eval_tokens > 20


def test_a_folder_of_files_is_read_whole(load, folder, tmp_path):
    "Files in folders too; hidden ones and what lies in hidden folders are left alone."
    root = tmp_path / "texts"
    contents = {f"{'abc'[i % 3]}/file{i}.txt": prose(200 + i) for i in range(12)}
    for name, content in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True); (root / name).write_text(content)
    (root / ".hidden").write_bytes(b"\xff\xfe not text")
    (root / ".git").mkdir(); (root / ".git/object").write_bytes(b"\xff\xfe not text")
    text = load_text(str(root))
    characters = lambda parts: sorted("".join("".join(parts).split()))
    assert characters(documents(text)) == characters(contents.values())
    names = {d.name.split("#")[0] for d in text.read()}
    assert names == set(contents)
    steps, _ = tiny_run(folder("gpt2"), str(root), "resid_post.1", tmp_path / "run", tokens=600)
    assert steps[-1].step == 3


def test_a_file_in_a_folder_that_is_no_text_is_named(tmp_path):
    (tmp_path / "a.txt").write_text(prose()); (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff\xd8" * 50)
    with pytest.raises(UserError, match="picture.png"): documents(load_text(str(tmp_path)))


def test_documents_are_kept_apart(load, tmp_path):
    "A separator in the text ends a document, and the token between documents stands there."
    (tmp_path / "t.txt").write_text("<|endoftext|>".join(f"story {i} " + "the fox slept " * 8 for i in range(40)))
    text, lm = load_text(str(tmp_path / "t.txt")), load("llama")
    docs = [d.text for d in text.read()]
    assert len(docs) == 40 and not any("endoftext" in d for d in docs)
    w = next(windows(text.documents(), lm.tokenizer, 200, 4))
    assert (w.ids[:, 1:] == lm.tokenizer.eos_token_id).any()


def test_held_out_rows_are_never_trained_on(load, text):
    "No window of one side stands on the other."
    lm, t = load("gpt2"), load_text(text)
    sides = [{tuple(ids.tolist()) for w in windows(t.documents(side), lm.tokenizer, 24, 4) for ids in w.ids} for side in (False, True)]
    assert sides[0] and sides[1] and not sides[0] & sides[1]
    for side, own in zip((False, True), sides):
        stream = Stream(lm, t, "resid_post.1", 24, 64, held_out=side)
        assert {tuple(ids.tolist()) for w in zip(range(3), stream.windows()) for ids in w[1].ids} <= own


def dataset(**columns):
    "A small data set; with its fingerprint given, since some versions of its dependencies cannot compute one."
    import datasets, pyarrow
    return datasets.Dataset(datasets.table.InMemoryTable(pyarrow.table(columns)), fingerprint="0")


@pytest.mark.parametrize("split", [False, True])
def test_a_folder_of_datasets(folder, load, tmp_path, split):
    datasets = pytest.importorskip("datasets")
    data = dataset(number=list(range(40)), text=[prose(60 + i) for i in range(40)])
    (datasets.DatasetDict({"train": data}) if split else data).save_to_disk(str(tmp_path / "set"))
    text = load_text(str(tmp_path / "set"))
    assert [d.text for d in text.read()] == data["text"][:] and len(list(text.documents(held_out=True))) == 4
    steps, m = tiny_run(folder("llama"), str(tmp_path / "set"), "resid_post.1", tmp_path / "run", tokens=600)
    assert steps[-1].step == 3 and m.eval_tokens > 20


def test_a_dataset_without_text_gets_a_sentence(tmp_path):
    pytest.importorskip("datasets")
    dataset(number=[1, 2]).save_to_disk(str(tmp_path / "set"))
    with pytest.raises(UserError, match="number"): load_text(str(tmp_path / "set"))


def test_a_model_can_be_read_by_two_threads():
    "A run in the background and a reader in the notebook share a model; neither sees or stops the other's pass."
    from concurrent.futures import ThreadPoolExecutor
    lm = load_lm("pylib-64", device="cpu", dtype="float32")
    ids = torch.arange(60).reshape(2, 30)
    rows, logits, changed = lm.read(ids, "resid_post.1"), lm.logits(ids + 60), lm.logits(ids, "resid_post.2", torch.zeros_like)
    work = [(lambda: lm.read(ids, "resid_post.1"), rows), (lambda: lm.logits(ids + 60), logits), (lambda: lm.logits(ids, "resid_post.2", torch.zeros_like), changed)]
    with ThreadPoolExecutor(3) as pool:
        for f, right in [(pool.submit(f), right) for _ in range(40) for f, right in work]: torch.testing.assert_close(f.result(), right)
