"Every causal family that the installed transformers can build at random: each kind of site holds, or is refused in a sentence."
import families
import pytest
import torch

from sae_nb.core import UserError
from sae_nb.lm import LM
from sae_nb.sites import KINDS

IDS = torch.randint(3, 128, (3, 10), generator=torch.Generator().manual_seed(1))   # not the tokens of the library's probe
ALL = {*KINDS}
NO_MIDDLE, NO_MATRIX, ENDS = ALL - {"resid_mid"}, ALL - {"mlp_hidden"}, {"resid_pre", "resid_post"}
# What must be found, so that refusing everything is no way out.
KNOWN = {name: ALL for name in "gpt2 opt llama mistral qwen2 qwen3 gemma gemma2 gemma3_text glm glm4 olmo olmo2 olmo3 granite bloom mpt phi3 gpt_neo gpt_bigcode starcoder2 smollm3 stablelm nemotron minicpm3 ctrl exaone4 persimmon biogpt xglm ernie4_5 cwm".split()}
KNOWN |= {name: NO_MIDDLE for name in "gpt_neox phi gptj codegen falcon cohere cohere2".split()}
KNOWN |= {name: NO_MATRIX for name in "mixtral qwen2_moe qwen3_moe olmoe deepseek_v3 gpt_oss granitemoe llama4_text".split()}
KNOWN |= {name: ENDS for name in "openai-gpt bert roberta electra mamba mamba2 falcon_mamba minimax gpt_neox_japanese doge falcon_h1".split()}
KNOWN |= {name: set() for name in "xlnet reformer zamba2 hrm_text deepseek_v4 prophetnet cpmant".split()}


@pytest.fixture(scope="module", autouse=True)
def quiet():
    from transformers.utils import logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(level)


def close(a, b, size):
    "To the rounding of float32 sums of numbers as large as `size`."
    return bool(((a - b).abs() <= 2e-5 * (1 + size.abs())).all())


def seen_at(lm, places, site=None, new=None):
    "What stands at each of `places` in one pass, with something else put at `site`."
    seen = {}
    from contextlib import ExitStack
    with torch.no_grad(), ExitStack() as stack:
        if site: stack.enter_context(lm.watching(site, new))
        for p in places: stack.enter_context(lm.watching(p, lambda x, p=p: seen.update({p: x}) if p not in seen else None))
        lm.model(IDS, use_cache=False)
    return {p.split(".")[0]: x for p, x in seen.items()}


def sums_hold(v, put=None):
    "Do the sums of a block hold in `v`, where `put` was exchanged?"
    if "attn_out" not in v: return True
    assert "mlp_out" in v   # one is not had without the other
    if "resid_mid" not in v: return put == "resid_post" or close(v["resid_pre"] + v["attn_out"] + v["mlp_out"], v["resid_post"], v["resid_post"].abs() + v["resid_pre"].abs())
    first = put == "resid_mid" or close(v["resid_pre"] + v["attn_out"], v["resid_mid"], v["resid_pre"])
    return first and (put == "resid_post" or close(v["resid_mid"] + v["mlp_out"], v["resid_post"], v["resid_mid"]))


def check_family(lm, layer):
    "The kinds of place in that block; each is tried out, on tokens of our own."
    found = []
    for kind in KINDS:
        try: lm.place(f"{kind}.{layer}")
        except UserError as e:
            assert "\n" not in str(e) and len(str(e)) < 400
            continue
        found.append(kind)
    if not found: return set()
    places = [f"{k}.{layer}" for k in found]
    clean = seen_at(lm, places)
    assert sums_hold(clean)
    for kind, place in zip(found, places):
        read = lm.read(IDS, place)
        assert close(read, clean[kind], clean.get("resid_pre", read).abs().max())
        new = read.roll(1, 0) + .3 * torch.randn(read.shape, generator=torch.Generator().manual_seed(2))
        v = seen_at(lm, places, place, lambda x: new)
        assert sums_hold(v, kind), f"{kind}: the sums do not follow"
        if kind != "resid_mid": assert close(v[kind], new, new)   # the middle is made by another addition behind the first look
        later = {"resid_pre": "resid_post", "attn_out": "resid_post", "resid_mid": "resid_post", "mlp_out": "resid_post", "mlp_hidden": "mlp_out"}.get(kind)
        if later: assert not close(v[later], clean[later], clean[later])
        if kind == "resid_mid": assert close(v["resid_post"] - v["mlp_out"], new, new.abs() + v["resid_post"].abs())
    if "mlp_hidden" in found:   # what the last matrix reads: without it the MLP gives the same everywhere
        flat = seen_at(lm, places, f"mlp_hidden.{layer}", torch.zeros_like)["mlp_out"]
        assert close(flat, flat[:1, :1].expand_as(flat), flat)
    return {*found}


@pytest.mark.parametrize("name", families.names())
def test_every_site_of_every_family_holds_or_is_refused(name):
    if name in families.MISSING: pytest.skip(families.MISSING[name])
    try: model = families.tiny(name)
    except Exception as e:
        assert name not in KNOWN, f"{name} could not be built: {e}"
        pytest.skip(f"{name} has no small model here: {type(e).__name__}")
    try: lm = LM(model, None, name)
    except UserError as e:
        assert "encoder-decoder" in str(e)
        return
    found = check_family(lm, 1)
    assert name not in KNOWN or found == KNOWN[name], f"{name}: found {sorted(found)}"


@pytest.mark.parametrize("name, factor", [("granite", .22), ("granitemoe", .4), ("minicpm3", None), ("llama", 1.)])
def test_what_a_block_multiplies_belongs_to_the_site(name, factor):
    "attn_out is what is added to the stream, not what the module gives."
    lm = LM(families.tiny(name), None, name)
    place = lm.place("attn_out.1")
    assert place.scale == factor if factor else .9 < place.scale < 1
    caught = []
    handle = place.module.register_forward_hook(lambda m, a, out: caught.append(out[0] if isinstance(out, tuple) else out))
    lm.logits(IDS); handle.remove()
    torch.testing.assert_close(lm.read(IDS, "attn_out.1"), place.scale * caught[0])


def test_of_equals_the_outermost_module_is_taken():
    "The last matrix, the dropout behind it and the attention give the same; a hook goes where a reader looks for it."
    lm = LM(families.tiny("gpt2"), None, "gpt2")
    block = lm.blocks[1]
    assert lm.place("attn_out.1").module is block.attn and lm.place("mlp_out.1").module is block.mlp
    assert lm.place("resid_mid.1").module is block.ln_2 and lm.place("mlp_hidden.1").module is block.mlp.c_proj


def test_zeroing_attention_does_not_delete_the_stream():
    "Bloom adds the residual inside its attention; what is left without attention is what entered."
    lm = LM(families.tiny("bloom"), None, "bloom")
    v = seen_at(lm, ["resid_pre.1", "resid_mid.1"], "attn_out.1", torch.zeros_like)
    assert close(v["resid_pre"], v["resid_mid"], v["resid_pre"]) and v["resid_pre"].abs().max() > 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gpt2", "olmo2", "granite", "bloom", "gpt_neox", "gemma2"])
def test_sites_are_found_in_short_numbers_too(name, dtype):
    lm, exact = LM(families.tiny(name).to(dtype), None, name), LM(families.tiny(name), None, name)
    for kind in KNOWN[name]:
        place, right = lm.place(f"{kind}.1"), exact.place(f"{kind}.1")
        names = [{m: n for n, m in x.model.named_modules()} for x in (lm, exact)]
        assert names[0][place.module] == names[1][right.module] and place.side == right.side
        assert abs(place.scale - right.scale) < .01


@pytest.mark.parametrize("massive", [1., 1e4])
def test_a_massive_token_does_not_hide_a_wrong_sum(massive):
    "Rounding is judged entry by entry: one large activation does not excuse the others."
    model = families.tiny("olmo2").bfloat16()
    model.model.embed_tokens.weight[:, 0] *= massive
    place = LM(model, None, "olmo2").place("attn_out.1")
    assert place.module is model.model.layers[1].post_attention_layernorm
