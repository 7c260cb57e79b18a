"use strict";
// A prompt token by token: predictions, active features, explanation.
const Trace = (() => {
  const { at, element, ask, complain, showCard } = Bench;
  const strip = at("tokens");
  const state = { prompt: "", tokens: [], position: -1, features: [], abort: null };
  const percent = (p) => (p >= 0.0995 ? (100 * p).toFixed(0) : (100 * p).toFixed(1)) + " %";
  const nats = (value) => (value >= 0 ? "+" : "−") + Math.abs(value).toFixed(2);

  const choices = (list) => list.map((choice) => {
    const row = element("div", "choice");
    const bar = element("div", "bar");
    const fill = element("i");
    fill.style.setProperty("--w", String(choice.p));
    bar.append(fill);
    row.append(element("span", "tok", choice.token), element("span", "p", percent(choice.p)), bar);
    return row;
  });

  // Heat: KL between the models, or how far an intervention moved each later prediction.
  const paint = (values, meaning, offset = 0) => {
    const highest = Math.max(...values, 1e-9);
    at("heat-meaning").textContent = meaning + ", up to " + highest.toFixed(2) + " nats";
    [...strip.children].forEach((node, place) => {
      const value = place >= offset ? values[place - offset] || 0 : 0;
      node.style.setProperty("--h", String(value / highest));
      node.title = (place < offset ? "before the change" : value.toFixed(3) + " nats")
        + (state.tokens[place].features.length
          ? "\nmost active: " + state.tokens[place].features.map((f) => "#" + f.latent + (f.label ? " " + f.label : "")).join(", ") : "");
    });
  };
  const paintDistance = () => paint(state.tokens.map((token) => token.kl), "colour: KL(frozen model || decoder)");

  const fresh = () => {
    if (state.abort) state.abort.abort();
    state.abort = new AbortController();
    return state.abort.signal;
  };

  const draw = () => {
    strip.replaceChildren(...state.tokens.map((token, place) => {
      const node = element("span", "", token.token);
      node.setAttribute("role", "option");
      node.setAttribute("aria-selected", "false");
      node.id = "token-" + place;
      node.tabIndex = -1;
      node.addEventListener("click", () => select(place));
      return node;
    }));
    paintDistance();
    at("traced").hidden = false;
  };

  const select = async (place) => {
    const token = state.tokens[place];
    if (state.position >= 0 && strip.children[state.position]) {
      strip.children[state.position].setAttribute("aria-selected", "false");
      strip.children[state.position].tabIndex = -1;
    }
    state.position = place;
    const node = strip.children[place];
    node.setAttribute("aria-selected", "true");
    node.tabIndex = 0;
    node.scrollIntoView({ block: "nearest" });
    paintDistance();
    at("where").textContent = "after token " + place + " of " + (state.tokens.length - 1) + ", “" + token.token + "”";
    at("frozen").replaceChildren(...choices(token.frozen));
    at("decoder").replaceChildren(...choices(token.decoder));
    at("distance").textContent = "KL " + token.kl.toFixed(2) + " nats; the first choices " + (token.agree ? "agree" : "differ")
      + (token.actual ? ". What follows has " + percent(token.actual[0]) + " and " + percent(token.actual[1]) + "." : ".");
    at("explanation").replaceChildren(element("p", "note", "Claims about single features, each tested by taking the feature out of the decoder and of the frozen model."));
    at("explain").disabled = place === 0;
    Intervene.reset();
    const signal = fresh();  // also where nothing is asked: a late answer about another token must not show
    // The old token's rows must not be clicked for the new one.
    state.features = [];
    list();
    if (place === 0) {
      at("effect-meaning").textContent = "Token 0 is an attention sink that no SAE was trained on: no feature is shown.";
      return;
    }
    // Arrow keys held down: ask only where they rest.
    await new Promise((done) => setTimeout(done, 120));
    if (signal.aborted) return;
    try {
      const found = await ask("/api/position", { prompt: state.prompt, position: place }, signal);
      at("effect-meaning").textContent = found.features.length + " active. Effect: how much log p of the decoder’s “"
        + found.token.token + "” falls when this feature alone is taken out of the decoder, measured. Positive supports it.";
      state.features = found.features;
      list();
    } catch (error) { complain(error); }
  };

  const orders = {
    normalised: (feature) => feature.normalised,
    effect: (feature) => Math.abs(feature.effect),
    confidence: (feature) => (feature.confidence === null ? -1 : feature.confidence),
  };
  const list = () => {
    const by = orders[at("order").value];
    at("active-rows").replaceChildren(...[...state.features].sort((a, b) => by(b) - by(a)).map(featureRow));
  };

  // A label below the bar of confidence is shown as a guess.
  const labelText = (feature) => feature.label || (feature.unsure_label ? "unsure: " + feature.unsure_label : feature.description);
  const featureRow = (feature) => {
    const row = element("tr");
    const name = element("td");
    const open = element("button", "feature-name", "#" + feature.latent);
    open.type = "button";
    open.setAttribute("aria-haspopup", "dialog");
    open.addEventListener("click", () => showCard(feature.latent));
    name.append(open, element("span", "label-text" + (feature.label ? "" : " none"), labelText(feature)));
    const change = element("td");
    const button = (text, what, factor) => {
      const node = element("button", "", text);
      node.type = "button";
      node.setAttribute("aria-label", what + " feature " + feature.latent);
      node.addEventListener("click", () => Intervene.run(feature, factor()));
      return node;
    };
    change.append(button("take out", "take out", () => 0), button("amplify", "amplify", () => Number(at("factor").value)));
    const cell = (text, className) => element("td", "num" + (className || ""), text);
    row.append(
      name, cell(feature.act.toFixed(2)),
      cell(feature.normalised > 0 ? feature.normalised.toFixed(2) : "first seen"),
      cell(feature.confidence === null ? "–" : feature.confidence.toFixed(2)),
      cell(nats(feature.effect), Math.abs(feature.effect) < 0.05 ? "" : feature.effect > 0 ? " up" : " down"), change);
    return row;
  };

  const readPrompt = async () => {
    const prompt = at("prompt").value;
    if (!prompt.trim()) {
      complain(new Error("Write some text first."));
      at("prompt").focus();
      return;
    }
    at("go").disabled = true;
    at("ask-state").textContent = "reading …";
    const started = performance.now();
    try {
      const found = await ask("/api/trace", { prompt }, fresh());
      Object.assign(state, { prompt, tokens: found.tokens, position: -1 });
      draw();
      at("ask-state").textContent = found.tokens.length + " tokens, " + ((performance.now() - started) / 1000).toFixed(2) + " s";
      await select(found.tokens.length - 1);
    } catch (error) {
      at("ask-state").textContent = "";
      complain(error);
    } finally { at("go").disabled = false; }
  };

  const explain = async () => {
    const box = at("explanation");
    const position = state.position;
    box.replaceChildren(element("p", "note", "testing claims …"));
    at("explain").disabled = true;
    try {
      const found = await ask("/api/explain", { prompt: state.prompt, position });
      if (position === state.position) box.replaceChildren(...explanation(found));
    } catch (error) {
      box.replaceChildren();
      complain(error);
    } finally { at("explain").disabled = state.position === 0; }
  };

  const tagged = (tag, text) => {
    const line = element("p");
    line.append(element("span", "tag", tag), text);
    return line;
  };
  const ranking = (rows) => {
    if (!rows.length) return tagged("A", "No feature is active here.");
    const table = element("table", "ranking");
    const head = table.createTHead().insertRow();
    for (const name of ["active here", "of its usual high", ""]) {
      const cell = element("th", name === "of its usual high" ? "num" : "", name);
      cell.scope = "col";
      head.append(cell);
    }
    head.cells[0].prepend(element("span", "tag", "A"));
    const body = table.createTBody();
    for (const [feature, high, what] of rows) {
      const row = body.insertRow();
      row.append(element("td", "mono", feature), element("td", "num", high), element("td", "", what));
    }
    return table;
  };
  const explanation = (found) => {
    const parts = [ranking(found.active), tagged("B", found.says)];
    if (!found.claims.length) return parts;
    const list = element("ul", "claims");
    found.claims.forEach((claim, place) => {
      const item = element("li");
      const words = element("div");
      words.append(element("span", "tag", "B" + (place + 1)), claim.sentence);
      const measure = element("div", "measure");
      measure.append(element("span", "chip " + claim.css, claim.verdict), element("br"),
        "measured " + nats(claim.change) + " nats (chance " + claim.noise.toFixed(2) + ")", element("br"),
        "decoder " + nats(claim.decoder_change));
      item.append(words, measure);
      list.append(item);
    });
    parts.push(list, element("p", "note", found.tested));
    return parts;
  };

  at("ask").addEventListener("submit", (event) => { event.preventDefault(); readPrompt(); });
  at("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); readPrompt(); }
  });
  at("order").addEventListener("change", list);
  at("explain").addEventListener("click", explain);
  strip.addEventListener("keydown", (event) => {
    const last = state.tokens.length - 1;
    const next = { ArrowRight: state.position + 1, ArrowLeft: state.position - 1, Home: 0, End: last }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    const place = Math.min(Math.max(next, 0), last);
    if (place !== state.position) select(place);
    strip.children[place].focus();
  });
  return { state, paint, paintDistance, percent, nats };
})();
