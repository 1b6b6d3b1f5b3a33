"The command line: what a run folder holds, and one plain sentence for every mistake of the caller."
import json, os, re, shutil, subprocess, sys, time
from pathlib import Path

import pytest
import torch

from sae_nb.cli import main
from sae_nb.lm import load_lm
from sae_nb.sae import SAE

MODEL = ("--lm", "pylib-64", "--site", "resid_post.2", "--n", "256", "--k", "8", "--context", "64", "--dtype", "float32", "--device", "cpu")
LISTED = {"nmse", "explained_variance", "l0", "dead_fraction", "ce_clean", "ce_spliced", "ce_zero", "ce_mean", "ce_recovered", "kl",
          "tokens_trained", "tokens_per_second", "eval_tokens", "null_nmse", "null_ce_recovered"}


def prose(lines=400):
    "A text of about 30 kB that looks like code."
    return "\n".join(f"def step_{i}(x, rate={i % 7}):\n    return x * {i} + rate  # the rule of step {i}" for i in range(lines))


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "some.txt"
    path.write_text(prose(), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    "A packaged model as `save_pretrained` writes it."
    folder, lm = tmp_path_factory.mktemp("lm"), load_lm("pylib-64", "cpu", "float32")
    lm.model.save_pretrained(folder); lm.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory, text):
    "A run folder that the command line has written; tests work on copies."
    out = tmp_path_factory.mktemp("runs") / "one"
    assert main(["train", *MODEL, "--text", str(text), "--tokens", "20_000", "--seed", "3", "--out", str(out)]) == 0
    return out


# --- what a run leaves behind ------------------------------------------------------------------------

def test_a_run_folder_holds_what_the_contract_says(finished):
    assert {"config.json", "steps.jsonl", "cfg.json", "sae.safetensors", "metrics.json", "report.html"} <= {p.name for p in finished.iterdir()}


def test_config_keeps_what_was_asked(finished, text):
    run = json.loads((finished / "config.json").read_text())["run"]
    assert (run["lm"], run["text"], run["site"], run["n"], run["k"], run["tokens"], run["seed"], run["context"]) \
        == ("pylib-64", str(text), "resid_post.2", 256, 8, 20_000, 3, 64)


def test_weights_have_the_names_and_shapes_of_the_contract(finished):
    from safetensors.torch import load_file
    shapes = {k: tuple(v.shape) for k, v in load_file(finished / "sae.safetensors").items()}
    assert shapes == {"W_enc": (256, 64), "W_dec": (256, 64), "b_enc": (256,), "b_dec": (64,)}


def test_metrics_have_all_keys_and_sane_values(finished):
    m = json.loads((finished / "metrics.json").read_text())
    assert LISTED <= m.keys()
    assert all(isinstance(m[k], (int, float)) and m[k] == m[k] for k in LISTED)
    assert 0 < m["nmse"] < m["null_nmse"] and abs(m["nmse"] + m["explained_variance"] - 1) < 1e-9
    assert 0 < m["l0"] <= 8 and 0 <= m["dead_fraction"] < 1 and m["kl"] > 0
    assert m["ce_clean"] < m["ce_spliced"] < min(m["ce_zero"], m["ce_mean"]) and m["null_ce_recovered"] < m["ce_recovered"] < 1
    assert m["tokens_trained"] == 20_000 and m["tokens_per_second"] > 0 and 500 < m["eval_tokens"] < 200_000


def test_numbers_files_are_strict_json(finished):
    def refuse(word): raise ValueError(f"{word} is not JSON")
    for line in [(finished / "metrics.json").read_text(), (finished / "config.json").read_text(), *(finished / "steps.jsonl").read_text().splitlines()]:
        json.loads(line, parse_constant=refuse)


def test_steps_count_up_to_the_tokens_asked(finished):
    steps = [json.loads(line) for line in (finished / "steps.jsonl").read_text().splitlines()]
    assert [s["step"] for s in steps] == list(range(1, len(steps) + 1)) and steps[-1]["tokens"] == 20_000
    assert steps[-1]["nmse"] < 0.8 * steps[0]["nmse"] and any(s["held_out"] is not None for s in steps)


def test_report_opens_without_network(finished):
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert "<html" in page.lower() and "pylib-64" in page and "resid_post.2" in page
    fetched = re.findall(r"""(?:<(?:script|img|link|iframe|source|video|audio)\b[^>]*?(?:src|href)|@import|url\()\s*=?\s*\(?["']?\s*((?:https?:)?//[^"')\s>]+)""", page, re.I)
    assert not fetched, f"the report fetches {fetched[:3]}"


def test_python_reads_what_the_command_wrote(finished):
    sae, rows = SAE.load(finished), torch.randn(5, 64)
    code = sae.encode(rows)
    assert code.values.shape == code.indices.shape == (5, 8)
    torch.testing.assert_close(sae.decode(code), sae(rows))


def test_eval_measures_again_and_gets_the_same(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    before = json.loads((folder / "metrics.json").read_text())
    for name in ("metrics.json", "report.html"): (folder / name).unlink()
    assert main(["eval", str(folder), "--device", "cpu"]) == 0
    after = json.loads((folder / "metrics.json").read_text())
    assert (folder / "report.html").stat().st_size > 1000 and after.keys() == before.keys()
    words = {"text", "sae digest", "lm digest", "text digest"}
    assert {k: after[k] for k in words} == {k: before[k] for k in words}
    numbers = before.keys() - words - {"tokens_per_second"}
    assert {k: after[k] for k in numbers} == pytest.approx({k: before[k] for k in numbers}, rel=1e-6)


def test_eval_clears_away_what_a_killed_one_was_writing(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    for name in ("metrics.json", "report.html"): (folder / f".{name}.999999999.sae_nb-tmp").write_text("half")
    assert main(["eval", str(folder), "--tokens", "2_000", "--device", "cpu"]) == 0
    assert not list(folder.glob(".*.sae_nb-tmp"))


def test_eval_of_few_tokens_measures_few(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    assert main(["eval", str(folder), "--device", "cpu", "--tokens", "100"]) == 0
    more, few = (json.loads((f / "metrics.json").read_text())["eval_tokens"] for f in (finished, folder))
    assert 100 <= few < more


def test_resume_of_a_finished_run_changes_no_weight(finished, text, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    assert main(["train", *MODEL, "--text", str(text), "--tokens", "20_000", "--seed", "3", "--out", str(folder), "--resume"]) == 0
    assert (folder / "sae.safetensors").read_bytes() == (finished / "sae.safetensors").read_bytes()
    assert json.loads((folder / "metrics.json").read_text())["tokens_per_second"] > 0


def test_resume_of_nothing_starts(text, tmp_path):
    assert main(["train", *MODEL, "--text", str(text), "--tokens", "512", "--out", str(tmp_path / "new"), "--resume"]) == 0
    assert (tmp_path / "new/sae.safetensors").exists()


def test_numbers_may_be_written_for_people(text, tmp_path):
    out = tmp_path / "run"
    assert main(["train", *MODEL, "--text", str(text), "--tokens", "1e3", "--out", str(out)]) == 0
    assert json.loads((out / "config.json").read_text())["run"]["tokens"] == 1000


def test_every_setting_is_an_option():
    from dataclasses import fields
    from sae_nb.cli import parser
    from sae_nb.runs import RunConfig
    args = parser().parse_args(["train", "--out", "x"])
    assert {f.name: getattr(args, f.name) for f in fields(RunConfig)} == RunConfig().to_dict()


# --- mistakes ----------------------------------------------------------------------------------------

def speak_here():
    "Let transformers log to this test's stderr, as it does in a process of its own."
    import logging, transformers  # noqa: the import makes the handler
    for handler in logging.getLogger("transformers").handlers:
        if type(handler) is logging.StreamHandler: handler.stream = sys.stderr   # the old one may be closed, and setStream would flush it


@pytest.fixture
def says(capfd):
    "Call the command; it must end with code 2 and one line on stderr, which is given back."
    def call(*argv):
        capfd.readouterr(); speak_here()
        code = main([str(a) for a in argv])
        err = capfd.readouterr().err.replace("\r", "\n")
        lines = [line for line in err.split("\n") if line.strip()]
        assert code == 2 and "Traceback" not in err
        assert len(lines) == 1 and lines[0].startswith("sae-nb: "), f"more than one sentence: {err!r}"
        return lines[0]
    return call


def train_with(text, folder, **changed):
    "The arguments of a small run, with some of them changed; None leaves one out."
    given = dict(zip((a[2:] for a in MODEL[::2]), MODEL[1::2])) | dict(text=text, tokens=2_000, out=folder) | changed
    return ["train", *(x for k, v in given.items() if v is not None for x in (f"--{k}", v))]


@pytest.mark.parametrize("changed, word", [
    (dict(lm="no-such-model"), "no-such-model"), (dict(lm="/no/such/folder"), "/no/such/folder"), (dict(lm=""), "lm"),
    (dict(site="resid_post.4"), "4 blocks"), (dict(site="blocks.17.hook_resid_post"), "4 blocks"), (dict(site="transformer.h.99"), "transformer.h.99"),
    (dict(site="nowhere"), "nowhere"), (dict(site="resid_post"), "resid_post"), (dict(site="resid_post.-1"), "resid_post.-1"),
    (dict(site=""), "site"), (dict(site="transformer"), "site"), (dict(site="transformer.h"), "site"), (dict(site="transformer.wpe"), "site"),
    (dict(k=257), "k is 257"), (dict(k=0), "k is 0"), (dict(k=-3), "k is -3"), (dict(n=0), "n is 0"), (dict(n=-1), "n is -1"),
    (dict(tokens=-5), "tokens is -5"), (dict(tokens=0), "tokens is 0"), (dict(tokens="many"), "many"), (dict(tokens="nan"), "nan"),
    (dict(tokens="inf"), "inf"), (dict(tokens="1.5"), "1.5"), (dict(n=""), "--n"), (dict(lr="-1"), "lr"), (dict(lr="nan"), "lr"),
    (dict(out=None), "--out"), (dict(widht=3), "--widht"), (dict(batch=-1), "batch"), (dict(seed="x"), "--seed"),
    (dict(context=1), "context is 1"), (dict(context=300), "256"), (dict(context=0), "context is 0"),
    (dict(device="quantum"), "quantum"), (dict(device="meta"), "meta"), (dict(device="xpu"), "xpu"), (dict(device=""), "device"),
    (dict(dtype="int8"), "int8"), (dict(normalise="much"), "much"),
], ids=lambda v: "-".join(f"{k}={w}" for k, w in v.items()) if isinstance(v, dict) else "")
def test_a_wrong_setting_is_named(says, text, tmp_path, changed, word):
    assert word in says(*train_with(text, tmp_path / "out", **changed))
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_where_there_is_none(says, text, tmp_path, device):
    assert "CUDA" in says(*train_with(text, tmp_path / "out", device=device))


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has MPS")
def test_mps_where_there_is_none(says, text, tmp_path):
    assert "MPS" in says(*train_with(text, tmp_path / "out", device="mps"))


def test_the_first_word_matters(says):
    assert "COMMAND" in says("bake") or "bake" in says("bake")


def test_no_command_shows_the_help(capfd):
    assert main([]) == 0 and "train" in capfd.readouterr().out


TEXTS = {"empty": b"", "blank": b" \n\n\t \n" * 500, "latin1": "Übergröße ".encode("latin1") * 2000, "short": b"three words only",
         "one window": b"x = 1\n" * 40, "binary": bytes(range(256)) * 100}

@pytest.mark.parametrize("kind", TEXTS)
def test_text_that_cannot_be_used(says, tmp_path, kind):
    (tmp_path / "t.txt").write_bytes(TEXTS[kind])
    assert str(tmp_path / "t.txt") in says(*train_with(tmp_path / "t.txt", tmp_path / "out"))
    assert not list(tmp_path.glob("out/*")), "a folder that failed must stay free for the next try"


@pytest.mark.parametrize("name", ["/no/such/text.txt", "nothing", "no_such_owner/no_such_set"])
def test_text_that_is_not_there(says, tmp_path, name): assert name in says(*train_with(name, tmp_path / "out"))


def test_folder_without_text(says, tmp_path):
    (tmp_path / "texts").mkdir()
    assert "empty" in says(*train_with(tmp_path / "texts", tmp_path / "out"))


def damaged_lm(saved, to, kind):
    "A copy of a saved model with something wrong."
    folder = shutil.copytree(saved, to)
    if kind == "no weights": (folder / "model.safetensors").unlink()
    elif kind == "no config": (folder / "config.json").unlink()
    elif kind == "cut weights": (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    elif kind == "cut config": (folder / "config.json").write_text("{")
    elif kind == "no tokenizer":
        for p in folder.glob("tokenizer*"): p.unlink()
    elif kind == "other sizes":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | dict(n_embd=128)))
    elif kind == "more blocks":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | dict(n_layer=6)))
    elif kind == "unknown kind": (folder / "config.json").write_text('{"model_type": "unheard_of"}')
    elif kind == "empty":
        shutil.rmtree(folder); folder.mkdir()
    return folder


@pytest.mark.parametrize("kind", ["no weights", "no config", "cut weights", "cut config", "no tokenizer", "other sizes", "more blocks", "unknown kind", "empty"])
def test_damaged_model(says, saved, text, tmp_path, kind):
    folder = damaged_lm(saved, tmp_path / "lm", kind)
    assert str(folder) in says(*train_with(text, tmp_path / "out", lm=folder))


def test_model_that_is_a_file(says, saved, text, tmp_path): assert "folder" in says(*train_with(text, tmp_path / "out", lm=saved / "model.safetensors"))


def test_vocabulary_larger_than_the_model(says, saved, text, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel
    folder = shutil.copytree(saved, tmp_path / "lm")
    GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=3, n_head=2, n_positions=64)).save_pretrained(folder)
    says(*train_with(text, tmp_path / "out", lm=folder))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_not_numbers(says, saved, text, tmp_path, bad):
    lm = load_lm(str(saved), "cpu", "float32")
    lm.blocks[1].mlp.c_proj.bias.data[0] = bad
    folder = shutil.copytree(saved, tmp_path / "lm")
    lm.model.save_pretrained(folder)
    assert "NaN or infinity" in says(*train_with(text, tmp_path / "out", lm=folder))
    assert not list(tmp_path.glob("out/*"))


def test_folder_of_another_run(says, finished, text, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert "another run" in says(*train_with(text, folder, tokens=20_000, seed=4), "--resume")
    assert "--resume" in says(*train_with(text, folder, tokens=20_000, seed=3))
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_folder_with_other_files(says, text, tmp_path):
    (tmp_path / "mine").mkdir(); (tmp_path / "mine/thesis.tex").write_text("42")
    assert "other files" in says(*train_with(text, tmp_path / "mine"))
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("below", ["", "deeper", "deeper/still"])
def test_out_that_is_a_file(says, text, tmp_path, below):
    (tmp_path / "file").write_text("42")
    assert "file" in says(*train_with(text, tmp_path / "file" / below))
    assert (tmp_path / "file").read_text() == "42"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_out_where_nothing_can_be_made(says, text): assert "/proc/no" in says(*train_with(text, "/proc/no/run"))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_out_without_permission(says, text, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "cannot be written" in says(*train_with(text, tmp_path / "locked" / "run"))
    assert "cannot be written" in says(*train_with(text, tmp_path / "locked"))


# --- eval of what is no run --------------------------------------------------------------------------

def test_eval_of_no_run(says, tmp_path):
    assert "nowhere" in says("eval", tmp_path / "nowhere")
    assert str(tmp_path) in says("eval", tmp_path)
    says("eval")


@pytest.mark.parametrize("tokens", ["0", "-4", "x", "inf"])
def test_eval_of_no_tokens(says, finished, tokens): assert "tokens" in says("eval", finished, "--tokens", tokens)


DAMAGE = {"cut": lambda b: b[:len(b) // 2], "emptied": lambda b: b"", "other bytes": lambda b: bytes(255 - x for x in b[:200]) + b[200:],
          "other JSON": lambda b: b"{}", "a list": lambda b: b"[1]", "null": lambda b: b"null"}

@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", ["sae.safetensors", "config.json", "cfg.json"])
def test_eval_of_a_damaged_run(says, finished, tmp_path, name, how):
    folder = shutil.copytree(finished, tmp_path / "run")
    (folder / name).write_bytes(DAMAGE[how]((folder / name).read_bytes()))
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    sentence = says("eval", folder, "--tokens", "100")
    assert name in sentence
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", ["metrics.json", "steps.jsonl"])
def test_eval_with_a_damaged_record(finished, tmp_path, capfd, name, how):
    "What eval writes anew or only draws, it may do without; a sentence is as good."
    folder = shutil.copytree(finished, tmp_path / "run")
    (folder / name).write_bytes(DAMAGE[how]((folder / name).read_bytes()))
    code = main(["eval", str(folder), "--tokens", "100"])
    assert code == 0 and (folder / "report.html").stat().st_size > 1000 or code == 2 and name in capfd.readouterr().err


@pytest.mark.parametrize("name", ["sae.safetensors", "config.json"])
def test_eval_of_an_incomplete_run(says, finished, tmp_path, name):
    folder = shutil.copytree(finished, tmp_path / "run")
    (folder / name).unlink()
    says("eval", folder, "--tokens", "100")


def test_eval_when_the_text_is_gone(says, finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    config["run"]["text"] = str(tmp_path / "gone.txt")
    (folder / "config.json").write_text(json.dumps(config))
    assert "gone.txt" in says("eval", folder)


def test_the_installed_command_says_it_too(saved, text, tmp_path):
    folder = damaged_lm(saved, tmp_path / "lm", "no weights")
    done = subprocess.run([sys.executable, "-c", "import sys; from sae_nb.cli import main; sys.exit(main())",
                           *map(str, train_with(text, tmp_path / "out", lm=folder))], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("sae-nb: ") and done.stderr.count("\n") == 1 and not done.stdout


# --- sweep and fit -----------------------------------------------------------------------------------

def test_sweep_trains_every_combination_and_goes_on(text, tmp_path, capfd):
    command = ["sweep", *MODEL, "--text", str(text), "--tokens", "5_000", "--out", str(tmp_path / "many")]
    command[command.index("--n") + 1], command[command.index("--k") + 1] = "64,128", "4,8"
    assert main(command) == 0
    lines = (tmp_path / "many" / "runs.csv").read_text().splitlines()
    assert {p.name for p in (tmp_path / "many").iterdir()} == {"runs.csv", "n64-k4", "n64-k8", "n128-k4", "n128-k8"}
    assert {"n", "k", "tokens", "flops", "loss", "seed"} <= set(lines[0].split(",")) and "n128-k8" in capfd.readouterr().out
    before = (tmp_path / "many" / "n64-k4" / "sae.safetensors").stat().st_mtime_ns
    assert main(command) == 0 and (tmp_path / "many" / "n64-k4" / "sae.safetensors").stat().st_mtime_ns == before
    assert (tmp_path / "many" / "runs.csv").read_text().splitlines() == lines


@pytest.mark.parametrize("change, word", [(("--n", "64,x"), "n"), (("--k", "4,999"), "k"), (("--seed", ""), "seed"), (("--together", "0"), "together"), (("--n", "64,64"), "once")])
def test_a_wrong_sweep_is_named(says, text, tmp_path, change, word):
    assert word in says("sweep", *MODEL, "--text", text, "--tokens", "5_000", "--out", tmp_path / "many", *change)


def law_table(path, rows, columns="n,k,tokens,flops,loss"):
    path.write_text("\n".join([columns, *(",".join(map(str, r)) for r in rows)]) + "\n")
    return path


SIZES = [2**i for i in range(6, 15)]


@pytest.mark.parametrize("law, rows, truth", [
    ("n", [(n, 32, "", "", .1 + 2 * n**-.4) for n in SIZES], dict(a=2, b=-.4, e=.1)),
    ("c", [("", "", "", c, .09 + 5 * c**-.2) for c in (10.**i for i in range(6, 15))], dict(a=5, b=-.2, e=.09)),
    ("nk", [(n, k, "", "", n**-.1 * k**-.05 * .8 + .2 * k**-.1) for n in SIZES for k in (8, 16, 32, 64, 128)], dict(beta_n=-.1, beta_k=-.05, gamma=0., eta=-.1))])
def test_fit_finds_a_planted_law_and_writes_the_contract(tmp_path, law, rows, truth):
    out = tmp_path / "law.json"
    assert main(["fit", str(law_table(tmp_path / "t.csv", rows)), "--law", law, "--out", str(out), "--bootstrap", "50", "--seed", "1"]) == 0
    found = json.loads(out.read_text())
    assert {"law", "coefficients", "runs", "rmse_log", "held_out"} <= set(found) and found["law"] == law and found["runs"] == len(rows) and found["rmse_log"] < 1e-3
    assert set(found["coefficients"]) == (set("abe") if law != "nk" else {"alpha", "beta_k", "beta_n", "gamma", "zeta", "eta"})
    for name, value in truth.items():
        c = found["coefficients"][name]
        assert c["value"] == pytest.approx(value, abs=2e-3) and c["low"] - 1e-9 <= c["value"] <= c["high"] + 1e-9


BAD = dict(one_size=[(64, 8, "", "", .3 + i / 100) for i in range(9)], negative=[(n, 8, "", "", -.1) for n in SIZES], nan=[(n, 8, "", "", "nan") for n in SIZES],
           words=[(n, 8, "", "", "low") for n in SIZES], ragged=[(64, 8), *[(n, 8, 1, 1, .2) for n in SIZES]], few=[(n, 8, "", "", .1 + n**-.5) for n in SIZES[:2]])


@pytest.mark.parametrize("name", BAD)
def test_a_table_without_a_law_is_refused_in_a_sentence(says, tmp_path, name): assert len(says("fit", law_table(tmp_path / "t.csv", BAD[name]), "--law", "n")) > 20


@pytest.mark.parametrize("content", ["", "n,loss\n", "\x00\x01", "n;loss\n1;2\n"])
def test_a_file_that_is_no_table_is_refused(says, tmp_path, content):
    (tmp_path / "t.csv").write_text(content)
    says("fit", tmp_path / "t.csv", "--law", "n")


def test_fit_of_nothing(says, tmp_path):
    says("fit", tmp_path / "none.csv", "--law", "n")
    says("fit", law_table(tmp_path / "t.csv", BAD["few"]), "--law", "cubic")
    says("fit", law_table(tmp_path / "t.csv", [(n, 8, "", "", .1 + 2 * n**-.4) for n in SIZES]), "--law", "n", "--bootstrap", "0")


# --- what a command is told and tells ----------------------------------------------------------------

def test_eval_finds_its_text_from_every_folder(text, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    shutil.copy(text, tmp_path / "here/notes.txt")
    (tmp_path / "there/notes.txt").write_text("quite another text, of many words\n" * 900)
    monkeypatch.chdir(tmp_path / "here")
    assert main(["train", *MODEL, "--text", "notes.txt", "--tokens", "4_000", "--out", "run", "--eval-tokens", "300"]) == 0
    before = json.loads(Path("run/metrics.json").read_text())
    assert 300 <= before["eval_tokens"] < 900
    monkeypatch.chdir(tmp_path / "there")
    assert main(["eval", "../here/run", "--device", "cpu", "--tokens", "300"]) == 0
    assert json.loads((tmp_path / "here/run/metrics.json").read_text())["nmse"] == before["nmse"]


def test_another_text_leaves_the_figures_of_the_run(finished, tmp_path, capfd):
    folder = shutil.copytree(finished, tmp_path / "run")
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    (tmp_path / "other.txt").write_text("quite another text, of many words\n" * 900)
    assert main(["eval", str(folder), "--device", "cpu", "--tokens", "300", "--text", str(tmp_path / "other.txt")]) == 0
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.name in before} == before
    (more,) = folder.glob("metrics-*.json")
    own, other = json.loads(before["metrics.json"]), json.loads(more.read_text())
    assert other["text"] == str(tmp_path / "other.txt") and other["nmse"] != own["nmse"]
    assert other["sae digest"] == own["sae digest"] and other["text digest"] != own["text digest"]
    assert more.name in capfd.readouterr().out


def test_a_text_that_was_rewritten_is_told(says, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text(prose())
    assert main(["train", *MODEL, "--text", str(path), "--tokens", "2_000", "--out", str(tmp_path / "run"), "--eval-tokens", "100"]) == 0
    before = (tmp_path / "run/metrics.json").read_bytes()
    path.write_text(prose().replace("rate", "pace"))
    assert "--text" in says("eval", tmp_path / "run", "--device", "cpu")
    assert (tmp_path / "run/metrics.json").read_bytes() == before


@pytest.mark.parametrize("written, value", [("12345678901234567", 12345678901234567), ("2_000_000", 2_000_000), ("2e6", 2_000_000), ("1e3", 1000), ("9007199254740993", 2**53 + 1)])
def test_whole_numbers_are_exact(written, value):
    from sae_nb.cli import number
    found = number(int)(written)
    assert found == value and type(found) is int


@pytest.mark.parametrize("written", ["1.5", "nan", "inf", "1e999999999", "ten", ""])
def test_what_is_no_whole_number_is_told(says, written, tmp_path):
    assert "tokens" in says("train", "--tokens", written, "--out", tmp_path / "run")


def test_the_module_is_the_command():
    import sae_nb
    done = subprocess.run([sys.executable, "-m", "sae_nb.cli", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and sae_nb.__version__ in done.stdout


def test_version_and_help(capfd):
    import sae_nb
    with pytest.raises(SystemExit) as end: main(["--version"])
    assert end.value.code == 0 and sae_nb.__version__ in capfd.readouterr().out
    for command in ("train", "eval", "sweep", "fit", "explore", "export"):
        with pytest.raises(SystemExit): main([command, "--help"])
        out = capfd.readouterr().out
        assert f"example: sae-nb {command} " in out
    with pytest.raises(SystemExit): main(["train", "--help"])
    out = " ".join(capfd.readouterr().out.split())
    assert "{exact,bfloat16}" in out and "{none,unit_norm,layer_norm}" in out


def test_every_example_of_the_help_is_understood():
    from sae_nb.cli import EXAMPLES, parser
    for name, example in EXAMPLES.items():
        args = parser().parse_args(example.split()[1:])
        assert args.command == name


def test_fit_of_a_part_of_a_table(tmp_path, capfd, says):
    rows = [(n, s, loss * factor) for n, loss in PLANTED for s, factor in (("a", 1), ("b", 3))]
    table = law_table(tmp_path / "t.csv", rows, "n,subject,loss")
    assert main(["fit", str(table), "--law", "n", "--where", "subject=a", "--out", str(tmp_path / "law.json"), "--bootstrap", "50"]) == 0
    assert json.loads((tmp_path / "law.json").read_text())["runs"] == len(PLANTED)
    assert "subject" in says("fit", table, "--law", "n")
    assert "column=value" in says("fit", table, "--law", "n", "--where", "subject")
    assert "no row has" in says("fit", table, "--law", "n", "--where", "subject=c")


PLANTED = [(n, .1 + 3 * n**-.5) for n in (64, 128, 256, 512, 1024, 2048, 4096)]


def test_term_stops_a_run_as_ctrl_c_does(text, tmp_path):
    out = tmp_path / "run"
    args = [*MODEL, "--text", str(text), "--tokens", "400_000", "--out", str(out), "--resume"]
    going = subprocess.Popen([sys.executable, "-c", "import sys; from sae_nb.cli import main; sys.exit(main())", "train", *args], stderr=subprocess.PIPE, text=True)
    for _ in range(1_200):
        if (out / "steps.jsonl").exists() and (out / "steps.jsonl").stat().st_size > 5_000: break
        time.sleep(.1)
    going.terminate()
    said = going.communicate(timeout=120)[1]
    assert going.returncode == 130 and "with --resume" in said
    assert (out / "checkpoint/state.safetensors").exists()


def test_term_ends_every_command_with_a_sentence(tmp_path):
    "Measuring, exporting and serving too, which do not train."
    say = "import os, signal, sys, time; import sae_nb.cli as cli; cli.run_command = lambda args: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(9)); sys.exit(cli.main(['eval', 'anywhere']))"
    done = subprocess.run([sys.executable, "-c", say], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 130 and done.stderr.startswith("sae-nb: stopped")


def test_eval_takes_another_model_only_where_it_is_the_same(says, finished, tmp_path):
    assert "is not the model" in says("eval", finished, "--lm", "pylib-128", "--device", "cpu")


def table(path):
    "A table with code in one column and words in the other."
    rows = [(f"def step_{i}(x, rate={i % 7}): return x * {i} + rate", f"the rule of step {i} is that x grows and never falls") for i in range(900)]
    path.write_text("\n".join(["code,words", *(f'"{a}","{b}"' for a, b in rows)]) + "\n")
    return path


def test_column_and_one_document_reach_everything_that_reads_the_text(says, tmp_path, monkeypatch):
    "Training, its measures, `eval` again, and the features; another column is measured beside."
    import sae_nb.dossier
    path, out = table(tmp_path / "t.csv"), tmp_path / "run"
    assert main(["train", *MODEL, "--text", str(path), "--column", "words", "--one-document", "--tokens", "2_000", "--out", str(out), "--eval-tokens", "300"]) == 0
    about, before = json.loads((out / "config.json").read_text()), json.loads((out / "metrics.json").read_text())
    assert (about["run"]["column"], about["run"]["one_document"]) == ("words", True)
    assert before["text digest"] == about["made of"]["text digest"]
    assert main(["eval", str(out), "--device", "cpu", "--tokens", "300"]) == 0
    again = json.loads((out / "metrics.json").read_text())
    assert (again["text digest"], again["nmse"]) == (before["text digest"], before["nmse"]) and not list(out.glob("metrics-*"))
    assert main(["eval", str(out), "--device", "cpu", "--tokens", "300", "--column", "code"]) == 0
    (other,) = out.glob("metrics-*.json")
    assert json.loads(other.read_text())["nmse"] != before["nmse"]
    read = []
    monkeypatch.setattr(sae_nb.dossier, "write_features", lambda sae, lm, text, *more, **how: read.append(text.fingerprint) or 1 / 0)
    with pytest.raises(ZeroDivisionError): main(["export", str(out), "--out", str(tmp_path / "page.html"), "--device", "cpu"])
    assert read == [before["text digest"]]
    assert "code, words" in says("eval", out, "--device", "cpu", "--column", "prose")
    assert "code, words" in says(*train_with(path, tmp_path / "new", column="prose"))


def test_rows_left_out_are_told_and_stand_in_the_measures(text, finished, tmp_path, monkeypatch):
    import sae_nb.acts
    assert json.loads((finished / "metrics.json").read_text())["left_out_training"] == 0
    lm = load_lm("pylib-64", "cpu", "float32")
    from sae_nb.text import load_text
    rows = next(sae_nb.acts.Stream(lm, load_text(str(text)), "resid_post.2", 64, 2_000).blocks()).read()
    monkeypatch.setattr(sae_nb.acts, "norm_limit", lambda *given: rows.norm(dim=1).quantile(.95).item())
    with pytest.warns(UserWarning, match="of the rows read for") as told:
        assert main([str(a) for a in train_with(text, tmp_path / "run", **{"eval-tokens": 300})]) == 0
    count = json.loads((tmp_path / "run/metrics.json").read_text())["left_out_training"]
    assert count > 50 and any(str(w.message).startswith(f"{count:,} of the rows read for {tmp_path / 'run'} were left out") for w in told)
    monkeypatch.undo()
    assert main(["eval", str(tmp_path / "run"), "--device", "cpu", "--tokens", "300"]) == 0
    assert json.loads((tmp_path / "run/metrics.json").read_text())["left_out_training"] == count
