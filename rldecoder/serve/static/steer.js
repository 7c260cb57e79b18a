"use strict";
// Both models write on, with changed features and without, side by side.
const Steer = (() => {
  const { at, element, follow, complain } = Bench;
  const NAMES = { frozen: "frozen model", decoder: "decoder" };
  const KINDS = [["frozen", false], ["frozen", true], ["decoder", false], ["decoder", true]];
  const state = { abort: null, texts: {}, asked: null, code: "", key: "" };
  const key = (model, changed) => model + (changed ? "-changed" : "-plain");

  const editor = Changes.editor(at("steer-editor"), "steer", () => State.set({ steer: editor.text() }));
  const numbers = { start: ["steer-start", 1, 1e6], new_tokens: ["steer-new", 1, 200], temperature: ["steer-temperature", 0, 5], seed: ["steer-seed", 0, 2147483647] };
  const number = (name) => {
    const [id, least, most] = numbers[name];
    const value = Number(at(id).value);
    if (at(id).value.trim() && value >= least && value <= most && (name === "temperature" || Number.isInteger(value))) return value;
    at(id).focus();
    throw new Error("The " + at(id).labels[0].firstChild.textContent.trim() + " is a " + (name === "temperature" ? "" : "whole ") + "number from " + least + " to " + most + ".");
  };

  // Line ends show as marks, and end lines too.
  const broken = (text) => text.replaceAll("↵", "↵\n");
  const same = (a, b) => {
    const [one, other] = [[...a], [...b]];
    let place = 0;
    while (place < one.length && place < other.length && one[place] === other[place]) place += 1;
    return one.slice(0, place).join("");
  };
  const draw = (finished) => KINDS.forEach(([model, changed]) => {
    const text = state.texts[key(model, changed)];
    const box = at("text-" + key(model, changed));
    if (text === undefined) { box.replaceChildren(element("span", "note", "…")); return; }
    if (!changed) { box.replaceChildren(broken(text)); return; }
    const plain = state.texts[key(model, false)] || "";
    const start = same(plain, text);
    const rest = text.slice(start.length);
    box.replaceChildren(broken(start));
    if (rest) box.append(element("mark", "", broken(rest)));
    if (finished && text === plain) box.append(element("span", "note", " (the same)"));
  });

  const write = async () => {
    const prompt = at("prompt").value;
    if (!prompt.trim()) { complain(new Error("Write some text first, or take an example.")); at("prompt").focus(); return; }
    let asked;
    try {
      asked = { prompt, changes: editor.list.map((one) => ({ ...one })), start: number("start"), new_tokens: number("new_tokens"), temperature: number("temperature"), seed: number("seed") };
    } catch (error) { complain(error); return; }
    State.set({
      change: prompt === Trace.state.prompt ? State.get("change") : null, prompt, steer: editor.text(), start: asked.start === 1 ? null : asked.start, new: asked.new_tokens,
      temperature: asked.temperature || null, seed: asked.seed || null,
    });
    state.key = address();
    stop();
    const abort = state.abort = new AbortController();
    Object.assign(state, { texts: {}, asked, code: "" });
    const bar = at("steer-progress");
    bar.max = 4 * asked.new_tokens;
    bar.value = 0;
    at("written").hidden = false;
    at("steer-export").hidden = true;
    at("steer-stop").disabled = false;
    draw(false);
    const said = (text) => { at("steer-state").textContent = text; };
    said("writing …");
    try {
      await follow("/api/steer", asked, abort.signal, (line) => {
        if (line.texts) {
          line.texts.forEach((one) => { state.texts[key(one.model, one.changed)] = one.text; });
          state.code = line.code;
          return;
        }
        state.texts[key(line.model, line.changed)] = line.text;
        bar.value = line.step;
        said(NAMES[line.model] + (line.changed ? ", changed" : ", unchanged"));
        draw(false);
      });
      draw(true);
      said((asked.changes.length ? "" : "No feature is changed: both columns are the same. ") + "Marked: from where the text differs.");
      at("steer-export").hidden = false;
    } catch (error) {
      said(error.name === "AbortError" ? "stopped" : "");
      complain(error);
    } finally {
      if (state.abort === abort) at("steer-stop").disabled = true;
    }
  };
  const stop = () => { if (state.abort) state.abort.abort(); };

  // What the address says of the texts: the same key, the same texts.
  const address = () => ["prompt", "steer", "start", "new", "temperature", "seed"].map(State.get).join("\n");

  // The address' values, or what they are where it says nothing.
  const adopt = () => {
    editor.read(State.get("steer"));
    at("steer-start").value = State.whole("start", 1);
    at("steer-new").value = State.whole("new", 24);
    at("steer-temperature").value = Number(State.get("temperature")) || 0;
    at("steer-seed").value = State.whole("seed", 0);
  };
  const reset = () => {
    stop();
    Object.assign(state, { texts: {}, asked: null });
    State.set({ steer: null, start: null, new: null, temperature: null, seed: null });
    adopt();
    at("written").hidden = true;
    at("steer-state").textContent = "";
  };
  // Changes from elsewhere: added to what is here.
  const take = (changes) => {
    changes.forEach((one) => editor.put({ ...one }));
    Bench.go("steer");
  };

  Sheet.bar(at("steer-export"), () => ({
    name: "steering", title: "Steered text, " + document.title,
    facts: [state.asked.changes.map(Changes.words).join(", ") || "no feature is changed", "from token " + state.asked.start + " on; temperature " + state.asked.temperature],
    tokens: [], tables: [{ name: "texts", columns: ["model", "changed", "text"],
      rows: KINDS.map(([model, changed]) => [model, changed ? "yes" : "no", state.texts[key(model, changed)]]) }],
    blocks: [{ title: "prompt", text: state.asked.prompt }], question: state.asked, answers: state.texts, code: state.code,
  }));
  at("steer-form").addEventListener("submit", (event) => { event.preventDefault(); write(); });
  at("steer-stop").addEventListener("click", stop);
  at("steer-reset").addEventListener("click", reset);
  return { adopt, take, write, state, key: address };
})();
