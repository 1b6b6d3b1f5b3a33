"""Re-make the packaged subject models from the Python standard library.

    python recipes/subject_models.py tokenizer --out DIR
    python recipes/subject_models.py train --width 256 --out DIR
    python recipes/subject_models.py pack --out DIR       # float16 weights + curves into sae_nb/assets

Training text: library modules and documentation topics not held out, plus the test suite at a fixed
share of the windows. Hidden matrices are trained with Muon, everything else with AdamW; the learning
rate is warmed up over 2 % of the tokens and falls linearly to zero over the last 40 %. A run is
resumed from DIR/<name>/state.pt when that file is there.
"""
import argparse, json, math, os, time
from pathlib import Path

import torch

from sae_nb.core import write_atomic
from sae_nb.text import is_held_out, python_library, python_topics

SIZES = {64: dict(n_layer=4, n_head=2), 128: dict(n_layer=4, n_head=2), 256: dict(n_layer=6, n_head=4)}
# tokens, AdamW's and Muon's learning rate of the packaged models; rates from short sweeps at widths 64 and 256
SETTINGS = {64: (24_000_000, 6e-3, 0.04), 128: (11_000_000, 5e-3, 0.035), 256: (14_000_000, 4e-3, 0.03)}
VOCAB, CONTEXT, TEST_SHARE, TEST_CAP, EOT = 4096, 256, 0.3, 65_536, "<|endoftext|>"


def library(held_out):
    "The library's modules and documentation topics on one side of the split."
    return [d.text for docs in (python_library(), python_topics()) for d in docs if is_held_out(d.name) == held_out]


def suite():
    "The test suite, each file cut at `TEST_CAP` characters."
    return [d.text[:TEST_CAP] for d in python_library(tests=True) if not is_held_out(d.name)]


def make_tokenizer(out):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=[EOT], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    texts = library(False)
    tok.train_from_iterator(texts + suite()[: len(texts) // 4], trainer)
    from transformers import PreTrainedTokenizerFast
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, bos_token=EOT, eos_token=EOT, unk_token=EOT,
                                   clean_up_tokenization_spaces=False, model_max_length=CONTEXT)
    fast.save_pretrained(out)


def windows(texts, tok):
    "Documents joined by the separator, cut into windows of `CONTEXT` tokens that each start with it."
    eot, ids = tok.convert_tokens_to_ids(EOT), []
    for t in texts: ids += tok(t, verbose=False)["input_ids"] + [eot]
    body = CONTEXT - 1
    ids = torch.tensor(ids[: len(ids) // body * body]).view(-1, body)
    return torch.cat([torch.full((len(ids), 1), eot), ids], 1)


def new_model(width):
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    cfg = GPT2Config(vocab_size=VOCAB, n_positions=CONTEXT, n_embd=width, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
                     bos_token_id=0, eos_token_id=0, use_cache=False, activation_function="gelu_pytorch_tanh", **SIZES[width])
    return GPT2LMHeadModel._from_config(cfg, attn_implementation="eager")


def flops_per_token(model):
    "Training FLOPs a token: 6 for each weight of a matrix product, plus attention scores (Kaplan et al. 2020)."
    c = model.config
    n = sum(p.numel() for p in model.transformer.h.parameters()) + c.vocab_size * c.n_embd
    return 6 * n + 12 * c.n_layer * c.n_embd * CONTEXT


def loss_of(forward, ids, device):
    with torch.autocast(device, dtype=torch.bfloat16):
        logits = forward(ids).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.reshape(-1, VOCAB).float(), ids[:, 1:].reshape(-1))


@torch.no_grad()
def held_out_loss(model, ids, device, batch=32):
    model.eval()
    total = sum(loss_of(model, b.to(device), device).item() * len(b) for b in ids.split(batch))
    model.train()
    return total / len(ids)


def optimisers(model, lr, muon_lr, device):
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and ".h." in n]
    rest = [p for n, p in model.named_parameters() if not (p.ndim == 2 and ".h." in n)]
    return [torch.optim.Muon(hidden, lr=muon_lr, momentum=0.95, weight_decay=0.05),
            torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]


def schedule(progress):
    return min(progress / 0.02, 1.0, (1 - progress) / 0.4)


def train(out, width, tokens, batch, device, lr, muon_lr, seed=0, every=250, stop_after=math.inf):
    from transformers import AutoTokenizer
    folder = Path(out) / f"pylib-{width}"
    folder.mkdir(parents=True, exist_ok=True)
    tok = AutoTokenizer.from_pretrained(out)
    lib, tests, held = windows(library(False), tok), windows(suite(), tok), windows(library(True), tok)
    held_bytes = sum(len(t.encode()) for t in library(True))
    bits = held.numel() * (CONTEXT - 1) / CONTEXT / held_bytes / math.log(2)   # loss in nats a token -> bits a byte
    probe = held[torch.randperm(len(held), generator=torch.Generator().manual_seed(1))[:256]]
    model = new_model(width).to(device)
    forward, opts = torch.compile(model), optimisers(model, lr, muon_lr, device)
    step, curve, state = 0, [], folder / "state.pt"
    if state.exists():
        s = torch.load(state, weights_only=True, map_location=device)
        model.load_state_dict(s["model"]); step, curve = s["step"], s["curve"]
        for o, d in zip(opts, s["opts"]): o.load_state_dict(d)
    base = [[g["lr"] for g in o.param_groups] for o in (optimisers(model, lr, muon_lr, device))]
    steps, n_test, flops = tokens // (batch * CONTEXT), round(batch * TEST_SHARE), flops_per_token(model)
    n_lib = batch - n_test
    print(f"{folder.name}: {sum(p.numel() for p in model.parameters()):,} parameters; windows lib {len(lib)} tests {len(tests)} "
          f"held-out {len(held)}; {steps} steps; passes over lib {steps * n_lib / len(lib):.1f}, tests {steps * n_test / len(tests):.1f}", flush=True)
    start, first = time.time(), step

    def pick(data, k, i):
        per = len(data) // k; epoch, j = divmod(i, per)
        return data[torch.randperm(len(data), generator=torch.Generator().manual_seed(seed + epoch))[j * k:(j + 1) * k]]

    def save():
        tmp = state.with_suffix(".tmp")
        torch.save(dict(model=model.state_dict(), opts=[o.state_dict() for o in opts], step=step, curve=curve), tmp)
        os.replace(tmp, state)

    while step < steps:
        ids = torch.cat([pick(lib, n_lib, step), pick(tests, n_test, step)]).to(device)
        scale = schedule((step + 0.5) / steps)
        for o, lrs in zip(opts, base):
            for g, l in zip(o.param_groups, lrs): g["lr"] = l * scale
        loss = loss_of(forward, ids, device)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o in opts: o.step(); o.zero_grad()
        step += 1
        if step in (10, 30, 100) or step % every == 0 or step == steps:
            h, seen = held_out_loss(model, probe, device), step * batch * CONTEXT
            curve.append(dict(tokens=seen, flops=seen * flops, loss=h, bits_per_byte=h * bits, train=loss.item()))
            rate = (step - first) * batch * CONTEXT / (time.time() - start)
            print(f"{step}/{steps} {seen / 1e6:.1f}M tokens  train {loss.item():.3f}  held-out {h:.3f} = {h * bits:.3f} bits/byte  "
                  f"{rate:,.0f} tok/s  {(steps - step) * batch * CONTEXT / rate / 60:.0f} min left", flush=True)
            if step >= 100: save()
        if time.time() - start > stop_after: save(); return
    model.save_pretrained(folder / "float32")
    full = held_out_loss(model, held, device)
    result = dict(name=folder.name, width=width, **SIZES[width], parameters=sum(p.numel() for p in model.parameters()), tokens=tokens,
                  flops_per_token=flops, held_out_loss=full, held_out_bits_per_byte=full * bits, held_out_bytes=held_bytes, curve=curve)
    (folder / "curve.json").write_text(json.dumps(result, indent=1))
    print(f"whole held-out set: {full:.4f} nats/token, {full * bits:.4f} bits/byte", flush=True)


def pack(out, assets):
    "Half-precision weights, curves and the tokenizer, as the package carries them."
    from transformers import GPT2LMHeadModel
    for curve in sorted(Path(out).glob("pylib-*/curve.json")):
        target = Path(assets) / "models" / curve.parent.name
        GPT2LMHeadModel.from_pretrained(curve.parent / "float32").half().save_pretrained(target)
        (target / "curve.json").write_text(curve.read_text())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        write_atomic(Path(assets) / "tokenizer" / name, (Path(out) / name).read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["tokenizer", "train", "pack"])
    p.add_argument("--out", required=True); p.add_argument("--width", type=int, choices=list(SIZES), default=256)
    p.add_argument("--tokens", type=lambda s: int(s.replace("_", "")), help="training tokens (default: by width)")
    p.add_argument("--batch", type=int, default=16, help="windows a step")
    p.add_argument("--lr", type=float, help="AdamW's (default: by width)"); p.add_argument("--muon-lr", type=float)
    p.add_argument("--assets", default="sae_nb/assets", help="where pack puts them")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--stop-after", type=float, default=math.inf, help="seconds, then save and stop")
    a = p.parse_args()
    if a.what == "tokenizer": make_tokenizer(a.out)
    elif a.what == "pack": pack(a.out, a.assets)
    else:
        tokens, lr, muon_lr = SETTINGS[a.width]
        train(a.out, a.width, a.tokens or tokens, a.batch, a.device, a.lr or lr, a.muon_lr or muon_lr, stop_after=a.stop_after)


if __name__ == "__main__":
    main()
