"From a run folder to its explorer: in Python, on the command line, and served to a real browser."
import contextlib, http.client, io, os, re, shutil, signal, subprocess, sys, time
from pathlib import Path

import pytest
from browsing import MISSING, chromium, needs_browser

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
    (["export", "DIR"], "--out"), (["export", "DIR", "--out", "DIR"], "no page of ours"), (["explore", "DIR", "--app", "netscape"], "invalid choice"), (["export", "DIR", "--out", "x.html", "--tokens", "0"], "tokens is 0")])
def test_mistakes_are_one_sentence(folder, args, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sae_nb.explore.find_spec", lambda name: True)   # whatever is installed
    code, _, err = cli(*(folder if a == "DIR" else a for a in args))
    assert code == 2 and words in err and err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_sentence_is_the_last_thing_on_the_screen(folder, tmp_path):
    "A progress bar that is open when something is wrong is closed before it is said."
    shutil.copytree(folder, tmp_path / "run")
    features_of(tmp_path / "run", 500)
    (tmp_path / "run/features/notes.json").write_text('{"1": 5}')
    code, _, err = cli("export", tmp_path / "run", "--out", tmp_path / "page")
    assert code == 2 and "features:" in err
    assert re.split(r"[\r\n]+", err.rstrip("\n"))[-1].startswith("sae-nb: ") and "notes.json" in err


def test_a_missing_server_is_told(folder, monkeypatch):
    monkeypatch.setattr("sae_nb.explore.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"sae_nb\[explore\]"): serve(folder)
    with pytest.raises(UserError, match="jupyterlab"): serve(folder, app="lab")


SMALL = """
import sys
import sae_nb.widgets.export as export
from sae_nb.explore import serve
write = export.explore_notebook
export.explore_notebook = lambda folder, code: write(folder, "'a small page'")   # a kernel without a model
serve(".", app=sys.argv[1], browser=False)
"""


@contextlib.contextmanager
def serving(log, *command):
    "A real process that serves, and the address that it prints; it is ended at the end."
    with open(log, "w") as f:
        server = subprocess.Popen([sys.executable, *map(str, command)], stdout=f, stderr=f, start_new_session=True,
                                  env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"})
    try:
        def address():
            assert server.poll() is None, log.read_text()
            found = re.search(r"explorer: (http://127.0.0.1:(\d+)/\?token=\S+)", log.read_text())
            return found and answers(int(found[2])) and found[1]
        yield server, wait(address)
    finally:
        if server.poll() is None: server.terminate()
        server.wait(60)


def wait(what, seconds=120):
    "What `what` gives once it is true."
    for _ in range(10 * seconds):
        found = what()
        if found: return found
        time.sleep(.1)
    raise AssertionError(f"{what} did not come true")


def answers(port):
    "Does a server listen there?"
    with contextlib.suppress(OSError): return bool(get(f"http://127.0.0.1:{port}/voila/static/none")[0])


def get(address, method="GET", **headers):
    "Status, headers and text of an answer."
    host, path = address.removeprefix("http://").split("/", 1)
    line = http.client.HTTPConnection(host, timeout=120)
    try:
        line.request(method, "/" + path, "{}" if method == "POST" else None, headers={name.replace("_", "-"): value for name, value in headers.items()})
        reply = line.getresponse()
        return reply.status, reply.headers, reply.read().decode()
    finally: line.close()


def family(pid):
    "The running processes that descend from `pid`: id and start."
    stats = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError): stats.append((int(path.parent.name), path.read_text().rpartition(")")[2].split()))
    below = {pid}
    for _ in range(9): below |= {child for child, stat in stats if int(stat[1]) in below}
    return {(child, stat[19]) for child, stat in stats if child in below and stat[0] != "Z"}


def alive(some):
    "Which of these processes still run."
    left = set()
    for pid, start in some:
        with contextlib.suppress(OSError):
            stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            if stat[0] != "Z" and stat[19] == start: left.add(pid)
    return left


def kernels(server):
    "Kernels that run below a server."
    lines = []
    for pid, _ in family(server.pid):
        with contextlib.suppress(OSError): lines.append(Path(f"/proc/{pid}/cmdline").read_bytes())
    return sum(b"ipykernel_launcher" in line for line in lines)


needs_voila = pytest.mark.skipif("voila" in MISSING or not Path("/proc/self/stat").exists(), reason="Voila and /proc are needed")


@needs_voila
def test_strangers_and_foreign_pages_are_refused(tmp_path):
    "Each request needs this machine's name, no foreign page, and the token or its cookie; a visitor has one kernel, all have four at most."
    with serving(tmp_path / "log", "-c", SMALL, "voila") as (server, address):
        page = address.split("?")[0]
        port = page.split(":")[2].strip("/")
        refused = [get(page), get(page + "?token=wrong"), get(address, Host="evil.example"), get(address, Host=f"evil.example:{port}"), get(address, Origin="http://evil.example"),
                   get(page + "voila/static/main.js", Host="evil.example"), get(address, Host="127.0.0.1.evil.example"), get(page, Sec_Fetch_Site="cross-site"), get(address, Origin="null")]
        assert [status for status, *_ in refused] == [403] * 9 and kernels(server) == 0
        assert "token" in refused[0][2] and "\n  File" not in refused[0][2]
        status, headers, text = get(address)
        assert status == 200 and "a small page" in text and kernels(server) == 1 and headers["Referrer-Policy"] == "no-referrer"
        cookie = "; ".join(c.split(";")[0] for c in headers.get_all("Set-Cookie"))
        assert get(page, Cookie=cookie)[0] == 200 and kernels(server) == 1   # again the same visitor
        assert get(page, Cookie=cookie, Sec_Fetch_Site="same-site")[0] == 403   # from another port of this machine
        assert get(page, Cookie=cookie, Origin=f"http://127.0.0.1:{int(port) + 1}")[0] == 403
        kernel = re.search(r'"kernelId": *"([\w-]+)"', get(page, Cookie=cookie)[2])[1]
        socket = dict(Connection="Upgrade", Upgrade="websocket", Sec_WebSocket_Version="13", Sec_WebSocket_Key="AAAAAAAAAAAAAAAAAAAAAA==")
        channels = f"{page}api/kernels/{kernel}/channels"
        assert get(channels, **socket)[0] == 403 and get(channels, Cookie=cookie, Origin="http://evil.example", **socket)[0] == 403
        assert [get(address)[0] for _ in range(5)] == [200] * 5 and kernels(server) == 4   # without a cookie each is another visitor


@needs_voila
@pytest.mark.parametrize("app, how", [(a, h) for a in ("voila", "lab") for h in (signal.SIGTERM, signal.SIGKILL)] + [("voila", signal.SIGHUP)])
def test_nothing_stays_when_the_server_ends(tmp_path, app, how):
    "By whatever signal: the server and its kernels end, and only a killed process leaves its folder."
    if app == "lab" and "jupyterlab" in MISSING: pytest.skip("JupyterLab is needed")
    with serving(tmp_path / "log", "-c", SMALL, app) as (server, address):
        opened = get(address) if app == "voila" else get(address.replace("?", "api/kernels?"), "POST")
        assert opened[0] in (200, 201) and kernels(server) == 1
        everyone = family(server.pid)
        assert len(everyone) >= 3
        server.send_signal(how)
        assert server.wait(60) == (-how if how == signal.SIGKILL else 0), (tmp_path / "log").read_text()
        wait(lambda: not alive(everyone))


def test_a_server_that_does_not_listen_ends_too():
    "A message that voila misreads keeps it busy without end: it takes TERM in and never comes to it."
    busy = "import signal, threading\nfrom sae_nb.explore import _follow\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" \
           "threading.Thread(target=_follow, args=(0, .2), daemon=True).start()\nwhile True: pass"
    assert subprocess.run([sys.executable, "-c", busy], timeout=60).returncode == 1


@needs_voila
def test_kernels_without_a_page_are_ended(tmp_path):
    "After a while without a connection."
    small = SMALL.replace("serve(", "import sae_nb.explore as e\nmade = e._command\ndef soon(*a):\n    argv, env = made(*a)\n"
                          "    return [x.replace('timeout=600', 'timeout=1').replace('interval=30', 'interval=1') for x in argv], env\ne._command = soon\nserve(")
    with serving(tmp_path / "log", "-c", small, "voila") as (server, address):
        assert get(address)[0] == 200 and kernels(server) == 1
        wait(lambda: not kernels(server))


@pytest.mark.parametrize("port, words", [(-1, "port is -1"), (70_000, "port is 70000")])
def test_ports_are_checked(folder, port, words):
    with pytest.raises(UserError, match=words): serve(folder, port)


def test_a_port_that_is_taken_is_told(folder):
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        with pytest.raises(UserError, match="is not free"): serve(folder, s.getsockname()[1])


@needs_browser
def test_the_command_serves_the_explorer(folder, tmp_path):
    "A text that is typed in the page is read by the run's model; Ctrl-C ends the server."
    with serving(tmp_path / "log", "-c", "import sys; from sae_nb.cli import main; sys.exit(main())", "explore", folder, "--no-browser") as (server, address):
        with chromium() as page:
            page.goto(address)
            box = page.get_by_label("a text of your own")
            box.fill("import os"); page.keyboard.press("Control+Enter")
            page.locator(".own .token").nth(1).wait_for()
            assert page.locator(".own .token").all_inner_texts() == ["import", "·os"] and not page.problems
        os.killpg(server.pid, signal.SIGINT)
        assert server.wait(30) == 0, (tmp_path / "log").read_text()


def test_a_missing_server_is_told_before_anything_is_collected(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("sae_nb.explore.find_spec", lambda name: None)
    monkeypatch.setattr("sae_nb.explore.features_of", lambda *a, **k: pytest.fail("collected first"))
    code, _, err = cli("explore", folder)
    assert code == 2 and "sae_nb[explore]" in err
    code, _, err = cli("explore", folder, "--port", "70000")
    assert code == 2 and "port is 70000" in err


def test_features_of_other_weights_are_refused(folder, tmp_path):
    "A run that was trained again does not show the latents of the one before; neither does another's model."
    import shutil, torch
    from sae_nb.dossier import Live
    from sae_nb.lm import load_lm
    from sae_nb.sae import SAE
    again = tmp_path / "run"
    shutil.copytree(folder, again)
    assert features_of(again).n == 96
    sae = SAE.load(again)
    other = SAE(sae.cfg)
    other.load_state_dict({k: v + 1 for k, v in sae.state_dict().items()})
    other.save(again)
    with pytest.raises(UserError, match="differs in weights: .* remove the folder"): features_of(again)
    with pytest.raises(UserError, match="differs in weights"): explorer(again)
    with pytest.raises(UserError, match="differs in weights"): Live(other, load_lm("pylib-64", "cpu", "float32"), features_of(folder))
    with pytest.raises(UserError, match="differs in model|64 wide"): Live(sae, load_lm("pylib-128", "cpu", "float32"), features_of(folder))
