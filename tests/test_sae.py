"An SAE on disk says when it is not what was saved; transforms of torch, other precisions and odd rows change nothing."
import json, re
import os
import stat
import struct
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from said import sentence
from torch.fx.experimental.proxy_tensor import make_fx

from sae_nb.core import UserError, generator
from sae_nb.sae import SAE, Channels, Dictionary, SAEConfig, init_
from sae_nb.train import TrainConfig, train

warnings.filterwarnings("error", message=".*checksum")


def draw(*shape, key="x"): return torch.randn(*shape, generator=generator(0, key))


def random_sae(n=24, d=24, k=4, normalise="layer_norm", **kw):
    "An SAE with random weights of every kind; square, so that every exchange of matrices fits."
    sae = SAE(SAEConfig(d=d, n=n, k=k, normalise=normalise, **kw))
    for name, p in sae.named_parameters(): p.data.copy_(draw(*p.shape, key=name))
    return sae


# --- on disk ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_saved_and_loaded_it_is_the_same(tmp_path, dtype):
    sae = random_sae(lm="m", site="resid_post.1", context=7).to(dtype)
    sae.save(tmp_path)
    again = SAE.load(tmp_path)
    assert again.cfg == sae.cfg and again.digest == sae.digest and not any(p.requires_grad for p in again.parameters())
    for name, w in sae.state_dict().items():
        assert again.state_dict()[name].dtype == dtype and torch.equal(again.state_dict()[name], w)
    x = draw(9, 24)
    assert torch.equal(again(x), sae(x))


def test_one_file_is_enough_and_cfg_json_stands_first(tmp_path, monkeypatch):
    "Killed between its two files, a folder either holds no weights or all that they need."
    sae, replace, order = random_sae(), os.replace, []
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(os.path.basename(b)), replace(a, b)))
    sae.save(tmp_path)
    assert order == ["cfg.json", "sae.safetensors"]
    (tmp_path / "cfg.json").unlink()
    assert SAE.load(tmp_path).digest == sae.digest


def test_the_mode_is_that_of_other_files(tmp_path):
    random_sae().save(tmp_path)
    (tmp_path / "other").write_text("")
    modes = {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()}
    assert len(modes) == 1


def test_the_same_sae_gives_the_same_bytes(tmp_path):
    sae, made = random_sae(), set()
    for i in range(12):
        sae.save(tmp_path / str(i))
        made.add((tmp_path / str(i) / "sae.safetensors").read_bytes())
    assert len(made) == 1   # safetensors writes several texts of a header in any order


def rewritten(folder, change, **about):
    "Write the weights of `folder` again with a changed dictionary of tensors, the header's texts kept."
    path = folder / "sae.safetensors"
    with safe_open(path, "pt") as f: header = f.metadata()
    save_file({k: v.contiguous() for k, v in change(load_file(path)).items()}, path, metadata={**header, **about})


def header_changed(folder, change):
    "Change the JSON of the header, the numbers kept."
    path = folder / "sae.safetensors"
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.dumps(change(json.loads(raw[8:8 + size]))).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + size:])


def as_kind(header, kind): return {k: v | {"dtype": kind} if k != "__metadata__" else v for k, v in header.items()}
def swapped(w, a, b): return w | {a: w[b], b: w[a]}
def said(header): return header["__metadata__"]["sae"]
def about(header, text): return header | {"__metadata__": {"sae": text}}
def without(header, name):
    told = json.loads(said(header))
    return about(header, json.dumps({k: v for k, v in told.items() if k != name}))


WRONG = {
    "exchanged matrices": lambda f: rewritten(f, lambda w: swapped(w, "W_enc", "W_dec")),
    "exchanged biases": lambda f: rewritten(f, lambda w: swapped(w, "b_enc", "b_dec")),
    "transposed": lambda f: rewritten(f, lambda w: w | {"W_dec": w["W_dec"].T}),
    "two rows exchanged": lambda f: rewritten(f, lambda w: w | {"W_enc": w["W_enc"].roll(1, 0)}),
    "one sign": lambda f: rewritten(f, lambda w: w | {"b_dec": w["b_dec"] * torch.tensor([-1.] + [1.] * 23)}),
    "other precision": lambda f: rewritten(f, lambda w: {k: v.double() for k, v in w.items()}),
    "header says I32": lambda f: header_changed(f, lambda h: as_kind(h, "I32")),
    "header says I32 of one": lambda f: header_changed(f, lambda h: h | {"W_dec": h["W_dec"] | {"dtype": "I32"}}),
    "header says F32 of halves": lambda f: header_changed(f, lambda h: as_kind(h, "U32")),
    "another k in the header": lambda f: header_changed(f, lambda h: about(h, said(h).replace('"k": 4', '"k": 5'))),
    "another digest": lambda f: header_changed(f, lambda h: about(h, re.sub("[0-9a-f]{64}", "0" * 64, said(h)))),
    "a header without digest": lambda f: header_changed(f, lambda h: without(h, "digest")),
    "a header without settings": lambda f: header_changed(f, lambda h: without(h, "cfg")),
    "settings that are no JSON": lambda f: header_changed(f, lambda h: about(h, "{")),
    "settings that are a list": lambda f: header_changed(f, lambda h: about(h, "[1]")),
    "settings too deep": lambda f: header_changed(f, lambda h: about(h, "[" * 99_999)),
    "huge sizes": lambda f: header_changed(f, lambda h: about(h, said(h).replace('"n": 24', '"n": 9' + "0" * 30))),
}


@pytest.mark.parametrize("how", WRONG)
def test_weights_that_are_not_what_was_saved_are_sentence(tmp_path, how):
    random_sae().save(tmp_path)
    WRONG[how](tmp_path)
    sentence(lambda: SAE.load(tmp_path), "sae.safetensors")


@pytest.mark.parametrize("change", [{"k": 5}, {"relu": False}, {"normalise": "none"}, {"site": "elsewhere"}])
def test_settings_of_another_sae_beside_the_weights_are_sentence(tmp_path, change):
    random_sae().save(tmp_path)
    (tmp_path / "cfg.json").write_text(json.dumps(json.loads((tmp_path / "cfg.json").read_text()) | change))
    sentence(lambda: SAE.load(tmp_path), "cfg.json", "sae.safetensors")


def test_every_flipped_bit_is_seen(tmp_path):
    "One bit anywhere in the file, 600 times, and cut anywhere, 60 times: one sentence each."
    random_sae(n=12, d=6).save(tmp_path)
    path = tmp_path / "sae.safetensors"
    whole = path.read_bytes()
    for place in torch.randint(len(whole) * 8, (600,), generator=generator(0, "bits")).tolist():
        raw = bytearray(whole)
        raw[place // 8] ^= 1 << place % 8
        path.write_bytes(raw)
        try: changed = SAE.load(tmp_path)
        except UserError as e: assert "\n" not in str(e)
        else: raise AssertionError(f"bit {place} was not seen: {changed}")
    for size in torch.randint(len(whole), (60,), generator=generator(0, "cuts")).tolist():
        path.write_bytes(whole[:size])
        sentence(lambda: SAE.load(tmp_path), "sae.safetensors")


def test_weights_of_an_earlier_version_load_with_a_warning(tmp_path):
    "They carry no checksum; what can be checked without one is, and saved again they have one."
    sae = random_sae()
    sae.save(tmp_path)
    def old(change):
        weights = change(dict(sae.state_dict()))
        save_file({k: v.contiguous() for k, v in weights.items()}, tmp_path / "sae.safetensors")
    old(lambda w: w)
    with pytest.warns(UserWarning, match="checksum"): again = SAE.load(tmp_path)
    assert again.digest == sae.digest
    whole = lambda w: {k: v.int() for k, v in w.items()}
    mixed = lambda w: w | {"b_dec": w["b_dec"].double()}
    more = lambda w: w | {"more": w["b_dec"].clone()}
    for change in (whole, mixed, more):
        old(change)
        sentence(lambda: SAE.load(tmp_path), "sae.safetensors")
    old(lambda w: w)
    (tmp_path / "cfg.json").unlink()
    sentence(lambda: SAE.load(tmp_path), "cfg.json")
    again.save(tmp_path)
    assert SAE.load(tmp_path).digest == sae.digest


def test_the_digest_is_of_settings_and_weights_and_nothing_else():
    sae, base = random_sae(), random_sae().digest
    assert sae.digest == base == sae.requires_grad_(False).digest and len(base) == 64
    others = [random_sae(k=5), random_sae(relu=False), random_sae(site="a"), random_sae().double()]
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        other = random_sae()
        getattr(other, name).data.view(-1)[3] += 1e-6
        others.append(other)
    assert len({base, *(o.digest for o in others)}) == 1 + len(others)


def test_a_loaded_sae_can_be_trained_on(tmp_path):
    "Gradients are off after `load`; training asks for them by itself."
    random_sae().save(tmp_path)
    sae, x = SAE.load(tmp_path), draw(64, 24)
    before = sae.W_enc.clone()
    list(train(sae, [x], TrainConfig(tokens=64, batch=64)))
    assert not torch.equal(before, sae.W_enc)


def test_a_place_that_cannot_be_written_or_read_is_sentence(tmp_path, monkeypatch):
    sae = random_sae()
    (tmp_path / "file").write_text("")
    sentence(lambda: sae.save(tmp_path / "file"), "file", "cannot be written")
    sae.save(tmp_path / "run")
    sentence(lambda: SAE.load(tmp_path / "run/sae.safetensors"), "give a folder")
    sentence(lambda: SAE.load(tmp_path / "other"), "does not exist")
    def full(*a, **kw): raise OSError(28, "No space left on device")
    monkeypatch.setattr("safetensors.torch.save_file", full)
    sentence(lambda: random_sae(k=5).save(tmp_path / "new"), "No space left")
    assert not (tmp_path / "new/sae.safetensors").exists()


# --- what it says of itself ---------------------------------------------------------------------------

def test_its_repr_says_what_it_is():
    said = repr(random_sae(n=48, d=24, k=4, lm="pylib-64", site="resid_post.2").double())
    parameters = f"{2 * 48 * 24 + 48 + 24:,} parameters"
    wanted = ("48 latents", "4 active", "24 wide", "layer_norm", parameters, "float64", "resid_post.2 of pylib-64")
    assert all(words in said for words in wanted), said
    assert "\n" not in said and "made for" not in repr(random_sae())


@pytest.mark.parametrize("relu", [True, False])
def test_top_is_by_value(relu):
    "The largest values first, each still at its latent; for rows of any shape."
    sae = random_sae(k=8, relu=relu)
    sae.b_enc.data -= 2 if relu else 30   # without the ReLU all values are negative
    code = sae.encode(draw(5, 7, 24))
    top = code.top(3)
    assert torch.equal(top.values, code.values.sort(-1, descending=True).values[..., :3]) and top.normed is code.normed
    assert torch.equal(code.dense().gather(-1, top.indices), top.values) and sae.decode(top).shape == (5, 7, 24)
    for m in (0, 9): sentence(lambda: code.top(m), str(m), "8")


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("how", ["none", "unit_norm", "layer_norm"])
def test_it_is_the_formula_of_the_paper(how, relu):
    "Equation 2 through every latent in float64, and the mean and scale of each row given back; rows of any shape."
    sae, x = random_sae(n=40, d=24, k=30, normalise=how, relu=relu).double(), 3 * draw(4, 5, 24).double() + 2
    mean, scale = (0., 1.) if how == "none" else (x.mean(-1, keepdim=True), x.std(-1, keepdim=True) + 1e-5)
    if how == "unit_norm": scale = (x - mean).norm(dim=-1, keepdim=True)
    pre = ((x - mean) / scale - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    z = torch.zeros_like(pre).scatter(-1, pre.topk(30).indices, pre.topk(30).values)
    assert (z < 0).any()
    z = z.relu() if relu else z
    torch.testing.assert_close(sae.encode(x).dense(), z)
    torch.testing.assert_close(sae(x), (z @ sae.W_dec + sae.b_dec) * scale + mean)
    torch.testing.assert_close(sae.pre(x.view(20, 24), slice(3, 9)), pre.view(20, 40)[:, 3:9])


def test_a_dictionary_keeps_negative_values_of_signed_codes():
    "Where zeros stand beside them, too."
    rows = draw(30, 24) * (draw(30, 24, key="zeros") > 0)
    code = Dictionary(Channels(), rows).encode(rows)
    assert torch.equal(code.dense(), rows) and code.values.shape[1] == (rows != 0).sum(1).max()


# --- transforms of torch ------------------------------------------------------------------------------

def compiled(sae, x): return torch.compile(sae, backend="aot_eager", fullgraph=True)(x)
def compiled_halves(sae, x): return sae.decode(torch.compile(sae.encode, backend="eager", fullgraph=True)(x))
def compiled_decode(sae, x): return torch.compile(sae.decode, backend="eager", fullgraph=True)(sae.encode(x))
def exported(sae, x): return torch.export.export(sae, (x,), dynamic_shapes=({0: torch.export.Dim("b")},)).module()(x)
def jit_traced(sae, x): return torch.jit.trace(sae, draw(40, x.shape[1], key="other rows"), check_trace=False)(x)
def made_fx(sae, x): return make_fx(sae)(draw(40, x.shape[1], key="other rows"))(x)
def vmapped(sae, x): return torch.vmap(sae)(x.view(4, -1, x.shape[-1])).reshape(x.shape)
def row_by_row(sae, x): return torch.vmap(sae)(x)
def autocast(sae, x):
    with torch.autocast("cpu", dtype=torch.bfloat16): return sae(x)
def autocast_pre(sae, x):
    with torch.autocast("cpu", dtype=torch.bfloat16): pre = sae.pre(x)
    values, indices = pre.topk(sae.cfg.k)
    return sae.normed(x).restore(sae.decode_normed(values.relu(), indices))


WAYS = [compiled, compiled_halves, compiled_decode, exported, jit_traced, made_fx]
WAYS += [vmapped, row_by_row, autocast, autocast_pre]

@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("normalise,n", [("none", 24), ("layer_norm", 512)])
def test_transforms_give_what_eager_gives(way, normalise, n):
    torch._dynamo.reset()
    sae, x = random_sae(n=n, normalise=normalise).requires_grad_(False), draw(40, 24)
    torch.testing.assert_close(way(sae, x), sae(x), rtol=1e-5, atol=1e-4)


def test_jacobians_are_those_of_autograd():
    sae, x = random_sae(n=512).requires_grad_(False), draw(6, 24)
    ours = torch.vmap(torch.func.jacrev(sae))(x)
    theirs = torch.stack([torch.autograd.functional.jacobian(sae, row) for row in x])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_gradients_under_compile_and_autocast_are_the_same():
    torch._dynamo.reset()
    sae, x = random_sae(n=64), draw(40, 24)
    def grads(f):
        sae.zero_grad()
        (f(x) - x).square().mean().backward()
        return [p.grad.clone() for p in sae.parameters()]
    want = grads(sae)
    for f in (torch.compile(sae, backend="aot_eager"), lambda x: autocast(sae, x)):
        for got, w in zip(grads(f), want): torch.testing.assert_close(got, w, rtol=1e-4, atol=1e-6)


# --- numbers ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("normalise", ["none", "unit_norm", "layer_norm"])
def test_half_precision_reconstructs_entries_above_its_range(normalise):
    "65,504 is the largest float16: rows with larger entries come out as those of the same SAE in float32."
    sae = random_sae(normalise=normalise)
    half = random_sae(normalise=normalise).half()
    sae.load_state_dict(half.state_dict())
    x = draw(20, 24) * 1e5
    assert x.abs().max() > 65_504
    code = half.encode(x)
    assert half(x).isfinite().all() and torch.equal(code.indices.sort().values, sae.encode(x).indices.sort().values)
    torch.testing.assert_close(half(x), sae(x))
    torch.testing.assert_close(half.pre(x), sae.pre(x))


@pytest.mark.parametrize("shape", [(5, 23), (5, 4, 25), (), (0,), (24, 5)])
def test_rows_of_a_wrong_width_are_sentence(shape):
    sae = random_sae()
    for f in (sae, sae.encode, sae.pre): sentence(lambda: f(torch.zeros(shape)), "24 wide")
    assert sae(torch.zeros(0, 24)).shape == (0, 24) and sae(torch.zeros(0, 3, 24)).shape == (0, 3, 24)
