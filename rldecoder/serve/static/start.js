"use strict";
// From the address to the page: on loading, and when the browser goes back.
(() => {
  const { at, select, complain, hasView } = Bench;

  const option = (id, value) => {
    if ([...at(id).options].some((one) => one.value === value)) at(id).value = value;
  };
  const targetOf = () => {
    const token = State.whole("target", null);
    return token === null ? null : { token, minus: State.whole("minus", null) };
  };

  // The prompt's view as the address says; what is there already is not asked for again.
  const readPrompt = async () => {
    const prompt = State.get("prompt");
    const place = State.whole("at", null);
    const target = targetOf();
    const aimed = JSON.stringify(target) === JSON.stringify(Trace.state.target);
    Trace.state.target = target;
    const change = State.get("change");
    const moves = Trace.state.prompt === prompt && place !== null && place !== Trace.state.position
      && place < Trace.state.tokens.length;
    if (Trace.state.prompt !== prompt) {
      Intervene.editor.clear();
      if (!await Trace.read(place)) return;
    } else if (moves) await Trace.move(place);
    else if (!aimed) await Trace.setTarget(target);
    if (moves || change !== Intervene.editor.text()) {
      Intervene.editor.read(change);
      State.set({ change: Intervene.editor.text() });
      if (Intervene.changed()) await Intervene.run();
      else Intervene.reset();
    }
  };

  const show = async (adopted) => {
    const view = hasView(State.get("view")) ? State.get("view") : "trace";
    if (adopted) {
      option("order", State.get("order"));
      option("change-where", State.get("where"));
      if (State.get("prompt")) at("prompt").value = State.get("prompt");
      if (State.get("other")) at("other").value = State.get("other");
    }
    select(view);
    try {
      if (view === "trace" && State.get("prompt")) await readPrompt();
      if (adopted && Steer.key() !== Steer.state.key) {
        Steer.adopt();
        if (view === "steer" && State.get("prompt") && State.get("steer")) await Steer.write();
      }
      if (adopted && view === "compare" && State.get("prompt") && State.get("other") && Compare.key() !== Compare.state.key) {
        const places = [State.whole("at", null), State.whole("otherat", null)];
        await Compare.run(places.includes(null) ? null : places);
      }
    } catch (error) { complain(error); }
  };

  at("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    Intervene.forget();
    State.set({ prompt: at("prompt").value, at: null, change: null });
    const view = State.get("view");
    if (view === "steer") Steer.write();
    else if (view === "compare") Compare.run();
    else Trace.read();
  });
  document.querySelectorAll(".example-prompt").forEach((node) => node.addEventListener("click", () => {
    at("prompt").value = node.textContent;
    at("ask").requestSubmit();
  }));

  State.watch(show);
  State.adopt();
})();
