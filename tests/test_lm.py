"The subject model: what it reads, what it refuses, who else may use it, and how it is recognised."
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import families
import numpy as np
import pytest
import torch
from torch import nn
from test_models import SPECIAL, model, prose, tokenizer

import sae_nb.lm as module
from sae_nb.core import UserError
from sae_nb.lm import LM, load_lm
from sae_nb.sites import Site, find_blocks, prove
from sae_nb.text import load_text, windows

SITE = "resid_post.1"
IDS = torch.randint(300, 1200, (2, 12), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def lm(): return load_lm("pylib-64", device="cpu", dtype="float32")


def saved(path, made, special="bos and eos"):
    "The folder of a model and a tokenizer."
    made.save_pretrained(path)
    tokenizer(SPECIAL[special]).save_pretrained(path)
    return str(path)


# --- from a text to ids ------------------------------------------------------------------------------

def test_the_blocks_of_an_image_tower_are_not_the_models():
    "Though there are more of them, and they look the same."
    blocks = lambda many: nn.ModuleList(nn.ModuleDict(dict(attn=nn.Linear(4, 4), mlp=nn.Linear(4, 4))) for _ in range(many))
    model = nn.ModuleDict(dict(vision_tower=nn.ModuleDict(dict(layers=blocks(5))), layers=blocks(2)))
    assert find_blocks(model) is model["layers"]


@pytest.mark.parametrize("special", SPECIAL)
def test_a_text_is_read_as_training_windows_have_it(tmp_path, special):
    "The same ids as the head of a window, whose first token opens it where the model has one."
    lm = load_lm(saved(tmp_path / "lm", model("gpt2"), special), "cpu", "float32")
    (tmp_path / "t.txt").write_text(prose())
    text = load_text(str(tmp_path / "t.txt"))
    doc = next(text.documents())
    window = next(windows([doc], lm.tokenizer, 24, 1)).ids
    ids = lm.tokens(doc.text[:200])
    assert ids.dtype == torch.long and ids.shape[0] == 1
    assert torch.equal(ids[:, :20], window[:, :20])
    roles = SPECIAL[special]
    opening = roles.get("bos_token") or roles.get("cls_token")
    plain = lm.tokenizer("the fox", add_special_tokens=False)["input_ids"]
    assert lm.tokens("the fox")[0].tolist() == ([lm.tokenizer.convert_tokens_to_ids(opening)] if opening else []) + plain


def test_the_opening_token_stands_there_once(tmp_path):
    "Also where the tokenizer would put one there itself, and one at the end."
    from tokenizers.processors import TemplateProcessing
    tok = tokenizer(SPECIAL["bos and eos"])
    marks = [(t, tok.convert_tokens_to_ids(t)) for t in ("<s>", "</s>")]
    tok.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=marks)
    assert tok("the fox")["input_ids"][-1] == marks[1][1]
    ids = LM(families.tiny("gpt2", vocab_size=400), tok).tokens("the fox")[0].tolist()
    assert ids[0] == marks[0][1] and marks[0][1] not in ids[1:] and ids[-1] != marks[1][1]


def test_text_and_every_form_of_ids_are_the_same(lm):
    "A text, a row, a list, an array and a batch of one give the same activations and logits, as a batch."
    ids = lm.tokens("def __init__(self):")
    row = ids[0]
    right, logits = lm.read(ids, SITE), lm.logits(ids)
    assert right.shape == (1, len(row), 64)
    for given in ("def __init__(self):", row, row.tolist(), row.numpy(), row.to(torch.int32), [row.tolist()], np.array([row.tolist()])):
        torch.testing.assert_close(lm.read(given, SITE), right)
        torch.testing.assert_close(lm.logits(given), logits)
    without = lm.read(row[1:], SITE)
    assert (without[0] - right[0, 1:]).abs().max() > .1   # the opening token matters


WRONG = [([], "empty"), (torch.zeros(2, 0, dtype=torch.long), "empty"), (torch.rand(4), "float32.*whole"), ([1.5, 2.], "whole"), (torch.ones(3, dtype=torch.bool), "bool"),
         ([1, 9_999], "from 1 to 9999"), ([-1, 5], "from -1 to 5"), ([[1, 2], [3]], "equally long"), (None, "neither a text"), (["a", "b"], "neither a text"),
         (torch.ones(1, 2, 3, dtype=torch.long), r"shape \(1, 2, 3\)"), (torch.tensor(3), r"shape \(\)"), (torch.ones(1, 10_000, dtype=torch.long), "10000 tokens.*at most 256")]

@pytest.mark.parametrize("ids, says", WRONG, ids=[says for _, says in WRONG])
def test_ids_that_are_none_get_a_sentence(lm, ids, says):
    for read in (lambda: lm.read(ids, SITE), lambda: lm.logits(ids), lambda: lm.logits(ids, SITE, lambda x: x)):
        with pytest.raises(UserError, match=says) as e: read()
        assert "\n" not in str(e.value) and "site" not in str(e.value)


def test_the_last_token_and_the_longest_context_are_still_read(lm):
    "The borders themselves are inside."
    lm.read([0, lm.vocabulary - 1], SITE)
    assert lm.read(torch.ones(1, lm.context, dtype=torch.long), SITE).shape[1] == lm.context == 256
    with pytest.raises(UserError, match=f"to {lm.vocabulary}, but"): lm.read([0, lm.vocabulary], SITE)
    with pytest.raises(UserError, match="257 tokens"): lm.read(torch.ones(1, lm.context + 1, dtype=torch.long), SITE)


def test_texts_that_cannot_be_read_get_a_sentence(lm):
    with pytest.raises(UserError, match="list: give one string"): lm.tokens(["a"])
    with pytest.raises(UserError, match="no tokenizer"): LM(lm.model, None).tokens("a")
    with pytest.raises(UserError, match="at most 256"): lm.tokens("x = 1\n" * 500)
    assert lm.tokens("").tolist() == [[lm.tokenizer.bos_token_id]]


# --- what is put in a place ----------------------------------------------------------------------------

def test_logits_of_the_last_tokens(lm):
    full = lm.logits(IDS)
    torch.testing.assert_close(lm.logits(IDS, last=3), full[:, -3:])
    changed = lm.logits(IDS, SITE, lambda x: x * 2)
    torch.testing.assert_close(lm.logits(IDS, SITE, lambda x: x * 2, last=5), changed[:, -5:])
    assert lm.logits(IDS).shape == full.shape   # nothing stays behind


def test_what_cannot_be_put_gets_a_sentence(lm):
    for new, says in ((lambda x: None, "return what"), (lambda x: x[..., :3], r"\[b, 12, 64\]"), (lambda x: x[:, 1:], r"\[b, 12, 64\]"), (lambda x: 1., r"\[b, 12, 64\]")):
        with pytest.raises(UserError, match=says): lm.logits(IDS, SITE, new)
    with pytest.raises(UserError, match="belong together"): lm.logits(IDS, SITE)
    with pytest.raises(UserError, match="belong together"): lm.logits(IDS, new=lambda x: x)


def test_a_batch_may_grow_at_the_site(lm):
    "One window in, several variants on from there: as if each had been read alone."
    rows = lm.read(IDS[:1], SITE) + torch.arange(3)[:, None, None] * torch.randn(64, generator=torch.Generator().manual_seed(0))
    got = lm.logits(IDS[:1], SITE, lambda x: rows)
    for i in range(3): torch.testing.assert_close(got[i:i + 1], lm.logits(IDS[:1], SITE, lambda x: rows[i:i + 1]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("site", ["resid_mid.1", "mlp_out.1", "attn_out.1", "resid_post.1"])
def test_what_is_seen_and_what_is_put_belong_to_the_caller(site):
    "Falcon adds to what its MLP gave in place; neither the tensor seen nor the one put in changes."
    lm, kept = LM(families.tiny("falcon" if site != "resid_mid.1" else "gpt2"), None), []
    ids = IDS % 100 + 3
    new = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(0))
    before = new.clone()
    lm.logits(ids, site, lambda x: (kept.append((x, x.clone())), new)[1])
    assert torch.equal(*kept[0]) and torch.equal(new, before)
    torch.testing.assert_close(kept[0][0], lm.read(ids, site))
    with lm.watching(site, lambda x: kept.append((x, x.clone()))): lm.logits(ids)
    assert torch.equal(*kept[1])


def test_gradients_flow_through_what_is_put(lm):
    "A linear readout of what is put in has the slope that small steps measure."
    x, step = lm.read(IDS, SITE), torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(0))
    t = torch.tensor(0., requires_grad=True)
    out = lm.logits(IDS, SITE, lambda _: x + t * step)[0, -1, 400]
    slope, = torch.autograd.grad(out, t)
    f = lambda e: lm.logits(IDS, SITE, lambda _: x + e * step)[0, -1, 400].item()
    assert abs(slope.item() - (f(1e-2) - f(-1e-2)) / 2e-2) < 1e-2 * abs(slope.item()) + 1e-3
    assert all(p.grad is None for p in lm.model.parameters())


# --- watching ------------------------------------------------------------------------------------------

def test_watching_sees_every_pass_while_open_and_replaces_where_asked(lm):
    seen, clean = [], lm.logits(IDS)
    with lm.watching(SITE, seen.append):
        torch.testing.assert_close(lm.logits(IDS), clean)
        lm.logits(IDS[:1])
    assert [len(x) for x in seen] == [2, 1] and torch.equal(seen[0], lm.read(IDS, SITE))
    with lm.watching(SITE, torch.zeros_like): zeroed = lm.logits(IDS)
    torch.testing.assert_close(zeroed, lm.logits(IDS, SITE, torch.zeros_like))
    assert torch.equal(lm.logits(IDS), clean) and len(seen) == 2


@pytest.mark.parametrize("outer, inner", [("resid_pre.1", "resid_mid.1"), ("resid_mid.1", "resid_pre.1"), ("resid_mid.1", "resid_mid.1"), ("attn_out.1", "resid_mid.1"), ("resid_mid.1", "attn_out.1")])
def test_nested_watches_of_one_block_agree(lm, outer, inner):
    "Whichever is opened first, the middle that is put in is the middle that the MLP adds to."
    g = torch.Generator().manual_seed(0)
    new = {s: torch.randn(2, 12, 64, generator=g) for s in ("resid_pre.1", "resid_mid.1", "attn_out.1")}
    got, mid = {}, []
    with lm.watching(outer, lambda x: new[outer]), lm.watching(inner, lambda x: new[inner]), lm.watching("resid_mid.1", mid.append):
        with lm.watching("mlp_out.1", lambda x: got.update(mlp=x)), lm.watching("resid_post.1", lambda x: got.update(post=x)): lm.logits(IDS)
    torch.testing.assert_close(got["post"], mid[0] + got["mlp"], rtol=1e-4, atol=1e-4)
    if inner == "resid_mid.1" or "attn_out.1" not in (outer, inner): torch.testing.assert_close(mid[0], new["resid_mid.1"], rtol=1e-4, atol=1e-4)
    if inner == "attn_out.1": torch.testing.assert_close(mid[0], lm.read(IDS, "resid_pre.1") + new["attn_out.1"], rtol=1e-4, atol=1e-4)


def test_what_fails_in_a_pass_leaves_nothing_behind(lm):
    clean = lm.logits(IDS)
    for site in (SITE, "resid_mid.1", "attn_out.1"):
        def fails(x): raise RuntimeError("mine")
        with pytest.raises(RuntimeError, match="mine"): lm.logits(IDS, site, fails)
        with pytest.raises(RuntimeError, match="mine"), lm.watching(site, fails): lm.read(IDS, "resid_post.3")
        assert torch.equal(lm.logits(IDS), clean)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())


def test_a_function_may_read_the_model_while_it_is_asked(lm):
    "A pass made inside a pass sees the model as it is, and no recursion."
    inside = []
    def new(x):
        inside.append(lm.read(IDS, SITE))
        return torch.zeros_like(x)
    changed = lm.logits(IDS, SITE, new)
    assert len(inside) == 1 and torch.equal(inside[0], lm.read(IDS, SITE))
    torch.testing.assert_close(changed, lm.logits(IDS, SITE, torch.zeros_like))


def test_a_site_can_be_asked_for_while_another_is_watched():
    "Proving a place does not show its random tokens to anyone."
    lm, seen = load_lm("pylib-64", "cpu", "float32"), []
    lm.site(SITE)
    with lm.watching(SITE, seen.append): lm.read(IDS, "resid_post.2")
    assert len(seen) == 1 and seen[0].shape == (2, 12, 64)
    with lm.watching(SITE, torch.zeros_like): lm.site("attn_out.2")   # found although the stream is replaced


def test_a_watch_acts_in_its_own_thread_only(lm):
    "While one thread replaces the stream, another reads and measures the model as it is."
    clean, rows, turn = lm.logits(IDS), lm.read(IDS, "resid_post.2"), threading.Barrier(2, timeout=60)
    found = {}
    def other():
        turn.wait()
        found.update(logits=lm.logits(IDS), rows=lm.read(IDS, "resid_post.2"), last=lm.logits(IDS, last=2))
        turn.wait()
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(other)
        with lm.watching("resid_mid.1", torch.zeros_like):
            turn.wait()
            turn.wait()
            mine = lm.logits(IDS)
        job.result()
    torch.testing.assert_close(found["logits"], clean)
    torch.testing.assert_close(found["rows"], rows)
    torch.testing.assert_close(found["last"], clean[:, -2:])
    assert (mine - clean).abs().max() > .1


def test_many_threads_on_one_model(lm):
    "Everything at once, each as alone; a fresh model is proved by several threads at the same time."
    fresh = LM(lm.model, lm.tokenizer, "fresh")
    work = [(lambda m: m.read(IDS, "resid_mid.1")), (lambda m: m.logits(IDS, "resid_mid.2", torch.zeros_like)), (lambda m: m.logits(IDS, last=2)),
            (lambda m: m.read("x = 1", "mlp_hidden.1")), (lambda m: m.logits(IDS, "attn_out.3", lambda x: x * 2, last=1))]
    right = [f(lm) for f in work]
    with ThreadPoolExecutor(5) as pool:
        jobs = [(pool.submit(f, fresh), r) for _ in range(4) for f, r in zip(work, right)]
        for job, r in jobs: torch.testing.assert_close(job.result(), r, rtol=1e-4, atol=1e-4)


# --- places are proved ---------------------------------------------------------------------------------

def test_a_place_is_proved_once_and_cheaply(lm):
    "Two short passes for a site, none when it is asked for again."
    fresh, ran = LM(lm.model, lm.tokenizer, "fresh"), []
    handle = lm.model.register_forward_pre_hook(lambda m, args: ran.append(args[0].numel()))
    fresh.site(SITE)
    first = list(ran)
    fresh.site("blocks.1.hook_resid_post")
    fresh.site("transformer.h.1")
    again = len(ran)
    handle.remove()
    assert len(first) == again == 3 and max(first) <= 32


def test_a_module_that_is_passed_twice_is_no_place():
    "Shared layers: reading would give the first pass, replacing change both."
    made = families.tiny("gpt2", n_layer=3)
    made.transformer.h[2] = made.transformer.h[1]
    lm = LM(made, None)
    for site in ("resid_post.1", "attn_out.2", "transformer.h.1.mlp"):
        with pytest.raises(UserError): lm.site(site)
    assert str(lm.site("resid_post.0")) == "resid_post.0"


def test_a_module_that_gives_no_vectors_or_is_not_reached_is_no_place(lm):
    made = families.tiny("gpt2")
    made.unused = torch.nn.Linear(32, 32)
    other = LM(made.requires_grad_(False), None)
    for m, site in ((lm, "transformer.wpe"), (other, "unused"), (lm, "")):
        with pytest.raises(UserError) as e: m.read(IDS % 100, site)
        assert "\n" not in str(e.value)


class Copying(torch.nn.Module):
    "A block that computes what its attention gives a second time, on the side, and goes on with that."
    def __init__(self, faithful):
        super().__init__()
        self.faithful, self.attn, self.norm, self.mlp = faithful, torch.nn.Linear(16, 16), torch.nn.LayerNorm(16), torch.nn.Linear(16, 16)

    def forward(self, x):
        attn = self.attn(x)
        copy = torch.nn.functional.linear(x, self.attn.weight, self.attn.bias)
        mid = x + self.faithful * attn + (1 - self.faithful) * copy
        return mid + self.mlp(self.norm(mid))


def test_a_part_whose_output_is_not_used_is_refused():
    "The numbers look right, but what is put there would go nowhere."
    x = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))
    for faithful in (1., .5, 0.):
        torch.manual_seed(0)
        block = Copying(faithful).requires_grad_(False)
        found = lambda kind: prove(Site(kind, "0"), block, lambda: block(x), (2, 8))
        assert found("mlp_out").module is block.mlp and found("resid_post").module is block
        if faithful == 1: assert found("attn_out").module is block.attn and found("resid_mid").writer.module is block.attn
        else:
            for kind in ("attn_out", "resid_mid"):
                with pytest.raises(UserError, match="go on with"): found(kind)


class Aside(Copying):
    "A block that asks one of its modules and does not use the answer."
    def forward(self, x):
        self.attn(x)
        return x + self.mlp(x)


def test_a_module_whose_answer_nobody_uses_is_refused():
    block, x = Aside(0).requires_grad_(False), torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))
    found = lambda name: prove(Site("module", name), getattr(block, name), lambda: block(x), (2, 8))
    assert found("mlp").module is block.mlp
    with pytest.raises(UserError, match="go on with"): found("attn")


class Turned(Copying):
    "A block whose MLP comes first."
    def forward(self, x):
        mid = x + self.mlp(self.norm(x))
        return mid + self.attn(self.faithful(mid))


def test_what_comes_first_is_not_attention_for_that():
    "The sums come out with the roles exchanged too; the names decide which is which, and then there is no middle."
    torch.manual_seed(0)
    block, x = Turned(torch.nn.LayerNorm(16)).requires_grad_(False), torch.randn(2, 8, 16)
    found = lambda kind: prove(Site(kind, "0"), block, lambda: block(x), (2, 8))
    assert found("attn_out").module is block.attn and found("mlp_out").module is block.mlp
    with pytest.raises(UserError, match="no middle"): found("resid_mid")


def test_a_part_that_writes_nothing_is_not_guessed():
    made = families.tiny("gpt2")
    made.transformer.h[1].attn.c_proj.weight.zero_()
    made.transformer.h[1].attn.c_proj.bias.zero_()
    lm = LM(made, None)
    with pytest.raises(UserError): lm.site("attn_out.1")
    assert lm.site("resid_post.1") and lm.site("attn_out.0")


# --- causal or not ---------------------------------------------------------------------------------------

def small(kind, config, **more):
    import transformers as t
    size = dict(vocab_size=320, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, max_position_embeddings=64)
    torch.manual_seed(0)
    return getattr(t, kind)(getattr(t, config)(**size, **more))


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertLMHeadModel"])
def test_a_model_that_looks_ahead_is_refused(tmp_path, kind):
    "Its next-token loss would be a number without a meaning."
    with pytest.raises(UserError, match="looks ahead") as e: load_lm(saved(tmp_path, small(kind, "BertConfig")), "cpu", "float32")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_model_as_a_decoder_is_read(tmp_path, dtype):
    assert load_lm(saved(tmp_path, small("BertLMHeadModel", "BertConfig", is_decoder=True)), "cpu", dtype).logits(IDS % 300).isfinite().all()


def test_looking_ahead_is_noticed_without_loading_too():
    lm = LM(small("BertLMHeadModel", "BertConfig"), None)
    for f in (lambda: lm.logits(IDS % 300), lambda: lm.read(IDS % 300, "resid_post.0"), lambda: lm.site("resid_post.0")):
        with pytest.raises(UserError, match="looks ahead"): f()


def test_one_layer_that_looks_ahead_is_enough():
    "A gpt2 whose last layer leaks the mean of the window, a thousandth of it."
    made = families.tiny("gpt2")
    made.transformer.h[1].register_forward_hook(lambda m, a, out: out + .001 * out.mean(1, keepdim=True) if torch.is_tensor(out) else (out[0] + .001 * out[0].mean(1, keepdim=True), *out[1:]))
    with pytest.raises(UserError, match="looks ahead"): LM(made, None).logits(IDS % 100)


@pytest.mark.parametrize("kind, config", [("BartForConditionalGeneration", "BartConfig"), ("T5ForConditionalGeneration", "T5Config")])
def test_an_encoder_decoder_is_refused(tmp_path, kind, config):
    import transformers as t
    sizes = dict(vocab_size=320, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64)
    if config == "T5Config": sizes = dict(vocab_size=320, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    made = getattr(t, kind)(getattr(t, config)(**sizes))
    with pytest.raises(UserError, match="encoder-decoder"): load_lm(saved(tmp_path, made), "cpu", "float32")
    with pytest.raises(UserError, match="encoder-decoder"): LM(made, None)


def test_predictions_that_are_no_numbers_are_told():
    made = families.tiny("gpt2")
    made.transformer.ln_f.weight.mul_(float("inf"))
    with pytest.raises(UserError, match="NaN or infinity: its weights"): LM(made, None).logits(IDS % 100)
    with pytest.raises(UserError, match="NaN or infinity: load it"): LM(made.bfloat16(), None).logits(IDS % 100)


# --- whose model it is -----------------------------------------------------------------------------------

def test_the_model_of_the_caller_stays_as_it_is():
    "Its mode, its gradients and its hooks; what training changes is seen."
    made = families.tiny("gpt2", resid_pdrop=.5).train().requires_grad_(True)
    made.transformer.h[1].eval()
    mode, grads = [m.training for m in made.modules()], [p.requires_grad for p in made.parameters()]
    lm, ids = LM(made, None), IDS % 100 + 3
    a, b = lm.logits(ids), lm.logits(ids)
    lm.read(ids, "resid_mid.1")
    assert torch.equal(a, b) and not a.requires_grad      # no dropout, no graph
    assert [m.training for m in made.modules()] == mode and [p.requires_grad for p in made.parameters()] == grads
    assert all(p.grad is None for p in made.parameters()) and lm.model is not made
    assert {p.data_ptr() for p in lm.model.parameters()} == {p.data_ptr() for p in made.parameters()}   # no second copy of the weights
    loss = made(ids, labels=ids).loss
    loss.backward()
    with torch.no_grad():
        for p in made.parameters(): p -= .5 * p.grad
    assert (lm.logits(ids) - a).abs().max() > 1e-3
    torch.testing.assert_close(lm.logits(ids), made.eval()(ids).logits.detach())


def test_a_twin_shares_what_is_no_weight_too():
    made = families.tiny("llama").train()
    twin = LM(made, None).model
    assert twin is not made and [b.data_ptr() for b in twin.buffers()] == [b.data_ptr() for b in made.buffers()] != []


def test_a_frozen_model_is_taken_as_it_is(lm):
    assert LM(lm.model, None).model is lm.model and not any(m.training for m in lm.model.modules())
    assert not any(p.requires_grad for p in lm.model.parameters())


# --- fingerprints ----------------------------------------------------------------------------------------

def test_the_fingerprint_is_of_what_the_model_is(tmp_path):
    "Not of its name, its folder or the precision it was loaded in."
    a, b = saved(tmp_path / "a", model("llama")), saved(tmp_path / "b", model("llama"))
    prints = [load_lm(x, "cpu", d).fingerprint for x, d in ((a, "float32"), (b, "float32"), (a, "bfloat16"))]
    assert len({*prints}) == 1 and len(prints[0]) == 64


def change_weight(path):
    made = model("llama")
    made.model.layers[2].mlp.up_proj.weight.data[5, 3] += .1
    saved(path, made)


def change_words(path):
    saved(path, model("llama"))
    file = path / "tokenizer.json"
    content = json.loads(file.read_text())
    words = content["model"]["vocab"]
    a, b = [w for w in words if len(w) == 1][40:42]
    words[a], words[b] = words[b], words[a]
    file.write_text(json.dumps(content))


def change_act(path):
    saved(path, model("llama"))
    content = json.loads((path / "config.json").read_text())
    content["hidden_act"] = "gelu"
    (path / "config.json").write_text(json.dumps(content))


def change_special(path): saved(path, model("llama"), "eos only")


def change_role(path):
    "The same words, but the opening token is no longer said to be one."
    saved(path, model("llama"))
    file = path / "tokenizer_config.json"
    content = json.loads(file.read_text())
    del content["bos_token"]
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("change", [change_weight, change_words, change_act, change_special, change_role])
def test_the_fingerprint_changes_with_the_model(tmp_path, change):
    first = load_lm(saved(tmp_path / "a", model("llama")), "cpu", "float32").fingerprint
    change(tmp_path / "b")
    assert load_lm(str(tmp_path / "b"), "cpu", "float32").fingerprint != first


def test_a_fingerprint_is_computed_once(lm, monkeypatch):
    first = lm.fingerprint
    monkeypatch.setattr(module, "_weights", lambda model: 1 / 0)
    assert lm.fingerprint == first


def test_of_a_large_model_every_so_manieth_weight_is_read(lm):
    "Shapes count all the same, and it is still the weights that are read."
    few = module._weights(lm.model, most=1000)
    assert few != module._weights(lm.model) and few == module._weights(lm.model, most=1000)
    assert few.keys() == module._weights(lm.model).keys()


# --- loading ---------------------------------------------------------------------------------------------

@pytest.fixture
def no_hub(monkeypatch):
    "A hub that does not answer, and nobody who asks it anything but whether it is there."
    from huggingface_hub import constants
    from transformers import AutoConfig, AutoModelForCausalLM
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"): monkeypatch.delenv(name, raising=False)
    asked, config, weights = [], AutoConfig.from_pretrained, AutoModelForCausalLM.from_pretrained
    def only_folders(real):
        def load(source, *args, **kwargs):
            asked.append(source)
            assert Path(source).is_dir(), "asks the network"
            return real(source, *args, **kwargs)
        return load
    monkeypatch.setattr(AutoConfig, "from_pretrained", only_folders(config))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", only_folders(weights))
    return asked


@pytest.mark.parametrize("name", ["gpt2", "EleutherAI/pythia-70m"])
def test_a_hub_that_does_not_answer_is_told_at_once_and_quietly(no_hub, name, capfd):
    with pytest.raises(UserError, match="cannot be reached.*pylib-64") as e: load_lm(name, "cpu")
    assert not no_hub and capfd.readouterr() == ("", "") and name in str(e.value)


def test_what_was_downloaded_before_is_used_without_a_hub(no_hub, tmp_path, monkeypatch):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--me--mine"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    saved(folder / "snapshots" / ("0" * 40), model("llama"))
    lm = load_lm("me/mine", "cpu", "float32")
    torch.testing.assert_close(lm.logits(IDS % 300), model("llama").eval()(IDS % 300).logits.detach())
    assert lm.name == "me/mine" and no_hub


def test_reachable_means_that_somebody_listens(monkeypatch):
    import socket
    from huggingface_hub import constants
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"): monkeypatch.delenv(name, raising=False)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen(1)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{s.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        assert module.hub_reachable()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert not module.hub_reachable()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert not module.hub_reachable()
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    assert module.hub_reachable()


@pytest.mark.parametrize("name", ["no such folder/at all/x", "../nowhere/x", "a b", ""])
def test_names_that_are_none_get_a_sentence(name, capfd):
    with pytest.raises(UserError, match="lm ") as e: load_lm(name, "cpu")
    assert "\n" not in str(e.value)


def test_a_path_and_a_home_are_taken(tmp_path, monkeypatch):
    folder = Path(saved(tmp_path / "mine", model("gpt2")))
    monkeypatch.setenv("HOME", str(tmp_path))
    a, b = load_lm(folder, "cpu", "float32"), load_lm("~/mine", "cpu", "float32")
    torch.testing.assert_close(a.logits(IDS % 300), b.logits(IDS % 300))
    assert a.name == str(folder) and load_lm(Path("~/mine"), "cpu").context == 128


@pytest.mark.parametrize("known", [True, False])
def test_code_beside_a_model_is_never_run(tmp_path, monkeypatch, known):
    "Even where somebody would say yes; a family that transformers knows is loaded by transformers' own code."
    monkeypatch.setattr("builtins.input", lambda *a: "y")
    folder, mark = Path(saved(tmp_path / "lm", model("gpt2"))), tmp_path / "ran"
    code = f"open({str(mark)!r}, 'w').write('x')\nfrom transformers import GPT2Config as Mine, GPT2LMHeadModel as Model\n"
    (folder / "mine.py").write_text(code)
    config = json.loads((folder / "config.json").read_text()) | {"auto_map": {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Model"}}
    if not known: config["model_type"] = "mine"
    (folder / "config.json").write_text(json.dumps(config))
    if known: assert load_lm(folder, "cpu", "float32").logits(IDS % 300).isfinite().all()
    else:
        with pytest.raises(UserError, match="could not be loaded"): load_lm(folder, "cpu")
    assert not mark.exists()


def test_settings_of_context_that_are_none(monkeypatch, lm):
    "Some configurations say -1 where there is no limit."
    other = LM(families.tiny("bloom"), None)
    assert other.context is None and other.read(torch.ones(1, 300, dtype=torch.long), "resid_post.0").shape[1] == 300
    monkeypatch.setattr(lm.model.config, "n_positions", -1)
    assert lm.context is None


def test_loading_leaves_the_verbosity_of_transformers(lm):
    from transformers.utils import logging
    level = logging.get_verbosity()
    logging.set_verbosity_info()
    load_lm("pylib-64", "cpu")
    try: assert logging.get_verbosity() == logging.INFO and os.environ.get("TRANSFORMERS_VERBOSITY") is None
    finally: logging.set_verbosity(level)


def without_a_tensor(folder):
    from safetensors.torch import load_file, save_file
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def without_weights(folder): (folder / "model.safetensors").unlink()


def cut_short(folder): (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5_000])


def no_json(folder): (folder / "config.json").write_text("{" * 9)


def deep_json(folder): (folder / "config.json").write_text("[" * 100_000)


def no_kind(folder): (folder / "config.json").write_text("{}")


def another_shape(folder):
    content = json.loads((folder / "config.json").read_text()) | dict(hidden_size=24)
    (folder / "config.json").write_text(json.dumps(content))


def no_words(folder): (folder / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize("damage, says", [(without_a_tensor, "lacks weights, model.layers.1.mlp.up_proj"), (without_weights, "could not be loaded"), (cut_short, "could not be loaded"),
                                          (no_json, "could not be loaded"), (deep_json, "could not be loaded"), (no_kind, "could not be loaded"), (another_shape, "lm .*mine"), (no_words, "tokenizer")])
def test_a_damaged_folder_gets_a_sentence(tmp_path, damage, says):
    folder = Path(saved(tmp_path / "mine", model("llama")))
    damage(folder)
    with pytest.raises(UserError, match=says) as e: load_lm(folder, "cpu", "float32")
    assert "\n" not in str(e.value) and str(folder) in str(e.value)
