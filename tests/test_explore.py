"From a run folder to its explorer: in Python, on the command line, and served to a real browser."
import contextlib, io, os, signal, socket, subprocess, sys, time

import pytest
from browsing import chromium, needs_browser

from sae_nb.cli import main
from sae_nb.core import UserError
from sae_nb.explore import explorer, features_of, serve
from sae_nb.runs import RunConfig, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A run of a few seconds."
    folder = tmp_path_factory.mktemp("run")
    for _ in run(RunConfig(lm="pylib-64", site="resid_post.2", n=96, k=6, tokens=8_000, context=64, dtype="float32"), folder): pass
    features_of(folder, tokens=6_000, effects=4, explain=2)
    return folder


def cli(*args):
    "Exit code, and what is said on both streams."
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err: code = main(list(map(str, args)))
    return code, out.getvalue(), err.getvalue()


def test_features_are_collected_once(folder):
    before = (folder / "features" / "index.json").stat().st_mtime_ns
    assert features_of(folder, tokens=10**12).n == 96 and features_of(folder / "features").n == 96
    assert (folder / "features" / "index.json").stat().st_mtime_ns == before


def test_a_run_comes_with_its_model_and_features_alone_without(folder):
    look = explorer(folder)
    look.text = "import os\n"
    assert "".join(look.answer["tokens"]) == "import os\n" and all(len(v) <= 6 for v in look.answer["values"])
    alone = explorer(folder / "features")
    assert alone.live is None and "No model" in alone.head["no_model"]


def test_the_command_writes_a_page(folder, tmp_path):
    code, out, _ = cli("export", folder, "--out", tmp_path / "page.html")
    assert code == 0 and str(tmp_path / "page.html") in out and (tmp_path / "page.html").stat().st_size > 1e6
    assert cli("export", folder, "--out", tmp_path / "pages")[0] == 0 and (tmp_path / "pages" / "index.html").exists()


@pytest.mark.parametrize("args, words", [
    (["export", "nowhere", "--out", "x.html"], "neither a finished run nor features"), (["explore", "nowhere"], "neither a finished run nor features"),
    (["export", "DIR"], "--out"), (["export", "DIR", "--out", "DIR"], "something else"), (["explore", "DIR", "--app", "netscape"], "invalid choice"), (["export", "DIR", "--out", "x.html", "--tokens", "0"], "tokens is 0")])
def test_mistakes_are_one_sentence(folder, args, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sae_nb.explore.find_spec", lambda name: True)   # whatever is installed
    code, _, err = cli(*(folder if a == "DIR" else a for a in args))
    assert code == 2 and words in err and err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_missing_server_is_told(folder, monkeypatch):
    monkeypatch.setattr("sae_nb.explore.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"sae_nb\[explore\]"): serve(folder)
    with pytest.raises(UserError, match="jupyterlab"): serve(folder, app="lab")


@needs_browser
def test_the_command_serves_the_explorer(folder, tmp_path):
    "A text that is typed in the page is read by the run's model; Ctrl-C ends the server."
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen([sys.executable, "-c", "import sys; from sae_nb.cli import main; sys.exit(main())", "explore", str(folder), "--port", str(port), "--no-browser"], stdout=log, stderr=log, start_new_session=True,
                                  env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        for _ in range(900):
            assert server.poll() is None, (tmp_path / "log").read_text()
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1): break
            time.sleep(.1)
        with chromium() as page:
            page.set_default_timeout(90_000)
            page.goto(f"http://127.0.0.1:{port}/")
            box = page.get_by_label("a text of your own")
            box.fill("import os"); page.keyboard.press("Control+Enter")
            page.locator(".own .token").nth(1).wait_for()
            assert page.locator(".own .token").all_inner_texts() == ["import", "·os"] and not page.problems
    finally:
        if server.poll() is None: os.killpg(server.pid, signal.SIGINT)
        assert server.wait(30) == 0, (tmp_path / "log").read_text()


def test_a_missing_server_is_told_before_anything_is_collected(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("sae_nb.explore.find_spec", lambda name: None)
    monkeypatch.setattr("sae_nb.explore.features_of", lambda *a, **k: pytest.fail("collected first"))
    code, _, err = cli("explore", folder)
    assert code == 2 and "sae_nb[explore]" in err
