"use strict";
// A prompt token by token: predictions, active features, what effects are about.
const Trace = (() => {
  const { at, element, ask, complain, button } = Bench;
  const { percent, nats } = Parts;
  const strip = at("tokens");
  const state = { prompt: "", tokens: [], position: -1, features: [], about: "", code: "", target: null, heat: [], abort: null };
  let chooser = null;

  const choices = (list) => list.map((choice) => {
    const row = element("div", "choice");
    const bar = element("div", "bar");
    const fill = element("i");
    fill.style.setProperty("--w", String(choice.p));
    bar.append(fill);
    const aim = button("", () => setTarget({ token: choice.token_id, minus: null }), "tok", "make “" + choice.token + "” the target");
    aim.textContent = choice.token;
    aim.title = "make it what effects are about";
    row.append(aim, element("span", "p", percent(choice.p)), bar);
    return row;
  });

  // Heat: KL between the models, or how far a change moved each prediction. Sinks are left out, of
  // the colours and of their scale.
  const paint = (values, meaning, offset = 0) => {
    const shown = state.tokens.map((token, place) => (place < offset || token.sink ? null : values[place - offset] || 0));
    const highest = Math.max(...shown.map((value) => value || 0), 1e-9);
    const sinks = state.tokens.filter((token) => token.sink).length;
    at("heat-meaning").textContent = meaning + ", up to " + highest.toFixed(2) + " nats"
      + (sinks ? " (" + sinks + " attention sink" + (sinks > 1 ? "s" : "") + " left out)" : "");
    state.heat = shown.map((value) => (value || 0) / highest);
    [...strip.children].forEach((node, place) => {
      const token = state.tokens[place];
      node.style.setProperty("--h", String(state.heat[place]));
      node.title = (token.sink ? "an attention sink: left out of the colours"
        : shown[place] === null ? "before the change" : shown[place].toFixed(3) + " nats")
        + (token.features.length
          ? "\nmost active: " + token.features.map((f) => "#" + f.latent + " " + Parts.labelText(f)).join(", ") : "");
    });
  };
  const paintDistance = () => paint(state.tokens.map((token) => token.kl), "colour: KL(frozen model || decoder)");

  const fresh = () => {
    if (state.abort) state.abort.abort();
    state.abort = new AbortController();
    return state.abort.signal;
  };

  const draw = () => {
    chooser = Parts.strip(strip, state.tokens.map((token) => token.token), (place) => {
      State.set({ at: place, change: null });
      Intervene.forget();
      show(place);
    });
    state.tokens.forEach((token, place) => {
      strip.children[place].id = "token-" + place;
      strip.children[place].classList.toggle("sink", token.sink);
    });
    paintDistance();
    at("traced").hidden = false;
  };

  const show = async (place) => {
    const token = state.tokens[place];
    state.position = place;
    paintDistance();
    at("where").textContent = "after token " + place + " of " + (state.tokens.length - 1) + ", “" + token.token + "”";
    at("frozen").replaceChildren(...choices(token.frozen));
    at("decoder").replaceChildren(...choices(token.decoder));
    at("distance").textContent = "KL " + token.kl.toFixed(2) + " nats; the first choices " + (token.agree ? "agree" : "differ")
      + (token.actual ? ". What follows has " + percent(token.actual[0]) + " and " + percent(token.actual[1]) + "." : ".");
    Explain.reset(place);
    Intervene.reset();
    await showFeatures();
  };

  const showFeatures = async () => {
    const place = state.position;
    const signal = fresh();  // also where nothing is asked: a late answer about another token must not show
    // The old token's rows must not be clicked for the new one.
    state.features = [];
    state.code = "";
    list();
    if (place === 0) {
      at("effect-meaning").textContent = "Token 0 is an attention sink that no SAE was trained on: no feature is shown.";
      return;
    }
    // Arrow keys held down: ask only where they rest.
    await new Promise((done) => setTimeout(done, 120));
    if (signal.aborted) return;
    try {
      const found = await ask("/api/position", { prompt: state.prompt, position: place, target: state.target }, signal);
      state.about = "log p of “" + found.token.token + "”" + (found.minus ? " less that of “" + found.minus.token + "”" : "");
      at("effect-meaning").textContent = found.features.length + " active. Effect: how much " + state.about
        + (state.target ? "" : ", the decoder’s first choice,") + " falls when this feature alone is taken out of the decoder, measured. Positive supports it.";
      at("target-now").textContent = state.target ? state.about : "log p of each model’s likeliest token";
      state.features = found.features;
      state.code = found.code;
      list();
    } catch (error) { complain(error); }
  };

  // What effects are about: a token by its number, and perhaps another whose log p is taken off.
  const setTarget = async (target) => {
    state.target = target;
    State.set({ target: target && target.token, minus: target && target.minus });
    if (!target) {
      at("target-token").value = "";
      at("target-minus").value = "";
      at("target-now").textContent = "log p of each model’s likeliest token";
    }
    if (state.position < 0) return;
    await showFeatures();
    if (Intervene.changed()) Intervene.run();
  };
  // What the page shows of spaces and line ends is what people type back.
  const typed = (id) => at(id).value.replaceAll("␣", " ").replaceAll("↵", "\n");
  const readTarget = async () => {
    const [token, minus] = [typed("target-token"), typed("target-minus")];
    if (!token) {
      complain(new Error("Write a token first, with its space, such as “␣the”."));
      at("target-token").focus();
      return;
    }
    try {
      const first = await ask("/api/token", { text: token });
      const second = minus ? await ask("/api/token", { text: minus }) : null;
      await setTarget({ token: first.token_id, minus: second && second.token_id });
    } catch (error) { complain(error); }
  };

  const orders = {
    effect: (feature) => Math.abs(feature.effect),
    normalised: (feature) => feature.normalised,
    confidence: (feature) => (feature.confidence === null ? -1 : feature.confidence),
  };
  const sorted = () => {
    const by = orders[at("order").value];
    return [...state.features].sort((a, b) => by(b) - by(a));
  };
  const COLUMNS = [{ text: "feature" }, { text: "effect, nats", num: true }, { text: "activation", num: true },
    { text: "of its usual high", num: true }, { text: "label confidence", num: true }, { text: "change" }];
  const list = () => {
    const rows = sorted().map((feature) => {
      const change = element("span", "buttons");
      const act = (text, what, factor) => button(text, () => Intervene.scale(feature, factor()), "", what + " feature " + feature.latent);
      change.append(act("take out", "take out", () => 0), act("amplify", "amplify", () => Number(at("factor").value)));
      return [Parts.named(feature), Parts.moved(nats(feature.effect), feature.effect, 0.05), feature.act.toFixed(2),
        feature.normalised > 0 ? feature.normalised.toFixed(2) : "first seen",
        feature.confidence === null ? "–" : feature.confidence.toFixed(2), change];
    });
    Parts.fill(at("active-rows"), COLUMNS, rows);
  };

  // Reads the prompt; `place` is the token to look at, null the last one.
  const read = async (place = null) => {
    const prompt = at("prompt").value;
    if (!prompt.trim()) {
      complain(new Error("Write some text first, or take an example."));
      at("prompt").focus();
      return false;
    }
    at("go").disabled = true;
    at("ask-state").textContent = "reading …";
    const started = performance.now();
    try {
      const found = await ask("/api/trace", { prompt }, fresh());
      Object.assign(state, { prompt, tokens: found.tokens, position: -1 });
      draw();
      at("ask-state").textContent = found.tokens.length + " tokens, " + ((performance.now() - started) / 1000).toFixed(2) + " s";
      const last = found.tokens.length - 1;
      const chosen = place === null ? last : Math.min(place, last);
      State.set({ prompt, at: chosen });
      chooser.select(chosen, true);
      await show(chosen);
      return true;
    } catch (error) {
      at("ask-state").textContent = "";
      complain(error);
      return false;
    } finally { at("go").disabled = false; }
  };
  const move = (place) => { chooser.select(place, true); return show(place); };

  const sheet = () => {
    const token = state.tokens[state.position];
    const predicted = (name, list_) => ({ name, columns: ["token", "p"], rows: list_.map((c) => [c.token, c.p]) });
    const change = Intervene.shown();
    return {
      name: "prompt", title: "Token " + state.position + " of a prompt, " + document.title,
      facts: [at("heat-meaning").textContent, at("where").textContent + ". " + at("distance").textContent, at("effect-meaning").textContent],
      tokens: state.tokens.map((one, place) => ({ text: one.token, heat: state.heat[place] })), blocks: [],
      tables: [
        predicted("frozen model, next token", token.frozen), predicted("decoder, next token", token.decoder),
        ...(change ? change.tables : []),
        { name: "active features", columns: ["latent", "said", "effect", "activation", "of its usual high", "label confidence"],
          rows: sorted().map((f) => [f.latent, Parts.labelText(f), f.effect, f.act, f.normalised, f.confidence]) },
      ],
      question: { prompt: state.prompt, position: state.position, target: state.target, ...(change ? change.question : {}) },
      answers: { token, features: state.features, ...(change ? { intervention: change.answer } : {}) },
      code: change ? change.answer.code : state.code,
    };
  };
  Sheet.bar(at("trace-export"), sheet);

  at("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); at("ask").requestSubmit(); }
  });
  at("order").addEventListener("change", () => { State.set({ order: at("order").value }); list(); });
  at("target-form").addEventListener("submit", (event) => { event.preventDefault(); readTarget(); });
  at("target-reset").addEventListener("click", () => setTarget(null));
  return { state, paint, paintDistance, read, move, setTarget, list };
})();
