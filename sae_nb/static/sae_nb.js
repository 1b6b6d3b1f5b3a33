// Every view of sae_nb: in a notebook anywidget calls `render`, in a static page `page` does, with a model of its own.
// A model has get, set, save_changes, send, on and off; nothing else of the host is used, and nothing is fetched.

const MARKS = { " ": "·", "\n": "⏎", "\t": "⇥", "\x7f": "␡", "\xa0": "⍽" };
const NAMES = { density: "density", mean: "mean", second: "second moment", skew: "skew", kurtosis: "kurtosis", max: "maximum", effect: "effect (nats)" };
const ROW = 40;   // height of a row of the list, as in the style sheet
const SHOWN = 5;  // contexts shown before "more"
const FIRST = 15; // latents of the reader's own text shown before "all"

// --- small things -----------------------------------------------------------------------------------------

/** An element; texts are always set as text, so no token can become markup. */
function h(tag, props = {}, ...children) {
  const el = tag.startsWith("svg:") ? document.createElementNS("http://www.w3.org/2000/svg", tag.slice(4)) : document.createElement(tag);
  for (const [k, v] of Object.entries(props)) {
    if (v == null || v === false) continue;
    if (k.startsWith("on")) el.addEventListener(k.slice(2), v);
    else if (k === "style") for (const [p, x] of Object.entries(v)) el.style.setProperty(p, x);
    else el.setAttribute(k, v === true ? "" : v);
  }
  el.append(...children.flat().filter((c) => c != null && c !== false));
  return el;
}

/** A number as a reader wants it: thousands grouped, four significant digits. */
function short(x) {
  if (x == null || Number.isNaN(x)) return "–";
  if (Number.isInteger(x) || Math.abs(x) >= 1e4) return Math.round(x).toLocaleString("en-US");
  return Math.abs(x) < 1e-3 ? x.toExponential(2).replace("e", " e") : String(+x.toPrecision(4));
}

const share = (x) => (x == null || Number.isNaN(x) ? "–" : `${+(100 * x).toPrecision(3)} %`);
const signed = (x) => (x == null ? "–" : (x > 0 ? "+" : x < 0 ? "−" : "") + short(Math.abs(x)));
const clamp = (x, low, high) => Math.min(high, Math.max(low, x));

/** A token with each of its characters as one visible character. */
function visible(token) {
  return [...token].map((c) => MARKS[c] ?? mark(c)).join("") || "∅";
}

/** A character, or a picture for one that has none; a lone half is none. */
function mark(c) {
  if (/\p{Cs}/u.test(c)) return "�";
  if (/\p{Z}/u.test(c)) return "␣";
  return c < " " ? String.fromCharCode(0x2400 + c.charCodeAt(0)) : /\p{C}/u.test(c) ? "▯" : c;
}

/** The same as nodes: whitespace marks step back, a line may break after them, and does after a newline. */
function pieces(token) {
  return visible(token).split(/(⏎|[·⇥∅]+)/).filter(Boolean).map((t) => {
    if (!/^[·⏎⇥∅]/.test(t)) return t;
    return [h("span", { class: "ws" }, t), h(t === "⏎" ? "br" : "wbr")];
  }).flat();
}

const muted = (...text) => h("p", { class: "muted" }, ...text);
const stated = (...text) => h("p", { class: "state" }, ...text);
const word = (token) => h("span", { class: "word" }, pieces(token).filter((p) => !/^W?BR$/.test(p.tagName)));
const button = (text, onclick, props = {}) => h("button", { type: "button", onclick, ...props }, text);
const link = (text, onclick, props = {}) => button(text, onclick, { class: "link", ...props });

/** What is shown on hover and on focus of anything with `data-tip`. */
function tooltips(root) {
  const tip = h("div", { class: "tip", role: "tooltip", hidden: true });
  root.append(tip);
  const show = (e) => {
    const over = e.target.closest?.("[data-tip]");
    if (!over || !root.contains(over)) { tip.hidden = true; return; }
    tip.textContent = over.dataset.tip;
    tip.hidden = false;
    place(tip, root, over.getClientRects()[0] ?? over.getBoundingClientRect());
  };
  for (const name of ["pointerover", "focusin"]) root.addEventListener(name, show);
  for (const name of ["pointerleave", "focusout"]) root.addEventListener(name, () => { tip.hidden = true; });
  return tip;
}

function place(tip, root, box) {
  const at = root.getBoundingClientRect();
  tip.style.left = clamp(box.left - at.left, 0, Math.max(0, at.width - tip.offsetWidth)) + "px";
  tip.style.top = (box.top - at.top - tip.offsetHeight - 5 < -at.top ? box.bottom - at.top + 5 : box.top - at.top - tip.offsetHeight - 5) + "px";
}

/** Buttons of which one is on; arrow keys move between them. */
function tabs(label, options, chosen, onchoose) {
  const bar = h("div", { class: "tabs", role: "tablist", "aria-label": label });
  const choose = (i, focus) => {
    [...bar.children].forEach((b, j) => { b.setAttribute("aria-selected", i === j); b.tabIndex = i === j ? 0 : -1; });
    if (focus) bar.children[i].focus();
    onchoose(options[i][0]);
  };
  bar.append(...options.map(([, text, tip], i) => h("button", { type: "button", role: "tab", title: tip, onclick: () => choose(i) }, text)));
  bar.addEventListener("keydown", (e) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[e.key], at = [...bar.children].indexOf(document.activeElement);
    if (step && at >= 0) { e.preventDefault(); choose((at + step + options.length) % options.length, true); }
  });
  choose(Math.max(0, options.findIndex((o) => o[0] === chosen)));
  return bar;
}

function choice(label, options, value, onchange) {
  const box = h("select", { "aria-label": label, onchange: () => onchange(box.value) },
    options.map(([v, text, off]) => h("option", { value: v, selected: v === value, disabled: off }, text)));
  return box;
}

// --- tokens -------------------------------------------------------------------------------------------------

/** Tokens shaded by their values: hover tells, click or Enter picks, arrow keys move. */
function strip(tokens, values, { scale, pick, label = "tokens", onpick, tell } = {}) {
  const top = scale || values.reduce((m, v) => Math.max(m, Math.abs(v || 0)), 0) || 1;
  const box = h("div", { class: "strip", role: "group", "aria-label": `${label}; arrow keys move, Enter picks`, dir: "ltr" });
  const spans = tokens.map((t, i) => {
    const v = values[i] || 0, full = Math.min(1, Math.abs(v) / top), tip = tell ? tell(i) : `${visible(t)}: ${short(v)}`;
    const look = ["token", full > 0.8 && "full", v < 0 && "negative", i === pick && "picked"].filter(Boolean).join(" ");
    return h("span", { class: look, style: v ? { "--v": full.toFixed(3) } : {},
      role: "button", tabindex: -1, "data-tip": tip, "aria-label": tip, "aria-pressed": i === pick ? "true" : null, "data-i": i }, pieces(t));
  });
  const start = spans[clamp(pick ?? 0, 0, spans.length - 1)];
  if (start) start.tabIndex = 0; else box.append(h("span", { class: "muted" }, "There are no tokens."));
  const move = (i) => {
    if (!spans[i]) return;
    spans.forEach((s) => { s.tabIndex = -1; });
    spans[i].tabIndex = 0;
    spans[i].focus();
  };
  const choose = (i) => {
    spans.forEach((s, j) => { s.classList.toggle("picked", i === j); s.toggleAttribute("aria-pressed", false); });
    spans[i].setAttribute("aria-pressed", "true");
    onpick?.(i);
  };
  const at = (e) => { const s = e.target.closest(".token"); return s ? +s.dataset.i : -1; };
  box.addEventListener("click", (e) => { const i = at(e); if (i >= 0) choose(i); });
  box.addEventListener("keydown", (e) => {
    const i = at(e), step = { ArrowRight: 1, ArrowLeft: -1 }[e.key];
    if (i < 0) return;
    if (step) move(i + step);
    else if (e.key === "Home") move(0);
    else if (e.key === "End") move(spans.length - 1);
    else if (e.key === "ArrowDown" || e.key === "ArrowUp") move(below(spans, i, e.key === "ArrowDown" ? 1 : -1));
    else if (e.key === "Enter" || e.key === " ") choose(i);
    else return;
    e.preventDefault();
  });
  box.append(...spans);
  return box;
}

/** The token on the next line that is nearest to token `i`. */
function below(spans, i, step) {
  let best = -1, line = null;
  for (let j = i + step; spans[j]; j += step) {
    const y = spans[j].offsetTop;
    if (line === null ? Math.abs(y - spans[i].offsetTop) < 4 : Math.abs(y - line) >= 4) { if (line === null) continue; break; }
    line = y;
    if (best < 0 || Math.abs(spans[j].offsetLeft - spans[i].offsetLeft) < Math.abs(spans[best].offsetLeft - spans[i].offsetLeft)) best = j;
  }
  return best;
}

/** The switch that stops breaking lines at newlines, for all strips below `root`. */
function flat_switch(root) {
  const box = h("input", { type: "checkbox", checked: true, onchange: () => root.classList.toggle("flat", !box.checked) });
  return h("label", { class: "switch" }, box, "break lines at ⏎");
}

function tokens_view(model, root) {
  const body = h("div");
  const draw = () => {
    const tokens = model.get("tokens"), caption = model.get("caption");
    body.replaceChildren(h("div", { class: "between" }, h("span", { class: "caption" }, caption), tokens.some((t) => t.includes("\n")) && flat_switch(root)),
      strip(tokens, model.get("values"), { scale: model.get("scale"), pick: model.get("picked"), label: caption || "tokens",
        onpick: (i) => { model.set("picked", i); model.save_changes(); } }));
  };
  root.append(body);
  draw();
  const keep = () => {   // a pick made here must not lose the focus
    const spans = body.querySelectorAll(".token"), picked = model.get("picked");
    spans.forEach((s, i) => s.classList.toggle("picked", i === picked));
  };
  return listen(model, { tokens: draw, values: draw, caption: draw, scale: draw, picked: keep });
}

/** Handlers for changes of the model, and what takes them away. */
function listen(model, handlers) {
  for (const [name, f] of Object.entries(handlers)) model.on(`change:${name}`, f);
  return () => { for (const [name, f] of Object.entries(handlers)) model.off(`change:${name}`, f); };
}

// --- card -----------------------------------------------------------------------------------------------------

/** A latent's record with the words of its contexts put in. */
function filled(record, words) {
  const fill = (c) => (c.tokens ? c : { ...c, tokens: c.words.map((w) => words[w]) });
  return { ...record, top: record.top.map(fill), random: record.random.map(fill), bands: record.bands.map((b) => ({ ...b, contexts: b.contexts.map(fill) })) };
}

function dense(context) {
  const values = new Array(context.tokens.length).fill(0);
  for (const [i, v] of context.acts) values[i] = v;
  return values;
}

/** Bars with a logarithmic count axis. */
function histogram(counts, bin) {
  const W = 380, H = 150, L = 40, B = 30, T = 8, R = 10;
  if (!counts.length) return muted("No histogram: this latent never fires on the text that was read.");
  const high = Math.max(1, Math.ceil(Math.log10(Math.max(...counts) + 1))), wide = (W - L - R) / counts.length;
  const y = (c) => H - B - ((H - B - T) * Math.log10(c + 1)) / high;
  const svg = h("svg:svg", { viewBox: `0 0 ${W} ${H}`, class: "histogram", role: "img",
    "aria-label": `histogram of the positive activations, ${short(counts.reduce((a, b) => a + b, 0))} in all, log counts` });
  const text = (x, y, anchor, words) => svg.append(h("svg:text", { x, y, "text-anchor": anchor }, words));
  for (let e = 0; e <= high; e += Math.ceil(high / 4)) {
    const at = y(10 ** e - 1 || 0);
    svg.append(h("svg:line", { x1: L, x2: W - R, y1: at, y2: at, class: "grid" }));
    text(L - 5, at + 4, "end", e ? short(10 ** e) : "0");
  }
  counts.forEach((c, i) => c && svg.append(h("svg:rect", { x: L + i * wide, y: y(c), width: Math.max(1, wide - (wide > 4 ? 0.7 : 0)), height: H - B - y(c), class: "bar",
    "data-tip": `${short(i * bin)} to ${short((i + 1) * bin)}: ${short(c)}` })));
  const end = counts.length * bin, step = [1, 2, 5].map((m) => m * 10 ** Math.floor(Math.log10(end / 4))).reverse().find((s) => end / s >= 4) ?? end / 4;
  for (let v = 0; v <= end * 1.001; v += step) text(L + ((W - L - R) * v) / end, H - B + 14, "middle", short(+v.toPrecision(3)));
  text((L + W - R) / 2, H - 3, "middle", "activation");
  return svg;
}

/** Lines of context, a few at first. */
function contexts(list, f, tools, empty) {
  if (!list.length) return muted(empty);
  const box = h("div", { class: "contexts" });
  const line = (c) => h("figure", { class: "context" },
    h("figcaption", {}, h("span", { class: "doc" }, c.doc), ` token ${short(c.token)}`, h("b", {}, short(c.act))),
    strip(c.tokens, dense(c), { scale: f.max, pick: c.at, label: `context in ${c.doc}`,
      onpick: (i) => tools.pick?.({ latent: f.id, doc: c.doc, token: c.token + i - c.at, text: c.tokens[i], value: dense(c)[i] }) }));
  const more = link(`${list.length - SHOWN} more`, () => { box.append(...list.slice(SHOWN).map(line)); more.remove(); });
  box.append(...list.slice(0, SHOWN).map(line));
  return h("div", {}, box, list.length > SHOWN && more);
}

function panel(title, ...content) { return h("section", { class: "panel" }, h("h4", {}, title), ...content); }

function numbers_panel(f, tools) {
  const cells = [["density", share(f.density)], ["mean", short(f.mean)], ["second moment", short(f.second)], ["maximum", short(f.max)], ["skew", short(f.skew)],
    ["kurtosis", short(f.kurtosis)], ["effect", f.effect == null ? "not measured" : `${short(f.effect)} nats`]];
  return panel("Numbers", !f.density && stated("This latent never fires on the text that was read."),
    h("div", { class: "figures" }, cells.map(([k, v]) => h("div", {}, h("span", {}, k), " ", h("b", {}, v)))), histogram(f.hist, tools.bin));
}

function banded_panel(f, tools) {
  const body = h("div", { role: "tabpanel" });
  const told = (b) => `activation ${short(b.low)} to ${short(b.high)}, ${share(b.share)} of the positive ones`;
  const options = [["random", "random"], ...f.bands.map((b, i) => [i, `${short(b.low)}–${short(b.high)}`, told(b)])];
  return panel("Random and weaker contexts", tabs("which contexts", options, "random", (o) => {
    const band = f.bands[o];
    body.replaceChildren(muted(band ? told(band) : "drawn evenly from all positive activations"),
      contexts(band ? band.contexts : f.random, f, tools, "There is no such context."));
  }), body);
}

const votes = (list, none = "none") => (list?.length ? h("ol", { class: "votes" }, list.map(([w, v]) => h("li", {}, word(w), h("span", {}, signed(v))))) : muted(none));
const columns = (a, b) => h("div", { class: "two" }, a, b);
const titled = (title, ...x) => h("div", {}, h("h5", {}, title), ...x);

/** Which following predictions change when the latent is taken away at its peak, and what it votes for there. */
function effect_map(f) {
  const with_effect = [...f.top, ...f.random].filter((c) => c.effect);
  if (!with_effect.length) return null;
  const body = h("div"), now = { at: 0, by: "loss", kind: "logits" };
  const draw = () => {
    const c = with_effect[now.at], e = c.effect, values = e[now.by], tokens = c.tokens.slice(c.at, c.at + values.length);
    const best = values.reduce((m, v, i) => (Math.abs(v ?? 0) > Math.abs(values[m] ?? 0) ? i : m), 0), out = h("div");
    const next = (j) => (c.tokens[c.at + j + 1] == null ? "the next token" : `«${visible(c.tokens[c.at + j + 1])}»`);
    const some = (way, j) => e[`${way}_${now.kind}`]?.[j]?.map(([w, v]) => [w, way === "up" ? Math.abs(v) : -Math.abs(v)]);
    const show = (j) => out.replaceChildren(
      muted(`At «${visible(tokens[j] ?? "")}», predicting ${next(j)}: loss ${signed(e.loss[j])} nats, KL ${short(e.kl[j])} nats without the latent.`),
      columns(titled("votes for", votes(some("up", j))), titled("votes against", votes(some("down", j)))));
    body.replaceChildren(strip(tokens, values, { pick: best, label: "tokens from the peak on", onpick: show,
      tell: (j) => `${visible(tokens[j])} → ${next(j)}: loss ${signed(e.loss[j])} nats, KL ${short(e.kl[j])} nats` }), out);
    show(best);
  };
  const options = with_effect.map((c, i) => [String(i), `${c.doc}, token ${short(c.token)}`]);
  const controls = h("div", { class: "row" }, choice("context of the effects", options, "0", (v) => { now.at = +v; draw(); }),
    tabs("what the colour means", [["loss", "loss", "loss without the latent minus loss with it, in nats"], ["kl", "KL", "KL divergence of the predictions without the latent, in nats"]], "loss", (v) => { now.by = v; draw(); }),
    tabs("votes in", [["logits", "logits"], ["probs", "probabilities"]], "logits", (v) => { now.kind = v; draw(); }));
  return h("div", {}, controls, body);
}

function effects_panel(f, tools) {
  const map = h("div"), latent_link = ([id, v]) => h("li", {}, link(`${id}`, () => tools.go(id)), " ", tools.token && word(tools.token(id)), h("span", {}, short(v)));
  const list = (pairs, none) => (pairs.length ? h("ol", { class: "votes" }, pairs.map(latent_link)) : muted(none));
  const fill = (g) => {
    const made = effect_map(g);
    if (made) { map.replaceChildren(made); return; }
    map.replaceChildren(muted("The effects of this latent were not measured."));
    if (tools.measure && f.density) {
      const measure = button("measure now", async () => {
        measure.disabled = true; measure.textContent = "measuring…";
        const found = await tools.measure(f.id);
        if (found.error) map.replaceChildren(stated(found.error)); else fill(filled(found.record, found.words));
      });
      map.append(measure);
    }
  };
  fill(f);
  const x = f.explanation, score = (v) => (v == null ? "" : share(v));
  return panel("Effects and meaning",
    titled("explanation", h("p", {}, x?.text || "There is none.",
      x && x.precision != null && h("span", { class: "muted" }, ` precision ${score(x.precision)}, recall ${score(x.recall)}`))),
    titled("taken away at its peak: what changes after it", map),
    columns(titled("direct logits, up", votes(f.logits?.up, "not measured")), titled("direct logits, down", votes(f.logits?.down, "not measured"))),
    columns(titled("nearest directions", list(f.neighbours ?? [], "not measured")), titled("fire together", list(f.together ?? [], "none"))));
}

/** The four panels, always in the same place. */
function card(f, tools) {
  return h("div", { class: "card" }, numbers_panel(f, tools),
    panel("Strongest contexts", contexts(f.top, f, tools, "There is no context: this latent never fires on the text that was read.")),
    banded_panel(f, tools), effects_panel(f, tools));
}

function card_view(model, root) {
  const body = h("div");
  const draw = () => {
    const f = filled(model.get("record"), model.get("words"));
    body.replaceChildren(h("div", { class: "between" }, h("h3", {}, `Latent ${f.id}`), flat_switch(root)), card(f, { bin: model.get("bin"),
      go: (id) => { model.set("selected", id); model.save_changes(); }, pick: (p) => { model.set("picked", p); model.save_changes(); } }));
  };
  root.append(body);
  draw();
  return listen(model, { record: draw });
}

// --- explorer: data ----------------------------------------------------------------------------------------------

const bytes = (view) => new Uint8Array(view.buffer ?? view, view.byteOffset ?? 0, view.byteLength);

/** Columns, texts, orders and records of all latents. */
class Latents {
  constructor(model) {
    this.model = model;
    const head = model.get("head"), raw = bytes(model.get("columns_data")), texts = JSON.parse(new TextDecoder().decode(bytes(model.get("texts_data"))));
    const all = new Float32Array(raw.slice().buffer);
    this.n = head.n; this.head = head; this.columns = {};
    head.columns.forEach((name, i) => { this.columns[name] = all.subarray(i * head.n, (i + 1) * head.n); });
    this.tokens = texts.tokens; this.quotes = texts.quotes; this.explanations = texts.explanations;
    this.named = this.tokens.map((t, i) => `${t}\n${this.explanations[i]}`.toLowerCase());
    this.haystack = this.named.map((t, i) => `${t}\n${this.quotes[i].toLowerCase()}`);
    this.orders = {}; this.shards = new Map(); this.waiting = {};
    this.answer = (msg, buffers) => this.waiting[`${msg.type}${msg.key ?? ""}`]?.splice(0).forEach((done) => done(msg, buffers));
    model.on("msg:custom", this.answer);
  }

  close() { this.model.off("msg:custom", this.answer); }

  /** What a row of the list says of a latent; where only its contexts have the words looked for, the place in them. */
  told(id, query) {
    const at = query && !this.named[id].includes(query) ? this.quotes[id].toLowerCase().indexOf(query) : -1;
    if (at < 0) return this.explanations[id];
    return `« ${this.quotes[id].slice(Math.max(0, at - 12), at + query.length + 24).replace(/\s+/g, " ")} »`;
  }

  known(name) { return this.columns[name]?.some((v) => !Number.isNaN(v)) ?? false; }

  /** Latents by a column, unknown values last. The bits of a float32 and the id fit in one float64, whose native sort is fast. */
  order(name, down) {
    const key = `${name}${down}`, n = this.n;
    if (this.orders[key]) return this.orders[key];
    if (name === "id") return (this.orders[key] = Uint32Array.from({ length: n }, (_, i) => (down ? n - 1 - i : i)));
    const column = this.columns[name], bits = new Uint32Array(column.slice().buffer), packed = new Float64Array(n);
    for (let i = 0; i < n; i++) {
      const rank = bits[i] & 0x80000000 ? ~bits[i] >>> 0 : (bits[i] | 0x80000000) >>> 0;
      packed[i] = (Number.isNaN(column[i]) ? 0xffffffff : down ? 0xfffffffe - rank : rank) * 2097152 + i;
    }
    packed.sort();
    return (this.orders[key] = Uint32Array.from(packed, (v) => v % 2097152));
  }

  ask(type, key) {
    return new Promise((done) => {
      const name = `${type}${key ?? ""}`, first = !this.waiting[name]?.length;
      (this.waiting[name] ??= []).push((msg, buffers) => done({ ...msg, buffers }));
      if (first) this.model.send({ type, key });
    });
  }

  /** The record of a latent, from the shard that holds it. */
  async record(id) {
    const j = Math.floor(id / this.head.shard);
    if (!this.shards.has(j)) {
      if (this.shards.size > 30) this.shards.delete(this.shards.keys().next().value);
      this.shards.set(j, this.ask("shard", j));
    }
    const { shard, error } = await this.shards.get(j), found = shard?.latents.find((r) => r.id === id);
    if (error || !found) { this.shards.delete(j); throw new Error(error ?? `The payload holds no record of latent ${id}.`); }
    return filled(found, shard.words);
  }
}

/** plotly: the page's own, else the one bundled with Python's plotly, sent once by the kernel. */
async function load_plotly(latents) {
  globalThis.sae_nb_plotly ??= (async () => {
    if (globalThis.Plotly) return globalThis.Plotly;
    const { buffers } = await latents.ask("plotly"), code = new TextDecoder().decode(bytes(buffers[0]));
    new Function("define", "module", "exports", "require", code).call(globalThis);   // hidden: it must not go to a module loader
    return globalThis.Plotly;
  })();
  return globalThis.sae_nb_plotly;
}

/** plotly's WebGL compiles small functions, which a host may forbid. */
function has_webgl() {
  try { return !!new Function("return 1")() && !!document.createElement("canvas").getContext("webgl"); } catch { return false; }
}

// --- explorer: the parts of the page ----------------------------------------------------------------------------

/** The list of latents: only the rows in sight are elements. */
function latent_list(latents, marks, onselect) {
  const rows = h("div", { class: "rows" });
  const box = h("div", { class: "list", role: "listbox", tabindex: 0, "aria-label": "latents; arrow keys select" }, rows);
  const none = h("p", { class: "muted none", hidden: true }, "No latent fits: clear the search or widen the filters.");
  const list = { el: h("div", { class: "listbox" }, box, none), shown: new Uint32Array(0), column: "density", query: "", at: -1 };
  list.draw = () => {
    const top = clamp(Math.floor(box.scrollTop / ROW) - 4, 0, list.shown.length), made = [];
    const end = Math.min(list.shown.length, top + Math.ceil((box.clientHeight || 460) / ROW) + 9);
    for (let i = top; i < end; i++) {
      const id = list.shown[i], on = id === marks.selected(), value = list.column === "id" ? latents.columns.density[id] : latents.columns[list.column][id];
      made.push(h("div", { class: on ? "latent on" : "latent", "data-id": id, id: `${list.key}-${id}`, style: { top: `${i * ROW}px` },
        role: "option", "aria-selected": String(on), "aria-posinset": i + 1, "aria-setsize": list.shown.length },
      h("span", { class: "id" }, `${id}`), word(latents.tokens[id]),
      h("span", { class: "value" }, list.column === "density" || list.column === "id" ? share(value) : short(value)),
      h("span", { class: "about" }, marks.note(id) ? `✎ ${marks.note(id)}` : latents.told(id, list.query))));
    }
    rows.replaceChildren(...made);
    rows.style.height = `${list.shown.length * ROW}px`;
    none.hidden = list.shown.length > 0;
    const on = marks.selected();
    if (rows.querySelector(".on")) box.setAttribute("aria-activedescendant", `${list.key}-${on}`); else box.removeAttribute("aria-activedescendant");
  };
  list.set = (shown, column) => { list.shown = shown; list.column = column; list.find(); box.scrollTop = 0; list.draw(); };
  list.find = () => { list.at = list.shown.indexOf(marks.selected()); };
  list.reveal = () => {
    list.find();
    const y = list.at * ROW;
    if (y >= 0 && (y < box.scrollTop || y + ROW > box.scrollTop + box.clientHeight)) box.scrollTop = y - box.clientHeight / 2;
    list.draw();
  };
  list.key = `latent${Math.random().toString(36).slice(2, 7)}`;
  box.addEventListener("scroll", list.draw);
  box.addEventListener("click", (e) => { const row = e.target.closest(".latent"); if (row) onselect(+row.dataset.id); });
  box.addEventListener("keydown", (e) => {
    const page = Math.floor(box.clientHeight / ROW), last = list.shown.length - 1;
    const to = { ArrowDown: list.at + 1, ArrowUp: list.at - 1, PageDown: list.at + page, PageUp: list.at - page, Home: 0, End: last }[e.key];
    if (to === undefined || e.ctrlKey || e.metaKey || last < 0) return;
    e.preventDefault();
    onselect(list.shown[clamp(to, 0, last)]);
  });
  return list;
}

/** Whether a column is better shown on a logarithmic axis. */
function is_log(column) {
  let low = Infinity, high = 0;
  for (const v of column) if (v > 0) { low = Math.min(low, v); high = Math.max(high, v); }
  return high / low > 50 && !column.some((v) => v < 0);
}

/** All latents as points; box or lasso chooses some. */
function cloud(latents, root, { onselect, onlasso, marks, tip }) {
  const names = Object.keys(latents.columns).filter((c) => latents.known(c)), MANY = 4000;
  const now = { x: names[0], y: names.includes("kurtosis") ? "kurtosis" : names[1] ?? names[0], drag: "lasso" };
  const plot = h("div", { class: "plot", role: "img", "aria-label": "scatter of all latents; the list's filters do the same by keyboard" },
    muted("Loading the chart…"));
  const said = h("span", { class: "muted" }), over = h("canvas", { class: "over" });
  const options = names.map((c) => [c, NAMES[c] ?? c]);
  const clear = button("clear selection", () => onlasso([]), { style: { visibility: "hidden" } });
  const tools = h("div", { class: "row" }, choice("horizontal axis", options, now.x, (v) => { now.x = v; draw(); }), "against",
    choice("vertical axis", options, now.y, (v) => { now.y = v; draw(); }),
    tabs("dragging", [["lasso", "lasso"], ["select", "box"], ["zoom", "zoom"]], now.drag,
      (v) => { now.drag = v; if (plot.data) Plotly.relayout(plot, { dragmode: v }); }), clear, said);
  let ids = [], chosen = [], Plotly = null;
  const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  /** Chosen points and circles around the pinned and the selected one, over plotly's picture: cheaper than drawing that again. */
  function paint() {
    if (!plot.sae_ready) return;
    const { xaxis, yaxis, _size: { l, t, w, h: tall } } = plot._fullLayout, ratio = devicePixelRatio || 1, g = over.getContext("2d");
    const X = latents.columns[now.x], Y = latents.columns[now.y], r = ids.length > 20000 ? 1.5 : 3;
    Object.assign(over.style, { left: `${l}px`, top: `${t}px`, width: `${w}px`, height: `${tall}px` });
    over.width = w * ratio; over.height = tall * ratio;
    g.scale(ratio, ratio);
    g.fillStyle = colour("--orange");
    for (const i of chosen) g.fillRect(xaxis.d2p(X[i]) - r, yaxis.d2p(Y[i]) - r, 2 * r, 2 * r);
    const ring = (id, hue, width) => {
      if (!(latents.columns.density[id] > 0)) return;
      g.beginPath(); g.strokeStyle = colour(hue); g.lineWidth = width;
      g.arc(xaxis.d2p(X[id]), yaxis.d2p(Y[id]), 7, 0, 7); g.stroke();
    };
    for (const id of marks.pinned()) ring(id, "--accent", 2);
    if (marks.selected() != null) ring(marks.selected(), chosen.length ? "--ink" : "--orange", 3);
  }
  function draw() {
    const X = latents.columns[now.x], Y = latents.columns[now.y], logs = { x: is_log(X), y: is_log(Y) }, gl = has_webgl();
    const shows = (v, log) => (log ? v > 0 : !Number.isNaN(v)), many = () => ids.length > 20000;
    ids = Array.from(latents.order("id", false)).filter((i) => latents.columns.density[i] > 0 && shows(X[i], logs.x) && shows(Y[i], logs.y));
    const drawn = gl ? ids : ids.filter((_, i) => i % Math.ceil(ids.length / MANY) === 0);
    said.textContent = !ids.length ? "No latent that fires has both numbers."
      : drawn.length < ids.length ? `every ${Math.ceil(ids.length / MANY)}th point is drawn; a selection takes all` : "";
    const axis = (name, log) => ({ title: { text: NAMES[name] ?? name, font: { size: 13 } }, type: log ? "log" : "linear",
      gridcolor: colour("--line"), linecolor: colour("--muted"), zeroline: false, automargin: true, exponentformat: "power", showline: true, ...(log ? { dtick: 1 } : {}) });
    const opacity = many() ? 0.35 : 0.6, same = { marker: { opacity } };   // what is chosen is painted by us
    const trace = { type: gl ? "scattergl" : "scatter", mode: "markers", hoverinfo: "none", customdata: drawn,
      x: Float64Array.from(drawn, (i) => X[i]), y: Float64Array.from(drawn, (i) => Y[i]), marker: { size: many() ? 3 : 5, color: colour("--dots"), opacity }, selected: same, unselected: same };
    const clear_paper = "rgba(0,0,0,0)", revision = `${now.x}${now.y}`;
    Plotly.react(plot, [trace], { height: 330, margin: { l: 10, r: 10, t: 6, b: 10 }, paper_bgcolor: clear_paper, plot_bgcolor: clear_paper, showlegend: false,
      font: { color: colour("--ink"), size: 12 }, dragmode: now.drag, xaxis: axis(now.x, logs.x), yaxis: axis(now.y, logs.y), uirevision: revision, selectionrevision: revision,
      newselection: { line: { color: colour("--orange") } }, activeselection: { fillcolor: colour("--orange"), opacity: 0.06 } },
    { displayModeBar: false, displaylogo: false, responsive: true });
    if (!plot.sae_ready) listen_plot();
    paint();
  }
  function listen_plot() {
    plot.sae_ready = true;
    plot.append(over);
    for (const name of ["plotly_afterplot", "plotly_relayout", "plotly_relayouting"]) plot.on(name, paint);
    plot.on("plotly_click", (e) => onselect(e.points[0].customdata));
    plot.on("plotly_hover", (e) => {
      const p = e.points[0], id = p.customdata, b = plot.getBoundingClientRect(), told = (name) => `${NAMES[name]} ${short(latents.columns[name][id])}`;
      const x = b.left + p.xaxis._offset + p.xaxis.d2p(p.x), y = b.top + p.yaxis._offset + p.yaxis.d2p(p.y);
      tip.textContent = `latent ${id} ${visible(latents.tokens[id])}: ${told(now.x)}, ${told(now.y)}`;
      tip.hidden = false;
      place(tip, root, { left: x + 8, top: y - 4, bottom: y + 8 });
    });
    plot.on("plotly_unhover", () => { tip.hidden = true; });
    plot.on("plotly_selected", (e) => { if (e && (e.range || e.lassoPoints)) onlasso(inside(e)); });
    plot.on("plotly_deselect", () => onlasso([]));   // a double click
  }
  /** The latents within a box or a lasso, counted on all of them, drawn or not. */
  function inside(e) {
    const X = latents.columns[now.x], Y = latents.columns[now.y], px = e.lassoPoints?.x ?? e.range.x, py = e.lassoPoints?.y ?? e.range.y;
    const fx = (v) => plot._fullLayout.xaxis.d2l(v), fy = (v) => plot._fullLayout.yaxis.d2l(v);   // straight lines on the screen
    const qx = px.map(fx), qy = py.map(fy);
    if (!e.lassoPoints) return ids.filter((i) => (fx(X[i]) - qx[0]) * (fx(X[i]) - qx[1]) <= 0 && (fy(Y[i]) - qy[0]) * (fy(Y[i]) - qy[1]) <= 0);
    return ids.filter((i) => {
      const x = fx(X[i]), y = fy(Y[i]);
      let odd = false;
      for (let a = 0, b = qx.length - 1; a < qx.length; b = a++) {
        if (qy[a] > y !== qy[b] > y && x < ((qx[b] - qx[a]) * (y - qy[a])) / (qy[b] - qy[a]) + qx[a]) odd = !odd;
      }
      return odd;
    });
  }
  const start = async () => {
    if (!names.length) { plot.replaceChildren(muted("There is no number to draw.")); return; }
    try { Plotly = await load_plotly(latents); plot.replaceChildren(); draw(); }
    catch (e) { plot.replaceChildren(stated(`The chart could not be drawn: ${e.message}`)); }
  };
  return { el: h("div", {}, tools, plot), start, redraw: () => plot.sae_ready && draw(), mark: paint,
    lasso: (some) => {
      chosen = some; clear.style.visibility = some.length ? "" : "hidden";
      if (!some.length && plot.sae_ready && plot.layout.selections?.length) Plotly.relayout(plot, { selections: [] });   // the outline
      requestAnimationFrame(paint);
    },
    close: () => plot.sae_ready && Plotly.purge(plot) };
}

/** A text of the reader's own, and what the kernel answers. */
function own_text(latents, model, go) {
  const head = model.get("head"), out = h("div", { "aria-live": "polite" }), now = { token: null, all: false };
  const box = h("textarea", { rows: 2, "aria-label": "a text of your own", placeholder: "Type a text, then press Ctrl+Enter", spellcheck: "false",
    disabled: !head.live });
  const run = () => { now.token = null; now.all = false; model.set("text", box.value); model.save_changes(); draw(); };
  box.value = model.get("text") ?? "";
  box.addEventListener("keydown", (e) => { if (e.key === "Enter" && (e.ctrlKey || e.metaKey)) { e.preventDefault(); run(); } });
  function draw() {
    const text = model.get("text"), a = model.get("answer") ?? {}, id = model.get("selected");
    if (!head.live) return out.replaceChildren(stated(head.no_model));
    if (!text) return out.replaceChildren(muted("Nothing was typed yet."));
    if (a.text !== text) return out.replaceChildren(muted("The model is reading…"));
    if (a.error) return out.replaceChildren(stated(a.error));
    const mine = a.tokens.map((_, t) => { const j = a.latents[t].indexOf(id); return j < 0 ? 0 : a.values[t][j]; });
    const best = new Map(), here = a.tokens.map((_, t) => t).filter((t) => now.token == null || now.token === t);
    for (const t of here) a.latents[t].forEach((i, j) => {
      if (!(a.values[t][j] > 0)) return;
      const b = best.get(i) ?? { v: 0, count: 0 };
      best.set(i, { v: Math.max(b.v, a.values[t][j]), count: b.count + 1 });
    });
    const row = ([i, b]) => h("li", {}, link(`${i}`, () => go(i)), " ", word(latents.tokens[i] ?? ""), h("span", {}, short(b.v) + (b.count > 1 ? ` ×${b.count}` : "")));
    const active = [...best].sort((p, q) => q[1].v - p[1].v), strongest = now.all ? active : active.slice(0, FIRST);
    const rest = active.length > FIRST && link(now.all ? `the strongest ${FIRST}` : `all ${short(active.length)} that fire`, () => { now.all = !now.all; draw(); });
    const about = id == null ? "No latent is selected."
      : mine.some((v) => v) ? `Latent ${id} on this text, at most ${short(Math.max(...mine))}:` : `Latent ${id} does not fire on this text.`;
    const max = latents.columns.max?.[id], whole = now.token != null && link("whole text", () => { now.token = null; draw(); });
    const focused = out.contains(document.activeElement) && document.activeElement.dataset.i;
    const shaded = strip(a.tokens, mine, { scale: Math.max(max || 0, ...mine), pick: now.token, label: "your text", onpick: (t) => { now.token = t; draw(); } });
    out.replaceChildren(h("p", {}, about), shaded,
      titled(now.token == null ? "strongest latents of the text" : `latents that fire at «${visible(a.tokens[now.token])}»`, whole,
        strongest.length ? h("ol", { class: "votes many" }, strongest.map(row)) : muted("none"), rest));
    if (focused) out.querySelector(`[data-i="${focused}"]`)?.focus();
  }
  const stop = listen(model, { answer: draw, selected: draw, text: () => { if (document.activeElement !== box) box.value = model.get("text"); draw(); } });
  draw();
  const controls = h("div", { class: "row top" }, box, button("run", run, { disabled: !head.live }));
  return { el: h("section", { class: "panel own" }, h("h4", {}, "Test your own text"), controls, out), stop };
}

/** Notes as a file, for the static page, which has no kernel to keep them. */
function notes_files(model) {
  const file = h("input", { type: "file", accept: "application/json,.json", hidden: true, onchange: async () => {
    try {
      const read = JSON.parse(await file.files[0].text());
      if (!read || typeof read !== "object" || !Object.values(read).every((v) => typeof v === "string")) throw new Error("it holds no notes");
      model.set("notes", { ...model.get("notes"), ...read }); model.save_changes(); said.textContent = "notes read";
    } catch (e) { said.textContent = `this file cannot be read: ${e.message}`; }
    file.value = "";
  } });
  const said = h("span", { class: "muted", "aria-live": "polite" });
  const save = () => {
    const url = URL.createObjectURL(new Blob([JSON.stringify(model.get("notes"), null, 1)], { type: "application/json" }));
    h("a", { href: url, download: "notes.json" }).click();
    setTimeout(() => URL.revokeObjectURL(url), 1000);
  };
  return h("span", { class: "row" }, button("download notes", save), button("upload notes", () => file.click()), file, said);
}

/** The page's address names the selected latent. Of several explorers the first has it; JupyterLab keeps its own. */
function addressed(model, n) {
  if (globalThis.sae_nb_addressed || document.querySelector(".jp-LabShell")) return null;
  globalThis.sae_nb_addressed = true;
  const named = () => { const found = /^#latent-(\d+)$/.exec(location.hash); return found && +found[1] < n ? +found[1] : null; };
  let told = 0;
  const take = () => {
    const id = named();
    if (id !== null && id !== model.get("selected")) { model.set("selected", id); model.save_changes(); }
  };
  const tell = () => {
    const id = model.get("selected"), now = performance.now(), soon = now - told < 1000;   // a walk with arrow keys is one step back
    if (id == null || id === named()) return;
    told = now;
    history[soon ? "replaceState" : "pushState"](history.state, "", `#latent-${id}`);
  };
  take();
  if (model.get("selected") != null && named() === null) history.replaceState(history.state, "", `#latent-${model.get("selected")}`);
  addEventListener("hashchange", take);
  const stop = listen(model, { selected: tell });
  return () => { stop(); removeEventListener("hashchange", take); globalThis.sae_nb_addressed = false; };
}

// --- explorer ---------------------------------------------------------------------------------------------------------

function explorer_view(model, root, tip) {
  const head = model.get("head");
  const title = h("header", { class: "between" }, h("h3", {}, head.title), h("span", { class: "muted" }, head.about));
  if (!head.n) { root.append(title, stated("This payload holds no latents: collect features of a dictionary first.")); return () => {}; }
  const latents = new Latents(model), D = latents.columns.density, get = (k) => model.get(k);
  const put = (k, v) => { model.set(k, v); model.save_changes(); }, leave = addressed(model, head.n);
  const select = (id) => put("selected", id);
  const marks = { selected: () => get("selected"), pinned: () => get("pinned"), note: (id) => get("notes")[id] };
  const now = { query: "", by: latents.known("effect") ? "effect" : "density", down: true, low: 0, high: 100, alive: true, compare: false };
  let lassoed = null;

  // left: what to look for
  let least = 1, most = 0;
  for (const v of D) if (v > 0) { least = Math.min(least, v); most = Math.max(most, v); }
  if (!most) now.alive = false;
  const density = (step) => least * ((most || 1) / least) ** (step / 100);
  const search = h("input", { type: "search", placeholder: "search token, explanation or context ( / )",
    "aria-label": "search by token at the peak, by explanation, or by words around the strongest firings", oninput: () => { now.query = search.value; filter(); } });
  const sorts = Object.keys(NAMES).filter((c) => latents.columns[c]).map((c) => [c, NAMES[c] + (latents.known(c) ? "" : " (unknown)"), !latents.known(c)]);
  const arrow = button("↓", () => { now.down = !now.down; turn(); filter(); });
  const turn = () => {
    arrow.textContent = now.down ? "↓" : "↑";
    arrow.setAttribute("aria-label", now.down ? "descending; press for ascending" : "ascending; press for descending");
  };
  turn();
  const range_said = h("span", { class: "muted" }), count = h("span", { class: "count", role: "status" });
  const range = (name, end) => h("input", { type: "range", min: 0, max: 100, value: now[end], "aria-label": name, oninput: (e) => { now[end] = +e.target.value; filter(); } });
  const alive = h("input", { type: "checkbox", checked: now.alive, onchange: () => { now.alive = alive.checked; filter(); } });
  const dice = button("random latent", () => list.shown.length && select(list.shown[Math.floor(Math.random() * list.shown.length)]));
  const list = latent_list(latents, marks, select);

  function filter() {
    const order = latents.order(now.by, now.down), query = now.query.toLowerCase(), found = new Uint32Array(latents.n), hay = latents.haystack;
    const low = now.low > 0 ? density(now.low) * 0.9999 : -1, high = now.high < 100 ? density(now.high) * 1.0001 : Infinity;
    let m = 0;
    for (const i of order) {
      if (lassoed && !lassoed[i]) continue;
      const d = D[i] || 0;
      if (d < low || d > high || (now.alive && !(d > 0)) || (query && !hay[i].includes(query))) continue;
      found[m++] = i;
    }
    list.query = query;
    list.set(found.subarray(0, m), now.by);
    range_said.textContent = `density ${now.low > 0 ? share(density(now.low)) : "any"} to ${now.high < 100 ? share(density(now.high)) : "any"}`;
    count.textContent = `${short(m)} of ${short(latents.n)} latents${lassoed ? " in the selection" : ""}`;
  }

  const left = h("div", { class: "left" }, search,
    h("div", { class: "row" }, choice("sort by", [...sorts, ["id", "number"]], now.by, (v) => { now.by = v; filter(); }), arrow,
      h("label", { class: "switch" }, alive, "alive only")),
    h("div", { class: "ranges" }, range_said, range("density at least", "low"), range("density at most", "high")), h("div", { class: "between" }, count, dice), list.el);

  // right: chart, card, text
  const points = cloud(latents, root, { onselect: select, marks, tip, onlasso: (ids) => put("lasso", ids) });
  const shelf = h("div", { class: "shelf", "aria-label": "pinned latents" }), stage = h("div", { class: "stage" });
  const own = own_text(latents, model, select);
  const tools = { bin: head.bin, go: select, token: (id) => latents.tokens[id], pick: (p) => put("picked", p),
    measure: head.effects ? (id) => latents.ask("effect", id) : null };

  function note_box(id) {
    const box = h("textarea", { rows: 1, class: "note", "aria-label": `note on latent ${id}`, placeholder: "your note" });
    let timer = null;
    const keep = () => {
      clearTimeout(timer);
      const notes = { ...get("notes") };
      if ((notes[id] ?? "") === box.value) return;
      if (box.value.trim()) notes[id] = box.value; else delete notes[id];
      put("notes", notes);
    };
    box.value = get("notes")[id] ?? "";
    box.dataset.note = id;
    box.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(keep, 250); });
    box.addEventListener("blur", keep);
    return box;
  }

  const heading = (id) => {
    const pinned = marks.pinned(), on = pinned.includes(id), turn_pin = () => put("pinned", on ? pinned.filter((p) => p !== id) : [...pinned, id]);
    return h("div", { class: "heading" }, h("h3", {}, `Latent ${id} `, word(latents.tokens[id])),
      leave && h("a", { href: `#latent-${id}`, "aria-label": `link to latent ${id}`, title: "the address of this latent" }, "link"),
      button(on ? "unpin" : "pin", turn_pin, { "data-pin": id, "aria-pressed": String(on) }), note_box(id));
  };

  /** A latent's heading, and its card as soon as the record is there. */
  function slot(id) {
    const body = h("div", {}), el = h("article", { "aria-label": `latent ${id}`, "data-latent": id }, heading(id), body);
    const slow = setTimeout(() => body.replaceChildren(muted(`Loading latent ${id}…`)), 150);
    const done = latents.record(id).then((f) => card(f, tools)).catch((e) => stated(e.message));
    done.then((made) => { clearTimeout(slow); body.replaceChildren(made); });
    return el;
  }

  let showing = "";
  function draw_stage() {
    const id = marks.selected(), ids = now.compare && marks.pinned().length ? marks.pinned() : id == null ? [] : [id], key = `${now.compare}${ids}`;
    if (key === showing) return;
    showing = key;
    stage.classList.toggle("compare", now.compare && ids.length > 0);
    const old = stage.offsetHeight;
    stage.style.minHeight = `${old}px`;   // so that the page does not jump while a record is on its way
    stage.replaceChildren(...(ids.length ? ids.map(slot) : [stated("No latent is selected: choose one in the list or in the chart.")]));
    setTimeout(() => { stage.style.minHeight = ""; }, 400);
  }

  function draw_shelf() {
    const pinned = marks.pinned();
    const show = (compare) => { now.compare = compare; draw_shelf(); draw_stage(); };
    const compare = button(now.compare ? "show one" : "compare pinned", () => show(!now.compare), { "aria-pressed": String(now.compare) });
    const chip = (id) => h("span", { class: "chip" }, link(`${id}`, () => { select(id); show(false); }), word(latents.tokens[id]),
      link("×", () => put("pinned", pinned.filter((p) => p !== id)), { "aria-label": `unpin latent ${id}` }));
    shelf.replaceChildren(h("span", { class: "muted" }, pinned.length ? "pinned" : "Nothing is pinned."), ...pinned.map(chip), ...(pinned.length > 1 ? [compare] : []));
    if (pinned.length < 2) now.compare = false;
    for (const b of stage.querySelectorAll("[data-pin]")) {
      const id = +b.dataset.pin, box = b.parentElement.querySelector("textarea"), focus = document.activeElement === b;
      const fresh = heading(id);
      fresh.querySelector("textarea").replaceWith(box);
      b.parentElement.replaceWith(fresh);
      if (focus) fresh.querySelector("button").focus();
    }
  }

  const take_lasso = () => {
    const ids = get("lasso");
    lassoed = ids.length ? new Uint8Array(latents.n) : null;
    for (const i of ids) lassoed[i] = 1;
    points.lasso(ids);
    filter();
  };
  const take_notes = () => {
    list.draw();
    for (const box of stage.querySelectorAll("[data-note]")) if (document.activeElement !== box) box.value = get("notes")[box.dataset.note] ?? "";
  };
  const take_selected = () => { list.reveal(); draw_stage(); points.mark(); }, take_pinned = () => { draw_shelf(); draw_stage(); points.mark(); };

  const trouble = h("p", { class: "state", role: "alert" });
  const take_problem = () => { trouble.textContent = get("problem"); trouble.hidden = !get("problem"); };
  const stop = listen(model, { selected: take_selected, pinned: take_pinned, notes: take_notes, lasso: take_lasso, problem: take_problem });
  const chart = h("details", { open: true, class: "chart" }, h("summary", {}, "All latents"), points.el);
  const bar = h("div", { class: "between" }, shelf, h("span", { class: "row" }, head.static && notes_files(model), flat_switch(root)));
  root.append(title, trouble, h("div", { class: "body" }, left, h("div", { class: "right" }, chart, bar, stage, own.el)));
  const keys = (e) => {   // with nothing focused the keys are the page's
    if (!root.contains(e.target) && e.target !== document.body) return;
    if (e.key === "/" && !/^(INPUT|TEXTAREA|SELECT)$/.test(e.target.tagName)) { e.preventDefault(); search.focus(); search.select(); }
    if (e.key !== "ArrowDown" || e.target !== search) return;
    e.preventDefault();
    list.el.firstChild.focus();
    if (list.at < 0 && list.shown.length) select(list.shown[0]);
  };
  document.addEventListener("keydown", keys);
  take_lasso(); take_problem(); draw_shelf(); draw_stage();
  requestAnimationFrame(() => { list.reveal(); points.start(); });
  const theme = matchMedia("(prefers-color-scheme: dark)");
  theme.addEventListener("change", points.redraw);
  const watch = new MutationObserver(points.redraw);   // JupyterLab's theme
  watch.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light"] });
  return () => {
    for (const end of [stop, leave ?? (() => {}), own.stop, () => latents.close(), points.close, () => watch.disconnect()]) end();
    theme.removeEventListener("change", points.redraw);
    document.removeEventListener("keydown", keys);
  };
}

// --- doors ------------------------------------------------------------------------------------------------------------

const VIEWS = { tokens: tokens_view, card: card_view, explorer: explorer_view };

/** anywidget's door. */
function render({ model, el }) {
  const root = h("div", { class: `sae-nb ${model.get("view")}`, "data-lm-suppress-shortcuts": "true" });   // JupyterLab leaves the keys to us
  el.append(root);
  const tip = tooltips(root);
  try { return VIEWS[model.get("view")](model, root, tip); }
  catch (e) { root.append(h("p", { class: "state", role: "alert" }, `This view could not be drawn: ${e.message}`)); throw e; }
}

const decoded = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
const unzipped = (data) => new Response(new Blob([data]).stream().pipeThrough(new DecompressionStream("gzip"))).text();

/** What stands for the kernel in a static page: notes live in the browser, shards in the page or beside it. */
class Page {
  constructor(state) {
    this.state = { ...state, columns_data: decoded(state.columns_data), texts_data: decoded(state.texts_data) };
    this.handlers = {};
    try { this.state.notes = JSON.parse(localStorage.getItem(state.key)) ?? state.notes; } catch { /* no storage, or damaged notes */ }
  }

  get(name) { return this.state[name]; }

  set(name, value) {
    if (JSON.stringify(this.state[name]) === JSON.stringify(value)) return;
    this.state[name] = value;
    if (name === "notes") try { localStorage.setItem(this.state.key, JSON.stringify(value)); } catch { /* no storage: notes last as long as the page */ }
    this.emit(`change:${name}`);
  }

  save_changes() {}
  on(name, f) { (this.handlers[name] ??= []).push(f); }
  off(name, f) { this.handlers[name] = (this.handlers[name] ?? []).filter((g) => g !== f); }
  emit(name, ...args) { for (const f of [...(this.handlers[name] ?? [])]) f(...args); }

  async send({ type, key }) {
    const answer = (more) => this.emit("msg:custom", { type, key, ...more }, []);
    if (type !== "shard") return answer({ error: "This page has no kernel." });
    const inline = document.getElementById(`shard-${key}`), name = `shards/${String(key).padStart(5, "0")}.js`;
    try {
      if (inline) return answer({ shard: JSON.parse(await unzipped(decoded(inline.textContent))) });
      answer({ shard: await new Promise((done, fail) => {
        globalThis.sae_nb_shards ??= {};
        globalThis.sae_nb_shards[key] = done;
        document.head.append(h("script", { src: name, onerror: () => fail(new Error(`${name} cannot be read: keep it beside this page.`)) }));
      }) });
    } catch (e) { answer({ error: e.message }); }
  }
}

/** The static page's door: its state stands in the element `state`. */
function page() {
  const model = new Page(JSON.parse(document.getElementById("state").textContent));
  globalThis.explorer = model;
  render({ model, el: document.getElementById("app") });
}

export { page };
export default { render };
